"""A run's folder: named or found again, locked, and made this process's own. On the main process alone.

What it is not for: what a resume means and refuses (resume.py), what is in a checkpoint (checkpoint.py).
"""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

from training.checkpoint.format import (
    InvalidCheckpointError,
    list_checkpoints,
    quarantine_newer,
    read_state,
    step_folder,
    sweep,
    verify,
)
from training.checkpoint.resume import find_run, newest_valid, restarted_run
from training.checkpoint.run_lock import RunLock
from training.config import Config
from training.io import write_json


class RunFolder:
    """The place of a run on disk.

    Args:
        config: The configuration.

    Attributes:
        path: The folder; known after `open`, and final after `claim`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock: RunLock | None = None
        self.path = self._new_path()

    def _new_path(self) -> Path:
        output = self._config.output
        return Path(output.runs_dir) / f"{output.run_name}_{datetime.datetime.now():%Y%m%d_%H%M%S}"

    def open(self, resume: str | None) -> dict[str, Any]:
        """Find out which folder the run has, and what it goes on from; a folder that exists is locked.

        Args:
            resume: None, "auto" or a path (see `find_run`).

        Returns:
            `run_dir`; `checkpoint` and its `state`, None for a new run; `notes`, sentences for the log.

        Raises:
            ValueError: There is nothing to resume there, or another process has the run.
        """
        output, notes = self._config.output, []
        runs_dir = Path(output.runs_dir)
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            before = restarted_run(runs_dir, output.run_name)
            if before is not None and list_checkpoints(before):  # newer than what the command line may name
                resume, notes = str(before), ["restarted by the launcher: going on by itself"]
            elif resume is None:
                notes = ["restarted by the launcher before the first checkpoint: starting anew"]
        found = None if resume is None else find_run(resume, runs_dir, output.run_name)
        if found is None:
            if resume is not None:
                notes.append(f"--resume auto: no checkpoint of {output.run_name} in {runs_dir}, starting anew")
            return {"run_dir": self.path, "checkpoint": None, "state": None, "notes": notes}
        self.path, named = found
        self._lock = RunLock(self.path)
        notes += [f"resume: removed {name}, left by an interrupted write" for name in sweep(self.path)]
        checkpoint, passed_over = newest_valid(self.path, named)
        state = read_state(checkpoint)
        best = state["progress"]["best"]
        try:
            if best is not None and step_folder(self.path, best["step"]) != checkpoint:
                verify(step_folder(self.path, best["step"]))
        except InvalidCheckpointError as error:
            notes.append(f"resume: the best model so far, step {best['step']}, is lost ({error}); the next one counts")
            state["progress"]["best"] = None
        return {"run_dir": self.path, "checkpoint": checkpoint, "state": state, "notes": notes + passed_over}

    def claim(self, checkpoint: Path | None) -> tuple[Path, list[str]]:
        """Make the folder this process's, and `checkpoint` its newest.

        Returns:
            The folder, and sentences for the log.

        Raises:
            ValueError: The disk cannot be written.
        """
        notes = []
        try:
            while self._lock is None:
                try:
                    self.path.mkdir(parents=True)
                    self._lock = RunLock(self.path)
                except FileExistsError:  # another run of this name began in this second
                    time.sleep(0.1)
                    self.path = self._new_path()
            if checkpoint is not None:
                newer = quarantine_newer(self.path, checkpoint)
                notes = [f"resume: a newer checkpoint, which this run does not go on from, is now {n}" for n in newer]
            write_json(self.path / "config.json", self._config.to_dict())
        except OSError as error:
            raise ValueError(
                f"the run's folder {self.path} cannot be written ({error}): make room or give another place with "
                "output.runs_dir."
            ) from None
        return self.path, notes

    def release(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.release()
