"""Priors: maps from standard normal noise to the latents of faces. N(0, I) needs no file.

- `GaussianPrior`: a Gaussian with full covariance; fitted in seconds by `fit_gaussian`.
- `DiffusionPrior`: a flow-matching model of small images that determine the latents; trained for hours.

This file needs torch and diffusers only and is saved beside each prior, so that
`AutoModel.from_pretrained("FOLDER/priors/gaussian", trust_remote_code=True)` loads it without this project (from the
Hub: `subfolder="priors/gaussian"`).
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

_TIME_CHANNELS = 128
_ATTENTION_CHANNELS = 128  # of a head
_NOISE_TO_SIGNAL = (200.0, 0.02)  # at the first noise level of sampling, and at the last one above 0
_RHO = 7.0  # the larger, the more levels with little noise


class LatentPrior(ModelMixin, ConfigMixin):
    """Base class of the priors: how they are saved and loaded."""

    _no_split_modules = ["ModulatedBlock"]  # which device_map="auto" keeps on one device
    _auto_class = "AutoModel"  # save_config writes `auto_map`, by which AutoModel finds this file

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
        with_info = kwargs.pop("output_loading_info", False)
        prior, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"the weights of the prior lack {', '.join(missing)}: remove {args[0] if args else 'them'}, and fit or "
                "download the prior again."
            )
        for parameter in prior.parameters():
            parameter.data = parameter.data.clone()
        return (prior, info) if with_info else prior

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As `ConfigMixin.save_config`, with this source file; called by every way of saving the prior."""
        os.makedirs(save_directory, exist_ok=True)
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(__file__, os.path.join(save_directory, os.path.basename(__file__)))
        super().save_config(save_directory, *args, **kwargs)


# ---------------------------------------------------------------------- Gaussian


