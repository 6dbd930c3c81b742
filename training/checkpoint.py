"""Checkpoints on disk.

A checkpoint is `<run>/checkpoints/step_XXXXXXXX/`: accelerate's own files (weights, optimizer, averaged weights,
gradient scaler) and `trainer_state.json`. It is written under a temporary name and renamed when complete, so a folder
with the final name is whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from training.config import Config, config_from_dict

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"

# Keys that a resume may not change: the weights, what is averaged or adapted for each of them, the order of images or
# the meaning of a step depend on them.
FIXED_ON_RESUME = (
    "model.",
    "data.",
    "loss.",
    "output.run_name",
    "training_presets.batch_size",
    "training_presets.ema_",
    "training_presets.linear_lr_scale",
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


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [
        path
        for path in (run_dir / "checkpoints").glob("step_*")
        if re.fullmatch(r"step_\d{8}", path.name) and (path / STATE_FILE).is_file()
    ]
    return sorted(found)


def save_checkpoint(accelerator: Accelerator, run_dir: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Save everything a resume needs; called by every process.

    Args:
        accelerator: Whose prepared and registered objects are saved.
        run_dir: The run's folder.
        step: Optimizer updates done.
        state: JSON-able state of the trainer.
        keep: Newest checkpoints to keep, this one included; older ones are removed after it is complete.

    Returns:
        The checkpoint's folder.
    """
    final = run_dir / "checkpoints" / f"step_{step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / STATE_FILE, state)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(resume: str, runs_dir: Path, run_name: str) -> Path | None:
    """The checkpoint that `--resume` means.

    Args:
        resume: "auto" (the newest run of this name that has a checkpoint), a run's folder or a checkpoint's folder.
        runs_dir: Where runs are.
        run_name: `output.run_name`.

    Returns:
        A checkpoint's folder; None where "auto" finds none.

    Raises:
        ValueError: The path holds no complete checkpoint.
    """
    if resume == "auto":
        runs = [p for p in runs_dir.glob(f"{run_name}_*") if re.fullmatch(r"\d{8}_\d{6}", p.name[len(run_name) + 1 :])]
        for run in sorted(runs, reverse=True):
            if checkpoints := list_checkpoints(run):
                return checkpoints[-1]
        return None
    path = Path(resume)
    if (path / STATE_FILE).is_file():
        return path
    if checkpoints := list_checkpoints(path):
        return checkpoints[-1]
    raise ValueError(
        f"--resume {resume}: no complete checkpoint there. Give a run's folder such as "
        f"{runs_dir}/{run_name}_YYYYMMDD_HHMMSS, a folder checkpoints/step_XXXXXXXX in it, or auto."
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's own state in a checkpoint."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def check_resume(config: Config, checkpoint: Path) -> list[str]:
    """Refuse a resume whose configuration means another run; name every key.

    Returns:
        A sentence for each key that has another value now, and may.
    """
    saved = config_from_dict(read_state(checkpoint)["config"]).flat()
    now = config.flat()
    changed = [key for key in sorted(saved | now) if saved.get(key) != now.get(key)]
    refused = [
        f"{key} ({saved.get(key)!r} -> {now.get(key)!r})"
        for key in changed
        if key.startswith(FIXED_ON_RESUME)
        and key not in FREE_ON_RESUME
        # Rows from the cache have one order, whoever filled it.
        and not (key == "data.cache" and {saved[key], now[key]} == {"on", "only"})
    ]
    if refused:
        raise ValueError(
            f"--resume: {checkpoint} was trained with other values of {', '.join(refused)}: set them back, or start a "
            "new run."
        )
    return [f"resume: {key} was {saved.get(key)!r}, is now {now.get(key)!r}" for key in changed]
