"""AutoencoderKLUltra: a face VAE with a latent of a stated dimension, as a diffusers model.

This file needs torch and diffusers only. It is saved beside the weights, so that
`AutoModel.from_pretrained(repo, trust_remote_code=True)` loads the model where this project is not installed.

The model has two branches, and both encode and decode:

    posterior mean = pca_branch.encoder(pixels) + encoder(pixels)
    reconstruction = enlarge(pca_image) + decoder(latents, pca_image),   pca_image = pca_branch.decoder(latents)

The PCA branch holds whitened principal components of the image at `pca_size` pixels, and the least-squares map from
their coefficients back to the image at `pca_decode_size` pixels. `training.pca_init` computes both from images; until
then they are zero. The image is one patch (layout `vector`) or one patch per latent position (layout `spatial`).

The convolutional branch starts at zero output and learns what the PCA branch cannot represent. It has no block at full
resolution: pixels are unshuffled into channels by `patch_size` first, and shuffled back last. It changes resolution as
DC-AE does, by a convolution with a parameter-free shortcut (Chen et al. 2024, https://arxiv.org/abs/2410.10733,
section 3.2).
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

# Bounds of the posterior log-variance (sigma from 4.5e-5 to 7.4); exp() of values beyond them overflows in float16.
LOGVAR_MIN, LOGVAR_MAX = -20.0, 4.0


@dataclass
class AutoencoderKLUltraOutput(BaseOutput):
    """Output of `AutoencoderKLUltra.forward`.

    Attributes:
        sample: Reconstruction, (N, 3, H, W), nominally in [-1, 1] (not clamped).
        posterior: q(z | pixels), a diagonal Gaussian over latents (N, C, h, w).
    """

    sample: Tensor
    posterior: DiagonalGaussianDistribution | None = None


# ---------------------------------------------------------------------- layers


def _is_autocast(x: Tensor) -> bool:
    # The meta device, on which FLOPs are counted, has no autocast.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if _is_autocast(x) else contextlib.nullcontext()


def pixel_unshuffle(x: Tensor, factor: int, like: Tensor | None = None) -> Tensor:
    """`F.pixel_unshuffle` in the memory format of `like`, by default of `x`.

    On CUDA torch's own returns and sends back NCHW, so channels_last maps are rearranged here, in one copy each way. On the
    CPU torch's own keeps channels_last, in half of the time, but tells torch.compile that it returned NCHW.
    """
    if (x if like is None else like).is_contiguous():
        return F.pixel_unshuffle(x, factor).contiguous()
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
        return F.pixel_unshuffle(x, factor).contiguous(memory_format=torch.channels_last)
    patches = x.permute(0, 2, 3, 1).unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # (N, h, f, w, f, C)
    return patches.permute(0, 1, 3, 5, 2, 4).flatten(3).permute(0, 3, 1, 2)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """`F.pixel_shuffle` in the memory format of `x`: see `pixel_unshuffle`."""
    if x.is_contiguous():
        return F.pixel_shuffle(x, factor)
    if x.device.type == "cpu":
        return F.pixel_shuffle(x, factor).contiguous(memory_format=torch.channels_last)
    patches = x.permute(0, 2, 3, 1).unflatten(3, (-1, factor, factor))  # (N, h, w, C, f, f)
    return patches.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of each position, as in ConvNeXt (Liu et al. 2022,
    https://arxiv.org/abs/2201.03545), computed in the dtype of its input under autocast too.

    A channels_last map needs no copy for it, while group normalization would convert it to NCHW and back on CUDA.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W), in its memory format."""
        with _no_autocast(x):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, weight, bias, self.eps).permute(0, 3, 1, 2)
            return y.contiguous() if x.is_contiguous() else y


class ChannelBias(nn.Module):
    """Adds one trained value to each channel of (N, C, H, W).

    A module of its own rather than a parameter of the model, so that offloading hooks move it when it is used.
    """

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((channels,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return x + self.bias.to(x.dtype)[:, None, None]


class ResBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))) with 3x3 convolutions; the identity at initialization."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        _zero(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class Downsample(nn.Module):
    """Halves height and width: convolution and pixel unshuffle, plus pixel unshuffle and a mean over channel groups."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv = nn.Conv2d(in_channels, out_channels // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H/2, W/2)."""
        shortcut = pixel_unshuffle(x, 2).unflatten(1, (self.out_channels, -1)).mean(dim=2)
        return pixel_unshuffle(self.conv(x), 2) + shortcut


