"""KL weight (beta) control: warm-up, a KL share of the loss held in a band, cool-down cycles, a rising floor.

What this file is for: deciding, from plain numbers, which beta the loss uses next. It is a state machine
without tensors, files or clocks; all counts are in images, so batch size and log interval may change.
What it is not for: computing the KL term (`training.losses.objective`) or reducing it over processes (the caller does).

**Unit.** KL is the mean over latent numbers, in nats per number. The controlled figure is the KL share of the
loss, `beta * KL / (reconstruction + beta * KL)`; its log-odds are `log beta + log(KL / reconstruction)`.

**Average.** What beta does not set, x = log(KL / reconstruction), is averaged exponentially (half-life in
images, bias-corrected); the smoothed share is that average at the beta in force. Beta stays out of memory:
warm-up, cool-down and the controller's own steps change the real share at once, and an average of past shares
would lag and kick the controller at every boundary.

**Law.** Beta is still while the smoothed share is in its band. Once it has left, with e = log-odds of the
band's centre - (log beta + average of x), log beta moves by e * (1 - exp(-kl_gain * images / half-life)), at
most `kl_max_step` per half-life, until |e| is a quarter of the band's width. log beta is the only integrator
and clamped to [max(kl_beta_min, floor), kl_beta_max], so nothing winds up.

**Stability.** Let log KL answer log beta with gain -r (0 <= r < 1) through lags H(s), |H| <= 1 for Re s >= 0
(the average is one). The poles solve s + g = g * r * H(s), where |s + g| >= g > g * r for Re s >= 0: no lag
makes the loop unstable. Where r > 1 (posterior collapse: KL falls faster than beta rises) the share has the
wrong sign, so below `kl_collapse_nats` beta goes down, whatever the share.

**Cycle** (Bowman et al. 2016, arXiv:1511.06349; Fu et al. 2019, arXiv:1903.10145). A cool-down multiplies
beta and its band by `kl_cooldown_reduction`. The law judges the share of the full beta against the full band:
the same comparison for small shares, and without a jump at the switch.

Command, no training:
    python -m training.kl --simulate --config FILE [--out PNG] [--epochs N] [--images-per-epoch N]
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.config import KLSchedule

# KL below this counts as this: the logarithm stays finite, and the average soon forgets a total collapse.
_SMALLEST_KL = 1e-4  # nats per number; a tenth of a nat per image of 1,024 numbers
_STATE_NUMBERS = ("log_beta", "_applied_beta", "_log_kl_sum", "_log_ratio_sum", "_weight")
_STATE = (*_STATE_NUMBERS, "_correcting", "held", "ignored_observations")


class KLController:
    """Holds the KL share of the loss in its band by moving log beta; see the module's text for the law.

    Every process feeds it the same all-reduced numbers and so holds the same state.

    Args:
        schedule: The settings.
        controlled: False: beta is `kl_beta_init` after the warm-up, without control, cycle and floor; the
            averages are still fed, for the log.

    Attributes:
        log_beta: Natural logarithm of the controlled beta, before warm-up, cycle and floor.
        held: Why log beta is still: "no observation", "constant", "warm-up", "inside", "at floor", "at min"
            or "at max"; None while it moves.
        ignored_observations: How many observations meant nothing and were left out.
    """

    def __init__(self, schedule: KLSchedule, controlled: bool = True) -> None:
        constant = {} if controlled else {"kl_cycle_enabled": False, "kl_beta_floor": 0.0}
        self.schedule = replace(schedule, **constant)
        self.controlled = controlled
        self.log_beta = math.log(schedule.kl_beta_init)
        self._applied_beta = schedule.kl_beta_init  # the beta in force at the latest observation
        self._log_kl_sum = 0.0  # exponentially weighted sums; the averages are these over _weight
        self._log_ratio_sum = 0.0
        self._weight = 0.0
        self._correcting = False
        self.held: str | None = "no observation"
        self.ignored_observations = 0

    def beta(self, epoch: int, images_seen: int) -> float:
        """The beta that the loss uses.

        Args:
            epoch: Counts from 0.
            images_seen: Images trained on since the start of the run, over all processes and resumes.

        Returns:
            Controlled beta x warm-up ramp x cycle factor, never below max(`kl_beta_min`, floor of the epoch).
        """
        warmup = self.schedule.kl_warmup_images
        ramp = min(1.0, images_seen / warmup) if warmup else 1.0
        low, high = self._range(epoch)
        return min(max(ramp * math.exp(self.log_beta) * self.schedule.cycle_factor(epoch), low), high)

    def observe(self, *, kl: float, reconstruction: float, num_images: int, epoch: int, images_seen: int) -> None:
        """Feeds the losses of the latest images and moves log beta where the law says so.

        An observation that means nothing (not finite, KL below 0 by more than rounding, reconstruction or
        image count not above 0) only raises `ignored_observations`: one bad batch must not end a run.

        Args:
            kl: Mean over those images and all latent numbers, nats per number, over all processes.
            reconstruction: Mean of the weighted loss without its KL term, over the same images.
            num_images: Images that the two means cover.
            epoch: The epoch of those images, from 0.
            images_seen: Images trained on so far, these included.
        """
        if not math.isfinite(kl + reconstruction) or kl < -1e-6 or reconstruction <= 0 or num_images < 1:
            self.ignored_observations += 1
            return
        elapsed = num_images / self.schedule.kl_half_life_images
        keep = 0.5**elapsed
        log_kl = math.log(max(kl, _SMALLEST_KL))
        self._log_kl_sum = keep * self._log_kl_sum + (1 - keep) * log_kl
        self._log_ratio_sum = keep * self._log_ratio_sum + (1 - keep) * (log_kl - math.log(reconstruction))
        self._weight = keep * self._weight + (1 - keep)
        self._move(elapsed, epoch, images_seen)
        self._applied_beta = self.beta(epoch, images_seen)

    def _move(self, elapsed: float, epoch: int, images_seen: int) -> None:
        """One step of the law; `elapsed` is the observation's length in half-lives."""
        schedule = self.schedule
        low, high = (math.log(bound) for bound in self._range(epoch))
        self.log_beta = min(max(self.log_beta, low), high)  # the floor rises under a beta that rests on it
        if not self.controlled or images_seen < schedule.kl_warmup_images:
            self.held = "warm-up" if self.controlled else "constant"
            return
        edges = [math.log(share / (1 - share)) for share in (schedule.kl_target_low, schedule.kl_target_high)]
        half_width = (edges[1] - edges[0]) / 2
        error = sum(edges) / 2 - (self.log_beta + self._log_ratio_sum / self._weight)
        self._correcting = abs(error) > (half_width / 2 if self._correcting else half_width)
        bound = schedule.kl_max_step * elapsed
        if self.collapsed:
            step = -bound
        elif self._correcting:
            step = min(max(-math.expm1(-schedule.kl_gain * elapsed) * error, -bound), bound)
        else:
            self.held = "inside"
            return
        before, self.log_beta = self.log_beta, min(max(self.log_beta + step, low), high)
        lowest = "at floor" if schedule.floor(epoch) > schedule.kl_beta_min else "at min"
        self.held = None if self.log_beta != before else "at max" if step > 0 else lowest

    def _range(self, epoch: int) -> tuple[float, float]:
        return max(self.schedule.kl_beta_min, self.schedule.floor(epoch)), self.schedule.kl_beta_max

    @property
    def smoothed_fraction(self) -> float | None:
        """KL share of the loss, 0 to 1, smoothed, at the latest observation's beta; None before the first."""
        if self._weight == 0:
            return None
        odds = self._applied_beta * math.exp(self._log_ratio_sum / self._weight)
        return odds / (1 + odds)

    @property
    def smoothed_kl(self) -> float | None:
        """Smoothed (geometric) KL in nats per number; None before the first observation."""
        return math.exp(self._log_kl_sum / self._weight) if self._weight else None

    @property
    def collapsed(self) -> bool:
        """Whether the smoothed KL is below `kl_collapse_nats`: the posterior carries next to nothing."""
        return self._weight > 0 and self.smoothed_kl < self.schedule.kl_collapse_nats

    def band(self, epoch: int) -> tuple[float, float]:
        """The band of the smoothed share in an epoch, scaled with beta in a cool-down."""
        factor = self.schedule.cycle_factor(epoch)
        return factor * self.schedule.kl_target_low, factor * self.schedule.kl_target_high

    def in_cooldown(self, epoch: int) -> bool:
        """Whether beta is reduced by the cycle in this epoch."""
        return self.schedule.in_cooldown(epoch)

    def floor(self, epoch: int) -> float:
        """The floor of beta in this epoch; 0 where control is off."""
        return self.schedule.floor(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a resumed run needs to go on bit for bit, as JSON values."""
        return {name.strip("_"): getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state. If the range has changed, log beta is clamped to it at the next observation.

        Raises:
            ValueError: The state is not one of `state_dict`; the controller is left as it was.
        """
        wrong = set(state) ^ set(self.state_dict())
        for key in (name.strip("_") for name in _STATE_NUMBERS):
            if not isinstance(state.get(key), float) or not math.isfinite(state[key]):
                wrong.add(key)
        if wrong:
            raise ValueError(f"bad KL controller state at {sorted(wrong)}: resume from an older checkpoint")
        for name in _STATE:
            setattr(self, name, state[name.strip("_")])


@dataclass(kw_only=True)
class SimulatedPlant:
    """A stand-in for the model, for tuning and tests: how KL and reconstruction loss answer beta.

    KL tends to `scale * log(1 + knee / beta)` nats per number (for small beta the rate of a Gaussian of
    variance `knee` coded at distortion beta), with a first-order lag in images. The reconstruction loss
    decays from `start` to `end`. Both are observed under multiplicative noise.
    """

    scale: float = 0.4  # nats per number
    knee: float = 0.1  # in the unit of beta
    lag_images: float = 4096.0
    start: float = 0.15  # weighted reconstruction loss
    end: float = 0.04
    decay_images: float = 500_000.0
    noise: float = 0.1  # standard deviation of the log of an observation over 640 images
    kl: float = 3.0  # nats per number
    images: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def advance(self, beta: float, num_images: int) -> tuple[float, float]:
        """Trains on `num_images` images at one beta; returns the observed KL and reconstruction loss."""
        self.images += num_images
        settled = self.scale * math.log1p(self.knee / beta)
        self.kl += (settled - self.kl) * -math.expm1(-num_images / self.lag_images)
        reconstruction = self.end + (self.start - self.end) * math.exp(-self.images / self.decay_images)
        sigma = self.noise * math.sqrt(640 / num_images)
        return self.kl * self.rng.lognormvariate(0, sigma), reconstruction * self.rng.lognormvariate(0, sigma)


def simulate(
    controller: KLController, plant: SimulatedPlant, epochs: int, images_per_epoch: int, interval: int = 640
) -> Iterator[dict[str, Any]]:
    """Runs the controller on the plant, one observation for each `interval` images.

    Yields:
        `epoch`, `images` (so far), `beta` (that they were trained with), `kl` (observed), `share` (smoothed),
        `low` and `high` (its band), `floor`, `cooldown`, `held`.
    """
    images = 0
    for epoch in range(epochs):
        end = (epoch + 1) * images_per_epoch
        fixed = {"epoch": epoch, "floor": controller.floor(epoch), "cooldown": controller.in_cooldown(epoch)}
        fixed |= zip(("low", "high"), controller.band(epoch), strict=True)
        while images < end:
            count = min(interval, end - images)
            beta = controller.beta(epoch, images)
            kl, loss = plant.advance(beta, count)
            images += count
            controller.observe(kl=kl, reconstruction=loss, num_images=count, epoch=epoch, images_seen=images)
            state = {"share": controller.smoothed_fraction, "held": controller.held}
            yield fixed | state | {"images": images, "beta": beta, "kl": kl}


def _draw(records: list[dict[str, Any]], images_per_epoch: int, path: Path) -> None:
    """Writes a PNG: beta with its floor, the share with its band, and KL; cool-downs shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = [record["images"] / images_per_epoch for record in records]
    _, axes = pyplot.subplots(3, 1, sharex=True, figsize=(13, 9), layout="constrained")
    panels = {"beta": ("beta", "floor"), "KL share": ("share", "low", "high"), "KL, nats per number": ("kl",)}
    cooldowns = {record["epoch"] for record in records if record["cooldown"]}
    colors = {"beta": "C0", "floor": "C3", "share": "C0", "low": "C2", "high": "C2", "kl": "C0"}
    for axis, (label, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            values = [record[key] for record in records]
            axis.plot(epochs, values, color=colors[key], linewidth=1.0, drawstyle="steps-pre", label=key)
        for epoch in cooldowns:
            axis.axvspan(epoch, epoch + 1, color="0.88", linewidth=0, zorder=0)
        axis.set(ylabel=label, yscale="log")
        axis.legend(loc="upper right", fontsize="small")
    axes[-1].set(xlabel="epoch", xlim=(0, records[-1]["epoch"] + 1))
    axes[0].set_title("KL control on a simulated model, no training; cool-downs shaded")
    pyplot.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """The command: simulates a run with a config's settings, draws it, prints the time spent in the band."""
    parser = argparse.ArgumentParser(prog="python -m training.kl", description="KL control without training")
    parser.add_argument("--simulate", action="store_true", required=True, help="run on the simulated model")
    parser.add_argument("--config", type=Path, required=True, help="JSON with training_presets")
    parser.add_argument("--out", type=Path, default=Path("kl_simulation.png"), help="the PNG to write")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--images-per-epoch", type=int, default=162_770, help="CelebA's training split")
    arguments = parser.parse_args(argv)
    per_epoch = arguments.images_per_epoch
    if arguments.epochs < 1 or per_epoch < 1:
        parser.error("--epochs and --images-per-epoch must be at least 1")
    try:
        config = json.loads(arguments.config.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(presets := config.get("training_presets"), dict):
            parser.error(f"--config {arguments.config}: give a JSON object with a section training_presets")
        controller = KLController(KLSchedule.from_presets(presets), presets.get("kl_control_enabled", True))
    except (OSError, ValueError) as error:
        parser.error(f"--config {arguments.config}: {error}")
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out {arguments.out}: its folder does not exist")
    records = list(simulate(controller, SimulatedPlant(), arguments.epochs, per_epoch))
    _draw(records, per_epoch, arguments.out)
    judged = [record for record in records if record["held"] != "warm-up" and not record["cooldown"]]
    inside = sum(record["low"] <= record["share"] <= record["high"] for record in judged)
    at_floor = sum(record["held"] == "at floor" for record in judged)
    print(f"{len(judged)} of {len(records)} observations outside warm-up and cool-down: {inside} with the share")
    print(f"in its band, {at_floor} with beta held at its floor; drawn to {arguments.out}")


if __name__ == "__main__":
    main()
