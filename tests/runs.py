"""A run from end to end, in the test process or in forked ones, and what can be read of it afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file

from training.config import Config
from training.run_files import STATE_FILE, list_checkpoints
from training.trainer import Trainer

EPOCHS, STEPS = 3, 5  # epochs of the run shared by tests, and steps per epoch


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
        """Lines of metrics.jsonl, without times and speeds."""
        found = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [
            {name: value for name, value in line.items() if name != "time" and not name.startswith("speed/")}
            for line in found
            if line["kind"] == kind and line["step"] > after_step
        ]

    def end_state(self) -> dict[str, Any]:
        """All that the next step would depend on."""
        trainer = self.trainer
        optimizer_state = trainer.setup.optimizer.state_dict()
        clocks = ("train_seconds", "window")
        return {
            **{f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()},
            **{f"average.{index}": tensor for index, tensor in enumerate(trainer.ema.shadow_params)},
            **{
                f"adam.{i}.{name}": value
                for i, entry in optimizer_state["state"].items()
                for name, value in entry.items()
            },
            "groups": optimizer_state["param_groups"],
            "EMA steps": trainer.ema.optimization_step,
            "learning rate": trainer.learning_rate.state_dict(),
            "kl": trainer.kl.state_dict(),
            "progress": {name: value for name, value in vars(trainer.progress).items() if name not in clocks},
            "window": {k: v for k, v in trainer.progress.window.items() if k not in ("seconds", "waited")},
        }


def run(config: Config, resume: str | Path | None = None, stop_after: dict[int, int] | None = None) -> Run:
    """Run a training here; `stop_after`: a step's number -> the signal that this process gets in it."""
    with tiny.process_state():
        trainer = Trainer(config, None if resume is None else str(resume))
        gradients = trainer.train_step.gradients

        def gradients_and_signal(*args, step: int, **kwargs):
            parts = gradients(*args, step=step, **kwargs)
            if number := (stop_after or {}).get(step + 1):
                os.kill(os.getpid(), number)
            return parts

        trainer.train_step.gradients = gradients_and_signal
        return Run(config, trainer, trainer.run())


def assert_same_state(one: Run, other: Run) -> None:
    state, wanted = one.end_state(), other.end_state()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[name], value), name
        else:
            assert state[name] == value, name


# ---- in processes of their own, and compared by what they leave on disk ----


def fork(job: Callable[[], int], log: Path, **environment: str) -> int:
    """Start `job` in a child process, which spares it the imports of a new interpreter; returns the child's id.

    Args:
        job: Its result is the child's exit code; 99 for an error, whose traceback is in the log.
        log: Gets the child's output.
        environment: Variables of the child.
    """
    child = os.fork()
    if child:
        return child
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # not pytest's
        os.environ.update({"OMP_NUM_THREADS": "1"} | environment)  # without, accelerate warns where there are several
        torch.set_num_threads(1)  # threads of the parent do not exist here
        with tiny.process_state():
            code = job()
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for(child: int, seconds: float = 120.0) -> int:
    """Exit code of a child, or minus the signal that ended it; a child that does not end is killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"process {child} hangs")


def wait_for_all(children: Sequence[int], seconds: float = 120.0) -> list[int]:
    """`wait_for` each of several; where one hangs, none of them stays."""
    codes: list[int] = []
    try:
        for child in children:
            codes.append(wait_for(child, seconds))
    except AssertionError:
        for child in children[len(codes) + 1 :]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    return codes


def run_ranks(
    config: Config,
    resume: str | None,
    log: Path,
    ranks: int = 1,
    *,
    allow_changed: Sequence[str] = (),
    prepare: Callable[[Trainer], None] | None = None,
) -> list[int]:
    """Train in forked processes, `ranks` of them in one group; returns their exit codes.

    Args:
        config, resume, allow_changed: See `Trainer`.
        log: Gets the output of all.
        ranks: Number of processes.
        prepare: Called in each process with its trainer before that runs.
    """

    def job() -> int:
        trainer = Trainer(config, resume, allow_changed)
        if prepare is not None:
            prepare(trainer)
        return trainer.run()

    return fork_ranks(job, log, ranks)


def fork_ranks(job: Callable[[], int], log: Path, ranks: int) -> list[int]:
    """Run `job` in forked processes, `ranks` of them in one group; returns their exit codes."""
    environments: Sequence[dict[str, str]] = [{}]
    if ranks > 1:
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        environments = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return wait_for_all([fork(job, log, **each) for each in environments])


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Training and validation metrics in metrics.jsonl, without times and speeds."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "time" and not name.startswith("speed/")}
        for line in lines
        if line["kind"] != "event"
    ]


def _state_without_clocks(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / STATE_FILE).read_text())
    for places in (state["config"]["output"],):
        del places["runs_dir"], places["model_dir"]
    progress, alerts = state["progress"], state["alerts"]
    for values, clocks in ((progress, ["train_seconds"]), (progress["window"], ["seconds", "waited"])):
        for name in clocks:
            values.pop(name, None)
    del alerts["data_wait"]
    alerts["active"] = [name for name in alerts["active"] if name != "data wait"]
    return state


def same_weights(one: Path, other: Path) -> bool:
    """Whether two safetensors files have bitwise the same tensors; their headers name different runs."""
    tensors, others = load_file(one), load_file(other)
    return tensors.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in tensors.items())


def differences(run_dir: Path, wanted: Path) -> list[str]:
    """Differences between two finished runs in last checkpoint, metrics and model; empty if bitwise identical."""
    found = []
    last, other = list_checkpoints(run_dir)[-1], list_checkpoints(wanted)[-1]
    if last.name != other.name:
        found.append(f"last checkpoint {last.name}, not {other.name}")
    names = {path.relative_to(each) for each in (last, other) for path in each.rglob("*.safetensors")}
    for name in sorted(names):
        if not (last / name).is_file() or not (other / name).is_file():
            found.append(f"{name} is missing")
        elif not same_weights(last / name, other / name):
            found.append(f"{name} differs")
    state, other_state = _state_without_clocks(last), _state_without_clocks(other)
    found += [f"state {key}: {state[key]} != {other_state[key]}" for key in state if state[key] != other_state.get(key)]
    lines, other_lines = metric_lines(run_dir), metric_lines(wanted)
    if lines != other_lines:
        odd = next((pair for pair in zip(lines, other_lines) if pair[0] != pair[1]), "only in number")
        found.append(f"metrics.jsonl has {len(lines)} lines, not {len(other_lines)}; first that differs: {odd}")
    models = [Path(json.loads((each / "status.json").read_text())["model_dir"] or "/") for each in (run_dir, wanted)]
    exported = [folder / "diffusion_pytorch_model.safetensors" for folder in models]
    if not exported[0].is_file() or not same_weights(*exported):
        found.append("the exported model differs")
    return found
