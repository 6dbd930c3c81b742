"""Grids of images that a run saves: reconstructions of validation images, and samples from priors."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import make_grid

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from modeling.latent_prior import DiffusionPrior, fit_gaussian
from training.data.images import normalize

PRIOR_IMAGES = 2048  # validation images to whose latents the Gaussian prior is fitted
RECONSTRUCTED_IMAGES = 8


@torch.no_grad()
def image_grids(
    accelerator: Accelerator, model: AutoencoderKLUltra, images: Tensor, *, num_samples: int, seed: int, batch: int
) -> dict[str, Tensor]:
    """Render the grids of a model.

    Args:
        accelerator: For precision.
        model: Unwrapped, on the device; its training mode is restored.
        images: Validation images (n, 3, H, W), uint8, on the host.
        num_samples: Images in a grid of samples.
        seed: Of the samples.
        batch: Images in one forward pass.

    Returns:
        Grids (3, height, width) in [0, 1], on the host: `samples` from N(0, 1), `samples_gaussian` from a Gaussian
        fitted to the latents of `images` (absent where they are fewer than 2 or not finite), and `reconstructions`.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    latents = _noise(model.latent_shape, num_samples, generator)
    grids = {"samples": sample_grid(accelerator, model, latents, batch)}
    encoded = posterior_samples(accelerator, model, images[:PRIOR_IMAGES], seed, batch)
    if len(encoded) > 1 and encoded.isfinite().all():
        gaussian, _ = fit_gaussian(encoded)
        fitted = gaussian(latents.flatten(1)).view_as(latents)  # the same noise
        grids["samples_gaussian"] = sample_grid(accelerator, model, fitted, batch)
    grids["reconstructions"] = reconstruction_grid(accelerator, model, images[:RECONSTRUCTED_IMAGES])
    model.train(was_training)
    return grids


@torch.no_grad()
def diffusion_grid(
    accelerator: Accelerator,
    model: AutoencoderKLUltra,
    prior: DiffusionPrior,
    *,
    num_samples: int,
    seed: int,
    batch: int,
) -> Tensor:
    """Render samples of a diffusion prior of the model's latents; see `image_grids`."""
    noise = _noise(prior.noise_shape, num_samples, torch.Generator().manual_seed(seed)).to(accelerator.device)
    latents = [prior.noise_to_latents(model, part) for part in noise.split(batch)]
    return sample_grid(accelerator, model, torch.cat(latents), batch)


def _noise(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    """One image at a time, so that the first images do not depend on `count`."""
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])


@torch.no_grad()
def reconstruction_grid(accelerator: Accelerator, model: AutoencoderKLUltra, images: Tensor) -> Tensor:
    """Render images (n, 3, H, W), uint8, above their reconstructions: (3, height, width) in [0, 1], on the host."""
    pixels = normalize(images.to(accelerator.device))
    with accelerator.autocast():
        reconstruction = model(pixels).sample.float()
    both = torch.cat([pixels, reconstruction]).clamp(-1, 1).add(1).div(2)
    return make_grid(both.cpu(), nrow=len(images), padding=2)


@torch.no_grad()
def posterior_samples(
    accelerator: Accelerator, model: AutoencoderKLUltra, images: Tensor, seed: int, batch: int
) -> Tensor:
    """Sample from the posterior of each image, to fit a prior to.

    Args:
        accelerator: For precision.
        model: Unwrapped.
        images: (n, 3, H, W), uint8.
        seed: Of the posterior's noise.
        batch: Images in one forward pass.

    Returns:
        Latents (n, C, h, w), float32, on the host.
    """
    generator, samples = torch.Generator().manual_seed(seed), []
    for part in images.split(batch):
        with accelerator.autocast():
            posterior = model.encode(normalize(part.to(accelerator.device))).latent_dist
        mean, std = posterior.mean.float().cpu(), posterior.std.float().cpu()
        samples.append(mean + std * torch.randn(mean.shape, generator=generator))
    return torch.cat(samples)


@torch.no_grad()
def sample_grid(accelerator: Accelerator, model: AutoencoderKLUltra, latents: Tensor, batch: int) -> Tensor:
    """Decode latents (n, C, h, w) to a grid with as many columns as rows, (3, height, width) in [0, 1], on the host."""
    samples = []
    with accelerator.autocast():
        for part in latents.split(batch):
            samples.append(model.decode(part.to(accelerator.device)).sample.float().cpu())
    pixels = torch.cat(samples).clamp(-1, 1).add(1).div(2)
    return make_grid(pixels, nrow=max(1, round(len(latents) ** 0.5)), padding=2)
