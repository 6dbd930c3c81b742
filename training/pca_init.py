"""PCA initialization: sets a model's PCA branch and first posterior variances from training images, before step 0.

The components are those of the images and their horizontal flips, and the map back to `pca_decode_size` pixels is the
least-squares solution. Reverse water-filling gives each channel its first posterior variance.

Flipped images are never formed. With x = s + a, s symmetric and a antisymmetric under a horizontal flip, the covariance
of {x, flip(x)} is the sum of those of s and a, which have no component in common: two problems of half the size.

Augmented copies of the images prevent overfitting: a thousand components of a few thousand faces fit those faces with
half the squared error of other faces.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.autoencoder_kl_ultra import LOGVAR_MIN, AutoencoderKLUltra
from training.data.images import normalize, random_affine
from training.losses.objective import kl_per_dimension

logger = logging.getLogger(__name__)

_CHUNK = 128  # images converted to float at once: 0.1 GB at 256 px
_SMALLEST_FRACTION = 1e-9  # of the largest variance; components below it are rounding errors and are left out
_EXACT_SIZE = 4096  # largest matrix whose eigenvectors are all computed: 20 s on two cores, cubic beyond
_EXTRA_COLUMNS, _ITERATIONS = 200, 6  # of the subspace iteration
CHECKED_IMAGES = 512  # images that `check_images` looks at
# Below this fraction of the contrast in their mean (`mean_fraction`) images are not aligned. Measured at 32 pixels: aligned
# photographs of faces 0.09 to 0.12, photographs at scales of 0.5 to 1 and shifted accordingly 0.05, rotated 0.02 to 0.03.
_ALIGNED_MEAN_FRACTION = 0.06
# Mean square of the PCA coefficients of images that a PCA branch does not describe: measured 0.5 to 1.4 for images of the
# kind that it was fitted to, 2.4 for another crop, 3.5 for photographs and a branch of rendered faces.
_OTHER_IMAGES_MEAN_SQUARE = 2.0


def principal_components(samples: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Principal components of centered samples, largest variance first.

    Solves whichever of the n x n and d x d eigenvalue problems is smaller. In float32 it resolves variances down to
    about 1e-7 of the largest, which is enough for the span; the covariance of the coordinates within that span then
    gives axes and variances without this loss.

    Args:
        samples: (n, d), centered, float32.
        count: Number of components wanted; fewer are returned where n, d or the rank of the samples is smaller.

    Returns:
        Variances (k,), descending and positive, and orthonormal columns (d, k).
    """
    n, d = samples.shape
    if n < d:
        vectors = _largest_eigenvectors(samples @ samples.T, count)
        vectors = torch.linalg.qr(samples.T @ vectors)[0]
    else:
        vectors = _largest_eigenvectors(samples.T @ samples, count)
    coordinates = samples @ vectors
    # In float64 on the CPU, because Apple's GPUs have none; the matrix is only k x k.
    values, rotation = torch.linalg.eigh((coordinates.T @ coordinates).cpu().double() / n)
    values, rotation = values.flip(0), rotation.flip(1)
    keep = values > max(_SMALLEST_FRACTION * values[0].item(), torch.finfo(torch.float32).tiny)
    values, rotation = values[keep].to(samples), rotation[:, keep].to(samples)
    return values, vectors @ rotation


