"""Reads a training run's directory from outside: is it alive, and what are its figures.

What this file is for: the files of a run (`config.json`, `status.json`, `metrics.jsonl`, `training.log`,
`samples/`) as plain values in bounded memory, read in pieces while they grow. It opens them for reading and
nothing else. What it is not for: writing them, or showing anything (`training.monitor.terminal`).
"""

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

STALE_SECONDS = 600.0  # without an update for longer than this, a process that cannot be seen counts as dead
_MAX_POINTS = 2048  # of a curve in memory
_CHUNK_BYTES = 1 << 22
_STAMP = re.compile(r"_(\d{8}_\d{6})$")
_GRID = re.compile(r"_(?:(samples|reconstructions)_(?:epoch_(\d+)|final)|final_(samples|reconstructions))\.png$")
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB\x60\x82"  # the last chunk of a whole PNG (RFC 2083, section 4.1.4)


def is_run(path: Path) -> bool:
    """Whether a path is a directory with a file that only a run has."""
    return any((path / name).is_file() for name in ("config.json", "status.json", "metrics.jsonl"))


def find_run(run: str | None, runs_dir: Path) -> Path:
    """Finds the run directory to show.

    Args:
        run: A run directory, its name in `runs_dir`, or a run name without its time stamp (the newest of that
            name); None: the newest run.
        runs_dir: The folder of runs. Age goes by the time stamps in names, which copying does not change.

    Raises:
        ValueError: There is no such folder, no run in it, or `run` is none.
    """
    for path in (Path(run), runs_dir / run) if run else ():
        if is_run(path):
            return path
    if not runs_dir.is_dir():
        wanted = f"{run} is not a run directory, and there" if run else "there"
        raise ValueError(f"{wanted} is no folder {runs_dir}: start a training first, or give --runs-dir")
    stamped = []
    for path in filter(is_run, runs_dir.iterdir()):
        match = _STAMP.search(path.name)
        stamp = match[1] if match else time.strftime("%Y%m%d_%H%M%S", time.localtime(path.stat().st_mtime))
        stamped.append((stamp, path.name, path))
    if not stamped:
        raise ValueError(f"there is no run in {runs_dir}: start a training first, or give another --runs-dir")
    named = [item for item in stamped if run is None or _STAMP.sub("", item[1]) == run]
    if not named:
        known = ", ".join(name for _, name, _ in sorted(stamped, reverse=True)[:5])
        lacks = "no config.json, status.json or metrics.jsonl in it" if Path(run).exists() else "there is none"
        raise ValueError(f"{run} is not a run directory ({lacks}): the newest in {runs_dir} are {known}")
    return max(named)[2]


@dataclass(frozen=True)
class State:
    """What became of a run: "starting", "live", "finished", "stopped", "failed" or "dead", and why."""

    name: str
    detail: str

    @property
    def alive(self) -> bool:
        """Whether more is to come."""
        return self.name in ("starting", "live")


def process_runs(pid: Any, last_update: float) -> bool:
    """Whether a process of this machine lives and may be what wrote at `last_update` (unix seconds)."""
    try:
        process = psutil.Process(pid)
        # Numbers of processes are used again: one created well after the last update is another.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= last_update + STALE_SECONDS
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, TypeError):
        return False


def run_state(status: dict[str, Any], has_metrics: bool, last_update: float) -> State:
    """Says whether a run lives.

    Args:
        status: `status.json`; empty if there is none.
        has_metrics: Whether the run has logged a training or validation line.
        last_update: When it last wrote, unix seconds.
    """
    if status.get("state") in ("finished", "stopped", "failed"):
        return State(status["state"], str(status.get("reason") or ""))
    age = time.time() - last_update
    pid, host = status.get("pid"), status.get("host")
    if not status:
        if age > STALE_SECONDS:
            return State("dead", f"no readable status.json, and nothing written for {duration(age)}")
        detail = "no readable status.json"
    elif host == socket.gethostname():
        if not process_runs(pid, last_update):
            return State("dead", f"process {pid} is gone; its last update was {duration(age)} ago")
        detail = f"process {pid}, updated {duration(age)} ago"
        if age > STALE_SECONDS:
            detail += ": it may hang (see training.log)"
    elif age > STALE_SECONDS:
        return State("dead", f"no update for {duration(age)}; process {pid} on {host} cannot be seen from here")
    else:
        detail = f"process {pid} on {host}, updated {duration(age)} ago"
    if not has_metrics:
        detail += "; no metrics yet"
    # A resumed run has old metrics while it starts.
    return State("live" if has_metrics and status.get("state") != "starting" else "starting", detail)


class Series:
    """A curve in bounded memory: past 2,048 points, neighbours are merged into their mean."""

    def __init__(self) -> None:
        self.xs: list[float] = []
        self._sums: list[float] = []
        self._counts: list[int] = []
        self._merged = 1  # values in a full point

    def add(self, x: float, y: float) -> None:
        """Adds a value; points at or after `x` go, because a resumed run repeats them."""
        while self.xs and self.xs[-1] >= x:
            del self.xs[-1], self._sums[-1], self._counts[-1]
        if self.xs and self._counts[-1] < self._merged:
            self.xs[-1] = x
            self._sums[-1] += y
            self._counts[-1] += 1
            return
        if len(self.xs) == _MAX_POINTS:
            self.xs = self.xs[1::2]
            for name in ("_sums", "_counts"):
                values = getattr(self, name)
                setattr(self, name, [a + b for a, b in zip(values[::2], values[1::2], strict=True)])
            self._merged *= 2
        self.xs.append(x)
        self._sums.append(y)
        self._counts.append(1)

    @property
    def ys(self) -> list[float]:
        """The values, one for each of `xs`."""
        return [total / count for total, count in zip(self._sums, self._counts, strict=True)]


