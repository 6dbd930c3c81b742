"""The learning rate of a run: linear warm-up over the first optimizer steps, then ReduceLROnPlateau."""

from __future__ import annotations

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

    def before_step(self, step: int) -> None:
        """Sets the warm-up rate; after the warm-up the rate belongs to the plateau scheduler.

        Args:
            step: Optimizer steps done.
        """
        warmup = self._presets.lr_warmup_steps
        if step <= warmup:
            factor = min(1.0, (step + 1) / (warmup + 1))
            for group in self._optimizer.param_groups:
                group["lr"] = self._presets.learning_rate * group["lr_scale"] * factor

    def after_epoch(self, validation_loss: float, step: int) -> tuple[float, float]:
        """Feeds a validation loss to the plateau scheduler, except during warm-up.

        Returns:
            The learning rate before and after.
        """
        before = self.value
        if step > self._presets.lr_warmup_steps:
            self._plateau.step(validation_loss)
        return before, self.value

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
