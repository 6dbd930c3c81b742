"""Writes what a run reports: `training.log`, `metrics.jsonl`, `status.json`, image grids, and trackers of experiments.

The main process writes all of it, and the files are in the run's folder. The trackers are accelerate's: TensorBoard,
Trackio and Weights & Biases, as `output.trackers` names them. Nothing here ends a run: an output that fails is logged
once, and training continues without it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from torch import Tensor
from torchvision.utils import save_image

from training.cli import UserError
from training.config import TOKEN
from training.io import printable, write_file, write_json

logger = logging.getLogger(__name__)

_TITLES = {"tensorboard": "TensorBoard", "trackio": "Trackio", "wandb": "Weights & Biases"}
# Tags are regular expressions, so that the chart includes every loss term that is logged.
_CUSTOM_SCALARS = {
    "training": {
        "weighted loss terms": ["Multiline", ["weighted/.*"]],
        "KL loss fraction and target range": ["Multiline", ["kl/smoothed_fraction", "kl/target_low", "kl/target_high"]],
    }
}


def setup_logging(accelerator: Accelerator, log_file: Path | None) -> None:
    """Log to stderr and, on the main process, to a file; other processes log warnings only."""
    root = logging.getLogger()
    early = next((each for each in root.handlers if isinstance(each, _EarlyMessages)), None)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    rank = f" [{accelerator.process_index}]" if accelerator.num_processes > 1 else ""
    formatter = RedactingFormatter(f"%(asctime)s{rank} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    terminal = logging.StreamHandler(sys.stderr)
    terminal.addFilter(lambda record: not getattr(record, "file_only", False))
    handlers: list[logging.Handler] = [terminal]
    if accelerator.is_main_process and log_file is not None:
        handlers.append(LogFile(log_file, encoding="utf-8", errors="backslashreplace"))  # file names need not be UTF-8
    elif accelerator.is_main_process:
        handlers.append(_EarlyMessages())
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
        if isinstance(handler, LogFile) and early is not None:
            for record in early.records:
                handler.handle(record)
    root.setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "accelerate", "datasets", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if not sys.stderr.isatty():  # progress bars are unreadable in a file or a pipe
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


class _EarlyMessages(logging.Handler):
    """Keeps what is logged before the run has a folder, for its log file."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class LogFile(logging.FileHandler):
    """A log file whose write errors are logged once, without a traceback; lines that cannot be written are lost."""

    _failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failing:
            self._failing = True
            _log_failure(Path(self.baseFilename).name, error)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # buffered lines
            super().close()


class RedactingFormatter(logging.Formatter):
    """A formatter that replaces Hugging Face access tokens and escapes what UTF-8 cannot encode, as in file names."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(re.sub(TOKEN, "hf_...", super().format(record)))


def _log_failure(name: str, error: BaseException | None) -> None:
    logger.warning("%s failed, training continues (%s: %s)", name, type(error).__name__, error)


def log_failed(error: BaseException) -> str:
    """Logs the error that ends a run, with its traceback in the log file unless the user can correct it.

    Returns:
        The reason for status.json.
    """
    is_user_error = isinstance(error, UserError)
    reason = str(error) if is_user_error else f"{type(error).__name__}: {error}"
    logger.error("failed: %s", reason)
    if not is_user_error:
        logger.error("traceback", exc_info=error, extra={"file_only": True})  # Python prints it on the terminal
    return reason


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        ValueError: One is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"output.trackers names {name}, which is not installed: pip install {name}, or leave it out."
            )


def _start_tracker(
    name: str, run_dir: Path, project: str, config: dict[str, Any], resumed_at: tuple[int, int] | None
) -> GeneralTracker:
    """Start one of accelerate's trackers, or continue its run of the same name."""
    if name == "tensorboard":
        # "." puts the events into the run's folder. `purge_step` makes TensorBoard drop the events after the checkpoint
        # that the run resumes from.
        options = {} if resumed_at is None else {"purge_step": resumed_at[0] + 1}
        tracker = TensorBoardTracker(".", str(run_dir), **options)
        tracker.start()
        tracker.writer.add_custom_scalars(_CUSTOM_SCALARS)
        # As text: the hyperparameter plugin would create a subfolder for each start.
        tracker.writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))
        return tracker
    options = {"name": run_dir.name, "config": config, "resume": "allow"}
    if name == "trackio":  # local, in TRACKIO_DIR, unless TRACKIO_SPACE_ID names a Space
        tracker = TrackioTracker(project, embed=False, **options)
    else:
        if os.environ.setdefault("WANDB_MODE", "offline") == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which needs the network
        settings = {"console": "off"}  # training.log has what is printed
        tracker = WandBTracker(project, id=run_dir.name, dir=str(run_dir), settings=settings, **options)
    tracker.start()
    return tracker


