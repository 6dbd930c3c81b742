"""Checkpoints: `<run>/checkpoints/step_XXXXXXXX/`, what is in them, how they get there, when they are believed.

    model/                    the averaged weights, as `from_pretrained` loads them
    training_state/           all else that a resume needs: safetensors and JSON, nothing pickled
        weights.safetensors     the weights in training, where averaged ones are kept besides
        optimizer.safetensors   Adam's moments and counts, by parameter
        trainer_state.json      progress, plateau, KL controller, configuration, ...
    manifest.json             size and SHA-256 of every file; written last

A checkpoint is written under a temporary name, every file and folder forced to disk, and renamed when complete: a
folder with the final name is whole, and the manifest finds what a disk did to it since. Only then are older ones
removed. `latest` and `best` beside them are links for people; a resume trusts manifests alone. What this file is not
for: what the state is (trainer.py), which checkpoint a resume takes (resume.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import accelerate
import diffusers
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from training.io import file_sha256, fsync_folder, point_to, remove_folder, rename_folder, write_bytes

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE_FILE = "training_state/trainer_state.json"
WEIGHTS_FILE = "training_state/weights.safetensors"
OPTIMIZER_FILE = "training_state/optimizer.safetensors"
MODEL_FILE = "model/diffusion_pytorch_model.safetensors"
_REQUIRED = ("model/config.json", MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
_TEMPORARY, _REMOVED, _REPLACED = ".writing_", ".removed_", ".replaced_"
_MAX_MANIFEST_BYTES = 16 << 20
_SLACK_BYTES = 8 << 20  # of the disk, besides the tensors: JSON, sources, blocks half used


class InvalidCheckpointError(ValueError):
    """A checkpoint that cannot be believed, with the reason."""


@dataclass
class Snapshot:
    """A checkpoint in host memory: copies, which training does not change any more.

    Attributes:
        step: Optimizer updates done.
        model_files: Name below model/ -> content; all but the weights.
        tensors: Name of a safetensors file in the checkpoint -> its tensors, on the CPU.
        trainer_state: JSON-able.
        best_step: Step of the best model so far, whose checkpoint is always kept.
    """

    step: int
    model_files: dict[str, bytes]
    tensors: dict[str, dict[str, Tensor]]
    trainer_state: dict[str, Any]
    best_step: int | None

    @property
    def size(self) -> int:
        """Bytes on disk, nearly."""
        held = sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())
        return held + _SLACK_BYTES


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; whether they can be believed, `verify` says."""
    found = (run_dir / "checkpoints").glob("step_*")
    return sorted(path for path in found if re.fullmatch(r"step_\d{8,}", path.name))


def sweep(run_dir: Path) -> list[str]:
    """Remove what an interrupted write or removal has left, and put back what it was about to replace.

    Returns:
        The names of what was removed.
    """
    folder = run_dir / "checkpoints"
    for path in folder.glob(f"{_REPLACED}*"):
        final = path.with_name(path.name.removeprefix(_REPLACED))
        if not final.exists():
            rename_folder(path, final)
    stale = [path for path in folder.glob(".*") if path.name.startswith((_TEMPORARY, _REMOVED, _REPLACED))]
    stale += folder.glob(".*.tmp")  # links
    for path in stale:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in stale)


def quarantine_newer(run_dir: Path, checkpoint: Path) -> list[str]:
    """Rename the checkpoints that are newer than one that a run goes back to, so that they are not taken for its own.

    Returns:
        Their new names; the folders are whole, and can be loaded by their paths once they are named step_... again.
    """
    names = []
    for path in list_checkpoints(run_dir):
        if path.name > checkpoint.name:
            number = sum(1 for _ in path.parent.glob(f"set_aside_*_{path.name}"))
            path = path.rename(path.with_name(f"set_aside_{number}_{path.name}"))
            names.append(path.name)
    return names


