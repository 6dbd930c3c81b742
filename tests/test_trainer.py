"""A run from end to end on the tiny configuration: files, metrics, model, and conditions that end it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from runs import EPOCHS, STEPS, Run, run
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training import setup
from training import trainer as trainer_module
from training.budget.estimate import describe_estimate
from training.checkpoint.resume import FinishedRun
from training.config import load_config
from training.data.images import normalize
from training.evaluate.validation import Validation
from training.run_files import STATE_FILE, list_checkpoints
from training.setup import ROLLBACK_SEED
from training.trainer import EXIT_STOPPED, Trainer

ROOT = Path(__file__).parent.parent
TRAIN_NAMES = {
    *(f"{kind}/{term}" for kind in ("loss", "weighted") for term in ("mse", "l1", "perceptual", "lpips", "kl")),
    *("loss/reconstruction", "loss/total"),
    *(
        f"kl/{name}"
        for name in (
            "beta",
            "beta_floor",
            "loss_fraction",
            "smoothed_fraction",
            "target_low",
            "target_high",
            "nats_per_image",
        )
    ),
    *(f"optim/{name}" for name in ("learning_rate", "grad_norm", "clipped_fraction", "skipped_steps")),
    *(f"speed/{name}" for name in ("images_per_second", "data_wait_fraction", "memory_gib")),
}
VALIDATION_NAMES = {
    *("validation/mse", "validation/psnr", "validation/ssim", "validation/lpips_st_alexnet"),
    *("validation/reconstruction_loss", "validation/kl", "validation/active_units", "validation/posterior_sigma"),
    *("validation/latents_mean", "validation/latents_std", "validation/learning_rate"),
}


@pytest.fixture
def single_thread() -> Iterator[None]:
    """Sums are then taken in one order, in this process and in another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- what a run leaves ----


def test_a_run_ends_well_and_leaves_its_files(finished):
    assert finished.code == 0
    assert re.fullmatch(r"tiny_\d{8}_\d{6}", finished.folder.name)
    assert load_config(finished.folder / "config.json") == finished.config
    status = finished.status
    assert (status["state"], status["reason"], status["pid"]) == ("finished", f"{EPOCHS} epochs", os.getpid())
    assert (status["step"], status["epoch"], status["images_seen"]) == (EPOCHS * STEPS, EPOCHS, EPOCHS * STEPS * 4)
    assert Path(status["model_dir"]) == Path(finished.config.output.model_dir) / "vae_tiny"
    kinds = ("samples", "samples_gaussian", "reconstructions")
    samples = {f"tiny_{kind}_epoch_{epoch:04d}.png" for kind in kinds for epoch in (1, 2, 3)}
    samples |= {"tiny_final_samples.png", "tiny_final_samples_gaussian.png", "tiny_reconstructions_final.png"}
    assert {path.name for path in (finished.folder / "samples").iterdir()} == samples
    checkpoints = [path.name for path in list_checkpoints(finished.folder)]
    assert checkpoints == ["step_00000010", "step_00000015"]  # keep_checkpoints is 2
    folder = finished.folder / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {*checkpoints, "latest", "best"}
    assert (folder / "latest").resolve().name == "step_00000015"
    assert (folder / "best").resolve().name == f"step_{status['best']['step']:08d}"
    log = (finished.folder / "training.log").read_text()
    assert "precision no (from the configuration)" in log
    assert "PSNR" in log.splitlines()[-4] and "WARNING" not in log
    leftovers = [path for path in finished.folder.rglob("*") if path.suffix in (".tmp", ".old")]
    assert not leftovers


def test_the_log_begins_with_the_estimate(faces, tmp_path, session, monkeypatch):
    monkeypatch.setattr(setup, "describe_estimate", describe_estimate)
    trainer = Trainer(tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS}))
    trainer.tracker.close()
    trainer.setup.folder.release()
    log = (trainer.run_dir / "training.log").read_text()
    assert "epoch     20 images / 4 = 5 steps; x 3 epochs = 15 steps" in log


