"""Runs that start from the weights of a trained model."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from fake_hub import FakeHub, Model
from runs import differences, run, run_ranks
from safetensors.torch import load_file

import train_vae
from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from modeling.latent_prior import DiffusionPrior, GaussianPrior
from modeling.pipeline import FaceVAEPipeline
from training.builders import build_model
from training.checkpoint.run_dir import RunFolder
from training.initial_weights import fitted_priors, load_initial_weights
from training.publish.card import write_card
from training.publish.run_record import read_run
from training.run_files import MODEL_FILE, OPTIMIZER_FILE, WEIGHTS_FILE, best_checkpoint, list_checkpoints
from training.trainer import EXIT_STOPPED, Trainer

HALVES = {"decoder": ("decoder.",), "encoder": ("encoder.", "logvar_bias.")}


def fine_tuning(folder: Path, faces: Path, init_from: Path | str, *, model: dict | None = None, **presets):
    """The tiny configuration, one epoch from the weights of another model."""
    presets = {"num_epochs": 1, "init_from": str(init_from), **presets}
    return tiny.tiny_config(folder, faces, training_presets=presets, model=model or {})


def model_of(finished) -> dict[str, torch.Tensor]:
    return load_file(best_checkpoint(finished.folder)[0] / MODEL_FILE)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_starts_from_an_exported_model_a_run_or_a_checkpoint(finished, faces, tmp_path, session):
    checkpoint = list_checkpoints(finished.folder)[-1]
    sources = {
        Path(finished.status["model_dir"]): model_of(finished),
        finished.folder: model_of(finished),
        checkpoint: load_file(checkpoint / MODEL_FILE),
    }
    for source, weights in sources.items():
        model = build_model(finished.config)
        assert not same(dict(model.state_dict()), weights)
        origin = load_initial_weights(model, str(source))
        assert (origin["init_from"], origin["base_model"]) == (str(source), None)
        assert origin["weights"]["run"] == finished.folder.name
        assert same(dict(model.state_dict()), weights)
    trainer = Trainer(fine_tuning(tmp_path, faces, finished.folder))
    trainer.tracker.close()
    assert same(dict(trainer.model.state_dict()), model_of(finished))  # the PCA branch is kept
    assert trainer.progress.step == 0 and not trainer.setup.optimizer.state
    assert json.loads((trainer.run_dir / "run.json").read_text())["init_from"] == str(finished.folder)
    assert f"weights   from {finished.folder}" in (trainer.run_dir / "training.log").read_text()


def test_the_pca_branch_is_refitted_on_request(finished, faces, tmp_path, session):
    trainer = Trainer(fine_tuning(tmp_path, faces, finished.folder, pca_refit=True, pca_init_images=12))
    trainer.tracker.close()
    before, now = model_of(finished), trainer.model.state_dict()
    changed = {name for name, value in now.items() if not torch.equal(value, before[name])}
    assert {"pca_branch.encoder.linear.weight", "pca_branch.decoder.linear.weight", "logvar_bias.bias"} <= changed
    assert "PCA initialization: images 12" in (trainer.run_dir / "training.log").read_text()


@pytest.mark.parametrize("train_only", ["encoder", "decoder"])
def test_only_one_half_is_trained_and_a_resume_changes_nothing(finished, faces, tmp_path, train_only):
    presets = {"train_only": train_only, "weight_decay": 0.1, "optimizer": "adamw"}
    stopped = run(fine_tuning(tmp_path, faces, finished.folder, **presets), stop_after={2: signal.SIGINT})
    assert stopped.code == EXIT_STOPPED
    # The run knows where it started from: the command line need not repeat it, and the model may be gone.
    ended = run(tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": 1, **presets}), "auto")
    assert (ended.code, ended.folder) == (0, stopped.folder)
    checkpoint = list_checkpoints(ended.folder)[-1]
    before, now = model_of(finished), load_file(checkpoint / MODEL_FILE)
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert changed and all(name.startswith(HALVES[train_only]) for name in changed)
    for file in (WEIGHTS_FILE, OPTIMIZER_FILE):
        names = {name.rpartition("/")[2] for name in load_file(checkpoint / file)}
        assert names and all(name.startswith(HALVES[train_only]) for name in names)
    alone = run(fine_tuning(tmp_path / "alone", faces, finished.folder, **presets))
    found = differences(ended.folder, alone.folder)
    assert [text for text in found if not text.startswith("state config")] == []
    record = read_run(ended.folder)
    assert record.init_from == str(finished.folder) and record.base_model is None
    write_card(Path(ended.status["model_dir"]), "org/tuned", record)
    card = (Path(ended.status["model_dir"]) / "README.md").read_text()
    frozen = {"encoder": "decoder", "decoder": "encoder"}[train_only]
    assert f"Started from the weights of `{finished.folder.name}`; the {frozen} was frozen." in card
    assert "base_model" not in card and str(finished.folder) not in card


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that communicate by gloo")
def test_two_processes_train_one_half_as_one_process_does(finished, faces, tmp_path):
    weights = []
    for ranks in (1, 2):
        config = fine_tuning(tmp_path / str(ranks), faces, finished.folder, train_only="decoder", micro_batch_size=2)
        log = tmp_path / f"log{ranks}"
        assert run_ranks(config, None, log, ranks) == [0] * ranks, log.read_text()
        (folder,) = Path(config.output.runs_dir).glob("tiny_*")
        weights.append(load_file(list_checkpoints(folder)[-1] / MODEL_FILE))
    before = model_of(finished)
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, atol=1e-5), name
        assert name.startswith("decoder.") != torch.equal(value, before[name]), name


@pytest.mark.parametrize("saved_as", ["model", "pipeline"])
def test_priors_stay_with_a_model_whose_decoder_is_trained_further(finished, faces, tmp_path, saved_as):
    exported = Path(finished.status["model_dir"])
    vae = AutoencoderKLUltra.from_pretrained(exported)
    image_size, patch_size = vae.config.pca_size, vae.config.pca_size // 10
    prior = DiffusionPrior(vae.config.latent_dim, 3, image_size, patch_size, (8, 16), (1, 1, 1), num_inference_steps=3)
    folder = tmp_path / "start"
    if saved_as == "model":
        shutil.copytree(exported, folder)
        prior.save_pretrained(folder / "priors" / "diffusion")
    else:
        FaceVAEPipeline(vae, GaussianPrior(vae.config.latent_dim), prior).save_pretrained(folder)
    ended = run(fine_tuning(tmp_path, faces, folder, train_only="decoder"))
    pipe = FaceVAEPipeline.from_pretrained(ended.status["model_dir"])
    assert pipe.fitted_priors == {"model": ["diffusion"], "pipeline": ["gaussian", "diffusion"]}[saved_as]
    assert same(pipe.diffusion.state_dict(), prior.state_dict())
    assert (ended.folder / "samples" / "tiny_final_samples_diffusion.png").is_file()
    assert fitted_priors(str(list_checkpoints(ended.folder)[-1]), vae.config.latent_dim)  # of the run
    # Where the encoder or the PCA branch is trained, they no longer belong to the model.
    ended = run(fine_tuning(tmp_path / "all", faces, folder))
    assert not list(ended.folder.glob("samples/*diffusion*"))
    ended = run(fine_tuning(tmp_path / "pca", faces, folder, train_only="decoder", pca_lr_scale=0.1))
    assert not (ended.folder / "priors").exists()
    assert FaceVAEPipeline.from_pretrained(ended.status["model_dir"]).fitted_priors == []


# ---------------------------------------------------------------------- what is refused


def test_another_architecture_is_refused_with_the_keys_that_differ(finished, faces, tmp_path, session):
    model = {"vector_width": 16, "encoder_layers_per_block": [1, 2], "logvar_init": -3.0}
    with pytest.raises(ValueError) as error:
        Trainer(fine_tuning(tmp_path, faces, finished.folder, model=model))
    assert (
        "model.encoder_layers_per_block is [1, 1] there and [1, 2] here, model.vector_width is 8 there and 16 here"
        in (str(error.value))
    )
    assert "--set 'model.encoder_layers_per_block=[1,1]' --set model.vector_width=8" in str(error.value)
    assert "logvar_init" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_spatial_model_may_start_from_one_of_another_resolution(tmp_path):
    spatial = {"latent_layout": "spatial", "latent_channels": 4, "latent_size": 5, "latent_dim": 100}
    small = tiny.random_vae(**spatial)
    small.save_pretrained(tmp_path / "small")
    sizes = {"sample_size": 80, "latent_size": 10, "latent_dim": 400, "pca_size": 40, "pca_decode_size": 40}
    large = AutoencoderKLUltra(**tiny.SETTINGS["model"] | spatial | sizes)
    load_initial_weights(large, str(tmp_path / "small"))
    pixels = torch.rand(1, 3, 80, 80) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(large(pixels).sample, small(pixels).sample, atol=1e-5)


def test_resume_refuses_a_run_that_started_from_other_weights(finished, faces, tmp_path, session):
    run_dir = tmp_path / "runs" / "tiny_20000101_000000" / "checkpoints"
    run_dir.parent.mkdir(parents=True)
    run_dir.symlink_to(finished.folder / "checkpoints")
    remedy = "to resume that run, leave out --init-from, or give --set training_presets.init_from=null"
    with pytest.raises(
        ValueError, match=f"init_from is other/model, but the run .* started from random weights: {remedy}"
    ):
        Trainer(fine_tuning(tmp_path, faces, "other/model"), "auto")
    (run_dir.parent / "run.json").write_text(json.dumps({"init_from": str(tmp_path / "base")}))
    with pytest.raises(ValueError, match=rf"init_from is other/model, .*init_from=\"{tmp_path / 'base'}\" "):
        RunFolder(fine_tuning(tmp_path, faces, "other/model")).open("auto")
    folder = RunFolder(fine_tuning(tmp_path, faces, tmp_path / "runs" / ".." / "base"))  # another spelling
    assert folder.open("auto")["run_dir"] == run_dir.parent
    folder.release()


def test_a_missing_model_is_an_error_of_one_line(faces, tmp_path, capsys, session):
    values = tiny.tiny_settings(tmp_path, faces)
    (tmp_path / "tiny.json").write_text(json.dumps(values))
    command = ["--config", str(tmp_path / "tiny.json"), "--init-from", str(tmp_path / "missing")]
    for options in ([], ["--dry-run"]):
        assert train_vae.main(command + options) == 2
        assert re.match(
            r"error: there is no folder .*missing.*exported model, a run or a checkpoint", capsys.readouterr().err
        )


@pytest.mark.parametrize("presets", [{}, {"init_from": "org/model", "train_only": "decoder"}])
def test_a_refit_without_a_model_or_of_a_frozen_encoder_is_refused(faces, tmp_path, presets):
    with pytest.raises(ValueError, match="training_presets.pca_refit must be false without init_from"):
        tiny.tiny_config(tmp_path, faces, training_presets={"pca_refit": True, **presets})


# ---------------------------------------------------------------------- the Hub


def test_a_model_on_the_hub_becomes_the_base_model_of_the_card(finished, tmp_path, monkeypatch):
    folder = Path(finished.status["model_dir"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with FakeHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        dim = finished.config.model["latent_dim"]
        config = json.dumps({"latent_dim": dim}).encode()
        hub.models["org/base"] = Model(False, files | {"priors/gaussian/config.json": config})
        pipeline = {f"vae/{name}": content for name, content in files.items()} | {"model_index.json": b"{}"}
        hub.models["org/pipeline"] = Model(False, pipeline | {"diffusion/config.json": config})
        model = build_model(finished.config)
        origin = load_initial_weights(model, "org/base")
        found = {name: fitted_priors(f"org/{name}", dim) for name in ("base", "pipeline")}
        assert fitted_priors("org/base", dim + 1) == []  # another latent
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "base": ["gaussian"],
        "pipeline": ["diffusion"],
    }
    assert origin["init_from"] == origin["base_model"] == "org/base"
    assert origin["weights"]["run"] == finished.folder.name
    assert same(dict(model.state_dict()), model_of(finished))
    record = read_run(finished.folder)
    record.init_from = record.base_model = "org/base"
    (tmp_path / "model").mkdir()
    for path in folder.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    write_card(tmp_path / "model", "org/tuned", record)
    card = huggingface_hub.ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "finetune")
    assert "Started from the weights of [org/base](https://huggingface.co/org/base)." in card.text
