"""Alerts on simulated runs: none in a healthy run, and one for each fault within a stated number of images."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from training.config import TrainingPresets
from training.losses.kl_control import KLController
from training.losses.kl_simulation import SimulatedPlant
from training.tracking import alerts
from training.tracking.alerts import Alerts

CELEBA = 162_770
PRESETS = TrainingPresets()
LATENT_DIM = 1024
BATCH_NOISE = 0.05  # relative standard deviation of the mean loss of 64 images


class SimulatedRun:
    """A run as the trainer reports it: windows of steps, and a validation before training and after each epoch.

    Tests override `loss`, and the metrics of `window` and `validation`. KL, beta and its target range come from the
    real controller on its simulated model.
    """

    def __init__(self, presets=PRESETS, *, seed=0, images_per_epoch=CELEBA, log_every=50):
        self.presets, self.images_per_epoch, self.log_every = presets, images_per_epoch, log_every
        self.alerts = Alerts(presets)
        self.random = random.Random(seed)
        self.kl = KLController(presets, controlled=presets.kl_control_enabled)
        self.plant = SimulatedPlant(rng=random.Random(seed + 1000), start=0.07, end=0.05)
        self.step = self.images = self.epoch = 0
        self.ema_loss = None  # of the EMA weights, without noise
        self.alerted: list[tuple[int, str]] = []

    def loss(self) -> float:
        """The loss without noise: falls slowly from 0.065; lower in low-beta phases and on PCA initialization images."""
        value = 0.045 + 0.02 * (1 + self.images / 50_000) ** -0.5
        value *= 0.97 if self.kl.in_low_beta_phase(self.epoch) else 1.0
        return value * (0.8 if self.images < self.presets.pca_init_images else 1.0)

    def window(self, values: dict) -> dict:
        return values

    def validation(self, values: dict) -> dict:
        return values

    def rate(self) -> float:
        warmup = self.presets.lr_warmup_steps
        return self.presets.learning_rate * min(1.0, (self.step + 1) / (warmup + 1))

    def train_window(self, steps: int) -> None:
        images = steps * self.presets.batch_size
        beta = self.kl.beta(self.epoch, self.images)
        self.step += steps
        self.images += images
        kl, _ = self.plant.advance(beta, images)
        clean = self.loss()
        loss = clean * (1 + self.random.gauss(0, BATCH_NOISE * math.sqrt(64 / images)))
        keep = math.exp(-steps / 5000)
        self.ema_loss = clean if self.ema_loss is None else keep * self.ema_loss + (1 - keep) * clean
        self.kl.observe(kl=kl, reconstruction=loss, num_images=images, epoch=self.epoch, images_seen=self.images)
        low, high = self.kl.target_range(self.epoch)
        values = {
            "loss/total": loss + beta * kl,
            "loss/reconstruction": loss,
            "loss/kl": kl,
            "kl/smoothed_fraction": self.kl.smoothed_fraction,
            "kl/target_low": low,
            "kl/target_high": high,
            "kl/beta": beta,
            "kl/beta_floor": self.kl.minimum_beta(self.epoch),
            "optim/grad_norm": 0.9,
            # Often at the start (measured), rarely later.
            "optim/clipped_fraction": min(1.0, self.random.uniform(0, 1.8)) if self.step < 500 else 0.1,
            "optim/learning_rate": self.rate(),
            "optim/skipped_steps": 0,
            # The very first images take as long as 45 steps.
            "speed/data_wait_fraction": min(0.9, 45 / steps) if self.step == steps else self.random.uniform(0, 0.02),
        }
        self.record(self.alerts.observe_window(self.window(values), images_seen=self.images, step=self.step))

    def validate(self) -> None:
        loss = 0.0822 if self.ema_loss is None else 1.05 * self.ema_loss
        values = {"reconstruction_loss": loss, "active_units": 1000.0 + self.random.randrange(24), "kl": 2.5}
        self.record(
            self.alerts.observe_validation(
                self.validation(values), images_seen=self.images, learning_rate=self.rate(), latent_dim=LATENT_DIM
            )
        )

    def record(self, messages: list[str]) -> None:
        self.alerted += [(self.images, message) for message in messages]

    def train(self, images: int) -> SimulatedRun:
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
            self.train_window(min(self.log_every, left))
        return self


def first_alert(run: SimulatedRun, beginning: str) -> tuple[int, str]:
    """Images seen at the first alert, and its message; all alerts must begin alike."""
    assert run.alerted, "no alert"
    assert all(message.startswith(beginning) for _, message in run.alerted), run.alerted
    return run.alerted[0]


# ---- healthy runs ----


@pytest.mark.parametrize("seed", range(8))
def test_a_healthy_run_has_no_alerts(seed):
    assert SimulatedRun(seed=seed).train(12 * CELEBA).alerted == []


def test_a_hundred_healthy_epochs_have_no_alerts():
    assert SimulatedRun(seed=11, log_every=500).train(100 * CELEBA).alerted == []


@pytest.mark.parametrize(("batch", "log_every"), [(4, 10), (16, 20), (64, 1), (512, 50)])
@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_has_no_alerts_for_any_batch_size_and_log_interval(batch, log_every, seed):
    run = SimulatedRun(replace(PRESETS, batch_size=batch), seed=seed, log_every=log_every)
    assert run.train(2 * run.alerts.first_images).alerted == []


def test_a_low_loss_on_pca_initialization_images_is_ignored():
    class Memorized(SimulatedRun):
        def loss(self):
            return super().loss() * (0.2 if self.images <= self.presets.pca_init_images else 1.0)

    assert Memorized(seed=2).train(2 * CELEBA).alerted == []


def test_a_converged_loss_has_no_alert():
    class Converged(SimulatedRun):
        def loss(self):
            return 0.05 + 0.015 * math.exp(-self.images / 40_000)

    assert Converged(seed=3).train(30 * CELEBA).alerted == []


def test_alerts_that_start_in_the_middle_of_a_run_ignore_its_first_images():
    run = SimulatedRun(seed=4)
    run.images, run.step, run.epoch = 20 * CELEBA, 20 * CELEBA // 64, 20
    run.loss = lambda: 0.05
    assert run.train(24 * CELEBA).alerted == []


def test_the_measured_start_of_the_ultra_model_has_no_alerts():
    """Ten minutes of configs/ultra.json on a CPU, batch 4: loss/reconstruction and clipped_fraction of 16 windows."""
    loss = [0.06529, 0.06418, 0.06576, 0.06699, 0.06085, 0.06946, 0.06715, 0.06705]
    loss += [0.06446, 0.06328, 0.06773, 0.06408, 0.06824, 0.06963, 0.06587, 0.06167]
    clipped = [0.2, 0.4, 0.4, 0.6, 0.4, 0.6, 0.3, 0.4, 0.3, 0.1, 0, 0, 0, 0, 0, 0.1]
    watch = Alerts(replace(PRESETS, batch_size=4, learning_rate=1e-4, lr_warmup_steps=20))
    for images, value in ((0, 0.0822), (652, 0.08122)):
        metrics = {"reconstruction_loss": value, "active_units": 1024.0}
        assert watch.observe_validation(metrics, images_seen=images, learning_rate=1e-4, latent_dim=1024) == []
        for index in range(16 if images == 0 else 0):
            metrics = {"loss/reconstruction": loss[index], "optim/clipped_fraction": clipped[index], "loss/kl": 2.5}
            assert watch.observe_window(metrics, images_seen=40 * (index + 1), step=10 * (index + 1)) == []


# ---- each fault ----


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_does_not_fall_is_reported_after_the_first_images(seed):
    class Stuck(SimulatedRun):
        def loss(self):
            return 0.065

    run = Stuck(seed=seed).train(CELEBA)
    when, message = first_alert(run, "loss/reconstruction has not fallen by 1 %")
    assert run.alerts.first_images == 8192 + 100 * 64 + 1000 * 64 == 78_592
    assert 78_592 <= when <= 78_592 + 50 * 64
    assert f"first {when} images (from 0.06" in message and "training_presets.learning_rate" in message
    assert len(run.alerted) == 1


def test_a_loss_that_falls_late_clears_the_alert_for_good():
    class Late(SimulatedRun):
        def loss(self):
            return 0.065 if self.images < 120_000 else 0.055

    run = Late(seed=1).train(30 * CELEBA)
    assert len(run.alerted) == 1 and run.alerts.state_dict()["active"] == []


@pytest.mark.parametrize("factor", [1.5, 2.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_divergence_is_reported_within_16384_images(factor, seed):
    class Diverging(SimulatedRun):
        def loss(self):
            return super().loss() * (factor if self.images > 500_000 else 1.0)

    when, message = first_alert(Diverging(seed=seed).train(520_000), "loss/reconstruction 0.")
    assert 500_000 < when <= 516_384
    assert "is above 1.3 times its minimum 0.05" in message


def test_divergence_in_the_first_images_is_relative_to_the_validation_before_training():
    class Exploding(SimulatedRun):
        def loss(self):
            return 0.065 if self.images < 2000 else 0.5

    when, message = first_alert(Exploding().train(60_000), "loss/reconstruction")
    assert when <= 8192
    assert "above 1.5 times its value before training 0.0822" in message


def test_divergence_is_reported_again_only_after_it_has_cleared():
    class Twice(SimulatedRun):
        def loss(self):
            diverged = 300_000 < self.images < 400_000 or 600_000 < self.images < 700_000
            return super().loss() * (2.0 if diverged else 1.0)

    run = Twice().train(5 * CELEBA)
    assert len(run.alerted) == 2
    assert 300_000 < run.alerted[0][0] < 310_000 and 600_000 < run.alerted[1][0] < 610_000


def test_always_clipped_gradients_are_reported_within_1200_steps():
    class Clipped(SimulatedRun):
        def window(self, values):
            return values | ({"optim/clipped_fraction": 1.0} if self.step > 5000 else {})

    when, message = first_alert(Clipped().train(9000 * 64), "optim/clipped_fraction 0.9")
    assert 5000 < when / 64 <= 6200 + 50
    assert "training_presets.max_grad_norm 1;" in message


def test_gradients_clipped_from_the_start_are_reported_after_500_steps():
    class Clipped(SimulatedRun):
        def window(self, values):
            return values | {"optim/clipped_fraction": 1.0}

    when, _ = first_alert(Clipped().train(40_000), "optim/clipped_fraction 1.00")
    assert when == 500 * 64


def test_a_discriminator_that_is_too_strong_or_not_trained_is_reported_and_one_that_learns_is_not():
    class Adversarial(SimulatedRun):
        discriminator, skipped = 0.55, 0.01

        def window(self, values):
            late = self.step > 3000
            values |= {"loss/adversarial": 0.8, "weighted/adversarial": 0.1 * (self.step > 1000)}
            values["loss/discriminator"] = self.discriminator if late else 0.6
            return values | {"discriminator/skipped": self.skipped * late}

    class Alone(Adversarial):
        """A discriminator that is strong while it trains alone, and terms that rise when texture appears."""

        def window(self, values):
            rising = {"loss/reconstruction": 0.05 + self.step / 1e5}
            return super().window(values) | rising | ({} if self.step > 1000 else {"loss/discriminator": 0.02})

    assert Adversarial().train(9000 * 64).alerted == Alone().train(9000 * 64).alerted == []
    for name, value, beginning, text in (
        ("discriminator", 0.02, "loss/discriminator", "separates nearly all positions"),
        ("skipped", 1.0, "discriminator/skipped", "a lower loss.discriminator_learning_rate"),
    ):
        run = Adversarial()
        setattr(run, name, value)
        when, message = first_alert(run.train(9000 * 64), beginning)
        assert text in message and 3000 * 64 < when < 5000 * 64


def test_often_clipped_gradients_have_no_alert():
    class Often(SimulatedRun):
        def window(self, values):
            return values | {"optim/clipped_fraction": self.random.uniform(0.8, 1.0)}

    assert Often().train(3 * CELEBA).alerted == []


def test_a_condition_that_lasts_is_reported_once():
    class Clipped(SimulatedRun):
        def window(self, values):
            return values | {"optim/clipped_fraction": 1.0}

    assert len(Clipped(log_every=500).train(5_000_000).alerted) == 1


def test_skipped_steps_are_reported_within_500_steps():
    class Skipping(SimulatedRun):
        def window(self, values):
            return values | {"optim/skipped_steps": max(0, self.step - 3000) // 10}

    when, message = first_alert(Skipping().train(5000 * 64), "optim/skipped_steps grows by")
    assert 3000 < when / 64 <= 3500
    assert "training_presets.mixed_precision" in message


def test_the_overflows_of_fp16_have_no_alert():
    class Half(SimulatedRun):
        def window(self, values):
            return values | {"optim/skipped_steps": min(15, self.step) + self.step // 2000}

    assert Half().train(3 * CELEBA).alerted == []


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_waiting_for_images_is_reported_within_600_steps(fraction):
    class Starving(SimulatedRun):
        def window(self, values):
            return values | ({"speed/data_wait_fraction": fraction} if self.step > 3000 else {})

    when, message = first_alert(Starving().train(6000 * 64), "speed/data_wait_fraction 0.2")
    assert 3000 < when / 64 <= 3600
    assert "data.decode_threads" in message


def test_the_minimum_learning_rate_is_reported_when_the_scheduler_cannot_reduce_it():
    torch = pytest.importorskip("torch")
    for start, minimum in ((5e-5, 1e-7), (1e-6, 0.0), (1e-4, 2.9e-7)):
        presets = replace(PRESETS, learning_rate=start, min_learning_rate=minimum)
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.Adam([parameter], lr=start)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=presets.plateau_factor, patience=0, min_lr=minimum
        )
        watch, rates, alerted = Alerts(presets), [], []
        for epoch in range(1, 30):
            plateau.step(1.0)
            rates.append(optimizer.param_groups[0]["lr"])
            metrics = {"reconstruction_loss": 0.05, "active_units": 1000.0}
            alerted.append(
                watch.observe_validation(
                    metrics, images_seen=10_000 * epoch, learning_rate=rates[-1], latent_dim=LATENT_DIM
                )
            )
        stopped = rates.index(rates[-1])
        assert 5 < stopped < 28
        assert [index for index, messages in enumerate(alerted) if messages] == [stopped]
        assert alerted[stopped][0].startswith(f"optim/learning_rate {rates[-1]:.1e} is at training_presets.min_")


def test_a_learning_rate_in_warm_up_has_no_alert():
    presets = replace(PRESETS, learning_rate=1e-6, min_learning_rate=5e-7, lr_warmup_steps=400)
    assert SimulatedRun(presets).train(400 * 64).alerted == []


@pytest.mark.parametrize("seed", range(3))
def test_overfitting_is_reported_after_five_validations(seed):
    class Overfitting(SimulatedRun):
        def validation(self, values):
            worse = max(0, self.epoch - 6)  # validation after epoch 6 is the best
            return values | {"reconstruction_loss": 0.06 + 0.002 * worse - 0.001 * min(self.epoch, 6)}

    run = Overfitting(seed=seed, images_per_epoch=30_000)
    run.loss = lambda: 0.03 + 0.035 * math.exp(-run.images / 200_000)
    when, message = first_alert(run.train(15 * 30_000), "validation/reconstruction_loss 0.0")
    assert 11 * 29_900 <= when <= 12 * 30_000
    assert "above its minimum 0.0540 for 5 validations, while loss/reconstruction fell from" in message


def test_a_validation_loss_that_rises_with_the_training_loss_is_not_overfitting():
    class Harder(SimulatedRun):
        def loss(self):
            return 0.05 * (1.15 if self.epoch > 4 else 1.0) + 0.01 * math.exp(-self.images / 30_000)

        def validation(self, values):
            return values | {"reconstruction_loss": 0.055 * (1.15 if self.epoch > 5 else 1.0)}

    assert Harder(images_per_epoch=30_000).train(20 * 30_000).alerted == []


def test_inactive_latent_dimensions_are_reported_by_the_first_validation():
    class Dying(SimulatedRun):
        def validation(self, values):
            return values | {"active_units": 1024.0 - 200 * self.epoch}

    run = Dying(images_per_epoch=10_000).train(50_000)
    when, message = first_alert(run, "validation/active_units 424 of 1024 latent dimensions is below 50 %")
    assert 29_900 < when <= 30_000 < run.alerts.first_images
    assert "kl_target_high" in message


def test_latent_dimensions_that_become_active_have_no_alert():
    class Rising(SimulatedRun):
        def validation(self, values):
            return values | {"active_units": min(1024.0, self.images / 60)}

    assert Rising(images_per_epoch=20_000).train(100_000).alerted == []


def test_latent_dimensions_that_stay_inactive_are_reported_after_the_first_images():
    class Dead(SimulatedRun):
        def validation(self, values):
            return values | {"active_units": 3.0}

    when, _ = first_alert(Dead(images_per_epoch=20_000).train(100_000), "validation/active_units 3 of 1024 ")
    assert 78_592 <= when <= 78_592 + 20_000


def test_posterior_collapse_is_reported_by_the_first_window():
    class Collapsing(SimulatedRun):
        def window(self, values):
            return values | {"loss/kl": 2.5 * math.exp(-max(0, self.images - 100_000) / 10_000)}

    when, message = first_alert(Collapsing().train(CELEBA), "loss/kl 0.00")
    assert 100_000 + 10_000 * math.log(250) <= when <= 100_000 + 10_000 * math.log(250) + 50 * 64
    assert "kl_collapse_nats 0.01" in message


def test_kl_is_not_checked_during_beta_warm_up():
    class Rising(SimulatedRun):
        def window(self, values):
            return values | {"loss/kl": 0.001 if self.images <= 50_000 else 2.0}

    assert Rising(replace(PRESETS, kl_warmup_images=50_000)).train(CELEBA).alerted == []
    assert len(Rising(replace(PRESETS, kl_warmup_images=40_000)).train(CELEBA).alerted) == 1


@pytest.mark.parametrize(
    ("presets", "remedy"),
    [
        ({"kl_beta_floor": 0.5}, "above its target range 0.01 to 0.03|at kl/beta_floor"),
        (
            {"kl_beta_floor": 0.0, "kl_beta_max": 1.5e-4},
            "below its target range 0.01 to 0.03|at training_presets.kl_beta_max",
        ),
        (
            {"kl_beta_floor": 0.0, "kl_beta_min": 0.2, "kl_beta_init": 0.3},
            "above its target range 0.01 to 0.03|at training_presets.kl_beta_min",
        ),
    ],
)
def test_a_fraction_outside_its_target_range_is_reported_with_the_bound_of_beta(presets, remedy):
    """The first two epochs of a cycle are a low-beta phase, which is not counted."""
    run = SimulatedRun(replace(PRESETS, **presets)).train(3 * CELEBA)
    when, message = first_alert(run, "kl/smoothed_fraction")
    for part in remedy.split("|"):
        assert part in message
    limit = (math.log(run.presets.kl_beta_max / run.presets.kl_beta_min) / 0.7 + 4) * 2048
    assert 2 * 162_000 + limit - 3200 <= when <= 2 * CELEBA + limit + 2 * 3200
    assert len(run.alerted) == 1


def test_a_fraction_that_crosses_its_limit_repeatedly_is_reported_once():
    """The minimum beta of the default schedule in late epochs: the fraction slowly leaves its target range."""

    class Drifting(SimulatedRun):
        def window(self, values):
            drift = 0.03 + 0.001 * math.sin(self.images / 5000) + 0.003 * min(1.0, self.images / 2_000_000)
            return values | {"kl/smoothed_fraction": drift, "kl/target_low": 0.01, "kl/target_high": 0.03}

    run = Drifting().train(2_000_000)
    when, message = first_alert(run, "kl/smoothed_fraction 0.0")
    assert len(run.alerted) == 1
    assert "for 48612 images" in message and when > 100_000


def test_the_controller_has_time_to_cross_its_full_range():
    for init in (1e-6, 1.0):
        presets = replace(PRESETS, kl_beta_init=init, kl_beta_floor=0.0, kl_cycle_enabled=False)
        assert [text for _, text in SimulatedRun(presets).train(2 * CELEBA).alerted if text.startswith("kl/")] == []


def test_without_kl_control_there_is_no_target_range():
    presets = replace(PRESETS, kl_control_enabled=False, kl_beta_init=0.5)
    assert SimulatedRun(presets).train(3 * CELEBA).alerted == []


# ---- metrics and state ----


@pytest.mark.parametrize("value", [None, "missing", math.nan, math.inf])
def test_missing_and_non_finite_metrics_neither_start_nor_clear_alerts(value):
    class Broken(SimulatedRun):
        def window(self, values):
            names = list(values) if self.step % 500 == 0 else []
            return {name: value if name in names else number for name, number in values.items()}

        def validation(self, values):
            return {name: value for name in values} if self.epoch == 1 else values

    run = Broken().train(3 * CELEBA)
    assert all("metrics not finite" in message for _, message in run.alerted)
    assert bool(run.alerted) == isinstance(value, float)
    assert math.isfinite(run.alerts.state_dict()["loss"][0])


def test_non_finite_metrics_are_named_once_until_all_are_finite_again():
    alerts = Alerts(PRESETS)
    broken = {"loss/total": math.nan, "loss/mse": 0.1, "weighted/kl": math.inf}
    windows = [broken, broken, {"loss/total": 0.2}, broken]
    found = [alerts.observe_window(values, images_seen=64 * n, step=n) for n, values in enumerate(windows, 1)]
    message = "training metrics not finite: loss/total, weighted/kl"
    assert found == [[message], [], [], [message]]
    values = {"reconstruction_loss": math.nan, "active_units": 0}
    assert alerts.observe_validation(values, images_seen=256, learning_rate=1e-4, latent_dim=16) == [
        "validation metrics not finite: reconstruction_loss"
    ]


def test_every_metric_that_is_checked_is_logged_by_the_trainer():
    """A misspelled name would be ignored silently."""
    from training.tracking.progress import Progress

    checked: set[str] = set()

    class Recording(dict):
        def get(self, name, default=None):
            checked.add(name)
            return super().get(name, default)

    parts = {"total": 0.06, "reconstruction": 0.059, "mse": 0.01, "kl": 2.0, "weighted/kl": 0.001}
    # As tests/losses/test_adversarial.py finds them in a log.
    adversarial = {"discriminator": 0.6, "discriminator/skipped": 0.0, "adversarial": 0.7, "weighted/adversarial": 0.1}
    logged: set[str] = set()
    for terms in (parts, parts | adversarial):
        progress, kl = Progress(), KLController(PRESETS)
        progress.add_step(terms, beta=5e-4, grad_norm=2.0, max_grad_norm=1.0, seconds=0.1, waited=0.01)
        kl.observe(kl=2.0, reconstruction=0.059, num_images=64, epoch=3, images_seen=10**6)
        values = Recording(progress.take_window(PRESETS, kl, latent_dim=LATENT_DIM, learning_rate=5e-5))
        Alerts(PRESETS).observe_window(values, images_seen=10**6, step=10**4)
        logged |= set(values)
    assert len(checked) == 13
    assert checked <= logged


def test_a_resumed_run_has_the_alerts_of_an_uninterrupted_one():
    class Faulty(SimulatedRun):
        def loss(self):
            return 0.065 if self.images < 250_000 else 0.2

        def window(self, values):
            return values | {"speed/data_wait_fraction": 0.6, "optim/skipped_steps": self.step // 15}

        def validation(self, values):
            return values | {"active_units": 1024.0 / (1 + self.epoch)}

    full, resumed = Faulty(seed=5, images_per_epoch=50_000), Faulty(seed=5, images_per_epoch=50_000)
    full.train(400_000)
    for end in range(13_000, 400_000, 37_000):
        resumed.train(end)
        state = json.loads(json.dumps(resumed.alerts.state_dict(), allow_nan=False))
        resumed.alerts = Alerts(PRESETS)
        resumed.alerts.load_state_dict(state)
        assert resumed.alerts.state_dict() == state
        state["active"].append("changed")
        state["loss"][0] = 1  # a copy was taken
        restored = resumed.alerts.state_dict()
        assert "changed" not in restored["active"] and restored["loss"][0] != 1
    resumed.train(400_000)
    assert len(full.alerted) == 5
    assert resumed.alerted == full.alerted and resumed.alerts.state_dict() == full.alerts.state_dict()


def test_the_state_stays_small():
    run = SimulatedRun().train(4 * CELEBA)
    assert len(json.dumps(run.alerts.state_dict())) < 1000


def test_a_state_with_one_field_more_and_one_less_is_restored(caplog):
    alerts, run = Alerts(PRESETS), SimulatedRun().train(CELEBA)
    saved = run.alerts.state_dict()
    del saved["early_sum"]
    alerts.load_state_dict(saved | {"new_counter": 1})
    assert alerts.state_dict() == run.alerts.state_dict() | {"early_sum": 0.0}
    assert "alerts: ignored unknown fields: new_counter" in caplog.text
    assert "alerts: fields missing, defaults used: early_sum" in caplog.text


def test_the_thresholds_that_clear_an_alert_differ_from_those_that_start_it():
    assert alerts._CLIPPED_CLEARS < alerts.CLIPPED and alerts._SKIPPED_CLEARS < alerts.SKIPPED
    assert alerts._DATA_WAIT_CLEARS < alerts.DATA_WAIT and alerts._ACTIVE_CLEARS > alerts.ACTIVE_FRACTION
    assert alerts._RISE_CLEARS > 1 and alerts._COLLAPSE_CLEARS > 1
