"""Writes checkpoints, `<run>/checkpoints/step_XXXXXXXX/`, and reads their tensors.

    model/                      the EMA weights, as `from_pretrained` loads them
    training_state/             what else a resume needs: safetensors and JSON, nothing pickled
        weights.safetensors     the weights in training, where EMA weights are kept besides
        optimizer.safetensors   state of the optimizer by parameter
        discriminator.safetensors   its weights and optimizer, with an adversarial term
        next_guide.safetensors  of a diffusion prior: the weights that will be its guide
        trainer_state.json      progress, plateau, KL controller, configuration, ...
    manifest.json               size and SHA-256 of every file; written last

A checkpoint is written under a temporary name, every file and folder is fsynced, and the folder is renamed when it is
complete. Only then are older checkpoints removed. The header of each safetensors file says which run and step it is of
(`weights_metadata`), so that a stray file can be traced. `training.run_files` verifies checkpoints and finds the best one.

`FORMAT` in `training.run_files` is the version of this layout. Raise it only when older code cannot read newer
checkpoints, or the reverse. A field more or less in `trainer_state.json` does not: `training.io.restore_fields`
ignores unknown fields and fills in missing ones.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import platform
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from training.io import fsync_folder, point_to, remove_folder, rename_folder, write_bytes
from training.run_files import FORMAT, MANIFEST, MODEL_FILE, STATE_FILE, list_checkpoints, step_folder, step_of

logger = logging.getLogger(__name__)

_TEMPORARY, _REMOVED, _REPLACED = ".writing_", ".removed_", ".replaced_"
_EXTRA_BYTES = 8 << 20  # on disk besides the tensors: JSON, sources, partly used blocks


@dataclass
class Snapshot:
    """A checkpoint in host memory.

    Attributes:
        step: Optimizer steps done.
        model_files: Name below model/ -> content; all but the weights.
        tensors: Name of a safetensors file in the checkpoint -> copies of its tensors, on the CPU.
        trainer_state: JSON values.
        best_step: Step of the best model so far, whose checkpoint is always kept.
    """

    step: int
    model_files: dict[str, bytes]
    tensors: dict[str, dict[str, Tensor]]
    trainer_state: dict[str, Any]
    best_step: int | None

    @property
    def size(self) -> int:
        """Approximate bytes on disk."""
        return _EXTRA_BYTES + sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


def weights_metadata(run_dir: Path, snapshot: Snapshot) -> dict[str, str]:
    """What the header of a checkpoint's safetensors files records.

    Returns:
        `format` (by which diffusers recognizes torch's files), `run` (name of the run's folder), `step`, `epoch`,
        `images_seen`, `config_sha256` (of `config` in trainer_state.json as JSON with sorted keys), and the metrics of the
        validation, if the model is the best so far.
    """
    state = snapshot.trainer_state
    config, progress = json.dumps(state.get("config"), sort_keys=True), state.get("progress", {})
    values = {"run": run_dir.name, "step": snapshot.step}
    values |= {name: progress[name] for name in ("epoch", "images_seen") if name in progress}
    values["config_sha256"] = hashlib.sha256(config.encode()).hexdigest()
    if (best := progress.get("best")) is not None and best["step"] == snapshot.step:
        values |= {name: value for name, value in best.items() if name.startswith("validation/")}
    return {"format": "pt", **{name: str(value) for name, value in values.items()}}


def sweep(run_dir: Path) -> list[str]:
    """Remove what an interrupted write or removal left behind, and restore what it was about to replace.

    Returns:
        The names of the removed files and folders.
    """
    folder = run_dir / "checkpoints"
    for path in folder.glob(f"{_REPLACED}*"):
        final = path.with_name(path.name.removeprefix(_REPLACED))
        if not final.exists():
            rename_folder(path, final)
    stale = [path for path in folder.glob(".*") if path.name.startswith((_TEMPORARY, _REMOVED, _REPLACED))]
    stale += [*folder.glob(".*.tmp"), *run_dir.glob(".best.tmp"), *run_dir.glob(f"{_REMOVED}*")]  # of links
    for path in stale:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in stale)


def quarantine_newer(run_dir: Path, checkpoint: Path) -> list[str]:
    """Rename the checkpoints that are newer than the one that a run resumes from, so that they do not count any more.

    Returns:
        The new names; a checkpoint that is renamed back to `step_...` can be loaded again.
    """
    names = []
    for path in list_checkpoints(run_dir):
        if step_of(path) > step_of(checkpoint):
            number = sum(1 for _ in path.parent.glob(f"quarantined_*_{path.name}"))
            names.append(path.rename(path.with_name(f"quarantined_{number}_{path.name}")).name)
    return names


def write_checkpoint(run_dir: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint, then remove older ones.

    Args:
        run_dir: The run's folder.
        snapshot: The content.
        keep: Number of newest checkpoints to keep, this one included; the best one is kept as well.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: The disk is full or fails. Older checkpoints are unchanged, and no partial one is left.
    """
    final = step_folder(run_dir, snapshot.step)
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    sweep(run_dir)  # after an earlier write that failed
    free = shutil.disk_usage(folder).free
    if free < snapshot.size:
        raise OSError(
            f"a checkpoint needs {snapshot.size / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free: make "
            "room, or lower output.keep_checkpoints"
        )
    temporary = folder / f"{_TEMPORARY}{final.name}"
    try:
        files = {}
        for part in (temporary, temporary / "model", temporary / "training_state"):
            part.mkdir()
        for name, content in _contents(run_dir, snapshot):
            files[name] = {"size": len(content), "sha256": write_bytes(temporary / name, content)}
            del content  # so that one file at a time is in memory
        manifest = {
            "format": FORMAT,
            "step": snapshot.step,
            "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": {
                "python": platform.python_version(),
                **{each.__name__: each.__version__ for each in (torch, diffusers, accelerate, safetensors)},
            },
            "files": files,
        }
        write_bytes(temporary / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        for part in (temporary / "model", temporary / "training_state", temporary):
            fsync_folder(part)
        if final.exists():  # of the same step, as after a stop at the end of an epoch
            rename_folder(final, folder / f"{_REPLACED}{final.name}")
        rename_folder(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):
            sweep(run_dir)
        raise
    for part in (folder, run_dir, run_dir.parent):  # the run's folder may be new, too
        fsync_folder(part)
    best = None if snapshot.best_step is None else step_folder(run_dir, snapshot.best_step)
    try:
        _update_links(run_dir, best)
    except OSError as error:
        logger.warning("%s is valid, but the links to it could not be updated (%s)", final, error)
    try:
        _prune(run_dir, best, keep)
    except OSError as error:
        logger.warning("%s is valid, but older checkpoints could not be removed (%s)", final, error)
    return final


def _update_links(run_dir: Path, best: Path | None) -> None:
    """Point `latest` and `best`, which are for people only, to their checkpoints."""
    newest = list_checkpoints(run_dir)[-1]
    point_to(newest.with_name("latest"), newest.name)
    if best is not None and best.exists():
        point_to(newest.with_name("best"), best.name)
        point_to(run_dir / "best", f"checkpoints/{best.name}/model")


def _prune(run_dir: Path, best: Path | None, keep: int) -> None:
    """Remove what was replaced, and the checkpoints that are neither among the newest nor the best."""
    sweep(run_dir)
    for old in list_checkpoints(run_dir)[:-keep]:
        if old != best:
            remove_folder(old)


def _contents(run_dir: Path, snapshot: Snapshot):
    """Yields (name, bytes) of every file but the manifest."""
    for name, content in snapshot.model_files.items():
        yield f"model/{name}", content
    metadata = weights_metadata(run_dir, snapshot)
    for name, tensors in snapshot.tensors.items():
        yield name, safetensors.torch.save(tensors, metadata=metadata)
    yield STATE_FILE, (json.dumps(snapshot.trainer_state, indent=2) + "\n").encode()


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time; training waits only for the copy to host memory.

    Args:
        run_dir: The run's folder.
        keep: See `write_checkpoint`.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir, self.keep = run_dir, keep
        self._thread: threading.Thread | None = None
        self._outcome: tuple[int, str | None] | None = None

    def start(self, snapshot: Snapshot) -> None:
        """Start a write; call `wait` for the previous one first."""
        assert self._thread is None, "one checkpoint at a time"

        def write() -> None:
            try:
                write_checkpoint(self.run_dir, snapshot, self.keep)
                self._outcome = (snapshot.step, None)
            except Exception as error:  # logged by the trainer; training continues
                self._outcome = (snapshot.step, f"{type(error).__name__}: {error}")

        # Not a daemon thread: the interpreter waits for it at exit.
        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether a write has ended and `wait` has not been called yet."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> tuple[int, str | None] | None:
        """Wait for the current write.

        Returns:
            (step, error message or None), or None if nothing was being written.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, outcome = None, self._outcome
        return outcome


# ---------------------------------------------------------------------- reading


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint; empty if there is no such file."""
    path = checkpoint / name
    return safetensors.torch.load(path.read_bytes()) if path.is_file() else {}


def check_shapes(checkpoint: Path, model: nn.Module) -> None:
    """Check that a checkpoint has the weights of a model, without reading them.

    Raises:
        ValueError: A name or a shape differs.
    """
    live = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with safetensors.safe_open(checkpoint / MODEL_FILE, "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    for name in sorted(live.keys() | saved.keys()):
        if live.get(name) != saved.get(name):
            raise ValueError(
                f"--resume: {name} has shape {saved.get(name)} in the checkpoint and {live.get(name)} here: this is another "
                "model."
            )


def copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved values into live tensors of the same names and shapes, which keep their strides and devices.

    Raises:
        ValueError: A name or a shape differs.
    """
    if differing := sorted(live.keys() ^ saved.keys()):
        raise ValueError(
            f"--resume: {what} {differing[0]} is {'missing' if differing[0] in live else 'unknown'} in the checkpoint."
        )
    with torch.no_grad():
        for name, tensor in live.items():
            if tensor.shape != saved[name].shape:
                raise ValueError(
                    f"--resume: {what} {name} has shape {tuple(saved[name].shape)} in the checkpoint and "
                    f"{tuple(tensor.shape)} here: this is another model."
                )
            tensor.copy_(saved[name])
