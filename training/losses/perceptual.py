"""One frozen image network that serves both perceptual loss terms, LPIPS and the feature distance.

What it is for: `PerceptualTrunk.features` runs the network once per image, and `lpips` and `feature_distance`
both read that one list of activations. The trunks are the three of LPIPS v0.1 (Zhang et al. 2018, "The
Unreasonable Effectiveness of Deep Features as a Perceptual Metric") and two of shift-tolerant LPIPS (Ghildyal
and Liu 2022, "Shift-tolerant Perceptual Similarity Metric"), whose trained weights arrive by pip and so need
no download. What it is not for: weighing the terms (losses.py) or choosing crops (step.py).

Distances of different trunks are different quantities: always say which trunk a figure comes from.
"""

import contextlib
import http.client
import importlib.util
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

# Mean and standard deviation of ImageNet's channels for images in [0, 1]. For images in [-1, 1] they become
# 2 mean - 1 and 2 std, which are exactly the constants of LPIPS's input scaling.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Added inside the root of LPIPS's norm: where all channels are 0 the derivative of sqrt is infinite and an
# epsilon outside the root leaves NaN gradients. The norms of trained trunks, flat images included, are above
# 0.03 (of untrained ones less), where this changes nothing in float32.
NORM_EPS = 1e-10

# Longest silence accepted from the server during a download, in seconds.
DOWNLOAD_TIMEOUT_S = 15.0


class _Blur(nn.Module):
    """Anti-aliased stride 2: the binomial filter [1 2 1] x [1 2 1] / 16 on maps padded by 2 reflected pixels.

    The filter is the convolution of two 2x2 boxes, so it is two average pools, which need no weights.
    """

    def forward(self, features: Tensor) -> Tensor:
        padded = F.pad(features, (2, 2, 2, 2), mode="reflect")
        return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=2)


def _torchvision_layers(name: str) -> nn.Sequential:
    from torchvision import models  # takes seconds to import, and the st_* trunks do without it

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
class _Architecture:
    build: Callable[[str], nn.Sequential]
    feature_layers: tuple[int, ...]  # layers whose output is read: the last ReLU of each stage
    channels: tuple[int, ...]  # of each tap
    min_size: int  # smallest image side, in pixels, for which no map shrinks to nothing
    package: str  # the installed package that carries the linear heads (and for st_* the trunk)
    file: str  # the weight file inside that package
    alternative: str = ""  # the trunk to suggest when the weights cannot be had


ARCHITECTURES: dict[str, _Architecture] = {
    "vgg16": _Architecture(
        _torchvision_layers, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16,
        "lpips", "weights/v0.1/vgg.pth", "st_vgg16",
    ),
    "alexnet": _Architecture(
        _torchvision_layers, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31,
        "lpips", "weights/v0.1/alex.pth", "st_alexnet",
    ),
    "squeezenet": _Architecture(
        _torchvision_layers, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512), 17,
        "lpips", "weights/v0.1/squeeze.pth", "st_alexnet",
    ),
    "st_alexnet": _Architecture(
        _st_alexnet_layers, (2, 6, 10, 12, 14), (64, 192, 384, 256, 256), 21,
        "stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth",
    ),
    "st_vgg16": _Architecture(
        _st_vgg16_layers, (3, 9, 17, 25, 33), (64, 128, 256, 512, 512), 18,
        "stlpips_pytorch", "weights/vST0.0/vgg_shift_tolerant.pth",
    ),
}  # fmt: skip


