"""A model with its priors, as `training.fit_prior` leaves it, and the images that they were fitted to."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from modeling.latent_prior import DiffusionPrior
from training.priors import fit

TRAIN, VALIDATION = 72, 6


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of smooth images, with a validation split."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        (folder / split).mkdir()
        for index in range(count):
            small = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
            small.resize((40, 40), Image.Resampling.BICUBIC).save(folder / split / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, photographs):
    """The folder of an exported model with a Gaussian prior, fitted by the command, and a diffusion prior."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    vae = tiny.random_vae()
    vae.save_pretrained(folder)
    assert fit.main([str(folder), "--data", f"imagefolder:{photographs}"]) == 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = DiffusionPrior(vae.config.latent_dim, 3, 20, 2, (8, 16), (1, 1, 1), num_inference_steps=3)
        for parameter in prior.parameters():  # the initial output is 0
            parameter.data += 0.1 * torch.randn(parameter.shape)
    prior.save_pretrained(folder / "priors" / "diffusion")
    return folder
