"""A run from end to end in the test process, and what can be read of it afterwards."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch

from training.config import Config
from training.trainer import Trainer

EPOCHS, STEPS = 3, 5  # of the run that tests share, and steps of an epoch


@dataclass
class Run:
    """A run that has ended."""

    config: Config
    trainer: Trainer
    code: int

    @property
    def folder(self) -> Path:
        return self.trainer.run_dir

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "status.json").read_text())

    def lines(self, kind: str, after_step: int = -1) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, without what a clock says."""
        found = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [
            {name: value for name, value in line.items() if name != "time" and not name.startswith("speed/")}
            for line in found
            if line["kind"] == kind and line["step"] > after_step
        ]

    def end_state(self) -> dict[str, Any]:
        """All that the next step would depend on."""
        trainer = self.trainer
        moments = trainer.optimizer.state_dict()
        clocks = ("train_seconds", "window")
        return {
            **{f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()},
            **{f"average.{index}": tensor for index, tensor in enumerate(trainer.ema.shadow_params)},
            **{f"adam.{i}.{name}": value for i, entry in moments["state"].items() for name, value in entry.items()},
            "groups": moments["param_groups"],
            "updates averaged": trainer.ema.optimization_step,
            "plateau": trainer.plateau.state_dict(),
            "kl": trainer.kl.state_dict(),
            "progress": {name: value for name, value in vars(trainer.progress).items() if name not in clocks},
            "window": {k: v for k, v in trainer.progress.window.items() if k not in ("seconds", "waited")},
        }


def run(config: Config, resume: str | Path | None = None, stop_after: dict[int, int] | None = None) -> Run:
    """Run a training here; `stop_after`: a step's number -> the signal that this process gets after it."""
    with tiny.process_state():
        trainer = Trainer(config, None if resume is None else str(resume))
        update = trainer.train_step

        def update_and_signal(*args, step: int, **kwargs):
            result = update(*args, step=step, **kwargs)
            if number := (stop_after or {}).get(step + 1):
                os.kill(os.getpid(), number)
            return result

        trainer.train_step = update_and_signal
        return Run(config, trainer, trainer.run())


def assert_same_state(one: Run, other: Run) -> None:
    state, wanted = one.end_state(), other.end_state()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[name], value), name
        else:
            assert state[name] == value, name
