"""A training small enough for tests: one configuration, and the clean-up that a run in the test process needs."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import Config, config_from_dict

if TYPE_CHECKING:
    from modeling import AutoencoderKLUltra

# 40 pixels, and random crops of 32 pixels for the perceptual loss: the smallest size that the trunk takes, and below the image's.
# 20 faces in batches of 4: 5 steps an epoch, each with micro-batches of 3 images and of 1.
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {
        "sample_size": 40,
        "latent_dim": 16,
        "latent_layout": "vector",
        "latent_channels": 16,
        "latent_size": 1,
        "patch_size": 4,
        "encoder_block_out_channels": [16, 32],
        "encoder_layers_per_block": [1, 1],
        "decoder_block_out_channels": [16, 32],
        "decoder_layers_per_block": [1, 1],
        "vector_width": 8,
        "pca_size": 20,
        "pca_decode_size": 20,
    },
    "data": {
        "dataset": "synthetic_faces",
        "synthetic_train_images": 20,
        "synthetic_validation_images": 6,
        "decode_threads": 1,
        "prefetch_batches": 1,
    },
    "loss": {"trunk": "st_alexnet", "perceptual_crop_px": 32},
    "training_presets": {
        "num_epochs": 2,
        "batch_size": 4,
        "micro_batch_size": 3,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "mixed_precision": "no",
        "pca_init_images": 18,
        "kl_warmup_images": 8,
        "kl_half_life_images": 16,
        "kl_cycle_period": 2,
        "kl_cooldown_epochs": 1,
    },
    "output": {
        "run_name": "tiny",
        "log_every_steps": 2,
        "sample_every_epochs": 1,
        "num_samples": 4,
        "eval_lpips_trunk": "st_alexnet",
    },
}


def tiny_settings(folder: Path, faces: Path, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configuration as nested values: runs and models in `folder`, rendered faces in `faces`."""
    values = copy.deepcopy(SETTINGS)
    values["data"]["cache_dir"] = str(faces)
    values["output"] |= {"runs_dir": str(folder / "runs"), "model_dir": str(folder / "models")}
    for section, changes in sections.items():
        values.setdefault(section, {}).update(changes)
    return values


def tiny_config(folder: Path, faces: Path, **sections: dict[str, Any]) -> Config:
    """`tiny_settings`, checked."""
    return config_from_dict(tiny_settings(folder, faces, **sections))


def random_vae(**settings: Any) -> AutoencoderKLUltra:
    """The tiny model with random weights, so that every latent dimension changes the image."""
    import torch

    from modeling import AutoencoderKLUltra

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLUltra(**SETTINGS["model"] | settings)
        for parameter in vae.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return vae.eval()


@contextlib.contextmanager
def process_state() -> Iterator[None]:
    """Undo what a run does to its process: log handlers, captured warnings, accelerate's singletons.

    A run in it logs no cost estimate: counting its operations takes longer than a tiny run.
    """
    from accelerate.state import AcceleratorState, GradientState

    from training import setup

    estimate, setup.describe_estimate = setup.describe_estimate, lambda *_: "(no estimate)"
    root = logging.getLogger()
    handlers, level, show = list(root.handlers), root.level, warnings.showwarning
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        setup.describe_estimate = estimate
        for handler in list(root.handlers):
            root.removeHandler(handler)
            if handler not in handlers:
                handler.close()
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
        logging.captureWarnings(False)
        warnings.showwarning = show
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
