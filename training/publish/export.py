"""Writes a trained model as `from_pretrained` loads it, with its Python source."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.io import fsync_folder, write_bytes


def model_files(model: AutoencoderKLUltra) -> dict[str, bytes]:
    """The files of a model's folder besides its weights: name -> content.

    `config.json` names the source file, so that `AutoModel.from_pretrained(folder, trust_remote_code=True)` works where
    this project is not installed.
    """
    config = json.loads(model.to_json_string())
    config.pop("_name_or_path", None)  # a path of this machine
    source = Path(inspect.getfile(type(model)))
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode(), source.name: source.read_bytes()}


def export_model(model: AutoencoderKLUltra, folder: Path) -> None:
    """Write a model to a folder, which is replaced when the new files are complete.

    Args:
        model: Unwrapped, in float32.
        folder: Destination; an older export there is removed, with the priors that were fitted to it.

    Raises:
        OSError: The disk is full or fails; an older export is unchanged.
    """
    temporary, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    for path in (temporary, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        model.save_pretrained(temporary, safe_serialization=True)
        for name, content in model_files(model).items():
            write_bytes(temporary / name, content)
        fsync_folder(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(str(error)) from None
        raise
    if folder.exists():  # two renames, so that a reader never finds an incomplete export
        os.replace(folder, old)
    os.replace(temporary, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
