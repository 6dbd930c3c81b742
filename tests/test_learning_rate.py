"""Warm-up and plateau of the learning rate, and its state in checkpoints."""

from __future__ import annotations

import pytest
import torch

from training.config import TrainingPresets
from training.learning_rate import LearningRate


def build(**settings) -> LearningRate:
    presets = TrainingPresets(**({"learning_rate": 1e-3, "lr_warmup_steps": 3, "plateau_patience": 1} | settings))
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3 * scale, "lr_scale": scale} for scale in (1, 0.1)
    ]
    return LearningRate(torch.optim.Adam(groups), presets)


def rates(learning_rate: LearningRate) -> list[float]:
    return learning_rate.state_dict()["rates"]


def test_warm_up_is_linear_in_every_group():
    learning_rate, seen = build(), []
    for step in range(5):
        learning_rate.before_step(step, step / 5)
        seen.append(rates(learning_rate))
    wanted = [[2.5e-4, 2.5e-5], [5e-4, 5e-5], [7.5e-4, 7.5e-5], [1e-3, 1e-4], [1e-3, 1e-4]]
    assert torch.allclose(torch.tensor(seen), torch.tensor(wanted))


def test_the_plateau_counts_epochs_after_the_warm_up():
    learning_rate = build()
    learning_rate.before_step(3, 0.0)
    assert [learning_rate.after_epoch(1.0, step=3) for _ in range(5)] == [(1e-3, 1e-3)] * 5  # still warming up
    assert [learning_rate.after_epoch(1.0, step=4)[1] for _ in range(3)] == [1e-3, 1e-3, 5e-4]
    assert rates(learning_rate) == [5e-4, pytest.approx(5e-5)]


def test_the_rate_never_falls_below_its_minimum():
    learning_rate = build(min_learning_rate=4e-4)
    for _ in range(12):
        learning_rate.after_epoch(1.0, step=10)
    assert rates(learning_rate) == [4e-4, pytest.approx(4e-5)]


def test_a_restored_state_continues_and_follows_a_changed_configuration():
    before = build()
    for _ in range(3):
        before.after_epoch(1.0, step=10)
    same, changed = build(), build(learning_rate=2e-3)
    for each in (same, changed):
        each.load_state_dict(before.state_dict())
    assert same.state_dict() == before.state_dict()
    assert changed.value == pytest.approx(2 * before.value)
    assert [each.after_epoch(1.0, step=10)[1] for each in (same, same, before, before)] == [5e-4, 2.5e-4] * 2


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1e-3] * 5),
        ("cosine", [1e-3, 8.5355e-4, 5e-4, 1.4645e-4, 0.0]),
        ("warmup_stable_decay", [1e-3, 1e-3, 1e-3, 2.9289e-4, 0.0]),  # 1 - sqrt(1 / 2) in the middle of the decay
    ],
)
def test_schedules_follow_the_fraction_of_the_run_in_every_group(schedule, wanted):
    learning_rate = build(lr_schedule=schedule, lr_decay_fraction=0.5, min_learning_rate=0.0)
    for quarter, rate in enumerate(wanted):
        learning_rate.before_step(100, quarter / 4)
        assert rates(learning_rate) == [pytest.approx(rate, abs=1e-8), pytest.approx(0.1 * rate, abs=1e-8)]
        assert learning_rate.after_epoch(1.0, step=100) == (learning_rate.value, learning_rate.value)
    assert learning_rate.bad_epochs == 0
    learning_rate.before_step(1, 0.0)
    assert learning_rate.value == pytest.approx(5e-4)  # warming up


def test_schedules_end_at_the_minimum():
    learning_rate = build(lr_schedule="cosine", min_learning_rate=1e-4)
    learning_rate.before_step(100, 0.5)
    assert learning_rate.value == pytest.approx(5.5e-4)
    learning_rate.before_step(100, 1.0)
    assert learning_rate.value == pytest.approx(1e-4)
