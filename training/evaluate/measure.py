"""Measures models alike: metrics of each image, and metrics of a set of images such as the Frechet distance.

Everything is computed in float32, whatever precision the weights are stored in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.images import normalize
from training.distributed import float32_without_tf32
from training.evaluate.frechet import FrechetFeatures, frechet_distance
from training.evaluate.identity import SAME_PERSON, IdentityNetwork
from training.evaluate.metrics import image_metrics
from training.evaluate.models import Autoencoder
from training.evaluate.validation import ACTIVE_VARIANCE
from training.losses.objective import kl_per_dimension
from training.losses.perceptual import PerceptualTrunk

BOOTSTRAP_SAMPLES, BOOTSTRAP_LEVEL = 2000, 0.95
_HALF_LEVEL = 1 / 255  # half a level of 8-bit color, in [-1, 1]
_NOISE_SEED = 20_241_122  # arbitrary, and constant: the same posterior noise for all models with the same latent shape


@dataclass(frozen=True)
class MetricNetworks:
    """The networks that metrics need, on one device.

    Attributes:
        lpips: Names of the trunks whose LPIPS is reported.
        trunks: Name -> feature network, also the one that `frechet` may need.
        frechet: Features for the Frechet distance; None leaves it out.
        identity: Embeddings of faces; None leaves the identity out.
    """

    lpips: tuple[str, ...]
    trunks: Mapping[str, PerceptualTrunk]
    frechet: FrechetFeatures | None
    identity: IdentityNetwork | None = None

    def features(self, pixels: Tensor) -> tuple[dict[str, list[Tensor]], Tensor | None]:
        """Feature layers of each trunk, and features for the Frechet distance, of images (N, 3, H, W) in [-1, 1]."""
        layers = {name: trunk.features(pixels) for name, trunk in self.trunks.items()}
        if self.frechet is None:
            return layers, None
        return layers, self.frechet(pixels, layers.get(self.frechet.trunk_name)).cpu()


@dataclass
class SetMetrics:
    """Metrics of one set of reconstructions.

    Attributes:
        per_image: Metric -> its value for each image, (n,) float64: `psnr` dB, `ssim`, `mse_-1_1` and `mse_0_1`
            (mean squared error of images in [-1, 1] and in [0, 1], a quarter of the former), `l1_-1_1`, `lpips_<trunk>`,
            `identity_distance` (of the face's embedding to the original's) and `same_person` (1 up to `SAME_PERSON`).
        frechet: Frechet distance between all reconstructions and all originals; None if not measured.
    """

    per_image: dict[str, np.ndarray]
    frechet: float | None


@dataclass
class ModelResult:
    """All metrics of one model.

    Attributes:
        model: What was measured.
        indices: Index of each image in the data set.
        latent_shape: (C, h, w) of one image.
        reconstruction: Decoded from the posterior's mean, or from the latents of a model without a posterior.
        posterior_sample: Decoded from one sample of each posterior; None without a posterior, or where it differs
            from `reconstruction` by less than half a level of 8-bit color everywhere.
        posterior: For each image, (n,): `kl` to the standard normal, nats per dimension, and `posterior_sigma`, mean
            over dimensions; None without a posterior.
        active_units: Latent dimensions whose posterior mean has a variance above 0.01 over these images (Burda et al.
            2016, section 2); None without a posterior.
    """

    model: Autoencoder
    indices: list[int]
    latent_shape: tuple[int, ...]
    reconstruction: SetMetrics
    posterior_sample: SetMetrics | None
    posterior: dict[str, np.ndarray] | None
    active_units: int | None


class _SetAccumulator:
    """Collects the metrics of one set of reconstructions, batch by batch."""

    def __init__(self, networks: MetricNetworks) -> None:
        self._networks, self._values, self._features = networks, {}, []

    def add(
        self, images: Tensor, pixels: Tensor, layers: Mapping[str, list[Tensor]], person: tuple[list, Tensor] | None
    ) -> None:
        """Add reconstructions of `pixels`, whose feature layers are `layers`, and landmarks and embeddings `person`."""
        images = images.clamp(-1, 1)
        values = image_metrics(images, pixels, trunk=None)
        mse = values.pop("mse")
        values |= {"mse_-1_1": mse, "mse_0_1": mse / 4, "l1_-1_1": (images - pixels).abs().mean(dim=(1, 2, 3))}
        own_layers, features = self._networks.features(images)
        for name in self._networks.lpips:
            values[f"lpips_{name}"] = self._networks.trunks[name].lpips(own_layers[name], layers[name])
        if person is not None:
            faces, embeddings = person
            own = self._networks.identity.embeddings(images, faces)
            values["identity_distance"] = torch.linalg.vector_norm(own - embeddings, dim=1)
            values["same_person"] = (values["identity_distance"] <= SAME_PERSON).float()
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.cpu())
        self._features.append(features)

    def result(self, real_features: np.ndarray | None) -> SetMetrics:
        """The metrics; `real_features` are those of the originals."""
        per_image = {name: torch.cat(parts).double().numpy() for name, parts in self._values.items()}
        if real_features is None:
            return SetMetrics(per_image, None)
        return SetMetrics(per_image, frechet_distance(torch.cat(self._features).numpy(), real_features))


def reconstruct(
    model: Autoencoder, pixels: Tensor, indices: Sequence[int]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Reconstruct images from the posterior's mean, and from a sample whose noise depends on the image's index alone.

    Returns:
        Reconstruction; the one from the sample, or None; posterior mean; log-variance, or None.
    """
    mean, logvar = model.encode(pixels)
    reconstruction = model.decode(mean)
    if logvar is None:
        return reconstruction, None, mean, None
    generators = [torch.Generator().manual_seed(_NOISE_SEED + index) for index in indices]
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
    return reconstruction, model.decode(mean + torch.exp(0.5 * logvar) * noise.to(mean)), mean, logvar


