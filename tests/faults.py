"""Kills a small run at random moments, goes on with it each time, and compares how it ends with a run left alone.

    python -m tests.faults                       # 200 kills
    python -m tests.faults --kills 12 --seed 1   # what the test suite does

A run is killed (SIGKILL) and resumed (`--resume auto`) several times before it may end; then the next one begins,
until the kills are used up. Moments are chosen in five ways: at any time; while a checkpoint is being written; at one
of the calls to the operating system that write, rename and prune it; during validation and export; and in the time
that a scheduler grants after SIGTERM. After each kill every checkpoint must verify and the newest must be no older
than before; the resume must begin at it. At its end a run must have the very bytes of the one left alone: weights,
averages, moments, plateau, KL control, figures of training and validation, exported model.

What it is not for: faults of disks and files (test_checkpoint.py), launchers and several processes (test_launchers.py).
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

# Calls by which a checkpoint gets on the disk, and older ones off it.
CALLS = ("open", "write", "fsync", "replace", "symlink", "mkdir", "unlink", "rmdir")
KILLS_PER_RUN = (6, 14)
# Of choosing a moment, and how often; "call": a call to the operating system by the writer; "term": SIGTERM, then SIGKILL.
WAYS = {"time": 20, "step": 20, "write": 15, "call": 25, "validation": 8, "export": 4, "term": 8}
HANGS_SECONDS = 180.0

# What a child says about itself in a page of memory that its parent sees: the phase of its main thread, that of its
# writer, the steps it has done and the step that it went on from.
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


def _say_phases(page: mmap.mmap) -> None:
    """From here on this process keeps `page` up to date."""

    def say(owner: Any, name: str, slot: int, phase: int) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before, page[slot] = page[slot], phase
            try:
                return function(*args, **kwargs)
            finally:
                page[slot] = before

        setattr(owner, name, call)

    say(Trainer, "_train_epoch", MAIN, TRAINING)
    say(Trainer, "_validate", MAIN, VALIDATING)
    say(Trainer, "_save_grids", MAIN, VALIDATING)
    say(Trainer, "_finish", MAIN, EXPORTING)
    say(checkpoint, "write_checkpoint", WRITER, WRITING)
    say(checkpoint, "rename_folder", WRITER, TIDYING)
    say(checkpoint, "_update_links", WRITER, TIDYING)
    say(checkpoint, "_prune", WRITER, TIDYING)


def _life(config: Config, page: mmap.mmap, dies_at_call: int | None) -> int:
    """What a child does: train to the end, or to its own death at a call of its checkpoint writer."""
    _say_phases(page)
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

        def check_and_say(*args: Any) -> None:
            page[STEP] = trainer.progress.step
            check(*args)

        trainer._check_step = check_and_say
        return trainer.run()


def _steps(config: Config) -> list[int]:
    """Steps of the checkpoints of the run that `--resume auto` takes, oldest first; each must verify."""
    found = find_run("auto", Path(config.output.runs_dir), config.output.run_name)
    checkpoints = [] if found is None else list_checkpoints(found[0])
    for each in checkpoints:
        verify(each)
    return [int(each.name.removeprefix("step_")) for each in checkpoints]


class Killer:
    """Kills runs of one configuration.

    Args:
        folder: For all that is written.
        seed: Of the moments.
        faces: Where the training images are rendered.
    """

    def __init__(self, folder: Path, seed: int, faces: Path) -> None:
        self.folder, self.faces, self.random = folder, faces, random.Random(seed)
        self.page = mmap.mmap(-1, mmap.PAGESIZE)
        self.table: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self.stops = self.runs = 0
        # Here and not in a child: what it imports and renders, children need not, and they start in half a second.
        torch.set_num_threads(1)
        with (folder / "undisturbed.log").open("w") as log, contextlib.redirect_stderr(log):
            self.undisturbed = run(self.config("undisturbed"))
        assert self.undisturbed.code == 0
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
        began = time.monotonic()
        code = wait_for(self._start(self.config("timed")), HANGS_SECONDS)
        assert code == 0, f"see {self.folder}"
        return time.monotonic() - began

    def _start(self, config: Config, dies_at_call: int | None = None) -> int:
        Path(config.output.runs_dir).mkdir(parents=True, exist_ok=True)
        self.page[:4] = bytes(4)
        log = Path(config.output.runs_dir).parent / "output.log"
        return fork(lambda: _life(config, self.page, dies_at_call), log)

    def _until(self, child: int, reached: Callable[[], bool]) -> int | None:
        """Wait until the child has got somewhere; returns its exit code if it ends before."""
        deadline = time.monotonic() + HANGS_SECONDS
        while not reached():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return None  # killed like all others, and found out by `_check`
            time.sleep(0.0005)
        return None

    def _beginning(self, slot: int, phase: int, skip: int) -> Callable[[], bool]:
        """Says whether a phase has begun for the time after `skip` others."""
        was, begun = False, 0

        def reached() -> bool:
            nonlocal was, begun
            now = self.page[slot] == phase
            was, begun = now, begun + (now and not was)
            return begun > skip

        return reached

    def _attack(self, config: Config, way: str, newest: int) -> int:
        """Start a child and kill it; returns its exit code, which says whether it came to that."""
        page, pick = self.page, self.random
        if way == "call":
            child = self._start(config, dies_at_call=pick.randint(1, 300))  # of the first three or four writes
            return wait_for(child, HANGS_SECONDS)
        child = self._start(config)
        if way in ("time", "term"):
            end = time.monotonic() + pick.uniform(0, 0.7 * self.seconds)
            code = self._until(child, lambda: time.monotonic() > end)
        elif way == "step":
            target = newest + pick.randint(1, 7)
            code = self._until(child, lambda: page[STEP] >= target)
            time.sleep(pick.uniform(0, 0.02))
        else:
            slot, phase = {
                "write": (WRITER, WRITING),
                "validation": (MAIN, VALIDATING),
                "export": (MAIN, EXPORTING),
            }[way]
            code = self._until(child, self._beginning(slot, phase, skip=0 if way == "export" else pick.randint(0, 2)))
            time.sleep(pick.uniform(0, 0.03))
        if code is None and way == "term":
            os.kill(child, signal.SIGTERM)
            end = time.monotonic() + pick.uniform(0, 0.3)
            code = self._until(child, lambda: time.monotonic() > end)
        if code is None:
            os.kill(child, signal.SIGKILL)
            code = wait_for(child, HANGS_SECONDS)
        return code

    def _row(self, had_checkpoint: bool) -> str:
        main, writer = self.page[MAIN], self.page[WRITER]
        if writer:
            return ROWS[3] if writer == WRITING else ROWS[4]
        if not had_checkpoint:
            return ROWS[0]
        return {BUILDING: ROWS[1], TRAINING: ROWS[2], VALIDATING: ROWS[5], EXPORTING: ROWS[6]}[main]

    def one_run(self, kills_left: int) -> int:
        """Kill a run until it may end, let it end, and compare; returns the number of kills."""
        self.runs += 1
        config = self.config(f"run_{self.runs:03d}")
        wanted, kills, newest = min(kills_left, self.random.randint(*KILLS_PER_RUN)), 0, 0
        while True:
            way = self.random.choices(list(WAYS), WAYS.values())[0] if kills < wanted else "none"
            code = self._attack(config, way, newest) if way != "none" else wait_for(self._start(config), HANGS_SECONDS)
            resumed = self.page[RESUMED_AT]
            if self.page[MAIN] != BUILDING and resumed != newest:
                self.failures.append(f"run {self.runs}: went on from step {resumed}, and step {newest} was there")
            steps = _steps(config)
            if steps and steps[-1] < newest:
                self.failures.append(f"run {self.runs}: step {newest} is lost, {steps} are there")
            had, newest = newest > 0, max(newest, *steps, 0)
            if code in (-signal.SIGKILL, -signal.SIGTERM):  # which has its usual effect before training begins
                kills += 1
                self.table[way, self._row(had)] += 1
            elif code == EXIT_STOPPED and way == "term":
                self.stops += 1
            elif code == 0:
                break
            else:
                self.failures.append(f"run {self.runs}: exit code {code}, see {self.folder}")
            if self.failures:
                return kills
        folder, _ = find_run("auto", Path(config.output.runs_dir), config.output.run_name)
        self.failures += [f"run {self.runs}: {text}" for text in differences(folder, self.undisturbed.folder)]
        return kills

    def report(self) -> str:
        """The table of kills by moment."""
        lines = [f"{'killed':<30}{'kills':>6}   by way of choosing the moment"]
        for row in ROWS:
            ways = {way: number for (way, each), number in sorted(self.table.items()) if each == row}
            lines.append(f"{row:<30}{sum(ways.values()):>6}   {', '.join(f'{w} {n}' for w, n in ways.items())}")
        lines.append(f"{'all':<30}{sum(self.table.values()):>6}   in {self.runs} runs, {self.stops} stops by SIGTERM")
        return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0 where nothing was lost."""
    parser = argparse.ArgumentParser(description="Kill a small run at random moments and compare how it ends.")
    parser.add_argument("--kills", type=int, default=200, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="faults_", dir=os.environ.get("TMPDIR")))
    began, kills = time.monotonic(), 0
    killer = Killer(folder, arguments.seed, folder / "faces")
    while kills < arguments.kills and not killer.failures:
        kills += killer.one_run(arguments.kills - kills)
    print(killer.report())
    print(f"{time.monotonic() - began:.0f} s, seed {arguments.seed}")
    if killer.failures:
        print(f"FAILED, all of it is in {folder}", *killer.failures, sep="\n  ")
        return 1
    print(f"{killer.runs} killed runs ended with the bytes of one that was left alone; no checkpoint was lost")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
