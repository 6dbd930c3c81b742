"""Measures an autoencoder on fixed images: every figure of every image, and what only a set of images has.

What it is for: figures that can be compared between models, by one code for all. Computed in float32 whatever the
weights were stored in. What it is not for: deciding things during training (validation.py), loading models
(autoencoders.py), presenting results (evaluate.py, evaluate_report.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.images import normalize
from training.evaluate.frechet import FrechetFeatures, frechet_distance
from training.evaluate.metrics import image_metrics
from training.evaluate.models import Autoencoder
from training.evaluate.validation import ACTIVE_VARIANCE
from training.losses.perceptual import PerceptualTrunk
from training.step import sample_step_noise

BOOTSTRAP_SAMPLES, BOOTSTRAP_LEVEL, BOOTSTRAP_SEED = 2000, 0.95, 0
_COUNTS_AT_ONCE = 4_000_000  # bootstrap counts held at once, 32 MB
_HALF_LEVEL = 1 / 255  # of 8-bit colour, in [-1, 1]
_DRAW_SEED = 20_241_122  # of the posterior's draws: the same for every model with the same latent shape


@dataclass(frozen=True)
class Instruments:
    """What measures.

    Attributes:
        lpips: Names of the trunks whose LPIPS is reported.
        trunks: By name; also the one that `frechet` may need.
        frechet: Features of the Frechet distance; None leaves it out.
    """

    lpips: tuple[str, ...]
    trunks: Mapping[str, PerceptualTrunk]
    frechet: FrechetFeatures | None

    def read(self, pixels: Tensor) -> tuple[dict[str, list[Tensor]], Tensor | None]:
        """Trunk activations, and features for the Frechet distance, of images (N, 3, H, W) in [-1, 1]."""
        feature_layers = {name: trunk.features(pixels) for name, trunk in self.trunks.items()}
        if self.frechet is None:
            return feature_layers, None
        return feature_layers, self.frechet(pixels, feature_layers.get(self.frechet.trunk_name)).cpu()


@dataclass
class Reconstructions:
    """Figures of one set of reconstructions.

    Attributes:
        of_image: For each figure its value for each image, (n,) float64: `psnr` dB, `ssim`, `mse_-1_1` and `mse_0_1`
            (mean squared error of images in [-1, 1] and in [0, 1], a fourth of it), `l1_-1_1`, `lpips_<trunk>`.
        frechet: Distance of the whole set to the originals; None if not measured.
    """

    of_image: dict[str, np.ndarray]
    frechet: float | None


@dataclass
class Measurement:
    """All figures of one model.

    Attributes:
        model: What was measured.
        indices: Row number of each image.
        latent_shape: (C, h, w) of one image.
        reconstruction: Decoded from the posterior's mean, or from the latents of a model without a posterior.
        draw: Decoded from one draw of each posterior; None where there is no posterior, or where it nowhere differs
            by half a level of 8-bit colour.
        posterior: For each image, (n,): `kl` to the standard normal, mean over latent numbers, nats, and
            `posterior_sigma`, mean over numbers; None without a posterior.
        active_units: Latent numbers whose posterior mean has a variance above 0.01 over these images (Burda et al.
            2016, section 2); None without a posterior.
    """

    model: Autoencoder
    indices: list[int]
    latent_shape: tuple[int, ...]
    reconstruction: Reconstructions
    draw: Reconstructions | None
    posterior: dict[str, np.ndarray] | None
    active_units: int | None


class _Set:
    """Collects figures of one set of reconstructions, batch by batch."""

    def __init__(self, instruments: Instruments) -> None:
        self._instruments, self._values, self._features = instruments, {}, []

    def add(self, images: Tensor, pixels: Tensor, feature_layers: Mapping[str, list[Tensor]]) -> None:
        images = images.clamp(-1, 1)
        values = image_metrics(images, pixels, trunk=None)
        mse = values.pop("mse")
        values |= {"mse_-1_1": mse, "mse_0_1": mse / 4, "l1_-1_1": (images - pixels).abs().mean(dim=(1, 2, 3))}
        own_layers, features = self._instruments.read(images)
        for name in self._instruments.lpips:
            values[f"lpips_{name}"] = self._instruments.trunks[name].lpips(own_layers[name], feature_layers[name])
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.cpu())
        self._features.append(features)

    def result(self, real: np.ndarray | None) -> Reconstructions:
        of_image = {name: torch.cat(parts).double().numpy() for name, parts in self._values.items()}
        distance = None if real is None else frechet_distance(torch.cat(self._features).numpy(), real)
        return Reconstructions(of_image, distance)


def decode_both(
    model: Autoencoder, pixels: Tensor, indices: Sequence[int]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Reconstruct images from the posterior's mean and from a draw that depends on the image's row number alone.

    Returns:
        Reconstruction, draw or None, posterior mean, log-variance or None.
    """
    mean, logvar = model.encode(pixels)
    reconstruction = model.decode(mean)
    if logvar is None:
        return reconstruction, None, mean, None
    noise = sample_step_noise(_DRAW_SEED, 0, indices, mean.shape[1:], 0).noise.to(mean)
    return reconstruction, model.decode(mean + torch.exp(0.5 * logvar) * noise), mean, logvar


