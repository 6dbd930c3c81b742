"""Validation on fixed images, and the grids: what the averaged weights do to faces they were not trained on.

What it is for: the figures by which the learning rate, early stopping and the best model are decided. What it is not
for: choosing what to do with them (trainer.py). The mean of the posterior is decoded, never a draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import make_grid

from modeling.autoencoder_kl_ultra import LOGVAR_MAX, LOGVAR_MIN, AutoencoderKLUltra
from training.data.images import normalize
from training.evaluate.metrics import image_metrics
from training.losses.objective import LossWeights, vae_loss
from training.losses.perceptual import PerceptualTrunk
from training.step import sample_step_noise

# A latent number is active if its posterior mean varies over images by more than this (Burda et al. 2016, section 2).
ACTIVE_VARIANCE = 0.01
_WINDOW_SEED = 20_161_016  # of the fixed perceptual windows: the same for every validation of every run


@dataclass
class Validation:
    """The result of one pass over the validation images.

    Attributes:
        values: Means over images: `mse` on [-1, 1], `psnr` dB, `ssim`, `lpips_<trunk>`, `reconstruction_loss` (the
            training loss without KL, whole images, fixed perceptual windows), `kl` in nats per number, `active_units`
            (a count), `posterior_sigma`, and `latents_mean` and `latents_std` over numbers and images.
        kl_per_dimension: KL of each latent number, nats, (numbers,).
        channel_mean, channel_std: Of each latent channel over images and positions, drawn from the posterior, (C,).
        sigma_at_bound_fraction: Share of latent numbers whose log-variance sits at a bound.
    """

    values: dict[str, float]
    kl_per_dimension: Tensor
    channel_mean: Tensor
    channel_std: Tensor
    sigma_at_bound_fraction: float


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: AutoencoderKLUltra,
    images: Tensor,
    indices: list[int],
    *,
    batch: int,
    weights: LossWeights,
    trunk: PerceptualTrunk | None,
    crop_px: int | None,
    lpips_trunk: PerceptualTrunk | None = None,
    lpips_crop_px: int | None = None,
    reported: PerceptualTrunk | None = None,
) -> Validation:
    """Measure a model on this process's share of the validation images, reduced over all processes.

    Args:
        accelerator: For precision and reduction.
        model: Unwrapped; left in evaluation mode as found.
        images: (n, 3, H, W), uint8, on the host; n may differ between processes.
        indices: The images' global numbers, which choose their perceptual windows.
        batch: Images in one forward pass.
        weights: Of the reconstruction loss.
        trunk: Of the reconstruction loss; None if no term needs it.
        crop_px: Side of its windows; None for the whole image.
        lpips_trunk, lpips_crop_px: The same for the second network of the loss's LPIPS, if there is one.
        reported: Trunk of the LPIPS that is reported, on whole images; None leaves it out.
    """
    device, side = accelerator.device, images.shape[-1]
    was_training = model.training
    model.eval()
    shape = (model.config.latent_channels, model.config.latent_size, model.config.latent_size)
    # Sums over images; float64 where there is one, so that the order of images does not show.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums: dict[str, Tensor] = {"images": torch.zeros((), dtype=dtype, device=device)}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + value.to(dtype)

    for start in range(0, max(len(images), 1), batch):
        part, numbers = images[start : start + batch], indices[start : start + batch]
        if not len(part):  # fewer images than processes: this one takes part in the reduction with zeros
            part, numbers = images.new_zeros(1, 3, side, side), []
        pixels = normalize(part.to(device))
        counted = len(numbers)
        draws = sample_step_noise(_WINDOW_SEED, 0, numbers or [0], shape, side, (crop_px, lpips_crop_px))
        with accelerator.autocast():
            output = model(pixels)
            reconstruction, posterior = output.sample.float(), output.posterior
            _, parts = vae_loss(
                reconstruction,
                pixels,
                posterior.mean,
                posterior.logvar,
                weights=weights,
                beta=0.0,
                trunk=trunk,
                crop=draws.crops[0],
                lpips_trunk=lpips_trunk,
                lpips_crop=draws.crops[1],
            )
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + torch.exp(0.5 * logvar) * draws.noise.to(device)
        weight = 1.0 if counted else 0.0
        sums["images"] += counted
        add("reconstruction_loss", parts["reconstruction"] * counted)
        for name, value in image_metrics(reconstruction, pixels, reported).items():
            add(name, value.sum() * weight)
        add("mean", mean.sum(dim=0) * weight)
        add("mean_square", mean.square().sum(dim=0) * weight)
        add("kl", 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=0) * weight)
        add("sigma", torch.exp(0.5 * logvar).mean() * counted)
        at_bound = (logvar <= LOGVAR_MIN + 1e-3) | (logvar >= LOGVAR_MAX - 1e-3)
        add("at_bound", at_bound.to(dtype).mean() * counted)
        add("latents", latents.sum(dim=(0, 2, 3)) * weight)
        add("latents_square", latents.square().sum(dim=(0, 2, 3)) * weight)
    model.train(was_training)

    sums = accelerator.reduce(sums, reduction="sum")
    count = sums.pop("images")
    means = {name: (value / count).cpu() for name, value in sums.items()}
    variance = means["mean_square"] - means["mean"].square()
    channel_mean = means["latents"] / shape[1] ** 2
    channel_square = means["latents_square"] / shape[1] ** 2
    channel_variance = (channel_square - channel_mean.square()).clamp_min(0)
    tensors = ("mean", "mean_square", "kl", "latents", "latents_square", "sigma", "at_bound")
    values = {name: value.item() for name, value in means.items() if name not in tensors}
    values |= {
        "kl": means["kl"].mean().item(),
        "active_units": float((variance > ACTIVE_VARIANCE).sum()),
        "posterior_sigma": means["sigma"].item(),
        "latents_mean": channel_mean.mean().item(),
        "latents_std": (channel_square.mean() - channel_mean.mean().square()).clamp_min(0).sqrt().item(),
    }
    return Validation(values, means["kl"].flatten(), channel_mean, channel_variance.sqrt(), means["at_bound"].item())


@torch.no_grad()
def reconstruction_grid(accelerator: Accelerator, model: AutoencoderKLUltra, images: Tensor) -> Tensor:
    """Originals above their reconstructions.

    Args:
        accelerator: For precision.
        model: Unwrapped.
        images: (n, 3, H, W), uint8.

    Returns:
        (3, height, width) in [0, 1], on the host.
    """
    pixels = normalize(images.to(accelerator.device))
    with accelerator.autocast():
        reconstruction = model(pixels).sample.float()
    rows = torch.cat([pixels, reconstruction]).clamp(-1, 1).add(1).div(2)
    return make_grid(rows.cpu(), nrow=len(images), padding=2)


@torch.no_grad()
def posterior_samples(
    accelerator: Accelerator, model: AutoencoderKLUltra, images: Tensor, seed: int, batch: int
) -> Tensor:
    """A draw from the posterior of each image: what a prior is fitted to.

    Args:
        accelerator: For precision.
        model: Unwrapped.
        images: (n, 3, H, W), uint8.
        seed: Of the draws.
        batch: Images in one forward pass.

    Returns:
        Latents (n, C, h, w), float32, on the host.
    """
    generator, draws = torch.Generator().manual_seed(seed), []
    for part in images.split(batch):
        with accelerator.autocast():
            posterior = model.encode(normalize(part.to(accelerator.device))).latent_dist
        mean, deviation = posterior.mean.float().cpu(), posterior.std.float().cpu()
        draws.append(mean + deviation * torch.randn(mean.shape, generator=generator))
    return torch.cat(draws)


@torch.no_grad()
def sample_grid(accelerator: Accelerator, model: AutoencoderKLUltra, latents: Tensor, batch: int) -> Tensor:
    """Decoded latents, in as many columns as rows.

    Args:
        accelerator: For precision.
        model: Unwrapped.
        latents: (n, C, h, w).
        batch: Images in one forward pass.

    Returns:
        (3, height, width) in [0, 1], on the host.
    """
    samples = []
    with accelerator.autocast():
        for part in latents.split(batch):
            samples.append(model.decode(part.to(accelerator.device)).sample.float().cpu())
    pixels = torch.cat(samples).clamp(-1, 1).add(1).div(2)
    return make_grid(pixels, nrow=max(1, round(len(latents) ** 0.5)), padding=2)
