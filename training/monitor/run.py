"""Reads a run's folder while the run writes it: state, metrics, events and image grids. Opens files for reading only."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from training.run_files import is_run, list_runs, read_json

STALE_SECONDS = 600.0  # a process that cannot be seen counts as dead after so long without a new status
_MAX_POINTS = 2048  # of a curve in memory
_GRID = re.compile(r"_(?:(samples|reconstructions)_(?:epoch_(\d+)|final)|final_(samples|reconstructions))\.png$")
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB\x60\x82"  # last chunk of a complete PNG (RFC 2083, section 4.1.4)


def select_run(run: str | None, runs_dir: Path) -> Path:
    """The run folder to show.

    Args:
        run: A run folder, its name in `runs_dir`, or a run name without its time (the newest run of that name); None
            for the newest run.
        runs_dir: Folder of the runs.

    Raises:
        ValueError: There is no such run.
    """
    for path in (Path(run), runs_dir / run) if run else ():
        if path.is_dir() and is_run(path):
            return path
    if run is None or Path(run).name == run:  # a name, not a path
        if found := list_runs(runs_dir, run):
            return found[0]
    known = ", ".join(path.name for path in list_runs(runs_dir)[:5])
    problem = f"{run} is not a run folder" if run else f"no run in {runs_dir}"
    raise ValueError(f"{problem}: start a training first, or set --runs-dir (runs in {runs_dir}: {known or 'none'}).")


@dataclass(frozen=True)
class State:
    """State of a run: "starting", "live", "finished", "stopped", "failed" or "dead", and the reason."""

    name: str
    detail: str

    @property
    def is_alive(self) -> bool:
        """Whether the run still trains."""
        return self.name in ("starting", "live")


def process_exists(pid: Any, last_update: float) -> bool:
    """Whether a process of this machine exists and may have written at `last_update` (Unix seconds)."""
    try:
        process = psutil.Process(pid)
        # Process IDs are reused: a process created long after the last status is another one.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= last_update + STALE_SECONDS
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, TypeError, OverflowError):
        return False


def run_state(status: dict[str, Any], has_metrics: bool, last_update: float) -> State:
    """The state of a run.

    Args:
        status: `status.json`; empty if it cannot be read.
        has_metrics: Whether the run has logged a train or validation line.
        last_update: When it last wrote, Unix seconds.
    """
    if status.get("state") in ("finished", "stopped", "failed"):
        return State(status["state"], str(status.get("reason") or ""))
    age = time.time() - last_update
    pid, host = status.get("pid"), status.get("host")
    detail = f"process {pid} on {host}, updated {duration(age)} ago"
    if not status:
        detail = f"no readable status.json, last write {duration(age)} ago"
        if age > STALE_SECONDS:
            return State("dead", detail)
    elif host == socket.gethostname():
        if not process_exists(pid, last_update):
            return State("dead", f"process {pid} does not exist, last update {duration(age)} ago")
        if age > STALE_SECONDS:
            detail += ": it may hang (see training.log)"
    elif age > STALE_SECONDS:
        return State("dead", f"process {pid} on {host} cannot be seen from here, last update {duration(age)} ago")
    if not has_metrics:
        detail += "; no metrics yet"
    # While it starts, a resumed run has its old metrics.
    return State("live" if has_metrics and status.get("state") != "starting" else "starting", detail)


class Series:
    """A curve in bounded memory: above 2,048 points, pairs of neighbors are replaced by their mean."""

    def __init__(self) -> None:
        self.xs: list[float] = []
        self._sums: list[float] = []
        self._counts: list[int] = []
        self._values_per_point = 1

    def add(self, x: float, y: float) -> None:
        """Add a value and drop the points at or after `x`, which a resumed run repeats."""
        while self.xs and self.xs[-1] >= x:
            del self.xs[-1], self._sums[-1], self._counts[-1]
        if self.xs and self._counts[-1] < self._values_per_point:
            self.xs[-1] = x
            self._sums[-1] += y
            self._counts[-1] += 1
            return
        if len(self.xs) == _MAX_POINTS:
            self.xs = self.xs[1::2]
            self._sums = [a + b for a, b in zip(self._sums[::2], self._sums[1::2], strict=True)]
            self._counts = [a + b for a, b in zip(self._counts[::2], self._counts[1::2], strict=True)]
            self._values_per_point *= 2
        self.xs.append(x)
        self._sums.append(y)
        self._counts.append(1)

    @property
    def ys(self) -> list[float]:
        """The values, one for each of `xs`."""
        return [total / count for total, count in zip(self._sums, self._counts, strict=True)]


class Run:
    """Content of a run's folder; `refresh` reads what was added since.

    Attributes:
        config: `config.json`; empty while missing.
        status: The last readable `status.json`.
        state: State of the run.
        last_update: When the run last wrote, Unix seconds.
        train, validation: The latest line of that kind in metrics.jsonl.
        series: Curves by metric name, over images seen.
        events: The latest events, oldest first.
        num_warnings: Number of events that are warnings.
        non_finite: Loss metric -> (lines in which it is not finite, the last such step).
        unreadable: Number of complete lines that are not JSON objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        self._reset()
        self.refresh()

    def _reset(self) -> None:
        self.train: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self.series: dict[str, Series] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=50)
        self._warnings: deque[dict[str, Any]] = deque(maxlen=20)
        self.num_warnings = 0
        self.non_finite: dict[str, tuple[int, Any]] = {}
        self.unreadable = 0
        self._offset = 0
        self._last_time = 0.0

    def refresh(self) -> None:
        """Read the files again; `metrics.jsonl` from the end of the last complete line."""
        self.config = self.config or read_json(self.path / "config.json")
        for _ in range(2):
            self._read_metrics()
            self.status = read_json(self.path / "status.json") or self.status
            updated = number(self.status.get("updated")) or 0.0
            self.last_update = max(self._last_time, updated) or _last_change(self.path)
            self.state = run_state(self.status, bool(self.train or self.validation), self.last_update)
            # The run may have ended since its status or its metrics were read, so a run that has ended is read twice.
            if self.state.is_alive:
                return

    def _read_metrics(self) -> None:
        path = self.path / "metrics.jsonl"
        try:
            if path.stat().st_size < self._offset:  # replaced by a shorter file
                self._reset()
            with path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):  # incomplete: read again by the next refresh
                        return
                    self._offset += len(line)
                    if line.strip():
                        self._add_line(line)
        except OSError:  # missing, or unreachable for now
            return

    def _add_line(self, text: bytes) -> None:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            self.unreadable += 1
            return
        self._last_time = max(self._last_time, number(line.get("time")) or 0.0)
        kind = line.get("kind")
        if kind == "event":
            self.events.append(line)
            if line.get("level") == "warning":
                self._warnings.append(line)
                self.num_warnings += 1
            return
        if kind not in ("train", "validation"):
            return
        setattr(self, kind, line)
        x = number(line.get("images_seen"))
        for key, value in line.items():
            if "/" not in key:
                continue
            value = number(value)
            if value is None:
                if key.startswith("loss/"):
                    self.non_finite[key] = (self.non_finite.get(key, (0,))[0] + 1, line.get("step"))
            elif x is not None:
                self.series.setdefault(key, Series()).add(x, value)

    def preset(self, key: str) -> float | None:
        """A number of the config's section `training_presets`; None if there is none."""
        presets = self.config.get("training_presets")
        return number(presets.get(key)) if isinstance(presets, dict) else None

    def grid(self, kind: str) -> Path | None:
        """The newest complete grid of "samples" or "reconstructions"."""
        found = []
        for path in self.path.glob("samples/*.png"):
            match = _GRID.search(path.name)
            # A live run with a final grid has been resumed after its end: its grids of epochs are newer.
            if match and kind in (match[1], match[3]) and (match[2] or not self.state.is_alive):
                found.append((int(match[2]) if match[2] else math.inf, path))
        return next((path for _, path in sorted(found, reverse=True) if _tail(path, len(_PNG_END)) == _PNG_END), None)

    def warnings(self) -> list[str]:
        """Unreadable lines and non-finite losses, then the latest 20 warnings of the run, oldest first."""
        found = []
        if self.unreadable:
            found.append(f"metrics.jsonl: unreadable lines {self.unreadable}")
        for key, (count, step) in self.non_finite.items():
            found.append(f"{key} not finite: log lines {count}, last step {step}")
        if older := self.num_warnings - len(self._warnings):
            found.append(f"earlier warnings: {older} (see training.log)")
        return found + [event_text(event) for event in self._warnings]

    def log_tail(self, lines: int) -> list[str]:
        """The last lines of `training.log` of a run that failed or died; empty for other runs."""
        if self.state.name not in ("failed", "dead"):
            return []
        text = _tail(self.path / "training.log", 8192).decode(errors="replace").rstrip()
        return text.split("\n")[-lines:] if text else []


