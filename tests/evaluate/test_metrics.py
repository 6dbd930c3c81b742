"""Image metrics against scikit-image and against formulas written here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from training.evaluate.metrics import image_metrics
from training.losses.perceptual import PerceptualTrunk


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions, some of which leave [-1, 1], and originals: (4, 3, 32, 40)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 3, 5, 6, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(32, 40), mode="bilinear").clamp(-1, 1)
    strength = torch.tensor([0.0, 0.02, 0.2, 0.8]).view(4, 1, 1, 1)
    return pixels + strength * torch.randn(pixels.shape, generator=generator), pixels


def as_images(pixels: torch.Tensor) -> list[np.ndarray]:
    """(N, 3, H, W) in [-1, 1] to N arrays (H, W, 3) in [0, 1], in double precision."""
    return list((pixels.double().clamp(-1, 1).permute(0, 2, 3, 1).numpy() + 1) / 2)


def test_psnr_and_ssim_equal_scikit_images(pairs):
    values = image_metrics(*pairs, trunk=None)
    assert set(values) == {"mse", "psnr", "ssim"}
    for value in values.values():
        assert value.shape == (4,) and value.dtype == torch.float32
    for index, (reconstruction, original) in enumerate(zip(*map(as_images, pairs))):
        # Gaussian weights, sigma 1.5 and population covariances: the paper's settings (Wang et al. 2004).
        ssim = structural_similarity(
            original,
            reconstruction,
            data_range=1,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert values["ssim"][index].item() == pytest.approx(ssim, abs=1e-4)
        if index:  # the first pair is equal, and scikit-image's PSNR infinite
            psnr = peak_signal_noise_ratio(original, reconstruction, data_range=1)
            assert values["psnr"][index].item() == pytest.approx(psnr, abs=1e-3)
    assert values["psnr"].tolist() == sorted(values["psnr"].tolist(), reverse=True)  # the noise grows from pair to pair


def test_equal_images():
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    values = image_metrics(pixels.clone(), pixels, trunk=None)
    assert values["mse"].tolist() == [0, 0]
    assert values["psnr"].tolist() == pytest.approx([100, 100])
    assert values["ssim"].tolist() == pytest.approx([1, 1])


def test_mse_is_on_minus_one_to_one():
    white, black = torch.ones(1, 3, 16, 16), -torch.ones(1, 3, 16, 16)
    assert image_metrics(white, black, trunk=None)["mse"].item() == 4
    assert image_metrics(white, black, trunk=None)["psnr"].item() == pytest.approx(0, abs=1e-6)
    tenth = image_metrics(white - 0.1, white, trunk=None)
    assert tenth["mse"].item() == pytest.approx(0.01, rel=1e-5)
    assert tenth["psnr"].item() == pytest.approx(10 * math.log10(4 / 0.01), rel=1e-5)  # 26.02 dB


def test_reconstructions_are_clamped_to_the_range_of_images():
    white = torch.ones(1, 3, 16, 16)
    assert image_metrics(3 * white, white, trunk=None)["mse"].item() == 0


def test_one_image_and_half_precision_keep_their_shape(pairs):
    for part in (pairs[0][2:3], pairs[0][2:3].bfloat16()):
        values = image_metrics(part, pairs[1][2:3], trunk=None)
        for name, value in values.items():
            assert value.shape == (1,) and value.dtype == torch.float32, name


def test_lpips_is_named_after_its_network(pairs):
    torch.manual_seed(0)
    trunk = PerceptualTrunk("alexnet", load_weights=False)
    values = image_metrics(*pairs, trunk=trunk)
    assert set(values) == {"mse", "psnr", "ssim", "lpips_alexnet"}
    distance = values["lpips_alexnet"]
    assert distance.shape == (4,)
    assert distance[0].item() == 0
    assert (distance[1:] > 0).all()
    # An image's value does not depend on its batch, so means over batches of any size agree.
    alone = image_metrics(pairs[0][2:3], pairs[1][2:3], trunk=trunk)
    for name, value in values.items():
        assert alone[name].item() == pytest.approx(value[2].item(), rel=1e-5)
