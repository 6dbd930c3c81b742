"""The Frechet distance against its closed form, scipy and torchmetrics; features against the networks themselves."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import Dinov2Config, Dinov2Model

from training.evaluate.frechet import FrechetFeatures, frechet_distance, load_trunks
from training.losses.perceptual import PerceptualTrunk

CPU = torch.device("cpu")


def correlated(seed: int, images: int, dimensions: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(images, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + rng.normal(
        size=dimensions
    )


def with_mean_and_covariance(seed: int, images: int, mean: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Samples whose mean and covariance (factor^T factor) are exact, not estimates."""
    noise = np.random.default_rng(seed).normal(size=(images, len(mean)))
    noise -= noise.mean(axis=0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise, rowvar=False))).T
    return mean + white @ factor


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """With scipy's matrix root."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


def test_two_gaussians_in_closed_form():
    """Covariances with common axes: |m_a - m_b|^2 + sum (sigma_a - sigma_b)^2, in any basis."""
    sigma_a, sigma_b = np.array([1.0, 2.0, 0.5, 3.0]), np.array([1.5, 1.0, 0.5, 0.1])
    mean_a, mean_b = np.array([0.0, 1.0, -2.0, 0.0]), np.array([0.5, 1.0, 1.0, 4.0])
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0]
    a = with_mean_and_covariance(0, 50, mean_a @ basis, sigma_a[:, None] * basis)
    b = with_mean_and_covariance(1, 70, mean_b @ basis, sigma_b[:, None] * basis)
    wanted = ((mean_a - mean_b) ** 2).sum() + ((sigma_a - sigma_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-10)


def test_equals_scipys_matrix_root():
    for seed, dimensions in ((0, 3), (10, 24)):
        a, b = correlated(seed, 60, dimensions), correlated(seed + 1, 80, dimensions)
        assert frechet_distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-8)


def test_equals_torchmetrics():
    class Means(torch.nn.Module):
        """Mean and mean square of each color: six features."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            images = images.double() / 255
            return torch.cat([images.mean(dim=(2, 3)), images.square().mean(dim=(2, 3))], dim=1)

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (40, 3, 4, 4), generator=generator, dtype=torch.uint8)
    generated = (torch.randint(0, 256, (40, 3, 4, 4), generator=generator, dtype=torch.uint8) // 2) + 20
    metric = FrechetInceptionDistance(feature=Means(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    own = frechet_distance(Means()(generated).numpy(), Means()(real).numpy())
    assert own == pytest.approx(metric.compute().item(), rel=1e-6)


def test_fewer_images_than_dimensions():
    """Singular covariances: the eigenvalues of their product, here of the full matrix."""
    a, b = correlated(0, 12, 40), correlated(1, 9, 40)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-5)
    # Exact where the answer is known: the same images, shifted.
    assert frechet_distance(a, a + 3.0) == pytest.approx(9 * 40, rel=1e-10)


def test_equal_sets_and_order():
    a, b = correlated(0, 30, 5), correlated(1, 20, 5)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_too_few_images_and_different_dimensions_raise():
    a = correlated(0, 5, 3)
    for other in (a[:1], a[:, :2]):
        with pytest.raises(ValueError, match="at least two images, and features of one network"):
            frechet_distance(a, other)


def test_a_trunk_gives_the_mean_of_its_last_layer():
    features = FrechetFeatures("st_alexnet", CPU)
    trunk = PerceptualTrunk("st_alexnet", load_weights=False)
    pixels = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    feature_layers = trunk.features(pixels)
    assert features.key == "frechet_st_alexnet" and features.trunk_name == "st_alexnet"
    assert torch.equal(features(pixels, feature_layers), feature_layers[-1].mean(dim=(2, 3)))
    assert "not FID" in features.label


def test_dinov2_gives_the_class_token_of_normalized_images(tmp_path):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(tmp_path)
    features = FrechetFeatures(f"dinov2:{tmp_path}", CPU)
    assert features.key == "frechet_dinov2" and str(tmp_path) in features.label and features.trunk_name is None
    # 224 pixels already, so nothing is resized; a flat color has a known value after normalization.
    gray = torch.full((1, 3, 224, 224), 0.2)
    normalized = torch.stack(
        [torch.full((224, 224), (0.6 - m) / s) for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    with torch.no_grad():
        wanted = Dinov2Model.from_pretrained(tmp_path).eval()(normalized[None]).last_hidden_state[:, 0]
    torch.testing.assert_close(features(gray), wanted, atol=1e-5, rtol=1e-5)
    # The size of flat images does not matter: they are brought to 224.
    torch.testing.assert_close(features(gray[..., :40, :40]), wanted, atol=1e-5, rtol=1e-5)


def test_networks_that_cannot_be_loaded(tmp_path, monkeypatch):
    for name in ("vgg19", "vgg16:folder", "fid"):
        with pytest.raises(ValueError, match="--frechet .*use one of vgg16, .*dinov2, dinov2:MODEL, inception or none"):
            FrechetFeatures(name, CPU)
    with pytest.raises(ValueError, match="--frechet dinov2: cannot load .*check the name"):
        FrechetFeatures(f"dinov2:{tmp_path}", CPU)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch_fidelity" else found(name))
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        FrechetFeatures("inception", CPU)


def test_trunks_are_loaded_once_and_checked(tmp_path):
    assert list(load_trunks(["st_alexnet", "st_alexnet"], None, CPU, 21)) == ["st_alexnet"]
    with pytest.raises(ValueError, match="images of 20 pixels are too small for the feature network st_alexnet.* 21"):
        load_trunks(["st_alexnet"], None, CPU, 20)
    with pytest.raises(ValueError, match="unknown feature network 'vgg': choose one of [^-]*$"):
        load_trunks(["vgg"], None, CPU, 64)
    with pytest.raises(ValueError, match="is not a folder"):
        load_trunks(["alexnet"], str(tmp_path / "none"), CPU, 64)
