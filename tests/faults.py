"""Kills a small run at random times, resumes it each time, and compares its results with an uninterrupted run.

    python -m tests.faults                       # 200 kills
    python -m tests.faults --kills 12 --seed 1   # what the test suite does

A run is killed (SIGKILL) and resumed (`--resume auto`) several times before it may end; then the next run starts, until
the kills are used up. A kill happens at any time, while a checkpoint is written, at one of the system calls that write,
rename and prune it, during validation and export, or in the time that a scheduler grants after SIGTERM. After each kill
every checkpoint must be valid, the newest must not be older than before, and the resume must start from it. At its end
a run must be bitwise identical to the uninterrupted one: weights, EMA weights, optimizer state, plateau, KL control,
metrics, exported model.

Disk faults are in checkpoint/test_checkpoint.py, launchers and several processes in test_launchers.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(Path(__file__).parent))  # as under pytest

import tiny  # noqa: E402
import torch  # noqa: E402
from runs import differences, fork, run, wait_for  # noqa: E402

from training.checkpoint import format as checkpoint  # noqa: E402
from training.checkpoint.resume import find_run  # noqa: E402
from training.config import Config  # noqa: E402
from training.run_files import list_checkpoints, verify  # noqa: E402
from training.trainer import EXIT_STOPPED, Trainer  # noqa: E402

# System calls that write a checkpoint and remove older ones.
CALLS = ("open", "write", "fsync", "replace", "symlink", "mkdir", "unlink", "rmdir")
KILLS_PER_RUN = (6, 14)
# When to kill, and relative frequency; "call": at a system call of the writer; "term": SIGTERM, then SIGKILL.
MOMENTS = {"time": 20, "step": 20, "write": 15, "call": 25, "validation": 8, "export": 4, "term": 8}
TIMEOUT_S = 180.0

# Offsets in a page of memory that a child shares with its parent: phase of its main thread, phase of its writer, number
# of optimizer steps, step that it resumed from.
MAIN, WRITER, STEP, RESUMED_AT = range(4)
BUILDING, TRAINING, VALIDATING, EXPORTING, WRITING, TIDYING = range(6)
ROWS = (
    "before the first checkpoint",
    "starting again",
    "training",
    "writing a checkpoint",
    "renaming, linking, pruning",
    "validation and grids",
    "export of the model",
)


@contextlib.contextmanager
def watched_calls(watch: Callable[[str, tuple], None]) -> Iterator[None]:
    """`watch(name, arguments)` is called before each of `CALLS`; what it raises, the call raises."""

    def wrapped(name: str, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            watch(name, args)
            return original(*args, **kwargs)

        return call

    originals = {name: getattr(os, name) for name in CALLS}
    for name, original in originals.items():
        setattr(os, name, wrapped(name, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def _record_phases(page: mmap.mmap) -> None:
    """Make this process record its phases in `page`."""

    def record(holder: Any, name: str, slot: int, phase: int) -> None:
        function = getattr(holder, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before, page[slot] = page[slot], phase
            try:
                return function(*args, **kwargs)
            finally:
                page[slot] = before

        setattr(holder, name, call)

    record(Trainer, "_train_epoch", MAIN, TRAINING)
    record(Trainer, "_validate", MAIN, VALIDATING)
    record(Trainer, "_save_grids", MAIN, VALIDATING)
    record(Trainer, "_finish", MAIN, EXPORTING)
    record(checkpoint, "write_checkpoint", WRITER, WRITING)
    record(checkpoint, "rename_folder", WRITER, TIDYING)
    record(checkpoint, "_update_links", WRITER, TIDYING)
    record(checkpoint, "_prune", WRITER, TIDYING)


def _life(config: Config, page: mmap.mmap, dies_at_call: int | None) -> int:
    """Run by a child: train to the end, or kill itself at a system call of its checkpoint writer."""
    _record_phases(page)
    calls = itertools.count(1)

    def watch(name: str, args: tuple) -> None:
        if threading.current_thread().name != "checkpoint":
            return
        if next(calls) == dies_at_call:
            if name == "write":  # half of it
                descriptor, data = args
                _write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    _write = os.write
    with watched_calls(watch):
        trainer = Trainer(config, "auto")
        page[MAIN] = TRAINING
        page[RESUMED_AT] = page[STEP] = trainer.progress.step
        check = trainer._check_step

        def record_and_check(*args: Any) -> None:
            page[STEP] = trainer.progress.step
            check(*args)

        trainer._check_step = record_and_check
        return trainer.run()


def _steps(config: Config) -> list[int]:
    """Steps of the checkpoints of the run that `--resume auto` takes, oldest first; each must be valid."""
    found = find_run("auto", Path(config.output.runs_dir), config.output.run_name)
    checkpoints = [] if found is None else list_checkpoints(found[0])
    for each in checkpoints:
        verify(each)
    return [int(each.name.removeprefix("step_")) for each in checkpoints]


class Killer:
    """Kills runs of one configuration.

    Args:
        folder: Receives all runs.
        seed: Of the times of the kills.
        faces: Cache folder of the training images.
    """

    def __init__(self, folder: Path, seed: int, faces: Path) -> None:
        self.folder, self.faces, self.random = folder, faces, random.Random(seed)
        self.page = mmap.mmap(-1, mmap.PAGESIZE)
        self.table: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self.stops = self.runs = 0
        # Here and not in a child, so that children inherit the imports and start in half a second.
        torch.set_num_threads(1)
        with (folder / "uninterrupted.log").open("w") as log, contextlib.redirect_stderr(log):
            self.uninterrupted = run(self.config("uninterrupted"))
        assert self.uninterrupted.code == 0
        self.seconds = self._time_of_a_run()

    def config(self, name: str) -> Config:
        return tiny.tiny_config(
            self.folder / name,
            self.faces,
            loss={"perceptual_weight": 0, "lpips_weight": 0},
            data={"synthetic_train_images": 40},
            training_presets={"num_epochs": 3},
            output={"checkpoint_every_images": 8, "log_every_steps": 1, "sample_every_epochs": 2},
        )

    def _time_of_a_run(self) -> float:
        start = time.monotonic()
        code = wait_for(self._start(self.config("timed")), TIMEOUT_S)
        assert code == 0, f"see {self.folder}"
        return time.monotonic() - start

    def _start(self, config: Config, dies_at_call: int | None = None) -> int:
        Path(config.output.runs_dir).mkdir(parents=True, exist_ok=True)
        self.page[:4] = bytes(4)
        log = Path(config.output.runs_dir).parent / "output.log"
        return fork(lambda: _life(config, self.page, dies_at_call), log)

    def _until(self, child: int, reached: Callable[[], bool]) -> int | None:
        """Wait until the child reaches a condition; returns its exit code if it ends before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not reached():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return None  # killed like all others; `wait_for` then reports it
            time.sleep(0.0005)
        return None

    def _starts(self, slot: int, phase: int, skip: int) -> Callable[[], bool]:
        """Returns a function that tells whether a phase has started more than `skip` times."""
        was, begun = False, 0

        def reached() -> bool:
            nonlocal was, begun
            now = self.page[slot] == phase
            was, begun = now, begun + (now and not was)
            return begun > skip

        return reached

    def _attack(self, config: Config, moment: str, newest: int) -> int:
        """Start a child and kill it; returns its exit code, since it may end before."""
        page, pick = self.page, self.random
        if moment == "call":
            child = self._start(config, dies_at_call=pick.randint(1, 300))  # of the first three or four writes
            return wait_for(child, TIMEOUT_S)
        child = self._start(config)
        if moment in ("time", "term"):
            end = time.monotonic() + pick.uniform(0, 0.7 * self.seconds)
            code = self._until(child, lambda: time.monotonic() > end)
        elif moment == "step":
            target = newest + pick.randint(1, 7)
            code = self._until(child, lambda: page[STEP] >= target)
            time.sleep(pick.uniform(0, 0.02))
        else:
            slot, phase = {
                "write": (WRITER, WRITING),
                "validation": (MAIN, VALIDATING),
                "export": (MAIN, EXPORTING),
            }[moment]
            code = self._until(child, self._starts(slot, phase, skip=0 if moment == "export" else pick.randint(0, 2)))
            time.sleep(pick.uniform(0, 0.03))
        if code is None and moment == "term":
            os.kill(child, signal.SIGTERM)
            end = time.monotonic() + pick.uniform(0, 0.3)
            code = self._until(child, lambda: time.monotonic() > end)
        if code is None:
            os.kill(child, signal.SIGKILL)
            code = wait_for(child, TIMEOUT_S)
        return code

    def _row(self, had_checkpoint: bool) -> str:
        main, writer = self.page[MAIN], self.page[WRITER]
        if writer:
            return ROWS[3] if writer == WRITING else ROWS[4]
        if not had_checkpoint:
            return ROWS[0]
        return {BUILDING: ROWS[1], TRAINING: ROWS[2], VALIDATING: ROWS[5], EXPORTING: ROWS[6]}[main]

    def one_run(self, kills_left: int) -> int:
        """Kill a run several times, let it end, and compare; returns the number of kills."""
        self.runs += 1
        config = self.config(f"run_{self.runs:03d}")
        wanted, kills, newest = min(kills_left, self.random.randint(*KILLS_PER_RUN)), 0, 0
        while True:
            moment = self.random.choices(list(MOMENTS), MOMENTS.values())[0] if kills < wanted else "none"
            code = (
                self._attack(config, moment, newest) if moment != "none" else wait_for(self._start(config), TIMEOUT_S)
            )
            resumed = self.page[RESUMED_AT]
            if self.page[MAIN] != BUILDING and resumed != newest:
                self.failures.append(f"run {self.runs}: resumed from step {resumed} instead of {newest}")
            steps = _steps(config)
            if steps and steps[-1] < newest:
                self.failures.append(f"run {self.runs}: step {newest} is lost, {steps} are left")
            had, newest = newest > 0, max(newest, *steps, 0)
            if code in (-signal.SIGKILL, -signal.SIGTERM):  # SIGTERM ends the process before training starts
                kills += 1
                self.table[moment, self._row(had)] += 1
            elif code == EXIT_STOPPED and moment == "term":
                self.stops += 1
            elif code == 0:
                break
            else:
                self.failures.append(f"run {self.runs}: exit code {code}, see {self.folder}")
            if self.failures:
                return kills
        folder, _ = find_run("auto", Path(config.output.runs_dir), config.output.run_name)
        self.failures += [f"run {self.runs}: {text}" for text in differences(folder, self.uninterrupted.folder)]
        return kills

    def report(self) -> str:
        """The table of kills."""
        lines = [f"{'killed':<30}{'kills':>6}   by moment"]
        for row in ROWS:
            moments = {moment: number for (moment, each), number in sorted(self.table.items()) if each == row}
            lines.append(f"{row:<30}{sum(moments.values()):>6}   {', '.join(f'{m} {n}' for m, n in moments.items())}")
        lines.append(f"{'all':<30}{sum(self.table.values()):>6}   in {self.runs} runs, {self.stops} stops by SIGTERM")
        return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description="Kill and resume a small run at random times and compare its results.")
    parser.add_argument("--kills", type=int, default=200, help="minimum number of kills")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="faults_", dir=os.environ.get("TMPDIR")))
    start, kills = time.monotonic(), 0
    killer = Killer(folder, arguments.seed, folder / "faces")
    while kills < arguments.kills and not killer.failures:
        kills += killer.one_run(arguments.kills - kills)
    print(killer.report())
    print(f"{time.monotonic() - start:.0f} s, seed {arguments.seed}")
    if killer.failures:
        print(f"FAILED, see {folder}", *killer.failures, sep="\n  ")
        return 1
    print(f"{killer.runs} killed runs are bitwise identical to an uninterrupted one; no checkpoint was lost")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
