"""AutoencoderKLUltra: a face VAE whose latent has a stated number of numbers, as a diffusers model.

This one file is all that `from_pretrained` needs (torch and diffusers only), so it also travels with the weights:
`AutoModel.from_pretrained(repo, trust_remote_code=True)` loads it from the Hub. Training lives elsewhere.

How the model is built
----------------------
*Linear path.* Whitened principal components of the image at `pca_size` pixels, cut into as many patches as the
latent map has positions: one patch for the `vector` layout (the whole face), one per position for the `spatial`
layout; and the least-squares way back from them to the image at `pca_decode_size` pixels. `training.pca_init`
sets it from images; until then it is zero.

*Convolutions.* They learn what the linear path cannot, on both sides, and start at zero:

    posterior mean   = pca_branch.encode(shrink(pixels)) + encoder(pixels)
    reconstruction   = enlarge(linear image) + decoder(latents, linear image)

where linear image = pca_branch.decode(latents). No block runs at full resolution: `patch_size` folds pixels into
channels (pixel unshuffle) on the way in and unfolds them on the way out. Resampling is a convolution beside a
parameter-free shortcut (DC-AE, Chen et al. 2024, https://arxiv.org/abs/2410.10733, section 3.2).
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

# Posterior log-variances outside these bounds mean nothing (sigma 4.5e-5 to 7.4) and overflow in half precision.
LOGVAR_MIN, LOGVAR_MAX = -20.0, 4.0


@dataclass
class AutoencoderKLUltraOutput(BaseOutput):
    """What one forward pass gives.

    Attributes:
        sample: Reconstruction, (N, 3, H, W), nominally in [-1, 1] (not clamped).
        posterior: q(z | pixels), a diagonal Gaussian in float32 over latents (N, C, h, w).
    """

    sample: Tensor
    posterior: DiagonalGaussianDistribution | None = None

    @property
    def reconstruction(self) -> Tensor:
        """The trainer's word for `sample`."""
        return self.sample


def _under_autocast(x: Tensor) -> bool:
    # The meta device, on which costs are counted, has no autocast to ask about.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _outside_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if _under_autocast(x) else contextlib.nullcontext()


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each position, as in ConvNeXt (Liu et al. 2022,
    https://arxiv.org/abs/2201.03545), which keeps its input's dtype under autocast.

    Maps in channels_last are rows of channels to it. Group normalisation needs the other layout, at a third of its
    speed here and with a copy to and fro on CUDA.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W), in its memory format."""
        with _outside_autocast(x):
            rows = x.permute(0, 2, 3, 1)
            rows = F.layer_norm(rows, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
            maps = rows.permute(0, 3, 1, 2)
            return maps.contiguous() if x.is_contiguous() else maps


class VectorConv2d(nn.Conv2d):
    """A 1x1 convolution of maps of one position, as a matrix product.

    All time goes into reading the weights, and kernels made for convolutions read them several times more slowly than
    those made for matrices.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, 1, 1) to (N, C_out, 1, 1)."""
        # One position lies alike in both memory formats. Only strides tell them apart, and what follows goes by them:
        # the next layer, and DDP, which wants gradients in the strides of their weights.
        if self.weight.stride(-1) == 1:
            return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]
        rows = F.linear(x.flatten(1), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return rows[:, None, None].movedim(-1, 1)


class ResBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))) with both convolutions 3x3; the identity at initialisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class Downsample(nn.Module):
    """Halve height and width: convolution and pixel unshuffle, beside unshuffle and a mean over channel groups.

    Unshuffle and mean are one convolution of stride 2 with a constant kernel: products with zeros cost less than going
    over the map, in an order that suits no memory format, three times on the way there and three times back.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels // 4, 3, padding=1)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H/2, W/2)."""
        unshuffled = torch.eye(4 * self.conv.in_channels, dtype=x.dtype, device=x.device)
        mean = unshuffled.unflatten(0, (self.out_channels, -1)).mean(dim=1).unflatten(1, (-1, 2, 2))
        return F.pixel_unshuffle(self.conv(x), 2) + F.conv2d(x, mean, stride=2)


