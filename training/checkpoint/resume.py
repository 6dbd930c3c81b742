"""What `--resume` means: which run, which checkpoint of it, and whether this configuration may go on with it.

Reads only; what it finds is loaded by the trainer. Every refusal names the value and the remedy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.checkpoint.format import InvalidCheckpointError, list_checkpoints, verify
from training.checkpoint.run_lock import LOCK_FILE, launcher
from training.config import Config, config_from_dict, unknown_key

# Keys that a resume may not change by itself: the weights, what is averaged or adapted for each of them, the order of
# images or the meaning of a step depend on them.
FIXED_ON_RESUME = (
    "model.",
    "data.",
    "loss.",
    "output.run_name",
    "processes",
    "training_presets.batch_size",
    "training_presets.ema_",
    "training_presets.pca_lr_scale",
    "training_presets.optimizer",
    "training_presets.seed",
)
# Exceptions: places and speeds.
FREE_ON_RESUME = (
    "data.cache_dir",
    "data.decode_threads",
    "data.num_train_images",
    "data.prefetch_batches",
    "data.revision",  # the commit behind it is compared by the stream
    "data.timeout_s",
    "loss.trunk_weights",
)


def runs_of(runs_dir: Path, run_name: str) -> list[Path]:
    """Folders of the runs of a name, newest first."""
    runs = [p for p in runs_dir.glob(f"{run_name}_*") if re.fullmatch(r"\d{8}_\d{6}", p.name[len(run_name) + 1 :])]
    return sorted(runs, reverse=True)


def find_run(resume: str, runs_dir: Path, run_name: str) -> tuple[Path, Path | None] | None:
    """The run that `--resume` means.

    Args:
        resume: "auto" (the newest run of this name that has a checkpoint), a run's folder or a checkpoint's folder.
        runs_dir: Where runs are.
        run_name: `output.run_name`.

    Returns:
        The run's folder, and the checkpoint if it was named; None where "auto" finds no run.

    Raises:
        ValueError: The path holds no checkpoint.
    """
    if resume == "auto":
        found = [run for run in runs_of(runs_dir, run_name) if list_checkpoints(run)]
        return (found[0], None) if found else None
    path = Path(os.path.abspath(resume))
    if path.parent.name == "checkpoints" and path.is_dir():
        path = path.resolve()  # the links `latest` and `best`
        return path.parent.parent, path
    if list_checkpoints(path):
        return path, None
    raise ValueError(
        f"--resume {resume}: no checkpoint there. Give a run's folder such as {runs_dir}/{run_name}_YYYYMMDD_HHMMSS, a "
        "folder checkpoints/step_XXXXXXXX in it, or auto."
    )


def restarted_run(runs_dir: Path, run_name: str) -> Path | None:
    """The run that this process's launcher (torchrun --max-restarts) has started before, if it has."""
    for run in runs_of(runs_dir, run_name):
        try:
            owner = json.loads((run / LOCK_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if owner.get("launcher") == launcher():
            return run
    return None


def newest_valid(run_dir: Path, named: Path | None) -> tuple[Path, list[str]]:
    """The checkpoint to go on from: the named one, or the newest that verifies.

    Returns:
        The checkpoint, and a sentence for each newer one that was passed over.

    Raises:
        ValueError: The named one does not verify, or none does.
    """
    skipped = []
    for checkpoint in [named] if named is not None else reversed(list_checkpoints(run_dir)):
        try:
            verify(checkpoint)
            return checkpoint, [f"resume: passed over {text}" for text in skipped]
        except InvalidCheckpointError as error:
            skipped.append(f"{checkpoint}: {error}")
    remedy = (
        "give another checkpoint of the run, or its folder to take the newest one that is whole"
        if named is not None
        else "restore one of them from a copy, or start a new run"
    )
    raise ValueError(f"--resume: no checkpoint can be used ({'; '.join(skipped)}): {remedy}.")


def check_resume(config: Config, processes: int, state: dict[str, Any], allowed: Sequence[str]) -> list[str]:
    """Refuse a resume whose configuration means another run; name every key.

    Args:
        config: As it is now.
        processes: Number of them now. Images and noise of a step do not depend on it, but sums round differently.
        state: The trainer's state in the checkpoint.
        allowed: Keys (`--allow-changed`) that may differ nevertheless.

    Returns:
        A sentence for each key that has another value now, and may.

    Raises:
        ValueError: A key that may not differ does, or an allowed key does not exist.
    """
    saved = {**config_from_dict(state["config"]).flat(), "processes": state["processes"]}
    now = {**config.flat(), "processes": processes}
    for key in allowed:
        if key not in saved | now and key != "data":  # the rows themselves, which the stream compares
            raise unknown_key(key, list(saved | now))
    changed = [key for key in sorted(saved | now) if saved.get(key) != now.get(key)]
    refused = [
        key
        for key in changed
        if key.startswith(FIXED_ON_RESUME)
        and key not in (*FREE_ON_RESUME, *allowed)
        # Rows from the cache have one order, whoever filled it.
        and not (key == "data.cache" and {saved[key], now[key]} == {"on", "only"})
    ]
    if refused:
        shown = ", ".join(f"{key} ({saved.get(key)!r} -> {now.get(key)!r})" for key in refused)
        raise ValueError(
            f"--resume: the checkpoint was trained with other values of {shown}: set them back, start a new run, or "
            f"take the change upon yourself with --allow-changed {' '.join(refused)}."
        )
    return [f"resume: {key} was {saved.get(key)!r}, is now {now.get(key)!r}" for key in changed]
