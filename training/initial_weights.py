"""Starts a new run from the weights of a trained model (`training_presets.init_from`)."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from modeling.pipeline import FITTED_PRIORS, FaceVAEPipeline
from training.cli import resolve_model
from training.evaluate.models import load_model, weights_metadata
from training.run_files import priors_of, read_json

# Keys of `config.json` that do not change the shape of a weight: initial or measured values.
_VALUES = ("logvar_init", "scaling_factor", "shift_factor", "latents_mean", "latents_std")


def load_initial_weights(model: AutoencoderKLUltra, init_from: str) -> dict[str, Any]:
    """Copy the weights of a trained model into a new one.

    The shapes of all weights must be equal. So a model of the spatial layout may have another `sample_size`.

    Args:
        model: Changed in place.
        init_from: Folder of an exported model, a run (its best model) or a checkpoint; or a Hub id.

    Returns:
        `init_from`; `base_model`: the Hub id, or None for a folder; `weights`: see `weights_metadata`.

    Raises:
        ValueError: There is no such model, or it has another architecture.
    """
    loaded = load_model(init_from)
    saved, wanted = loaded.state_dict(), model.state_dict()
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in wanted.items()}:
        keys = [key for key in inspect.signature(AutoencoderKLUltra.__init__).parameters if key in model.config]
        values = [(key, _plain(loaded.config[key]), _plain(model.config[key])) for key in keys if key not in _VALUES]
        differing = [(key, there, here) for key, there, here in values if there != here]
        shown = ", ".join(
            f"model.{key} is {json.dumps(there)} there and {json.dumps(here)} here" for key, there, here in differing
        )
        options = [f"model.{key}={json.dumps(there, separators=(',', ':'))}" for key, there, _ in differing]
        raise ValueError(
            f"training_presets.init_from {init_from} has another architecture ({shown}): start from another model, or take "
            f"its values with {' '.join(f'--set {shlex.quote(option)}' for option in options)}"
        )
    model.load_state_dict(saved)
    source = resolve_model(init_from).path
    base_model = None if Path(source).is_dir() else source
    return {"init_from": init_from, "base_model": base_model, "weights": weights_metadata(init_from)}


def fitted_priors(init_from: str, latent_dim: int) -> list[Path]:
    """Folders of the priors that were fitted to the latents of a model.

    Args:
        init_from: See `load_initial_weights`.
        latent_dim: Of the new model; that of another image size may be another.
    """
    source = resolve_model(init_from)
    folder = Path(source.path)
    if not folder.is_dir():  # a Hub id; a pipeline has its VAE in a subfolder
        inside = "" if source.subfolder else "priors/"
        patterns = [f"{inside}{name}/*" for name in FITTED_PRIORS]
        folder = Path(snapshot_download(source.path, allow_patterns=patterns)) / inside
    elif (folder.parent / FaceVAEPipeline.config_name).is_file():
        folder = folder.parent
    else:
        folder = priors_of(folder)
    folders = [folder / name for name in FITTED_PRIORS]
    return [path for path in folders if read_json(path / "config.json").get("latent_dim") == latent_dim]


def _plain(value: Any) -> Any:
    """A value as in JSON, where tuples are lists."""
    return list(value) if isinstance(value, tuple) else value
