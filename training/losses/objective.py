"""The training loss: a sum of named, weighted terms, as pure functions of tensors.

What it is for: 0.4 MSE + 0.2 L1 + 0.2 perceptual + 0.2 LPIPS + beta KL by default, each term raw and weighted
for the log. What it is not for: choosing beta (kl.py), drawing the crops (step.py), loading the trunk
(perceptual.py).

Images are in [-1, 1], so an MSE of 0.01 is 26 dB. All terms are float32 outside autocast; only the trunk's
convolutions follow it. Each term is one number an image, averaged over the images: the mean over equally
large ranks is the value of the global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from training.losses.perceptual import PerceptualTrunk, cache_slices, full_precision

# Tops and lefts, one of each an image, and the side, all in pixels (`random_crops`).
Crop = tuple[Sequence[int], Sequence[int], int]


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the reconstruction terms; KL's weight, beta, moves during training and is no part of this.

    Raises:
        ValueError: A weight that is negative, infinite or NaN.
    """

    mse: float = 0.4
    l1: float = 0.2
    perceptual: float = 0.2
    lpips: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            weight = getattr(self, field.name)
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {field.name} is {weight}: give a finite number, 0 or larger")

    @property
    def needs_trunk(self) -> bool:
        """Whether a term has weight that reads the perceptual trunk."""
        return self.perceptual > 0 or self.lpips > 0


def kl_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)), averaged over an image's latent numbers.

    The closed form of Kingma and Welling 2014 (app. B): (mean^2 + exp logvar - 1 - logvar) / 2 a number.

    The mean, not the sum: its scale does not depend on the latent's size. The bound on the image's likelihood
    (the ELBO, nats per image) has the sum, which is this times the number of latent numbers; so the same beta
    on the sum would weigh 1,024 times more for a latent of 1,024 numbers.

    Args:
        mean: (N, ...), the posterior's mean.
        logvar: The same shape, natural logarithm of its variance.

    Returns:
        (N,), float32 outside autocast, nats per number, at least 0.

    Raises:
        ValueError: The shapes differ.
    """
    if mean.shape != logvar.shape:
        raise ValueError(
            f"the posterior's mean is {tuple(mean.shape)} and its logvar {tuple(logvar.shape)}: give equal shapes"
        )
    with full_precision(mean.device):
        mean, logvar = mean.float(), logvar.float()
        # expm1 keeps the digits that exp(logvar) - 1 loses near the prior.
        return 0.5 * (mean.square() + torch.expm1(logvar) - logvar).flatten(1).mean(dim=1)


def random_crops(pixels_pair: Sequence[Tensor], tops: Sequence[int], lefts: Sequence[int], size: int) -> list[Tensor]:
    """The same square window of image i out of each tensor, at (tops[i], lefts[i]), with gradient.

    Args:
        pixels_pair: Tensors (N, C, H, W) of one shape: the reconstruction and its target.
        tops: N integers on the host (reading a device tensor would wait for the device), in [0, H - size].
        lefts: N integers on the host, in [0, W - size].
        size: Side of the window, in pixels.

    Returns:
        One tensor (N, C, size, size) for each given, in its memory format.

    Raises:
        ValueError: Shapes that differ, a number of positions other than N, or a window that leaves the image.
    """
    shape = pixels_pair[0].shape
    for pixels in pixels_pair:
        if pixels.shape != shape:
            raise ValueError(
                f"cannot crop {tuple(shape)} and {tuple(pixels.shape)} at the same places: give equal shapes"
            )
    number, _, height, width = shape
    if len(tops) != number or len(lefts) != number:
        raise ValueError(
            f"there are {number} images, {len(tops)} tops and {len(lefts)} lefts: give one of each an image"
        )
    corners = [(int(top), int(left)) for top, left in zip(tops, lefts, strict=True)]
    for top, left in corners:
        if size < 1 or not (0 <= top <= height - size and 0 <= left <= width - size):
            raise ValueError(
                f"a crop of {size} pixels at top {top}, left {left} leaves the image of {height} x {width}: "
                "give a crop no larger than the image and positions inside it"
            )
    # split first: its backward is one concatenation, where slicing the batch image by image would make the
    # backward fill a zero tensor of the whole batch for every image. cat keeps channels_last, stack does not.
    crops = []
    for pixels in pixels_pair:
        views = [
            image[..., top : top + size, left : left + size]
            for image, (top, left) in zip(pixels.split(1), corners, strict=True)
        ]
        crops.append(torch.cat(views))
    return crops


def _features(
    trunk: PerceptualTrunk, reconstruction: Tensor, pixels: Tensor, crop: Crop | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Features of the reconstructions, with gradient, and of their targets, without."""
    if crop is not None:
        reconstruction, pixels = random_crops((reconstruction, pixels), *crop)
    with torch.no_grad():
        target_features = trunk.features(pixels)
    return trunk.features(reconstruction), target_features


