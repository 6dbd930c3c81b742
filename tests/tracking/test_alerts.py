"""Warnings on simulated runs: none while a run is healthy, and each fault named within a stated number of images."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from training.config import TrainingPresets
from training.losses.kl_control import KLController, SimulatedPlant
from training.tracking import alerts
from training.tracking.alerts import Alerts

CELEBA = 162_770
PRESETS = TrainingPresets()
NUMBERS = 1024
BATCH_NOISE = 0.05  # standard deviation of the mean loss of 64 images, over its mean


class SimulatedRun:
    """A run as the trainer would report it: windows of steps, and a validation before training and after each epoch.

    What a test changes of it is a method: `loss` and the figures of `window` and `validation`. KL, beta and its band
    come from the real controller on its own simulated model.
    """

    def __init__(self, presets=PRESETS, *, seed=0, images_per_epoch=CELEBA, log_every=50):
        self.presets, self.images_per_epoch, self.log_every = presets, images_per_epoch, log_every
        self.alerts = Alerts(presets)
        self.random = random.Random(seed)
        self.kl = KLController(presets, controlled=presets.kl_control_enabled)
        self.plant = SimulatedPlant(rng=random.Random(seed + 1000), start=0.07, end=0.05)
        self.step = self.images = self.epoch = 0
        self.averaged_loss = None  # what the averaged weights would have, without noise
        self.said: list[tuple[int, str]] = []

    def loss(self) -> float:
        """The loss without noise: falls slowly, from 0.065; better in cool-downs, and on images the fit has seen."""
        value = 0.045 + 0.02 * (1 + self.images / 50_000) ** -0.5
        value *= 0.97 if self.kl.in_cooldown(self.epoch) else 1.0
        return value * (0.8 if self.images < self.presets.pca_init_images else 1.0)

    def window(self, values: dict) -> dict:
        return values

    def validation(self, values: dict) -> dict:
        return values

    def rate(self) -> float:
        warmup = self.presets.lr_warmup_steps
        return self.presets.learning_rate * min(1.0, (self.step + 1) / (warmup + 1))

    def one_window(self, steps: int) -> None:
        images = steps * self.presets.batch_size
        beta = self.kl.beta(self.epoch, self.images)
        self.step += steps
        self.images += images
        kl, _ = self.plant.advance(beta, images)
        clean = self.loss()
        loss = clean * (1 + self.random.gauss(0, BATCH_NOISE * math.sqrt(64 / images)))
        keep = math.exp(-steps / 5000)
        self.averaged_loss = clean if self.averaged_loss is None else keep * self.averaged_loss + (1 - keep) * clean
        self.kl.observe(kl=kl, reconstruction=loss, num_images=images, epoch=self.epoch, images_seen=self.images)
        low, high = self.kl.band(self.epoch)
        values = {
            "loss/total": loss + beta * kl,
            "loss/reconstruction": loss,
            "loss/kl": kl,
            "kl/smoothed_fraction": self.kl.smoothed_fraction,
            "kl/target_low": low,
            "kl/target_high": high,
            "kl/beta": beta,
            "kl/beta_floor": self.kl.floor(self.epoch),
            "optim/grad_norm": 0.9,
            # Often in the beginning (measured), later now and then.
            "optim/clipped_fraction": min(1.0, self.random.uniform(0, 1.8)) if self.step < 500 else 0.1,
            "optim/learning_rate": self.rate(),
            "optim/skipped_steps": 0,
            # The first images of all are waited for as long as 45 steps take.
            "speed/data_wait_fraction": min(0.9, 45 / steps) if self.step == steps else self.random.uniform(0, 0.02),
        }
        self.hear(self.alerts.observe_window(self.window(values), images_seen=self.images, step=self.step))

    def validate(self) -> None:
        loss = 0.0822 if self.averaged_loss is None else 1.05 * self.averaged_loss
        values = {"reconstruction_loss": loss, "active_units": 1000.0 + self.random.randrange(24), "kl": 2.5}
        self.hear(
            self.alerts.observe_validation(
                self.validation(values), images_seen=self.images, learning_rate=self.rate(), latent_dim=NUMBERS
            )
        )

    def hear(self, sentences: list[str]) -> None:
        self.said += [(self.images, sentence) for sentence in sentences]

    def go(self, images: int) -> SimulatedRun:
        """Train until `images` have been seen."""
        if self.step == 0:
            self.validate()
        end = images
        while self.images < end:
            left = (self.images_per_epoch * (self.epoch + 1) - self.images) // self.presets.batch_size
            if left <= 0:
                self.epoch += 1
                self.validate()
                continue
            self.one_window(min(self.log_every, left))
        return self


def first(run: SimulatedRun, beginning: str) -> tuple[int, str]:
    """When the only kind of warning was said first, and its sentence."""
    assert run.said, "nothing was said"
    assert all(sentence.startswith(beginning) for _, sentence in run.said), run.said
    return run.said[0]


# ---------------------------------------------------------------------- nothing is wrong


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_said_of_a_healthy_run(seed):
    assert SimulatedRun(seed=seed).go(12 * CELEBA).said == []


def test_nothing_is_said_of_a_hundred_healthy_epochs():
    assert SimulatedRun(seed=11, log_every=500).go(100 * CELEBA).said == []


@pytest.mark.parametrize(("batch", "log_every"), [(4, 10), (16, 20), (64, 1), (512, 50)])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_said_of_a_healthy_run_whatever_the_batch_and_the_log_interval(batch, log_every, seed):
    run = SimulatedRun(replace(PRESETS, batch_size=batch), seed=seed, log_every=log_every)
    assert run.go(2 * run.alerts.first_images).said == []


def test_images_that_the_linear_path_was_fitted_on_are_no_measure_for_the_others():
    class Memorised(SimulatedRun):
        def loss(self):
            return super().loss() * (0.2 if self.images <= self.presets.pca_init_images else 1.0)

    assert Memorised(seed=2).go(2 * CELEBA).said == []


def test_a_loss_that_has_converged_is_not_one_that_does_not_fall():
    class Converged(SimulatedRun):
        def loss(self):
            return 0.05 + 0.015 * math.exp(-self.images / 40_000)

    assert Converged(seed=3).go(30 * CELEBA).said == []


def test_a_run_that_is_only_known_from_its_middle_is_not_blamed_for_its_beginning():
    run = SimulatedRun(seed=4)
    run.images, run.step, run.epoch = 20 * CELEBA, 20 * CELEBA // 64, 20
    run.loss = lambda: 0.05
    assert run.go(24 * CELEBA).said == []


def test_the_measured_start_of_the_ultra_model_is_healthy():
    """Ten minutes of configs/ultra.json on a CPU, batch 4: loss/reconstruction and clipped_fraction of 16 windows."""
    loss = [0.06529, 0.06418, 0.06576, 0.06699, 0.06085, 0.06946, 0.06715, 0.06705]
    loss += [0.06446, 0.06328, 0.06773, 0.06408, 0.06824, 0.06963, 0.06587, 0.06167]
    clipped = [0.2, 0.4, 0.4, 0.6, 0.4, 0.6, 0.3, 0.4, 0.3, 0.1, 0, 0, 0, 0, 0, 0.1]
    watch = Alerts(replace(PRESETS, batch_size=4, learning_rate=1e-4, lr_warmup_steps=20))
    for images, value in ((0, 0.0822), (652, 0.08122)):
        figures = {"reconstruction_loss": value, "active_units": 1024.0}
        assert watch.observe_validation(figures, images_seen=images, learning_rate=1e-4, latent_dim=1024) == []
        for index in range(16 if images == 0 else 0):
            figures = {"loss/reconstruction": loss[index], "optim/clipped_fraction": clipped[index], "loss/kl": 2.5}
            assert watch.observe_window(figures, images_seen=40 * (index + 1), step=10 * (index + 1)) == []


# ---------------------------------------------------------------------- each fault


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_does_not_fall_is_said_at_the_end_of_the_first_images(seed):
    class Stuck(SimulatedRun):
        def loss(self):
            return 0.065

    run = Stuck(seed=seed).go(CELEBA)
    when, sentence = first(run, "loss/reconstruction has not fallen by 1 %")
    assert run.alerts.first_images == 8192 + 100 * 64 + 1000 * 64 == 78_592
    assert 78_592 <= when <= 78_592 + 50 * 64
    assert f"first {when} images (0.06" in sentence and "training_presets.learning_rate" in sentence
    assert len(run.said) == 1


def test_a_loss_that_falls_late_ends_the_warning_for_good():
    class Late(SimulatedRun):
        def loss(self):
            return 0.065 if self.images < 120_000 else 0.055

    run = Late(seed=1).go(30 * CELEBA)
    assert len(run.said) == 1 and run.alerts.state_dict()["said"] == {}


@pytest.mark.parametrize("factor", [1.5, 2.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_divergence_is_said_within_16384_images(factor, seed):
    class Diverging(SimulatedRun):
        def loss(self):
            return super().loss() * (factor if self.images > 500_000 else 1.0)

    when, sentence = first(Diverging(seed=seed).go(520_000), "loss/reconstruction 0.")
    assert 500_000 < when <= 516_384
    assert "is above 1.3 times its best 0.05" in sentence


def test_divergence_in_the_very_first_images_is_measured_by_the_validation_before_training():
    class Exploding(SimulatedRun):
        def loss(self):
            return 0.065 if self.images < 2000 else 0.5

    when, sentence = first(Exploding().go(60_000), "loss/reconstruction")
    assert when <= 8192
    assert "above 1.5 times its value before training 0.0822" in sentence


def test_divergence_is_said_anew_only_after_it_has_ended():
    class Twice(SimulatedRun):
        def loss(self):
            diverged = 300_000 < self.images < 400_000 or 600_000 < self.images < 700_000
            return super().loss() * (2.0 if diverged else 1.0)

    run = Twice().go(5 * CELEBA)
    assert len(run.said) == 2
    assert 300_000 < run.said[0][0] < 310_000 and 600_000 < run.said[1][0] < 610_000


def test_a_gradient_that_is_always_clipped_is_said_within_1200_steps():
    class Clipped(SimulatedRun):
        def window(self, values):
            return values | ({"optim/clipped_fraction": 1.0} if self.step > 5000 else {})

    when, sentence = first(Clipped().go(9000 * 64), "optim/clipped_fraction 0.9")
    assert 5000 < when / 64 <= 6200 + 50
    assert "training_presets.max_grad_norm 1 " in sentence


def test_a_gradient_that_is_clipped_from_the_start_is_said_after_500_steps():
    class Clipped(SimulatedRun):
        def window(self, values):
            return values | {"optim/clipped_fraction": 1.0}

    when, _ = first(Clipped().go(40_000), "optim/clipped_fraction 1.00")
    assert when == 500 * 64


def test_a_gradient_that_is_often_clipped_is_no_fault():
    class Often(SimulatedRun):
        def window(self, values):
            return values | {"optim/clipped_fraction": self.random.uniform(0.8, 1.0)}

    assert Often().go(3 * CELEBA).said == []


def test_a_lasting_warning_is_repeated_every_two_million_images():
    class Clipped(SimulatedRun):
        def window(self, values):
            return values | {"optim/clipped_fraction": 1.0}

    run = Clipped(log_every=500).go(5_000_000)
    assert [round(when / 2_000_000, 1) for when, _ in run.said] == [0.0, 1.0, 2.0]


def test_skipped_steps_are_said_within_500_steps():
    class Skipping(SimulatedRun):
        def window(self, values):
            return values | {"optim/skipped_steps": max(0, self.step - 3000) // 10}

    when, sentence = first(Skipping().go(5000 * 64), "optim/skipped_steps grows by")
    assert 3000 < when / 64 <= 3500
    assert "training_presets.mixed_precision" in sentence


def test_the_overflows_of_half_precision_are_no_fault():
    class Half(SimulatedRun):
        def window(self, values):
            return values | {"optim/skipped_steps": min(15, self.step) + self.step // 2000}

    assert Half().go(3 * CELEBA).said == []


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_waiting_for_images_is_said_within_600_steps(fraction):
    class Starving(SimulatedRun):
        def window(self, values):
            return values | ({"speed/data_wait_fraction": fraction} if self.step > 3000 else {})

    when, sentence = first(Starving().go(6000 * 64), "speed/data_wait_fraction 0.2")
    assert 3000 < when / 64 <= 3600
    assert "data.decode_threads" in sentence


def test_the_learning_rate_is_at_its_floor_when_torch_has_nothing_left_to_reduce():
    torch = pytest.importorskip("torch")
    for start, floor in ((5e-5, 1e-7), (1e-6, 0.0), (1e-4, 2.9e-7)):
        presets = replace(PRESETS, learning_rate=start, min_learning_rate=floor)
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.Adam([parameter], lr=start)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=presets.plateau_factor, patience=0, min_lr=floor
        )
        watch, rates, said = Alerts(presets), [], []
        for epoch in range(1, 30):
            plateau.step(1.0)
            rates.append(optimizer.param_groups[0]["lr"])
            figures = {"reconstruction_loss": 0.05, "active_units": 1000.0}
            said.append(
                watch.observe_validation(
                    figures, images_seen=10_000 * epoch, learning_rate=rates[-1], latent_dim=NUMBERS
                )
            )
        stopped = rates.index(rates[-1])
        assert 5 < stopped < 28
        assert [index for index, sentences in enumerate(said) if sentences] == [stopped]
        assert said[stopped][0].startswith(f"optim/learning_rate {rates[-1]:.1e} is at its floor")


def test_a_learning_rate_in_its_warm_up_is_not_at_its_floor():
    presets = replace(PRESETS, learning_rate=1e-6, min_learning_rate=5e-7, lr_warmup_steps=400)
    assert SimulatedRun(presets).go(400 * 64).said == []


@pytest.mark.parametrize("seed", range(3))
def test_overfitting_is_said_five_validations_after_it_shows(seed):
    class Overfitting(SimulatedRun):
        def validation(self, values):
            worse = max(0, self.epoch - 6)  # validation after epoch 6 is the best
            return values | {"reconstruction_loss": 0.06 + 0.002 * worse - 0.001 * min(self.epoch, 6)}

    run = Overfitting(seed=seed, images_per_epoch=30_000)
    run.loss = lambda: 0.03 + 0.035 * math.exp(-run.images / 200_000)
    when, sentence = first(run.go(15 * 30_000), "validation reconstruction_loss 0.0")
    assert 11 * 29_900 <= when <= 12 * 30_000
    assert "above its best 0.0540 for 5 validations, while loss/reconstruction went from" in sentence


def test_validation_that_gets_worse_with_training_is_not_overfitting():
    class Harder(SimulatedRun):
        def loss(self):
            return 0.05 * (1.15 if self.epoch > 4 else 1.0) + 0.01 * math.exp(-self.images / 30_000)

        def validation(self, values):
            return values | {"reconstruction_loss": 0.055 * (1.15 if self.epoch > 5 else 1.0)}

    assert Harder(images_per_epoch=30_000).go(20 * 30_000).said == []


def test_dying_units_are_said_at_the_first_validation_that_shows_them():
    class Dying(SimulatedRun):
        def validation(self, values):
            return values | {"active_units": 1024.0 - 200 * self.epoch}

    run = Dying(images_per_epoch=10_000).go(50_000)
    when, sentence = first(run, "424 of 1024 latent numbers are active")
    assert 29_900 < when <= 30_000 < run.alerts.first_images
    assert "below 50 %" in sentence and "kl_target_high" in sentence


def test_units_that_training_has_yet_to_find_are_no_fault():
    class Rising(SimulatedRun):
        def validation(self, values):
            return values | {"active_units": min(1024.0, self.images / 60)}

    assert Rising(images_per_epoch=20_000).go(100_000).said == []


def test_units_that_are_never_found_are_said_after_the_first_images():
    class Dead(SimulatedRun):
        def validation(self, values):
            return values | {"active_units": 3.0}

    when, _ = first(Dead(images_per_epoch=20_000).go(100_000), "3 of 1024 latent numbers are active")
    assert 78_592 <= when <= 78_592 + 20_000


def test_a_collapsing_posterior_is_said_in_the_window_that_shows_it():
    class Collapsing(SimulatedRun):
        def window(self, values):
            return values | {"loss/kl": 2.5 * math.exp(-max(0, self.images - 100_000) / 10_000)}

    when, sentence = first(Collapsing().go(CELEBA), "loss/kl 0.00")
    assert 100_000 + 10_000 * math.log(250) <= when <= 100_000 + 10_000 * math.log(250) + 50 * 64
    assert "kl_collapse_nats 0.01" in sentence


def test_kl_is_not_judged_in_the_warm_up_of_beta():
    class Rising(SimulatedRun):
        def window(self, values):
            return values | {"loss/kl": 0.001 if self.images <= 50_000 else 2.0}

    assert Rising(replace(PRESETS, kl_warmup_images=50_000)).go(CELEBA).said == []
    assert len(Rising(replace(PRESETS, kl_warmup_images=40_000)).go(CELEBA).said) == 1


@pytest.mark.parametrize(
    ("presets", "remedy"),
    [
        ({"kl_beta_floor": 0.5}, "above its band 0.01 to 0.03|held up by its floor"),
        (
            {"kl_beta_floor": 0.0, "kl_beta_max": 1.5e-4},
            "below its band 0.01 to 0.03|at training_presets.kl_beta_max",
        ),
        (
            {"kl_beta_floor": 0.0, "kl_beta_min": 0.2, "kl_beta_init": 0.3},
            "above its band 0.01 to 0.03|at training_presets.kl_beta_min",
        ),
    ],
)
def test_a_share_that_its_bounds_keep_out_of_the_band_is_said_with_the_bound(presets, remedy):
    """The cycle's first two epochs are a cool-down, in which the share is not judged."""
    run = SimulatedRun(replace(PRESETS, **presets)).go(3 * CELEBA)
    when, sentence = first(run, "kl/smoothed_fraction")
    for part in remedy.split("|"):
        assert part in sentence
    limit = (math.log(run.presets.kl_beta_max / run.presets.kl_beta_min) / 0.7 + 4) * 2048
    assert 2 * 162_000 + limit - 3200 <= when <= 2 * CELEBA + limit + 2 * 3200
    assert len(run.said) == 1


