"""Frechet distance between two sets of images, in the features of a named network.

It measures how far the reconstructions, as a set, are from the originals, and so finds blur that pixel-wise metrics
forgive. The features decide what the distance means, so its name always carries theirs; only `inception` is what papers
call FID (of reconstructions: rFID).

The estimate is biased upwards, more so with fewer images (Chong and Forsyth 2020, "Effectively Unbiased FID and
Inception Score"): below a few thousand images only distances over the same images may be compared.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.images import denormalize
from training.data.shards import in_one_line
from training.losses.perceptual import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, PerceptualTrunk
from training.losses.perceptual_weights import MissingWeightsError

# ViT-L/14 and its class token are what Stein et al. 2023 ("Exposing flaws of generative model evaluation metrics and
# their unfair treatment of diffusion models") found closest to human judgment.
DINOV2 = "facebook/dinov2-large"
_DINOV2_SIZE = 224  # pixels, as there


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Frechet distance of the Gaussians that have the sets' means and covariances (Dowson and Landau 1982, eq. 4).

        |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)

    With centered features A and B (images x dimensions) scaled so that S = A^T A, the eigenvalues of S_a S_b are the
    squared singular values of A B^T, so the last trace is their sum. No covariance is formed and no matrix root is
    taken: this is exact also for fewer images than dimensions, where roots of singular matrices lose half the digits.

    Args:
        features_a, features_b: (images, dimensions) each, at least two images.

    Returns:
        The squared distance, as is customary, in squared units of the features; computed in float64.

    Raises:
        ValueError: Fewer than two images, or different dimensions.
    """
    if min(len(features_a), len(features_b)) < 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"a Frechet distance of features {features_a.shape} and {features_b.shape}: give at least two images, and "
            "features of one network."
        )

    def mean_and_factor(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        centered = (features - mean) / (len(features) - 1) ** 0.5
        # A = Q R: Q drops out of the singular values, and R is at most dimensions x dimensions.
        return mean, np.linalg.qr(centered, mode="r")

    mean_a, factor_a = mean_and_factor(features_a)
    mean_b, factor_b = mean_and_factor(features_b)
    shared = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    squared = ((mean_a - mean_b) ** 2).sum() + (factor_a**2).sum() + (factor_b**2).sum() - 2 * shared
    return float(max(squared, 0.0))  # equal sets: rounding errors around 0


class FrechetFeatures:
    """Computes the features of a network.

    Args:
        name: A feature network of LPIPS (trunk: "vgg16", "st_vgg16", ...; mean over positions of its last layer), "dinov2" (class
            token of ViT-L/14) or "dinov2:MODEL" (another DINOv2, Hub id or folder), or "inception" (FID's network, by
            torchmetrics and torch-fidelity).
        device: Where to compute.

    Attributes:
        key: The metric's name in files: `frechet_<network>`.
        label: Its name for people.
        trunk_name: The trunk whose feature layers `__call__` needs; None for the other networks.

    Raises:
        ValueError: Unknown name, or a network that cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        kind, _, source = name.partition(":")
        if kind not in (*ARCHITECTURES, "dinov2", "inception") or (source and kind != "dinov2"):
            trunks = ", ".join(ARCHITECTURES)
            raise ValueError(f"--frechet {name}: use one of {trunks}, dinov2, dinov2:MODEL, inception or none.")
        self.trunk_name = kind if kind in ARCHITECTURES else None
        self.key = "frechet_" + kind
        self.label = {
            "dinov2": f"Frechet distance, DINOv2 class token ({source or DINOV2}); not FID",
            "inception": "Frechet distance, Inception (rFID)",
        }.get(kind, f"Frechet distance, last layer of {kind}; not FID")
        load = {"dinov2": _load_dinov2, "inception": _load_inception}.get(kind)
        self._network = load(source).to(device) if load else None
        self._kind = kind

    @torch.no_grad()
    def __call__(self, pixels: Tensor, feature_layers: list[Tensor] | None = None) -> Tensor:
        """Features of images.

        Args:
            pixels: (N, 3, H, W) in [-1, 1].
            feature_layers: What the trunk of that name returned for them (`PerceptualTrunk.features`); only for trunks.

        Returns:
            (N, dimensions), float32.
        """
        if self.trunk_name is not None:
            return feature_layers[-1].float().mean(dim=(2, 3))
        if self._kind == "inception":
            return self._network(denormalize(pixels)).float()
        size = (_DINOV2_SIZE, _DINOV2_SIZE)
        pixels = F.interpolate(pixels.clamp(-1, 1), size, mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self._network(((pixels + 1) / 2 - mean) / std).pooler_output.float()


def load_trunks(
    names: list[str], weights: str | None, device: torch.device, resolution: int
) -> dict[str, PerceptualTrunk]:
    """Load the feature networks (trunks) of LPIPS and the Frechet distance, each once.

    Args:
        names: Of trunks, with or without repetitions.
        weights: Folder of weights (`loss.trunk_weights`), or None.
        device: Where to compute.
        resolution: Smallest size of the images, pixels.

    Raises:
        ValueError: Unknown name, no weights, or images too small for a network.
    """
    trunks = {}
    for name in dict.fromkeys(names):
        if name in ARCHITECTURES and resolution < ARCHITECTURES[name].min_size:
            raise ValueError(
                f"images of {resolution} pixels are too small for the feature network {name}, which needs "
                f"{ARCHITECTURES[name].min_size}: name another in --lpips and --frechet (or none), or give "
                "--resolution."
            )
        try:
            trunks[name] = PerceptualTrunk(name, weights).to(device)
        except MissingWeightsError as error:
            raise ValueError(
                "give --lpips st_alexnet or none (likewise --frechet), which need no download, or --trunk-weights DIR: "
                f"{error.problem}."
            ) from error
    return trunks


def _load_dinov2(source: str) -> torch.nn.Module:
    from transformers import Dinov2Model

    try:
        return Dinov2Model.from_pretrained(source or DINOV2).eval()
    except OSError as error:
        raise ValueError(
            f"--frechet dinov2: cannot load {source or DINOV2} ({in_one_line(error)}): check the name and the network, "
            "or use --frechet vgg16."
        ) from error


def _load_inception(_source: str) -> torch.nn.Module:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(
            "--frechet inception needs the package torch-fidelity: run `pip install torch-fidelity`, or use --frechet "
            "dinov2 or vgg16."
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        # Without antialiasing, as TensorFlow's resizing, which published FIDs used.
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False)
    except OSError as error:
        raise ValueError(
            f"--frechet inception: cannot download the weights ({in_one_line(error)}): check the network, or use --frechet "
            "vgg16."
        ) from error
