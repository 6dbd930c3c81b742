"""Trackio and Weights & Biases for real: without an account and without a network, interrupted and resumed."""

from __future__ import annotations

import importlib.util
import json
import signal
import struct
import sys
from pathlib import Path

import pytest
import tiny
from runs import fork, run, wait_for

from training.run_files import list_runs
from training.tracking.trackers import check_trackers
from training.trainer import EXIT_STOPPED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
STOP, LAST = 3, 5  # step at which the run is interrupted, and its last one


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (the extra `{package}`)")


def interrupted_and_resumed_run(name: str, faces: Path, folder: Path, **environment: str) -> Path:
    """A run of one epoch with a tracker besides TensorBoard, each part of it in a process of its own."""
    presets, output = {"num_epochs": 1}, {"trackers": ["tensorboard", name]}
    config = tiny.tiny_config(folder, faces, training_presets=presets, output=output)
    log = folder / "log"
    for resume, stop_after, code in ((None, {STOP: signal.SIGTERM}, EXIT_STOPPED), ("auto", None, 0)):
        child = fork(lambda: run(config, resume, stop_after).code, log, **environment)  # noqa: B023, called at once
        assert wait_for(child) == code, log.read_text()
    (run_dir,) = list_runs(folder / "runs")
    assert "failed, training continues" not in (run_dir / "training.log").read_text()
    return run_dir


@needs("trackio")
def test_trackio_has_scalars_grids_and_histograms_of_one_run(faces, tmp_path):
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    run_dir = interrupted_and_resumed_run("trackio", faces, tmp_path, **environment)

    def read() -> int:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        names = [each.name for each in trackio.Api().runs("tiny")]
        logs = SQLiteStorage.get_logs("tiny", run_dir.name)
        (tmp_path / "read.json").write_text(json.dumps([names, logs], default=str))
        return 0

    child = fork(read, tmp_path / "log", **environment)
    assert wait_for(child) == 0, (tmp_path / "log").read_text()
    names, logs = json.loads((tmp_path / "read.json").read_text())
    assert names == [run_dir.name]  # the resume did not start another one
    assert {entry["step"] for entry in logs if "loss/total" in entry} == {2, 4}
    assert {entry["step"] for entry in logs if "validation/psnr" in entry} == {0, LAST}
    histograms = [entry["validation/kl_per_dimension"] for entry in logs if "validation/kl_per_dimension" in entry]
    assert [sum(each["values"]) for each in histograms] == [16, 16]  # latent dimensions
    grids = {name: entry[name] for entry in logs for name in ("samples", "reconstructions") if name in entry}
    assert all(grid["_type"] == "trackio.image" for grid in grids.values()) and len(grids) == 2
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) >= 2
    assert "Trackio      trackio show --project tiny" in (run_dir / "training.log").read_text()


def offline_records(file: Path) -> bytes:
    """What an offline run of Weights & Biases has recorded: the chunks of a log in LevelDB's format."""
    data, at, chunks = file.read_bytes(), 7, []  # after the magic number and the version
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is too small for a header
            at += 32768 - at % 32768
            continue
        length = struct.unpack("<H", data[at + 4 : at + 6])[0]
        chunks.append(data[at + 7 : at + 7 + length])
        at += 7 + length
    return b"".join(chunks)


@needs("wandb")
def test_wandb_records_one_run_offline(faces, tmp_path):
    run_dir = interrupted_and_resumed_run("wandb", faces, tmp_path)
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2  # one of each start; `wandb sync` joins them, because they have the same id
    records = [offline_records(next(folder.glob(f"run-{run_dir.name}.wandb"))) for folder in folders]
    assert b"loss/total" in records[0] and all(b"validation/psnr" in each for each in records)
    assert b"training_presets.learning_rate" in records[0] and b"histogram" in records[1]
    images = [path.name for path in folders[1].rglob("*.png")]
    assert any(name.startswith("samples_") for name in images)
    assert any(name.startswith("reconstructions_") for name in images)
    assert f"wandb sync {run_dir / 'wandb'}/*run-*" in (run_dir / "training.log").read_text()


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(monkeypatch):
    check_trackers(["tensorboard"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="output.trackers names wandb, which is not installed: pip install wandb, or"):
        check_trackers(["wandb"])


@pytest.mark.parametrize("trackers", [["comet"], ["wandb", "wandb"], [1]])
def test_unknown_and_repeated_trackers_are_refused(faces, tmp_path, trackers):
    with pytest.raises(
        ValueError, match='output.trackers must be a list without repetition of "tensorboard", "trackio"'
    ):
        tiny.tiny_config(tmp_path, faces, output={"trackers": trackers})