class Upsample(nn.Module):
    """Double height and width: convolution and pixel shuffle, beside channel repetition and shuffle.

    Both branches are one convolution: the repetition is added to the middle of the kernel, and not to the maps.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)
        self.repeats = 4 * out_channels // in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, 2H, 2W)."""
        kernel, bias = self.conv.weight, self.conv.bias
        repetition = torch.eye(self.conv.in_channels, dtype=kernel.dtype, device=kernel.device)
        kernel = kernel + F.pad(repetition.repeat_interleave(self.repeats, dim=0)[..., None, None], (1, 1, 1, 1))
        # A shuffle takes four neighbouring channels apart, number by number. With the filters in another order it moves
        # all channels of a position at once, as they lie in channels_last.
        kernel, bias = (each.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1) for each in (kernel, bias))
        rows = F.conv2d(x, kernel, bias, padding=1).permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
        maps = rows.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return maps.contiguous() if x.is_contiguous() else maps


class Encoder(nn.Module):
    """Pixels (N, 3, H, W) to what the linear path's moments lack, (N, 2 x latent channels, h, w).

    With `zero_start` the last convolution is zero, so that the linear path alone speaks before the first step.
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
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResBlock(width) for _ in range(count))) for width, count in zip(channels, layers)
        )
        self.downsamples = nn.ModuleList(Downsample(a, b) for a, b in zip(channels[:-1], channels[1:]))
        self.norm_out = ChannelNorm(channels[-1])
        if vector_map_size is None:
            self.squeeze = None
            self.moments = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)
        else:
            self.squeeze = nn.Conv2d(channels[-1], vector_width, 1)
            self.moments = VectorConv2d(vector_width * vector_map_size**2, 2 * latent_channels)
        self.vector_map_size = vector_map_size
        if zero_start:
            nn.init.zeros_(self.moments.weight)
            nn.init.zeros_(self.moments.bias)
        self.gradient_checkpointing = False

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        h = self.conv_in(F.pixel_unshuffle(pixels, self.patch_size))
        for index, stage in enumerate(self.stages):
            if index > 0:
                h = self.downsamples[index - 1](h)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(stage, h)
            else:
                h = stage(h)
        h = F.silu(self.norm_out(h))
        if self.squeeze is not None:
            h = F.silu(self.squeeze(h))
            h = F.pixel_unshuffle(h, self.vector_map_size)
        return self.moments(h)


class Decoder(nn.Module):
    """Latents and their linear image to what the linear image lacks, (N, 3, H, W).

    The linear image enters every stage that is not finer than it, folded to that stage's resolution (pixel unshuffle)
    and projected by a 1x1 convolution: the stage that sharpens an eye sees the blurred eye. A fold of 0 means none.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        layers: tuple[int, ...],
        patch_size: int,
        latent_channels: int,
        vector_map_size: int | None,
        pca_folds: tuple[int, ...],
        zero_start: bool,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.vector_map_size = vector_map_size
        deepest = channels[-1]
        if vector_map_size is None:
            self.spread = None
            self.conv_in = nn.Conv2d(latent_channels, deepest, 3, padding=1)
        else:
            self.spread = VectorConv2d(latent_channels, deepest // 2 * vector_map_size**2)
            self.conv_in = nn.Conv2d(deepest // 2, deepest, 3, padding=1)
        # Stage i works at 1 / (patch_size x 2^i) of the image; the modules are listed from fine to coarse.
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResBlock(width) for _ in range(count))) for width, count in zip(channels, layers)
        )
        self.upsamples = nn.ModuleList(Upsample(b, a) for a, b in zip(channels[:-1], channels[1:]))
        self.pca_folds = pca_folds
        self.pca_projections = nn.ModuleList(
            nn.Conv2d(3 * fold**2, width, 1) if fold else nn.Identity() for width, fold in zip(channels, pca_folds)
        )
        self.norm_out = ChannelNorm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3 * patch_size**2, 3, padding=1)
        if zero_start:
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)
        self.gradient_checkpointing = False

    def forward(self, latents: Tensor, pca_image: Tensor | None) -> Tensor:
        """See the class."""
        h = latents
        if self.spread is not None:
            h = F.silu(F.pixel_shuffle(self.spread(h), self.vector_map_size))
        h = self.conv_in(h)
        for index in reversed(range(len(self.stages))):
            if self.pca_folds[index]:
                folded = F.pixel_unshuffle(pca_image, self.pca_folds[index]).to(h.dtype)
                h = h + self.pca_projections[index](folded)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(self.stages[index], h)
            else:
                h = self.stages[index](h)
            if index > 0:
                h = self.upsamples[index - 1](h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size)


