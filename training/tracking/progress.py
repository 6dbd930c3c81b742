"""Progress of a run and the metrics of its steps: summed over a window of steps, logged as means."""

from __future__ import annotations

import copy
import datetime
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
from tqdm import tqdm

from training.config import TrainingPresets
from training.io import restore_fields
from training.losses.kl_control import KLController

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Position and results of a run; JSON values, saved in every checkpoint."""

    epoch: int = 0  # current epoch
    batch: int = 0  # global batches of it that are done
    step: int = 0  # optimizer steps, skipped ones included
    images_seen: int = 0
    train_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # to a checkpoint, after too many non-finite gradients
    steps_per_epoch: int | None = None  # as the run knew it when it started, for the learning rate of a resumed run
    log_beta: float | None = None  # KLController.log_beta for the next step, without the values of the last one
    adversarial_weight: float = 0.0  # of the next step, likewise
    best: dict[str, Any] | None = None  # validation metrics of the best model
    latents: dict[str, Any] | None = None  # scaling of the latents, as the last validation measured it
    early_stopping_bad_epochs: int = 0
    window: dict[str, float] = field(default_factory=dict)  # sums over the steps since the last log line

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; unknown fields are logged and ignored, missing ones take their defaults."""
        vars(self).update(restore_fields(asdict(Progress()), copy.deepcopy(dict(state)), "progress"))
        if self.window:
            self.window.setdefault("measured", self.window["steps"])  # absent in older checkpoints

    @property
    def where(self) -> dict[str, int]:
        """The position, as `Tracker.log` takes it."""
        return {"step": self.step, "epoch": self.epoch, "images_seen": self.images_seen}

    def add_step(
        self,
        parts: dict[str, float] | None,
        *,
        beta: float,
        grad_norm: float,
        max_grad_norm: float,
        seconds: float,
        waited: float,
    ) -> None:
        """Add one step to the window.

        Args:
            parts: Loss terms, means over the global batch; a name without "/" is logged as "loss/<name>". None for a
                step that counts in the speed only.
            beta: Weight of KL in this step.
            grad_norm: Before clipping.
            max_grad_norm: Larger norms were clipped.
            seconds: Wall time of the step, including `waited`.
            waited: Seconds spent waiting for images.
        """
        self.train_seconds += seconds
        sums = {"steps": 1.0, "seconds": seconds, "waited": waited}
        if parts is not None:
            sums |= {f"loss/{name}" if "/" not in name else name: value for name, value in parts.items()}
            controlled = parts["reconstruction"] + parts["weighted/kl"]  # the total without an adversarial term
            sums["kl/loss_fraction"] = parts["weighted/kl"] / controlled if controlled else math.nan
            sums["kl/beta"] = beta
            sums["optim/grad_norm"] = grad_norm
            sums["optim/clipped_fraction"] = float(grad_norm > max_grad_norm)
            sums["measured"] = 1.0
        for name, value in sums.items():
            self.window[name] = self.window.get(name, 0.0) + value

    @property
    def has_measurements(self) -> bool:
        """Whether the window has a step with loss terms."""
        return "loss/total" in self.window

    def take_window(
        self, presets: TrainingPresets, kl: KLController, *, latent_dim: int, learning_rate: float
    ) -> dict[str, Any]:
        """Return the means over the window and the state of the KL control, and empty the window.

        Args:
            presets: For the batch size.
            kl: The KL controller.
            latent_dim: Latent dimensions of an image, at the present resolution.
            learning_rate: Current learning rate.
        """
        window, self.window = self.window, {}
        steps, seconds, waited = (window.pop(name) for name in ("steps", "seconds", "waited"))
        measured = window.pop("measured")
        values: dict[str, Any] = {name: total / measured for name, total in window.items()}
        low, high = kl.target_range(self.epoch)
        return values | {
            "kl/smoothed_fraction": kl.smoothed_fraction,
            "kl/target_low": low,
            "kl/target_high": high,
            "kl/beta_floor": kl.minimum_beta(self.epoch),
            "kl/nats_per_image": values["loss/kl"] * latent_dim,
            "optim/learning_rate": learning_rate,
            "optim/skipped_steps": self.skipped_steps,
            "speed/images_per_second": steps * presets.batch_size / max(seconds, 1e-9),
            "speed/data_wait_fraction": waited / max(seconds, 1e-9),
            "speed/memory_gib": _memory_gib(),
        }

    def fraction(self, num_epochs: int) -> float:
        """Fraction of the epochs of the run that is done; only full epochs count where their length was unknown."""
        part = min(1.0, self.batch / self.steps_per_epoch) if self.steps_per_epoch else 0.0
        return min(1.0, (self.epoch + part) / num_epochs)

    def stops_early(self, presets: TrainingPresets) -> bool:
        """Whether early stopping ends the run."""
        return 0 < presets.early_stopping_patience <= self.early_stopping_bad_epochs

    def seconds_left(
        self,
        presets: TrainingPresets,
        steps_per_epoch: int | None,
        images_per_second: float,
        pixels: Callable[[int], float] = lambda epoch: 1.0,
    ) -> float | None:
        """Training time to the last epoch or the time limit; None where the length of an epoch is unknown.

        Args:
            presets: The settings.
            steps_per_epoch: Steps of an epoch.
            images_per_second: In the present epoch.
            pixels: Pixels of an image in an epoch, in any unit; a step takes time in proportion.
        """
        left = None
        if steps_per_epoch is not None:
            epochs = sum(pixels(epoch) / pixels(self.epoch) for epoch in range(self.epoch, presets.num_epochs))
            left = max(0.0, epochs * steps_per_epoch - self.batch) * presets.batch_size / images_per_second
        if presets.max_train_minutes is not None:
            limit = max(0.0, 60 * presets.max_train_minutes - self.train_seconds)
            left = limit if left is None else min(left, limit)
        return left


class ProgressLine:
    """Shows the latest metrics on stderr: a progress bar on a terminal, log lines otherwise.

    Args:
        total_steps: Optimizer steps of the run; None if unknown.
    """

    def __init__(self, total_steps: int | None) -> None:
        self._total = total_steps
        self._bar: tqdm | None = None

    def show(self, progress: Progress, values: dict[str, Any], seconds_left: float | None) -> None:
        """Show the metrics of `Progress.take_window`; epochs and steps count from 1."""
        left = "?" if seconds_left is None else str(datetime.timedelta(seconds=round(seconds_left)))
        text = (
            f"loss {values['loss/total']:.4f} mse {values['loss/mse']:.5f} kl {values['loss/kl']:.3f} "
            f"kl_fraction {values['kl/loss_fraction']:.3f} lr {values['optim/learning_rate']:.1e} "
            f"images/s {values['speed/images_per_second']:.1f} time_left {left}"
        )
        if not sys.stderr.isatty():
            logger.info("epoch %d step %d: %s", progress.epoch + 1, progress.step, text)
            return
        if self._bar is None:
            # Its speed counts from here: the run may have been resumed.
            self._bar = tqdm(total=self._total, initial=progress.step, unit="step", dynamic_ncols=True)
        self._bar.set_postfix_str(text)
        self._bar.update(progress.step - self._bar.n)

    def close(self) -> None:
        """Close the bar and leave it on the terminal."""
        if self._bar is not None:
            self._bar.close()


def _memory_gib() -> float | None:
    """Peak allocated memory on a GPU, resident memory on a CPU; None where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        return psutil.Process().memory_info().rss / 2**30
    except (psutil.Error, OSError):
        return None
