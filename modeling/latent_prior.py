"""LatentPrior: what the latents of faces are distributed like, as a small diffusers model of its own.

For drawing new latents for a trained decoder, and `fit_gaussian`, the one fit that needs torch only. The others, and the
command that fits, are in training/priors/fit.py; N(0, I) needs no file. This one file needs torch and diffusers only and is
saved beside each prior, so that `AutoModel.from_pretrained("FOLDER/priors/gaussian", trust_remote_code=True)` loads it
without this project (from the Hub: `subfolder="priors/gaussian"`); `AutoencoderKLUltra.sample(num_images,
prior="gaussian")` does that by itself.

All kinds treat a latent as a flat vector z of `numbers` numbers and share an affine map from white numbers u,

    z = mean + factor u,

where factor factor^T is the (shrunk) covariance of the training latents. They differ in the distribution of u:

- `gaussian`: N(0, I).
- `mixture`: a Gaussian mixture over the first `component_dims` entries of u, N(0, I) over the others.
- `flow`: N(0, I) carried along a learned velocity field (flow matching, Lipman et al. 2022,
  https://arxiv.org/abs/2210.02747, with the linear path).
"""

from __future__ import annotations

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
    """h + gate(t) x MLP(scale(t) x norm(h) + shift(t)); the identity at initialisation (DiT's adaLN-Zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        """(n, width) and the embedded time, (n, width), to (n, width)."""
        shift, scale, gate = self.modulation(F.silu(time)).chunk(3, dim=1)
        inner = self.narrow(F.silu(self.widen(self.norm(h) * (1 + scale) + shift)))
        return h + gate * inner


class VelocityField(nn.Module):
    """The velocity that carries N(0, I) at time 0 to white latents at time 1.

    On the linear path x_t = (1 - t) x_0 + t x_1 the best velocity is E[x_1 - x_0 | x_t] (Lipman et al. 2022, equation
    9). Were x_1 also N(0, I), that would be c(t) x_t with c(t) = (2t - 1) / (t^2 + (1 - t)^2), which ends where it
    began. White latents are nearly that, so the network learns the difference and starts at zero: before training,
    this is the Gaussian prior.

    What they differ in most is scale: a plain background has small coefficients, a busy one large ones (Wainwright and
    Simoncelli 2000, "Scale mixtures of Gaussians and the statistics of natural images"). So the network sees squares
    beside positions, and answers with a gain for each number beside a velocity.

    Args:
        numbers: Of one latent.
        width: Of the residual stream.
        blocks: Number of residual blocks.
    """

    def __init__(self, numbers: int, width: int, blocks: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(_TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(_TIME_CHANNELS, width)
        self.linear_in = nn.Linear(2 * numbers, width)
        self.blocks = nn.ModuleList(VelocityBlock(width) for _ in range(blocks))
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = nn.Linear(width, 2 * numbers)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Positions (n, numbers) and times (n,) in [0, 1] to velocities (n, numbers)."""
        variance = (t.square() + (1 - t).square())[:, None]  # of x_t, if x_1 is white
        time = self.time_embedding(self.time_proj(1000 * t))  # the embedding's frequencies are made for 0 to 1,000
        white = x / variance.sqrt()
        h = self.linear_in(torch.cat([white, white.square() - 1], dim=1))
        for block in self.blocks:
            h = block(h, time)
        velocity, gain = self.linear_out(self.norm_out(h)).chunk(2, dim=1)
        return (2 * t[:, None] - 1) / variance * x + velocity + gain * white