@torch.no_grad()
def measure(
    model: Autoencoder,
    images: Tensor,
    indices: list[int],
    *,
    instruments: Instruments,
    batch: int,
    device: torch.device,
) -> Measurement:
    """Measure a model.

    Args:
        model: On `device`.
        images: (n, 3, resolution, resolution), uint8, on the host.
        indices: Row number of each image.
        instruments: On `device`.
        batch: Images in one forward pass.
        device: Where to compute.

    Raises:
        ValueError: The model gives values that are not finite.
    """
    mean_set, render_set = _Set(instruments), _Set(instruments)
    real, posterior, differs = [], {"kl": [], "posterior_sigma": []}, False
    sums = squares = 0.0
    for start in range(0, len(images), batch):
        pixels = normalize(images[start : start + batch].to(device))
        reconstruction, draw, mean, logvar = decode_both(model, pixels, indices[start : start + batch])
        given = (part for part in (reconstruction, draw, mean, logvar) if part is not None)
        if not all(part.isfinite().all() for part in given):
            raise ValueError(f"{model.name} gives values that are not finite: its weights are damaged or diverged.")
        feature_layers, features = instruments.read(pixels)
        real.append(features)
        mean_set.add(reconstruction, pixels, feature_layers)
        if draw is None:
            continue
        render_set.add(draw, pixels, feature_layers)
        differs = differs or bool((reconstruction - draw).abs().max() > _HALF_LEVEL)
        of_number = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        posterior["kl"].append(of_number.flatten(1).mean(dim=1).cpu())
        posterior["posterior_sigma"].append(torch.exp(0.5 * logvar).flatten(1).mean(dim=1).cpu())
        means = mean.cpu().double()
        sums, squares = sums + means.sum(dim=0), squares + means.square().sum(dim=0)
    has_posterior = bool(posterior["kl"])
    known = torch.cat(real).numpy() if instruments.frechet is not None else None
    active = None
    if has_posterior:
        variance = squares / len(images) - (sums / len(images)).square()
        active = int((variance > ACTIVE_VARIANCE).sum())
    return Measurement(
        model=model,
        indices=indices,
        latent_shape=tuple(mean.shape[1:]),
        reconstruction=mean_set.result(known),
        draw=render_set.result(known) if differs else None,
        posterior={k: torch.cat(parts).double().numpy() for k, parts in posterior.items()} if has_posterior else None,
        active_units=active,
    )


def bootstrap_means(of_image: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Means over images, with percentile-bootstrap intervals (Efron 1979): what other images of the kind might give.

    How often each image is drawn is multinomial, so a resampled mean is a product of counts and values. The counts
    depend on the number of images alone: all figures and all models are resampled alike.

    Args:
        of_image: (n,) for each figure.

    Returns:
        For each figure `mean`, `low` and `high`, the bounds of the 95 % interval.
    """
    values = np.stack(list(of_image.values()), axis=1).astype(np.float64)
    count = len(values)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    rows = max(1, _COUNTS_AT_ONCE // count)
    resampled = []
    for start in range(0, BOOTSTRAP_SAMPLES, rows):
        draws = min(rows, BOOTSTRAP_SAMPLES - start)
        resampled.append(rng.multinomial(count, np.full(count, 1 / count), size=draws) @ values / count)
    tail = (1 - BOOTSTRAP_LEVEL) / 2
    low, high = np.quantile(np.concatenate(resampled), [tail, 1 - tail], axis=0)
    means = values.mean(axis=0)
    return {
        name: {"mean": float(means[i]), "low": float(low[i]), "high": float(high[i])} for i, name in enumerate(of_image)
    }


def summarize(measurement: Measurement, instruments: Instruments) -> dict:
    """A measurement as JSON-able figures: means with intervals, and null for what the model does not have."""

    def figures(part: Reconstructions | None) -> dict | None:
        if part is None:
            return None
        frechet = {} if instruments.frechet is None else {instruments.frechet.key: part.frechet}
        return bootstrap_means(part.of_image) | frechet

    model, posterior = measurement.model, measurement.posterior
    of_posterior = {"kl": None, "posterior_sigma": None} if posterior is None else bootstrap_means(posterior)
    return {
        "model": model.name,
        "class": model.class_name,
        "parameters": model.num_parameters,
        "resolution": model.resolution,
        "images": len(measurement.indices),
        "latent_shape": list(measurement.latent_shape),
        "latent_dim": int(np.prod(measurement.latent_shape)),
        "reconstruction": figures(measurement.reconstruction),
        "draw": figures(measurement.draw),
        "kl": of_posterior["kl"],
        "active_units": measurement.active_units,
        "posterior_sigma": of_posterior["posterior_sigma"],
    }
