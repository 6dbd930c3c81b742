"""An interrupted and resumed run is bitwise identical to an uninterrupted one; other configurations are refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from runs import EPOCHS, STEPS, assert_same_state, differences, run, same_weights
from torch._dynamo.utils import counters

import train_vae
from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.builders import build_model
from training.checkpoint.resume import FinishedRun, check_unfinished
from training.config import config_from_dict
from training.publish.hub import PushError
from training.run_files import STATE_FILE, list_checkpoints
from training.signals import StopSignal
from training.trainer import EXIT_STOPPED, Trainer


def test_two_interruptions_within_epochs_change_nothing(finished, faces, tmp_path):
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS})
    first = run(config, stop_after={3: signal.SIGTERM})  # noticed while step 4 runs
    assert first.code == EXIT_STOPPED == 75
    assert (first.status["state"], first.status["reason"], first.status["step"]) == ("stopped", "SIGTERM", 4)
    assert [path.name for path in list_checkpoints(first.folder)] == ["step_00000004"]
    assert not Path(config.output.model_dir).exists()
    second = run(config, "auto", stop_after={8: signal.SIGUSR1})
    assert (second.code, second.status["reason"], second.folder) == (EXIT_STOPPED, "SIGUSR1", first.folder)
    third = run(config, second.folder)
    assert (third.code, third.status["state"], third.folder) == (0, "finished", first.folder)
    assert_same_state(third, finished)
    for kind in ("train", "validation"):
        assert third.lines(kind) == finished.lines(kind)
    for name in ("tiny_final_samples.png", "tiny_reconstructions_final.png", "tiny_samples_epoch_0001.png"):
        assert (third.folder / "samples" / name).read_bytes() == (finished.folder / "samples" / name).read_bytes()
    exported = [Path(each.status["model_dir"], "diffusion_pytorch_model.safetensors") for each in (third, finished)]
    assert same_weights(*exported)


def test_resuming_at_the_end_of_an_epoch_changes_nothing(finished, faces, tmp_path):
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS})
    folder = Path(config.output.runs_dir) / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", folder / "checkpoints" / "step_00000010")
    resumed = run(config, folder / "checkpoints" / "step_00000010")
    assert (resumed.code, resumed.folder) == (0, folder)
    assert_same_state(resumed, finished)
    assert resumed.lines("train") == finished.lines("train", after_step=10)
    assert resumed.lines("validation") == finished.lines("validation", after_step=10)
    assert "resumed from" in (folder / "training.log").read_text()


def test_a_stop_at_the_last_step_of_an_epoch_and_a_kill_after_its_validation_change_nothing(finished, faces, tmp_path):
    """The validation is logged but not in the checkpoint: it is repeated, and logged once."""
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS})
    first = run(config, stop_after={STEPS: signal.SIGTERM})
    assert (first.code, first.status["step"]) == (EXIT_STOPPED, STEPS)
    assert [line["epoch"] for line in first.lines("validation")] == [0]

    class Killed(BaseException):
        pass

    def killed() -> None:
        raise Killed

    with tiny.process_state():
        second = Trainer(config, "auto")
        second.checkpoints.save = killed
        with pytest.raises(Killed):
            second.run()
    assert [line["epoch"] for line in first.lines("validation")] == [0, 1]
    third = run(config, "auto")
    assert (third.code, third.folder) == (0, first.folder)
    assert differences(third.folder, finished.folder) == []


def test_a_run_that_was_killed_after_its_last_step_resumes_to_its_end(finished, faces, tmp_path):
    """Nothing is left to train, and no result changes."""
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS})
    folder = Path(config.output.runs_dir) / finished.folder.name
    shutil.copytree(finished.folder, folder, symlinks=True)
    (folder / "status.json").write_text(json.dumps(finished.status | {"state": "running"}))
    again = run(config, "auto")
    assert (again.code, again.folder, again.status["step"]) == (0, folder, EPOCHS * STEPS)
    assert again.status["best"] == finished.status["best"]
    assert again.lines("train") == finished.lines("train")
    exported = [Path(each.status["model_dir"], "diffusion_pytorch_model.safetensors") for each in (again, finished)]
    assert same_weights(*exported)


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("model", {"vector_width": 16}, "model.vector_width (8 -> 16)"),
        (
            "data",
            {"horizontal_flip": False, "shuffle_buffer": 8},
            "data.horizontal_flip (true -> false), data.shuffle_buf",
        ),
        ("loss", {"lpips_weight": 0.3}, "loss.lpips_weight (0.2 -> 0.3)"),
        (
            "training_presets",
            {"batch_size": 5, "seed": 1},
            "training_presets.batch_size (4 -> 5), training_presets.seed",
        ),
        ("training_presets", {"optimizer": "adamw"}, 'training_presets.optimizer ("adam" -> "adamw")'),
        ("training_presets", {"ema_decay": 0}, "training_presets.ema_decay (0.9999 -> 0.0)"),
        ("output", {"run_name": "other"}, 'output.run_name ("tiny" -> "other")'),
    ],
)
def test_resume_refuses_another_run_by_the_names_of_its_keys(finished, session, section, changes, named):
    values = finished.config.to_dict()
    values[section] |= changes
    with pytest.raises(ValueError, match="was trained with other values of") as caught:
        Trainer(config_from_dict(values), str(finished.folder))
    assert named in str(caught.value)


def test_ema_weights_cannot_end_within_a_run(finished, session):
    values = finished.config.to_dict()
    values["training_presets"]["ema_decay"] = 0
    with pytest.raises(
        ValueError, match="start a new run, because training_presets.ema_decay cannot change within one"
    ):
        Trainer(config_from_dict(values), str(finished.folder), ["training_presets.ema_decay"])


@pytest.mark.parametrize(
    ("section", "changes", "batch", "is_kept"),
    [
        ("loss", {"trunk_weights": None}, 3, True),
        ("loss", {"mse_weight": 0.5}, 3, False),
        ("training_presets", {"batch_size": 2}, 6, True),
        ("training_presets", {"batch_size": 8}, 1, True),
    ],
)
def test_an_allowed_change_keeps_its_place_and_drops_a_best_value_of_another_loss(
    finished, faces, session, tmp_path, section, changes, batch, is_kept
):
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS})
    stopped = run(config, stop_after={7: signal.SIGTERM})  # in the third step of the second epoch
    assert (stopped.trainer.progress.batch, stopped.trainer.progress.best is None) == (3, False)
    values = config.to_dict()
    values[section] |= changes
    trainer = Trainer(config_from_dict(values), str(stopped.folder), [f"{section}.{name}" for name in changes])
    trainer.tracker.close()
    trainer.setup.folder.release()
    assert (trainer.progress.batch, trainer.progress.best is not None) == (batch, is_kept)


def test_a_change_is_accepted_where_it_is_allowed_by_name(finished, session, faces, tmp_path, capsys):
    run_dir = tmp_path / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", run_dir / "checkpoints" / "step_00000010")
    values = finished.config.to_dict()
    values["data"] |= {"horizontal_flip": False, "synthetic_train_images": 21}
    config = config_from_dict(values)
    with pytest.raises(ValueError, match="--allow-changed data.horizontal_flip data.synthetic_train_images"):
        Trainer(config, str(run_dir))
    allowed = ["data.horizontal_flip", "data.synthetic_train_images"]
    with pytest.raises(ValueError, match="the training images of 'synthetic_faces' have changed"):
        Trainer(config, str(run_dir), allowed)
    trainer = Trainer(config, str(run_dir), [*allowed, "data"])
    trainer.tracker.close()
    trainer.setup.folder.release()
    assert trainer.progress.step == 10
    assert "data.horizontal_flip was true, is now false" in (run_dir / "training.log").read_text()

    (tmp_path / "tiny.json").write_text(json.dumps(values))
    command = [
        "--config",
        str(tmp_path / "tiny.json"),
        "--resume",
        str(run_dir),
        "--allow-changed",
        "data.horizontal_flp",
    ]
    assert train_vae.main(command) == 2
    assert "data.horizontal_flp: did you mean data.horizontal_flip?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training_presets", "optimizer", "muon"),
        ("training_presets", "pca_lr_scale", 0.5),
        ("training_presets", "muon_lr_scale", 2.0),
        ("training_presets", "train_only", "decoder"),
    ],
)
def test_what_the_optimizer_depends_on_changes_in_a_new_run_only(finished, session, tmp_path, section, key, value):
    run_dir = tmp_path / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", run_dir / "checkpoints" / "step_00000010")
    values = finished.config.to_dict()
    values[section][key] = value
    with pytest.raises(
        ValueError, match=rf"other values of {section}.{key} .*{section}.{key} cannot change within one\.$"
    ):
        Trainer(config_from_dict(values), str(run_dir), [f"{section}.{key}"])
    assert not (run_dir / "config.json").exists()  # nothing was written


def test_another_model_is_refused_before_anything_is_written(finished, session, tmp_path):
    run_dir = tmp_path / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", run_dir / "checkpoints" / "step_00000010")
    values = finished.config.to_dict()
    values["model"]["vector_width"] = 16
    with pytest.raises(ValueError, match=r"has shape \(.*\) in the checkpoint and \(.*\) here: this is another model"):
        Trainer(config_from_dict(values), str(run_dir), ["model.vector_width"])
    assert not (run_dir / "config.json").exists()


def test_resume_takes_new_optimizer_settings(finished, session, tmp_path):
    folder = tmp_path / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", folder / "checkpoints" / "step_00000010")
    values = finished.config.to_dict()
    values["training_presets"] |= {"learning_rate": 2.5e-4, "weight_decay": 0.5, "adam_beta1": 0.5}
    values["training_presets"] |= {"plateau_patience": 3, "plateau_factor": 0.1, "min_learning_rate": 1e-6}
    trainer = Trainer(config_from_dict(values), str(folder))
    trainer.tracker.close()
    (group,) = trainer.setup.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (2.5e-4, 0.5, (0.5, 0.999))
    plateau = trainer.learning_rate._plateau
    assert (plateau.patience, plateau.factor, plateau.min_lrs) == (3, 0.1, [1e-6])
    assert plateau.best < math.inf  # restored from the checkpoint
    assert "training_presets.learning_rate was 0.001, is now 0.00025" in (folder / "training.log").read_text()


@pytest.mark.parametrize("changes", [{}, {"kl_beta_init": 2e-3}, {"kl_control_enabled": False}])
def test_a_resume_takes_a_new_first_beta(finished, session, tmp_path, changes):
    """Otherwise it continues with that of the checkpoint; without control there is only the first."""
    folder = tmp_path / "tiny_20000101_000000"
    checkpoint = shutil.copytree(
        finished.folder / "checkpoints" / "step_00000010", folder / "checkpoints" / "step_00000010"
    )
    saved = json.loads((checkpoint / STATE_FILE).read_text())
    values = finished.config.to_dict()
    values["training_presets"] |= changes
    trainer = Trainer(config_from_dict(values), str(folder))
    trainer.tracker.close()
    first = math.log(values["training_presets"]["kl_beta_init"])
    assert saved["kl"]["log_beta"] != math.log(finished.config.training_presets.kl_beta_init)
    assert trainer.kl.log_beta == (first if changes else saved["kl"]["log_beta"])
    assert trainer.progress.log_beta == (first if changes else saved["progress"]["log_beta"])


def test_a_run_whose_model_cannot_be_uploaded_says_so_by_its_exit_code(finished, session, tmp_path, monkeypatch):
    run_dir = shutil.copytree(finished.folder, tmp_path / finished.folder.name, symlinks=True)
    monkeypatch.setattr("training.publish.hub.check_access", lambda hub: None)
    results = iter([PushError("no network"), "https://example.com/org/name"])

    def publish(run_dir, hub):
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr("training.trainer.publish", publish)
    values = finished.config.to_dict()
    values["hub"] |= {"push": True, "repo_id": "org/name"}
    values["output"]["model_dir"] = str(tmp_path / "models")
    for code, message in ((1, "the upload failed (PushError: no network); retry with: "), (0, "published    https://")):
        assert Trainer(config_from_dict(values), str(run_dir)).run() == code
        assert message in (run_dir / "training.log").read_text()


def test_resuming_a_finished_run_changes_nothing(finished, session, capsys):
    files = {
        path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file() and path.name != "run.lock"
    }
    config = finished.config.to_dict()
    config["training_presets"]["learning_rate"] = 0.5
    with pytest.raises(FinishedRun, match="has finished .*raise training_presets.num_epochs; for a new run"):
        Trainer(config_from_dict(config), str(finished.folder))
    assert {path: path.read_bytes() for path in files} == files
    file = finished.folder.parent / "finished.json"
    file.write_text(json.dumps(config))
    assert train_vae.main(["--config", str(file), "--resume", str(finished.folder)]) == 0
    assert "nothing was changed" in capsys.readouterr().err


def test_a_finished_run_continues_where_something_is_left_to_do(finished, tmp_path):
    saved = json.loads((list_checkpoints(finished.folder)[-1] / STATE_FILE).read_text())
    for section, changes in (
        ("training_presets", {"num_epochs": EPOCHS + 1}),
        ("output", {"model_dir": str(tmp_path)}),  # to export to
        ("hub", {"push": True, "repo_id": "org/name"}),
    ):
        values = finished.config.to_dict()
        values[section] |= changes
        check_unfinished(config_from_dict(values), finished.folder, saved)
    with pytest.raises(FinishedRun):
        check_unfinished(finished.config, finished.folder, saved)


def test_resume_auto_without_a_run_starts_a_new_one(faces, session, tmp_path):
    trainer = Trainer(tiny.tiny_config(tmp_path, faces), "auto")
    trainer.tracker.close()
    assert trainer.progress.step == 0
    assert trainer.run_dir.is_dir()


# ---- settings that the shared run does not use ----


def test_bf16_with_a_trained_pca_branch_and_no_ema(faces, tmp_path):
    """Settings that the tiny configuration does not use, interrupted and resumed."""
    presets = {"mixed_precision": "bf16", "optimizer": "adamw", "pca_lr_scale": 0.01, "ema_decay": 0}
    presets |= {"gradient_checkpointing": True, "channels_last": False, "micro_batch_size": None}
    presets |= {"num_epochs": 1, "max_images_per_epoch": 12, "lr_warmup_steps": 0}
    sections = {"training_presets": presets, "loss": {"perceptual_weight": 0, "lpips_weight": 0}}
    sections["model"] = {"latent_layout": "spatial", "latent_channels": 4, "latent_size": 5, "latent_dim": 100}
    config = tiny.tiny_config(tmp_path, faces, **sections)
    assert run(config, stop_after={2: signal.SIGINT}).code == EXIT_STOPPED
    ended = run(config, "auto")
    assert (ended.code, ended.status["step"]) == (0, 3)
    alone = run(tiny.tiny_config(tmp_path / "alone", faces, **sections))
    assert differences(ended.folder, alone.folder) == []
    groups = ended.trainer.setup.optimizer.param_groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-5]
    assert all(
        parameter.requires_grad and parameter.dtype == torch.float32 for parameter in ended.trainer.model.parameters()
    )
    assert "precision bf16 (from the configuration)" in (ended.folder / "training.log").read_text()
    model = AutoencoderKLUltra.from_pretrained(ended.status["model_dir"])
    weights = ended.trainer.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_learning_rate_that_follows_the_run_resumes_exactly(faces, tmp_path):
    folders = []
    for stops in ({}, {STEPS + 2: signal.SIGTERM}):
        presets = {"num_epochs": 2, "lr_schedule": "cosine", "lr_warmup_steps": 0}
        config = tiny.tiny_config(tmp_path / str(len(stops)), faces, training_presets=presets)
        ended = run(config, stop_after=stops)
        folders.append((run(config, "auto") if stops else ended).folder)
    assert differences(*folders) == []
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    measured = [line["optim/learning_rate"] for line in lines if line["kind"] == "train"]
    assert measured[0] > measured[-1] > 0 and measured == sorted(measured, reverse=True)


@pytest.mark.slow
def test_resuming_compiled_and_back_changes_nothing(finished, faces, tmp_path, monkeypatch):
    """Compiled for the eager backend, once: the tensors of a checkpoint have the same names and are bitwise identical."""
    compile_function, compiled = torch.compile, []

    def compile_for_eager(function: Callable, dynamic: bool) -> Callable:
        compiled.append(function)
        return compile_function(function, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_for_eager)
    presets = {"num_epochs": EPOCHS}
    eager = tiny.tiny_config(tmp_path, faces, training_presets=presets)
    traced = tiny.tiny_config(tmp_path, faces, training_presets=presets | {"compile": True})
    assert run(eager, stop_after={STEPS + 1: signal.SIGTERM}).code == EXIT_STOPPED
    torch._dynamo.reset()
    counters.clear()
    assert run(traced, "auto", stop_after={2 * STEPS + 2: signal.SIGTERM}).code == EXIT_STOPPED
    assert counters["stats"]["unique_graphs"] == 2  # of micro-batches of 3 and 1; none after validation and checkpoint
    ended = run(eager, "auto")
    assert ended.code == 0 and len(compiled) == 1
    assert differences(ended.folder, finished.folder) == []


def test_a_second_signal_has_its_usual_effect():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (stop.received, received) == ("SIGUSR1", [])
            os.kill(os.getpid(), signal.SIGUSR1)
            assert received == [signal.SIGUSR1]
        os.kill(os.getpid(), signal.SIGUSR1)  # and afterwards the handler is the old one
        assert len(received) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_interruptions_before_and_after_a_change_of_resolution_change_nothing(faces, tmp_path):
    model = {
        "sample_size": 64, "latent_layout": "spatial", "latent_channels": 4, "latent_size": 8, "latent_dim": 256,
        "pca_size": 16, "pca_decode_size": 32,
    }  # fmt: skip
    presets = {"num_epochs": 3, "resolution_schedule": {"32": 1}, "augment": True, "pca_init_augmented_copies": 1}
    full_config, config = (
        tiny.tiny_config(tmp_path / name, faces, model=model, training_presets=presets)
        for name in ("full", "interrupted")
    )
    full = run(full_config)
    first = run(config, stop_after={STEPS - 2: signal.SIGTERM})
    second = run(config, "auto", stop_after={STEPS + 2: signal.SIGTERM})
    third = run(config, "auto")
    assert (first.code, second.code, third.code, full.code) == (EXIT_STOPPED, EXIT_STOPPED, 0, 0)
    assert_same_state(third, full)
    assert third.lines("train") == full.lines("train")
    # Validation uses the full resolution from the start, so that the plateau scheduler compares equal losses.
    assert third.lines("validation") == full.lines("validation")


def test_a_resolution_schedule_that_does_not_suit_the_model_is_refused(faces, tmp_path):
    for model, schedule, message in (
        ({}, {"32": 1}, "the vector layout takes only 40"),
        (
            {
                "sample_size": 64,
                "latent_layout": "spatial",
                "latent_channels": 4,
                "latent_size": 8,
                "latent_dim": 256,
            },
            {"48": 1},
            "must be smaller than sample_size 64, divide it, and be multiples of spatial_compression_ratio 8",
        ),
    ):
        model |= {"pca_size": None}
        config = tiny.tiny_config(tmp_path, faces, model=model, training_presets={"resolution_schedule": schedule})
        with pytest.raises(ValueError, match=message):
            build_model(config)
