"""Runs that were copied, that lie where links cannot be made, or that another version of the program has written."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from runs import EPOCHS, differences, run, same_weights
from test_checkpoint import names, snapshot

from training.checkpoint.format import write_checkpoint
from training.checkpoint.resume import FIXED_ON_RESUME, FREE_ON_RESUME, check_resume, find_run
from training.config import Config
from training.io import file_sha256
from training.publish.checkpoints import link_checkpoints
from training.run_files import MANIFEST, MODEL_FILE, STATE_FILE, best_checkpoint, list_checkpoints, read_state
from training.trainer import Trainer

LINKS = ("best", "checkpoints/best", "checkpoints/latest")


def copy_with_folders_for_links(run_dir: Path, to: Path) -> Path:
    """What `cp -rL`, `scp -r` and zip files make of a run."""
    return shutil.copytree(run_dir, to, symlinks=False)


def without_links(monkeypatch) -> None:
    def symlink(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "symlink", symlink)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy, with folders instead of links, of a run with checkpoints of the steps 1 (the best) and 2."""
    for step in (1, 2):
        write_checkpoint(tmp_path / "run", snapshot(step, best=1), keep=2)
    return copy_with_folders_for_links(tmp_path / "run", tmp_path / "copied")


def test_a_copied_run_is_pruned_and_gets_its_links_back(copied, caplog):
    for step in (3, 4):
        write_checkpoint(copied, snapshot(step, best=3), keep=2)
    assert names(copied) == ["step_00000003", "step_00000004"]
    assert [os.readlink(copied / link) for link in LINKS] == [
        "checkpoints/step_00000003/model",
        "step_00000003",
        "step_00000004",
    ]
    for link in LINKS:
        assert caplog.text.count(f"{copied / link} is a folder, the copy of an older link: replaced by a link") == 1
    assert not list(copied.glob(".*")) and not list(copied.glob("checkpoints/.*"))


@pytest.mark.parametrize("has_folders", [True, False])
def test_without_links_pruning_continues_and_outdated_folders_are_logged(copied, monkeypatch, caplog, has_folders):
    if not has_folders:
        for link in LINKS:
            shutil.rmtree(copied / link)
    without_links(monkeypatch)
    for step in (3, 4):
        write_checkpoint(copied, snapshot(step, best=3), keep=2)
    assert names(copied) == ["step_00000003", "step_00000004"]
    assert ("checkpoints/best is not a link and may be outdated: ignored" in caplog.text) == has_folders
    assert has_folders or not caplog.records


@pytest.mark.parametrize("links", ["folders", "impossible"])
def test_a_copied_run_continues_as_the_original(finished, faces, tmp_path, monkeypatch, links):
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS}, output={"keep_checkpoints": 2})
    original = run(tiny.tiny_config(tmp_path / "original", faces, training_presets={"num_epochs": 2}))
    run_dir = copy_with_folders_for_links(original.folder, Path(config.output.runs_dir) / original.folder.name)
    if links == "impossible":
        without_links(monkeypatch)
    resumed = run(config, "auto")
    assert (resumed.code, resumed.folder) == (0, run_dir)
    assert differences(run_dir, finished.folder) == []
    assert len(list_checkpoints(run_dir)) <= 3
    best, _ = best_checkpoint(run_dir)
    assert best.name == best_checkpoint(finished.folder)[0].name
    assert same_weights(best / MODEL_FILE, finished.folder / "best" / Path(MODEL_FILE).name)


def test_resume_takes_best_and_latest_by_what_the_run_records(finished, tmp_path):
    run_dir = copy_with_folders_for_links(finished.folder, tmp_path / finished.folder.name)
    oldest, newest = list_checkpoints(run_dir)[0], list_checkpoints(run_dir)[-1]
    for name in ("best", "latest"):
        shutil.rmtree(run_dir / "checkpoints" / name)
        shutil.copytree(oldest, run_dir / "checkpoints" / name)
    best, _ = best_checkpoint(run_dir)
    assert oldest not in (best, newest)
    assert find_run(str(run_dir / "checkpoints" / "best"), tmp_path, "tiny") == (run_dir, best)
    assert find_run(str(run_dir / "checkpoints" / "latest"), tmp_path, "tiny") == (run_dir, newest)


