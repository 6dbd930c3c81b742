"""Reads run folders: which runs there are, which checkpoints are valid, which one is the best.

    <runs_dir>/<run_name>_<time>/
        run.json, config.json, status.json, metrics.jsonl, samples/, ...
        checkpoints/step_XXXXXXXX/
            model/                     what `from_pretrained` loads: the EMA weights
            training_state/            what else a resume needs
            manifest.json              size and SHA-256 of every file; written last

Commands and training share it, so it needs the standard library only. `best` and `latest` beside the checkpoints are
links for people: copying a run may turn them into folders that stay old, so nothing here reads what they hold.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from training.config import Config, config_from_dict
from training.io import file_sha256, restore_fields

logger = logging.getLogger(__name__)

# Version of the checkpoints' layout; see `training.checkpoint.format` for when to raise it.
FORMAT = 2
MANIFEST = "manifest.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STATE_FILE = "training_state/trainer_state.json"
WEIGHTS_FILE = "training_state/weights.safetensors"
OPTIMIZER_FILE = "training_state/optimizer.safetensors"
DISCRIMINATOR_FILE = "training_state/discriminator.safetensors"
GUIDE_FILE = "training_state/next_guide.safetensors"
MODEL_FILE = f"model/{WEIGHTS}"
PRIORS = "priors"  # of the model that a run of the decoder alone started from
UPLOAD_LINKS = ".upload"  # hard links to the checkpoints that are being uploaded
RUN_FILE = "run.json"  # when and where the run was created, and from which weights
_REQUIRED = ("model/config.json", MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
_MAX_MANIFEST_BYTES = 16 << 20
_TIME_IN_NAME = re.compile(r"_(\d{8}_\d{6})$")


class InvalidCheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another format, with the reason."""


