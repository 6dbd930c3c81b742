"""Warnings about a run, from the metrics it logs: divergence, slow data, overfitting, posterior collapse and others.

Spans are counted in images or steps, so that the log interval does not matter. Each warning is logged when its condition
starts, and again only after it has cleared. The two thresholds differ, so that a metric near one of them does not
produce a warning at every log line. A metric that is missing leaves its warnings as they are; so does one that is not
finite, except that a warning names it.

| warning | starts |
| --- | --- |
| loss does not fall | less than `FALL` over the first `Alerts.first_images` images |
| loss rises | average above `RISE` times its minimum, or `RISE_OVER_START` times the loss before training |
| always clipped | `CLIPPED` of the steps, averaged with `STEPS_HALF_LIFE` |
| skipped steps | `SKIPPED` of the steps, averaged likewise |
| discriminator too strong | its loss is below `STRONG_DISCRIMINATOR`, averaged likewise |
| discriminator not trained | `SKIPPED` of its steps are skipped, averaged likewise |
| waits for data | `DATA_WAIT` of the time, averaged likewise |
| minimum learning rate | the plateau scheduler cannot reduce it further |
| overfitting | `WORSE_VALIDATIONS` in a row worse than the best, while the training loss improved |
| posterior collapse | fewer active latent dimensions than `ACTIVE_FRACTION`, or KL below `kl_collapse_nats` |
| KL outside its target range | for longer than beta needs to cross its full range |
| not finite | a logged metric is NaN or infinite |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from training.config import TrainingPresets
from training.io import restore_fields

# The loss of one image varies by a quarter of its mean (means of 40 images of the ultra model: 4 %). This half-life
# averages about 24,000 images, which leaves an uncertainty of 0.2 %.
LOSS_HALF_LIFE_IMAGES = 8192
# Minimum weight of the average before it is compared (3,400 images; 0.4 %), and before it counts as a minimum.
_WEIGHT_TO_COMPARE, _WEIGHT_FOR_BEST = 0.25, 0.5

# The loss must fall within 1,000 steps and at least 32,768 images after the learning rate's warm-up, relative to its
# average over the first eighth of them. A 64-pixel model (configs/quickstart.json) falls by 10 % in 40 steps. 1 % is
# three times the uncertainty of both averages.
FIRST_STEPS, FIRST_IMAGES, FALL = 1000, 32_768, 0.01
_EARLY_FRACTION = 1 / 8

# Low-beta phases, new epochs and other images change the average by a few per cent.
RISE = 1.3
# The loss before training is on other images, and full images instead of crops: 26 % apart in the ultra model.
RISE_OVER_START = 1.5
_RISE_CLEARS = 1.1  # the warning clears when the average is below its threshold by this factor

# Averages over steps are compared at 75 % of their weight, after 500 steps. Slow steps at the start of an epoch, and
# the overflows by which fp16 finds its loss scale, have little weight by then.
STEPS_HALF_LIFE = 250
_WEIGHT_OF_STEPS = 0.75
# Half of the first hundreds of steps are clipped (measured). If all of them are, the gradient norm has no effect.
CLIPPED, _CLIPPED_CLEARS = 0.97, 0.8
# fp16 skips about one step in 2,000, when it tries a higher loss scale.
SKIPPED, _SKIPPED_CLEARS = 0.05, 0.01
DATA_WAIT, _DATA_WAIT_CLEARS = 0.2, 0.1
# log 2 = 0.69 at chance level; below 0.1 it separates nearly all positions.
STRONG_DISCRIMINATOR, _STRONG_CLEARS = 0.1, 0.2

# Validation always uses the same images and the EMA weights, so it has no noise; 2 % are 0.1 dB of MSE.
WORSE, WORSE_VALIDATIONS = 0.02, 5
ACTIVE_FRACTION, _ACTIVE_CLEARS = 0.5, 0.6
_COLLAPSE_CLEARS = 2.0  # times kl_collapse_nats
# Half-lives that the smoothed loss fraction itself needs, besides those in which beta crosses its range.
_RANGE_HALF_LIVES = 4.0
_SCHEDULER_EPS = 1e-8  # ReduceLROnPlateau ignores smaller reductions (its argument `eps`)


def _average() -> Any:
    """An exponential average as [weighted sum, weight]; the weight tends to 1."""
    return field(default_factory=lambda: [0.0, 0.0])


@dataclass
class AlertState:
    """State between two observations; JSON values."""

    images_seen: int = 0  # at the latest log line
    step: int = 0
    loss: list[float] = _average()
    clipped: list[float] = _average()
    skipped: list[float] = _average()
    data_wait: list[float] = _average()
    discriminator: list[float] = _average()
    discriminator_skipped: list[float] = _average()
    early_sum: float = 0.0  # of the loss over the early images
    early_images: int = 0
    loss_fell: bool = False
    best_loss: float | None = None  # minimum of the average
    start_loss: float | None = None  # validation before training
    skipped_steps: int | None = None  # of the run, at the latest log line
    out_of_range_images: int = 0
    best_validation: float | None = None
    loss_at_best_validation: float = 0.0
    worse_validations: int = 0
    reached_active_fraction: bool = False
    active: list[str] = field(default_factory=list)  # warnings that have started and not cleared


class Alerts:
    """Checks the metrics of a run, as they are logged.

    Args:
        presets: Section `training_presets`.

    Attributes:
        first_images: Images after which the loss must have fallen.
    """

    def __init__(self, presets: TrainingPresets) -> None:
        self._presets = presets
        self._state = AlertState()
        warmup = presets.lr_warmup_steps * presets.batch_size
        # PCA initialization uses the first images of epoch 0, which therefore have a lower loss than later ones.
        self._start = presets.pca_init_images
        self._span = warmup + max(FIRST_IMAGES, FIRST_STEPS * presets.batch_size)
        self.first_images = self._start + self._span
        crossing = math.log(presets.kl_beta_max / presets.kl_beta_min) / presets.kl_max_step
        self._range_images = round((crossing + _RANGE_HALF_LIVES) * presets.kl_half_life_images)

    def observe_window(self, values: Mapping[str, Any], *, images_seen: int, step: int) -> list[str]:
        """Check the means over the latest steps.

        Args:
            values: Metrics of `Progress.take_window`.
            images_seen: Training images so far.
            step: Optimizer steps so far.

        Returns:
            Warnings that start now.
        """
        state = self._state
        images, steps = images_seen - state.images_seen, step - state.step
        if images <= 0 or steps <= 0:
            return []
        if state.step == 0 and images_seen > self._start + self._span * _EARLY_FRACTION:
            state.loss_fell = True  # the early images were not observed, so there is nothing to compare with
        state.images_seen, state.step = images_seen, step
        return [
            *self._check_finite("training", values),
            # An adversarial term makes the other terms rise.
            *self._check_loss(None if "loss/adversarial" in values else _finite(values, "loss/reconstruction"), images),
            *self._check_steps(values, steps),
            *self._check_discriminator(values, steps),
            *self._check_learning_rate(_finite(values, "optim/learning_rate"), images_seen),
            *self._check_collapse(_finite(values, "loss/kl")),
            *self._check_target_range(values, images),
        ]

    def observe_validation(
        self, values: Mapping[str, Any], *, images_seen: int, learning_rate: float, latent_dim: int
    ) -> list[str]:
        """Check the results of a validation, including the one before training.

        Args:
            values: Metrics of `validate`.
            images_seen: Training images so far.
            learning_rate: Current learning rate.
            latent_dim: Latent dimensions of an image.

        Returns:
            Warnings that start now.
        """
        loss = _finite(values, "reconstruction_loss")
        if images_seen == 0:
            self._state.start_loss = loss
        return [
            *self._check_finite("validation", values),
            *self._check_overfitting(loss),
            *self._check_learning_rate(learning_rate, images_seen),
            *self._check_active_units(_finite(values, "active_units"), latent_dim, images_seen),
        ]

    def _check_finite(self, kind: str, values: Mapping[str, Any]) -> list[str]:
        names = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        return self._alert(
            f"{kind} not finite", bool(names), not names, f"{kind} metrics not finite: {', '.join(names)}"
        )

    def _check_loss(self, loss: float | None, images: int) -> list[str]:
        state = self._state
        if loss is None:
            return []
        before, now = state.images_seen - images, state.images_seen
        early = before >= self._start and state.early_images < self._span * _EARLY_FRACTION
        if early:
            if state.early_images == 0:  # drop the average over images that PCA initialization has used
                state.loss = [0.0, 0.0]
            state.early_sum += loss * images
            state.early_images += images
        _update(state.loss, loss, images, LOSS_HALF_LIFE_IMAGES)
        average, weight = _mean(state.loss), state.loss[1]
        if before >= self._start and weight >= _WEIGHT_FOR_BEST:
            state.best_loss = min(average, state.best_loss or average)

        warnings = []
        references = [(RISE, "minimum", state.best_loss), (RISE_OVER_START, "value before training", state.start_loss)]
        limits = [(factor * value, factor, name, value) for factor, name, value in references if value is not None]
        if limits and weight >= _WEIGHT_TO_COMPARE:
            limit, factor, name, value = min(limits)
            warnings += self._alert(
                "loss rises",
                average > limit,
                average < limit / _RISE_CLEARS,
                f"loss/reconstruction {average:.4f} is above {factor:g} times its {name} {value:.4f}: training diverges; "
                "resume an earlier checkpoint with a lower training_presets.learning_rate, and check kl/beta",
            )
        if state.loss_fell or early or not state.early_images or now < self.first_images:
            return warnings
        start = state.early_sum / state.early_images
        state.loss_fell = average <= (1 - FALL) * start  # permanent: a converged loss is flat
        return warnings + self._alert(
            "loss does not fall",
            not state.loss_fell,
            state.loss_fell,
            f"loss/reconstruction has not fallen by {100 * FALL:g} % in the first {now} images (from {start:.5f} to "
            f"{average:.5f}): raise training_presets.learning_rate if optim/grad_norm is small, lower it if "
            "optim/clipped_fraction is near 1, and check that the images in samples/ differ",
        )

    def _check_steps(self, values: Mapping[str, Any], steps: int) -> list[str]:
        state, skipped = self._state, None
        total = _finite(values, "optim/skipped_steps")
        if total is not None:
            if state.skipped_steps is not None:
                skipped = (total - state.skipped_steps) / steps
            state.skipped_steps = round(total)
        warnings = []
        for name, average, value, starts, clears, message in (
            (
                "clipped",
                state.clipped,
                _finite(values, "optim/clipped_fraction"),
                CLIPPED,
                _CLIPPED_CLEARS,
                "optim/clipped_fraction {0:.2f} is above {1:g}: nearly every gradient norm exceeds "
                f"training_presets.max_grad_norm {self._presets.max_grad_norm:g}; lower training_presets.learning_rate, "
                "or raise max_grad_norm to the usual optim/grad_norm",
            ),
            (
                "skipped",
                state.skipped,
                skipped,
                SKIPPED,
                _SKIPPED_CLEARS,
                "optim/skipped_steps grows by {2:.0f} in 100 steps, above {3:.0f}: the gradients are not finite; lower "
                "training_presets.learning_rate, or set training_presets.mixed_precision to bf16 or no",
            ),
            (
                "data wait",
                state.data_wait,
                _finite(values, "speed/data_wait_fraction"),
                DATA_WAIT,
                _DATA_WAIT_CLEARS,
                "speed/data_wait_fraction {0:.2f} is above {1:g}: training waits for images; raise data.decode_threads "
                "and data.prefetch_batches, use more CPU cores, and keep data.cache_dir on a local disk",
            ),
        ):
            if value is None:
                continue
            _update(average, value, steps, STEPS_HALF_LIFE)
            mean, is_settled = _mean(average), average[1] >= _WEIGHT_OF_STEPS
            text = message.format(mean, starts, 100 * mean, 100 * starts)
            warnings += self._alert(name, is_settled and mean >= starts, mean <= clears, text)
        return warnings

    def _check_discriminator(self, values: Mapping[str, Any], steps: int) -> list[str]:
        loss, skipped = _finite(values, "loss/discriminator"), _finite(values, "discriminator/skipped")
        if loss is None or skipped is None or not _finite(values, "weighted/adversarial"):
            return []  # without the term, or while the discriminator trains alone
        state = self._state
        _update(state.discriminator, loss, steps, STEPS_HALF_LIFE)
        _update(state.discriminator_skipped, skipped, steps, STEPS_HALF_LIFE)
        settled = state.discriminator[1] >= _WEIGHT_OF_STEPS
        mean, fraction = _mean(state.discriminator), _mean(state.discriminator_skipped)
        return [
            *self._alert(
                "discriminator too strong",
                settled and mean < STRONG_DISCRIMINATOR,
                mean > _STRONG_CLEARS,
                f"loss/discriminator {mean:.2f} is below {STRONG_DISCRIMINATOR:g}: the discriminator separates nearly all "
                "positions; resume with a higher loss.discriminator_penalty or a lower loss.discriminator_learning_rate, and name "
                "the key in --allow-changed",
            ),
            *self._alert(
                "discriminator not trained",
                settled and fraction > SKIPPED,
                fraction < _SKIPPED_CLEARS,
                f"discriminator/skipped {fraction:.2f} is above {SKIPPED:g}: its gradients are not finite; resume an earlier "
                "checkpoint with a lower loss.discriminator_learning_rate, and name the key in --allow-changed",
            ),
        ]

    def _check_learning_rate(self, learning_rate: float | None, images_seen: int) -> list[str]:
        presets = self._presets
        warming_up = images_seen <= (presets.lr_warmup_steps + 1) * presets.batch_size
        if learning_rate is None or warming_up or presets.lr_schedule != "plateau":  # others fall as configured
            return []
        reduced = max(presets.min_learning_rate, learning_rate * presets.plateau_factor)
        at_minimum = learning_rate - reduced <= _SCHEDULER_EPS
        return self._alert(
            "minimum learning rate",
            at_minimum,
            not at_minimum,
            f"optim/learning_rate {learning_rate:.1e} is at training_presets.min_learning_rate "
            f"{presets.min_learning_rate:.1e}: the model hardly changes; end the run, or resume with a higher "
            "training_presets.learning_rate, which scales the current one",
        )

    def _check_collapse(self, kl: float | None) -> list[str]:
        limit = self._presets.kl_collapse_nats
        if kl is None or limit <= 0 or self._state.images_seen <= self._presets.kl_warmup_images:
            return []
        return self._alert(
            "collapse",
            kl < limit,
            kl >= _COLLAPSE_CLEARS * limit,
            f"loss/kl {kl:.4f} nats per dimension is below training_presets.kl_collapse_nats {limit:g}: posterior "
            "collapse; lower training_presets.kl_target_low and kl_target_high, or kl_beta_floor and kl_beta_init if "
            "kl/beta is at its minimum",
        )

    def _check_target_range(self, values: Mapping[str, Any], images: int) -> list[str]:
        presets, state = self._presets, self._state
        names = ("kl/smoothed_fraction", "kl/target_low", "kl/target_high", "kl/beta")
        fraction, low, high, beta = (_finite(values, name) for name in names)
        if not presets.kl_control_enabled or state.images_seen <= presets.kl_warmup_images:
            return []
        if fraction is None or low is None or high is None or beta is None:
            return []
        if low < presets.kl_target_low * presets.kl_cooldown_reduction**0.5:  # low-beta phase: not counted
            return []
        inside = low <= fraction <= high
        # Counts down inside the range, so that a fraction near its edge neither resets the count nor warns repeatedly.
        outside = state.out_of_range_images + (-images if inside else images)
        state.out_of_range_images = outside = min(max(outside, 0), self._range_images)
        return self._alert(
            "target range",
            outside == self._range_images and not inside,
            outside == 0,
            f"kl/smoothed_fraction {fraction:.4f} is {'below' if fraction < low else 'above'} its target range {low:g} to "
            f"{high:g} for {self._range_images} images: "
            + self._range_remedy(fraction < low, beta, _finite(values, "kl/beta_floor") or 0.0),
        )

    def _range_remedy(self, below: bool, beta: float, minimum: float) -> str:
        presets, tolerance = self._presets, 1 + 1e-6
        if below and beta >= presets.kl_beta_max / tolerance:
            return f"kl/beta {beta:.1e} is at training_presets.kl_beta_max; raise it, or lower kl_target_low"
        if not below and beta <= minimum * tolerance:
            return (
                f"kl/beta {beta:.1e} is at kl/beta_floor; lower training_presets.kl_beta_floor or kl_floor_growth, or "
                "raise kl_target_high"
            )
        if not below and beta <= presets.kl_beta_min * tolerance:
            return f"kl/beta {beta:.1e} is at training_presets.kl_beta_min; lower it, or raise kl_target_high"
        return (
            f"kl/beta {beta:.1e} changes too slowly; raise training_presets.kl_gain and kl_max_step, or change "
            "kl_target_low and kl_target_high"
        )

    def _check_overfitting(self, loss: float | None) -> list[str]:
        state = self._state
        if loss is None or state.best_loss is None:
            return []
        training_loss = _mean(state.loss)
        if state.best_validation is None or loss < state.best_validation:
            state.best_validation, state.loss_at_best_validation = loss, training_loss
        best, then = state.best_validation, state.loss_at_best_validation
        is_worse = loss > (1 + WORSE) * best and training_loss < (1 - WORSE) * then
        state.worse_validations = state.worse_validations + 1 if is_worse else 0
        return self._alert(
            "overfitting",
            state.worse_validations >= WORSE_VALIDATIONS,
            not is_worse,
            f"validation/reconstruction_loss {loss:.4f} is more than {100 * WORSE:g} % above its minimum {best:.4f} for "
            f"{state.worse_validations} validations, while loss/reconstruction fell from {then:.4f} to "
            f"{training_loss:.4f}: overfitting; end the run (the best model is kept), or use more images, "
            "data.horizontal_flip, a smaller model or a higher training_presets.weight_decay",
        )

    def _check_active_units(self, active: float | None, latent_dim: int, images_seen: int) -> list[str]:
        state = self._state
        if active is None:
            return []
        is_enough = active >= ACTIVE_FRACTION * latent_dim
        state.reached_active_fraction |= is_enough
        # Without PCA initialization a model starts with no active dimension, and may need the first images.
        is_due = state.reached_active_fraction or images_seen >= self.first_images
        return self._alert(
            "active dimensions",
            is_due and not is_enough,
            active >= _ACTIVE_CLEARS * latent_dim,
            f"validation/active_units {active:.0f} of {latent_dim} latent dimensions is below {100 * ACTIVE_FRACTION:g} %: "
            "posterior collapse; lower training_presets.kl_target_high, or kl_beta_floor if kl/beta is at its minimum; "
            "with few training images use a smaller model.latent_dim",
        )

    def _alert(self, name: str, starts: bool, clears: bool, message: str) -> list[str]:
        """Return the message if the warning starts now."""
        active = self._state.active
        if name in active:
            if clears:
                active.remove(name)
            return []
        if starts:
            active.append(name)
            return [message]
        return []

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON values."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; unknown fields are logged and ignored, missing ones take their defaults."""
        self._state = AlertState(**restore_fields(asdict(AlertState()), copy.deepcopy(dict(state)), "alerts"))


def _finite(values: Mapping[str, Any], name: str) -> float | None:
    """A finite metric, or None."""
    value = values.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _update(average: list[float], value: float, amount: int, half_life: int) -> None:
    """Add a mean over `amount` images or steps to an exponential average, in place."""
    keep = 0.5 ** (amount / half_life)
    average[0] = keep * average[0] + (1 - keep) * value
    average[1] = keep * average[1] + (1 - keep)


def _mean(average: list[float]) -> float:
    return average[0] / average[1]
