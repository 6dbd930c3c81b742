"""LatentPrior: a distribution fitted to the latents of faces, from which new latents are sampled.

Also `fit_gaussian`, the one fit that needs torch only; training/priors/fit.py has the others and the command. N(0, I)
needs no file. This file needs torch and diffusers only and is saved beside each prior, so that
`AutoModel.from_pretrained("FOLDER/priors/gaussian", trust_remote_code=True)` loads it without this project (from the
Hub: `subfolder="priors/gaussian"`).

All kinds treat a latent as a flat vector z of `latent_dim` dimensions and share an affine map from whitened
coordinates u,

    z = mean + factor u,

where factor factor^T is the (shrunk) covariance of the training latents. They differ in the distribution of u:

- `gaussian`: N(0, I).
- `mixture`: a Gaussian mixture over the first `component_dims` dimensions of u, N(0, I) over the others.
- `flow`: N(0, I) transported along a learned velocity field (flow matching, Lipman et al. 2022,
  https://arxiv.org/abs/2210.02747).
"""

from __future__ import annotations

import contextlib
import os
import shutil

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

KINDS = ("gaussian", "mixture", "flow")
_TIME_CHANNELS = 64


class VelocityBlock(nn.Module):
    """h + gate(t) * MLP(scale(t) * norm(h) + shift(t)); the identity at initialization (DiT's adaLN-Zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        """Maps features (N, width) and embedded times (N, width) to features (N, width)."""
        shift, scale, gate = self.modulation(F.silu(time)).chunk(3, dim=1)
        return h + gate * self.narrow(F.silu(self.widen(self.norm(h) * (1 + scale) + shift)))


class VelocityField(nn.Module):
    """The velocity that transports N(0, I) at time 0 to whitened latents at time 1.

    On the path x_t = (1 - t) x_0 + t x_1 the optimal velocity is E[x_1 - x_0 | x_t] (Lipman et al. 2022, equation 9).
    If x_1 were N(0, I) too, it would be (2t - 1) / (t^2 + (1 - t)^2) x_t. Whitened latents are close to that, so the
    network learns the difference and starts at zero: before training, the flow is the Gaussian prior.

    Latents differ from a Gaussian mostly in scale: a plain background has small coefficients, a busy one large ones
    (Wainwright and Simoncelli 2000, "Scale mixtures of Gaussians and the statistics of natural images"). So the network
    reads squared inputs beside the inputs, and predicts a per-dimension scale beside a velocity.

    Args:
        latent_dim: Dimension of a latent.
        width: Width of the residual stream.
        blocks: Number of residual blocks.
    """

    def __init__(self, latent_dim: int, width: int, blocks: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(_TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(_TIME_CHANNELS, width)
        self.linear_in = nn.Linear(2 * latent_dim, width)
        self.blocks = nn.ModuleList(VelocityBlock(width) for _ in range(blocks))
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = nn.Linear(width, 2 * latent_dim)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Maps positions (N, latent_dim) and times (N,) in [0, 1] to velocities (N, latent_dim)."""
        variance = (t.square() + (1 - t).square())[:, None]  # of x_t, if x_1 is N(0, I)
        # The embedding's frequencies are made for 0 to 1,000; Timesteps returns float32.
        time = self.time_embedding(self.time_proj(1000 * t).to(x.dtype))
        standardized = x / variance.sqrt()
        h = self.linear_in(torch.cat([standardized, standardized.square() - 1], dim=1))
        for block in self.blocks:
            h = block(h, time)
        velocity, scale = self.linear_out(self.norm_out(h)).chunk(2, dim=1)
        return (2 * t[:, None] - 1) / variance * x + velocity + scale * standardized