def test_a_share_that_wobbles_over_the_edge_of_its_band_is_said_once():
    """The floor of the default schedule, in its late epochs: beta cannot go lower, so the share drifts out."""

    class Drifting(SimulatedRun):
        def window(self, values):
            drift = 0.03 + 0.001 * math.sin(self.images / 5000) + 0.003 * min(1.0, self.images / 2_000_000)
            return values | {"kl/smoothed_fraction": drift, "kl/target_low": 0.01, "kl/target_high": 0.03}

    run = Drifting().go(2_000_000)
    when, sentence = first(run, "kl/smoothed_fraction 0.0")
    assert len(run.said) == 1
    assert "for 48612 images or more" in sentence and when > 100_000


def test_the_controller_has_time_to_come_from_the_other_end_of_its_range():
    for init in (1e-6, 1.0):
        presets = replace(PRESETS, kl_beta_init=init, kl_beta_floor=0.0, kl_cycle_enabled=False)
        assert [text for _, text in SimulatedRun(presets).go(2 * CELEBA).said if text.startswith("kl/")] == []


def test_a_share_nobody_controls_has_no_band():
    presets = replace(PRESETS, kl_control_enabled=False, kl_beta_init=0.5)
    assert SimulatedRun(presets).go(3 * CELEBA).said == []