@float32_without_tf32()
@torch.no_grad()
def measure(
    model: Autoencoder,
    images: Tensor,
    indices: list[int],
    *,
    networks: MetricNetworks,
    batch_size: int,
    device: torch.device,
) -> ModelResult:
    """Measure a model.

    Args:
        model: On `device`.
        images: (n, 3, resolution, resolution), uint8, on the CPU.
        indices: Index of each image in the data set.
        networks: On `device`.
        batch_size: Images per forward pass.
        device: Where to compute.

    Raises:
        ValueError: The model returns values that are not finite.
    """
    from_mean, from_sample = _SetAccumulator(networks), _SetAccumulator(networks)
    real_features, kl, sigma, sample_differs = [], [], [], False
    if networks.identity is not None:
        networks.identity.undetected = 0
    total = total_squared = 0.0  # of the posterior means, float64
    for start in range(0, len(images), batch_size):
        pixels = normalize(images[start : start + batch_size].to(device))
        reconstruction, sampled, mean, logvar = reconstruct(model, pixels, indices[start : start + batch_size])
        outputs = (tensor for tensor in (reconstruction, sampled, mean, logvar) if tensor is not None)
        if not all(tensor.isfinite().all() for tensor in outputs):
            raise ValueError(f"{model.name} returns values that are not finite: its weights are corrupt or diverged.")
        layers, features = networks.features(pixels)
        real_features.append(features)
        person = None
        if networks.identity is not None:
            faces = networks.identity.faces(pixels)  # the reconstruction is embedded at the original's landmarks
            person = faces, networks.identity.embeddings(pixels, faces)
        from_mean.add(reconstruction, pixels, layers, person)
        if sampled is None:
            continue
        from_sample.add(sampled, pixels, layers, person)
        sample_differs = sample_differs or bool((reconstruction - sampled).abs().max() > _HALF_LEVEL)
        kl.append(kl_per_dimension(mean, logvar).flatten(1).mean(dim=1))
        sigma.append(torch.exp(0.5 * logvar).flatten(1).mean(dim=1))
        means = mean.cpu().double()
        total, total_squared = total + means.sum(dim=0), total_squared + means.square().sum(dim=0)
    real = torch.cat(real_features).numpy() if networks.frechet is not None else None
    posterior = active = None
    if kl:
        parts = {"kl": kl, "posterior_sigma": sigma}
        posterior = {name: torch.cat(values).cpu().double().numpy() for name, values in parts.items()}
        variance = total_squared / len(images) - (total / len(images)).square()
        active = int((variance > ACTIVE_VARIANCE).sum())
    return ModelResult(
        model=model,
        indices=indices,
        latent_shape=tuple(mean.shape[1:]),
        reconstruction=from_mean.result(real),
        posterior_sample=from_sample.result(real) if sample_differs else None,
        posterior=posterior,
        active_units=active,
    )


def bootstrap_means(per_image: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Means over images, with percentile-bootstrap intervals (Efron 1979).

    A resample is given by how often it contains each image: counts from a multinomial distribution, whose product with
    the values is the mean. The counts depend only on the number of images, so all metrics and models are paired.

    Args:
        per_image: (n,) for each metric.

    Returns:
        For each metric `mean`, and `low` and `high`, the bounds of the 95 % interval.
    """
    values = np.stack(list(per_image.values()), axis=1).astype(np.float64)
    count = len(values)
    rng, probabilities = np.random.default_rng(0), np.full(count, 1 / count)
    resampled = np.stack([rng.multinomial(count, probabilities) @ values / count for _ in range(BOOTSTRAP_SAMPLES)])
    tail = (1 - BOOTSTRAP_LEVEL) / 2
    bounds = (values.mean(axis=0), *np.quantile(resampled, [tail, 1 - tail], axis=0))
    return {
        name: dict(zip(("mean", "low", "high"), map(float, interval)))
        for name, interval in zip(per_image, zip(*bounds))
    }


def summarize(result: ModelResult, networks: MetricNetworks) -> dict:
    """A result as JSON values: means with intervals, and null for what the model does not have."""

    def metrics(part: SetMetrics | None) -> dict | None:
        if part is None:
            return None
        frechet = {} if networks.frechet is None else {networks.frechet.key: part.frechet}
        return bootstrap_means(part.per_image) | frechet

    model, posterior = result.model, result.posterior
    return {
        "model": model.name,
        "class": model.class_name,
        "parameters": model.num_parameters,
        "weights": model.metadata,
        "resolution": model.resolution,
        "images": len(result.indices),
        "latent_shape": list(result.latent_shape),
        "latent_dim": int(np.prod(result.latent_shape)),
        "reconstruction": metrics(result.reconstruction),
        "posterior_sample": metrics(result.posterior_sample),
        **({"kl": None, "posterior_sigma": None} if posterior is None else bootstrap_means(posterior)),
        "active_units": result.active_units,
    }