class LatentPrior(ModelMixin, ConfigMixin):
    """A distribution of latents, with `sample`. The arguments are the keys of `config.json`.

    Args:
        kind: "gaussian", "mixture" or "flow".
        latent_dim: Dimension of a latent.
        components: "mixture" only: number of Gaussians.
        component_dims: "mixture" only: number of leading whitened dimensions that they describe.
        width, blocks: "flow" only: size of the velocity field.
        steps: "flow" only: Heun steps from noise to latent; each evaluates the velocity field twice.

    Attributes:
        mean: (latent_dim,).
        factor: (latent_dim, latent_dim).

    Raises:
        ValueError: An unknown kind, or sizes that do not suit it.
    """

    _auto_class = "AutoModel"  # save_config writes `auto_map`, by which AutoModel finds this file

    @register_to_config
    def __init__(
        self,
        kind: str = "gaussian",
        latent_dim: int = 1024,
        components: int = 0,
        component_dims: int = 0,
        width: int = 0,
        blocks: int = 0,
        steps: int = 16,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        if kind == "mixture" and not (components >= 1 and 1 <= component_dims <= latent_dim):
            raise ValueError(
                f"a mixture needs at least 1 component, over 1 to {latent_dim} dimensions, got {components} over "
                f"{component_dims}."
            )
        if kind == "flow" and not (width >= 1 and blocks >= 1 and steps >= 1):
            raise ValueError(f"width, blocks and steps of a flow must be at least 1, got {width}, {blocks}, {steps}.")
        # Parameters rather than buffers: diffusers' loading is made for them.
        self.mean = _constant(torch.zeros(latent_dim))
        self.factor = _constant(torch.eye(latent_dim))
        if kind == "mixture":
            self.component_weights = _constant(torch.full((components,), 1 / components))
            self.component_means = _constant(torch.zeros(components, component_dims))
            self.component_factors = _constant(torch.eye(component_dims).repeat(components, 1, 1))
        self.velocity = VelocityField(latent_dim, width, blocks) if kind == "flow" else None

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """As in diffusers, without a warning about the key that lets `AutoModel` find this class."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `ModelMixin.from_pretrained`, with samples bitwise identical to those of the saved prior.

        Parameters are cloned to torch's own alignment: kernels sum in another order in a memory-mapped file.

        Raises:
            ValueError: The file lacks parameters, of which diffusers only warns.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        for name, parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).named_parameters():
            if parameter.is_meta:
                raise ValueError(f"the weights of the prior lack {name}: fit or download the prior again.")
            parameter.data = parameter.data.clone()
        return loaded

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As `ConfigMixin.save_config`, with this source file; called by every way of saving the prior."""
        os.makedirs(save_directory, exist_ok=True)
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(__file__, os.path.join(save_directory, os.path.basename(__file__)))
        super().save_config(save_directory, *args, **kwargs)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        generator: torch.Generator | list[torch.Generator | None] | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Samples latents.

        The noise of one latent is sampled at once, so 5 latents from a generator are the same as 2 and then 3, up to
        rounding.

        Args:
            num_samples: Number of latents.
            generator: One generator, one for each latent, or None for torch's default on the CPU. On any device.
            temperature: Factor of the standard normal noise; below 1 samples closer to the mean (of a component, in a
                mixture).

        Returns:
            (num_samples, latent_dim) on the prior's device.
        """
        generators = generator if isinstance(generator, list) else [generator] * num_samples
        uniform, noise = zip(*(_sample_noise(self.config.latent_dim, each) for each in generators))
        return self(temperature * torch.stack(noise), torch.stack(uniform))

    def forward(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """Transforms noise to latents.

        Args:
            noise: Standard normal, (N, latent_dim).
            uniform: Uniform in [0, 1), (N,); chooses the components of a mixture.
        """
        whitened, uniform = noise.to(self.mean), uniform.to(self.mean.device)
        if self.config.kind == "mixture":
            index = torch.searchsorted(self.component_weights.float().cumsum(0), uniform, right=True)
            index = index.clamp_max(len(self.component_weights) - 1)  # the weights sum to 1 up to rounding only
            dims = self.config.component_dims
            offset = torch.einsum("nij,nj->ni", self.component_factors[index], whitened[:, :dims])
            whitened = torch.cat([self.component_means[index] + offset, whitened[:, dims:]], dim=1)
        elif self.config.kind == "flow":
            whitened = self.integrate(whitened)
        return self.mean + whitened @ self.factor.T

    def integrate(self, x: Tensor) -> Tensor:
        """Integrates the flow from time 0 to 1 by Heun's method (second order), (N, latent_dim) to the same shape."""
        steps = self.config.steps
        for index in range(steps):
            start, end = (x.new_full((len(x),), (index + offset) / steps) for offset in (0, 1))
            first = self.velocity(x, start)
            second = self.velocity(x + first / steps, end)
            x = x + (first + second) / (2 * steps)
        return x


def _sample_noise(latent_dim: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Noise of one latent: uniform, (), and standard normal, (latent_dim,)."""
    device = None if generator is None else generator.device
    uniform = torch.rand((), generator=generator, device=device)
    return uniform, torch.randn(latent_dim, generator=generator, device=device)


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def shrunk_correlation(standardized: Tensor) -> tuple[Tensor, float]:
    """Correlation of standardized vectors, shrunk towards the identity as their number demands.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3.

    Args:
        standardized: (n, d), of mean 0 and variance 1 in each dimension.

    Returns:
        (d, d), and the weight of the identity in it, 0 to 1.
    """
    n, d = standardized.shape
    sample = standardized.T @ standardized / n
    identity = torch.eye(d, dtype=standardized.dtype, device=standardized.device)
    scale = sample.diagonal().mean()
    spread = (sample - scale * identity).square().sum()
    noise = (standardized.square().sum(dim=1).square().mean() - sample.square().sum()) / n
    weight = float((noise / spread.clamp_min(1e-12)).clamp(0, 1))
    return (1 - weight) * sample + weight * scale * identity, weight


@torch.no_grad()
def fit_gaussian(latents: Tensor, thumbnails: Tensor | None = None) -> tuple[LatentPrior, float]:
    """Fits the Gaussian prior: the mean and the full, shrunk covariance of latents.

    With thumbnails, the whitened dimensions are ordered by how much of the images each explains, so that a mixture
    uses its components where faces differ: they are the left singular vectors of the covariance between whitened
    latents and pixels. The variances of latents alone do not tell, where the PCA branch has whitened them.

    Args:
        latents: Samples from the posteriors of training faces, (n, ...), flattened from the second axis on.
        thumbnails: The same faces, small, (n, 3, s, s).

    Returns:
        The prior, on the latents' device, and the weight of the identity in the correlation.

    Raises:
        ValueError: Fewer than two faces.
    """
    if len(latents) < 2:
        raise ValueError(f"a prior needs at least 2 faces, got {len(latents)}.")
    flat = latents.flatten(1).cpu().double()  # on the CPU: MPS has no float64
    mean, std = flat.mean(dim=0), flat.std(dim=0, correction=0).clamp_min(1e-6)
    standardized = (flat - mean) / std
    correlation, weight = shrunk_correlation(standardized)
    eigenvalues, eigenvectors = torch.linalg.eigh(correlation)
    factor = eigenvectors * eigenvalues.clamp_min(1e-12).sqrt()
    if thumbnails is not None:
        pixels = thumbnails.flatten(1).cpu().double()
        covariance = torch.linalg.solve(factor, standardized.T) @ (pixels - pixels.mean(dim=0)) / len(flat)
        factor = factor @ torch.linalg.eigh(covariance @ covariance.T)[1].flip(1)
    prior = LatentPrior("gaussian", latent_dim=len(mean))
    prior.mean.copy_(mean)
    prior.factor.copy_(std[:, None] * factor)
    return prior.to(latents.device).eval(), weight
