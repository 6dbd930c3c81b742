"""Run folders read from their files: the newest run, valid checkpoints, the best model whatever became of the links."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from training.checkpoint.run_dir import RunFolder
from training.config import config_from_dict
from training.run_files import (
    MODEL_FILE,
    STATE_FILE,
    best_checkpoint,
    created,
    find_model,
    list_checkpoints,
    list_runs,
    saved_config,
    step_folder,
)


def copy_with_folders_for_links(run_dir: Path, to: Path) -> Path:
    """What `cp -rL`, `scp -r` and zip files make of a run."""
    return shutil.copytree(run_dir, to / run_dir.name, symlinks=False)


@pytest.fixture
def outdated(finished, tmp_path) -> Path:
    """A copied run in which the folders `best`, `checkpoints/best` and `checkpoints/latest` hold an older checkpoint."""
    run_dir = copy_with_folders_for_links(finished.folder, tmp_path)
    older = list_checkpoints(run_dir)[0]
    for folder, content in (("best", "model"), ("checkpoints/best", "."), ("checkpoints/latest", ".")):
        shutil.rmtree(run_dir / folder)
        shutil.copytree(older / content, run_dir / folder)
        (run_dir / folder / "old").touch()
    return run_dir


@pytest.mark.parametrize("links", ["outdated folders", "missing"])
def test_the_best_model_is_the_recorded_one_whatever_the_links_hold(finished, outdated, links):
    if links == "missing":
        for folder in ("best", "checkpoints/best", "checkpoints/latest"):
            shutil.rmtree(outdated / folder)
    best = step_folder(outdated, finished.status["best"]["step"])
    checkpoint, recorded = best_checkpoint(outdated)
    assert checkpoint == best and recorded == finished.status["best"]
    (outdated / "status.json").write_text(json.dumps({**finished.status, "model_dir": None}))
    for path in (outdated, outdated / "best", outdated / "checkpoints" / "best"):
        assert find_model(path) == (best / "model", outdated)
    newest = list_checkpoints(outdated)[-1]
    assert find_model(outdated / "checkpoints" / "latest") == (newest / "model", None)


def test_the_newest_valid_checkpoint_decides_and_status_json_is_the_last_resort(finished, tmp_path, caplog):
    run_dir = copy_with_folders_for_links(finished.folder, tmp_path)
    best = step_folder(run_dir, finished.status["best"]["step"])
    (run_dir / "status.json").write_text(json.dumps({"best": {"step": 999}}))  # its checkpoint was never written
    assert best_checkpoint(run_dir)[0] == best
    os.truncate(best / MODEL_FILE, 10)
    older = step_folder(run_dir, 10)  # which was the best when it was written
    assert best_checkpoint(run_dir)[0] == older != best
    assert f"the best model, {best.name}, cannot be used ({MODEL_FILE} has 10 bytes" in caplog.text
    shutil.rmtree(best)
    os.truncate(older / STATE_FILE, 10)
    (run_dir / "status.json").write_text(json.dumps({"best": {"step": 10}}))
    assert best_checkpoint(run_dir) == (older, {"step": 10})
    os.truncate(older / MODEL_FILE, 10)
    with pytest.raises(ValueError, match=f"is damaged .*{older.name}: {MODEL_FILE} has 10 bytes.*: restore it from a"):
        best_checkpoint(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "status.json").write_text("{}")
    with pytest.raises(ValueError, match="has no best model yet"):
        best_checkpoint(run_dir)


def test_an_exported_model_is_taken_only_with_the_best_weights(finished, tmp_path):
    run_dir = copy_with_folders_for_links(finished.folder, tmp_path)
    exported = tmp_path / "vae_tiny"
    shutil.copytree(finished.status["model_dir"], exported)
    (run_dir / "status.json").write_text(json.dumps({**finished.status, "model_dir": str(exported)}))
    assert find_model(run_dir) == (exported, run_dir)
    weights = exported / Path(MODEL_FILE).name  # a later run's export
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert find_model(run_dir) == (best_checkpoint(run_dir)[0] / "model", run_dir)
    assert find_model(exported) is None  # not in a run


def test_a_relative_folder_of_models_is_found_from_any_folder(finished, tmp_path, monkeypatch):
    run_dir = tmp_path / "project" / "runs" / finished.folder.name
    shutil.copytree(finished.folder, run_dir)
    shutil.copytree(finished.status["model_dir"], tmp_path / "project" / "model_weights" / "vae_tiny")
    (run_dir / "status.json").write_text(json.dumps({**finished.status, "model_dir": "model_weights/vae_tiny"}))
    monkeypatch.chdir(tmp_path / "project")
    assert find_model(Path("runs", run_dir.name))[0] == Path("model_weights/vae_tiny")
    monkeypatch.chdir("/")
    assert find_model(run_dir)[0] == tmp_path / "project" / "model_weights" / "vae_tiny"


def test_runs_are_ordered_by_utc_time_and_not_by_name(tmp_path, monkeypatch):
    config = config_from_dict({"output": {"runs_dir": str(tmp_path), "run_name": "faces"}})
    folders = []
    try:
        for zone in ("Asia/Tokyo", "America/Los_Angeles"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            folder = RunFolder(config)
            folders.append(folder.claim(None)[0])
            folder.release()
    finally:
        monkeypatch.undo()
        time.tzset()
    older, newer = folders
    assert older.name > newer.name
    assert list_runs(tmp_path, "faces") == list_runs(tmp_path) == [newer, older]
    assert list_runs(tmp_path, "fac") == list_runs(tmp_path / "nowhere") == []
    assert abs(created(newer) - time.time()) < 60


def test_a_run_without_a_recorded_time_is_dated_by_its_name_or_its_folder(tmp_path):
    named, copied = tmp_path / "faces_20200102_030405", tmp_path / "copied"
    for run_dir in (named, copied):
        (run_dir / "checkpoints").mkdir(parents=True)
    assert created(named) == datetime.datetime(2020, 1, 2, 3, 4, 5).timestamp()
    assert created(copied) == copied.stat().st_mtime


def test_a_saved_configuration_may_have_other_keys(caplog):
    values = config_from_dict({"output": {"run_name": "faces"}}).to_dict()
    values["loss"]["removed_key"] = 1
    values["removed_section"] = {}
    del values["output"]["num_samples"]
    config = saved_config(values)
    assert config == config_from_dict({"output": {"run_name": "faces"}})
    assert "saved config: ignored unknown fields: removed_section" in caplog.text
    assert "saved config, section loss: ignored unknown fields: removed_key" in caplog.text
    assert "saved config, section output: fields missing, defaults used: num_samples" in caplog.text
