"""What `--resume` means: which run, which checkpoint of it, and whether this configuration may continue it.

Reads only; the trainer loads what is found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import Config, unknown_key
from training.run_files import (
    InvalidCheckpointError,
    best_checkpoint,
    find_model,
    list_checkpoints,
    list_runs,
    read_json,
    saved_config,
    step_folder,
    verify,
)

# Keys, or beginnings of keys, that a resume must not change: the weights, what is kept for each of them, the order of
# images or the meaning of a step depend on them.
FIXED_ON_RESUME = (
    "model.",
    "data.",
    "loss.",
    "output.run_name",
    "processes",
    "training_presets.batch_size",
    "training_presets.best_metric",
    "training_presets.ema_",
    "training_presets.muon_lr_scale",
    "training_presets.pca_lr_scale",
    "training_presets.optimizer",
    "training_presets.seed",
    "training_presets.train_only",
)
# Of these, keys that --allow-changed does not accept: the parameter groups and the optimizer's state depend on them.
_ANOTHER_RUN = (
    "training_presets.muon_lr_scale",
    "training_presets.optimizer",
    "training_presets.pca_lr_scale",
    "training_presets.train_only",
)
# Exceptions: paths and speeds.
FREE_ON_RESUME = (
    "data.cache_dir",
    "data.decode_processes",
    "data.decode_threads",
    "data.num_train_images",
    "data.prefetch_batches",
    "data.revision",  # the stream compares the commit
    "data.timeout_s",
    "loss.trunk_weights",
)


def find_run(resume: str, runs_dir: Path, run_name: str) -> tuple[Path, Path | None] | None:
    """The run that `--resume` means.

    Args:
        resume: "auto" (the newest run of this name that has a checkpoint), a run's folder or a checkpoint's folder.
        runs_dir: `output.runs_dir`.
        run_name: `output.run_name`.

    Returns:
        The run's folder, and the checkpoint if `resume` names one; None if "auto" finds no run.

    Raises:
        ValueError: The path holds no checkpoint.
    """
    if resume == "auto":
        return next(((run, None) for run in list_runs(runs_dir, run_name) if list_checkpoints(run)), None)
    path = Path(os.path.abspath(resume))
    run_dir = path.parent.parent
    if path.parent.name == "checkpoints" and path.name in ("latest", "best") and list_checkpoints(run_dir):
        # By what the run records: the link may be a folder, or missing.
        return run_dir, best_checkpoint(run_dir)[0] if path.name == "best" else list_checkpoints(run_dir)[-1]
    if path.parent.name == "checkpoints" and path.is_dir():
        path = path.resolve()
        return path.parent.parent, path
    if list_checkpoints(path):
        return path, None
    raise ValueError(
        f"--resume {resume}: no checkpoint there. Give a run's folder such as {runs_dir}/{run_name}_YYYYMMDD_HHMMSS, a "
        "folder checkpoints/step_XXXXXXXX in it, or auto."
    )


def newest_valid(run_dir: Path, named: Path | None) -> tuple[Path, list[str]]:
    """The checkpoint to resume from: the named one, or the newest that is valid.

    Returns:
        The checkpoint, and a line for the log about each newer one that was skipped.

    Raises:
        ValueError: The named one is not valid, or none is.
    """
    skipped = []
    for checkpoint in [named] if named is not None else reversed(list_checkpoints(run_dir)):
        try:
            verify(checkpoint)
            return checkpoint, [f"resume: skipped {text}" for text in skipped]
        except InvalidCheckpointError as error:
            skipped.append(f"{checkpoint}: {error}")
    remedy = (
        "give another checkpoint of the run, or the run's folder to take its newest valid one"
        if named is not None
        else "restore one of them from a copy, or start a new run"
    )
    raise ValueError(f"--resume: no checkpoint can be used ({'; '.join(skipped)}): {remedy}.")


def check_resume(config: Config, processes: int, state: dict[str, Any], allowed: Sequence[str]) -> list[str]:
    """Compare the configuration with the one in a checkpoint.

    Args:
        config: The configuration of this start.
        processes: Number of processes. The same global batch on another number continues, but sums round differently.
        state: The trainer's state in the checkpoint.
        allowed: Keys (`--allow-changed`) that may differ nevertheless.

    Returns:
        A line for the log about each key that differs and may.

    Raises:
        ValueError: A key that may not differ does, or an allowed key does not exist.
    """
    saved = {**saved_config(state["config"]).flat(), "processes": state["processes"]}
    now = {**config.flat(), "processes": processes}
    for key in allowed:
        if key not in saved | now and key != "data":  # "data": the examples themselves, which the stream compares
            raise unknown_key(key, list(saved | now))
    changed = [key for key in sorted(saved | now) if saved.get(key) != now.get(key)]
    another_run = set(_ANOTHER_RUN)
    if 0 in (saved.get("training_presets.ema_decay"), now["training_presets.ema_decay"]):
        another_run.add("training_presets.ema_decay")  # EMA weights cannot begin or end within a run
    by_lpips = config.training_presets.best_metric == "lpips"
    refused = [
        key
        for key in changed
        if (key.startswith(FIXED_ON_RESUME) or (by_lpips and key == "output.eval_lpips_trunk"))
        and key not in FREE_ON_RESUME
        and (key not in allowed or key in another_run)
        # The cache has one example order, whichever of the two modes filled it.
        and not (key == "data.cache" and {saved[key], now[key]} == {"on", "only"})
    ]
    if refused:
        shown = ", ".join(f"{key} ({_json(saved, key)} -> {_json(now, key)})" for key in refused)
        if fixed := [key for key in refused if key in another_run]:
            remedy = f"or start a new run, because {' and '.join(fixed)} cannot change within one"
        else:
            remedy = f"start a new run, or accept the change with --allow-changed {' '.join(refused)}"
        raise ValueError(
            f"--resume: the checkpoint was trained with other values of {shown}: repeat the --set options of that run, "
            f"{remedy}."
        )
    return [f"resume: {key} was {_json(saved, key)}, is now {_json(now, key)}" for key in changed]


def _json(values: dict[str, Any], key: str) -> str:
    """A value as the configuration has it."""
    return json.dumps(values.get(key))


def drop_lost_best(run_dir: Path, checkpoint: Path, state: dict[str, Any]) -> list[str]:
    """Set the best model in a trainer state to None if its files, which another checkpoint holds, are damaged.

    Returns:
        A line for the log if so.
    """
    best = state["progress"].get("best")
    try:
        if best is not None and step_folder(run_dir, best["step"]) != checkpoint:
            verify(step_folder(run_dir, best["step"]), "model/")
    except InvalidCheckpointError as error:
        state["progress"]["best"] = None
        return [f"resume: the best model so far, step {best['step']}, is lost ({error}); the next one counts"]
    return []


class FinishedRun(Exception):
    """A resumed run has nothing left to do; the message says what to change."""


def check_unfinished(config: Config, run_dir: Path, saved: dict[str, Any]) -> None:
    """Check that something is left to do for a run that is resumed.

    Args:
        config: The configuration.
        run_dir: The run's folder.
        saved: State of the checkpoint that it resumes from.

    Raises:
        FinishedRun: It has finished and exported its model, and the configuration asks for nothing more.
    """
    status, progress, presets = read_json(run_dir / "status.json"), saved["progress"], config.training_presets
    limit, patience = presets.max_train_minutes, presets.early_stopping_patience
    if status.get("state") != "finished" or config.hub.push:  # an upload may be missing, and can be repeated
        return
    target = Path(config.output.model_dir) / f"vae_{config.output.run_name}"
    try:
        found = find_model(run_dir)
    except ValueError:  # the best model is damaged
        return
    if found is None or found[0].absolute() != target.absolute():
        return
    if progress["epoch"] >= presets.num_epochs:
        remedy = "raise training_presets.num_epochs"
    elif limit is not None and progress["train_seconds"] >= 60 * limit:
        remedy = "raise training_presets.max_train_minutes"
    elif patience and progress["early_stopping_bad_epochs"] >= patience:
        remedy = "raise training_presets.early_stopping_patience"
    else:
        return
    raise FinishedRun(
        f"{run_dir} has finished ({status.get('reason')}), and its model is in {target}: nothing was changed. "
        f"To train longer, {remedy}; for a new run, leave out --resume."
    )
