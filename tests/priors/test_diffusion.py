"""Training of the diffusion prior: a run from start to end, resume, several processes, errors."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from runs import fork_ranks
from safetensors.torch import load_file, save_file

from modeling.pipeline import FaceVAEPipeline
from training.checkpoint.manager import CheckpointManager
from training.config import Config, config_from_dict
from training.priors import fit
from training.priors.diffusion import DiffusionTraining, build_prior, sample_batch
from training.randomness import keyed_generator
from training.run_files import GUIDE_FILE, MODEL_FILE, OPTIMIZER_FILE, WEIGHTS_FILE, list_checkpoints, read_state
from training.signals import EXIT_STOPPED

STEPS = 3  # of an epoch
SETTINGS = {
    "model": {"patch_size": 2, "block_out_channels": [8, 16], "layers_per_block": [1, 2, 1], "num_inference_steps": 2},
    "training_presets": {
        "num_epochs": 3, "batch_size": 4, "learning_rate": 1e-2, "optimizer": "adamw", "lr_warmup_steps": 1,
        "mixed_precision": "no",
    },
    "output": {"run_name": "prior", "log_every_steps": 2, "sample_every_epochs": 1, "num_samples": 2},
}  # fmt: skip


def config(folder, **sections) -> Config:
    values = {name: SETTINGS.get(name, {}) | sections.get(name, {}) for name in {**SETTINGS, **sections}}
    values["output"] = values["output"] | {"runs_dir": str(folder / "runs")}
    return config_from_dict(values)


def random_latents(vae) -> dict[str, torch.Tensor]:
    """Posteriors of 12 faces and their flipped images, with two attributes."""
    generator, shape = torch.Generator().manual_seed(0), (24, vae.config.latent_dim)
    return {"num_faces": torch.tensor(12)} | {
        f"{split}_{name}": values
        for split in ("train", "validation")
        for name, values in {
            "mean": torch.randn(shape, generator=generator),
            "std": torch.full(shape, 0.1),
            "attributes": torch.randint(0, 2, (24, 2), generator=generator, dtype=torch.int8) * 2 - 1,
        }.items()
    }


def train(folder, resume=None, vae=None, **sections) -> tuple[int, DiffusionTraining]:
    vae = vae or tiny.random_vae()
    vae.save_pretrained(folder / "model")
    training = DiffusionTraining(
        vae, random_latents, config(folder, **sections), folder / "model", ("Smiling", "Male"), resume
    )
    return training.run(), training


def train_until(step, folder, monkeypatch) -> DiffusionTraining:
    """A run that a signal stops after a step, within the second epoch."""
    original = DiffusionTraining._step

    def stop_there(self, stop):
        stop.received = "SIGTERM" if self.progress.step == step - 1 else stop.received
        return original(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTraining, "_step", stop_there)
        code, training = train(folder)
    assert code == EXIT_STOPPED and training.progress.step == step
    return training


def checkpoint_tensors(run_dir) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    checkpoint = list_checkpoints(run_dir)[-1]
    return {
        f"{file}/{name}": tensor
        for file in (GUIDE_FILE, MODEL_FILE, OPTIMIZER_FILE, WEIGHTS_FILE)
        for name, tensor in load_file(checkpoint / file).items()
    }


def test_a_run_trains_validates_samples_and_exports(session, tmp_path):
    code, training = train(tmp_path)
    assert code == 0 and training.progress.step == 3 * STEPS
    lines = [json.loads(line) for line in (training.run_dir / "metrics.jsonl").read_text().splitlines()]
    validations = [line["validation/velocity_loss"] for line in lines if line["kind"] == "validation"]
    assert len(validations) == 3 and validations[-1] < validations[0]
    assert {line["step"] for line in lines if line["kind"] == "train"} == {1, 2, 4, 6, 8}
    assert len(list((training.run_dir / "samples").glob("*.png"))) == 3
    assert "GFLOPs per image" in (training.run_dir / "training.log").read_text()
    exported, best = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (
        tmp_path / "model" / "priors" / "diffusion", training.checkpoints.best_model_dir))  # fmt: skip
    assert all(torch.equal(tensor, best[name]) for name, tensor in exported.items())


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(session, tmp_path, monkeypatch):
    expected = checkpoint_tensors(train(tmp_path / "uninterrupted")[1].run_dir)
    interrupted = train_until(4, tmp_path / "parts", monkeypatch)
    code, resumed = train(tmp_path / "parts", resume="auto")
    assert code == 0 and resumed.run_dir == interrupted.run_dir
    found = checkpoint_tensors(resumed.run_dir)
    assert found.keys() == expected.keys() and len(found) > 50
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_guide_is_the_network_of_an_earlier_step(session, tmp_path, monkeypatch):
    original, ema = DiffusionTraining._step, {}

    def step(self, stop):
        flags = original(self, stop)
        ema[self.progress.step] = [parameter.clone() for parameter in self.ema.shadow_params]
        guides[self.progress.step] = [parameter.clone() for parameter in self.prior.guide.parameters()]
        return flags

    guides: dict[int, list[torch.Tensor]] = {}
    monkeypatch.setattr(DiffusionTraining, "_step", step)
    _, training = train(tmp_path, training_presets=SETTINGS["training_presets"] | {"num_epochs": 6})

    def same(one, other):
        return all(map(torch.equal, one, other))

    assert training.progress.step == 18 and not same(guides[3], guides[4])
    for last, source in ((15, 1), (18, 4)):  # from 4 and 16 steps on
        for steps in range(4 * source, last + 1):
            assert same(guides[steps], ema[source])
    exported = FaceVAEPipeline.from_pretrained(tmp_path / "model").diffusion
    assert same(exported.guide.parameters(), guides[training.progress.best["step"]])
    assert not same(exported.guide.parameters(), exported.network.parameters())


def test_micro_batches_give_the_same_training_and_auto_is_refused(session, tmp_path):
    folders = {size: tmp_path / str(size) for size in (None, 3)}
    whole, parts = (
        train(folder, training_presets=SETTINGS["training_presets"] | {"micro_batch_size": size})[1]
        for size, folder in folders.items()
    )
    batch = sample_batch(parts.latents, "train", parts.prior, parts.config.training_presets.batch_size, (0, 0))
    assert len(parts._micro_batches(batch)) > 1 == len(whole._micro_batches(batch))
    one, other = checkpoint_tensors(whole.run_dir), checkpoint_tensors(parts.run_dir)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=2e-3, msg=name)
    losses = [training.progress.best["validation/velocity_loss"] for training in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ValueError, match='micro_batch_size is "auto", which a prior does not have'):
        train(tmp_path / "auto", training_presets=SETTINGS["training_presets"] | {"micro_batch_size": "auto"})


def test_a_resume_with_other_weights_of_the_vae_is_refused(session, tmp_path, monkeypatch):
    _, first = train(tmp_path)
    torch.manual_seed(1)
    other = tiny.random_vae()
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(1)
    train(tmp_path, "auto", other)  # the latents do not depend on the decoder
    with torch.no_grad():
        other.encoder.conv_in.bias.add_(1)
    with pytest.raises(ValueError, match="the latents of a VAE with other weights: leave out --resume"):
        train(tmp_path, "auto", other)

    def change_the_vae(self, stop):
        other.save_pretrained(self.model_dir)
        return "3 epochs"

    monkeypatch.setattr(DiffusionTraining, "_train", change_the_vae)
    with pytest.raises(ValueError, match="no longer holds the VAE that this prior was trained for: copy the prior"):
        train(tmp_path, "auto")


def test_an_older_run_resumes_with_its_epochs_and_a_note(session, tmp_path, monkeypatch):
    interrupted = train_until(4, tmp_path, monkeypatch)
    latents = interrupted.run_dir / "latents.safetensors"
    save_file({name: tensor for name, tensor in load_file(latents).items() if name != "num_faces"}, latents)
    (interrupted.run_dir / "run.json").write_text("{}")
    code, resumed = train(tmp_path, "auto")
    assert code == 0 and resumed.steps_per_epoch == 2 * STEPS
    assert "has not recorded the weights of its VAE" in (resumed.run_dir / "training.log").read_text()
    latents.unlink()
    with pytest.raises(ValueError, match="latents.safetensors is missing, which every process reads"):
        train(tmp_path, "auto")


def test_a_resume_may_shorten_the_epochs(session, tmp_path, monkeypatch):
    assert train_until(5, tmp_path, monkeypatch).progress.batch == 2
    code, resumed = train(tmp_path, "auto", training_presets=SETTINGS["training_presets"] | {"max_images_per_epoch": 4})
    assert code == 0 and (resumed.progress.epoch, resumed.steps_per_epoch) == (3, 1)


def test_gradients_that_stay_non_finite_end_the_run_and_a_loss_that_is_not_finite_is_never_the_best(
    session, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        DiffusionTraining, "_loss", lambda self, batch: self.model.network.conv_out.bias.sum() * float("nan")
    )
    with pytest.raises(RuntimeError, match="20 steps in a row had no finite gradient"):
        train(tmp_path, training_presets=SETTINGS["training_presets"] | {"num_epochs": 30})
    (run,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["optim/skipped_steps"] for line in lines if line["kind"] == "train") == 18
    assert json.loads((run / "status.json").read_text())["best"] is None


@pytest.mark.multiprocess
def test_two_processes_equal_one(tmp_path):
    folders = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for ranks, folder in folders.items():
        assert fork_ranks(lambda folder=folder: train(folder)[0], tmp_path / f"{ranks}.log", ranks) == [0] * ranks
    one, two = (checkpoint_tensors(next((folder / "runs").iterdir())) for folder in folders.values())
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3, msg=name)


def test_batches_are_samples_of_posteriors_with_some_attributes_left_out():
    vae = tiny.random_vae()
    latents, prior = random_latents(vae), build_prior(Config(model=SETTINGS["model"]), vae, ("Smiling", "Male"))
    batch = sample_batch(latents, "train", prior, 4000, (0, 1))
    repeated = sample_batch(latents, "train", prior, 4000, (0, 1))
    assert all(torch.equal(tensor, repeated[name]) for name, tensor in batch.items())
    distances = torch.cdist(batch["latents"], latents["train_mean"]).amin(dim=1) / vae.config.latent_dim**0.5
    assert distances.mean() == pytest.approx(0.1, rel=0.05)
    assert batch["sigma"].logit().std() == pytest.approx(1, rel=0.05)
    # All are dropped in 10 %; each of two is known with a probability that is uniform.
    unknown = (batch["attributes"] == 0).all(dim=1).float().mean()
    assert unknown == pytest.approx(0.1 + 0.9 / 3, abs=0.03)
    assert keyed_generator(0, 1).initial_seed() != keyed_generator(0, 2).initial_seed()


def test_the_command_trains_both_priors_with_attributes(session, tmp_path, faces, capsys):
    folder = tmp_path / "model"
    tiny.random_vae().save_pretrained(folder)
    settings = config(
        tmp_path,
        training_presets={"num_epochs": 1},
        data=tiny.SETTINGS["data"] | {"cache_dir": str(faces), "attribute_columns": ["Eyeglasses", "Smiling"]},
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings.to_dict()))
    assert fit.main([str(folder), "--priors", "gaussian", "diffusion", "--config", str(file)]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "status.json").read_text())["steps_per_epoch"] == 20 // 4  # flipped images do not count
    pipe = FaceVAEPipeline.from_pretrained(folder)
    assert pipe.default_prior == "diffusion" and list(pipe.diffusion.config.attributes) == ["Eyeglasses", "Smiling"]
    images = pipe(2, attributes={"Smiling": 1}, guidance_scale=2.0, output_type="pt").images
    assert images.shape == (2, 3, 40, 40) and images.isfinite().all()
    resumed = [str(folder), "--priors", "diffusion", "--config", str(file), "--resume", "auto", "--no-flip"]
    capsys.readouterr()
    assert fit.main(resumed) == 2
    assert '"flips": true}, and not with' in capsys.readouterr().err


def test_a_vae_without_pca_branch_raises(session, tmp_path):
    with pytest.raises(ValueError, match="needs a PCA branch"):
        DiffusionTraining(tiny.random_vae(pca_size=None), random_latents, config(tmp_path), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_argument_of_the_prior_raises(session, tmp_path):
    with pytest.raises(ValueError, match="section model: .*width.*arguments of DiffusionPrior"):
        DiffusionTraining(tiny.random_vae(), random_latents, config(tmp_path, model={"width": 3}), tmp_path)


@pytest.mark.parametrize("key", ["augment", "gradient_checkpointing"])
def test_keys_without_effect_raise(session, tmp_path, key):
    settings = config(tmp_path, training_presets={key: True})
    with pytest.raises(
        ValueError, match=f"training_presets.{key} is true, which the training of a prior does not have"
    ):
        DiffusionTraining(tiny.random_vae(), random_latents, settings, tmp_path)


def test_images_that_cannot_be_opened_leave_no_run(session, tmp_path):
    def missing(vae):
        raise ValueError("no split")

    with pytest.raises(ValueError, match="no split"):
        DiffusionTraining(tiny.random_vae(), missing, config(tmp_path), tmp_path)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_time_limit_within_an_epoch_is_no_epoch_without_improvement(session, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointManager, "update_best", lambda self, *_: False)
    with pytest.raises(RuntimeError, match="no model to export"):
        train(tmp_path, training_presets={"max_train_minutes": 1e-6})
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert read_state(list_checkpoints(run_dir)[-1])["progress"]["early_stopping_bad_epochs"] == 0


def test_a_run_beyond_its_time_limit_does_nothing(session, tmp_path):
    _, first = train(tmp_path, training_presets={"max_train_minutes": 1e-6, "early_stopping_patience": 2})
    assert first.progress.early_stopping_bad_epochs == 0
    metrics = (first.run_dir / "metrics.jsonl").read_text()
    code, again = train(tmp_path, "auto", training_presets={"max_train_minutes": 1e-6, "early_stopping_patience": 2})
    assert code == 0 and again.progress.step == first.progress.step and again.run_dir == first.run_dir
    assert (first.run_dir / "metrics.jsonl").read_text().count('"validation"') == metrics.count('"validation"')


def test_the_spatial_layout_is_learned_in_latent_space():
    vae = tiny.random_vae(
        sample_size=32, latent_layout="spatial", latent_channels=4, latent_size=4, latent_dim=64, pca_size=None
    )
    assert build_prior(Config(), vae, ()).noise_shape == (4, 4, 4)
