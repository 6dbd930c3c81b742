"""Latents of faces, to which priors are fitted and with which their samples are compared."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.config import DataConfig
from training.data.images import normalize
from training.data.stream import TrainStream, load_validation, validation_attributes

_THUMBNAIL_SIZE = 32  # pixels; images of this size are compared: identity and background, no texture

Faces = Iterable[tuple[Tensor, Tensor]]  # pixels (n, 3, S, S), uint8, and attributes (n, attributes), int8


def latents_fingerprint(vae: AutoencoderKLUltra) -> str:
    """SHA-256 of the weights that latents and their PCA images depend on: all but those of the convolutional decoder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if not name.startswith("decoder."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def training_faces(
    data: DataConfig, resolution: int, max_images: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Opens the training images; returns an iterator over batches of the first ones, with a progress bar."""
    # One image at a time, so that no image of the last batch is left out.
    stream = TrainStream(data, resolution=resolution, seed=0, global_batch=1, rank=0, world_size=1)
    total = max_images if stream.num_examples is None else min(max_images, stream.num_examples)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        interval = 0.1 if sys.stderr.isatty() else 30.0  # seconds; each update is a line of a file
        images = stream.epoch_batches(0, max_batches=total)
        images = tqdm(images, desc="encoding", total=total, unit="image", mininterval=interval, maxinterval=interval)
        pending = []
        for image in images:
            pending.append((image.pixels, image.attributes))
            if len(pending) == batch_size:
                yield tuple(map(torch.cat, zip(*pending)))
                pending = []
        if pending:
            yield tuple(map(torch.cat, zip(*pending)))

    return batches()


def validation_faces(data: DataConfig, resolution: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Opens and decodes the validation images; returns an iterator over batches of them."""
    pixels, indices = load_validation(data, resolution=resolution, rank=0, world_size=1)
    return zip(pixels.split(batch_size), validation_attributes(data, indices).split(batch_size))


@dataclass
class FaceLatents:
    """Posteriors of faces.

    Attributes:
        mean, std: Of the posteriors, flat, (n, latent_dim), float32.
        thumbnails: The images at no more than 32 pixels, (n, 3, s, s) in [-1, 1], on the CPU; (0,) where left out.
        attributes: (n, attributes), int8: 1 present, -1 absent, 0 unknown.
        features: Name -> features of the first images, for Frechet distances, (k, feature dimension).
    """

    mean: Tensor
    std: Tensor
    thumbnails: Tensor
    attributes: Tensor
    features: dict[str, np.ndarray] = field(default_factory=dict)

    def sample(self, generator: torch.Generator, indices: Tensor | None = None) -> Tensor:
        """One sample from each posterior (of `indices`), (n, latent_dim); the generator is on the CPU."""
        mean, std = (self.mean, self.std) if indices is None else (self.mean[indices], self.std[indices])
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean)


@torch.no_grad()
def encode_faces(
    model: AutoencoderKLUltra,
    batches: Faces,
    with_flips: bool,
    features: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    num_features: int = 0,
    with_thumbnails: bool = True,
) -> FaceLatents:
    """Encodes images.

    Args:
        model: In evaluation mode.
        batches: Pixels and attributes.
        with_flips: Encode the horizontally flipped images too; they follow after all others, in the same order.
        features: Name -> function of images (n, 3, S, S) in [-1, 1]; computed for the first `num_features` images.
        num_features: Number of images that `features` is computed for.
        with_thumbnails: Keep the images at 32 pixels, 12 kB each.
    """
    plain: list[tuple[Tensor, ...]] = []
    flipped: list[tuple[Tensor, ...]] = []
    found: dict[str, list[Tensor]] = {name: [] for name in features or {}}

    def encode(pixels: Tensor, attributes: Tensor) -> tuple[Tensor, ...]:
        posterior = model.encode(pixels).latent_dist
        small = thumbnails(pixels).cpu() if with_thumbnails else torch.zeros(0)
        return posterior.mean.flatten(1).float(), posterior.std.flatten(1).float(), small, attributes

    for batch, attributes in batches:
        pixels = normalize(batch.to(model.device))
        plain.append(encode(pixels, attributes))
        if with_flips:
            flipped.append(encode(pixels.flip(-1), attributes))
        missing = num_features - sum(len(means) for means, *_ in plain[:-1])
        for name, parts in found.items():
            if missing > 0:
                parts.append(features[name](pixels[:missing]).cpu())
    mean, std, small, attributes = (torch.cat(parts) for parts in zip(*plain, *flipped))
    return FaceLatents(mean, std, small, attributes, {name: torch.cat(parts).numpy() for name, parts in found.items()})


def thumbnails(pixels: Tensor) -> Tensor:
    """(n, 3, H, W) to at most 32 x 32 pixels, by area interpolation."""
    return F.adaptive_avg_pool2d(pixels, min(_THUMBNAIL_SIZE, pixels.shape[-1]))
