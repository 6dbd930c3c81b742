"""What a run writes for people: `training.log`, `metrics.jsonl`, `status.json`, TensorBoard events and grids.

All of it lies in the run's folder and is written by the main process alone. What it is not for: what resume needs
(checkpoint.py) or showing it (monitor.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import save_image

from training.config import TOKEN
from training.io import write_json

LOSS_PARTS = ("mse", "l1", "perceptual", "lpips", "kl")
_PROJECT = "tensorboard"


def setup_logging(accelerator: Accelerator, log_file: Path | None) -> None:
    """Send the project's log to the terminal and, on the main process, to a file; other processes log warnings only."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    rank = f" [{accelerator.process_index}]" if accelerator.num_processes > 1 else ""
    form = Redacted(f"%(asctime)s{rank} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if accelerator.is_main_process and log_file is not None:
        handlers.append(LogFile(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)
    root.setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "accelerate", "datasets", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if not sys.stderr.isatty():  # in a file or a pipe, progress bars are noise
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


class LogFile(logging.FileHandler):
    """A log file; a disk that is full or fails costs lines, which is said once, and neither the run nor a traceback."""

    _failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failing:
            self._failing = True
            name = Path(self.baseFilename).name
            logging.getLogger("training").warning("%s cannot be written, the run goes on (%s)", name, error)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of lines that are still waiting
            super().close()


class Redacted(logging.Formatter):
    """A formatter that never lets an access token of the Hub into a log."""

    def format(self, record: logging.LogRecord) -> str:
        return re.sub(TOKEN, "hf_...", super().format(record))


class Tracker:
    """Writes the figures of a run; every method does nothing on processes other than the main one.

    Args:
        accelerator: Owns the TensorBoard tracker.
        run_dir: The run's folder; must exist on the main process.
        config: Flat configuration, shown by TensorBoard.
        status: First content of `status.json`.
        resumed_at: Step and epoch that the run goes on from; None for a new one.

    A disk that is full or fails costs what was to be written, never the run: it is said on the terminal, once for
    each kind of output until that kind works again.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        config: dict[str, Any],
        status: dict[str, Any],
        resumed_at: tuple[int, int] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.run_dir = run_dir
        self.active = accelerator.is_main_process
        self.status = {**status, "pid": os.getpid(), "host": socket.gethostname(), "state": "starting", "reason": None}
        self._failing: set[str] = set()
        # The tracker's own folder is <logging_dir>/<project>; "." puts the events into the run's folder itself. Events
        # of steps that an interrupted run had gone on to are left out by TensorBoard.
        again = {} if resumed_at is None else {_PROJECT: {"purge_step": resumed_at[0] + 1}}
        accelerator.init_trackers(".", init_kwargs=again)
        if self.active:
            if resumed_at is not None:
                self.rewind(*resumed_at)
            self._writer = accelerator.get_tracker(_PROJECT, unwrap=True)
            self._writer.add_custom_scalars(
                {
                    "training": {
                        "loss parts, weighted": ["Multiline", [f"weighted/{name}" for name in LOSS_PARTS]],
                        "KL share and its band": [
                            "Multiline",
                            ["kl/smoothed_fraction", "kl/target_low", "kl/target_high"],
                        ],
                    }
                }
            )
            # As text: TensorBoard's hyper-parameter plugin would open a folder of its own for each start.
            self._writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))
            self.update_status()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """The run goes on where `what` cannot be written."""
        try:
            yield
        except OSError as error:
            if what not in self._failing:
                self._failing.add(what)
                logging.getLogger("training").warning("%s cannot be written, the run goes on (%s)", what, error)
        else:
            self._failing.discard(what)

    def rewind(self, step: int, epoch: int) -> None:
        """Drop the lines that come again from metrics.jsonl: those of later steps, and the validation of an epoch that
        ends with `step` where this is not `epoch` yet; events stay, they happened."""
        path = self.run_dir / "metrics.jsonl"
        if not self.active or not path.is_file():
            return
        kept = []
        with self._writing("metrics.jsonl"):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                    again = (line["step"], line["epoch"]) > (step, epoch) and line["kind"] != "event"
                except (ValueError, KeyError, TypeError):  # cut off by a kill, or spoilt by a disk
                    continue
                if not again:
                    kept.append(text + "\n")
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, path)

    def log(self, kind: str, values: dict[str, Any], *, step: int, epoch: int, images_seen: int) -> None:
        """One line of metrics.jsonl, and TensorBoard scalars for its numbers.

        Args:
            kind: "train", "validation" or "event".
            values: Name -> number, bool, string or None; numbers that are not finite become null in the file.
            step: Optimizer updates done.
            epoch: From 0.
            images_seen: Training images so far.
        """
        if not self.active:
            return
        line: dict[str, Any] = {
            "kind": kind,
            "time": time.time(),
            "step": step,
            "epoch": epoch,
            "images_seen": images_seen,
        }
        scalars = {}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                value = None
            line[name] = value
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                scalars[name] = float(value)
        # Opened for each line: a line is on its way to disk when this returns, and a disk that was full may work again.
        with self._writing("metrics.jsonl"), (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        with self._writing("TensorBoard"):
            self.accelerator.log(scalars, step=step)

    def event(self, message: str, level: str, *, step: int, epoch: int, images_seen: int) -> None:
        """A sentence for the log, the terminal and the monitor."""
        logging.getLogger("training").log(logging.WARNING if level == "warning" else logging.INFO, message)
        self.log("event", {"message": message, "level": level}, step=step, epoch=epoch, images_seen=images_seen)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """A TensorBoard histogram."""
        if self.active:
            with self._writing("TensorBoard"):
                self._writer.add_histogram(name, values, step)

    def image(self, name: str, grid: Tensor, step: int, file_name: str) -> Path:
        """A grid (3, H, W) in [0, 1] for TensorBoard, and as a PNG in the run's samples/."""
        path = self.run_dir / "samples" / file_name
        if self.active:
            with self._writing("samples/"):
                path.parent.mkdir(exist_ok=True)
                save_image(grid, path)
            with self._writing("TensorBoard"):
                self._writer.add_image(name, grid, step)
        return path

    def update_status(self, **changes: Any) -> None:
        """Change fields of `status.json`, which also shows that the run is alive."""
        self.status.update(changes, updated=time.time())
        if self.active:
            with self._writing("status.json"):
                write_json(self.run_dir / "status.json", self.status)

    def close(self) -> None:
        """Flush and close everything."""
        with self._writing("TensorBoard"):
            self.accelerator.end_training()
