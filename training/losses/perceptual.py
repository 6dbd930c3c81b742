"""Frozen feature networks (trunks) for the two perceptual loss terms, LPIPS and the feature distance.

`PerceptualTrunk.features` runs the network once per image, and `distances` reads both terms from these features. The
networks are the three of LPIPS v0.1 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric") and two of shift-tolerant LPIPS (Ghildyal and Liu 2022, "Shift-tolerant Perceptual Similarity Metric"), whose
weights come with a pip package. Distances of different networks cannot be compared with each other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.losses.perceptual_weights import load_weights as load_trained_weights

# Mean and standard deviation of ImageNet's channels for images in [0, 1]. For images in [-1, 1] they become
# 2 mean - 1 and 2 std, which are exactly the constants of LPIPS's input scaling.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Added inside the root of LPIPS's norm: the derivative of sqrt at 0 is infinite, and an epsilon outside the root leaves
# NaN gradients where all channels are 0. Norms of trained networks, flat images included, are above 0.03 (of untrained
# ones less), where this changes nothing in float32.
NORM_EPS = 1e-10


class _Blur(nn.Module):
    """Anti-aliased stride 2: the binomial filter [1 2 1] x [1 2 1] / 16 on maps padded by 2 reflected pixels.

    The filter is the convolution of two 2x2 boxes, so it is two average pools, which need no weights.
    """

    def forward(self, features: Tensor) -> Tensor:
        padded = F.pad(features, (2, 2, 2, 2), mode="reflect")
        return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=2)


def _torchvision_layers(name: str) -> nn.Sequential:
    from torchvision import models  # takes seconds to import, and the st_* networks do without it

    builders = {"vgg16": models.vgg16, "alexnet": models.alexnet, "squeezenet": models.squeezenet1_1}
    return builders[name](weights=None).features


def _st_alexnet_layers(name: str) -> nn.Sequential:
    """AlexNet whose strided layers became dense layers followed by a blur that takes every second pixel."""
    layers = [nn.Conv2d(3, 64, 11, padding=2), _Blur(), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, stride=1), _Blur()]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=1), _Blur()]
    for channels_in, channels_out in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _st_vgg16_layers(name: str) -> nn.Sequential:
    """VGG16 whose 2x2 max pools take every pixel and are followed by a blur that takes every second one."""
    layers: list[nn.Module] = []
    channels_in = 3
    for channels, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers += [nn.MaxPool2d(2, stride=1), _Blur()]
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU(inplace=True)]
            channels_in = channels
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Architecture:
    """What differs between the networks."""

    build: Callable[[str], nn.Sequential]
    feature_layers: tuple[int, ...]  # layers whose output is read: the last ReLU of each stage
    channels: tuple[int, ...]  # of each feature layer
    min_size: int  # smallest image size in pixels for which no feature map becomes empty


ARCHITECTURES = {
    "vgg16": Architecture(_torchvision_layers, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
    "alexnet": Architecture(_torchvision_layers, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
    "squeezenet": Architecture(_torchvision_layers, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512), 17),
    "st_alexnet": Architecture(_st_alexnet_layers, (2, 6, 10, 12, 14), (64, 192, 384, 256, 256), 21),
    "st_vgg16": Architecture(_st_vgg16_layers, (3, 9, 17, 25, 33), (64, 128, 256, 512, 512), 18),
}


class PerceptualTrunk(nn.Module):
    """A frozen feature network with LPIPS heads: always in eval mode, never trained, never saved.

    All weights are non-persistent buffers. So optimizers and DDP find no parameters, `state_dict()` is empty, and a
    checkpoint of a module that holds a network neither contains nor expects its weights.

    Args:
        name: One of "vgg16", "alexnet", "squeezenet", "st_alexnet", "st_vgg16".
        weights_dir: Folder with `<name>_features.safetensors` (torchvision's names, `features.0.weight`, ...), searched
            before torch's hub cache and torchvision's download. The st_* networks do not use it.
        load_weights: False gives random weights and heads, for counting cost (also on the meta device) and tests.

    Attributes:
        name: The network's name.
        min_size: Smallest image size it accepts, in pixels.

    Raises:
        ValueError: Unknown name, missing folder, or weights that cannot be found, read or matched.
    """

    def __init__(self, name: str, weights_dir: str | os.PathLike | None = None, load_weights: bool = True):
        super().__init__()
        if name not in ARCHITECTURES:
            raise ValueError(f"unknown feature network {name!r}: choose one of {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[name]
        self.name = name
        self.min_size = architecture.min_size
        self.feature_layers = architecture.feature_layers
        with torch.device("meta"):  # on the CPU torchvision would initialize 124 M classifier weights of VGG16
            layers = architecture.build(name)
        self.layers = layers[: architecture.feature_layers[-1] + 1]  # nothing reads the output of later layers
        device = torch.get_default_device()
        self.layers.to_empty(device=device)
        if load_weights:
            shapes = {key: tuple(tensor.shape) for key, tensor in self.layers.state_dict().items()}
            weights, heads = load_trained_weights(
                name, shapes, architecture.channels, architecture.feature_layers, weights_dir
            )
            self.layers.load_state_dict(weights)
        else:
            for layer in self.layers.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.reset_parameters()
            heads = [torch.rand(channels) / channels for channels in architecture.channels]
        # Feature vectors are scaled to a mean square of 1, not to unit length: their squares are larger by the channels.
        self.channels = [len(head) for head in heads]
        self.register_buffer("heads", torch.cat([head / len(head) for head in heads]).to(device), persistent=False)
        weights = [1 / (len(heads) * count**1.5) for count in self.channels]
        self.register_buffer("layer_weights", torch.tensor(weights, device=device)[:, None], persistent=False)
        mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        self.register_buffer("shift", 2 * mean - 1, persistent=False)
        # The first layer divides by the standard deviations, which saves a pass over the pixels.
        self.layers[0].weight.data /= (2 * std).to(device)
        for module in self.layers.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, key)
                module.register_buffer(key, parameter.detach(), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> PerceptualTrunk:
        """Stays in eval mode, whatever `mode` is."""
        return super().train(False)

    def check_size(self, size: int, key: str) -> None:
        """Check that images or crops of a size are large enough.

        Args:
            size: Height and width in pixels.
            key: Configuration key that chose this network, for the message.

        Raises:
            ValueError: They are smaller than `min_size`.
        """
        if size < self.min_size:
            raise ValueError(
                f"{key} {self.name} needs images or crops of at least {self.min_size} pixels, got {size}: use larger "
                "ones, or another network."
            )

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Activations after the last ReLU of each stage, with gradient to `pixels`.

        The convolutions follow the surrounding autocast; their memory format is that of `pixels`.

        Args:
            pixels: (N, 3, H, W), in [-1, 1], H and W at least `min_size`, a floating-point dtype.

        Returns:
            One tensor (N, channels, h, w) per stage: 7 for squeezenet, 5 for the others.

        Raises:
            ValueError: Wrong number of axes or channels, integer pixels, or an image smaller than `min_size`.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"the {self.name} network got {pixels.dtype} pixels of shape {tuple(pixels.shape)}: "
                "give floating-point images (N, 3, H, W) in [-1, 1]"
            )
        if min(pixels.shape[2:]) < self.min_size:
            raise ValueError(
                f"the {self.name} network needs at least {self.min_size} x {self.min_size} pixels and got "
                f"{pixels.shape[2]} x {pixels.shape[3]}: enlarge the image or the perceptual crop, or choose "
                "another network"
            )
        return self.activations(self.subtract_mean(pixels))

    def subtract_mean(self, pixels: Tensor) -> Tensor:
        """Subtract the mean color of ImageNet, the same for all networks.

        Args:
            pixels: (N, 3, H, W), in [-1, 1], a floating-point dtype.

        Returns:
            The same shape and memory format, in the dtype of the surrounding autocast, else float32.
        """
        device = pixels.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        return (pixels.float() - self.shift).to(torch.get_autocast_dtype(device) if autocast else torch.float32)

    def activations(self, pixels: Tensor) -> list[Tensor]:
        """`features` of what `subtract_mean` returned, or of crops of it."""
        activations = pixels
        features = []
        for index, layer in enumerate(self.layers):
            activations = layer(activations)
            if index in self.feature_layers:
                # Safe to keep: the next layer is a pool or a convolution, neither of which works in place.
                features.append(activations)
        return features

    def distances(self, features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the perceptual term and LPIPS of two batches of images from their features.

        Both compare the channel vectors of each position after scaling them to unit length. The perceptual term is the
        mean absolute difference over channels, positions and feature layers: the feature reconstruction loss of Johnson
        et al. 2016 (eq. 2), in L1 form and on unit vectors, so that no layer outweighs another and an image's value does
        not depend on its batch. LPIPS (Zhang et al. 2018, eq. 1) weights the squared differences by the head, as the
        authors' code does, sums over channels, averages over positions and sums over feature layers.

        Computed in the dtype of the features, float16 in float32, and averaged in float32. Gradients are finite where
        features are all 0.

        Args:
            features_a: What `features` returned for images (N, 3, H, W).
            features_b: The same for the other images.

        Returns:
            Perceptual term and LPIPS, (N,) each, float32, at least 0 with trained heads; no unit.
        """
        with full_precision(features_a[0].device):
            pairs = [(unit_variance(a), unit_variance(b)) for a, b in zip(features_a, features_b, strict=True)]
            absolute = [_mean_over_positions(_absolute_difference(a, b).sum(dim=-1)) for a, b in pairs]
            return (torch.stack(absolute) * self.layer_weights).sum(dim=0), self._lpips(pairs)

    def lpips(self, features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> Tensor:
        """LPIPS alone, (N,): see `distances`."""
        with full_precision(features_a[0].device):
            return self._lpips(
                [(unit_variance(a), unit_variance(b)) for a, b in zip(features_a, features_b, strict=True)]
            )

    def _lpips(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        heads = self.heads.to(pairs[-1][0].dtype).split(self.channels)  # one cast; nearly all layers have this dtype
        squared = (
            F.mse_loss(a, b, reduction="none") @ head.to(a.dtype) for (a, b), head in zip(pairs, heads, strict=True)
        )
        return torch.stack([_mean_over_positions(each) for each in squared]).sum(dim=0)


def _mean_over_positions(values: Tensor) -> Tensor:
    """(N, h, w) to (N,), float32."""
    return values.mean(dim=(1, 2), dtype=torch.float32)


def unit_variance(features: Tensor) -> Tensor:
    """Scale the channel vectors of a map (N, C, h, w) to a mean square of 1: (N, h, w, C).

    bfloat16 maps stay bfloat16, which halves their bytes: the gradient of an image is no further from that of float32 than
    with float32 distances of the same features (docs/lab-notes.md). The gradients of the means are
    too small for float16.

    These are the unit vectors times the root of C, and one fused kernel on CUDA. Channels are the last axis, where vectors
    are contiguous in memory, so that gradients stay channels_last.
    """
    channels = features.shape[1]
    if features.dtype == torch.float16:
        features = features.float()
    return F.rms_norm(features.movedim(1, -1), (channels,), eps=NORM_EPS / channels)


def _absolute_difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, in one fused kernel forward and one backward, which `abs` does not have."""
    return F.smooth_l1_loss(a, b, reduction="none", beta=1e-12)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast on `device`; the meta device knows no autocast and needs nothing."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