class LatentPrior(ModelMixin, ConfigMixin):
    """A distribution of latents, with `sample`. Args name the keys of `config.json`:

    Args:
        kind: "gaussian", "mixture" or "flow".
        numbers: Of one latent.
        components: "mixture" only: number of Gaussians.
        component_dims: "mixture" only: over how many of the first white numbers they are.
        width, blocks: "flow" only: size of the velocity field.
        steps: "flow" only: Heun steps from noise to latent; each asks the field twice.

    Attributes:
        mean: (numbers,).
        factor: (numbers, numbers).

    Raises:
        ValueError: A kind that does not exist, or sizes that do not suit it.
    """

    @register_to_config
    def __init__(
        self,
        kind: str = "gaussian",
        numbers: int = 1024,
        components: int = 0,
        component_dims: int = 0,
        width: int = 0,
        blocks: int = 0,
        steps: int = 16,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind of prior {kind!r}: use one of {', '.join(KINDS)}.")
        if kind == "mixture" and not (components >= 1 and 1 <= component_dims <= numbers):
            raise ValueError(
                f"a mixture of {components} components over {component_dims} of {numbers} numbers: at least one "
                "component, over 1 to all numbers, is needed."
            )
        if kind == "flow" and not (width >= 1 and blocks >= 1 and steps >= 1):
            raise ValueError(f"a flow of width {width}, {blocks} blocks and {steps} steps: each must be at least 1.")
        # Parameters rather than buffers: diffusers' loading is made for them.
        self.mean = _fixed(torch.zeros(numbers))
        self.factor = _fixed(torch.eye(numbers))
        if kind == "mixture":
            self.component_weights = _fixed(torch.full((components,), 1 / components))
            self.component_means = _fixed(torch.zeros(components, component_dims))
            self.component_factors = _fixed(torch.eye(component_dims).repeat(components, 1, 1))
        self.velocity = VelocityField(numbers, width, blocks) if kind == "flow" else None

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """As in diffusers, without a warning about the key that lets `AutoModel` find this class."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `ModelMixin.from_pretrained`, with samples bit-equal to those of the saved prior.

        Copies lie at torch's own alignment; kernels sum in another order in a mapped file.

        Raises:
            ValueError: The file lacks parameters, of which diffusers only warns.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        for name, parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).named_parameters():
            if parameter.is_meta:
                raise ValueError(f"the prior's weights lack {name}: fit it again, or fetch it anew.")
            parameter.data = parameter.data.clone()
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As `ModelMixin.save_pretrained`, with this source file beside the weights, named in `config.json`."""
        if type(self)._auto_class is None:
            type(self).register_for_auto_class("AutoModel")
        os.makedirs(save_directory, exist_ok=True)
        source = os.path.abspath(__file__)
        copy = os.path.join(os.path.abspath(save_directory), os.path.basename(source))
        if source != copy:
            shutil.copyfile(source, copy)
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def sample(self, num_samples: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw latents.

        The random numbers of one latent are drawn together, so that 5 latents from a generator are those that 2 and
        then 3 would have been, up to rounding.

        Args:
            num_samples: How many.
            generator: Source of the random numbers, on any device; None for torch's own, on the host.
            temperature: Multiplies the standard normal numbers that are drawn: below 1 nearer to the mean (of a
                component, in a mixture).

        Returns:
            (num_samples, numbers) on the prior's device.
        """
        picks, noise = draw_noise(num_samples, len(self.mean), generator)
        white = temperature * noise.to(self.mean)
        if self.config.kind == "mixture":
            picks = picks.to(self.mean)
            chosen = torch.searchsorted(self.component_weights.cumsum(0), picks, right=True)
            chosen = chosen.clamp_max(len(self.component_weights) - 1)  # the weights' sum is 1 up to rounding only
            count = self.config.component_dims
            part = torch.einsum("nij,nj->ni", self.component_factors[chosen], white[:, :count])
            white = torch.cat([self.component_means[chosen] + part, white[:, count:]], dim=1)
        elif self.config.kind == "flow":
            white = self.carry(white)
        return self.mean + white @ self.factor.T

    @torch.no_grad()
    def carry(self, white: Tensor) -> Tensor:
        """Follow the flow from time 0 to 1 by Heun's method (second order), (n, numbers) to the same shape."""
        steps = self.config.steps
        for index in range(steps):
            start, end = (white.new_full((len(white),), (index + offset) / steps) for offset in (0, 1))
            first = self.velocity(white, start)
            second = self.velocity(white + first / steps, end)
            white = white + (first + second) / (2 * steps)
        return white


def draw_noise(num_samples: int, numbers: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A uniform number and standard normal numbers for each sample, (n,) and (n, numbers), sample after sample."""
    device = None if generator is None else generator.device
    picks, noise = torch.empty(num_samples, device=device), torch.empty(num_samples, numbers, device=device)
    for index in range(num_samples):
        picks[index] = torch.rand((), generator=generator, device=device)
        noise[index] = torch.randn(numbers, generator=generator, device=device)
    return picks, noise


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def shrunk_correlation(rows: Tensor) -> tuple[Tensor, float]:
    """Covariance of standardised rows, shrunk towards the identity as far as too few rows demand.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3.

    Args:
        rows: (n, d), of mean 0 and variance 1 in each column.

    Returns:
        (d, d), and the weight of the identity in it, 0 to 1.
    """
    n, d = rows.shape
    sample = rows.T @ rows / n
    identity = torch.eye(d, dtype=rows.dtype, device=rows.device)
    scale = sample.diagonal().mean()
    spread = (sample - scale * identity).square().sum()
    noise = (rows.square().sum(dim=1).square().mean() - sample.square().sum()) / n
    weight = float((noise / spread.clamp_min(1e-12)).clamp(0, 1))
    return (1 - weight) * sample + weight * scale * identity, weight


@torch.no_grad()
def fit_gaussian(latents: Tensor, thumbnails: Tensor | None = None) -> tuple[LatentPrior, float]:
    """The Gaussian of latents: their mean and full covariance, shrunk.

    Where thumbnails are given, its white numbers are ordered by how much of them each explains, so that a mixture can
    spend its components where a face changes: they are the left singular vectors of the covariance between whitened
    latents and pixels. Variances of latents alone say nothing about what matters where the latent is already white,
    as the linear path's coefficients are.

    Args:
        latents: Draws from the posteriors of training faces, (n, ...), flattened from the second axis on.
        thumbnails: The same faces, small, (n, 3, s, s).

    Returns:
        The prior, on the latents' device, and the identity's weight in the correlations.

    Raises:
        ValueError: Fewer than two faces.
    """
    if len(latents) < 2:
        raise ValueError(f"{len(latents)} faces determine no prior: give at least 2.")
    # Float64, on the host because Apple's GPUs have none: 1,024 x 1,024 only.
    rows = latents.flatten(1).cpu().double()
    mean, deviation = rows.mean(dim=0), rows.std(dim=0, correction=0).clamp_min(1e-6)
    standard = (rows - mean) / deviation
    correlation, weight = shrunk_correlation(standard)
    variances, axes = torch.linalg.eigh(correlation)
    scaled = axes * variances.clamp_min(1e-12).sqrt()
    if thumbnails is not None:
        pixels = thumbnails.flatten(1).cpu().double()
        explained = torch.linalg.solve(scaled, standard.T) @ (pixels - pixels.mean(dim=0)) / len(rows)
        scaled = scaled @ torch.linalg.eigh(explained @ explained.T)[1].flip(1)
    prior = LatentPrior("gaussian", numbers=len(mean))
    prior.mean.copy_(mean)
    prior.factor.copy_(deviation[:, None] * scaled)
    return prior.to(latents.device).eval(), weight