def write_checkpoint(run_dir: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a snapshot, then remove older checkpoints.

    Args:
        run_dir: The run's folder.
        snapshot: What to write.
        keep: Newest checkpoints to keep, this one included; the best one is kept besides.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: The disk is full or fails. Older checkpoints are as they were, and nothing half-written stays.
    """
    final = step_folder(run_dir, snapshot.step)
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    sweep(run_dir)  # of an earlier write that failed
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
        for name, content in _contents(snapshot):
            files[name] = {"size": len(content), "sha256": write_bytes(temporary / name, content)}
            del content  # one file at a time in memory
        manifest = {
            "format": FORMAT,
            "step": snapshot.step,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": {
                "python": platform.python_version(),
                **{each.__name__: each.__version__ for each in (torch, diffusers, accelerate, safetensors)},
            },
            "processes": snapshot.trainer_state.get("processes"),
            "config_sha256": hashlib.sha256(json.dumps(snapshot.trainer_state.get("config")).encode()).hexdigest(),
            "files": files,
        }
        write_bytes(temporary / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        for part in (temporary / "model", temporary / "training_state", temporary):
            fsync_folder(part)
        if final.exists():  # of the same step, as after a stop at an epoch's end; `sweep` knows the name
            rename_folder(final, folder / f"{_REPLACED}{final.name}")
        rename_folder(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):
            sweep(run_dir)
        raise
    for part in (folder, run_dir, run_dir.parent):  # the names of the two may be as new as the checkpoint
        fsync_folder(part)
    try:
        sweep(run_dir)  # what was replaced
        _tidy(run_dir, final, snapshot.best_step, keep)
    except OSError as error:
        logger.warning("%s is whole, but links and older checkpoints beside it stay as they are (%s)", final, error)
    return final


def _tidy(run_dir: Path, newest: Path, best_step: int | None, keep: int) -> None:
    """Let the links point to the newest and the best checkpoint, and remove those that are neither kept nor best."""
    point_to(newest.with_name("latest"), newest.name)
    kept = set(list_checkpoints(run_dir)[-keep:])
    if best_step is not None and (best := step_folder(run_dir, best_step)).exists():
        point_to(newest.with_name("best"), best.name)
        point_to(run_dir / "best", f"checkpoints/{best.name}/model")  # what `from_pretrained` wants
        kept.add(best)
    for old in list_checkpoints(run_dir):
        if old not in kept:
            remove_folder(old)


def _contents(snapshot: Snapshot):
    """(Name, bytes) of every file but the manifest, one at a time."""
    for name, content in snapshot.model_files.items():
        yield f"model/{name}", content
    for name, tensors in snapshot.tensors.items():
        yield name, safetensors.torch.save(tensors, metadata={"format": "pt"})
    yield STATE_FILE, (json.dumps(snapshot.trainer_state, indent=2) + "\n").encode()


class CheckpointWriter:
    """Writes snapshots in a thread, one at a time, so that training waits for the copy to host memory only.

    Args:
        run_dir: The run's folder.
        keep: See `write_checkpoint`.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir, self.keep = run_dir, keep
        self._thread: threading.Thread | None = None
        self._outcome: tuple[int, str | None] | None = None

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write; the one before must have been waited for."""
        assert self._thread is None, "one checkpoint at a time"

        def write() -> None:
            try:
                write_checkpoint(self.run_dir, snapshot, self.keep)
                self._outcome = (snapshot.step, None)
            except Exception as error:  # said at the next step; the run and older checkpoints go on
                self._outcome = (snapshot.step, f"{type(error).__name__}: {error}")

        # Not a daemon: an exit of the interpreter waits for it.
        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether a write has ended, and its outcome not been taken."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> tuple[int, str | None] | None:
        """Wait for the write in hand.

        Returns:
            (step, what went wrong or None), or None where nothing was being written.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, outcome = None, self._outcome
        return outcome


# ---------------------------------------------------------------------- reading


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against the manifest; nothing is loaded.

    Returns:
        The manifest.

    Raises:
        InvalidCheckpointError: What is wrong, in a few words.
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
    """A file of a checkpoint, if it lies in its folder itself and not behind a link."""
    path = checkpoint / name
    if Path(os.path.realpath(path)) != Path(os.path.realpath(checkpoint)) / name or not path.is_file():
        raise InvalidCheckpointError(f"{name} is missing or not a plain file")
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's own state in a checkpoint."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one of a checkpoint's files; empty where it has no such file."""
    path = checkpoint / name
    return safetensors.torch.load(path.read_bytes()) if path.is_file() else {}


def copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved values into live tensors of the same names and shapes, whose strides and devices stay.

    Raises:
        ValueError: A name or a shape differs; names the first.
    """
    if odd := sorted(live.keys() ^ saved.keys()):
        raise ValueError(
            f"--resume: {what} {odd[0]} is {'missing' if odd[0] in live else 'unknown'} in the checkpoint."
        )
    with torch.no_grad():
        for name, tensor in live.items():
            if tensor.shape != saved[name].shape:
                raise ValueError(
                    f"--resume: {what} {name} has shape {tuple(saved[name].shape)} in the checkpoint and "
                    f"{tuple(tensor.shape)} here: the model is another."
                )
            tensor.copy_(saved[name])
