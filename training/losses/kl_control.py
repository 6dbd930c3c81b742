"""KL weight (beta) control: keeps the KL fraction of the loss in a target range, with warm-up and low-beta phases.

A state machine on plain numbers, without tensors, files or clocks. All durations are in images, so that batch size and
log interval may change. The KL term itself is computed in `training.losses.objective`.

**Controlled value.** KL is the mean over latent dimensions, in nats per dimension. The KL fraction of the loss is
`beta * KL / (reconstruction + beta * KL)`; its log-odds are `log beta + log(KL / reconstruction)`.

**Average.** x = log(KL / reconstruction), which does not contain beta, is averaged exponentially (half-life in images,
bias-corrected); the smoothed fraction is that average at the current beta. Beta itself is not averaged: warm-up, cycle
and the controller's own steps change the fraction at once, and an average of past fractions would lag behind them.

**Law.** While the smoothed fraction is in its target range, beta is constant. Outside, with e = log-odds of the center
of the range - (log beta + average of x), log beta changes by e * (1 - exp(-kl_gain * images / half-life)), at most
`kl_max_step` per half-life, until |e| is a quarter of the width of the range. log beta is the only integrator and is
clamped to [max(kl_beta_min, minimum beta of the epoch), kl_beta_max], so there is no wind-up.

**Stability.** Let log KL respond to log beta with gain -r (0 <= r < 1) through lags H(s), |H| <= 1 for Re s >= 0
(the average is one of them). The poles solve s + g = g * r * H(s), where |s + g| >= g > g * r for Re s >= 0: the loop
is stable for every lag. For r > 1 (posterior collapse: KL falls faster than beta rises) the fraction responds with the
wrong sign, so below `kl_collapse_nats` beta decreases, whatever the fraction.

**Delay.** The trainer reads the values of a step while the next one runs, so beta follows them one step late; against a
half-life of many steps this is another small lag.

**Cycle** (Bowman et al. 2016, arXiv:1511.06349; Fu et al. 2019, arXiv:1903.10145). A low-beta phase (`kl_cooldown_*`)
multiplies beta and its target range by `kl_cooldown_reduction`. The law compares the fraction at the full beta with the
full range: for small fractions this is the same comparison, without a jump at the switch.

`python -m training.kl --config FILE` simulates it without training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from training.config import KLSchedule
from training.io import restore_fields

# Smaller KL counts as this, so that the logarithm is finite and the average soon forgets a total collapse.
_SMALLEST_KL = 1e-4  # nats per dimension; a tenth of a nat per image of 1,024 dimensions
_STATE = ("log_beta", "applied_beta", "log_kl_sum", "log_ratio_sum", "weight", "correcting")


class KLController:
    """Keeps the KL fraction of the loss in its target range by changing log beta; the module docstring has the law.

    Every process observes the same all-reduced values and so has the same state.

    Args:
        schedule: The settings.
        controlled: False: beta is `kl_beta_init` after the warm-up, without control, cycle and minimum beta; the
            moving averages continue to be updated, for the log.

    Attributes:
        log_beta: Natural logarithm of the controlled beta, before warm-up, cycle and minimum beta.
    """

    def __init__(self, schedule: KLSchedule, controlled: bool = True) -> None:
        self.schedule = schedule if controlled else replace(schedule, kl_cycle_enabled=False, kl_beta_floor=0.0)
        self.controlled = controlled
        self.log_beta = math.log(schedule.kl_beta_init)
        self._applied_beta = schedule.kl_beta_init  # beta at the latest observation
        self._log_kl_sum = 0.0  # exponentially weighted sums; divided by _weight, the moving averages
        self._log_ratio_sum = 0.0
        self._weight = 0.0
        self._correcting = False

    def beta(self, epoch: int, images_seen: int, log_beta: float | None = None) -> float:
        """The beta of the loss.

        Args:
            epoch: Counts from 0.
            images_seen: Images trained on since the start of the run, over all processes and resumes.
            log_beta: An earlier value of `log_beta` to use instead of the current one.

        Returns:
            Controlled beta x warm-up ramp x cycle factor, clamped to the limits of the epoch.
        """
        warmup = self.schedule.kl_warmup_images
        ramp = min(1.0, images_seen / warmup) if warmup else 1.0
        low, high = self._limits(epoch)
        log_beta = self.log_beta if log_beta is None else log_beta
        return min(max(ramp * math.exp(log_beta) * self._cycle_factor(epoch), low), high)

    def observe(self, *, kl: float, reconstruction: float, num_images: int, epoch: int, images_seen: int) -> None:
        """Update the moving averages with the losses of the latest images, and log beta by the control law.

        Invalid observations (not finite, KL below 0 by more than rounding, reconstruction loss or image count not above
        0) are ignored.

        Args:
            kl: Mean over those images and all latent dimensions, nats per dimension, over all processes.
            reconstruction: Mean of the weighted loss without its KL term, over the same images.
            num_images: Number of these images.
            epoch: The epoch of these images, from 0.
            images_seen: Images trained on so far, these included.
        """
        if not math.isfinite(kl + reconstruction) or kl < -1e-6 or reconstruction <= 0 or num_images < 1:
            return
        elapsed = num_images / self.schedule.kl_half_life_images
        keep = 0.5**elapsed
        log_kl = math.log(max(kl, _SMALLEST_KL))
        self._log_kl_sum = keep * self._log_kl_sum + (1 - keep) * log_kl
        self._log_ratio_sum = keep * self._log_ratio_sum + (1 - keep) * (log_kl - math.log(reconstruction))
        self._weight = keep * self._weight + (1 - keep)
        self._update_log_beta(elapsed, epoch, images_seen)
        self._applied_beta = self.beta(epoch, images_seen)

    def _update_log_beta(self, elapsed: float, epoch: int, images_seen: int) -> None:
        """One step of the law; `elapsed` is the length of the observation in half-lives."""
        schedule = self.schedule
        low, high = (math.log(limit) for limit in self._limits(epoch))
        self.log_beta = min(max(self.log_beta, low), high)  # the minimum beta rises with the epoch
        if not self.controlled or images_seen < schedule.kl_warmup_images:
            return
        edges = [math.log(fraction / (1 - fraction)) for fraction in (schedule.kl_target_low, schedule.kl_target_high)]
        half_width = (edges[1] - edges[0]) / 2
        error = sum(edges) / 2 - (self.log_beta + self._log_ratio_sum / self._weight)
        self._correcting = abs(error) > (half_width / 2 if self._correcting else half_width)
        max_step = schedule.kl_max_step * elapsed
        if self.collapsed:
            step = -max_step
        elif self._correcting:
            step = min(max(-math.expm1(-schedule.kl_gain * elapsed) * error, -max_step), max_step)
        else:
            return
        self.log_beta = min(max(self.log_beta + step, low), high)

    def _limits(self, epoch: int) -> tuple[float, float]:
        return max(self.schedule.kl_beta_min, self.minimum_beta(epoch)), self.schedule.kl_beta_max

    @property
    def smoothed_fraction(self) -> float | None:
        """Smoothed KL fraction of the loss, 0 to 1, at the beta of the latest observation; None before the first."""
        if self._weight == 0:
            return None
        odds = self._applied_beta * math.exp(self._log_ratio_sum / self._weight)
        return odds / (1 + odds)

    @property
    def smoothed_kl(self) -> float | None:
        """Smoothed KL (geometric mean) in nats per dimension; None before the first observation."""
        return math.exp(self._log_kl_sum / self._weight) if self._weight else None

    @property
    def collapsed(self) -> bool:
        """Whether the smoothed KL is below `kl_collapse_nats`, that is, the posterior carries hardly any information."""
        return self._weight > 0 and self.smoothed_kl < self.schedule.kl_collapse_nats

    def target_range(self, epoch: int) -> tuple[float, float]:
        """Lower and upper end of the target range of the smoothed fraction in an epoch."""
        factor = self._cycle_factor(epoch)
        return factor * self.schedule.kl_target_low, factor * self.schedule.kl_target_high

    def in_low_beta_phase(self, epoch: int) -> bool:
        """Whether the epoch (from 0) is one of the first `kl_cooldown_epochs` of its cycle."""
        schedule = self.schedule
        return schedule.kl_cycle_enabled and epoch % schedule.kl_cycle_period < schedule.kl_cooldown_epochs

    def _cycle_factor(self, epoch: int) -> float:
        return self.schedule.kl_cooldown_reduction if self.in_low_beta_phase(epoch) else 1.0

    def minimum_beta(self, epoch: int) -> float:
        """`kl_beta_floor * kl_floor_growth**epoch`, at most `kl_beta_max`; 0 without control or without a floor."""
        schedule = self.schedule
        if schedule.kl_beta_floor == 0:
            return 0.0
        # Compared as logarithms, because the power overflows in a very long run.
        if epoch * math.log(schedule.kl_floor_growth) >= math.log(schedule.kl_beta_max / schedule.kl_beta_floor):
            return schedule.kl_beta_max
        return schedule.kl_beta_floor * schedule.kl_floor_growth**epoch

    def restart(self) -> None:
        """Set the controlled beta to `kl_beta_init`; the moving averages stay."""
        self.log_beta = math.log(self.schedule.kl_beta_init)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs, as JSON values."""
        return {name: getattr(self, name if name == "log_beta" else f"_{name}") for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state; log beta is clamped to the present limits at the next observation.

        Args:
            state: A `state_dict`, perhaps of another version: unknown fields are logged and ignored, missing ones keep
                their present values.

        Raises:
            ValueError: A value has the wrong type or is not finite; the controller is unchanged.
        """
        restored = restore_fields(self.state_dict(), state, "KL controller state")
        for name, value in restored.items():
            if type(value) is not (bool if name == "correcting" else float) or not math.isfinite(value):
                raise ValueError(f"KL controller state: {name} is {value!r}; resume from an older checkpoint.")
        for name, value in restored.items():
            setattr(self, name if name == "log_beta" else f"_{name}", value)