def _last_change(path: Path) -> float:
    """The latest change of a folder or a file in it, Unix seconds; 0 if there is no such folder."""
    try:
        return max(item.stat().st_mtime for item in (path, *path.iterdir()))
    except OSError:
        return 0.0


def _tail(path: Path, size: int) -> bytes:
    """The last `size` bytes of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read()
    except OSError:
        return b""


def number(value: Any) -> float | None:
    """A number as float; None for anything else, NaN, infinity and values beyond 1e100, which no metric has."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e100 else None


def clean(value: Any) -> str:
    """Text without control characters and other unprintable ones, such as undecodable bytes of a file name."""
    return "".join(char if char.isprintable() else " " for char in str(value)).rstrip()


def clock(seconds: float | None, form: str = "%d %b %H:%M") -> str:
    """Unix seconds as local time; "?" if unknown or out of range."""
    try:
        return "?" if seconds is None else time.strftime(form, time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "?"


def event_text(event: dict[str, Any]) -> str:
    """An event as "time, step: message"."""
    return f"{clock(number(event.get('time')))}, step {event.get('step')}: {event.get('message')}"


def duration(seconds: float) -> str:
    """A time span in its two largest units, such as "1 h 12 min"."""
    left = max(0, round(seconds))
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if left >= size:
            return f"{left // size} {unit} {left % size // below} {small}"
    return f"{left} s"