def test_grids_show_what_they_say(finished):
    for name, columns, rows in (("tiny_samples_epoch_0001", 2, 2), ("tiny_reconstructions_epoch_0001", 6, 2)):
        with Image.open(finished.folder / "samples" / f"{name}.png") as grid:
            assert grid.size == (2 + columns * 42, 2 + rows * 42)
            assert max(high - low for low, high in grid.convert("RGB").getextrema()) > 100  # not empty
    # The upper row holds the validation images themselves.
    with Image.open(finished.folder / "samples" / "tiny_reconstructions_epoch_0001.png") as grid:
        first = torch.tensor(list(grid.crop((2, 2, 42, 42)).tobytes())).view(40, 40, 3).permute(2, 0, 1)
    assert (first - finished.trainer.setup.validation_images[0].int()).abs().max() <= 1


def test_every_line_of_metrics_has_the_promised_names(finished):
    train, validation = finished.lines("train"), finished.lines("validation")
    assert [line["step"] for line in train] == [1, *range(2, EPOCHS * STEPS, 2)]
    assert [line["step"] for line in validation] == [0, 5, 10, 15]
    every = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    for line in every:
        names = {"train": TRAIN_NAMES, "validation": VALIDATION_NAMES}.get(line["kind"], {"message", "level"})
        assert set(line) == {"kind", "time", "step", "epoch", "images_seen", *names}
        assert line["kind"] == "event" or all(math.isfinite(line[name]) for name in names)
        assert line["images_seen"] == 4 * line["step"]