class Run:
    """What a run directory holds so far; `refresh` reads what was added since.

    Attributes:
        config: `config.json`; empty while missing.
        status: `status.json`; the last readable one.
        state: Whether the run lives.
        last_update: When the run last wrote, unix seconds.
        train: The latest line of that kind; so is `validation`.
        series: Curves by field name, over images seen.
        events: The latest event lines, oldest first.
        warnings_seen: How many events were warnings.
        lost: Loss field -> (lines in which it was not finite, the last such step).
        unreadable: Complete lines that are not JSON objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self.train: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self.series: dict[str, Series] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=50)
        self._warnings: deque[dict[str, Any]] = deque(maxlen=20)
        self.warnings_seen = 0
        self.lost: dict[str, tuple[int, Any]] = {}
        self.unreadable = 0
        self._offset = 0
        self._rest = b""
        self._last_time = 0.0

    def refresh(self) -> None:
        """Reads the run's files again; `metrics.jsonl` from where the last reading ended."""
        self.config = self.config or _read_object(self.path / "config.json")
        for _ in range(2):
            self._read_metrics()
            self.status = _read_object(self.path / "status.json") or self.status
            updated = number(self.status.get("updated")) or 0.0
            self.last_update = max(self._last_time, updated) or _last_change(self.path)
            self.state = run_state(self.status, bool(self.train or self.validation), self.last_update)
            # A run may end between the reading of its status and the look at its process, or just after its
            # metrics were read: what seems to have ended is read once more.
            if self.state.alive:
                return

    def _read_metrics(self) -> None:
        path = self.path / "metrics.jsonl"
        try:
            if path.stat().st_size < self._offset:  # replaced by a shorter one
                self._forget()
            with path.open("rb") as file:
                file.seek(self._offset)
                while chunk := file.read(_CHUNK_BYTES):
                    self._offset += len(chunk)
                    # What follows the last line break may be half a line: it waits for its end.
                    *lines, self._rest = (self._rest + chunk).split(b"\n")
                    for line in filter(bytes.strip, lines):
                        self._take(line)
        except OSError:
            return  # not there yet, or out of reach for the moment; the state's age tells

    def _take(self, text: bytes) -> None:
        try:
            line = json.loads(text)
        except ValueError:
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
                self.warnings_seen += 1
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
                    self.lost[key] = (self.lost.get(key, (0,))[0] + 1, line.get("step"))
            elif x is not None:
                if key not in self.series:
                    self.series[key] = Series()
                self.series[key].add(x, value)

    def preset(self, key: str) -> float | None:
        """A number from the config's section `training_presets`; None if there is none."""
        presets = self.config.get("training_presets")
        return number(presets.get(key)) if isinstance(presets, dict) else None

    def grid(self, kind: str) -> Path | None:
        """The newest whole grid of "samples" or "reconstructions"."""
        found = []
        for path in self.path.glob("samples/*.png"):
            match = _GRID.search(path.name)
            # A live run with a final grid has been resumed after its end: its newer grids have epochs.
            if match and kind in (match[1], match[3]) and (match[2] or not self.state.alive):
                found.append((int(match[2]) if match[2] else math.inf, path))
        return next((path for _, path in sorted(found, reverse=True) if _ends_with(path, _PNG_END)), None)

    def warnings(self) -> list[str]:
        """What has gone wrong: gaps in the figures, then the latest 20 warnings of the run, oldest first."""
        found = []
        if self.unreadable:
            found.append(f"lines of metrics.jsonl left out as unreadable: {self.unreadable}")
        for key, (count, step) in self.lost.items():
            found.append(f"{key} was not finite, log lines: {count}, the last at step {step}")
        if older := self.warnings_seen - len(self._warnings):
            found.append(f"earlier warnings, to be read in training.log: {older}")
        return found + [event_text(event) for event in self._warnings]

    def log_tail(self, lines: int = 5) -> list[str]:
        """The last lines of `training.log` where the run failed or died; else none."""
        if self.state.name not in ("failed", "dead"):
            return []
        try:
            with (self.path / "training.log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                return file.read().decode(errors="replace").rstrip().split("\n")[-lines:]
        except OSError:
            return []


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _last_change(path: Path) -> float:
    """The latest change of a directory or a file in it, unix seconds; 0 if there is no such directory."""
    try:
        return max(item.stat().st_mtime for item in (path, *path.iterdir()))
    except OSError:
        return 0.0


def _ends_with(path: Path, end: bytes) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end
    except OSError:
        return False


def number(value: Any) -> float | None:
    """A finite number as it is; None for anything else."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


def clean(value: Any, encoding: str = "utf-8") -> str:
    """Text that a terminal or page can show: no control characters, nothing that the encoding lacks."""
    text = "".join(char if char.isprintable() else " " for char in str(value)).rstrip()
    return text.encode(encoding, "replace").decode(encoding)


def event_text(event: dict[str, Any]) -> str:
    """An event line as "time, step: message"."""
    clock = time.strftime("%d %b %H:%M", time.localtime(number(event.get("time")) or 0))
    return f"{clock}, step {event.get('step')}: {event.get('message')}"


def duration(seconds: float) -> str:
    """A time span in its two largest units, such as "1 h 12 min"."""
    left = max(0, round(seconds))
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if left >= size:
            return f"{left // size} {unit} {left % size // below} {small}"
    return f"{left} s"