class Upsample(nn.Module):
    """Doubles height and width: pixel shuffle of a convolution plus repeated channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.repeats = 4 * out_channels // in_channels
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, 2H, 2W)."""
        repeated = x.unsqueeze(2)  # broadcast over `repeats`
        return pixel_shuffle((self.conv(x).unflatten(1, (-1, self.repeats)) + repeated).flatten(1, 2), 2)


class SpatialHead(nn.Module):
    """Last layer of the spatial layout's encoder: features (N, C, h, w) to posterior parameters (N, 2L, h, w)."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(channels, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.out(x)


class VectorHead(nn.Module):
    """Last layers of the vector layout's encoder: features (N, C, m, m) to posterior parameters (N, 2L, 1, 1)."""

    def __init__(self, channels: int, width: int, map_size: int, latent_channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, width, 1)
        self.out = nn.Linear(width * map_size**2, 2 * latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.out(F.silu(self.squeeze(x)).flatten(1))[..., None, None]


class VectorStem(nn.Module):
    """First layers of the vector layout's decoder: latents (N, L, 1, 1) to features (N, C, m, m)."""

    def __init__(self, latent_channels: int, channels: int, map_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(latent_channels, channels // 2 * map_size**2)
        self.conv = nn.Conv2d(channels // 2, channels, 3, padding=1)
        self.map_size = map_size

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        x = F.silu(self.linear(latents.flatten(1)))
        return self.conv(x.unflatten(1, (-1, self.map_size, self.map_size)))


# ---------------------------------------------------------------------- the branches


class Encoder(nn.Module):
    """Convolutional branch of the encoder: pixels (N, 3, H, W) to (N, 2 x latent_channels, h, w).

    With `zero_start` its last layer starts at zero, so that the PCA branch alone gives the first posterior mean.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        layers: tuple[int, ...],
        patch_size: int,
        latent_channels: int,
        vector_map_size: int | None,
        vector_width: int,
        zero_start: bool,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(3 * patch_size**2, channels[0], 3, padding=1)
        self.stages = _stages(channels, layers)
        self.downsamples = nn.ModuleList(Downsample(a, b) for a, b in zip(channels[:-1], channels[1:]))
        self.norm_out = ChannelNorm(channels[-1])
        if vector_map_size:
            self.head = VectorHead(channels[-1], vector_width, vector_map_size, latent_channels)
        else:
            self.head = SpatialHead(channels[-1], latent_channels)
        if zero_start:
            _zero(self.head.out)
        self.gradient_checkpointing = False

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        h = self.conv_in(pixel_unshuffle(pixels, self.patch_size))
        for index, stage in enumerate(self.stages):
            if index > 0:
                h = self.downsamples[index - 1](h)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(stage, h)
            else:
                h = stage(h)
        return self.head(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Convolutional branch of the decoder: latents (N, L, h, w) and their PCA image to (N, 3, H, W).

    The PCA image is injected into every stage whose resolution does not exceed it: unshuffled to the resolution of the
    stage by the factor in `pca_factors` (0: not injected) and projected by a 1x1 convolution.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        layers: tuple[int, ...],
        patch_size: int,
        latent_channels: int,
        vector_map_size: int | None,
        pca_factors: tuple[int, ...],
        zero_start: bool,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.pca_factors = pca_factors
        if vector_map_size:
            self.stem = VectorStem(latent_channels, channels[-1], vector_map_size)
        else:
            self.stem = nn.Conv2d(latent_channels, channels[-1], 3, padding=1)
        # Stage i works at 1 / (patch_size x 2^i) of the resolution of the image: listed from fine to coarse.
        self.stages = _stages(channels, layers)
        self.upsamples = nn.ModuleList(Upsample(b, a) for a, b in zip(channels[:-1], channels[1:]))
        self.pca_projections = nn.ModuleList(
            nn.Conv2d(3 * factor**2, width, 1) if factor else nn.Identity()
            for width, factor in zip(channels, pca_factors)
        )
        self.norm_out = ChannelNorm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3 * patch_size**2, 3, padding=1)
        if zero_start:
            _zero(self.conv_out)
        self.gradient_checkpointing = False

    def forward(self, latents: Tensor, pca_image: Tensor | None) -> Tensor:
        """See the class."""
        h = self.stem(latents)
        for index in reversed(range(len(self.stages))):
            if self.pca_factors[index]:
                patches = pixel_unshuffle(pca_image, self.pca_factors[index], like=h).to(h.dtype)
                h = h + self.pca_projections[index](patches)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(self.stages[index], h)
            else:
                h = self.stages[index](h)
            if index > 0:
                h = self.upsamples[index - 1](h)
        return pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch_size)


def _stages(channels: tuple[int, ...], layers: tuple[int, ...]) -> nn.ModuleList:
    """A stage of `layers[i]` residual blocks with `channels[i]` channels, for each i."""
    return nn.ModuleList(
        nn.Sequential(*(ResBlock(width) for _ in range(count))) for width, count in zip(channels, layers)
    )


class PCALinear(nn.Linear):
    """A linear map of patches, zero at initialization, computed in the dtype of its weights under autocast too.

    Whitening divides by standard deviations that are too small for bfloat16.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        _zero(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        with _no_autocast(x):
            return super().forward(x.to(self.weight.dtype))


class PCAEncoder(nn.Module):
    """Images (N, 3, H, W) to whitened coefficients of their principal components, (N, C, h, w)."""

    def __init__(self, latent_channels: int, factor: int, patch_size: int) -> None:
        super().__init__()
        self.factor = factor  # resolution of the image over pca_size
        self.patch_size = patch_size  # of the image at pca_size
        self.linear = PCALinear(3 * patch_size**2, latent_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        patches = F.pixel_unshuffle(F.avg_pool2d(pixels, self.factor), self.patch_size)
        return self.linear(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PCADecoder(nn.Module):
    """Latents (N, C, h, w) to the PCA image, (N, 3, h x patch_size, w x patch_size)."""

    def __init__(self, latent_channels: int, factor: int, patch_size: int) -> None:
        super().__init__()
        self.factor = factor  # resolution of the image over pca_decode_size
        self.patch_size = patch_size  # of the PCA image
        self.linear = PCALinear(latent_channels, 3 * patch_size**2)

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        patches = self.linear(latents.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(patches, self.patch_size)

    def enlarge(self, pca_image: Tensor) -> Tensor:
        """The PCA image at the resolution of the image, by bicubic interpolation.

        As two matrix products, because the gradient of `F.interpolate(mode="bicubic")` is not deterministic on CUDA.
        """
        if self.factor == 1:
            return pca_image
        with _no_autocast(pca_image):
            height, width = pca_image.shape[-2:]
            rows = _bicubic(height, self.factor, pca_image)
            columns = rows if width == height else _bicubic(width, self.factor, pca_image)
            return rows @ pca_image @ columns.T


def _bicubic(size: int, factor: int, like: Tensor) -> Tensor:
    """The matrix (factor x size, size) that enlarges one axis as `F.interpolate(mode="bicubic")` does."""
    identity = torch.eye(size, device=like.device)[None, None]
    return F.interpolate(identity, size=(factor * size, size), mode="bicubic")[0, 0].to(like.dtype)


class PCABranch(nn.Module):
    """Encoder and decoder of the PCA branch."""

    def __init__(
        self, latent_channels: int, latent_size: int, sample_size: int, pca_size: int, pca_decode_size: int
    ) -> None:
        super().__init__()
        self.encoder = PCAEncoder(latent_channels, sample_size // pca_size, pca_size // latent_size)
        self.decoder = PCADecoder(latent_channels, sample_size // pca_decode_size, pca_decode_size // latent_size)


# ---------------------------------------------------------------------- the model


class AutoencoderKLUltra(ModelMixin, AutoencoderMixin, ConfigMixin):
    """A variational autoencoder with a PCA branch beside its convolutions.

    The interface is that of diffusers' `AutoencoderKL`. Args name the keys of `config.json`:

    Args:
        sample_size: Resolution of the square images it is trained on, pixels.
        latent_dim: Number of latent dimensions; must equal latent_channels x latent_size^2.
        latent_layout: "vector" (one position; fixed image size) or "spatial" (a map; height and width any multiple of
            the spatial compression ratio).
        latent_channels: Channels of the latent.
        latent_size: Height and width of the latent at `sample_size`; 1 for "vector".
        patch_size: Each patch_size x patch_size pixels become channels of one position before the first convolution.
        encoder_block_out_channels: Channels of each encoder stage, fine to coarse; stage i works at sample_size /
            (patch_size x 2^i).
        encoder_layers_per_block: Residual blocks of each encoder stage, fine to coarse.
        decoder_block_out_channels: Channels of each decoder stage, also listed from fine to coarse.
        decoder_layers_per_block: Residual blocks of each decoder stage, also listed from fine to coarse.
        vector_width: "vector" only: channels of the coarsest map before it is flattened.
        pca_size: Resolution that the PCA branch encodes, pixels; null for no PCA branch.
        pca_decode_size: Resolution that the PCA branch decodes to, pixels; ignored without a PCA branch.
        logvar_init: Posterior log-variance before training (PCA initialization replaces it by one for each channel).
        scaling_factor: (latents - shift_factor) x scaling_factor has mean 0 and variance 1 over the validation images.
            Measured after training; 1 with shift_factor 0 means "not measured".
        shift_factor: Mean of the latents over the validation images, see scaling_factor.
        latents_mean, latents_std: The same for each channel, measured after training; null before.

    Raises:
        ValueError: The sizes do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock", "Downsample", "Upsample"]
    _group_offload_block_modules = ["encoder", "decoder", "pca_branch", "logvar_bias"]
    _auto_class = "AutoModel"  # save_config writes `auto_map`, by which AutoModel finds this file
    main_input_name = "sample"

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        latent_dim: int = 1024,
        latent_layout: str = "vector",
        latent_channels: int = 1024,
        latent_size: int = 1,
        patch_size: int = 4,
        encoder_block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        encoder_layers_per_block: tuple[int, ...] = (1, 1, 1, 1),
        decoder_block_out_channels: tuple[int, ...] = (96, 192, 256, 512),
        decoder_layers_per_block: tuple[int, ...] = (2, 1, 1, 1),
        vector_width: int = 64,
        pca_size: int | None = 64,
        pca_decode_size: int = 128,
        logvar_init: float = -6.0,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(self.config)
        self.spatial_compression_ratio = sample_size // latent_size
        vector_map_size = None  # resolution of the coarsest map, which the vector layout flattens
        if latent_layout == "vector":
            vector_map_size = sample_size // (patch_size * 2 ** (len(encoder_block_out_channels) - 1))
        self.encoder = Encoder(
            tuple(encoder_block_out_channels),
            tuple(encoder_layers_per_block),
            patch_size,
            latent_channels,
            vector_map_size,
            vector_width,
            zero_start=pca_size is not None,
        )
        strides = [patch_size * 2**index for index in range(len(decoder_block_out_channels))]
        self.decoder = Decoder(
            tuple(decoder_block_out_channels),
            tuple(decoder_layers_per_block),
            patch_size,
            latent_channels,
            vector_map_size,
            pca_factors=tuple(stride * pca_decode_size // sample_size if pca_size else 0 for stride in strides),
            zero_start=pca_size is not None,
        )
        self.pca_branch = None
        if pca_size is not None:
            self.pca_branch = PCABranch(latent_channels, latent_size, sample_size, pca_size, pca_decode_size)
        self.logvar_bias = ChannelBias(latent_channels, logvar_init)

        # Pipelines record this name in model_index.json and then load the class from vae/<name>.py.
        self.__module__ = os.path.splitext(os.path.basename(__file__))[0]
        if latent_layout == "spatial" and patch_size & (patch_size - 1) == 0:
            # Pipelines take 2 ** (len(block_out_channels) - 1) for the compression ratio: a patch of 4 counts 2 stages.
            channels = (encoder_block_out_channels[0],) * (patch_size.bit_length() - 1) + (*encoder_block_out_channels,)
            self.register_to_config(block_out_channels=channels, force_upcast=False)

        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `ModelMixin.from_pretrained`, with bitwise the same outputs as the saved model.

        Weights are copied out of the memory-mapped file, whose alignment changes the order in which CPU kernels sum
        (1e-6 in the image), and which may be replaced while the model is in use.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        for parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            parameter.data = parameter.data.clone()
        return loaded

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As `ConfigMixin.save_config`, with this source file; called by every way of saving the model."""
        os.makedirs(save_directory, exist_ok=True)
        source = inspect.getfile(type(self))
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(source, os.path.join(save_directory, os.path.basename(source)))
        super().save_config(save_directory, *args, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """As in diffusers, without its warning about the keys that are derived when the model is saved or built."""
        derived = ("auto_map", "block_out_channels", "force_upcast")
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in derived}, **kwargs)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latent of an image at `sample_size`."""
        return self.config.latent_channels, self.config.latent_size, self.config.latent_size

    # ------------------------------------------------------------------ encode

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode images.

        Args:
            x: Images (N, 3, H, W) in [-1, 1].
            return_dict: False for a plain tuple.

        Returns:
            `latent_dist`, q(z | x): a diagonal Gaussian over (N, C, h, w); float32 under autocast.

        Raises:
            ValueError: The image size does not suit the layout.
        """
        if self.use_slicing and x.shape[0] > 1:
            parameters = torch.cat([self._encode(image) for image in x.split(1)])
        else:
            parameters = self._encode(x)
        posterior = DiagonalGaussianDistribution(parameters)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Images to posterior parameters, in tiles if tiling is enabled and needed."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"images must have the shape (N, 3, height, width), got {tuple(pixels.shape)}.")
        height, width = pixels.shape[-2:]
        size, ratio = self.config.sample_size, self.spatial_compression_ratio
        if self.config.latent_layout == "vector":
            if (height, width) != (size, size):
                raise ValueError(
                    f"the vector layout takes images of {size}x{size} pixels only, got {height}x{width}: resize them, "
                    "or train a spatial layout."
                )
        elif height % ratio or width % ratio:
            raise ValueError(
                f"height and width of images must be multiples of {ratio}, got {height}x{width}: resize or pad them."
            )
        if self.use_tiling and max(height, width) > self.tile_sample_min_size:
            return self._tiled(pixels, self._encode_tile, self.tile_sample_min_size, unit=ratio, scale=1 / ratio)
        return self._encode_tile(pixels)

    def _encode_tile(self, pixels: Tensor) -> Tensor:
        """Images (N, 3, H, W) to posterior mean and log-variance (N, 2C, h, w)."""
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        if _is_autocast(pixels):  # the KL divergence needs float32; a half-precision model stays half
            mean, logvar = mean.float(), logvar.float()
        if self.pca_branch is not None:
            mean = mean + self.pca_branch.encoder(pixels).to(mean.dtype)
        logvar = self.logvar_bias(logvar).clamp(LOGVAR_MIN, LOGVAR_MAX)
        return torch.cat([mean, logvar], dim=1)

    # ------------------------------------------------------------------ decode

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents.

        Args:
            z: Latents (N, C, h, w) as `encode` returns them (not multiplied by `scaling_factor`).
            return_dict: False for a plain tuple.
            generator: Unused; diffusers' pipelines pass it.

        Returns:
            `sample`, images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Raises:
            ValueError: The shape of the latents does not suit the layout.
        """
        if self.use_slicing and z.shape[0] > 1:
            sample = torch.cat([self._decode(latent) for latent in z.split(1)])
        else:
            sample = self._decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents to images, in tiles if tiling is enabled and needed."""
        vector, channels = self.config.latent_layout == "vector", self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels or (vector and latents.shape[2:] != (1, 1)):
            raise ValueError(
                f"latents must have the shape (N, {channels}, {'1, 1' if vector else 'height, width'}), "
                f"got {tuple(latents.shape)}."
            )
        tile = self.tile_sample_min_size // self.spatial_compression_ratio
        if self.use_tiling and max(latents.shape[-2:]) > tile:
            return self._tiled(latents, self._decode_tile, tile, unit=1, scale=self.spatial_compression_ratio)
        return self._decode_tile(latents)

    def _decode_tile(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) to images (N, 3, H, W)."""
        if self.pca_branch is None:
            return self.decoder(latents, None)
        pca_image = self.pca_branch.decoder(latents)
        return self.decoder(latents, pca_image) + self.pca_branch.decoder.enlarge(pca_image)

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> AutoencoderKLUltraOutput | tuple[Tensor, DiagonalGaussianDistribution]:
        """Encode and decode images.

        Args:
            sample: Images (N, 3, H, W) in [-1, 1].
            sample_posterior: Decode a sample from the posterior instead of its mean.
            return_dict: False for a plain tuple (sample, posterior).
            generator: Generator of that sample.
            noise: Standard normal noise (N, C, h, w) to sample the posterior with, instead of the generator's. Implies
                `sample_posterior`.
        """
        posterior = self.encode(sample).latent_dist
        if noise is not None:
            latents = posterior.mean + posterior.std * noise.to(posterior.mean)
        elif sample_posterior:
            latents = posterior.sample(generator=generator)
        else:
            latents = posterior.mode()
        reconstruction = self.decode(latents).sample
        if not return_dict:
            return reconstruction, posterior
        return AutoencoderKLUltraOutput(sample=reconstruction, posterior=posterior)

    # ------------------------------------------------------------------ tiling

    def enable_tiling(self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None) -> None:
        """Encode and decode large images in overlapping, blended tiles (spatial layout only).

        Args:
            tile_sample_min_size: Height and width of a tile in pixels, a multiple of the spatial compression ratio;
                default `sample_size`.
            tile_overlap_factor: Fraction of a tile that overlaps the next, in [0, 0.5].

        Raises:
            NotImplementedError: The layout is `vector`, in which each latent dimension describes the whole image.
            ValueError: A value is out of range.
        """
        if self.config.latent_layout == "vector":
            raise NotImplementedError(
                "tiling needs a spatial latent, but each dimension of the vector layout describes the whole image: use "
                "slicing (enable_slicing) to save memory, or train a spatial layout."
            )
        size = self.tile_sample_min_size if tile_sample_min_size is None else tile_sample_min_size
        ratio = self.spatial_compression_ratio
        if size < ratio or size % ratio:
            raise ValueError(f"tile_sample_min_size must be a positive multiple of {ratio}, got {size}.")
        overlap = self.tile_overlap_factor if tile_overlap_factor is None else tile_overlap_factor
        if not 0 <= overlap <= 0.5:
            raise ValueError(f"tile_overlap_factor must be in [0, 0.5], got {overlap}.")
        self.tile_sample_min_size, self.tile_overlap_factor, self.use_tiling = size, overlap, True

    def _tiled(self, x: Tensor, function: Callable[[Tensor], Tensor], tile: int, unit: int, scale: float) -> Tensor:
        """Apply `function` to overlapping tiles of (N, C, H, W) and blend them linearly.

        Args:
            x: Input of any size.
            function: Maps a tile to one that is `scale` times as high and wide.
            tile: Height and width of a tile, in positions of `x`.
            unit: Tiles start at multiples of this.
            scale: Resolution of the output over that of the input.
        """
        overlap = int(tile * self.tile_overlap_factor) // unit * unit
        ramp = max(1, round(overlap * scale))
        total, weight_sum = None, None
        for top in _tile_starts(x.shape[-2], tile, overlap):
            for left in _tile_starts(x.shape[-1], tile, overlap):
                out = function(x[..., top : top + tile, left : left + tile])
                if total is None:
                    height, width = (round(size * scale) for size in x.shape[-2:])
                    total = out.new_zeros(*out.shape[:2], height, width)
                    weight_sum = out.new_zeros(1, 1, height, width)
                weight = _tile_weight(out.shape[-2], ramp, out)[:, None] * _tile_weight(out.shape[-1], ramp, out)
                row, column = round(top * scale), round(left * scale)
                region = (..., slice(row, row + out.shape[-2]), slice(column, column + out.shape[-1]))
                total[region] += out * weight
                weight_sum[region] += weight
        return total / weight_sum


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin, so that neighbors overlap by at least `overlap` and the last one ends at the border."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [min(index * (tile - overlap), length - tile) for index in range(count)]


def _tile_weight(length: int, ramp: int, like: Tensor) -> Tensor:
    """Weight of the positions of a tile along one axis: rising over `ramp` positions from each border, then 1."""
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    return ((torch.minimum(position, length - 1 - position) + 1) / ramp).clamp(max=1)


def _check_sizes(c: FrozenDict) -> None:
    """Raise a ValueError, with the values and the remedy, if the sizes of a configuration do not fit together."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    integers = ("sample_size", "latent_channels", "latent_size", "patch_size", "vector_width")
    for name in integers if c.pca_size is None else (*integers, "pca_size", "pca_decode_size"):
        require(type(c[name]) is int and c[name] >= 1, f"{name} must be an integer of at least 1, got {c[name]!r}.")
    stages = len(c.encoder_block_out_channels)
    for part in ("encoder", "decoder"):
        widths = c[f"{part}_block_out_channels"]
        for name, least in ((f"{part}_block_out_channels", 1), (f"{part}_layers_per_block", 0)):
            require(
                len(c[name]) == max(stages, 1) and all(type(value) is int and value >= least for value in c[name]),
                f"{name} must list integers of at least {least}, one for each of the {stages} stages (the length of "
                f"encoder_block_out_channels), got {c[name]!r}.",
            )
        for fine, coarse in zip(widths, (*widths[1:], 4)):
            require(
                fine % 4 == 0 and 4 * fine % coarse == 0,
                f"{part}_block_out_channels must be multiples of 4, and 4 times each (the channels after pixel unshuffle) "
                f"a multiple of the next, got {fine} before {coarse} in {widths!r}.",
            )
    vector, size = c.latent_layout == "vector", c.sample_size
    require(
        c.latent_layout in ("vector", "spatial"),
        f"latent_layout must be 'vector' or 'spatial', got {c.latent_layout!r}.",
    )
    require(
        vector == (c.latent_size == 1),
        f"latent_size must be 1 for latent_layout 'vector' and at least 2 for 'spatial', got {c.latent_size} for "
        f"{c.latent_layout!r}.",
    )
    require(
        c.latent_dim == c.latent_channels * c.latent_size**2,
        f"latent_dim must be latent_channels x latent_size^2 = {c.latent_channels} x {c.latent_size}^2 = "
        f"{c.latent_channels * c.latent_size**2}, got {c.latent_dim}.",
    )
    stride = c.patch_size * 2 ** (stages - 1)
    require(
        size % stride == 0 and (vector or size == stride * c.latent_size),
        f"sample_size must be {'a multiple of ' if vector else f'latent_size {c.latent_size} x '}patch_size x "
        f"2^(stages - 1) = {c.patch_size} x {2 ** (stages - 1)} = {stride}, got {size}.",
    )
    if c.pca_size is None:
        return
    for name in ("pca_size", "pca_decode_size"):
        require(
            size % c[name] == 0 and c[name] % c.latent_size == 0,
            f"{name} must divide sample_size {size} and be a multiple of latent_size {c.latent_size}, got {c[name]}.",
        )
    patch_values, factor = 3 * (c.pca_size // c.latent_size) ** 2, size // c.pca_decode_size
    require(
        c.latent_channels <= patch_values,
        f"latent_channels must be at most 3 x (pca_size / latent_size)^2 = {patch_values}, the values of a patch, got "
        f"{c.latent_channels}: raise pca_size.",
    )
    for scale in (c.patch_size * 2**index for index in range(stages)):
        require(
            scale < factor or scale % factor == 0,
            f"pca_decode_size {c.pca_decode_size} is 1/{factor} of sample_size {size}, which the decoder stage at 1/{scale} "
            f"cannot take, because {scale} is not a multiple of {factor}: change pca_decode_size or patch_size.",
        )
