"""The KL control against closed forms, and on a simulated training that responds to beta with lag and noise."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest

from training.config import KLSchedule
from training.losses.kl_control import KLController
from training.losses.kl_simulation import SimulatedPlant, main, simulate

HALF_LIFE = 2048
LAW_ONLY = {"kl_cycle_enabled": False, "kl_beta_floor": 0.0, "kl_warmup_images": 0}  # no warm-up, cycle or minimum beta


def fraction_of(beta: float, kl: float, reconstruction: float) -> float:
    return beta * kl / (reconstruction + beta * kl)


def log_odds(fraction: float) -> float:
    return math.log(fraction) - math.log1p(-fraction)


def feed(controller: KLController, ratio: float, images: int, *, interval: int = 64, epoch: int = 5) -> None:
    """Observe `images` images with KL / reconstruction = ratio, long after any warm-up."""
    for _ in range(images // interval):
        loss = 2.0 / ratio
        controller.observe(kl=2.0, reconstruction=loss, num_images=interval, epoch=epoch, images_seen=10**9)


def inside(record: dict) -> bool:
    return record["low"] <= record["fraction"] <= record["high"]


class CollapsingPlant(SimulatedPlant):
    """Its KL is exactly 0 where beta reaches the knee: the KL fraction falls as beta rises."""

    def advance(self, beta: float, num_images: int) -> tuple[float, float]:
        settled = self.scale * max(0.0, math.log(self.knee / beta))
        self.kl += (settled - self.kl) * -math.expm1(-num_images / self.lag_images)
        return self.kl, 0.05 + 0.5 * min(beta, self.knee)


@pytest.mark.parametrize(
    ("epoch", "reduced"),
    [(0, True), (1, True), (2, False), (7, False), (8, True), (9, True), (10, False), (15, False), (16, True)]
    + [(17, True), (18, False), (191, False), (192, True), (193, True), (194, False), (199, False)],
)
def test_every_boundary_epoch_of_the_cycle(epoch, reduced):
    controller = KLController(KLSchedule(kl_beta_init=0.01))
    factor = 0.25 if reduced else 1.0
    assert controller.in_low_beta_phase(epoch) is reduced
    assert controller.beta(epoch, 10**9) == pytest.approx(0.01 * factor, rel=1e-12)
    assert controller.target_range(epoch) == pytest.approx((0.01 * factor, 0.03 * factor), rel=1e-12)


@pytest.mark.parametrize("off", [{"kl_cycle_enabled": False}, {"kl_cooldown_epochs": 0}])
def test_cycle_can_be_turned_off(off):
    controller = KLController(KLSchedule(**off))
    assert not any(controller.in_low_beta_phase(epoch) for epoch in range(20))
    assert {controller.target_range(epoch) for epoch in range(20)} == {(0.01, 0.03)}


def test_minimum_beta_grows_with_the_epoch_up_to_the_maximum():
    controller = KLController(KLSchedule())
    assert controller.minimum_beta(0) == 5e-5
    assert controller.minimum_beta(1) == pytest.approx(5.1e-5, rel=1e-12)
    assert controller.minimum_beta(10) == pytest.approx(5e-5 * 1.02**10, rel=1e-12)
    assert controller.minimum_beta(200) == pytest.approx(2.6e-3, rel=0.02)
    assert controller.minimum_beta(100_000) == 1.0  # 1.02**100000 overflows
    assert KLController(KLSchedule(kl_beta_floor=0.0)).minimum_beta(200) == 0.0


def test_beta_is_at_least_its_minimum_in_warm_up_low_beta_phases_and_later():
    controller = KLController(KLSchedule(kl_beta_init=1e-4, kl_warmup_images=1000))
    assert controller.beta(2, 0) == controller.minimum_beta(2)  # ramp 0
    assert controller.beta(8, 10**6) == controller.minimum_beta(8)  # 1e-4 / 4 is below it
    assert controller.beta(10, 10**6) == pytest.approx(1e-4, rel=1e-12)
    assert controller.beta(100, 10**6) == controller.minimum_beta(100) > 1e-4


def test_warm_up_is_linear_and_log_beta_is_frozen_until_its_end():
    controller = KLController(KLSchedule(kl_beta_init=0.5, kl_warmup_images=1000))
    for images in (10, 250, 500, 999, 1000, 1001, 5000):
        assert controller.beta(5, images) == pytest.approx(0.5 * min(1, images / 1000), rel=1e-12)
    before = controller.log_beta
    controller.observe(kl=2.0, reconstruction=0.1, num_images=500, epoch=5, images_seen=500)
    assert controller.log_beta == before
    assert controller.smoothed_fraction == pytest.approx(
        fraction_of(0.25, 2.0, 0.1), rel=1e-12
    )  # the average is updated
    controller.observe(kl=2.0, reconstruction=0.1, num_images=500, epoch=5, images_seen=1000)
    assert controller.log_beta < before


def test_smoothed_fraction_is_bias_corrected_and_weighted_by_images():
    controller = KLController(KLSchedule(**LAW_ONLY))
    assert controller.smoothed_fraction is None
    feed(controller, 200.0, HALF_LIFE, interval=HALF_LIFE)
    assert controller.smoothed_fraction == pytest.approx(fraction_of(1e-4, 200.0, 1.0), rel=1e-12)
    feed(controller, 250.0, 2 * HALF_LIFE, interval=2 * HALF_LIFE)  # weight 3/4 against 1/2 * 1/4
    mean = (0.125 * math.log(200.0) + 0.75 * math.log(250.0)) / 0.875
    assert controller.smoothed_fraction == pytest.approx(fraction_of(1e-4, math.exp(mean), 1.0), rel=1e-12)
    assert controller.smoothed_kl == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("fraction", [0.0101, 0.0173, 0.0299])
def test_beta_is_constant_inside_the_target_range(fraction):
    controller = KLController(KLSchedule(**LAW_ONLY))
    before = controller.log_beta
    feed(controller, fraction / (1 - fraction) / 1e-4, 20 * HALF_LIFE)
    assert controller.log_beta == before


@pytest.mark.parametrize("fraction", [0.0099, 0.004, 0.0301, 0.06])
def test_step_outside_the_target_range_is_proportional_to_the_error(fraction):
    controller = KLController(KLSchedule(**LAW_ONLY))
    before = controller.log_beta
    feed(controller, fraction / (1 - fraction) / 1e-4, 512, interval=512)
    error = (log_odds(0.01) + log_odds(0.03)) / 2 - log_odds(fraction)
    assert controller.log_beta - before == pytest.approx((1 - math.exp(-0.5 * 512 / 2048)) * error, rel=1e-9)


@pytest.mark.parametrize(("fraction", "sign"), [(1e-5, 1), (0.9, -1)])
def test_step_is_limited_per_half_life(fraction, sign):
    controller = KLController(KLSchedule(**LAW_ONLY, kl_beta_init=1e-3))
    feed(controller, fraction / (1 - fraction) / 1e-3, HALF_LIFE)
    assert controller.log_beta - math.log(1e-3) == pytest.approx(sign * 0.7, rel=1e-9)


@pytest.mark.parametrize("fraction", [0.001, 0.5])
def test_a_correction_ends_well_inside_the_target_range(fraction):
    controller = KLController(KLSchedule(**LAW_ONLY, kl_beta_init=1e-3))
    feed(controller, fraction / (1 - fraction) / 1e-3, 40 * HALF_LIFE)
    center, width = (log_odds(0.01) + log_odds(0.03)) / 2, log_odds(0.03) - log_odds(0.01)
    distance = abs(log_odds(controller.smoothed_fraction) - center)
    assert 0.24 * width < distance <= 0.25 * width


def test_cycle_boundaries_do_not_change_log_beta():
    """With KL and loss constant, the fraction changes with beta alone, as the target range does."""
    controller = KLController(KLSchedule(kl_beta_init=1e-3, kl_beta_floor=0.0, kl_warmup_images=0))
    for epoch in range(20):
        feed(controller, 20.0, 1024, epoch=epoch)
        assert controller.log_beta == math.log(1e-3)
        beta = 2.5e-4 if epoch % 8 < 2 else 1e-3
        assert controller.smoothed_fraction == pytest.approx(fraction_of(beta, 20.0, 1.0), rel=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("lag", [HALF_LIFE // 4, HALF_LIFE, 4 * HALF_LIFE])
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_settles_in_the_target_range_and_stays_through_cycles(factor, lag, noise):
    # At 7e-4 the fraction of the plant is in the center of the target range.
    schedule = KLSchedule(kl_beta_init=7e-4 * factor, kl_beta_floor=0.0)
    controller = KLController(schedule)
    plant = SimulatedPlant(lag_images=lag, noise=noise, end=0.05, decay_images=200_000)
    records = list(simulate(controller, plant, 24, 10_000))
    assert all(1e-6 <= record["beta"] <= 1.0 for record in records)
    judged = [record for record in records if record["images"] > 30_000 and not record["low_beta_phase"]]
    assert sum(map(inside, judged)) >= 0.97 * len(judged)
    assert 0.5e-4 < math.exp(controller.log_beta) < 1e-2
    # No oscillation: log beta has hardly moved in 210,000 images, beyond the fall of the loss (log 3).
    total = sum(abs(math.log(b["beta"] / a["beta"])) for a, b in itertools.pairwise(judged))
    assert total < 3


@pytest.mark.parametrize("factor", [1 / 3, 3.0, 20.0])
def test_recovers_from_a_jump_of_the_reconstruction_loss(factor):
    controller = KLController(KLSchedule(kl_cycle_enabled=False, kl_beta_init=7e-4))
    plant = SimulatedPlant(start=0.05, end=0.05, noise=0.05)
    assert inside(list(simulate(controller, plant, 1, 40_000))[-1])
    plant.start = plant.end = 0.05 * factor
    out_again = []
    for images in range(40_640, 100_000, 640):
        kl, loss = plant.advance(controller.beta(0, images), 640)
        controller.observe(kl=kl, reconstruction=loss, num_images=640, epoch=0, images_seen=images)
        low, high = controller.target_range(0)
        if not low <= controller.smoothed_fraction <= high:
            out_again.append(images)
    assert not out_again or out_again[-1] < 40_000 + 8 * HALF_LIFE


def test_trajectory_does_not_depend_on_the_observation_interval():
    ends = []
    for interval in (80, 640):
        controller = KLController(KLSchedule(kl_beta_init=0.05))
        plant = SimulatedPlant(noise=0.0)
        records = simulate(controller, plant, 12, 10_240, interval)
        ends.append([math.log(r["beta"]) for r in records if r["images"] % 640 == 0 and r["images"] >= 2560])
    fine, coarse = ends
    assert max(fine) - min(fine) > 3  # beta changes at all
    differences = [abs(a - b) for a, b in zip(fine, coarse, strict=True)]
    assert max(differences) < 0.7 * 640 / HALF_LIFE  # one step of the coarse run
    assert sum(differences) / len(differences) < 0.08


@pytest.mark.parametrize(("images_per_epoch", "epochs"), [(1000, 5), (162_770, 3)])
def test_short_and_long_runs_work_with_the_defaults(images_per_epoch, epochs):
    controller = KLController(KLSchedule(kl_cycle_enabled=False))
    records = list(simulate(controller, SimulatedPlant(), epochs, images_per_epoch))
    assert all(record["beta"] >= record["minimum_beta"] for record in records)
    assert records[-1]["beta"] > 1.4e-4  # increased from 1e-4, toward the target range
    assert epochs == 5 or inside(records[-1])


@pytest.mark.parametrize(
    ("settings", "limit", "saturating", "opposite"),
    [
        ({"kl_beta_max": 0.01}, 0.01, 0.01, 100.0),
        ({"kl_beta_min": 1e-5}, 1e-5, 1e6, 10.0),
        ({"kl_beta_floor": 4e-5, "kl_floor_growth": 1.0}, 4e-5, 1e6, 1.0),
    ],
)
def test_no_wind_up_at_the_limits_of_beta(settings, limit, saturating, opposite):
    controller = KLController(KLSchedule(**{**LAW_ONLY, **settings}))
    feed(controller, saturating, 200 * HALF_LIFE)
    assert math.exp(controller.log_beta) == pytest.approx(limit, rel=1e-12)
    # It leaves when the average, which decays by 2**-t to its new value, passes the far end of the target range.
    old, new = math.log(limit * saturating), math.log(limit * opposite)
    edge = log_odds(0.03 if new > old else 0.01)
    expected = HALF_LIFE * math.log2((new - old) / (new - edge))
    feed(controller, opposite, int(expected) - 64)
    assert math.exp(controller.log_beta) == pytest.approx(limit, rel=1e-12)
    feed(controller, opposite, 192)
    assert math.exp(controller.log_beta) != pytest.approx(limit, rel=1e-6)
    assert expected < 2 * HALF_LIFE


def test_rising_minimum_raises_log_beta_and_releases_it():
    controller = KLController(KLSchedule(kl_cycle_enabled=False, kl_warmup_images=0))
    for epoch in range(200):  # in the end the fraction is 7 %, above its range, but beta is at its minimum
        feed(controller, 30.0, HALF_LIFE, epoch=epoch)
        assert controller.beta(epoch, 10**9) >= controller.minimum_beta(epoch)
    assert controller.log_beta == pytest.approx(math.log(controller.minimum_beta(199)), abs=1e-12)
    feed(controller, 1.0, 3 * HALF_LIFE, epoch=199)
    assert controller.log_beta > math.log(controller.minimum_beta(199)) + 0.1


def test_collapse_decreases_beta_where_the_fraction_would_increase_it():
    betas = {}
    for threshold in (0.0, 0.01):
        schedule = KLSchedule(kl_beta_init=1.0, kl_collapse_nats=threshold, kl_warmup_images=20_000)
        controller = KLController(schedule)
        records = list(simulate(controller, CollapsingPlant(lag_images=2048), 16, 10_000))
        betas[threshold] = records[-1]["beta"]
        assert inside(records[-1]) is (threshold > 0)
        assert controller.collapsed is False  # never with kl_collapse_nats = 0
    assert betas[0.0] == 1.0
    assert betas[0.01] < 2e-3


def test_collapse_is_detected_and_ends():
    controller = KLController(KLSchedule(kl_warmup_images=0))
    controller.observe(kl=0.0, reconstruction=0.1, num_images=640, epoch=5, images_seen=640)
    assert controller.collapsed
    assert controller.log_beta < math.log(1e-4)
    feed(controller, 100.0, 3 * HALF_LIFE)
    assert not controller.collapsed


NON_FINITE = [{key: value} for key in ("kl", "reconstruction") for value in (math.nan, math.inf)]


@pytest.mark.parametrize("bad", [*NON_FINITE, {"kl": -1.0}, {"reconstruction": 0.0}, {"num_images": 0}])
def test_invalid_observations_are_ignored(bad):
    controller = KLController(KLSchedule())
    feed(controller, 20.0, 5 * HALF_LIFE)
    before = controller.state_dict()
    good = {"kl": 2.0, "reconstruction": 0.1, "num_images": 64, "epoch": 5, "images_seen": 10**9}
    controller.observe(**{**good, **bad})
    assert controller.state_dict() == before


def test_without_control_beta_is_constant_after_the_warm_up_and_averages_are_updated():
    controller = KLController(KLSchedule(kl_beta_init=0.1, kl_warmup_images=1000), controlled=False)
    for epoch in (0, 2, 8, 150):
        assert controller.beta(epoch, 500) == pytest.approx(0.05, rel=1e-12)
        assert controller.beta(epoch, 2000) == pytest.approx(0.1, rel=1e-12)
        assert (controller.target_range(epoch), controller.in_low_beta_phase(epoch)) == ((0.01, 0.03), False)
        assert controller.minimum_beta(epoch) == 0.0
    feed(controller, 100.0, 30 * HALF_LIFE)
    assert controller.beta(5, 10**9) == pytest.approx(0.1, rel=1e-12)
    assert controller.smoothed_fraction == pytest.approx(fraction_of(0.1, 100.0, 1.0), rel=1e-9)


@pytest.mark.parametrize("stop", [3, 15, 60, 81, 97])
def test_resume_within_a_cycle_is_bit_exact(stop):
    """Saves in the warm-up, in a low-beta phase, between two, in the second one and after it."""
    rng = random.Random(7)
    losses = [(rng.lognormvariate(0.5, 0.6), rng.lognormvariate(-3 + i / 40, 0.3)) for i in range(200)]
    schedule = KLSchedule(kl_beta_init=3e-3)

    def run(controller: KLController, steps: range) -> list[tuple]:
        trace = []
        for i in steps:
            kl, loss = losses[i]
            where = {"epoch": i // 10, "images_seen": 640 * (i + 1)}
            controller.observe(kl=kl, reconstruction=loss, num_images=640, **where)
            trace.append((controller.beta(**where), controller.smoothed_fraction))
        return trace

    uninterrupted = run(KLController(schedule), range(200))
    first = KLController(schedule)
    head = run(first, range(stop))
    second = KLController(schedule)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.smoothed_fraction == first.smoothed_fraction
    assert head + run(second, range(stop, 200)) == uninterrupted
    assert len({beta for beta, _ in uninterrupted}) > 20


@pytest.mark.parametrize("change", [{"log_beta": math.nan}, {"weight": None}, {"log_kl_sum": "1"}, {"correcting": 1.0}])
def test_an_invalid_state_is_refused_and_the_controller_unchanged(change):
    controller = KLController(KLSchedule())
    before = controller.state_dict()
    with pytest.raises(ValueError, match=rf"{next(iter(change))} is .*older checkpoint"):
        controller.load_state_dict({**before, **change})
    assert controller.state_dict() == before


def test_a_state_of_another_version_loads(caplog):
    saved = KLController(KLSchedule())
    feed(saved, 500.0, HALF_LIFE)
    state = {**saved.state_dict(), "held": "at floor"}
    del state["correcting"]
    loaded = KLController(KLSchedule())
    loaded.load_state_dict(state)
    assert loaded.state_dict() == {**saved.state_dict(), "correcting": False}
    assert caplog.messages == [
        "KL controller state: ignored unknown fields: held",
        "KL controller state: fields missing, defaults used: correcting",
    ]


INVALID_SETTINGS = {
    "kl_target_low": [0.0, -0.01],
    "kl_target_high": [0.01, 1.0],
    "kl_beta_min": [0.0],
    "kl_beta_max": [1e-6, 0.0],
    "kl_beta_init": [2.0, 1e-7, math.nan, "1e-4", None],
    "kl_half_life_images": [0, 2048.0],
    "kl_gain": [0.0, 2.5],
    "kl_max_step": [0.0, math.inf],
    "kl_warmup_images": [-1],
    "kl_collapse_nats": [-0.01, 1e-5],
    "kl_cycle_enabled": [1],
    "kl_cycle_period": [0, True],
    "kl_cooldown_epochs": [-1, 8],
    "kl_cooldown_reduction": [0.0, 1.5],
    "kl_beta_floor": [-1e-5, 2.0],
    "kl_floor_growth": [0.98],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in INVALID_SETTINGS.items() for value in values]
)
def test_invalid_settings_are_errors_with_key_and_value(key, value):
    with pytest.raises(ValueError) as caught:
        KLSchedule(**{key: value})
    text = str(caught.value)
    assert text.startswith(f"training_presets.{key} must be ") and text.endswith(f", got {json.dumps(value)}.")


def test_command_plots_the_simulation(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"training_presets": {"kl_warmup_images": 640, "batch_size": 8}}))
    arguments = ["--config", str(config), "--output", str(tmp_path / "kl.png")]
    assert main([*arguments, "--epochs", "10", "--images-per-epoch", "1280"]) == 0
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert "12 of 20 observations outside warm-up and low-beta phases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "output", "message"),
    [
        (None, "kl.png", "No such file"),
        ("{", "kl.png", "is not JSON"),
        ('{"training_presets": {"kl_gain": -1}}', "kl.png", "training_presets.kl_gain must be greater than 0"),
        ("{}", "kl.txt", "must be a file that ends in .png"),
    ],
)
def test_command_errors_are_one_line(tmp_path, capsys, text, output, message):
    config = tmp_path / "config.json"
    if text is not None:
        config.write_text(text)
    assert main(["--config", str(config), "--output", str(tmp_path / output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / output).exists()
