"""Progress and its metrics."""

from __future__ import annotations

import dataclasses
import math

import psutil
import pytest

from training.config import TrainingPresets
from training.losses.kl_control import KLController
from training.tracking import progress as progress_module
from training.tracking.progress import Progress, ProgressLine

PRESETS = TrainingPresets()


def add_step(progress: Progress, **terms: float) -> None:
    parts = {"total": 0.5, "reconstruction": 0.4, "mse": 0.1, "kl": 2.0, "weighted/kl": 0.1} | terms
    progress.add_step(parts, beta=1e-3, grad_norm=2.0, max_grad_norm=1.0, seconds=0.5, waited=0.1)


def take_window(progress: Progress) -> dict:
    return progress.take_window(PRESETS, KLController(PRESETS), latent_dim=16, learning_rate=1e-4)


def test_a_window_is_logged_as_means_over_its_steps():
    progress = Progress()
    add_step(progress, mse=0.1)
    add_step(progress, mse=0.3)
    values = take_window(progress)
    assert values["loss/mse"] == pytest.approx(0.2) and values["kl/loss_fraction"] == pytest.approx(0.2)
    assert values["kl/nats_per_image"] == 32.0 and values["optim/clipped_fraction"] == 1.0
    assert values["speed/images_per_second"] == pytest.approx(2 * PRESETS.batch_size)
    assert values["speed/data_wait_fraction"] == pytest.approx(0.2)
    assert progress.window == {} and progress.train_seconds == 1.0


def test_the_kl_fraction_is_of_the_terms_that_are_controlled():
    progress = Progress()
    add_step(progress, total=0.9, **{"weighted/adversarial": 0.4})
    assert take_window(progress)["kl/loss_fraction"] == pytest.approx(0.2)


def test_the_time_left_knows_the_pixels_of_each_epoch():
    presets = TrainingPresets(num_epochs=4, batch_size=8)
    progress = Progress(epoch=0, batch=5)
    small_first = [0.25, 0.25, 1.0, 1.0]
    assert progress.seconds_left(presets, 10, 8.0) == 35
    assert progress.seconds_left(presets, 10, 8.0, small_first.__getitem__) == 5 + 10 + 2 * 40


def test_a_step_without_measurements_counts_in_the_speed_only():
    progress = Progress()
    overflow = {"beta": 1e-3, "grad_norm": math.inf, "max_grad_norm": 1.0, "seconds": 0.5, "waited": 0.1}
    progress.add_step(None, **overflow)
    assert not progress.has_measurements  # such a window is not logged
    add_step(progress, mse=0.1)
    progress.add_step(None, **overflow)
    assert progress.has_measurements
    values = take_window(progress)
    assert values["loss/mse"] == pytest.approx(0.1) and values["optim/grad_norm"] == 2.0
    assert values["speed/images_per_second"] == pytest.approx(2 * PRESETS.batch_size)


def test_a_loss_term_of_a_user_is_logged_under_its_own_name():
    progress = Progress()
    add_step(progress, **{"edges": 0.7, "weighted/edges": 0.07})
    values = take_window(progress)
    assert values["loss/edges"] == 0.7 and values["weighted/edges"] == 0.07


def test_a_state_with_one_field_more_and_one_less_is_restored(caplog):
    progress = Progress(epoch=3, step=40, skipped_steps=2, best={"step": 30}, window={"steps": 1.0, "measured": 1.0})
    saved = progress.state_dict()
    del saved["rollbacks"]
    restored = Progress()
    restored.load_state_dict(saved | {"new_counter": 1})
    assert restored == progress and [field.name for field in dataclasses.fields(restored)] == list(vars(restored))
    assert "progress: ignored unknown fields: new_counter" in caplog.text
    assert "progress: fields missing, defaults used: rollbacks" in caplog.text


def test_the_window_of_an_older_checkpoint_counts_its_steps():
    progress = Progress()
    add_step(progress, mse=0.1)
    add_step(progress, mse=0.1)
    saved = progress.state_dict()
    del saved["window"]["measured"]
    restored = Progress()
    restored.load_state_dict(saved)
    add_step(restored, mse=0.4)
    assert take_window(restored)["loss/mse"] == pytest.approx(0.2)


def test_the_state_is_a_copy():
    progress = Progress(window={"steps": 1.0})
    saved = progress.state_dict()
    progress.window["steps"] = 2.0
    assert saved["window"] == {"steps": 1.0}


def test_unknown_memory_is_none(monkeypatch):
    def denied():
        raise psutil.AccessDenied()

    monkeypatch.setattr(progress_module.psutil, "Process", denied)
    progress = Progress()
    add_step(progress)
    assert take_window(progress)["speed/memory_gib"] is None


def test_the_progress_line_shows_non_finite_metrics(caplog):
    progress = Progress(epoch=0, step=7)
    add_step(progress, total=math.nan)
    with caplog.at_level("INFO"):
        ProgressLine(None).show(progress, take_window(progress), 60.0)
    assert "epoch 1 step 7: loss nan mse 0.10000 kl 2.000 " in caplog.text and "time_left 0:01:00" in caplog.text


def test_the_fraction_of_a_run():
    progress = Progress(epoch=2, batch=3, steps_per_epoch=6)
    assert progress.fraction(10) == 0.25
    for unknown in (None, 0):
        progress.steps_per_epoch = unknown
        assert progress.fraction(10) == 0.2
    assert Progress(epoch=1, batch=9, steps_per_epoch=6).fraction(2) == 1.0  # epochs were longer than expected
