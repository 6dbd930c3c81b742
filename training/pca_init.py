"""Fits the model's linear path before the first step: principal components of faces, and the way back from them.

What it is for: starting where linear methods end. The first training images give the components (their mirror images
included, without being formed), least squares gives the map back to `pca_decode_size` pixels, and reverse
water-filling gives each channel its first posterior variance. What it is not for: anything after step 0.

Mirror images double the sample at no cost: with x = s + a, s mirror-symmetric and a antisymmetric, the covariance of
{x, mirror(x)} falls apart into those of s and a, each of half the rank, so two half-sized problems replace one.

Moved copies do for small samples what mirror images do: a thousand components of a few thousand faces fit those faces
(half the squared error that other faces have), and a face that is moved, turned or scaled a little is a face.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.autoencoder_kl_ultra import LOGVAR_MIN, AutoencoderKLUltra
from training.data.images import random_affine
from training.losses.objective import kl_per_dimension

logger = logging.getLogger(__name__)

_CHUNK = 128  # images turned to float at once: 0.1 GB at 256 px
_SMALLEST_SHARE = 1e-9  # of the largest variance; components below are rounding errors and are left out
_EXACT_SIDE = 4096  # largest matrix whose eigenvectors are all computed: 20 s on two cores, and the cube of it beyond
_SPARE, _ROUNDS = 200, 6  # of the subspace iteration: spare columns and multiplications


def principal_components(samples: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the second moment of centred samples, largest first.

    Whichever of the n x n and d x d problems is smaller is solved. Its float32 sums of squares know variances to
    about 1e-7 of the largest only, so it merely chooses the span; coordinates within that span keep their digits,
    and the second moment of the coordinates gives axes and variances.

    Args:
        samples: (n, d), centred, float32.
        count: How many are wanted; fewer come back where n or d is smaller or the samples span less.

    Returns:
        Variances (k,) in falling order, all positive, and orthonormal columns (d, k).
    """
    n, d = samples.shape
    if n < d:
        vectors = _largest_eigenvectors(samples @ samples.T, count)
        vectors = torch.linalg.qr(samples.T @ vectors)[0]
    else:
        vectors = _largest_eigenvectors(samples.T @ samples, count)
    coordinates = samples @ vectors
    # Float64, on the CPU because Apple's GPUs have none: k x k only.
    values, rotation = torch.linalg.eigh((coordinates.T @ coordinates).cpu().double() / n)
    values, rotation = values.flip(0), rotation.flip(1)
    keep = values > max(_SMALLEST_SHARE * values[0].item(), torch.finfo(torch.float32).tiny)
    values, rotation = values[keep].to(samples), rotation[:, keep].to(samples)
    return values, vectors @ rotation