class _PixelDistances(torch.autograd.Function):
    """Mean squared and mean absolute difference, with their gradient in closed form: a third of the passes over the
    pixels that autograd makes."""

    @staticmethod
    def forward(ctx, reconstruction: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) of both sides to (N,) and (N,), float32."""
        ctx.save_for_backward(reconstruction, pixels)
        squared, absolute = [], []
        for a, b in zip(*cache_slices(reconstruction, pixels)):
            difference = a.float() - b.float()
            absolute.append(difference.abs().mean(dim=(1, 2, 3)))
            squared.append(difference.square_().mean(dim=(1, 2, 3)))
        return torch.cat(squared), torch.cat(absolute)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, squared: Tensor, absolute: Tensor) -> tuple[Tensor, Tensor | None]:
        """2 x difference and its sign, over the numbers of an image."""
        reconstruction, pixels = ctx.saved_tensors
        numbers = reconstruction[0].numel()
        squared, absolute = ((each / numbers)[:, None, None, None] for each in (2 * squared, absolute))
        gradient = torch.empty_like(reconstruction)
        start = 0
        for a, b in zip(*cache_slices(reconstruction, pixels)):
            rows = slice(start, start + len(a))
            start += len(a)
            difference = a.float() - b.float()
            gradient[rows] = torch.addcmul(difference.sign().mul_(absolute[rows]), difference, squared[rows])
        return gradient, -gradient if ctx.needs_input_grad[1] else None


def vae_loss(
    reconstruction: Tensor,
    pixels: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    weights: LossWeights,
    beta: float,
    trunk: PerceptualTrunk | None,
    crop: Crop | None,
    lpips_trunk: PerceptualTrunk | None = None,
    lpips_crop: Crop | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of one batch, and its parts for the log.

    A trunk runs once on the targets without gradient and once on the reconstructions with gradient to them,
    and not at all when both perceptual terms have weight 0.

    Args:
        reconstruction: (N, 3, H, W), about [-1, 1], not clamped; any floating-point dtype.
        pixels: The targets, same shape, in [-1, 1].
        mean: (N, ...), the posterior's mean.
        logvar: The same shape, natural logarithm of its variance.
        weights: Weights of the reconstruction terms.
        beta: Weight of `kl_per_dimension`.
        trunk: May be None when `weights.needs_trunk` is False.
        crop: (tops, lefts, size) of the window of each image that the trunk sees (`random_crops`), or None
            for the whole image. MSE and L1 always read the whole image.
        lpips_trunk: A second network, whose LPIPS is averaged with that of `trunk`.
        lpips_crop: The window that this one sees.

    Returns:
        The total, a float32 scalar with gradient: the mean over images. And detached float32 scalars: raw
        `mse`, `l1`, `perceptual`, `lpips` and `kl` (nats per number); the same under `weighted/` times their
        weight (`kl` times beta); `reconstruction`, the sum of the weighted terms without KL; `total`. Where
        the trunk did not run, `perceptual` and `lpips` are absent, raw and weighted: a 0 in the log would
        look like a perfect score.

    Raises:
        ValueError: Shapes that differ, or a perceptual weight above 0 without a trunk.
    """
    if reconstruction.shape != pixels.shape:
        raise ValueError(
            f"the reconstruction is {tuple(reconstruction.shape)} and its target {tuple(pixels.shape)}: "
            "give equal shapes"
        )
    if weights.needs_trunk and trunk is None:
        raise ValueError(
            f"the weights of perceptual ({weights.perceptual}) and lpips ({weights.lpips}) need a perceptual "
            "trunk and there is none: give one, or set both weights to 0"
        )
    terms: dict[str, Tensor] = {}  # (N,) each
    with full_precision(pixels.device):
        terms["mse"], terms["l1"] = _PixelDistances.apply(reconstruction, pixels)
    if weights.needs_trunk:
        features = _features(trunk, reconstruction, pixels, crop)
        terms["perceptual"], terms["lpips"] = trunk.distances(*features)
        if lpips_trunk is not None:
            second = lpips_trunk.lpips(*_features(lpips_trunk, reconstruction, pixels, lpips_crop))
            terms["lpips"] = (terms["lpips"] + second) / 2

    with full_precision(pixels.device):
        parts = {name: term.mean() for name, term in terms.items()}
        weighted = {name: getattr(weights, name) * value for name, value in parts.items()}
        # A term of weight 0 stays out of the sum: it is logged, but nothing is propagated through it.
        reconstruction_loss = torch.zeros((), device=pixels.device)
        for name, value in weighted.items():
            if getattr(weights, name) > 0:
                reconstruction_loss = reconstruction_loss + value
        parts["kl"] = kl_per_dimension(mean, logvar).mean()
        weighted["kl"] = beta * parts["kl"]
        total = reconstruction_loss + weighted["kl"]
        parts |= {f"weighted/{name}": value for name, value in weighted.items()}
        parts |= {"reconstruction": reconstruction_loss, "total": total}
    return total, {name: value.detach() for name, value in parts.items()}
