"""One run, one process that writes into its folder.

The lock is the operating system's (flock), so a dead owner's lock is free at once, however it died; `run.lock` says who
has it, for the message to whoever comes second. The file stays when the run ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import filelock
import psutil

LOCK_FILE = "run.lock"


def launcher() -> dict[str, Any] | None:
    """What started this process, if that is torchrun or accelerate with several processes: it may start it again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = psutil.Process(os.getppid())
    return {"host": socket.gethostname(), "pid": parent.pid, "started": parent.create_time()}


class RunLock:
    """Holds a run's folder until `release`, or the end of the process.

    Args:
        run_dir: The run's folder; must exist.

    Raises:
        ValueError: Another living process has it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_FILE
        # On a file of its own: where locks are mandatory (Windows), nobody else can read a locked file.
        self._lock = filelock.FileLock(run_dir / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"the run {run_dir} is in use by {self._owner()}: stop that one, or start a new run."
            ) from None
        except OSError as error:
            raise ValueError(
                f"the run {run_dir} cannot be locked ({error}): make its folder writable, or give another place with "
                "output.runs_dir."
            ) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "launcher": launcher()}
        with contextlib.suppress(OSError):  # a full disk: the lock itself holds
            self._path.write_text(json.dumps(owner) + "\n", encoding="utf-8")

    def _owner(self) -> str:
        try:
            owner = json.loads(self._path.read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError):
            return "another process"

    def release(self) -> None:
        """Let others have the folder."""
        self._lock.release()
