"""The learning rate of a run: linear warm-up over the first optimizer steps, then ReduceLROnPlateau or a fixed schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from training.config import TrainingPresets

# What a checkpoint holds of the plateau scheduler; its settings come from the configuration, which a resume may change.
_PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class LearningRate:
    """Owns the learning rate of every parameter group; a group's rate is `lr_scale` times the run's.

    Args:
        optimizer: With `lr_scale` in each parameter group.
        presets: Section `training_presets`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, presets: TrainingPresets) -> None:
        self._optimizer, self._presets = optimizer, presets
        self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            factor=presets.plateau_factor,
            patience=presets.plateau_patience,
            threshold=presets.plateau_threshold,
            min_lr=[presets.min_learning_rate * group["lr_scale"] for group in optimizer.param_groups],
        )

    @property
    def value(self) -> float:
        """The current learning rate of the first parameter group."""
        return self._optimizer.param_groups[0]["lr"]

    @property
    def bad_epochs(self) -> int:
        """Epochs without improvement since the last one or the last reduction."""
        return self._plateau.num_bad_epochs

    def before_step(self, step: int, fraction: float) -> None:
        """Sets the rate of a step; after the warm-up that of "plateau" belongs to the plateau scheduler.

        Args:
            step: Optimizer steps done.
            fraction: Of the run that is done, in [0, 1].
        """
        presets = self._presets
        if presets.lr_schedule == "plateau" and step > presets.lr_warmup_steps:
            return
        floor = min(presets.min_learning_rate, presets.learning_rate)
        rate = floor + (presets.learning_rate - floor) * _decay(presets, fraction)
        rate *= min(1.0, (step + 1) / (presets.lr_warmup_steps + 1))
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def after_epoch(self, validation_loss: float, step: int) -> tuple[float, float]:
        """Feeds a validation loss to the plateau scheduler, except during warm-up and with another schedule.

        Returns:
            The learning rate before and after.
        """
        before = self.value
        if self._presets.lr_schedule == "plateau" and step > self._presets.lr_warmup_steps:
            self._plateau.step(validation_loss)
        return before, self.value

    def restart(self) -> None:
        """Sets the configured rates."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._presets.learning_rate * group["lr_scale"]

    def restart_plateau(self) -> None:
        """Forgets the best value, for another metric; the rates stay."""
        self._plateau.best, self._plateau.num_bad_epochs = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns JSON values: the rates, the configured rate that they belong to, and the plateau scheduler's state."""
        plateau = self._plateau.state_dict()
        return {
            "rates": [group["lr"] for group in self._optimizer.param_groups],
            "learning_rate": self._presets.learning_rate,
            "plateau": {key: plateau[key] for key in _PLATEAU_STATE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the rates, scaled if `training_presets.learning_rate` has changed since, and the plateau state."""
        for group, rate in zip(self._optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate * (self._presets.learning_rate / state["learning_rate"])
        self._plateau.load_state_dict(state["plateau"])


def _decay(presets: TrainingPresets, fraction: float) -> float:
    """Factor of the learning rate after a fraction of the run, from 1 to 0."""
    if presets.lr_schedule == "cosine":  # Loshchilov and Hutter 2017, without restarts
        return 0.5 * (1 + math.cos(math.pi * fraction))
    if presets.lr_schedule == "warmup_stable_decay":  # Haegele et al. 2024, https://arxiv.org/abs/2405.18392
        return 1 - math.sqrt(max(0.0, 1 - (1 - fraction) / presets.lr_decay_fraction))
    return 1.0