def test_a_loss_term_added_from_outside_is_trained_and_logged(session, faces, tmp_path):
    def mean_color(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return (reconstruction.float().mean(dim=(2, 3)) - pixels.mean(dim=(2, 3))).square().mean(dim=1)

    presets = {"num_epochs": 1, "max_images_per_epoch": 8}  # two steps
    losses = {"perceptual_weight": 0, "lpips_weight": 0}
    trainer = Trainer(tiny.tiny_config(tmp_path, faces, training_presets=presets, loss=losses))
    trainer.setup.loss.add_term("mean_color", 3.0, mean_color)
    assert trainer.run() == 0
    _, line = Run(trainer.config, trainer, 0).lines("train")
    assert line["loss/mean_color"] > 0
    assert line["weighted/mean_color"] == pytest.approx(3 * line["loss/mean_color"])
    terms = 0.4 * line["loss/mse"] + 0.2 * line["loss/l1"] + line["weighted/mean_color"]
    assert line["loss/reconstruction"] == pytest.approx(terms)
    events = EventAccumulator(str(trainer.run_dir)).Reload()
    assert events.Scalars("loss/mean_color")[-1].value == pytest.approx(line["loss/mean_color"])


def test_figures_agree_with_each_other(finished):
    weights = {"mse": 0.4, "l1": 0.2, "perceptual": 0.2, "lpips": 0.2}
    for line in finished.lines("train"):
        parts = {name: line[f"weighted/{name}"] for name in (*weights, "kl")}
        for name, weight in weights.items():
            assert parts[name] == pytest.approx(weight * line[f"loss/{name}"], rel=1e-5)
        assert line["loss/total"] == pytest.approx(sum(parts.values()), rel=1e-5)
        assert line["loss/reconstruction"] == pytest.approx(line["loss/total"] - parts["kl"], rel=1e-5)
        assert line["kl/nats_per_image"] == pytest.approx(16 * line["loss/kl"], rel=1e-6)
        assert 0 < line["kl/loss_fraction"] < 1 and 0 < line["kl/target_low"] < line["kl/target_high"] < 1
    for line in finished.lines("validation"):
        assert line["validation/psnr"] >= 10 * math.log10(4 / line["validation/mse"])  # Jensen: a mean of logarithms


def test_beta_follows_minimum_warm_up_and_cycle(finished):
    presets, kl = finished.config.training_presets, finished.trainer.kl
    lines = finished.lines("train")
    for line in lines:
        first_epoch = (line["step"] - 2) // STEPS  # of the two steps whose mean the line holds
        assert line["kl/beta_floor"] == kl.minimum_beta(line["epoch"])
        assert line["kl/beta"] >= kl.minimum_beta(first_epoch)
        factor = 0.25 if line["epoch"] % 2 == 0 else 1.0  # a cycle of 2 epochs, the first with low beta
        assert (line["kl/target_low"], line["kl/target_high"]) == (0.01 * factor, 0.03 * factor)
    assert lines[0]["kl/beta"] == presets.kl_beta_floor  # the minimum applies: the warm-up alone would be below it


def test_the_learning_rate_warms_up(finished):
    rates = {line["step"]: line["optim/learning_rate"] for line in finished.lines("train")}
    assert rates[2] == pytest.approx(1e-3 * 2 / 3)  # lr_warmup_steps is 2
    assert rates[4] == pytest.approx(1e-3)


def test_tensorboard_reads_it_all_back(finished):
    everything = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    events = EventAccumulator(str(finished.folder), size_guidance=everything).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= TRAIN_NAMES | VALIDATION_NAMES
    for line in finished.lines("train"):
        read = {event.step: event.value for event in events.Scalars("loss/total")}
        assert read[line["step"]] == pytest.approx(line["loss/total"], rel=1e-6)
    assert [event.step for event in events.Scalars("validation/psnr")] == [0, 5, 10, 15]
    assert set(tags["images"]) == {"samples", "samples_gaussian", "reconstructions"}
    shapes = {(image.height, image.width) for image in events.Images("reconstructions")}
    assert shapes == {(86, 254)}
    histogram = events.Histograms("validation/kl_per_dimension")[-1].histogram_value
    assert histogram.num == 16
    assert histogram.sum / 16 == pytest.approx(finished.lines("validation")[-1]["validation/kl"], rel=1e-4)
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts == {
        "weighted loss terms": ["weighted/.*"],
        "KL loss fraction and target range": ["kl/smoothed_fraction", "kl/target_low", "kl/target_high"],
    }
    assert all(
        any(re.match(pattern, tag) for tag in tags["scalars"]) for patterns in charts.values() for pattern in patterns
    )


# ---- the exported model ----


def ema_model(finished: Run) -> AutoencoderKLUltra:
    """The EMA weights of the best epoch, from its checkpoint."""
    step = finished.trainer.progress.best["step"]
    weights = finished.folder / "checkpoints" / f"step_{step:08d}" / "model" / "diffusion_pytorch_model.safetensors"
    model = AutoencoderKLUltra(**finished.config.model).eval()
    model.load_state_dict(load_file(weights))
    return model


def test_a_checkpoint_has_the_ema_weights_as_a_model_and_the_trained_weights_in_another_file(finished):
    """Of the last step, whose state the trainer still has."""
    trainer, checkpoint = finished.trainer, list_checkpoints(finished.folder)[-1]
    ema_weights = load_file(checkpoint / "model" / "diffusion_pytorch_model.safetensors")
    weights = load_file(checkpoint / "training_state" / "weights.safetensors")
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert ema_weights.keys() == trainer.model.state_dict().keys() and weights.keys() == trained.keys()
    for (name, weight), average in zip(trained.items(), trainer.ema.shadow_params, strict=True):
        assert torch.equal(weights[name], weight) and torch.equal(ema_weights[name], average)
        assert weight.numel() < 64 or not torch.equal(weight, average)
    for name, value in trainer.model.state_dict().items():
        assert name in trained or torch.equal(ema_weights[name], value)
    loaded = AutoencoderKLUltra.from_pretrained(checkpoint / "model")
    assert all(torch.equal(value, ema_weights[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.scaling_factor == trainer.model.config.scaling_factor


FRESH_PROCESS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from diffusers import AutoModel

folder, pixels, out, root = sys.argv[1:]
pixels = load_file(pixels)["pixels"]
found = {}
with torch.no_grad():
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert not [name for name in sys.modules if name.partition(".")[0] in ("modeling", "training")]
    found["auto"] = model(pixels).sample
    sys.path.insert(0, root)
    from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
    model, info = AutoencoderKLUltra.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    found["own"] = model.eval()(pixels).sample
save_file(found, out)
"""


@pytest.mark.slow  # imports torch and diffusers once more
def test_a_fresh_process_reconstructs_as_the_averaged_weights_do(finished, tmp_path, single_thread):
    pixels = normalize(finished.trainer.setup.validation_images).contiguous()
    with torch.no_grad():
        wanted = ema_model(finished)(pixels).sample
        here = AutoencoderKLUltra.from_pretrained(finished.status["model_dir"]).eval()(pixels).sample
    assert torch.equal(here, wanted)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    arguments = [finished.status["model_dir"], tmp_path / "pixels.safetensors", tmp_path / "out.safetensors", ROOT]
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["own"], wanted)
    assert torch.equal(found["auto"], wanted)


def test_the_exported_folder_is_complete_and_the_best_model(finished):
    folder = Path(finished.status["model_dir"])
    files = {"config.json", "diffusion_pytorch_model.safetensors", "autoencoder_kl_ultra.py"}
    assert {path.name for path in folder.iterdir()} == files
    for name in files:
        assert (folder / name).read_bytes() == (finished.folder / "checkpoints" / "best" / "model" / name).read_bytes()
    assert (folder / "autoencoder_kl_ultra.py").read_bytes() == (
        ROOT / "modeling" / "autoencoder_kl_ultra.py"
    ).read_bytes()
    losses = {line["step"]: line["validation/reconstruction_loss"] for line in finished.lines("validation")}
    del losses[0]  # before training
    best = finished.status["best"]
    assert best["step"] == min(losses, key=losses.get)
    assert best["validation/reconstruction_loss"] == min(losses.values())


def test_scaling_is_measured(finished):
    """Scaled latents of the validation images have mean 0 and variance 1, over all dimensions and for each channel."""
    model = AutoencoderKLUltra.from_pretrained(finished.status["model_dir"]).eval()
    config = model.config
    with torch.no_grad():
        posterior = model.encode(normalize(finished.trainer.setup.validation_images)).latent_dist
    generator = torch.Generator().manual_seed(0)
    samples = torch.cat([posterior.sample(generator=generator) for _ in range(50)])
    scaled = (samples - config.shift_factor) * config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0, abs=0.02)
    assert scaled.var().item() == pytest.approx(1, abs=0.04)
    assert config.scaling_factor != 1 and config.shift_factor != 0
    mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    assert mean.shape == std.shape == (16,)
    torch.testing.assert_close(samples.mean(dim=(0, 2, 3)), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(samples.std(dim=(0, 2, 3)), std, atol=0.1, rtol=0)


# ---- what ends a run, and what the validation decides ----


def scripted(losses: list[float]) -> Any:
    """A replacement for `validate` that returns these reconstruction losses in turn, and a growing KL."""

    def validate(accelerator, model, images, indices, **_: Any) -> Validation:
        number = scripted_calls.pop(0)
        names = ("mse", "psnr", "ssim", "lpips_st_alexnet", "active_units", "posterior_sigma", "latents_mean")
        values = dict.fromkeys(names, 0.5) | {
            "latents_std": 2.0,
            "kl": 10.0 * number,
            "reconstruction_loss": losses[number],
        }
        return Validation(values, torch.ones(16), torch.zeros(16), torch.ones(16), 0.0)

    scripted_calls = list(range(len(losses)))
    return validate


# Before training, and after each epoch. 0.39999 is less than a ten-thousandth better than 0.4: no improvement.
LOSSES = [0.9, 0.5, 0.4, 0.39999, 0.45, 0.41, 0.42, 0.1]
PLATEAU = {
    "num_epochs": 20,
    "max_images_per_epoch": 4,  # one step an epoch
    "lr_warmup_steps": 0,
    "plateau_patience": 2,
    "early_stopping_patience": 4,
}


@pytest.mark.parametrize("stop_after", [None, {4: signal.SIGTERM}], ids=["through", "interrupted"])
def test_plateau_early_stopping_and_best_model(faces, tmp_path, monkeypatch, stop_after):
    config = tiny.tiny_config(
        tmp_path, faces, training_presets=PLATEAU, loss={"lpips_weight": 0, "perceptual_weight": 0}
    )
    monkeypatch.setattr(trainer_module, "validate", scripted(LOSSES))
    ended = run(config, stop_after=stop_after)
    if stop_after:
        assert ended.code == EXIT_STOPPED
        ended = run(config, "auto")
    assert ended.code == 0
    # Epochs 3 to 6 do not improve on epoch 2: after three of them the rate falls, after four the run ends.
    assert ended.status["reason"] == "no improvement in 4 epochs (early stopping)"
    rates = [line["validation/learning_rate"] for line in ended.lines("validation")]
    assert rates == [1e-3] * 6 + [5e-4]  # logged before each epoch's decision: the fall after epoch 5 shows in epoch 6
    falls = [line for line in ended.lines("event") if "learning rate" in line["message"]]
    assert [line["epoch"] for line in falls] == [5]
    assert falls[0]["message"] == "learning rate 1.00e-03 -> 5.00e-04: no improvement in 2 epochs"
    best = ended.status["best"]
    assert (best["epoch"], best["validation/reconstruction_loss"]) == (2, 0.4)
    checkpoints = ended.folder / "checkpoints"
    # The best and the newest two are kept.
    assert [path.name for path in list_checkpoints(ended.folder)] == ["step_00000002", "step_00000005", "step_00000006"]
    assert (checkpoints / "best").resolve().name == "step_00000002"
    assert json.loads((checkpoints / "best/model/config.json").read_text())["scaling_factor"] == 0.5  # 1 / latents_std
    exported = Path(ended.status["model_dir"], "diffusion_pytorch_model.safetensors")
    assert load_file(exported).keys() == load_file(checkpoints / "best/model" / exported.name).keys()
    for name, value in load_file(checkpoints / "best/model" / exported.name).items():
        assert torch.equal(load_file(exported)[name], value)


def test_a_run_that_stops_early_between_two_checkpoints_saves_its_end(faces, tmp_path, monkeypatch):
    """A resume then knows that it has finished."""
    config = tiny.tiny_config(
        tmp_path,
        faces,
        training_presets=PLATEAU,
        loss={"lpips_weight": 0, "perceptual_weight": 0},
        output={"checkpoint_every_epochs": 10},
    )
    monkeypatch.setattr(trainer_module, "validate", scripted(LOSSES))
    ended = run(config)
    assert list_checkpoints(ended.folder)[-1].name == "step_00000006"
    assert (ended.folder / "samples" / "tiny_samples_epoch_0006.png").is_file()
    with pytest.raises(FinishedRun, match="raise training_presets.early_stopping_patience"):
        run(config, "auto")


def test_the_time_limit_ends_a_run_cleanly(faces, tmp_path):
    config = tiny.tiny_config(tmp_path, faces, training_presets={"max_train_minutes": 1e-6})
    ended = run(config)
    assert ended.code == 0
    assert (ended.status["state"], ended.status["step"]) == ("finished", 1)  # whose values are read for the log
    assert ended.status["reason"] == "the limit of 1e-06 minutes of training"
    assert [path.name for path in list_checkpoints(ended.folder)] == ["step_00000001"]
    AutoencoderKLUltra.from_pretrained(ended.status["model_dir"])


@pytest.mark.parametrize(("seconds_left", "last_step"), [(1e-6, 12), (-1e-6, 10)])
def test_the_time_limit_counts_all_sessions_and_is_no_epoch_without_improvement(
    finished, faces, tmp_path, monkeypatch, seconds_left, last_step
):
    before = json.loads((finished.folder / "checkpoints" / "step_00000010" / STATE_FILE).read_text())
    limit = (before["progress"]["train_seconds"] + seconds_left) / 60
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS, "max_train_minutes": limit})
    folder = Path(config.output.runs_dir) / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", folder / "checkpoints" / "step_00000010")
    monkeypatch.setattr(trainer_module, "validate", scripted([0.9]))  # worse than the best
    ended = run(config, "auto")
    assert (ended.code, ended.status["step"]) == (0, last_step)
    assert ended.status["reason"] == f"the limit of {limit:g} minutes of training"
    after = json.loads((folder / "checkpoints" / f"step_{last_step:08d}" / STATE_FILE).read_text())
    assert after["learning_rate"] == before["learning_rate"]
    for name in ("best", "early_stopping_bad_epochs"):
        assert after["progress"][name] == before["progress"][name]
    assert after["progress"]["batch"] == last_step - 10


def test_gradients_that_stay_infinite_roll_a_run_back_once_then_end_it(finished, faces, tmp_path):
    presets = {"num_epochs": EPOCHS, "max_skipped_in_a_row": 3}
    config = tiny.tiny_config(tmp_path, faces, training_presets=presets)
    folder = Path(config.output.runs_dir) / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", folder / "checkpoints" / "step_00000010")
    with tiny.process_state():
        trainer = Trainer(config, "auto")
        weights = [parameter.detach().clone() for parameter in trainer.setup.parameters]
        trainer.kl.beta = lambda *_: math.nan
        with pytest.raises(RuntimeError, match="3 steps in a row had no finite gradient, again, after a roll-back"):
            trainer.run()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "3 steps in a row" in status["reason"]
    assert all(torch.equal(old, new) for old, new in zip(weights, trainer.setup.parameters, strict=True))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    warned = [
        line
        for line in events
        if "no finite gradient" in line.get("message", "") or "skipped" in line.get("message", "")
    ]
    assert [line["step"] for line in warned] == [11, 12, 13, 10, 11, 12, 13]
    assert warned[3]["message"].startswith("rolled back from step 13 to step_00000010: 3 steps in a row")
    corrupt_examples = [
        re.search(r"images (.*), \.\.\.", line["message"]).group(1) for line in warned if "(images" in line["message"]
    ]
    assert corrupt_examples[:3] != corrupt_examples[-3:]  # another order of images
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000010"]


def test_a_run_that_recovers_after_a_roll_back_ends_well(faces, tmp_path):
    """What made the gradients infinite is gone with the other order: the run ends, and resumes bit for bit."""
    presets = {"num_epochs": 2, "max_skipped_in_a_row": 2}
    config = tiny.tiny_config(tmp_path, faces, training_presets=presets, output={"checkpoint_every_images": 8})
    with tiny.process_state():
        trainer = Trainer(config)
        gradients = trainer.train_step.gradients

        def poisoned(pixels, *, step, **settings):
            parts = gradients(pixels, step=step, **settings)
            if step >= 3 and not trainer.progress.rollbacks:
                trainer.setup.parameters[0].grad.fill_(math.nan)
            return parts

        trainer.train_step.gradients = poisoned
        assert trainer.run() == 0
    assert trainer.progress.rollbacks == 1 and trainer.progress.skipped_steps == 0
    assert trainer.train_step.seed == config.training_presets.seed + ROLLBACK_SEED
    checkpoint = list_checkpoints(trainer.run_dir)[-1]
    assert json.loads((checkpoint / STATE_FILE).read_text())["progress"]["rollbacks"] == 1
    log = (trainer.run_dir / "training.log").read_text()
    assert "rolled back from step 5 to step_00000002" in log and "finished: 2 epochs" in log
    (trainer.run_dir / "status.json").unlink()  # which says that nothing is left to do
    with tiny.process_state():
        again = Trainer(config, str(trainer.run_dir))
        again.tracker.close()
        again.setup.folder.release()
        assert again.train_step.seed == trainer.train_step.seed


def test_infinite_gradients_before_the_first_checkpoint_end_the_run(faces, tmp_path):
    config = tiny.tiny_config(tmp_path, faces, training_presets={"max_skipped_in_a_row": 2})
    with tiny.process_state():
        trainer = Trainer(config)
        trainer.kl.beta = lambda *_: math.nan
        with pytest.raises(RuntimeError, match="2 steps in a row had no finite gradient, before the first checkpoint"):
            trainer.run()


@pytest.mark.parametrize(("num_epochs", "warned"), [(20, False), (400, True)])
def test_a_minimum_beta_that_outgrows_the_target_range_is_a_warning(faces, tmp_path, session, num_epochs, warned):
    presets = {"num_epochs": num_epochs, "kl_beta_init": 1e-4, "kl_beta_floor": 5e-5, "kl_floor_growth": 1.02}
    trainer = Trainer(tiny.tiny_config(tmp_path, faces, training_presets=presets))
    trainer.tracker.close()
    trainer.setup.folder.release()
    message = "the minimum beta grows to 1.4e-01 in epoch 400, above kl_beta_init 1.0e-04"
    log = (trainer.run_dir / "training.log").read_text()
    assert (message in log) == warned and ("kl_floor_growth to at most 1.0017" in log) == warned
