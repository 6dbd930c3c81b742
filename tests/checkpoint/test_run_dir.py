"""One run, one process: who comes second is told who has it, and a dead owner has nothing."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import tiny
from runs import EPOCHS

import train_vae
from training.checkpoint import run_dir as run_dir_module
from training.checkpoint.run_dir import LOCK_FILE, RunFolder, RunLock, restarted_run
from training.run_files import list_checkpoints
from training.trainer import Trainer


class Owner:
    """A process that holds the lock of a run until it is killed."""

    def __init__(self, run_dir: Path) -> None:
        ready, say = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                lock = RunLock(run_dir)  # which is free as soon as nobody has it
                os.write(say, b"1")
                signal.pause()
                lock.release()
            finally:
                os._exit(1)
        os.close(say)
        assert os.read(ready, 1) == b"1"
        os.close(ready)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def owned(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    owner = Owner(run_dir)
    yield run_dir, owner
    if owner.pid:
        owner.kill()


def test_the_second_is_refused_with_the_owners_pid_and_host_and_a_dead_owner_has_nothing(owned):
    run_dir, owner = owned
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"is in use by process {owner.pid} on {socket.gethostname()}: stop that o"
        ):
            RunLock(run_dir)
    owner.kill()
    owner.pid = 0
    lock = RunLock(run_dir)  # at once
    assert json.loads((run_dir / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    RunLock(run_dir).release()


def test_an_owner_that_could_not_write_who_it_is_has_the_lock_all_the_same(owned):
    run_dir, _ = owned
    (run_dir / LOCK_FILE).write_text("")
    with pytest.raises(ValueError, match="is in use by another process: stop that one"):
        RunLock(run_dir)


def test_a_full_disk_is_no_reason_to_fail_and_one_that_cannot_lock_is_said(tmp_path, monkeypatch):
    (tmp_path / f"{LOCK_FILE}.tmp").symlink_to("/dev/full")
    RunLock(tmp_path).release()

    def refuse(self, timeout):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_dir_module.filelock.FileLock, "acquire", refuse)
    with pytest.raises(
        ValueError, match="cannot be locked .*No locks available.*set output.runs_dir to another folder"
    ):
        RunLock(tmp_path)


def test_the_command_line_refuses_a_run_in_use(finished, faces, tmp_path, session, capsys):
    settings = tiny.tiny_settings(tmp_path, faces, training_presets={"num_epochs": EPOCHS})
    (tmp_path / "tiny.json").write_text(json.dumps(settings))
    run_dir = tmp_path / "runs" / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints", run_dir / "checkpoints", symlinks=True)
    owner = Owner(run_dir)
    try:
        assert train_vae.main(["--config", str(tmp_path / "tiny.json"), "--resume", "auto"]) == 2
    finally:
        owner.kill()
    said = capsys.readouterr().err
    assert f"error: the run {run_dir} is in use by process {owner.pid} on {socket.gethostname()}" in said
    assert "Traceback" not in said


def test_runs_that_begin_in_the_same_second_have_different_folders(faces, tmp_path, session, monkeypatch):
    """Both choose a name long before they claim it."""
    config = tiny.tiny_config(tmp_path, faces)
    begun = datetime.datetime(2000, 1, 1)
    names = iter([f"tiny_{begun + datetime.timedelta(seconds=s):%Y%m%d_%H%M%S}" for s in (0, 0, 0, 1)])
    monkeypatch.setattr(RunFolder, "_new_path", lambda self: Path(config.output.runs_dir) / next(names))
    first, second = Trainer(config), Trainer(config)
    try:
        assert [each.run_dir.name for each in (first, second)] == ["tiny_20000101_000000", "tiny_20000101_000001"]
        for each in (first, second):
            assert (
                Path(each.accelerator.logging_dir) == each.run_dir == each.tracker.run_dir == each.checkpoints.run_dir
            )
            assert list(each.run_dir.glob("events.*")) and (each.run_dir / "config.json").is_file()
            assert f"run       {each.run_dir}" in (each.run_dir / "training.log").read_text()
    finally:
        for each in (first, second):
            each.tracker.close()
            each.setup.folder.release()


def test_a_restart_by_the_launcher_goes_on_from_the_newest_whatever_the_command_line_names(
    finished, faces, tmp_path, session, monkeypatch
):
    """Its command line is that of the first start, and may name an older checkpoint than the run has got to since."""
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS})
    run_dir = tmp_path / "runs" / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints", run_dir / "checkpoints", symlinks=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted_run(tmp_path / "runs", "tiny") is None  # no owner known
    (run_dir / LOCK_FILE).write_text(json.dumps({"launcher": run_dir_module.launcher() | {"pid": 1}}))
    assert restarted_run(tmp_path / "runs", "tiny") is None  # another launcher's
    RunLock(run_dir).release()
    assert restarted_run(tmp_path / "runs", "tiny") == run_dir
    for resume in (None, str(run_dir / "checkpoints" / "step_00000010")):
        with tiny.process_state():
            trainer = Trainer(config, resume)
            trainer.tracker.close()
            trainer.setup.folder.release()
        assert (trainer.run_dir, trainer.progress.step) == (run_dir, 15)
        assert "restarted by the launcher: resuming its run" in (run_dir / "training.log").read_text()
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000010", "step_00000015"]
    (run_dir / "checkpoints").rename(tmp_path / "gone")
    with tiny.process_state():
        trainer = Trainer(config)
        trainer.tracker.close()
        trainer.setup.folder.release()
    assert trainer.run_dir != run_dir
    assert (
        "restarted by the launcher before the first checkpoint: starting a new run"
        in (trainer.run_dir / "training.log").read_text()
    )
