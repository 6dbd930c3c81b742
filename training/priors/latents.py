"""Latents of faces, and how close samples come to the faces that a prior was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from modeling.pipeline import FaceVAEPipeline
from training.data.images import normalize
from training.evaluate.frechet import frechet_distance

_THUMBNAIL_SIZE = 32  # pixels; images of this size are compared: identity and background, no texture


@dataclass
class FaceLatents:
    """Posteriors of faces.

    Attributes:
        mean, std: Of the posteriors, flat, (n, latent_dim), float32.
        thumbnails: The images at no more than 32 pixels, (n, 3, s, s) in [-1, 1], on the CPU.
        features: Of the first images, for the Frechet distance, (k, feature dimension).
    """

    mean: Tensor
    std: Tensor
    thumbnails: Tensor
    features: np.ndarray | None = None

    def sample(self, generator: torch.Generator, indices: Tensor | None = None) -> Tensor:
        """One sample from each posterior (of `indices`), (n, latent_dim); the generator is on the CPU."""
        mean, std = (self.mean, self.std) if indices is None else (self.mean[indices], self.std[indices])
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean)


@torch.no_grad()
def encode_faces(
    model: AutoencoderKLUltra,
    batches: Iterable[Tensor],
    with_flips: bool,
    features: Callable[[Tensor], Tensor] | None = None,
    num_features: int = 0,
) -> FaceLatents:
    """Encodes images.

    Args:
        model: In evaluation mode.
        batches: (n, 3, S, S), uint8.
        with_flips: Encode the horizontally flipped images too; they follow after all others, in the same order.
        features: Of images (n, 3, S, S) in [-1, 1]; computed for the first `num_features` images.
        num_features: Number of images that `features` is computed for.
    """
    plain: list[tuple[Tensor, Tensor, Tensor]] = []
    flipped: list[tuple[Tensor, Tensor, Tensor]] = []
    feature_batches: list[Tensor] = []

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = model.encode(pixels).latent_dist
        return posterior.mean.flatten(1).float(), posterior.std.flatten(1).float(), thumbnails(pixels).cpu()

    for batch in batches:
        pixels = normalize(batch.to(model.device))
        plain.append(encode(pixels))
        if with_flips:
            flipped.append(encode(pixels.flip(-1)))
        missing = num_features - sum(map(len, feature_batches))
        if features is not None and missing > 0:
            feature_batches.append(features(pixels[:missing]).cpu())
    mean, std, small = (torch.cat(parts) for parts in zip(*plain, *flipped))
    return FaceLatents(mean, std, small, torch.cat(feature_batches).numpy() if feature_batches else None)


def thumbnails(pixels: Tensor) -> Tensor:
    """(n, 3, H, W) to at most 32 x 32 pixels, by area interpolation."""
    return F.adaptive_avg_pool2d(pixels, min(_THUMBNAIL_SIZE, pixels.shape[-1]))


def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Root mean squared difference of each query (n, d) to the nearest reference (m, d); (n,)."""
    # Not by matrix products: the difference of two large products is rounding error for near-duplicates.
    distances = [
        torch.cdist(part, references, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
        for part in queries.split(64)
    ]
    return torch.cat(distances) / queries.shape[1] ** 0.5


@torch.no_grad()
def compare_samples(
    pipeline: FaceVAEPipeline,
    samples: dict[str, Tensor],
    faces: FaceLatents,
    features: Callable[[Tensor], Tensor] | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Distances of latents, and of what they decode to, from training faces.

    Args:
        pipeline: Decodes.
        samples: Name -> latents (n, C, h, w). "training" are samples from the posteriors of training faces: samples as
            close as the farthest of them are counted as near-duplicates.
        faces: The training faces, with flipped ones if the model was trained on them.
        features: Of images in [-1, 1], for the Frechet distance to `faces.features`; None leaves it out.
        batch_size: Images decoded at once.

    Returns:
        For each name: `images`, `latent_min`, `latent_median` (distance to the nearest training face, in standard
        deviations of a latent dimension), `pixel_min`, `pixel_median` (the same of thumbnails in [-1, 1]),
        `near_duplicates` (number of samples as close as "training" ones, in either) and `frechet`.
    """
    scale = (faces.mean.var(dim=0) + faces.std.square().mean(dim=0)).sqrt().clamp_min(1e-6)
    report: dict[str, dict[str, float]] = {}
    limits: dict[str, float] = {}
    for name in ["training", *(name for name in samples if name != "training")]:
        images = 2 * pipeline.decode(samples[name], "pt", batch_size).float().cpu() - 1
        latents = samples[name].flatten(1).to(scale)
        distances = {
            "latent": nearest_distances(latents / scale, faces.mean / scale).cpu(),
            "pixel": nearest_distances(thumbnails(images).flatten(1), faces.thumbnails.flatten(1)),
        }
        limits = limits or {kind: values.max().item() for kind, values in distances.items()}
        near = torch.stack([distances[kind] <= limits[kind] for kind in distances]).any(dim=0)
        report[name] = {"images": len(images), "near_duplicates": int(near.sum())}
        for kind, values in distances.items():
            report[name] |= {f"{kind}_min": values.min().item(), f"{kind}_median": values.median().item()}
        if features is not None:
            parts = [features(part.to(pipeline.device)).cpu() for part in images.split(batch_size)]
            report[name]["frechet"] = frechet_distance(torch.cat(parts).numpy(), faces.features)
    return report