# ---- other versions ----


def edit_state(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change the trainer's state, and the manifest with it."""
    state = read_state(checkpoint)
    change(state)
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    size, digest = (checkpoint / STATE_FILE).stat().st_size, file_sha256(checkpoint / STATE_FILE)
    manifest["files"][STATE_FILE] = {"size": size, "sha256": digest}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_the_plateau_starts_from_the_configured_rate_after_another_schedule(finished, session, tmp_path):
    run_dir = tmp_path / "tiny_20000101_000000"
    checkpoint = run_dir / "checkpoints" / "step_00000010"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", checkpoint)

    def change(state: dict) -> None:
        state["config"]["training_presets"]["lr_schedule"] = "cosine"
        state["learning_rate"]["rates"] = [1e-7 for _ in state["learning_rate"]["rates"]]

    edit_state(checkpoint, change)
    trainer = Trainer(finished.config, str(run_dir))
    trainer.tracker.close()
    trainer.setup.folder.release()
    assert trainer.learning_rate.value == finished.config.training_presets.learning_rate


def test_links_of_an_upload_that_was_killed_are_removed_by_a_resume(finished, session, tmp_path):
    run_dir = tmp_path / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", run_dir / "checkpoints" / "step_00000010")
    link_checkpoints(run_dir)
    assert (run_dir / ".upload" / "checkpoints" / "step_00000010" / MANIFEST).is_file()
    trainer = Trainer(finished.config, str(run_dir))
    trainer.tracker.close()
    trainer.setup.folder.release()
    assert not (run_dir / ".upload").exists()


def test_a_checkpoint_with_a_field_more_and_a_field_less_is_resumed(finished, faces, tmp_path, capfd):
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS})
    run_dir = Path(config.output.runs_dir) / "tiny_20000101_000000"
    checkpoint = run_dir / "checkpoints" / "step_00000010"
    shutil.copytree(finished.folder / "checkpoints" / "step_00000010", checkpoint)

    def change(state: dict) -> None:
        for section in {"progress", "alerts", "kl", "plateau", "learning_rate"} & state.keys():
            state[section]["added"] = 1
        state["added"] = {}
        state["config"]["loss"]["added"] = 1
        del state["config"]["output"]["num_samples"], state["progress"]["rollbacks"]
        del state["alerts"][next(iter(state["alerts"]))]

    edit_state(checkpoint, change)
    resumed = run(config, "auto")
    assert (resumed.code, resumed.folder) == (0, run_dir)
    log = capfd.readouterr().err
    for text in (
        "progress: ignored unknown fields: added",
        "progress: fields missing, defaults used: rollbacks",
        "alerts: ignored unknown fields: added",
        "alerts: fields missing, defaults used: ",
        "saved config, section loss: ignored unknown fields: added",
        "saved config, section output: fields missing, defaults used: num_samples",
    ):
        assert text in log, text
    weights = [Path(each.status["model_dir"], "diffusion_pytorch_model.safetensors") for each in (resumed, finished)]
    assert same_weights(*weights)


def test_every_key_that_a_resume_compares_exists():
    keys = [*Config().flat(), "processes", "model.latent_dim"]
    for fixed in FIXED_ON_RESUME:
        assert any(key.startswith(fixed) for key in keys), fixed
    for free in FREE_ON_RESUME:
        assert free in keys and free.startswith(FIXED_ON_RESUME), free


def test_a_changed_key_of_another_version_is_still_compared(caplog):
    config = Config().to_dict()
    config["loss"]["added"] = 1
    config["loss"]["lpips_weight"] = 0.125
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match=r"other values of loss.lpips_weight \(0.125"),
    ):
        check_resume(Config(), 1, {"config": config, "processes": 1}, [])
    assert "saved config, section loss: ignored unknown fields: added" in caplog.text
