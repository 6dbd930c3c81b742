"""The finished model on disk: what `from_pretrained` loads, with the model's source beside it.

What it is not for: what resume needs (checkpoint.py), and uploading (hub.py).
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.files import write_json


def model_files(model: AutoencoderKLUltra) -> dict[str, bytes]:
    """All that belongs into a model's folder besides its weights: name -> content.

    The model's source travels along, and `config.json` names it, so that
    `AutoModel.from_pretrained(folder, trust_remote_code=True)` works where this project is not installed.
    """
    type(model).register_for_auto_class("AutoModel")
    config = json.loads(model.to_json_string())
    config.pop("_name_or_path", None)  # the folder on this machine that the model was loaded from
    source = Path(inspect.getfile(type(model)))
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode(), source.name: source.read_bytes()}


def export_model(model: AutoencoderKLUltra, folder: Path) -> None:
    """Write what `from_pretrained` loads, replacing `folder` when complete.

    The model's source travels along, and `config.json` names it, so that
    `AutoModel.from_pretrained(folder, trust_remote_code=True)` works where this project is not installed.

    Args:
        model: Unwrapped, in float32.
        folder: Destination; an older export there is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    type(model).register_for_auto_class("AutoModel")
    model.save_pretrained(temporary, safe_serialization=True)
    config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # the folder on this machine that the model was loaded from
    write_json(temporary / "config.json", config)
    source = Path(inspect.getfile(type(model)))
    shutil.copyfile(source, temporary / source.name)
    if folder.exists():
        # Two renames: a reader never meets half an export.
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)
