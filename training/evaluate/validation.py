"""Validation during training: metrics of the EMA weights on fixed images that are not trained on.

The learning rate, early stopping and the best model are decided by these metrics. The posterior mean is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from modeling.autoencoder_kl_ultra import LOGVAR_MAX, LOGVAR_MIN, AutoencoderKLUltra
from training.data.images import normalize
from training.distributed import with_smaller_batches
from training.evaluate.metrics import image_metrics
from training.losses.objective import ReconstructionLoss, kl_per_dimension, vae_loss
from training.losses.perceptual import PerceptualTrunk
from training.randomness import keyed_generator, sample_crops, take_crops

# A latent dimension is active if its posterior mean varies over images by more than this (Burda et al. 2016, section 2).
ACTIVE_VARIANCE = 0.01
_CROP_SEED = 20_161_016  # of the fixed random crops: the same for every validation of every run


@dataclass
class Validation:
    """The result of one pass over the validation images.

    Attributes:
        values: Means over images: `mse` on [-1, 1], `psnr` in dB, `ssim`, `lpips_<trunk>`, `reconstruction_loss` (the
            training loss without KL, with fixed random crops), `kl` in nats per dimension, `active_units` (a count),
            `posterior_sigma`, and `latents_mean` and `latents_std` of posterior samples over dimensions and images.
        kl_per_dimension: Mean KL of each latent dimension, nats, (dimensions,).
        channel_mean, channel_std: Of posterior samples of each latent channel over images and positions, (C,).
        sigma_at_bound_fraction: Fraction of latent dimensions whose log-variance sits at a bound.
    """

    values: dict[str, float]
    kl_per_dimension: Tensor
    channel_mean: Tensor
    channel_std: Tensor
    sigma_at_bound_fraction: float

    @property
    def latent_scaling(self) -> dict[str, Any]:
        """Scaling of the latents, as the keys of the model's configuration."""
        return {
            "scaling_factor": 1.0 / max(self.values["latents_std"], 1e-6),
            "shift_factor": self.values["latents_mean"],
            "latents_mean": self.channel_mean.tolist(),
            "latents_std": self.channel_std.tolist(),
        }

    def summary(self, latent_dim: int) -> str:
        """One line for the log."""
        values = self.values
        lpips = "".join(f", {name} {value:.4f}" for name, value in values.items() if name.startswith("lpips_"))
        return (
            f"validation PSNR {values['psnr']:.2f} dB, SSIM {values['ssim']:.4f}{lpips}, MSE {values['mse']:.5f} on "
            f"[-1, 1], reconstruction loss {values['reconstruction_loss']:.5f}, KL {values['kl']:.3f} nats per "
            f"dimension, {values['active_units']:.0f} of {latent_dim} latent dimensions active"
        )


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: AutoencoderKLUltra,
    images: Tensor,
    indices: list[int],
    *,
    batch: int,
    loss: ReconstructionLoss,
    lpips_trunk: PerceptualTrunk | None = None,
) -> Validation:
    """Measure a model on this process's validation images, and reduce over all processes.

    Args:
        accelerator: For precision and reduction.
        model: Unwrapped; its training mode is restored.
        images: (n, 3, H, W), uint8, on the host; n may differ between processes.
        indices: The images' positions in the validation set, which choose their random crops.
        batch: Most images in one forward pass; halved where memory runs out.
        loss: The reconstruction terms.
        lpips_trunk: Feature network of the LPIPS that is reported, on full images; None leaves it out.
    """
    device, resolution = accelerator.device, images.shape[-1]
    was_training = model.training
    model.eval()
    # Sums over images; in float64 where there is one, so that the order of images does not change the result.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    own_size = torch.tensor([max(indices, default=0) + 1], device=device)
    set_size = int(accelerator.gather(own_size).max())
    crops = sample_crops(set_size, resolution, loss.crop_sizes, keyed_generator(_CROP_SEED))

    def measure(batch: int) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {"images": torch.zeros((), dtype=dtype, device=device)}

        def add(name: str, value: Tensor) -> None:
            sums[name] = sums.get(name, 0.0) + value.to(dtype)

        for start in range(0, max(len(images), 1), batch):
            pixels_uint8, positions = images[start : start + batch], indices[start : start + batch]
            count = len(positions)
            if not count:  # fewer images than processes: this one takes part in the reduction with zeros
                pixels_uint8, positions = images.new_zeros(1, 3, resolution, resolution), [0]
            pixels = normalize(pixels_uint8.to(device))
            own_crops = [crop if crop is None else crop.to(device) for crop in take_crops(crops, positions)]
            with accelerator.autocast():
                output = model(pixels)
                reconstruction, posterior = output.sample.float(), output.posterior
                _, parts = vae_loss(
                    loss, reconstruction, pixels, posterior.mean, posterior.logvar, beta=0.0, crops=own_crops
                )
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            weight = 1.0 if count else 0.0
            sums["images"] += count
            add("reconstruction_loss", parts["reconstruction"] * count)
            for name, value in image_metrics(reconstruction, pixels, lpips_trunk).items():
                add(name, value.sum() * weight)
            add("mean", mean.sum(dim=0) * weight)
            add("mean_square", mean.square().sum(dim=0) * weight)
            add("variance", logvar.exp().sum(dim=0) * weight)
            add("kl", kl_per_dimension(mean, logvar).sum(dim=0) * weight)
            add("sigma", torch.exp(0.5 * logvar).mean() * count)
            at_bound = (logvar <= LOGVAR_MIN + 1e-3) | (logvar >= LOGVAR_MAX - 1e-3)
            add("at_bound", at_bound.to(dtype).mean() * count)
        return sums

    sums = with_smaller_batches(measure, batch)
    model.train(was_training)

    sums = accelerator.reduce(sums, reduction="sum")
    count = sums.pop("images")
    means = {name: (value / count).cpu() for name, value in sums.items()}
    mean, mean_square, variance, kl, sigma, at_bound = (
        means.pop(name) for name in ("mean", "mean_square", "variance", "kl", "sigma", "at_bound")
    )
    # A sample is mean + sigma * noise, so its second moment is mean^2 + sigma^2.
    channel_mean, channel_square = mean.mean(dim=(1, 2)), (mean_square + variance).mean(dim=(1, 2))
    latents_mean = channel_mean.mean()
    values = {name: value.item() for name, value in means.items()}
    values |= {
        "kl": kl.mean().item(),
        "active_units": float((mean_square - mean.square() > ACTIVE_VARIANCE).sum()),
        "posterior_sigma": sigma.item(),
        "latents_mean": latents_mean.item(),
        "latents_std": (channel_square.mean() - latents_mean.square()).clamp_min(0).sqrt().item(),
    }
    channel_std = (channel_square - channel_mean.square()).clamp_min(0).sqrt()
    return Validation(values, kl.flatten(), channel_mean, channel_std, at_bound.item())
