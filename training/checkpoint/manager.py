"""When a checkpoint is written, which model is the best, and how a run returns to an earlier checkpoint.

The files of a checkpoint are described in format.py; what it contains is listed in state.py.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.checkpoint.format import CheckpointWriter, Snapshot, quarantine_newer
from training.checkpoint.resume import drop_lost_best, newest_valid
from training.checkpoint.state import TrainingState
from training.config import OutputConfig
from training.distributed import on_main_process
from training.publish.checkpoints import CheckpointUploader
from training.run_files import list_checkpoints, read_state, step_folder
from training.tracking.progress import Progress

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Writes checkpoints in the background, one at a time, and keeps the newest and the best.

    Every process calls every method in the same order, except those of the sections "when" and `is_written`.

    Args:
        run_dir: The run's folder.
        output: Section `output`: how often to write and how many to keep.
        state: What a checkpoint contains.
        progress: Where the run stands; its `best` is managed here.
        description: Returns JSON values to store besides: the configuration, the number of processes, ...
        model_files: Returns the files of the model's folder besides its weights: name -> content.
        warn: Called with a sentence when a checkpoint could not be written or uploaded.
        upload_to: Repository on the Hub to which checkpoints are uploaded, or None.
        best_metric: Name of the validation metric that the best model has the lowest value of.
    """

    def __init__(
        self,
        run_dir: Path,
        output: OutputConfig,
        state: TrainingState,
        progress: Progress,
        *,
        description: Callable[[], dict[str, Any]],
        model_files: Callable[[], dict[str, bytes]],
        warn: Callable[[str], None],
        upload_to: str | None = None,
        best_metric: str = "validation/reconstruction_loss",
    ) -> None:
        self.run_dir, self.state = run_dir, state
        self._output, self._progress = output, progress
        self._description, self._model_files, self._warn = description, model_files, warn
        self.best_metric = best_metric
        self._writer = CheckpointWriter(run_dir, output.keep_checkpoints)
        self._uploader = None
        if upload_to is not None and state.accelerator.is_main_process:
            self._uploader = CheckpointUploader(run_dir, upload_to, warn)
        # The best model whose checkpoint is on disk, and the best model of the checkpoint being written.
        self._best_on_disk = self._best_in_writing = progress.best
        self._start_interval()

    def _start_interval(self) -> None:
        self._last_save = (self._progress.images_seen, time.monotonic())

    # ------------------------------------------------------------------ when

    @property
    def images_due(self) -> bool:
        """Whether the configured number of images has passed since the last checkpoint was started."""
        images = self._output.checkpoint_every_images
        return images is not None and self._progress.images_seen - self._last_save[0] >= images

    @property
    def minutes_due(self) -> bool:
        """Whether the configured minutes have passed since then, on this process's clock."""
        minutes = self._output.checkpoint_every_minutes
        return minutes is not None and time.monotonic() - self._last_save[1] >= 60 * minutes

    def is_due_at_epoch(self, is_best: bool, is_last: bool) -> bool:
        """Whether an epoch that has just been validated ends with a checkpoint."""
        return is_best or is_last or self._progress.epoch % self._output.checkpoint_every_epochs == 0

    # ------------------------------------------------------------------ writing

    def save(self) -> None:
        """Copies the state to host memory and starts to write it; waits for the write before."""
        self.wait()
        self._start_interval()
        self._best_in_writing = best = self._progress.best
        if not self.state.accelerator.is_main_process:
            return
        self._writer.start(
            Snapshot(
                step=self._progress.step,
                model_files=self._model_files(),
                tensors=self.state.host_tensors(),
                trainer_state=copy.deepcopy({**self._description(), **self.state.values()}),
                best_step=None if best is None else best["step"],
            )
        )

    @property
    def is_written(self) -> bool:
        """Whether a write has ended on this process and `wait` would return at once."""
        return self._writer.is_done

    def wait(self) -> None:
        """Waits for the checkpoint being written; every process learns whether it succeeded."""
        outcome = on_main_process(self.state.accelerator, self._writer.wait)
        if outcome is None:
            return
        step, error = outcome
        best = self._progress.best
        if error is None:
            self._best_on_disk = self._best_in_writing
            if self._uploader is not None:
                self._uploader.start()
            return
        self._warn(f"the checkpoint of step {step} could not be written; older checkpoints are unchanged ({error})")
        if best is not None and best["step"] == step:  # its weights are nowhere: the next good model is the best
            self._progress.best = self._best_on_disk

    def join_writer(self) -> None:
        """Waits for this process's writer and upload alone, at the end of the process, however it ends."""
        self._writer.wait()
        if self._uploader is not None:
            self._uploader.finish()

    # ------------------------------------------------------------------ the best model

    def update_best(self, loss: float, metrics: dict[str, Any], threshold: float) -> bool:
        """Records a validation as the best if its loss is lower than the best one by a relative threshold.

        Args:
            loss: The metric that decides.
            metrics: All validation metrics by their logged names, `best_metric` among them.
            threshold: Relative improvement that counts.

        Returns:
            Whether it is the best, which a loss that is not finite never is; the model itself is kept by the next
            `save`.
        """
        progress = self._progress
        best = math.nan if progress.best is None else progress.best.get(self.best_metric, math.nan)
        is_best = math.isfinite(loss) and (math.isnan(best) or loss < best * (1 - threshold))
        if is_best:
            progress.best = {"epoch": progress.epoch, "step": progress.step, **metrics}
        return is_best

    @property
    def best_model_dir(self) -> Path:
        """Folder of the best model in the checkpoint of its step."""
        return step_folder(self.run_dir, self._progress.best["step"]) / "model"

    # ------------------------------------------------------------------ reading

    def exists(self) -> bool:
        """Whether the run has a checkpoint."""
        self.wait()
        return on_main_process(self.state.accelerator, lambda: bool(list_checkpoints(self.run_dir)))

    def restore(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Loads a verified checkpoint.

        Args:
            checkpoint: Its folder; only the main process reads it.
            saved: Its trainer state (`read_state`), the same on every process.
        """
        self.state.load(checkpoint, saved)
        self._best_on_disk = self._best_in_writing = self._progress.best
        self._start_interval()

    def roll_back(self) -> tuple[Path, dict[str, Any]]:
        """Returns to the newest valid checkpoint; newer, damaged ones are quarantined.

        Returns:
            The checkpoint and its trainer state.
        """
        self.wait()

        def find() -> tuple[Path, dict[str, Any]]:
            checkpoint, _ = newest_valid(self.run_dir, None)
            quarantine_newer(self.run_dir, checkpoint)
            state = read_state(checkpoint)
            for note in drop_lost_best(self.run_dir, checkpoint, state):
                self._warn(note.removeprefix("resume: "))
            return checkpoint, state

        checkpoint, saved = on_main_process(self.state.accelerator, find)
        self.restore(checkpoint, saved)
        return checkpoint, saved