# ---------------------------------------------------------------------- the figures themselves


@pytest.mark.parametrize("broken", [None, math.nan, math.inf, "missing"])
def test_figures_that_are_missing_or_not_finite_are_left_out(broken):
    class Broken(SimulatedRun):
        def window(self, values):
            names = list(values) if self.step % 500 == 0 else []
            return {name: broken if name in names else value for name, value in values.items()}

        def validation(self, values):
            return {name: broken for name in values} if self.epoch == 1 else values

    run = Broken().go(3 * CELEBA)
    assert run.said == []
    assert math.isfinite(run.alerts.state_dict()["loss"][0])


def test_every_figure_that_is_judged_is_one_that_the_trainer_gives():
    """Names are read from the real window; a misspelt one would be silently left out."""
    from training.tracking.progress import Progress

    asked: set[str] = set()

    class Recording(dict):
        def get(self, name, default=None):
            asked.add(name)
            return super().get(name, default)

    progress, kl = Progress(), KLController(PRESETS)
    parts = {"total": 0.06, "reconstruction": 0.059, "mse": 0.01, "kl": 2.0, "weighted/kl": 0.001}
    progress.add_step(parts, beta=5e-4, grad_norm=2.0, max_grad_norm=1.0, seconds=0.1, waited=0.01)
    kl.observe(kl=2.0, reconstruction=0.059, num_images=64, epoch=3, images_seen=10**6)
    values = Recording(progress.take_window(PRESETS, kl, latent_dim=NUMBERS, learning_rate=5e-5))
    Alerts(PRESETS).observe_window(values, images_seen=10**6, step=10**4)
    assert len(asked) == 10
    assert asked <= set(values)


