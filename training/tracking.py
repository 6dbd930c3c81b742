"""What a run writes for people: `training.log`, `metrics.jsonl`, `status.json`, TensorBoard events and grids.

All of it lies in the run's folder and is written by the main process alone. What it is not for: what resume needs
(checkpoint.py) or showing it (monitor.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import save_image

from training.checkpoint import write_json

LOSS_PARTS = ("mse", "l1", "perceptual", "lpips", "kl")
_PROJECT = "tensorboard"


def setup_logging(accelerator: Accelerator, log_file: Path | None) -> None:
    """Send the project's log to the terminal and, on the main process, to a file; other processes log warnings only."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    rank = f" [{accelerator.process_index}]" if accelerator.num_processes > 1 else ""
    form = logging.Formatter(f"%(asctime)s{rank} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if accelerator.is_main_process and log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
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


class Tracker:
    """Writes the figures of a run; every method does nothing on processes other than the main one.

    Args:
        accelerator: Owns the TensorBoard tracker.
        run_dir: The run's folder; must exist on the main process.
        config: Flat configuration, shown by TensorBoard.
        status: First content of `status.json`.
    """

    def __init__(self, accelerator: Accelerator, run_dir: Path, config: dict[str, Any], status: dict[str, Any]) -> None:
        self.accelerator = accelerator
        self.run_dir = run_dir
        self.active = accelerator.is_main_process
        self.status = {**status, "pid": os.getpid(), "host": socket.gethostname(), "state": "starting", "reason": None}
        # The tracker's own folder is <logging_dir>/<project>; "." puts the events into the run's folder itself.
        accelerator.init_trackers(".")
        if self.active:
            self._metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
            self._writer = accelerator.get_tracker(_PROJECT, unwrap=True)
            self._writer.add_custom_scalars(
                {
                    "training": {
                        "loss parts, weighted": ["Multiline", [f"weighted/{name}" for name in LOSS_PARTS]],
                        "KL share and its band": [
                            "Multiline",
                            ["kl/smoothed_share", "kl/band_low", "kl/band_high"],
                        ],
                    }
                }
            )
            # As text: TensorBoard's hyper-parameter plugin would open a folder of its own for each start.
            self._writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))
            self.update_status()

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
        self._metrics.write(json.dumps(line) + "\n")
        self.accelerator.log(scalars, step=step)

    def event(self, message: str, level: str, *, step: int, epoch: int, images_seen: int) -> None:
        """A sentence for the log, the terminal and the monitor."""
        logging.getLogger("training").log(logging.WARNING if level == "warning" else logging.INFO, message)
        self.log("event", {"message": message, "level": level}, step=step, epoch=epoch, images_seen=images_seen)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """A TensorBoard histogram."""
        if self.active:
            self._writer.add_histogram(name, values, step)

    def image(self, name: str, grid: Tensor, step: int, file_name: str) -> Path:
        """A grid (3, H, W) in [0, 1] for TensorBoard, and as a PNG in the run's samples/."""
        path = self.run_dir / "samples" / file_name
        if self.active:
            path.parent.mkdir(exist_ok=True)
            save_image(grid, path)
            self._writer.add_image(name, grid, step)
        return path

    def update_status(self, **changes: Any) -> None:
        """Change fields of `status.json`, which also shows that the run is alive."""
        self.status.update(changes, updated=time.time())
        if self.active:
            write_json(self.run_dir / "status.json", self.status)

    def close(self) -> None:
        """Flush and close everything."""
        if self.active:
            self._metrics.close()
        self.accelerator.end_training()