# ---------------------------------------------------------------------- runs


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder."""
    return any((path / name).exists() for name in (RUN_FILE, "status.json", "metrics.jsonl", "checkpoints"))


def list_runs(runs_dir: Path, run_name: str | None = None) -> list[Path]:
    """The run folders in `runs_dir`, newest first, by the time they were created.

    Args:
        runs_dir: `output.runs_dir`; need not exist.
        run_name: `output.run_name` of the runs; None for all runs.
    """
    pattern = "*" if run_name is None else f"{run_name}_*"
    runs = [path for path in runs_dir.glob(pattern) if path.is_dir() and is_run(path)]
    if run_name is not None:
        runs = [path for path in runs if _TIME_IN_NAME.sub("", path.name) == run_name]
    return sorted(runs, key=lambda path: (created(path), path.name), reverse=True)


def created(run_dir: Path) -> float:
    """When a run was created, in Unix seconds.

    `run.json` records it in UTC; without that file it is the local time in the folder's name, or else the folder's
    modification time.
    """
    try:
        return datetime.datetime.fromisoformat(read_json(run_dir / RUN_FILE)["created"]).timestamp()
    except (KeyError, TypeError, ValueError):
        pass
    try:
        return datetime.datetime.strptime(_TIME_IN_NAME.search(run_dir.name)[1], "%Y%m%d_%H%M%S").timestamp()
    except (TypeError, ValueError):
        return run_dir.stat().st_mtime


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where the file is missing, unreadable, or holds something else."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def saved_config(values: dict[str, Any]) -> Config:
    """The configuration that a run or a checkpoint has saved: unknown keys are ignored, missing ones take defaults.

    Raises:
        ValueError: A value has the wrong type or is out of range.
    """
    defaults = Config().to_dict()
    sections = restore_fields(defaults, values, "saved config")
    for name, section in sections.items():
        if name != "model":
            sections[name] = restore_fields(defaults[name], section, f"saved config, section {name}")
    return config_from_dict(sections)


# ---------------------------------------------------------------------- checkpoints


def step_folder(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of an optimizer step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; `verify` checks whether they are valid."""
    found = (run_dir / "checkpoints").glob("step_*")
    return sorted((path for path in found if re.fullmatch(r"step_\d{8,}", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def verify(checkpoint: Path, only: str = "") -> dict[str, Any]:
    """Check the files of a checkpoint against its manifest; nothing is loaded.

    Args:
        checkpoint: Its folder.
        only: Check only files whose names start with this, such as "model/".

    Returns:
        The manifest.

    Raises:
        InvalidCheckpointError: A file is missing or damaged, or the format is another.
    """
    path = _plain_file(checkpoint, MANIFEST)
    try:
        length = path.stat().st_size
        if length > _MAX_MANIFEST_BYTES:
            raise ValueError(f"{length} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["format"]
        entries = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidCheckpointError(f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    if version != FORMAT:
        raise InvalidCheckpointError(f"it has format {version!r}, and this version reads format {FORMAT}")
    for name in _REQUIRED:
        if name not in entries:
            raise InvalidCheckpointError(f"its {MANIFEST} does not list {name}")
    for name, (size, digest) in entries.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or set(name) & {"\\", "\0"}:
            raise InvalidCheckpointError(f"its {MANIFEST} lists {name!r}, outside of its folder")
        if not name.startswith(only):
            continue
        try:
            path = _plain_file(checkpoint, name)
            found = path.stat().st_size
            if found != size:
                raise InvalidCheckpointError(f"{name} has {found} bytes instead of {size}")
            if file_sha256(path) != digest:
                raise InvalidCheckpointError(f"{name} is not what was written (SHA-256 differs)")
        except OSError as error:
            raise InvalidCheckpointError(f"{name} cannot be read ({error})") from None
    return manifest


def _plain_file(checkpoint: Path, name: str) -> Path:
    """A file of a checkpoint, if it lies in the checkpoint's folder and not behind a link."""
    path = checkpoint / name
    if Path(os.path.realpath(path)) != Path(os.path.realpath(checkpoint)) / name or not path.is_file():
        raise InvalidCheckpointError(f"{name} is missing or not a plain file")
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- the best model


def best_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint with the best model of a run, and what its validation measured.

    The newest valid checkpoint records which step was the best (`progress.best`). If the model of that step is
    damaged, what an older checkpoint or `status.json` records is taken, with a warning.

    Returns:
        The checkpoint's folder, whose `model/` has been verified; `epoch`, `step` and `validation/*` of that model.

    Raises:
        ValueError: No checkpoint records a best model yet, or none of the recorded ones is valid.
    """
    problems: dict[str, str] = {}
    for best in _recorded_bests(run_dir):
        checkpoint = step_folder(run_dir, best["step"])
        if checkpoint.name in problems:
            continue
        try:
            verify(checkpoint, "model/")
        except InvalidCheckpointError as error:
            problems[checkpoint.name] = str(error)
            logger.warning("%s: the best model, %s, cannot be used (%s)", run_dir, checkpoint.name, error)
        else:
            return checkpoint, best
    if problems:
        shown = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise ValueError(f"the best model of {run_dir} is damaged ({shown}): restore it from a copy.")
    raise ValueError(
        f"{run_dir} has no best model yet (the first validation chooses one): continue the training, or "
        "give one of its checkpoints."
    )


def priors_of(model: Path) -> Path:
    """The folder of the priors of a model: beside its weights, or in the run whose checkpoint has the model."""
    if (model.parent / MANIFEST).is_file():  # RUN/checkpoints/step_XXXXXXXX/model
        return model.absolute().parents[2] / PRIORS
    return model / PRIORS


def check_exported(model: Path) -> None:
    """Check that files may be added to a model's folder.

    Raises:
        ValueError: It belongs to a checkpoint.
    """
    if (model.parent / MANIFEST).is_file():
        raise ValueError(
            f"{model} belongs to a checkpoint, which is removed when a better one comes: give the folder of an exported "
            "model, when the training has ended."
        )


def _recorded_bests(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every record of the best model, the most trustworthy first."""
    for checkpoint in reversed(list_checkpoints(run_dir)):
        try:
            verify(checkpoint, STATE_FILE)
        except InvalidCheckpointError:
            continue
        if best := read_state(checkpoint).get("progress", {}).get("best"):
            yield best
    best = read_json(run_dir / "status.json").get("best")
    if isinstance(best, dict) and isinstance(best.get("step"), int):
        yield best


def find_model(path: Path) -> tuple[Path, Path | None] | None:
    """The folder of the model that a path into a run means.

    A run's exported model lies outside of the run, where a later run of the same name replaces it. It is taken, with
    the priors and variants added to it, only while its weights are those of the run's best checkpoint.

    Args:
        path: A run's folder or `best` in it (its best model), or `checkpoints/` with `step_XXXXXXXX`, `best` or
            `latest`; the links need not exist.

    Returns:
        The model's folder, and the run's folder if the model is the best of a run; None if the path is none of these.

    Raises:
        ValueError: The run has no model yet, or the model is damaged.
    """
    absolute = Path(os.path.abspath(path))
    in_checkpoints = absolute.parent.name == "checkpoints"
    run_dir = absolute.parents[1] if in_checkpoints else absolute.parent
    if absolute.name == "best" and is_run(run_dir):
        path = run_dir
    elif absolute.name == "latest" and in_checkpoints and list_checkpoints(run_dir):
        path = list_checkpoints(run_dir)[-1]
    if is_run(path):
        checkpoint, _ = best_checkpoint(path)
        exported = read_json(path / "status.json").get("model_dir")
        saved = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"][MODEL_FILE]["sha256"]
        # A relative `model_dir` starts where the training did, which most often is beside the folder of all runs.
        for base in [] if exported is None else [Path(), path.absolute().parent.parent]:
            weights = base / exported / WEIGHTS
            if weights.is_file() and file_sha256(weights) == saved:
                return weights.parent, path
        return checkpoint / "model", path
    if (path / MANIFEST).is_file():
        try:
            verify(path, "model/")
        except InvalidCheckpointError as error:
            raise ValueError(f"the checkpoint {path} cannot be used: {error}.") from None
        return path / "model", None
    return None