class PerceptualTrunk(nn.Module):
    """A frozen trunk with LPIPS heads: always in eval mode, never trained, never saved.

    All weights are non-persistent buffers. So optimizers and DDP find no parameter, `state_dict()` is empty,
    and a checkpoint of a module that holds a trunk neither contains nor asks for its weights.

    Args:
        name: One of "vgg16", "alexnet", "squeezenet", "st_alexnet", "st_vgg16".
        weights_dir: Folder with `<name>_features.safetensors` (torchvision's names, `features.0.weight`,
            ...), looked at before torch's hub cache and torchvision's download. The st_* trunks do not use
            it.
        load_weights: False gives random weights and heads, for counting cost (also on the meta device) and
            tests.

    Attributes:
        name: The trunk's name.
        min_size: Smallest image side it accepts, in pixels.

    Raises:
        ValueError: Unknown name, missing folder, or weights that cannot be found, read or matched.
    """

    def __init__(self, name: str, weights_dir: str | os.PathLike | None = None, load_weights: bool = True):
        super().__init__()
        if name not in ARCHITECTURES:
            raise ValueError(f"unknown perceptual trunk {name!r}: choose one of {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[name]
        self.name = name
        self.min_size = architecture.min_size
        self.feature_layers = architecture.feature_layers
        with torch.device("meta"):  # on the CPU torchvision would fill 124 M classifier weights of VGG16
            layers = architecture.build(name)
        self.layers = layers[: architecture.feature_layers[-1] + 1]  # nothing reads what comes after the last tap
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1):
                layer.__class__ = _StridedConv2d  # the same layer with another backward pass
        device = torch.get_default_device()
        self.layers.to_empty(device=device)
        if load_weights:
            shapes = {key: tensor.shape for key, tensor in self.layers.state_dict().items()}
            weights, heads = _load_weights(name, shapes, weights_dir)
            self.layers.load_state_dict(weights)
        else:
            for layer in self.layers.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.reset_parameters()
            heads = [torch.rand(channels) / channels for channels in architecture.channels]
        for index, head in enumerate(heads):
            self.register_buffer(f"head{index}", head.to(device), persistent=False)
        mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        self.register_buffer("shift", 2 * mean - 1, persistent=False)
        # The first layer divides by the standard deviations, so that no pass over the pixels does.
        self.layers[0].weight.data /= (2 * std).to(device)
        for module in self.layers.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, key)
                module.register_buffer(key, parameter.detach(), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualTrunk":
        """Stays in eval mode, whatever `mode` says: the trunk is an instrument, not a student."""
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
            One tensor (N, channels, h, w) a stage: 7 for squeezenet, 5 for the others.

        Raises:
            ValueError: Wrong number of axes or channels, integer pixels, or an image smaller than `min_size`.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"the {self.name} trunk got {pixels.dtype} pixels of shape {tuple(pixels.shape)}: "
                "give floating-point images (N, 3, H, W) in [-1, 1]"
            )
        if min(pixels.shape[2:]) < self.min_size:
            raise ValueError(
                f"the {self.name} trunk needs at least {self.min_size} x {self.min_size} pixels and got "
                f"{pixels.shape[2]} x {pixels.shape[3]}: enlarge the image or the perceptual crop, or choose "
                "another trunk"
            )
        activations = pixels.float() - self.shift
        features = []
        for index, layer in enumerate(self.layers):
            activations = layer(activations)
            if index in self.feature_layers:
                # Safe to keep: what follows a tap is a pool or a convolution, which do not work in place.
                features.append(activations)
        return features

    def lpips(self, features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> Tensor:
        """LPIPS (Zhang et al. 2018, eq. 1): the learned distance of two images from their trunk features.

        At every position the channel vector is scaled to unit length; the squared differences are weighted by
        the head, summed over channels, averaged over positions and summed over taps. As in the authors' code,
        the head weighs the squares. Computed in float32 outside autocast. Gradients are finite where features
        are all 0.

        Args:
            features_a: What `features` returned for images (N, 3, H, W).
            features_b: The same for the other images.

        Returns:
            (N,), float32, at least 0 with trained heads; no unit.
        """
        return self.distances(features_a, features_b)[1]

    def feature_distance(self, features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> Tensor:
        """The perceptual term: mean absolute difference of unit-length features, mean over channels and taps.

        The feature reconstruction loss of Johnson et al. 2016 (eq. 2), in L1 form and on the channel vectors of
        unit length that LPIPS reads too. So it has no unit, no tap outweighs another, and an image's value does
        not depend on its batch. It is about as large as the L1 of the pixels (0.03 to 0.06 on blurred faces);
        relative errors of raw features, about 1 there, would make up most of the loss and cost PSNR.

        Args and result as for `lpips`.
        """
        return self.distances(features_a, features_b)[0]

    def distances(self, features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`feature_distance` and `lpips`, (N,) each, from one pass over the features."""
        heads = [getattr(self, f"head{index}") for index in range(len(self.feature_layers))]
        with full_precision(features_a[0].device):
            pairs = [
                _TapDistances.apply(tap_a, tap_b, head.float())
                for tap_a, tap_b, head in zip(features_a, features_b, heads, strict=True)
            ]
            plain, learned = zip(*pairs)
            return torch.stack(plain).mean(dim=0), torch.stack(learned).sum(dim=0)


class _StridedConv2d(nn.Conv2d):
    """A frozen convolution with a stride, whose gradient to the pixels is a dense convolution and a pixel shuffle.

    Kernels made for strided gradients onto three channels take two to four times as long on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, h, w)."""
        return _StridedConvolution.apply(x, self.weight, self.bias, self.stride[0], self.padding[0])


class _StridedConvolution(torch.autograd.Function):
    """What `_StridedConv2d` computes; weight and bias get no gradient, being a trunk's."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.stride, ctx.padding, ctx.sizes, ctx.dtype = stride, padding, x.shape[2:], x.dtype
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,), stride = ctx.saved_tensors, ctx.stride
        # The kernel on pixels folded into channels, stride x stride at a time: filled up with zeros to whole folds.
        missing = -weight.shape[-1] % stride
        kernel = F.pad(weight, (0, missing, 0, missing)).unflatten(3, (-1, stride)).unflatten(2, (-1, stride))
        kernel = kernel.permute(0, 1, 3, 5, 2, 4).flatten(1, 3).to(gradient.dtype)
        spread = F.pixel_shuffle(F.conv_transpose2d(gradient, kernel), stride)
        # It begins with the padding, and ends where the last window does.
        ends = [size + ctx.padding - reached for size, reached in zip(ctx.sizes, spread.shape[2:])]
        return F.pad(spread, (-ctx.padding, ends[1], -ctx.padding, ends[0])).to(ctx.dtype), None, None, None, None


class _TapDistances(torch.autograd.Function):
    """Both distances of one tap, with their gradient in closed form.

    Autograd would keep, and go over, a dozen float32 copies of maps that are as large as the image's largest
    activations. Here the maps are kept in the dtype that they came in, and what is float32 lives for one slice of the
    batch.
    """

    @staticmethod
    def forward(ctx, tap_a: Tensor, tap_b: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (N, C, h, w) of both sides and the head (C,) to (N,) and (N,), float32."""
        plain, learned, scales = [], [], []
        for a, b in zip(*cache_slices(tap_a, tap_b)):
            scales.append((_to_unit_length(a), _to_unit_length(b)))
            difference = (a * scales[-1][0]).sub_(b * scales[-1][1]).permute(0, 2, 3, 1)
            learned.append(difference.square().flatten(0, 2).mv(head).unflatten(0, (len(a), -1)).mean(dim=1))
            plain.append(difference.abs_().flatten(1).mean(dim=1))
        scale_a, scale_b = (torch.cat(scale) for scale in zip(*scales))
        ctx.save_for_backward(tap_a, tap_b, scale_a, scale_b, head)
        return torch.cat(plain), torch.cat(learned)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, plain: Tensor, learned: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The chain rule through x / |x|, whose derivative takes the part along x out of a gradient."""
        tap_a, tap_b, scales_a, scales_b, head = ctx.saved_tensors
        positions = tap_a.shape[2] * tap_a.shape[3]
        gradients = [
            torch.empty_like(tap) if wanted else None for tap, wanted in zip((tap_a, tap_b), ctx.needs_input_grad)
        ]
        start = 0
        for a, b in zip(*cache_slices(tap_a, tap_b)):
            rows = slice(start, start + len(a))
            start += len(a)
            scale_a, scale_b = scales_a[rows], scales_b[rows]
            unit_a, unit_b = a * scale_a, b * scale_b
            difference = unit_a - unit_b
            slope = difference.sign().mul_((plain[rows] / (positions * tap_a.shape[1]))[:, None, None, None])
            slope.addcmul_(difference, (2 / positions * learned[rows, None] * head)[:, :, None, None])
            if gradients[1] is not None:
                gradients[1][rows] = _across(slope, unit_b).mul_(-scale_b)
            if gradients[0] is not None:
                gradients[0][rows] = _across(slope, unit_a).mul_(scale_a)
        return (*gradients, None)


def _to_unit_length(tap: Tensor) -> Tensor:
    """What scales (N, C, h, w) to length 1 along C: (N, 1, h, w), float32."""
    length = torch.linalg.vector_norm(tap, dim=1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(length.square() + NORM_EPS)


def _across(slope: Tensor, unit: Tensor) -> Tensor:
    """`slope` without its part along `unit`, whose length along axis 1 is 1."""
    along = (slope * unit).sum(dim=1, keepdim=True)
    return torch.addcmul(slope, unit, along, value=-1)


def cache_slices(*maps: Tensor) -> list[Iterable[Tensor]]:
    """Maps (N, C, h, w) whole, for few launches; on a CPU image by image and in float32: a slice stays in its cache.

    Fake tensors say that they are on a CPU, and plan the memory of a GPU.
    """
    if maps[0].device.type != "cpu" or isinstance(maps[0], FakeTensor):
        return [[each] for each in maps]
    return [(image.float() for image in each.split(1)) for each in maps]


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast on `device`; the meta device knows no autocast and needs nothing."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _load_weights(
    name: str, shapes: Mapping[str, torch.Size], weights_dir: str | os.PathLike | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Trunk weights under the keys of `shapes`, and one head (channels,) a tap."""
    architecture = ARCHITECTURES[name]
    path = _package_file(architecture.package, architecture.file)
    state = _read(path)
    channels = architecture.channels
    head_shapes = {f"lin{tap}.model.1.weight": (1, channels[tap], 1, 1) for tap in range(len(channels))}
    _check(state, head_shapes, "lin", path)
    heads = [state[key].flatten() for key in head_shapes]
    if architecture.package == "lpips":
        state, path = _torchvision_state(name, weights_dir)
        prefix, file_keys = "features.", {key: f"features.{key}" for key in shapes}
    else:
        # The file numbers the layers straight through, in one slice a tap; the fixed filters in it ("filt")
        # are the constant of `_Blur`.
        state = {key: tensor for key, tensor in state.items() if not key.endswith(".filt")}
        prefix, file_keys = "net.", {}
        for key in shapes:
            slice_number = 1 + sum(int(key.split(".")[0]) > tap for tap in architecture.feature_layers)
            file_keys[key] = f"net.slice{slice_number}.{key}"
    _check(state, {file_keys[key]: tuple(shape) for key, shape in shapes.items()}, prefix, path)
    return {key: state[file_keys[key]] for key in shapes}, heads


def _torchvision_state(name: str, weights_dir: str | os.PathLike | None) -> tuple[dict[str, Tensor], Path]:
    """The first of: the user's folder, torch's hub cache, torchvision's download (which fills that cache)."""
    file_name = f"{name}_features.safetensors"
    if weights_dir is not None:
        if not Path(weights_dir).is_dir():
            raise ValueError(
                f"loss.trunk_weights is {str(weights_dir)!r}, which is not a folder: "
                f"give the one that holds {file_name}"
            )
        path = Path(weights_dir) / file_name
        if path.exists():
            return _read(path), path

    from torchvision import models  # see _torchvision_layers

    weights = {
        "vgg16": models.VGG16_Weights.IMAGENET1K_V1,
        "alexnet": models.AlexNet_Weights.IMAGENET1K_V1,
        "squeezenet": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
    }[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if path.exists():
        return _read(path), path

    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # the downloader has none and would hang on a dead route
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        folder = "is not set" if weights_dir is None else f"({weights_dir}) has no {file_name}"
        alternative = ARCHITECTURES[name].alternative
        raise ValueError(
            f"no weights for the perceptual trunk {name!r}: loss.trunk_weights {folder}, torch's hub cache "
            f"has no {path}, and downloading {weights.url} failed ({_first_line(error)}); set "
            f"loss.trunk_weights to a folder with {file_name}, or put the file into the cache, or choose the "
            f"trunk {alternative!r}, whose weights come by pip"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
    return state, path


def _package_file(package: str, file: str) -> Path:
    """Path of a package's data file, without importing the package: that is slow, or needs yet others."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    where = f"in {', '.join(folders)}" if folders else "because the package is not installed"
    raise ValueError(f"cannot find {package}/{file} {where}: run `pip install {package.replace('_', '-')}`")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not tensors by name")
        return state
    except Exception as error:  # unreadable files raise anything from EOFError to UnpicklingError
        raise ValueError(
            f"cannot read the weight file {path} ({_first_line(error)}): replace it "
            "(delete it if it is in torch's hub cache, to have it downloaded again)"
        ) from error


def _check(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefix: str, path: Path) -> None:
    """Refuses missing and mis-shaped tensors of `shapes`, and others that start with `prefix`."""
    fault = ""
    for key, shape in shapes.items():
        if key not in state:
            fault = f"has no tensor {key!r} of shape {shape}"
        elif tuple(state[key].shape) != shape:
            fault = f"has {key!r} of shape {tuple(state[key].shape)} where {shape} is needed"
        if fault:
            break
    else:
        surplus = [key for key in state if key.startswith(prefix) and key not in shapes]
        if surplus:
            fault = f"has an unknown tensor {surplus[0]!r}"
    if fault:
        raise ValueError(f"the weight file {path} {fault}: give the file of this network")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
