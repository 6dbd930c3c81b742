"""Watches the figures of a run and says in a sentence when one of them has gone wrong, and what to do about it.

What this file is for: judging numbers that others measured, as they come. It is a state machine without tensors,
files or clocks; spans are counted in images or steps, so the log interval may change. What it is not for: measuring
(figures.py, validation.py), writing (tracking.py), or stopping and steering a run (trainer.py, kl.py).

A warning is said once when it begins. It is said again after it has ended and begun anew, or after `REPEAT_IMAGES`
if it lasts. Beginning and end have different thresholds, so that a figure at the edge is not reported at every
wobble. A figure that is missing or not finite is left out: it neither begins nor ends a warning.

| warning | begins |
| --- | --- |
| loss does not fall | `FALL` is not reached over the first `Alerts.first_images` images |
| loss rises | its average is `RISE` times its best, or `RISE_OVER_START` times the loss before training |
| always clipped | `CLIPPED` of the steps, averaged over `STEPS_HALF_LIFE` |
| skipped steps | `SKIPPED` of the steps, likewise |
| waits for images | `WAITING` of the time, likewise |
| learning rate at its floor | no reduction is left to the plateau scheduler |
| overfitting | `WORSE_VALIDATIONS` in a row worse than the best, while the training loss improved |
| posterior collapse | fewer active units than `ACTIVE_FRACTION`, or KL below `kl_collapse_nats` |
| KL share out of its band | for longer than beta needs to cross its whole range |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from training.config import TrainingPresets

# A lasting warning is repeated after so many images: about every twelfth epoch of CelebA.
REPEAT_IMAGES = 2_000_000

# The loss of one image varies by a quarter of its mean (windows of 40 images of the ultra model: 4 %), so an average
# with this half-life, in which about 24,000 images count, is uncertain by 0.2 %.
LOSS_HALF_LIFE_IMAGES = 8192
# Before so much of its weight (3,400 images; 0.4 %) the average is not compared, before the half not taken as the best.
_ENOUGH_TO_COMPARE, _ENOUGH_FOR_BEST = 0.25, 0.5

# The first images, in which the loss has to fall, are 1,000 steps and no fewer than 32,768 images after the warm-up of
# the learning rate; the average over their first eighth is where it falls from. A 64-pixel model (configs/quickstart)
# falls by 10 % in 40 steps. Three times the uncertainty of both averages together is 1 % of the loss.
FIRST_STEPS, FIRST_IMAGES, FALL = 1000, 32_768, 0.01
_EARLY_FRACTION = 1 / 8

# Cool-downs of beta, epochs and other images move the average by a few per cent; nothing healthy moves it by 30 %.
RISE = 1.3
# Validation before training is on other images, whole instead of windows: 26 % apart in the ultra model.
RISE_OVER_START = 1.5
_RISE_ENDS = 1.1  # the warning ends when the average is so much below the threshold

# Of an average in steps: 500 of them are 75 % of its weight, before which it is not judged. A slow step at the start
# of an epoch, or the overflows by which fp16 finds its scale, are forgotten.
STEPS_HALF_LIFE = 250
_ENOUGH_STEPS = 0.75
# Clipping now and then is its purpose (half of the steps in the first hundreds, measured). When it never ends, the
# gradient's length is lost and the learning rate is the only thing that sets the step.
CLIPPED, _CLIPPED_ENDS = 0.97, 0.8
# fp16 loses about one step of 2,000, when its scale is tried one higher.
SKIPPED, _SKIPPED_ENDS = 0.05, 0.01
WAITING, _WAITING_ENDS = 0.2, 0.1

# Validation is always on the same images and averaged weights, so it has no noise; 2 % are 0.1 dB of a squared error.
WORSE, WORSE_VALIDATIONS = 0.02, 5
ACTIVE_FRACTION, _ACTIVE_ENDS = 0.5, 0.6
_COLLAPSE_ENDS = 2.0  # times kl_collapse_nats
# Half-lives that the average of the KL share itself needs, besides those in which beta crosses its range.
_BAND_HALF_LIVES = 4.0
_SCHEDULER_EPS = 1e-8  # ReduceLROnPlateau leaves a smaller reduction out (its argument eps)


@dataclass
class _Memory:
    """All that is remembered; JSON values. An average is [weighted sum, weight], weights adding up to 1 in the end."""

    images_seen: int = 0  # at the latest window
    step: int = 0
    loss: list[float] = field(default_factory=lambda: [0.0, 0.0])
    clipped: list[float] = field(default_factory=lambda: [0.0, 0.0])
    skipped: list[float] = field(default_factory=lambda: [0.0, 0.0])
    waiting: list[float] = field(default_factory=lambda: [0.0, 0.0])
    early_sum: float = 0.0  # of the loss over the early images
    early_images: int = 0
    fell: bool = False
    best_loss: float | None = None  # least average
    start_loss: float | None = None  # validation before training
    skipped_steps: int | None = None  # of the run, at the latest window
    out_of_range_images: int = 0
    best_validation: float | None = None
    loss_at_best_validation: float = 0.0
    worse_validations: int = 0
    units_were_active: bool = False
    said: dict[str, int] = field(default_factory=dict)  # warnings in force -> images_seen when last said


class Alerts:
    """Judges a run; one object for its whole length.

    Args:
        presets: Section `training_presets`.

    Attributes:
        first_images: Images after which the loss must have fallen.
    """

    def __init__(self, presets: TrainingPresets) -> None:
        self._presets = presets
        self._memory = _Memory()
        warmup = presets.lr_warmup_steps * presets.batch_size
        # The linear path is fitted on the first images of epoch 0, which are therefore easier than those after them.
        self._start = presets.pca_init_images
        self._span = warmup + max(FIRST_IMAGES, FIRST_STEPS * presets.batch_size)
        self.first_images = self._start + self._span
        crossing = math.log(presets.kl_beta_max / presets.kl_beta_min) / presets.kl_max_step
        self._range_images = round((crossing + _BAND_HALF_LIVES) * presets.kl_half_life_images)

    def observe_window(self, values: Mapping[str, Any], *, images_seen: int, step: int) -> list[str]:
        """Judge the means over the latest steps.

        Args:
            values: As `Progress.take_window` gives them.
            images_seen: Training images so far.
            step: Optimizer updates so far.

        Returns:
            Sentences for the log; mostly none.
        """
        memory = self._memory
        images, steps = images_seen - memory.images_seen, step - memory.step
        if images <= 0 or steps <= 0:  # nothing new
            return []
        if memory.step == 0 and images_seen > self._start + self._span * _EARLY_FRACTION:
            memory.fell = True  # the first images are not known here, so there is nothing to compare with
        memory.images_seen, memory.step = images_seen, step
        found = self._judge_loss(_number(values, "loss/reconstruction"), images)
        found += self._judge_steps(values, steps)
        found += self._judge_rate(_number(values, "optim/learning_rate"), images_seen)
        return found + self._judge_kl(values, images)

    def observe_validation(
        self, values: Mapping[str, Any], *, images_seen: int, learning_rate: float, latent_dim: int
    ) -> list[str]:
        """Judge a validation, that before training included.

        Args:
            values: `Validation.values`.
            images_seen: Training images so far.
            learning_rate: In force after it.
            latent_dim: Of one image.

        Returns:
            Sentences for the log; mostly none.
        """
        loss, active = _number(values, "reconstruction_loss"), _number(values, "active_units")
        if images_seen == 0:
            self._memory.start_loss = loss
        found = self._judge_overfitting(loss, images_seen) + self._judge_rate(learning_rate, images_seen)
        return found + self._judge_units(active, latent_dim, images_seen)

    # ------------------------------------------------------------------ what is judged

    def _judge_loss(self, loss: float | None, images: int) -> list[str]:
        memory = self._memory
        if loss is None:
            return []
        before, now = memory.images_seen - images, memory.images_seen
        early = before >= self._start and memory.early_images < self._span * _EARLY_FRACTION
        if early:
            if memory.early_images == 0:  # what was averaged before are images that the linear path knows
                memory.loss = [0.0, 0.0]
            memory.early_sum += loss * images
            memory.early_images += images
        _feed(memory.loss, loss, images, LOSS_HALF_LIFE_IMAGES)
        average, weight = _mean(memory.loss), memory.loss[1]
        if before >= self._start and weight >= _ENOUGH_FOR_BEST:
            memory.best_loss = min(average, memory.best_loss or average)

        references = [(RISE, "best", memory.best_loss), (RISE_OVER_START, "value before training", memory.start_loss)]
        limits = [(factor * value, factor, name, value) for factor, name, value in references if value is not None]
        found = []
        if limits and weight >= _ENOUGH_TO_COMPARE:
            limit, factor, name, value = min(limits)
            found += self._say(
                "rises",
                average > limit,
                average < limit / _RISE_ENDS,
                f"loss/reconstruction {average:.4f} is above {factor:g} times its {name} {value:.4f} (average with a "
                f"half-life of {LOSS_HALF_LIFE_IMAGES} images): training diverges; resume an earlier checkpoint with a "
                "lower training_presets.learning_rate, and look at kl/beta in the same images",
            )
        if memory.fell or early or not memory.early_images or now < self.first_images:
            return found
        start = memory.early_sum / memory.early_images
        memory.fell = average <= (1 - FALL) * start  # once and for all: what has converged is flat
        return found + self._say(
            "does not fall",
            not memory.fell,
            memory.fell,
            f"loss/reconstruction has not fallen by {100 * FALL:g} % in the first {now} images ({start:.5f}, then "
            f"{average:.5f}): raise training_presets.learning_rate if optim/grad_norm is small, lower it if "
            "optim/clipped_fraction is near 1, and look at the grids in samples/ for images that are all alike",
        )

    def _judge_steps(self, values: Mapping[str, Any], steps: int) -> list[str]:
        memory = self._memory
        total, before = _number(values, "optim/skipped_steps"), memory.skipped_steps
        skipped = None
        if total is not None:
            memory.skipped_steps = round(total)
            skipped = None if before is None else (total - before) / steps
        found = []
        for name, average, value, begins, ends, sentence in (
            (
                "clipped",
                memory.clipped,
                _number(values, "optim/clipped_fraction"),
                CLIPPED,
                _CLIPPED_ENDS,
                "optim/clipped_fraction {0:.2f} is above {1:g}: nearly every gradient is longer than "
                f"training_presets.max_grad_norm {self._presets.max_grad_norm:g} and cut; lower "
                "training_presets.learning_rate, or raise max_grad_norm to the usual optim/grad_norm",
            ),
            (
                "skipped",
                memory.skipped,
                skipped,
                SKIPPED,
                _SKIPPED_ENDS,
                "optim/skipped_steps grows by {2:.0f} in 100 steps, above {3:.0f}: their gradients are not finite and "
                "nothing is learned in them; lower training_presets.learning_rate, or set "
                "training_presets.mixed_precision to bf16 or no",
            ),
            (
                "waiting",
                memory.waiting,
                _number(values, "speed/data_wait_fraction"),
                WAITING,
                _WAITING_ENDS,
                "speed/data_wait_fraction {0:.2f} is above {1:g}: training waits for images; raise "
                "data.decode_threads and data.prefetch_batches, give the process more CPU cores, and keep data.cache "
                "on with data.cache_dir on a local disk",
            ),
        ):
            if value is None:
                continue
            _feed(average, value, steps, STEPS_HALF_LIFE)
            mean, enough = _mean(average), average[1] >= _ENOUGH_STEPS
            text = sentence.format(mean, begins, 100 * mean, 100 * begins)
            text += f" (average with a half-life of {STEPS_HALF_LIFE} steps)"
            found += self._say(name, enough and mean >= begins, mean <= ends, text)
        return found

    def _judge_rate(self, rate: float | None, images_seen: int) -> list[str]:
        presets = self._presets
        if rate is None or images_seen <= (presets.lr_warmup_steps + 1) * presets.batch_size:
            return []
        reduced = max(presets.min_learning_rate, rate * presets.plateau_factor)
        at_floor = rate - reduced <= _SCHEDULER_EPS
        text = (
            f"optim/learning_rate {rate:.1e} is at its floor (training_presets.min_learning_rate "
            f"{presets.min_learning_rate:.1e}): training hardly changes the model any more; end it, or resume with a "
            "higher training_presets.learning_rate, which scales the rate in force"
        )
        return self._say("rate", at_floor, not at_floor, text, images_seen)

    def _judge_kl(self, values: Mapping[str, Any], images: int) -> list[str]:
        presets, memory = self._presets, self._memory
        if memory.images_seen <= presets.kl_warmup_images:
            return []
        kl, limit = _number(values, "loss/kl"), presets.kl_collapse_nats
        found = []
        if kl is not None and limit > 0:
            found += self._say(
                "collapse",
                kl < limit,
                kl >= _COLLAPSE_ENDS * limit,
                f"loss/kl {kl:.4f} nats a number is below training_presets.kl_collapse_nats {limit:g}: the posterior "
                "collapses, the latents say next to nothing about the image; lower training_presets.kl_target_low and "
                "kl_target_high, or kl_beta_floor and kl_beta_init if kl/beta rests on them",
            )
        names = ("kl/smoothed_fraction", "kl/target_low", "kl/target_high", "kl/beta")
        share, low, high, beta = (_number(values, name) for name in names)
        if not presets.kl_control_enabled or None in (share, low, high, beta):
            return found
        if low < presets.kl_target_low * presets.kl_cooldown_reduction**0.5:  # a cool-down: the clock stands still
            return found
        inside = low <= share <= high
        # Counts back inside, so that a share at the band's edge is neither forgotten nor reported at every crossing.
        outside = memory.out_of_range_images + (-images if inside else images)
        memory.out_of_range_images = outside = min(max(outside, 0), self._range_images)
        text = (
            f"kl/smoothed_fraction {share:.4f} has been {'below' if share < low else 'above'} its band {low:g} to {high:g} "
            f"for {self._range_images} images or more outside warm-up and cool-down: "
            + self._range_remedy(share < low, beta, _number(values, "kl/beta_floor") or 0.0)
        )
        return found + self._say("band", outside == self._range_images and not inside, outside == 0, text)

    def _range_remedy(self, below: bool, beta: float, floor: float) -> str:
        presets, near = self._presets, 1 + 1e-6
        if below and beta >= presets.kl_beta_max / near:
            return f"kl/beta {beta:.1e} is at training_presets.kl_beta_max; raise that, or lower kl_target_low"
        if not below and beta <= floor * near:
            return (
                f"kl/beta {beta:.1e} is held up by its floor; lower training_presets.kl_beta_floor or kl_floor_growth, "
                "or raise kl_target_high"
            )
        if not below and beta <= presets.kl_beta_min * near:
            return f"kl/beta {beta:.1e} is at training_presets.kl_beta_min; lower that, or raise kl_target_high"
        return (
            f"kl/beta {beta:.1e} moves too slowly or KL does not follow it; raise training_presets.kl_gain and "
            "kl_max_step, or set the band where the share is"
        )

    def _judge_overfitting(self, loss: float | None, images_seen: int) -> list[str]:
        memory = self._memory
        if loss is None or memory.best_loss is None:
            return []
        training = _mean(memory.loss)
        if memory.best_validation is None or loss < memory.best_validation:
            memory.best_validation, memory.loss_at_best_validation = loss, training
        best, then = memory.best_validation, memory.loss_at_best_validation
        worse = loss > (1 + WORSE) * best and training < (1 - WORSE) * then
        memory.worse_validations = memory.worse_validations + 1 if worse else 0
        text = (
            f"validation reconstruction_loss {loss:.4f} has been more than {100 * WORSE:g} % above its best {best:.4f} "
            f"for {memory.worse_validations} validations, while loss/reconstruction went from {then:.4f} to "
            f"{training:.4f}: the model overfits; the best one is kept, so end the run, or use more images "
            "(data.horizontal_flip doubles them), a smaller model, or a higher training_presets.weight_decay"
        )
        return self._say("overfits", memory.worse_validations >= WORSE_VALIDATIONS, not worse, text, images_seen)

    def _judge_units(self, active: float | None, latent_dim: int, images_seen: int) -> list[str]:
        memory = self._memory
        if active is None:
            return []
        enough = active >= ACTIVE_FRACTION * latent_dim
        memory.units_were_active |= enough
        # A model without a linear path begins with no active unit, and has the first images to find them.
        due = memory.units_were_active or images_seen >= self.first_images
        text = (
            f"{active:.0f} of {latent_dim} latent numbers are active (validation active_units), below "
            f"{100 * ACTIVE_FRACTION:g} %: the posterior collapses; lower training_presets.kl_target_high, or "
            "kl_beta_floor if kl/beta rests on it; with few training images use a smaller model.latent_dim"
        )
        ends = active >= _ACTIVE_ENDS * latent_dim
        return self._say("units", due and not enough, ends, text, images_seen)

    def _say(self, name: str, begins: bool, ends: bool, sentence: str, images_seen: int | None = None) -> list[str]:
        """The sentence if it is due, for a warning that begins, goes on or ends."""
        now = self._memory.images_seen if images_seen is None else images_seen
        last = self._memory.said.get(name)
        if last is not None and ends:
            del self._memory.said[name]
            return []
        if (last is None and not begins) or (last is not None and now - last < REPEAT_IMAGES):
            return []
        self._memory.said[name] = now
        return [sentence]

    # ------------------------------------------------------------------ over a resume

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had not stopped, as JSON values."""
        return asdict(self._memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: It is not one of `state_dict`; nothing is changed.
        """
        wrong = set(state) ^ {item.name for item in fields(_Memory)}
        if wrong:
            raise ValueError(f"bad health state at {sorted(wrong)}: resume from an older checkpoint.")
        self._memory = _Memory(**asdict(_Memory(**state)))  # a copy of its lists


def _number(values: Mapping[str, Any], name: str) -> float | None:
    """A finite figure, or None."""
    value = values.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _feed(average: list[float], value: float, amount: int, half_life: int) -> None:
    """Put a mean over `amount` images or steps into an exponential average, in place."""
    keep = 0.5 ** (amount / half_life)
    average[0] = keep * average[0] + (1 - keep) * value
    average[1] = keep * average[1] + (1 - keep)


def _mean(average: list[float]) -> float:
    return average[0] / average[1]