def test_a_resume_says_what_an_uninterrupted_run_says():
    class Faulty(SimulatedRun):
        def loss(self):
            return 0.065 if self.images < 250_000 else 0.2

        def window(self, values):
            return values | {"speed/data_wait_fraction": 0.6, "optim/skipped_steps": self.step // 15}

        def validation(self, values):
            return values | {"active_units": 1024.0 / (1 + self.epoch)}

    whole, cut = Faulty(seed=5, images_per_epoch=50_000), Faulty(seed=5, images_per_epoch=50_000)
    whole.go(400_000)
    for end in range(13_000, 400_000, 37_000):
        cut.go(end)
        state = json.loads(json.dumps(cut.alerts.state_dict(), allow_nan=False))
        cut.alerts = Alerts(PRESETS)
        cut.alerts.load_state_dict(state)
        assert cut.alerts.state_dict() == state
        state["said"]["changed"] = state["loss"][0] = 1  # a copy was taken
        assert "changed" not in cut.alerts.state_dict()["said"] and cut.alerts.state_dict()["loss"][0] != 1
    cut.go(400_000)
    assert len(whole.said) == 5
    assert cut.said == whole.said and cut.alerts.state_dict() == whole.alerts.state_dict()


def test_the_state_stays_small():
    run = SimulatedRun().go(4 * CELEBA)
    assert len(json.dumps(run.alerts.state_dict())) < 1000


def test_a_wrong_state_is_refused_and_changes_nothing():
    watch = Alerts(PRESETS)
    before = watch.state_dict()
    for wrong in (before | {"extra": 1}, {key: value for key, value in before.items() if key != "loss"}):
        with pytest.raises(ValueError, match="bad health state at .*(extra|loss).*resume from an older checkpoint"):
            watch.load_state_dict(wrong)
    assert watch.state_dict() == before


def test_thresholds_of_beginning_and_end_differ():
    assert alerts._CLIPPED_ENDS < alerts.CLIPPED and alerts._SKIPPED_ENDS < alerts.SKIPPED
    assert alerts._WAITING_ENDS < alerts.WAITING and alerts._ACTIVE_ENDS > alerts.ACTIVE_FRACTION
    assert alerts._RISE_ENDS > 1 and alerts._COLLAPSE_ENDS > 1