class Tracker:
    """Writes the metrics, status and images of a run; does nothing on processes other than the main one.

    No method raises an exception: a failing output is logged once, and again only after it has worked in between.

    Args:
        accelerator: The processes.
        run_dir: The run's folder; must exist on the main process.
        config: Flat configuration, which the trackers show.
        status: Initial content of `status.json`.
        trackers: "tensorboard", "trackio", "wandb"; see `check_trackers`.
        project: Name of the project in which Trackio and Weights & Biases show the run.
        resumed_at: Step and epoch of the checkpoint that a resumed run starts from; None for a new run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        config: dict[str, Any],
        status: dict[str, Any],
        *,
        trackers: Sequence[str] = ("tensorboard",),
        project: str = "face-vae",
        resumed_at: tuple[int, int] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.run_dir = run_dir
        self.active = accelerator.is_main_process
        self.status = {**status, "pid": os.getpid(), "host": socket.gethostname(), "state": "starting", "reason": None}
        self._failing: set[str] = set()
        self.trackers: dict[str, GeneralTracker] = {}
        self._project = project
        if not self.active:
            return
        if resumed_at is not None:
            self.rewind(*resumed_at)
        for name in trackers:
            with self.guard(_TITLES[name]):
                self.trackers[name] = _start_tracker(name, run_dir, project, config, resumed_at)
        self.update_status()

    def _each(self, what: str, call: Callable[[str, GeneralTracker], object]) -> None:
        """Call a function with the name of each tracker and the tracker; what fails in one does not affect the others."""
        for name, tracker in self.trackers.items():
            with self.guard(f"{_TITLES[name]}{what}"):
                call(name, tracker)

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Log an exception in the body instead of raising it.

        Args:
            name: What fails, for the log; the failure is logged again only after the body has succeeded.
        """
        try:
            yield
        except Exception as error:
            if name not in self._failing:
                self._failing.add(name)
                _log_failure(name, error)
        else:
            self._failing.discard(name)

    def rewind(self, step: int, epoch: int) -> None:
        """Remove the train and validation lines from metrics.jsonl that training from (`step`, `epoch`) repeats.

        Events are kept. A validation at `step` is repeated if its `epoch` is greater, as at the end of an epoch.
        """
        path = self.run_dir / "metrics.jsonl"
        if not self.active or not path.is_file():
            return
        kept = []
        with self.guard("metrics.jsonl"):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                    repeated = (line["step"], line["epoch"]) > (step, epoch) and line["kind"] != "event"
                except (ValueError, KeyError, TypeError):  # truncated or corrupt
                    continue
                if not repeated:
                    kept.append(text + "\n")
            write_file(path, "".join(kept).encode())

    def log(self, kind: str, values: dict[str, Any], *, step: int, epoch: int, images_seen: int) -> None:
        """Append a line to metrics.jsonl and log its numeric values as scalars of the trackers.

        Args:
            kind: "train", "validation" or "event".
            values: Name -> number, bool, string or None; a non-finite number becomes null in metrics.jsonl.
            step: Optimizer steps done.
            epoch: From 0.
            images_seen: Training images so far.
        """
        if not self.active:
            return
        line = {"kind": kind, "time": time.time(), "step": step, "epoch": epoch, "images_seen": images_seen}
        scalars = {}
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                scalars[name] = float(value)
            line[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        # Opened for each line, so that every line is flushed and a full disk can recover.
        with self.guard("metrics.jsonl"), (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if scalars:
            self._each("", lambda name, tracker: tracker.log(scalars, step=step))

    def event(self, message: str, level: str, *, step: int, epoch: int, images_seen: int) -> None:
        """Log a message, and write it to metrics.jsonl for the monitor; `level` is "info" or "warning"."""
        logging.getLogger("training").log(logging.WARNING if level == "warning" else logging.INFO, message)
        self.log("event", {"message": message, "level": level}, step=step, epoch=epoch, images_seen=images_seen)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Add a histogram of the finite values, if there are any, to the trackers."""
        finite = values[values.isfinite()].clamp(-1e19, 1e19).cpu()  # the range of TensorBoard's bins

        def add(kind: str, tracker: GeneralTracker) -> None:
            if kind == "tensorboard":
                tracker.writer.add_histogram(name, finite, step)
            else:  # the classes of both packages have the same names
                tracker.log({name: importlib.import_module(kind).Histogram(finite.numpy())}, step=step)

        if finite.numel():
            self._each(" histogram", add)

    def image(self, name: str, grid: Tensor, step: int, file_name: str) -> Path:
        """Save an image grid (3, H, W) in [0, 1] as PNG in samples/ and add it to the trackers; NaN becomes 0.

        Returns:
            The path of the PNG.
        """
        path, grid = self.run_dir / "samples" / file_name, grid.nan_to_num()
        if self.active:
            with self.guard("samples/"):
                path.parent.mkdir(exist_ok=True)
                save_image(grid, path)

        def add(kind: str, tracker: GeneralTracker) -> None:
            if kind == "tensorboard":
                tracker.writer.add_image(name, grid, step)
            else:
                pixels = (255 * grid.clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
                tracker.log({name: importlib.import_module(kind).Image(pixels)}, step=step)

        self._each(" image", add)
        return path

    def update_status(self, **changes: Any) -> None:
        """Change fields of `status.json` and its time stamp, which shows that the run is alive."""
        self.status.update(changes, updated=time.time())
        if self.active:
            with self.guard("status.json"):
                write_json(self.run_dir / "status.json", self.status)

    def close(self) -> None:
        """Flush and close the trackers, and leave the group of processes unless the run has failed.

        NCCL would wait there for the others, which may be waiting for this process; when it exits, the launcher ends them.
        """
        self._each("", lambda name, tracker: tracker.finish())
        if self.status.get("state") != "failed":
            with self.guard("the group of processes"):
                self.accelerator.end_training()

    def viewers(self) -> Iterator[tuple[str, str]]:
        """The name of each tracker, and the command that shows or uploads what it has recorded."""
        commands = {
            "tensorboard": f"tensorboard --logdir {self.run_dir.parent}",
            "trackio": f"trackio show --project {self._project}",
            "wandb": f"wandb sync {self.run_dir / 'wandb'}/*run-*",
        }
        for name in self.trackers:
            yield _TITLES[name], commands[name]