class PCABranch(nn.Module):
    """Patches of a small image -> whitened principal components -> patches of a larger small image.

    Both directions are affine maps of a patch's values, so 1x1 convolutions over pixel-unshuffled pixels. The
    `vector` layout has one patch, the whole image. They run outside autocast: 0.13 GFLOP is too little to save, and
    whitening divides by standard deviations that bfloat16 would blur.
    """

    def __init__(self, latent_channels: int, latent_size: int, encode_patch: int, decode_patch: int) -> None:
        super().__init__()
        self.encode_patch = encode_patch
        self.decode_patch = decode_patch
        convolution = VectorConv2d if latent_size == 1 else functools.partial(nn.Conv2d, kernel_size=1)
        self.to_latents = convolution(3 * encode_patch**2, latent_channels)
        self.to_pixels = convolution(latent_channels, 3 * decode_patch**2)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def encode(self, image: Tensor) -> Tensor:
        """(N, 3, h x encode_patch, w x encode_patch) in [-1, 1] to (N, C, h, w) whitened coefficients."""
        with _outside_autocast(image):
            folded = F.pixel_unshuffle(image.to(self.to_latents.weight.dtype), self.encode_patch)
            return self.to_latents(folded)

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) latents to the linear image (N, 3, h x decode_patch, w x decode_patch)."""
        with _outside_autocast(latents):
            return F.pixel_shuffle(self.to_pixels(latents.to(self.to_pixels.weight.dtype)), self.decode_patch)


class AutoencoderKLUltra(ModelMixin, AutoencoderMixin, ConfigMixin):
    """A variational autoencoder with a linear path (principal components) beside its convolutions.

    The interface is that of diffusers' `AutoencoderKL`. Args name the keys of `config.json`:

    Args:
        sample_size: Side of the square images it is trained on, pixels.
        latent_dim: What the latent is said to hold; checked against latent_channels x latent_size^2.
        latent_layout: "vector" (one position; fixed image size) or "spatial" (a map; any multiple of the
            downsampling factor).
        latent_channels: Channels of the latent.
        latent_size: Side of the latent map at `sample_size`; 1 for "vector".
        patch_size: Pixels folded into channels before the first convolution, one side.
        encoder_block_out_channels, encoder_layers_per_block: Width and residual blocks of each encoder stage, fine to coarse; stage i
            works at sample_size / (patch_size x 2^i).
        decoder_block_out_channels, decoder_layers_per_block: The same for the decoder, also listed from fine to coarse.
        vector_width: "vector" only: channels of the coarsest map before it is flattened into the moments.
        pca_size: Side of the image that the linear path reads, pixels; None for no linear path.
        pca_decode_size: Side of the image that the linear path paints, pixels; ignored without a linear path.
        logvar_init: Posterior log-variance before training (until the linear path's fit chooses one for each
            channel).
        scaling_factor, shift_factor: (latents - shift_factor) x scaling_factor has mean 0 and variance 1 over the
            validation images. Measured after training; 1 and 0 say "not measured".
        latents_mean, latents_std: The same for each channel, measured after training; None before.

    Raises:
        ValueError: The shape does not hold `latent_dim`, or sizes do not divide; with the arithmetic.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock"]
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
        self._check(**{name: self.config[name] for name in self.config if not name.startswith("_")})
        # How many pixels share a position of the latent map / of the coarsest feature map, one side.
        self.downsampling = sample_size // latent_size
        coarsest = sample_size // (patch_size * 2 ** (len(encoder_block_out_channels) - 1))
        vector_map_size = coarsest if latent_layout == "vector" else None
        self.shrink_factor = sample_size // pca_size if pca_size else None
        self.enlarge_factor = sample_size // pca_decode_size if pca_size else None

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
        folds = tuple(stride // self.enlarge_factor if pca_size else 0 for stride in strides)
        self.decoder = Decoder(
            tuple(decoder_block_out_channels),
            tuple(decoder_layers_per_block),
            patch_size,
            latent_channels,
            vector_map_size,
            pca_folds=folds,
            zero_start=pca_size is not None,
        )
        self.pca_branch = None
        if pca_size:
            self.pca_branch = PCABranch(
                latent_channels, latent_size, pca_size // latent_size, pca_decode_size // latent_size
            )
        self.logvar_bias = nn.Parameter(torch.full((latent_channels,), float(logvar_init)))

        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `ModelMixin.from_pretrained`; reconstructions are bit-equal to those of the saved model.

        Loading maps the file into memory, where a tensor begins at any multiple of 8 bytes, and CPU kernels sum in
        another order there (1e-6 in the image). A copy lies at torch's own alignment and outlives the file.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return loaded

    @staticmethod
    def _check(
        sample_size: int,
        latent_dim: int,
        latent_layout: str,
        latent_channels: int,
        latent_size: int,
        patch_size: int,
        encoder_block_out_channels: tuple[int, ...],
        encoder_layers_per_block: tuple[int, ...],
        decoder_block_out_channels: tuple[int, ...],
        decoder_layers_per_block: tuple[int, ...],
        vector_width: int,
        pca_size: int | None,
        pca_decode_size: int,
        **_others: object,
    ) -> None:
        """Refuse a shape that cannot be, with the arithmetic and the remedy."""
        sizes = {
            "sample_size": sample_size,
            "latent_channels": latent_channels,
            "latent_size": latent_size,
            "patch_size": patch_size,
            "vector_width": vector_width,
            "encoder_block_out_channels": encoder_block_out_channels,
            "decoder_block_out_channels": decoder_block_out_channels,
        }
        if pca_size is not None:
            sizes |= {"pca_size": pca_size, "pca_decode_size": pca_decode_size}
        for name, value in sizes.items():
            values = value if name.endswith("block_out_channels") else [value]
            if not values or not all(type(number) is int and number >= 1 for number in values):
                raise ValueError(f"{name} is {value!r}: whole numbers from 1 up are needed.")
        held = latent_channels * latent_size**2
        shape = f"{latent_channels} x {latent_size} x {latent_size} = {held}"
        if held != latent_dim:
            raise ValueError(
                f"latent_channels x latent_size x latent_size = {shape}, but latent_dim is {latent_dim}: "
                "change one of them so that they agree."
            )
        if latent_layout not in ("vector", "spatial"):
            raise ValueError(f"latent_layout is {latent_layout!r}: use 'vector' or 'spatial'.")
        if (latent_layout == "vector") != (latent_size == 1):
            raise ValueError(
                f"latent_layout {latent_layout!r} with latent_size {latent_size}: 'vector' means latent_size 1, "
                "'spatial' means at least 2."
            )
        for side in ("encoder", "decoder"):
            widths = encoder_block_out_channels if side == "encoder" else decoder_block_out_channels
            layers = encoder_layers_per_block if side == "encoder" else decoder_layers_per_block
            if len(widths) != len(layers) or len(widths) != len(encoder_block_out_channels):
                raise ValueError(
                    f"{side}_block_out_channels {tuple(widths)} and {side}_layers_per_block {tuple(layers)} must have one entry for each "
                    f"of the {len(encoder_block_out_channels)} stages."
                )
            for width in widths:
                if width % 4:  # of a pixel shuffle by 2
                    raise ValueError(f"{side}_block_out_channels: {width} is not a multiple of 4: change the width.")
            for fine, coarse in zip(widths[:-1], widths[1:]):
                if (4 * fine) % coarse:
                    raise ValueError(
                        f"{side}_block_out_channels: the shortcut between {fine} and {coarse} needs 4 x {fine} = {4 * fine} to "
                        f"be a multiple of {coarse}."
                    )
        stride = patch_size * 2 ** (len(encoder_block_out_channels) - 1)
        if sample_size % stride:
            raise ValueError(
                f"sample_size {sample_size} is not a multiple of patch_size x 2^(stages - 1) = {patch_size} x "
                f"{2 ** (len(encoder_block_out_channels) - 1)} = {stride}: change one of them."
            )
        if latent_layout == "spatial" and sample_size // stride != latent_size:
            raise ValueError(
                f"the coarsest stage is sample_size / (patch_size x 2^(stages - 1)) = {sample_size} / {stride} = "
                f"{sample_size // stride} positions wide, but latent_size is {latent_size}: change the number of "
                "stages, patch_size or latent_size."
            )
        if pca_size is not None:
            for name, size in (("pca_size", pca_size), ("pca_decode_size", pca_decode_size)):
                if sample_size % size or size % latent_size:
                    raise ValueError(
                        f"{name} {size} must divide sample_size {sample_size} and be a multiple of latent_size "
                        f"{latent_size}."
                    )
            factor = sample_size // pca_decode_size
            for index in range(len(decoder_block_out_channels)):
                stride = patch_size * 2**index
                if stride > factor and stride % factor:
                    raise ValueError(
                        f"the linear image is sample_size / pca_decode_size = {sample_size} / {pca_decode_size} "
                        f"= {factor} times smaller than the image, and decoder stage {index} patch_size x 2^{index} = "
                        f"{stride} times, which is not a multiple of {factor}: change pca_decode_size or patch_size."
                    )
            dimensions = 3 * (pca_size // latent_size) ** 2
            if latent_channels > dimensions:
                raise ValueError(
                    f"a patch of the linear path has 3 x {pca_size // latent_size}^2 = {dimensions} values, fewer "
                    f"than latent_channels {latent_channels}: raise pca_size."
                )

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """As in diffusers, without a warning about the key that lets `AutoModel` find this class."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    # ------------------------------------------------------------------ the linear path's image

    def shrink(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) to the linear path's size by exact area averages, in the linear path's dtype."""
        return F.avg_pool2d(pixels.to(self.pca_branch.to_latents.weight.dtype), self.shrink_factor)

    def enlarge(self, pca_image: Tensor) -> Tensor:
        """The linear image at the image's size; bicubic (0.25 dB above bilinear on faces).

        As two matrix products: torch's own kernel takes five times as long, and its gradient is a sum in no fixed order
        on CUDA.
        """
        if self.enlarge_factor == 1:
            return pca_image
        with _outside_autocast(pca_image):
            rows, columns = (_bicubic(side, self.enlarge_factor, pca_image) for side in pca_image.shape[-2:])
            return rows @ pca_image @ columns.T

    # ------------------------------------------------------------------ encode

    def _posterior_parameters(self, pixels: Tensor) -> Tensor:
        """One tile, or the whole image: (N, 3, H, W) to mean and log-variance (N, 2C, h, w), one dtype.

        Float32 under autocast.
        """
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        if _under_autocast(pixels):  # the loss wants float32; a half-precision model stays half
            mean, logvar = mean.float(), logvar.float()
        if self.pca_branch is not None:
            mean = mean + self.pca_branch.encode(self.shrink(pixels)).to(mean.dtype)
        logvar = logvar + self.logvar_bias.to(logvar.dtype)[:, None, None]
        return torch.cat([mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)], dim=1)

    def _encode(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(pixels.shape)}: (N, 3, height, width) is needed.")
        height, width = pixels.shape[-2:]
        size, factor = self.config.sample_size, self.downsampling
        if self.config.latent_layout == "vector":
            if (height, width) != (size, size):
                raise ValueError(
                    f"images of {height}x{width} pixels: the vector layout takes {size}x{size} only; resize them, or "
                    "train a spatial layout."
                )
        elif height % factor or width % factor:
            raise ValueError(
                f"images of {height}x{width} pixels: sides must be multiples of {factor}; resize or pad them."
            )
        if self.use_tiling and max(height, width) > self.tile_sample_min_size:
            return self._tiled(
                pixels, self._posterior_parameters, self.tile_sample_min_size, unit=factor, scale=1 / factor
            )
        return self._posterior_parameters(pixels)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images (N, 3, H, W) in [-1, 1] to q(z | x).

        Args:
            x: The images.
            return_dict: False for a plain tuple.

        Returns:
            `latent_dist`, a diagonal Gaussian over (N, C, h, w); float32 under autocast.

        Raises:
            ValueError: The image size does not suit the layout.
        """
        if self.use_slicing and x.shape[0] > 1:
            moments = torch.cat([self._encode(part) for part in x.split(1)])
        else:
            moments = self._encode(x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    # ------------------------------------------------------------------ decode

    def _pixels(self, latents: Tensor) -> Tensor:
        """One tile, or the whole latent: (N, C, h, w) to (N, 3, H, W)."""
        if self.pca_branch is None:
            return self.decoder(latents, None)
        pca_image = self.pca_branch.decode(latents)
        return self.decoder(latents, pca_image) + self.enlarge(pca_image)

    def _decode(self, latents: Tensor) -> Tensor:
        channels = self.config.latent_channels
        positions = (1, 1) if self.config.latent_layout == "vector" else tuple(latents.shape[2:])
        if latents.ndim != 4 or tuple(latents.shape[1:]) != (channels, *positions):
            wanted = "1, 1" if self.config.latent_layout == "vector" else "height, width"
            raise ValueError(f"latents of shape {tuple(latents.shape)}: (N, {channels}, {wanted}) is needed.")
        tile = self.tile_sample_min_size // self.downsampling
        if self.use_tiling and max(latents.shape[-2:]) > tile:
            return self._tiled(latents, self._pixels, tile, unit=1, scale=self.downsampling)
        return self._pixels(latents)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (N, C, h, w) to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Args:
            z: Latents as `encode` gives them (not multiplied by `scaling_factor`).
            return_dict: False for a plain tuple.
            generator: Unused; diffusers' pipelines pass it.

        Raises:
            ValueError: The latents' shape does not suit the layout.
        """
        if self.use_slicing and z.shape[0] > 1:
            sample = torch.cat([self._decode(part) for part in z.split(1)])
        else:
            sample = self._decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    # ------------------------------------------------------------------ both

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> AutoencoderKLUltraOutput | tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruct images.

        Args:
            sample: (N, 3, H, W) in [-1, 1].
            sample_posterior: Decode a draw from the posterior rather than its mean.
            return_dict: False for a plain tuple (reconstruction, posterior).
            generator: Source of the draw.
            noise: Standard normal numbers (N, C, h, w) to use for the draw; implies `sample_posterior`. The trainer
                passes them, so that a step does not depend on how its batch is cut into pieces.
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
            tile_sample_min_size: Side of a tile in pixels, a multiple of the downsampling factor; default the size
                the model was trained on.
            tile_overlap_factor: Share of a tile that overlaps the next, in [0, 0.5].

        Raises:
            NotImplementedError: The vector layout, where each latent number describes the whole image.
            ValueError: The tile's size does not fit.
        """
        if self.config.latent_layout == "vector":
            raise NotImplementedError(
                "tiling needs a latent with positions, but each number of the vector layout describes the whole image; "
                "use slicing (enable_slicing) to save memory, or train a spatial layout."
            )
        size = self.tile_sample_min_size if tile_sample_min_size is None else tile_sample_min_size
        if size < self.downsampling or size % self.downsampling:
            raise ValueError(f"tile_sample_min_size {size} must be a positive multiple of {self.downsampling}.")
        self.tile_sample_min_size = size
        if tile_overlap_factor is not None:
            if not 0 <= tile_overlap_factor <= 0.5:
                raise ValueError(f"tile_overlap_factor {tile_overlap_factor} must lie in [0, 0.5].")
            self.tile_overlap_factor = tile_overlap_factor
        self.use_tiling = True

    def _tiled(self, x: Tensor, function, tile: int, unit: int, scale: float) -> Tensor:
        """Apply `function` to overlapping tiles of (N, C, H, W) and blend them linearly.

        Args:
            x: Input of any size.
            function: Maps a tile to a tile whose side is `scale` times as large.
            tile: Side of a tile, in positions of `x`.
            unit: Tiles start at multiples of this.
            scale: Side of the output over side of the input.
        """
        overlap = int(tile * self.tile_overlap_factor) // unit * unit
        total, weight_sum = None, None
        for top in _tile_starts(x.shape[-2], tile, overlap):
            for left in _tile_starts(x.shape[-1], tile, overlap):
                out = function(x[..., top : top + tile, left : left + tile])
                if total is None:
                    size = [round(side * scale) for side in x.shape[-2:]]
                    total = out.new_zeros(*out.shape[:2], *size)
                    weight_sum = out.new_zeros(1, 1, *size)
                ramp = max(1, round(overlap * scale))
                rows, columns = (_tile_weight(side, ramp, out) for side in out.shape[-2:])
                weight = rows[:, None] * columns[None, :]
                y0, x0 = round(top * scale), round(left * scale)
                window = (..., slice(y0, y0 + out.shape[-2]), slice(x0, x0 + out.shape[-1]))
                total[window] += out * weight
                weight_sum[window] += weight
        return total / weight_sum


def _bicubic(side: int, factor: int, like: Tensor) -> Tensor:
    """The matrix (factor x side, side) that enlarges one axis as `F.interpolate(mode="bicubic")` does."""
    impulses = torch.eye(side, device=like.device)[None, :, :, None]
    answers = F.interpolate(impulses, scale_factor=(factor, 1), mode="bicubic", align_corners=False)
    return answers[0, :, :, 0].T.to(like.dtype)


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin, so that neighbours overlap by at least `overlap` and the last one ends at the border."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [min(index * (tile - overlap), length - tile) for index in range(count)]


def _tile_weight(side: int, ramp: int, like: Tensor) -> Tensor:
    """Weight of a tile's positions along one axis: rising over `ramp` from each border, 1 between."""
    position = torch.arange(side, device=like.device, dtype=like.dtype)
    return ((torch.minimum(position, side - 1 - position) + 1) / ramp).clamp(max=1)
