"""A run's folder on the main process: created or found for a resume, locked, and given its first files.

One process writes into a run's folder. The lock is the operating system's (flock), so it is free as soon as its holder
is dead; `run.lock` names the holder, for the error that a second process gets. That file stays when the run ends.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import psutil

from training.checkpoint.format import quarantine_newer, sweep
from training.checkpoint.resume import drop_lost_best, find_run, newest_valid
from training.config import Config
from training.io import copy_folder, write_json
from training.publish.checkpoints import PREFIX, download_run
from training.run_files import (
    PRIORS,
    RUN_FILE,
    UPLOAD_LINKS,
    list_checkpoints,
    list_runs,
    read_json,
    read_state,
)

LOCK_FILE = "run.lock"


class RunFolder:
    """The folder of a run.

    Args:
        config: The configuration.

    Attributes:
        path: The folder; final after `claim`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock: RunLock | None = None
        self.path = self._new_path()

    def _new_path(self) -> Path:
        output = self._config.output
        return Path(output.runs_dir) / f"{output.run_name}_{datetime.datetime.now():%Y%m%d_%H%M%S}"

    def open(self, resume: str | None) -> dict[str, Any]:
        """Find the run's folder and the checkpoint to resume from; a folder that exists is locked.

        Args:
            resume: None, "auto" or a path (see `find_run`).

        Returns:
            `run_dir`; `checkpoint` and its `state`, None for a new run; `notes`, lines for the log.

        Raises:
            ValueError: There is nothing to resume, or another process uses the run.
        """
        output, notes = self._config.output, []
        runs_dir = Path(output.runs_dir)
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            before = restarted_run(runs_dir, output.run_name)
            if before is not None and list_checkpoints(before):  # newer than what the command line may name
                resume, notes = str(before), ["restarted by the launcher: resuming its run"]
            elif resume is None:
                notes = ["restarted by the launcher before the first checkpoint: starting a new run"]
        if resume is not None and resume.startswith(PREFIX):
            resume = str(download_run(resume, runs_dir, output.run_name))
            notes.append(f"resume: downloaded the newest checkpoints to {resume}")
        found = None if resume is None else find_run(resume, runs_dir, output.run_name)
        if found is None:
            if resume is not None:
                notes.append(f"--resume auto: no checkpoint of {output.run_name} in {runs_dir}, starting a new run")
            return {"run_dir": self.path, "checkpoint": None, "state": None, "notes": notes}
        self.path, named = found
        given, origin = self._config.training_presets.init_from, read_json(self.path / RUN_FILE).get("init_from")
        if given not in (None, origin) and (origin is None or os.path.realpath(given) != os.path.realpath(origin)):
            raise ValueError(
                f"training_presets.init_from is {given}, but the run {self.path} started from {origin or 'random weights'}: "
                f"to resume that run, leave out --init-from, or give --set training_presets.init_from={json.dumps(origin)} "
                "where the configuration file has another; for a new run, leave out --resume."
            )
        self._lock = RunLock(self.path)
        shutil.rmtree(self.path / UPLOAD_LINKS, ignore_errors=True)  # of a process that was killed
        notes += [f"resume: removed {name}, left by an interrupted write" for name in sweep(self.path)]
        checkpoint, skipped = newest_valid(self.path, named)
        state = read_state(checkpoint)
        notes += drop_lost_best(self.path, checkpoint, state)
        return {"run_dir": self.path, "checkpoint": checkpoint, "state": state, "notes": notes + skipped}

    def claim(
        self, checkpoint: Path | None, origin: dict[str, Any] | None = None, priors: Sequence[Path] = ()
    ) -> tuple[Path, list[str]]:
        """Create and lock a new run's folder, or make `checkpoint` the newest of a resumed run.

        Args:
            checkpoint: What a resumed run continues; None for a new run.
            origin: What `run.json` records about the initial weights of a new run (`load_initial_weights`).
            priors: Folders that are copied to `priors/` in a new run's folder, for its grids and its exported model.

        Returns:
            The folder, and lines for the log.

        Raises:
            ValueError: The folder cannot be written.
        """
        notes = []
        try:
            while self._lock is None:
                try:
                    self.path.mkdir(parents=True)
                    self._lock = RunLock(self.path)
                except FileExistsError:  # another run of this name started in this second
                    time.sleep(0.1)
                    self.path = self._new_path()
                else:  # in UTC: the time in the folder's name is local
                    now = datetime.datetime.now(datetime.timezone.utc)
                    values = {"created": now.isoformat(), "host": socket.gethostname(), **(origin or {})}
                    write_json(self.path / RUN_FILE, values)
                    for prior in priors:
                        copy_folder(prior, self.path / PRIORS / prior.name)
            if checkpoint is not None:
                newer = quarantine_newer(self.path, checkpoint)
                notes = [
                    f"resume: quarantined a newer checkpoint, which this run does not continue: {n}" for n in newer
                ]
            write_json(self.path / "config.json", self._config.to_dict())
        except OSError as error:
            raise ValueError(
                f"the run's folder {self.path} cannot be written ({error}): make room, or set output.runs_dir to "
                "another folder."
            ) from None
        return self.path, notes

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()


class RunLock:
    """The lock on a run's folder, held until `release` or the end of the process.

    Args:
        run_dir: The run's folder; must exist.

    Raises:
        ValueError: Another process holds it, or the folder cannot be locked.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_FILE
        # On a file of its own: where locks are mandatory (Windows), nobody else can read a locked file.
        self._lock = filelock.FileLock(run_dir / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"the run {run_dir} is in use by {self._holder()}: stop that one, or start a new run."
            ) from None
        except OSError as error:
            raise ValueError(
                f"the run {run_dir} cannot be locked ({error}): make its folder writable, or set output.runs_dir to "
                "another folder."
            ) from None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "launcher": launcher()}
        with contextlib.suppress(OSError):  # a full disk does not affect the lock
            write_json(self._path, holder)

    def _holder(self) -> str:
        holder = read_json(self._path)
        return f"process {holder['pid']} on {holder['host']}" if "pid" in holder else "another process"

    def release(self) -> None:
        """Unlock the folder."""
        self._lock.release()


def launcher() -> dict[str, Any] | None:
    """The process that started this one, if that is torchrun or accelerate, which may start it again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = psutil.Process(os.getppid())
    return {"host": socket.gethostname(), "pid": parent.pid, "started": parent.create_time()}


def restarted_run(runs_dir: Path, run_name: str) -> Path | None:
    """The run that this process's launcher (torchrun --max-restarts) started before, if it did."""
    for run_dir in list_runs(runs_dir, run_name):
        holder = read_json(run_dir / LOCK_FILE)
        if "launcher" in holder and holder["launcher"] == launcher():
            return run_dir
    return None
