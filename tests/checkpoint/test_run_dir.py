"""One process per run: a second one gets an error that names the lock holder; a dead holder holds no lock."""

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


class Holder:
    """A process that holds the lock of a run until it is killed."""

    def __init__(self, run_dir: Path) -> None:
        ready, signal_ready = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                lock = RunLock(run_dir)  # free as soon as nobody holds it
                os.write(signal_ready, b"1")
                signal.pause()
                lock.release()
            finally:
                os._exit(1)
        os.close(signal_ready)
        assert os.read(ready, 1) == b"1"
        os.close(ready)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def held(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    holder = Holder(run_dir)
    yield run_dir, holder
    if holder.pid:
        holder.kill()


def test_a_second_process_gets_the_holders_pid_and_host_and_a_dead_holder_holds_nothing(held):
    run_dir, holder = held
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"is in use by process {holder.pid} on {socket.gethostname()}: stop that o"
        ):
            RunLock(run_dir)
    holder.kill()
    holder.pid = 0
    lock = RunLock(run_dir)  # at once
    assert json.loads((run_dir / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    RunLock(run_dir).release()


def test_a_holder_that_could_not_write_its_name_holds_the_lock(held):
    run_dir, _ = held
    (run_dir / LOCK_FILE).write_text("")
    with pytest.raises(ValueError, match="is in use by another process: stop that one"):
        RunLock(run_dir)


def test_a_full_disk_is_ignored_and_one_that_cannot_lock_is_an_error(tmp_path, monkeypatch):
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
    holder = Holder(run_dir)
    try:
        assert train_vae.main(["--config", str(tmp_path / "tiny.json"), "--resume", "auto"]) == 2
    finally:
        holder.kill()
    error = capsys.readouterr().err
    assert f"error: the run {run_dir} is in use by process {holder.pid} on {socket.gethostname()}" in error
    assert "Traceback" not in error


def test_runs_that_start_in_the_same_second_have_different_folders(faces, tmp_path, session, monkeypatch):
    """Both choose a name long before they create the folder."""
    config = tiny.tiny_config(tmp_path, faces)
    start = datetime.datetime(2000, 1, 1)
    names = iter([f"tiny_{start + datetime.timedelta(seconds=s):%Y%m%d_%H%M%S}" for s in (0, 0, 0, 1)])
    monkeypatch.setattr(RunFolder, "_new_path", lambda self: Path(config.output.runs_dir) / next(names))
    first, second = Trainer(config), Trainer(config)
    try:
        assert [each.run_dir.name for each in (first, second)] == ["tiny_20000101_000000", "tiny_20000101_000001"]
        for each in (first, second):
            assert each.run_dir == each.tracker.run_dir == each.checkpoints.run_dir
            assert list(each.run_dir.glob("events.*")) and (each.run_dir / "config.json").is_file()
            assert f"run       {each.run_dir}" in (each.run_dir / "training.log").read_text()
    finally:
        for each in (first, second):
            each.tracker.close()
            each.setup.folder.release()


def test_a_restart_by_the_launcher_resumes_from_the_newest_checkpoint_whatever_the_command_line_names(
    finished, faces, tmp_path, session, monkeypatch
):
    """Its command line is that of the first start, and may name a checkpoint that is outdated by now."""
    config = tiny.tiny_config(tmp_path, faces, training_presets={"num_epochs": EPOCHS})
    run_dir = tmp_path / "runs" / "tiny_20000101_000000"
    shutil.copytree(finished.folder / "checkpoints", run_dir / "checkpoints", symlinks=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted_run(tmp_path / "runs", "tiny") is None  # no holder known
    (run_dir / LOCK_FILE).write_text(json.dumps({"launcher": run_dir_module.launcher() | {"pid": -1}}))
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