def _largest_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Orthonormal eigenvectors (d, k) of the k = min(count, d) largest eigenvalues of a symmetric matrix (d, d).

    Large matrices by subspace iteration from random columns (Halko, Martinsson and Tropp 2011,
    https://arxiv.org/abs/0909.4061, algorithm 4.4), in a tenth of the time. It mixes only components of nearly equal
    variance, which costs next to none of it.
    """
    size = len(matrix)
    if size <= _EXACT_SIZE or count + _EXTRA_COLUMNS >= size // 2:
        return torch.linalg.eigh(matrix)[1].flip(1)[:, :count]
    generator = torch.Generator().manual_seed(0)
    span = torch.randn(size, count + _EXTRA_COLUMNS, generator=generator).to(matrix)
    for _ in range(_ITERATIONS):
        span = torch.linalg.qr(matrix @ span)[0]
    rotation = torch.linalg.eigh(span.T @ matrix @ span)[1].flip(1)[:, :count]
    return span @ rotation


def split_symmetry(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric and antisymmetric parts (under a horizontal flip) of patches (n, 3, p, p), in orthonormal coordinates.

    Returns:
        (n, 3 p ceil(p / 2)) and (n, 3 p floor(p / 2)).
    """
    half = patches.shape[-1] // 2
    left, right = patches[..., :half], patches.flip(-1)[..., :half]
    center = patches[..., half : patches.shape[-1] - half]
    symmetric = torch.cat([(left + right) * 0.5**0.5, center], dim=-1)
    return symmetric.flatten(1), ((left - right) * 0.5**0.5).flatten(1)


def _join_symmetry(part: Tensor, size: int, sign: int) -> Tensor:
    """Patches (n, 3, p, p) of one part of `split_symmetry`, symmetric (sign 1) or antisymmetric (sign -1)."""
    columns = part.unflatten(1, (3, size, part.shape[1] // (3 * size)))
    left = columns[..., : size // 2] * 0.5**0.5
    center = columns[..., size // 2 :] if sign > 0 else columns.new_zeros(*columns.shape[:3], size % 2)
    return torch.cat([left, center, sign * left.flip(-1)], dim=-1)


def flip_symmetric_components(
    chunks: Iterable[Tensor], number: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Principal components of patches and their horizontal flips.

    Args:
        chunks: Patches (n_i, 3, p, p), copied once into one buffer; the n_i add up to `number`.
        number: Number of patches.
        count: Number of components wanted.

    Returns:
        Mean (3p^2,), total variance (), variances of the components (k,) in descending order and the orthonormal
        components (3p^2, k), in the order of `pixel_unshuffle` by p: channel, row, column.
    """
    parts: list[Tensor] = []
    filled = 0
    for patches in chunks:
        size, new_parts = patches.shape[-1], split_symmetry(patches)
        parts = parts or [part.new_empty(number, part.shape[1]) for part in new_parts]
        for part, new_part in zip(parts, new_parts):
            part[filled : filled + len(new_part)] = new_part
        filled += len(patches)
    mean = parts[0].mean(dim=0, keepdim=True)  # that of the antisymmetric parts is zero, over patches and flips
    parts[0] -= mean
    total = sum(chunk.square().sum() for part in parts for chunk in part.split(_CHUNK)) / number
    all_variances, all_vectors = [], []
    for sign, part in zip((1, -1), parts):
        if part.shape[1] == 0:  # patches of one pixel have no antisymmetric part
            continue
        variances, vectors = principal_components(part, count)
        all_variances.append(variances)
        all_vectors.append(_join_symmetry(vectors.T, size, sign).flatten(1).T)
    variances, vectors = torch.cat(all_variances), torch.cat(all_vectors, dim=1)
    variances, order = variances.sort(descending=True)
    # Compared with both parts, because one of them may consist of rounding errors only.
    found = min(count, int((variances > _SMALLEST_FRACTION * variances[:1]).sum()))
    return _join_symmetry(mean, size, 1).flatten(), total, variances[:found], vectors[:, order[:found]]


@torch.no_grad()
def fit_pca_branch(
    model: AutoencoderKLUltra, images: Tensor, noise_fraction: float, copies: int = 0
) -> dict[str, float]:
    """Set the PCA branch and the first posterior variances from images.

    Memory, on the model's device, float32: all patches, n (1 + copies) (latent_size)^2 x 3 p^2 values of patches of p x p,
    and for the eigenvalue problem about four matrices of d x d, d the smaller of half a patch, 3 p^2 / 2, and their number.

    Args:
        model: A model with a PCA branch; changed in place.
        images: (n, 3, sample_size, sample_size), uint8.
        noise_fraction: Squared error that the posterior's noise may add, as a fraction of the squared error of the
            components.
        copies: Augmented copies (`training.data.images.random_affine`) of each image to fit as well.

    Returns:
        `kept_fraction` of the variance at `pca_size`, number of `components` found, and `kl_per_dimension`, nats per
        dimension of the initial posterior over the images.

    Raises:
        ValueError: There is no PCA branch, the images have another size or type, or no component can be found.
    """
    branch, count, size = model.pca_branch, model.config.latent_channels, model.config.sample_size
    if branch is None:
        raise ValueError("the model has no PCA branch to initialize: set model.pca_size.")
    if tuple(images.shape[1:]) != (3, size, size) or images.dtype != torch.uint8:
        raise ValueError(
            f"PCA initialization needs uint8 images of shape (n, 3, {size}, {size}), got {images.dtype} "
            f"{tuple(images.shape)}."
        )
    if len(images) < 2:
        raise ValueError(f"PCA initialization needs at least 2 images, got {len(images)}.")
    encode, decode = branch.encoder, branch.decoder
    device = encode.linear.weight.device
    # Averaging over the common factor first is exact, and makes the augmentation cheaper.
    shared = math.gcd(encode.factor, decode.factor)

    def chunks() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)  # the same copies in both passes
        for copy in range(1 + copies):
            for part in images.split(_CHUNK):
                pixels = F.avg_pool2d(part.to(device).float() / 127.5 - 1.0, shared)
                yield random_affine(pixels, torch.rand(len(pixels), 5, generator=generator)) if copy else pixels

    def to_patches(pixels: Tensor, factor: int, patch_size: int) -> Tensor:
        """Pixels of `chunks`, reduced by `factor` in all, as patches (n h w, 3, p, p)."""
        patches = F.pixel_unshuffle(F.avg_pool2d(pixels, factor // shared), patch_size).permute(0, 2, 3, 1)
        return patches.reshape(-1, 3, patch_size, patch_size)

    number = len(images) * (1 + copies) * model.config.latent_size**2
    patches = (to_patches(part, encode.factor, encode.patch_size) for part in chunks())
    mean, total, variances, vectors = flip_symmetric_components(patches, number, count)
    found = len(variances)
    if not found:
        raise ValueError(f"the {len(images)} images are identical: PCA initialization needs different images.")
    whitening = (vectors / variances.sqrt()).T
    weight, bias = encode.linear.weight, encode.linear.bias
    weight.zero_()
    bias.zero_()
    weight[:found] = whitening
    bias[:found] = -(mean @ whitening.T)

    # Least squares from whitened, centered coefficients: their covariance over images and flips is the identity, so the
    # solution is the mean product with the targets, and channels without a component get zero. A component and its
    # image are both symmetric or both antisymmetric, so half of the image determines it.
    p = encode.patch_size
    symmetric = (vectors * vectors.view(3, p, p, found).flip(2).view_as(vectors)).sum(dim=0) > 0
    p = decode.patch_size
    width = (p + 1) // 2
    products = {
        sign: torch.zeros(int((symmetric == (sign > 0)).sum()), 3 * p * width, device=device) for sign in (1, -1)
    }
    target_sum, squared_sum = 0.0, torch.zeros(count, device=device)
    for part in chunks():
        patches = to_patches(part, encode.factor, encode.patch_size).flatten(1)
        coefficients = F.linear(patches, weight, bias)
        targets = to_patches(part, decode.factor, p)
        for sign in (1, -1):
            half = (targets + sign * targets.flip(-1))[..., :width].flatten(1) / 2
            products[sign].addmm_(coefficients[:, :found][:, symmetric == (sign > 0)].T, half)
        target_sum = target_sum + (targets + targets.flip(-1)).sum(dim=0).flatten() / 2
        squared_sum += coefficients.square().sum(dim=0)
    decode.linear.weight.zero_()
    for sign, product in products.items():
        half = (product / number).view(-1, 3, p, width)
        full = torch.cat([half, sign * half[..., : p // 2].flip(-1)], dim=-1)
        channels = (symmetric == (sign > 0)).nonzero().flatten()
        decode.linear.weight[:, channels] = full.flatten(1).T
    decode.linear.bias.copy_(target_sum / number)

    # Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3): the noise of each channel adds
    # the same squared error, variance x sigma^2, up to sigma = 1, the prior's, where the channel has no KL.
    allowed = noise_fraction * (total - variances.sum()).clamp_min(1e-6 * total) / count
    logvar = model.logvar_bias.bias
    logvar.zero_()
    logvar[:found] = (allowed / variances).clamp(max=1.0).log().clamp(min=LOGVAR_MIN)
    if found < count:
        logger.warning(
            "PCA initialization found %d components for %d latent channels in %d images; the other channels start at "
            "the prior. Raise training_presets.pca_init_images or use more data.",
            found,
            count,
            len(images),
        )
    return {
        "kept_fraction": (variances.sum() / total).item(),
        "components": found,
        # KL depends on the mean through its square only, so the root mean square gives the average over images.
        "kl_per_dimension": kl_per_dimension((squared_sum / number).sqrt()[None], logvar[None]).mean().item(),
    }


def mean_fraction(images: Tensor, size: int = 32) -> float:
    """How much of the contrast of images their mean holds, flips included: much where faces are aligned.

    Args:
        images: (N, 3, H, W), uint8.
        size: They are reduced to this size first, pixels.

    Returns:
        Variance over the pixels of the mean image, as a fraction of the variance of all pixels of all images, in [0, 1].
    """
    small = F.adaptive_avg_pool2d(images.float(), size)
    mean = (small + small.flip(-1)).mean(dim=0) / 2
    of_mean = mean.flatten(1).var(dim=1, correction=0).sum()
    rest = (small - mean).square().mean(dim=(0, 2, 3)).sum()
    return (of_mean / (of_mean + rest)).item()


@torch.no_grad()
def check_images(model: AutoencoderKLUltra, images: Tensor, fitted_to: str | None = None) -> None:
    """Warn about training images that a PCA branch describes poorly.

    Args:
        model: On the CPU if `fitted_to` is given.
        images: (N, 3, sample_size, sample_size), uint8; the first `CHECKED_IMAGES` are enough.
        fitted_to: Name of the model whose PCA branch is kept, for the message; None if it is fitted to these images.
    """
    images = images[:CHECKED_IMAGES]
    if model.config.latent_layout == "vector" and (fraction := mean_fraction(images)) < _ALIGNED_MEAN_FRACTION:
        logger.warning(
            "these images do not look like aligned faces: their mean holds %.0f %% of the contrast, where aligned faces "
            "have 9 to 12 %%. One set of components describes unaligned faces poorly; see `python -m training.align --help`.",
            100 * fraction,
        )
    if fitted_to is None:
        return
    coefficients = [model.pca_branch.encoder(normalize(part)) for part in images.split(_CHUNK)]
    mean_square = torch.cat(coefficients).square().mean().item()
    if mean_square > _OTHER_IMAGES_MEAN_SQUARE:
        logger.warning(
            "the PCA branch of %s was fitted to other images: the mean square of its coefficients is %.1f for these, and "
            "about 1 for its own. Set training_presets.pca_refit=true (with train_only=all) to fit it to these.",
            fitted_to,
            mean_square,
        )
