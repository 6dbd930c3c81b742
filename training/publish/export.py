"""Copies a trained model to the folder that users load with `from_pretrained`."""

from __future__ import annotations

import filecmp
import inspect
import os
import shutil
from pathlib import Path

from diffusers.models.modeling_utils import ModelMixin

from training.io import copy_folder, fsync_folder, write_bytes


def model_files(model: ModelMixin) -> dict[str, bytes]:
    """The files that `save_pretrained` writes besides the weights: name -> content."""
    source = Path(inspect.getfile(type(model)))
    return {"config.json": model.to_json_string().encode(), source.name: source.read_bytes()}


def export_model(source: Path, folder: Path, priors: Path | None = None) -> None:
    """Copy a model to a folder, which is replaced when the new files are complete.

    Args:
        source: The model's folder in a checkpoint.
        folder: Destination. An export of another model there is removed, with the priors that were fitted to it; that of
            this model stays as it is.
        priors: Folder of priors that belong to the model; copied with it if it exists.

    Raises:
        OSError: The disk is full or fails; an older export is unchanged.
    """
    files = [path for path in source.iterdir() if path.is_file()]
    copies = [(path, folder / path.name) for path in files]
    if all(copy.is_file() and filecmp.cmp(path, copy, shallow=False) for path, copy in copies):
        return
    temporary, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    for path in (temporary, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for path in files:
            write_bytes(temporary / path.name, path.read_bytes())
        if priors is not None:
            copy_folder(priors, temporary / priors.name)
        fsync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():  # two renames, so that a reader never finds an incomplete export
        os.replace(folder, old)
    os.replace(temporary, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
