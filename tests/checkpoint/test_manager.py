"""When a checkpoint is due, which model is the best, what a failed write costs, and the way back to a checkpoint."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from training.checkpoint import format as checkpoint_format
from training.checkpoint.manager import CheckpointManager
from training.checkpoint.state import TrainingState
from training.config import OutputConfig
from training.run_files import list_checkpoints, read_state
from training.tracking.progress import Progress

MODEL_FILES = {"config.json": b"{}\n"}


@pytest.fixture
def build(session, tmp_path):
    """Builds a manager over a linear layer and Adam; `warnings` collects what it warns of."""

    def build(**output) -> SimpleNamespace:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(model.parameters())
        progress, warnings = Progress(), []
        manager = CheckpointManager(
            tmp_path / "run",
            OutputConfig(**({"checkpoint_every_minutes": None} | output)),
            TrainingState(Accelerator(cpu=True), model, optimizer, None, {"progress": progress}),
            progress,
            description=lambda: {"config": {}, "processes": 1},
            model_files=lambda: MODEL_FILES,
            warn=warnings.append,
        )
        return SimpleNamespace(manager=manager, model=model, optimizer=optimizer, progress=progress, warnings=warnings)

    (tmp_path / "run").mkdir()
    return build


def train(run: SimpleNamespace) -> None:
    run.model(torch.ones(4, 3)).sum().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.progress.step += 1
    run.progress.images_seen += 4


def validation(loss: float) -> dict[str, float]:
    return {"validation/reconstruction_loss": loss}


def names(run: SimpleNamespace) -> list[str]:
    return [path.name for path in list_checkpoints(run.manager.run_dir)]


def test_due_by_images(build):
    run = build(checkpoint_every_images=8)
    seen = []
    for _ in range(4):
        train(run)
        seen.append(run.manager.images_due)
        if seen[-1]:
            run.manager.save()
    run.manager.wait()
    assert seen == [False, True, False, True]
    assert names(run) == ["step_00000002", "step_00000004"]


def test_due_by_minutes(build, monkeypatch):
    run, now = build(checkpoint_every_minutes=2.0), time.monotonic()
    assert not run.manager.minutes_due
    monkeypatch.setattr(time, "monotonic", lambda: now + 121)
    assert run.manager.minutes_due


def test_due_at_the_end_of_an_epoch(build):
    run = build(checkpoint_every_epochs=3)
    run.progress.epoch = 2
    assert not run.manager.is_due_at_epoch(is_best=False, is_last=False)
    assert run.manager.is_due_at_epoch(is_best=True, is_last=False)
    assert run.manager.is_due_at_epoch(is_best=False, is_last=True)
    run.progress.epoch = 3
    assert run.manager.is_due_at_epoch(is_best=False, is_last=False)


def test_the_best_model_is_better_by_the_threshold(build):
    run = build()
    seen = [run.manager.update_best(loss, validation(loss), 0.01) for loss in (math.nan, 1.0, 0.995, 0.98, math.nan)]
    assert seen == [False, True, False, True, False]
    assert run.progress.best["validation/reconstruction_loss"] == 0.98


def test_the_best_checkpoint_is_kept(build):
    run = build(keep_checkpoints=2)
    for loss in (3.0, 1.0, 2.0, 2.0, 2.0):
        train(run)
        run.manager.update_best(loss, validation(loss), 0.0)
        run.manager.save()
    run.manager.wait()
    assert names(run) == ["step_00000002", "step_00000004", "step_00000005"]
    assert run.manager.best_model_dir == run.manager.run_dir / "checkpoints" / "step_00000002" / "model"


def test_a_failed_write_is_a_warning_and_its_model_is_not_the_best(build, monkeypatch):
    run = build()
    for loss in (2.0, 1.0):
        train(run)
        run.manager.update_best(loss, validation(loss), 0.0)
        run.manager.save()
        run.manager.wait()

        def full(path: Path, data: bytes) -> str:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint_format, "write_bytes", full)
    assert names(run) == ["step_00000001"]
    assert run.progress.best["step"] == 1
    assert len(run.warnings) == 1
    assert "the checkpoint of step 2 could not be written" in run.warnings[0] and "No space left" in run.warnings[0]


def test_a_roll_back_restores_the_newest_valid_checkpoint(build):
    run = build()
    states = []
    for _ in range(3):
        train(run)
        states.append({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
        run.manager.save()
        run.manager.wait()
    newest = list_checkpoints(run.manager.run_dir)[-1]
    (newest / "model" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    train(run)
    checkpoint, saved = run.manager.roll_back()
    assert checkpoint.name == "step_00000002" and saved == read_state(checkpoint)
    assert run.progress.step == 2
    assert all(torch.equal(states[1][name], tensor) for name, tensor in run.model.state_dict().items())
    assert names(run) == ["step_00000002"]
    assert not newest.exists() and list(newest.parent.glob(f"?*_{newest.name}"))  # quarantined, not deleted