class GaussianPrior(LatentPrior):
    """N(mean, factor factor^T), and the directions in which attributes of faces change.

    Args:
        latent_dim: Dimension of a latent.
        attributes: Names of the attributes that `directions` are known of.

    Attributes:
        mean: (latent_dim,).
        factor: (latent_dim, latent_dim).
        directions: (2, attributes, latent_dim): what is added to a latent to make an absent attribute present, as the
            difference of means and by ridge regression on all attributes.
    """

    @register_to_config
    def __init__(self, latent_dim: int = 1024, attributes: tuple[str, ...] = ()) -> None:
        super().__init__()
        # Parameters rather than buffers: diffusers' loading is made for them.
        self.mean = _constant(torch.zeros(latent_dim))
        self.factor = _constant(torch.eye(latent_dim))
        self.directions = _constant(torch.zeros(2, len(attributes), latent_dim))

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise of one latent."""
        return (self.config.latent_dim,)

    @torch.no_grad()
    def forward(self, noise: Tensor) -> Tensor:
        """Transforms standard normal noise (N, latent_dim) to latents (N, latent_dim)."""
        return self.mean + noise.to(self.mean) @ self.factor.T

    def noise_to_latents(self, vae: ModelMixin, noise: Tensor) -> Tensor:
        """Transforms standard normal noise (N, latent_dim) to latents of the VAE, (N, C, h, w)."""
        return self(noise).view(-1, *vae.latent_shape)

    def latents_to_noise(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """The inverse of `noise_to_latents`."""
        centered = (latents.flatten(1) - self.mean.to(latents)).cpu().double()
        return torch.linalg.solve(self.factor.cpu().double(), centered.T).T.to(latents)


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
    noise = (torch.linalg.vector_norm(standardized, dim=1).pow(4).mean() - sample.square().sum()) / n
    weight = float((noise / spread.clamp_min(1e-12)).clamp(0, 1))
    return (1 - weight) * sample + weight * scale * identity, weight


@torch.no_grad()
def fit_gaussian(latents: Tensor) -> tuple[GaussianPrior, float]:
    """Fits the mean and the full, shrunk covariance of latents.

    Args:
        latents: Samples from the posteriors of training faces, (n, ...), flattened from the second axis on.

    Returns:
        The prior, on the latents' device, and the weight of the identity in the correlation.

    Raises:
        ValueError: Fewer than two faces.
    """
    if len(latents) < 2:
        raise ValueError(f"a prior needs at least 2 faces, got {len(latents)}.")
    flat = latents.flatten(1).cpu().to(torch.float64, copy=True)  # on the CPU: MPS has no float64
    mean, std = flat.mean(dim=0), flat.std(dim=0, correction=0).clamp_min(1e-6)
    correlation, weight = shrunk_correlation(flat.sub_(mean).div_(std))  # in place: 2.7 GB for all of CelebA, flipped
    eigenvalues, eigenvectors = torch.linalg.eigh(correlation)
    prior = GaussianPrior(len(mean))
    prior.mean.copy_(mean)
    prior.factor.copy_(std[:, None] * eigenvectors * eigenvalues.clamp_min(1e-12).sqrt())
    return prior.to(latents.device).eval(), weight


# ---------------------------------------------------------------------- diffusion


def _moved(x: Tensor, module: nn.Module) -> Tensor:
    """x on the device of a module, which is another where models are offloaded to the CPU."""
    device = next(module.parameters()).device
    return x if device.type == "meta" else x.to(device)


def _norm(x: Tensor) -> Tensor:
    """Layer normalization over the channels of each position of (N, C, H, W), in the dtype of x under autocast too."""
    device = x.device.type
    is_autocast = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if is_autocast else contextlib.nullcontext():
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)


def sampling_sigmas(num_steps: int) -> Tensor:
    """The fractions of noise at which a sample is denoised, falling, (num_steps,).

    The ratio of noise to signal is spaced as in Karras et al. 2022 (https://arxiv.org/abs/2206.00364, equation 5): densely
    where there is little noise.
    """
    first, last = (ratio ** (1 / _RHO) for ratio in _NOISE_TO_SIGNAL)
    ratios = torch.linspace(first, last, num_steps, device="cpu") ** _RHO
    return ratios / (1 + ratios)


def _check_scale(name: str, scale: float) -> None:
    if isinstance(scale, str) or not 0 <= scale < math.inf:
        raise ValueError(f"{name} must be a number of at least 0, got {scale!r}: 1 has no effect.")


class Standardize(nn.Module):
    """(x - mean) / std, or its inverse.

    A module of its own rather than parameters of the prior, so that offloading hooks move it when it is used.

    Args:
        shape: Of `mean`; `std` is one value.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.mean, self.std = _constant(torch.zeros(shape)), _constant(torch.ones(()))

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = _moved(x, self)
        return self.mean + self.std * x if inverse else (x - self.mean) / self.std


class ModulatedBlock(nn.Module):
    """x + gate(c) f(scale(c) norm(x) + shift(c)), the identity at initialization (adaLN-Zero of DiT, Peebles and Xie
    2022, https://arxiv.org/abs/2212.09748).

    f is two 3x3 convolutions, or with `attention` self-attention over all positions.
    """

    def __init__(self, channels: int, condition_channels: int, attention: bool = False) -> None:
        super().__init__()
        self.heads = max(1, channels // _ATTENTION_CHANNELS) if attention else 0
        self.modulation = nn.Linear(condition_channels, 3 * channels)
        kernel_size = 1 if attention else 3
        self.conv1 = nn.Conv2d(channels, 3 * channels if attention else channels, kernel_size, padding=kernel_size // 2)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(N, C, H, W) and (N, condition_channels) to (N, C, H, W)."""
        shift, scale, gate = self.modulation(condition)[..., None, None].chunk(3, dim=1)
        h = self.conv1(_norm(x) * (1 + scale) + shift)
        return x + gate * self.conv2(self._attend(h) if self.heads else F.silu(h))

    def _attend(self, h: Tensor) -> Tensor:
        """Queries, keys and values (N, 3C, H, W) to (N, C, H, W)."""
        q, k, v = h.flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(len(h), -1, *h.shape[2:])


class VelocityUNet(nn.Module):
    """The network of a `DiffusionPrior`, a U-Net of two resolutions; see there for the arguments."""

    def __init__(
        self,
        image_channels: int,
        patch_size: int,
        block_out_channels: tuple[int, int],
        layers_per_block: tuple[int, int, int],
        num_attributes: int,
    ) -> None:
        super().__init__()
        fine, coarse = block_out_channels
        down, middle, up = layers_per_block
        patch_channels = image_channels * patch_size**2
        self.patch_size = patch_size
        self.time_proj = Timesteps(_TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(_TIME_CHANNELS, coarse)
        self.attribute_embedding = nn.Linear(num_attributes, coarse, bias=False) if num_attributes else None
        self.conv_in = nn.Conv2d(patch_channels, fine, 3, padding=1)
        self.down = nn.ModuleList(ModulatedBlock(fine, coarse) for _ in range(down))
        self.downsample = nn.Conv2d(4 * fine, coarse, 1)
        self.middle = nn.ModuleList(
            ModulatedBlock(coarse, coarse, attention)
            for index in range(middle)
            for attention in ([False, True] if index % 2 else [False])
        )
        self.upsample = nn.Conv2d(coarse, 4 * fine, 1)
        self.merge = nn.Conv2d(2 * fine, fine, 1)
        self.up = nn.ModuleList(ModulatedBlock(fine, coarse) for _ in range(up))
        self.conv_out = nn.Conv2d(fine, patch_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor, sigma: Tensor, attributes: Tensor | None) -> Tensor:
        """(N, C, H, W), (N,) and (N, number of attributes) to the velocity, (N, C, H, W)."""
        # The embedding's frequencies are made for 0 to 1,000; Timesteps returns float32.
        condition = self.time_embedding(self.time_proj(1000 * sigma).to(x.dtype))
        if self.attribute_embedding is not None and attributes is not None:
            condition = condition + self.attribute_embedding(attributes.to(x.dtype))
        condition = F.silu(condition)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        for block in self.down:
            h = block(h, condition)
        skip, h = h, self.downsample(F.pixel_unshuffle(h, 2))
        for block in self.middle:
            h = block(h, condition)
        h = self.merge(torch.cat([F.pixel_shuffle(self.upsample(h), 2), skip], dim=1))
        for block in self.up:
            h = block(h, condition)
        return F.pixel_shuffle(self.conv_out(F.silu(_norm(h))), self.patch_size)


class DiffusionPrior(LatentPrior):
    """A flow-matching model of the small images of `latents_to_images`. The arguments are the keys of `config.json`.

    On the path x(sigma) = (1 - sigma) image + sigma noise a network predicts the velocity noise - image (Lipman et al.
    2022, https://arxiv.org/abs/2210.02747, with the direction of time of diffusers' schedulers). Images are standardized
    by their mean image and one standard deviation.

    Sampling is guided by an earlier, worse version of the network: the velocity is extrapolated from the prediction of
    this guide through that of the network, away from the errors that both make (autoguidance, Karras et al. 2024,
    https://arxiv.org/abs/2406.02507). Where attributes are given, the prediction of the network is first extrapolated from
    that without attributes (classifier-free guidance, Ho and Salimans 2022, https://arxiv.org/abs/2207.12598).

    Args:
        latent_dim: Dimension of a latent.
        image_channels, image_size: Of the images.
        patch_size: Each patch_size x patch_size pixels become channels of one position before the first convolution.
        block_out_channels: Channels at 1 / patch_size and at 1 / (2 patch_size) of the resolution.
        layers_per_block: Residual blocks on the way down, at the lower resolution, and on the way up. Every second
            block at the lower resolution is followed by self-attention.
        attributes: Names of the attributes that it is conditioned on.
        num_inference_steps: Of sampling; each evaluates the network and the guide once. Fewer than about 10 give a wrong
            contrast.
        guidance_scale, attribute_scale: Defaults of `denoise`.

    Attributes:
        network: Predicts the velocity.
        guide: An earlier version of the network, not trained.
        standardize: Images to the scale on which noise is added.

    Raises:
        ValueError: The image cannot be divided into patches, or a number for sampling is impossible.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 1024,
        image_channels: int = 3,
        image_size: int = 64,
        patch_size: int = 4,
        block_out_channels: tuple[int, int] = (192, 384),
        layers_per_block: tuple[int, int, int] = (2, 5, 3),
        attributes: tuple[str, ...] = (),
        num_inference_steps: int = 15,
        guidance_scale: float = 1.5,
        attribute_scale: float = 4.0,
    ) -> None:
        super().__init__()
        if not isinstance(num_inference_steps, int) or num_inference_steps < 2:
            raise ValueError(f"num_inference_steps must be an integer of at least 2, got {num_inference_steps!r}.")
        _check_scale("guidance_scale", guidance_scale)
        _check_scale("attribute_scale", attribute_scale)
        if image_size % (2 * patch_size):
            raise ValueError(f"image_size {image_size} must be a multiple of 2 x patch_size = {2 * patch_size}.")
        arguments = image_channels, patch_size, block_out_channels, layers_per_block, len(attributes)
        self.standardize = Standardize(self.noise_shape)
        self.network = VelocityUNet(*arguments)
        self.guide = VelocityUNet(*arguments).requires_grad_(False)
        self.guide.load_state_dict(self.network.state_dict())

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise of one latent."""
        return self.config.image_channels, self.config.image_size, self.config.image_size

    def forward(
        self, x: Tensor, sigma: Tensor, attributes: Tensor | None = None, with_guide: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicts the velocity.

        Args:
            x: Standardized images with noise, (N, C, H, W).
            sigma: Fraction of noise in [0, 1], (N,).
            attributes: (N, number of attributes): 1 present, -1 absent, 0 unknown; None: all unknown.
            with_guide: Return the prediction of the guide, too.

        Returns:
            noise - image, (N, C, H, W); with the guide a pair of them.
        """
        velocity = self.network(x, sigma, attributes)
        return (velocity, self.guide(x, sigma, None)) if with_guide else velocity

    def noise_to_latents(
        self,
        vae: ModelMixin,
        noise: Tensor,
        attributes: Mapping[str, float] | None = None,
        guidance_scale: float | None = None,
        attribute_scale: float | None = None,
    ) -> Tensor:
        """Transforms standard normal noise (N, *noise_shape) to latents of the VAE, (N, C, h, w); see `denoise`."""
        return self.images_to_latents(vae, self.denoise(noise, attributes, guidance_scale, attribute_scale))

    def latents_to_noise(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """The inverse of `noise_to_latents` without attributes and guidance."""
        return self.add_noise(self.latents_to_images(vae, latents))

    @staticmethod
    @torch.no_grad()
    def latents_to_images(vae: ModelMixin, latents: Tensor) -> Tensor:
        """The images whose distribution the prior learns: a one-to-one map of the latents, (N, C, h, w).

        Neighboring pixels are related, while the dimensions of a vector look alike. So a latent of the vector layout
        becomes its PCA image at `pca_size`, (N, 3, pca_size, pca_size); one of the spatial layout is an image already.

        Raises:
            ValueError: A vector layout without a suitable PCA branch.
        """
        config = vae.config
        if config.latent_layout == "spatial":
            return latents
        if config.pca_size is None or config.pca_decode_size % config.pca_size:
            raise ValueError(
                "a diffusion prior of the vector layout needs a PCA branch whose pca_decode_size is a multiple of "
                f"pca_size, got {config.pca_size} and {config.pca_decode_size}: train a VAE with such a branch, or use "
                "the Gaussian prior."
            )
        decoder = vae.pca_branch.decoder
        return F.avg_pool2d(decoder(_moved(latents, decoder)), config.pca_decode_size // config.pca_size)

    @staticmethod
    @torch.no_grad()
    def images_to_latents(vae: ModelMixin, images: Tensor) -> Tensor:
        """The inverse of `latents_to_images`: the PCA branch encodes the images."""
        if vae.config.latent_layout == "spatial":
            return images
        encoder = vae.pca_branch.encoder
        patches = F.pixel_unshuffle(_moved(images, encoder), encoder.patch_size)
        return encoder.linear(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def attribute_values(self, attributes: Mapping[str, float] | None, num_samples: int) -> Tensor | None:
        """The third argument of `forward` for the same attributes of all samples.

        Args:
            attributes: Name -> 1 present, 0 absent; those that are left out are unknown.
            num_samples: N.

        Raises:
            ValueError: An attribute that the prior was not trained on, or another value.
        """
        if not attributes:
            return None
        names = list(self.config.attributes)
        if unknown := [name for name in attributes if name not in names]:
            raise ValueError(
                f"attribute {unknown[0]!r} is unknown: this prior was trained on {', '.join(names) or 'no attributes'}."
            )
        for name, value in attributes.items():
            if not 0 <= value <= 1:
                raise ValueError(f"attribute {name!r} must be from 0 (absent) to 1 (present), got {value}.")
        values = [2.0 * attributes[name] - 1 if name in attributes else 0.0 for name in names]
        return torch.tensor(values).expand(num_samples, -1)

    def _velocity(
        self, x: Tensor, sigma: Tensor, attributes: Tensor | None, guidance_scale: float, attribute_scale: float = 1.0
    ) -> Tensor:
        """`forward` with guidance, float32, on the device of x: offloading hooks may compute on another."""
        device, guide = x.device, None
        x, sigma = x.to(self.dtype), sigma.to(device).expand(len(x))
        attributes = None if attributes is None else attributes.to(x)
        if guidance_scale == 1:
            velocity = self(x, sigma, attributes)
        else:
            velocity, guide = self(x, sigma, attributes, with_guide=True)
        velocity = velocity.to(device, torch.float32)
        if attributes is not None and attribute_scale != 1:
            velocity = torch.lerp(self(x, sigma).to(device, torch.float32), velocity, attribute_scale)
        return velocity if guide is None else torch.lerp(guide.to(device, torch.float32), velocity, guidance_scale)

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        attributes: Mapping[str, float] | None = None,
        guidance_scale: float | None = None,
        attribute_scale: float | None = None,
    ) -> Tensor:
        """Transforms noise (N, C, H, W) to images of the same shape, float32, by the UniPC scheduler of diffusers (Zhao et
        al. 2023, https://arxiv.org/abs/2302.04867).

        Args:
            noise: Standard normal, times a temperature.
            attributes: See `attribute_values`.
            guidance_scale: How far to extrapolate, from the guide at 0 through the network at 1; None: that of the
                configuration.
            attribute_scale: How far to extrapolate, from no attributes at 0 through the given ones at 1; None: that of
                the configuration.

        Raises:
            ValueError: An attribute or a scale that is impossible.
        """
        x, values = noise.float(), self.attribute_values(attributes, len(noise))
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        attribute_scale = self.config.attribute_scale if attribute_scale is None else attribute_scale
        _check_scale("guidance_scale", guidance_scale)
        _check_scale("attribute_scale", attribute_scale)
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(sigmas=sampling_sigmas(self.config.num_inference_steps).numpy())
        scheduler.set_begin_index(0)
        for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps):
            velocity = self._velocity(x, sigma, values, guidance_scale, attribute_scale)
            x = scheduler.step(velocity, timestep, x).prev_sample
        return self.standardize(x, inverse=True)

    @torch.no_grad()
    def add_noise(self, images: Tensor) -> Tensor:
        """The inverse of `denoise` without attributes and guidance, by Heun's method."""
        x = self.standardize(images.float())
        sigmas = torch.cat([torch.zeros(1, device="cpu"), sampling_sigmas(self.config.num_inference_steps).flip(0)])
        for start, end in zip(sigmas[:-1], sigmas[1:]):
            first = self._velocity(x, start, None, 1.0)
            second = self._velocity(x + (end - start) * first, end, None, 1.0)
            x = x + (end - start) * (first + second) / 2
        return x
