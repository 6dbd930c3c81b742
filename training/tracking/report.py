"""What a run reports: log lines, metrics, alerts, grids, status and the progress bar, each from one call of the loop."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from training.config import Config
from training.evaluate.validation import Validation
from training.learning_rate import LearningRate
from training.losses.kl_control import KLController
from training.tracking.alerts import Alerts
from training.tracking.progress import Progress, ProgressLine
from training.tracking.trackers import Tracker, log_failed

logger = logging.getLogger(__name__)


class RunReport:
    """Reports a run; nothing that it does can end the run.

    Args:
        config: The configuration.
        tracker: Writes files, and to the trackers, on the main process.
        alerts: Judge the metrics.
        progress: Where the run stands.
        learning_rate, kl: Reported with the metrics.
        latent_dim: Latent dimensions of an image of `sample_size` pixels.
        sample_size: Of the model.
        steps_per_epoch: Steps of an epoch, or None if unknown.
    """

    def __init__(
        self,
        config: Config,
        tracker: Tracker,
        alerts: Alerts,
        progress: Progress,
        learning_rate: LearningRate,
        kl: KLController,
        *,
        latent_dim: int,
        sample_size: int,
        steps_per_epoch: int | None,
    ) -> None:
        self._presets, self._run_name = config.training_presets, config.output.run_name
        self._tracker, self._alerts, self._progress = tracker, alerts, progress
        self._learning_rate, self._kl = learning_rate, kl
        self._latent_dim, self._steps_per_epoch = latent_dim, steps_per_epoch
        total = None if steps_per_epoch is None else steps_per_epoch * self._presets.num_epochs
        self._sample_size = sample_size
        self._line = ProgressLine(total)

    def event(self, message: str, level: str = "info") -> None:
        """Logs a message, "info" or "warning", with the step; the monitor shows it too."""
        self._tracker.event(message, level, **self._progress.where)

    def warn(self, messages: list[str]) -> None:
        """Logs alerts of the main process; clocks differ, so other processes may have other alerts."""
        for message in messages if self._tracker.active else ():
            self.event(message, "warning")

    def status(self, **changes: Any) -> None:
        """Changes fields of status.json, with where the run stands."""
        progress = self._progress
        self._tracker.update_status(
            **changes,
            best=progress.best,
            plateau_bad_epochs=self._learning_rate.bad_epochs,
            early_stopping_bad_epochs=progress.early_stopping_bad_epochs,
            **progress.where,
        )

    def failed(self, error: BaseException) -> None:
        """Logs the error that ends the run."""
        self.status(state="failed", reason=log_failed(error))

    def step_metrics(self) -> None:
        """Reports the means over the steps since the last call."""
        progress = self._progress
        latent_dim = round(self._latent_dim * self._pixels(progress.epoch))
        values = progress.take_window(
            self._presets, self._kl, latent_dim=latent_dim, learning_rate=self._learning_rate.value
        )
        speed = values["speed/images_per_second"]
        left = progress.seconds_left(self._presets, self._steps_per_epoch, speed, self._pixels)
        self._tracker.log("train", values, **progress.where)
        with self._tracker.guard("alerts"):
            self.warn(self._alerts.observe_window(values, images_seen=progress.images_seen, step=progress.step))
        self._tracker.update_status(state="running", seconds_left=left, **progress.where)
        if self._tracker.active:
            with self._tracker.guard("progress bar"):
                self._line.show(progress, values, left)

    def _pixels(self, epoch: int) -> float:
        """Pixels of a training image in an epoch, relative to the full resolution."""
        return ((self._presets.resolution(epoch) or self._sample_size) / self._sample_size) ** 2

    def validation(self, when: str, result: Validation) -> None:
        """Reports a validation.

        Args:
            when: "epoch 3", "before training", ...
            result: Its metrics.
        """
        progress, rate = self._progress, self._learning_rate.value
        logger.info("%s: %s", when, result.summary(self._latent_dim))
        with self._tracker.guard("alerts"):
            self.warn(
                self._alerts.observe_validation(
                    result.values, images_seen=progress.images_seen, learning_rate=rate, latent_dim=self._latent_dim
                )
            )
        values = {f"validation/{name}": value for name, value in result.values.items()}
        self._tracker.log("validation", {**values, "validation/learning_rate": rate}, **progress.where)
        self._tracker.histogram("validation/kl_per_dimension", result.kl_per_dimension, progress.step)
        if result.sigma_at_bound_fraction > 0.01:
            percent = f"{100 * result.sigma_at_bound_fraction:.0f} %"
            self.event(
                f"{percent} of the posterior's sigmas are at a bound: kl/beta is far too small or large", "warning"
            )

    def grids(self, grids: dict[str, Tensor], label: str) -> None:
        """Saves grids (3, height, width) in [0, 1] in samples/ and in the trackers."""
        for kind, grid in grids.items():
            final = label == "final" and kind != "reconstructions"
            file = f"{self._run_name}_final_{kind}.png" if final else f"{self._run_name}_{kind}_{label}.png"
            self._tracker.image(kind, grid, self._progress.step, file)

    def close(self) -> None:
        """Closes the progress bar and the trackers."""
        with self._tracker.guard("progress bar"):
            self._line.close()
        self._tracker.close()