def _largest_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Orthonormal eigenvectors (d, k) of the k = min(count, d) largest eigenvalues of a symmetric matrix (d, d).

    Of large matrices by subspace iteration from random columns (Halko, Martinsson and Tropp 2011,
    https://arxiv.org/abs/0909.4061, algorithm 4.4): a tenth of the time, and what it mixes are neighbours in the
    spectrum, whose exchange costs next to no variance.
    """
    side = len(matrix)
    if side <= _EXACT_SIDE or count + _SPARE >= side // 2:
        return torch.linalg.eigh(matrix)[1].flip(1)[:, :count]
    generator = torch.Generator().manual_seed(0)
    span = torch.randn(side, count + _SPARE, generator=generator).to(matrix)
    for _ in range(_ROUNDS):
        span = torch.linalg.qr(matrix @ span)[0]
    rotation = torch.linalg.eigh(span.T @ matrix @ span)[1].flip(1)[:, :count]
    return span @ rotation


def mirror_halves(patches: Tensor) -> tuple[Tensor, Tensor]:
    """What mirroring keeps of patches (n, 3, p, p), and what it turns round, in orthonormal coordinates.

    Returns:
        Rows (n, 3 p ceil(p / 2)) and (n, 3 p floor(p / 2)).
    """
    side = patches.shape[-1]
    left, right = patches[..., : side // 2], patches.flip(-1)[..., : side // 2]
    centre = patches[..., side // 2 : side - side // 2]
    even = torch.cat([(left + right) * 0.5**0.5, centre], dim=-1)
    return even.flatten(1), ((left - right) * 0.5**0.5).flatten(1)


def _whole_patches(halves: Tensor, side: int, sign: int) -> Tensor:
    """Inverse of `mirror_halves` for rows of one half, symmetric (sign 1) or antisymmetric (-1): (n, 3, p, p)."""
    columns = halves.unflatten(1, (3, side, halves.shape[1] // (3 * side)))
    left = columns[..., : side // 2] * 0.5**0.5
    centre = columns[..., side // 2 :] if sign > 0 else columns.new_zeros(*columns.shape[:3], side % 2)
    return torch.cat([left, centre, sign * left.flip(-1)], dim=-1)


def mirrored_components(chunks: Iterable[Tensor], number: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Principal components of patches and their mirror images.

    Args:
        chunks: Patches, (n_i, 3, p, p), held once in all; the numbers n_i sum to `number`.
        number: Of patches.
        count: Components wanted.

    Returns:
        Mean (3p^2,), total variance (), variances of the components (k,) in falling order and the orthonormal
        components (3p^2, k), in the order of `pixel_unshuffle` with factor p: channel, row, column.
    """
    held: list[Tensor] = []
    filled = 0
    for patches in chunks:
        side, parts = patches.shape[-1], mirror_halves(patches)
        held = held or [part.new_empty(number, part.shape[1]) for part in parts]
        for rows, part in zip(held, parts):
            rows[filled : filled + len(part)] = part
        filled += len(patches)
    even = held[0]
    mean = even.mean(dim=0, keepdim=True)  # the mean of patches and mirror images has no antisymmetric half
    even -= mean
    total = sum(part.square().sum() for rows in held for part in rows.split(_CHUNK)) / number
    found_variances, found_vectors = [], []
    for sign, rows in zip((1, -1), held):
        if rows.shape[1] == 0:  # patches of one pixel are their own mirror images
            continue
        part_variances, vectors = principal_components(rows, count)
        found_variances.append(part_variances)
        found_vectors.append(_whole_patches(vectors.T, side, sign).flatten(1).T)
    variances, vectors = torch.cat(found_variances), torch.cat(found_vectors, dim=1)
    variances, order = variances.sort(descending=True)
    # Once more for both together: all of the smaller half may be rounding errors.
    found = min(count, int((variances > _SMALLEST_SHARE * variances[:1]).sum()))
    return _whole_patches(mean, side, 1).flatten(), total, variances[:found], vectors[:, order[:found]]


@torch.no_grad()
def fit_pca_branch(
    model: AutoencoderKLUltra, images: Tensor, noise_fraction: float, copies: int = 0
) -> dict[str, float]:
    """Set the linear path and the first posterior variances from images.

    Args:
        model: With a linear path; changed in place.
        images: (n, 3, sample_size, sample_size), uint8.
        noise_fraction: The posterior's noise may add this share of the squared error that the components leave.
        copies: Moved copies of each image to fit to as well (`training.data.images.move`).

    Returns:
        `kept_fraction` of the variance at `pca_size`, `components` found, and `kl_per_dimension` in nats that the
        fitted posterior has over the images.

    Raises:
        ValueError: No linear path, images of another size or type, or too few or too equal to determine a component.
    """
    path, count, size = model.pca_branch, model.config.latent_channels, model.config.sample_size
    if path is None:
        raise ValueError("the model has no linear path to fit: set model.pca_size, or do not fit it.")
    if tuple(images.shape[1:]) != (3, size, size) or images.dtype != torch.uint8:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}: the linear path is fitted to uint8 (n, 3, {size}, "
            f"{size})."
        )
    device = path.to_latents.weight.device

    # Averages of averages are averages: what both sizes average anyway comes first, and moving costs the less.
    shared = math.gcd(model.shrink_factor, model.enlarge_factor)

    def chunks():
        generator = torch.Generator().manual_seed(0)  # the same copies each time
        for copy in range(1 + copies):
            for part in images.split(_CHUNK):
                pixels = F.avg_pool2d(part.to(device).float() / 127.5 - 1.0, shared)
                yield random_affine(pixels, torch.rand(len(pixels), 5, generator=generator)) if copy else pixels

    def encoded(part: Tensor) -> Tensor:
        return F.avg_pool2d(part, model.shrink_factor // shared)

    def as_rows(maps: Tensor) -> Tensor:
        """(n, c, h, w) to (n h w, c)."""
        return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])

    patch = path.encode_patch
    if len(images) < 2:
        raise ValueError(f"{len(images)} images cannot determine a linear path: give at least 2.")
    cut = (as_rows(F.pixel_unshuffle(encoded(part), patch)).view(-1, 3, patch, patch) for part in chunks())
    patches_each = (size // model.shrink_factor // patch) ** 2
    mean, total, variances, vectors = mirrored_components(cut, len(images) * (1 + copies) * patches_each, count)
    found = len(variances)
    if not found:
        raise ValueError(f"{len(images)} images without differences cannot determine a linear path: give others.")
    deviations = variances.sqrt()
    path.to_latents.weight.zero_()
    path.to_latents.bias.zero_()
    path.to_latents.weight[:found] = (vectors / deviations).T[:, :, None, None]
    path.to_latents.bias[:found] = -(mean @ (vectors / deviations))

    # Least squares from whitened, centred coefficients: their second moment over images and mirror images is the
    # identity, so the normal equations need no solve, and numbers that were not found get a zero column. A component
    # is symmetric or antisymmetric, and so is what it paints: its mirror image is known, and half of it is enough.
    even = (vectors * vectors.view(3, patch, patch, found).flip(2).view_as(vectors)).sum(dim=0) > 0
    painted = path.decode_patch
    width = (painted + 1) // 2
    products = {
        sign: torch.zeros(int((even == (sign > 0)).sum()), 3 * painted * width, device=device) for sign in (1, -1)
    }
    sums, squares, number = 0.0, torch.zeros(count, device=device), 0
    for part in chunks():
        coefficients = as_rows(path.encode(encoded(part)))
        targets = as_rows(F.pixel_unshuffle(F.avg_pool2d(part, model.enlarge_factor // shared), painted))
        targets = targets.view(-1, 3, painted, painted)
        for sign in (1, -1):
            half = (targets + sign * targets.flip(-1))[..., :width].flatten(1) / 2
            products[sign].addmm_(coefficients[:, :found][:, even == (sign > 0)].T, half)
        sums = sums + (targets + targets.flip(-1)).sum(dim=0).flatten() / 2
        squares += coefficients.square().sum(dim=0)
        number += len(targets)
    path.to_pixels.weight.zero_()
    for sign, product in products.items():
        half = (product / number).view(-1, 3, painted, width)
        whole = torch.cat([half, sign * half[..., : painted // 2].flip(-1)], dim=-1)
        numbers = (even == (sign > 0)).nonzero().flatten()
        path.to_pixels.weight[:, numbers, 0, 0] = whole.flatten(1).T
    path.to_pixels.bias.copy_(sums / number)

    # Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3): each number's noise adds the
    # same squared error, variance x sigma^2, up to sigma = 1, where it is at the prior and costs nothing.
    allowed = noise_fraction * (total - variances.sum()).clamp_min(1e-6 * total) / count
    model.logvar_bias.zero_()
    model.logvar_bias[:found] = (allowed / variances).clamp(max=1.0).log().clamp(min=LOGVAR_MIN)
    logvar = model.logvar_bias
    kl = kl_per_dimension((squares / number).sqrt(), logvar).mean()
    result = {
        "kept_fraction": (variances.sum() / total).item(),
        "components": found,
        "kl_per_dimension": kl.item(),
    }
    if found < count:
        logger.warning(
            "the linear path found %d components for %d latent channels: %d images are too few; the other channels "
            "start at the prior. Raise training_presets.pca_init_images or use more data.",
            found,
            count,
            len(images),
        )
    return result


def freeze_pca_branch(model: AutoencoderKLUltra, lr_scale: float) -> None:
    """Keep the linear path out of training where its learning rate is 0."""
    if model.pca_branch is not None and lr_scale == 0:
        model.pca_branch.requires_grad_(False)
