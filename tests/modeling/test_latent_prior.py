"""Priors: noise becomes the fitted distribution, and a saved prior transforms noise the same after loading."""

from __future__ import annotations

import math

import accelerate
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoModel
from safetensors.torch import load_file, save_file
from sklearn.covariance import ledoit_wolf

from modeling.latent_prior import (
    DiffusionPrior,
    GaussianPrior,
    LatentPrior,
    fit_gaussian,
    sampling_sigmas,
    shrunk_correlation,
)

LATENT_DIM = 16  # of the tiny model
ATTRIBUTES = ("Smiling", "Eyeglasses")
CLASSES = {"gaussian": GaussianPrior, "diffusion": DiffusionPrior}
DIFFUSION = {
    "latent_dim": LATENT_DIM, "image_size": 20, "patch_size": 2, "block_out_channels": (8, 16),
    "layers_per_block": (1, 2, 1), "num_inference_steps": 4, "attributes": ATTRIBUTES,
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(count: int, latent_dim: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples of a known Gaussian, its mean and covariance."""
    mixing = torch.randn(latent_dim, latent_dim, generator=generator(99))
    mean = torch.arange(latent_dim, dtype=torch.float32)
    return mean + torch.randn(count, latent_dim, generator=generator(seed)) @ mixing.T, mean, mixing @ mixing.T


def random_priors() -> dict[str, LatentPrior]:
    """One of each kind, with random parameters that are the same in every test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        priors = {"gaussian": GaussianPrior(LATENT_DIM, ATTRIBUTES), "diffusion": DiffusionPrior(**DIFFUSION)}
    for prior in priors.values():
        for name, parameter in prior.named_parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(len(name)))
        prior.eval()
    return priors


def transform(prior: LatentPrior, count: int = 3) -> torch.Tensor:
    noise = torch.randn(count, *prior.noise_shape, generator=generator())
    return prior.denoise(noise) if hasattr(prior, "denoise") else prior(noise)


# ---- Gaussian ----


def test_samples_of_the_gaussian_have_the_fitted_mean_and_covariance():
    latents, mean, covariance = correlated(8_000)
    prior, weight = fit_gaussian(latents)
    assert 0 <= weight < 0.01  # many samples: almost no shrinkage
    samples = prior(torch.randn(8_000, 6, generator=generator(1)))
    # The standard error of a covariance is at most sqrt(2 C_ii C_jj / n); two samples of it, at five standard errors.
    spread = covariance.diagonal().sqrt()
    error = 5 * 2 * (1 / 8_000) ** 0.5
    assert ((samples.mean(dim=0) - mean) / spread).abs().max() < error
    assert ((samples.T.cov() - covariance) / spread[:, None] / spread).abs().max() < error


def test_shrinkage_equals_scikit_learn():
    points = correlated(30, latent_dim=40)[0]
    points = ((points - points.mean(dim=0)) / points.std(dim=0, correction=0)).double()
    correlation, weight = shrunk_correlation(points)
    expected, expected_weight = ledoit_wolf(points.numpy(), assume_centered=True)
    assert weight == pytest.approx(expected_weight, abs=1e-9) and 0.05 < weight < 1
    np.testing.assert_allclose(correlation.numpy(), expected, atol=1e-9)
    prior, _ = fit_gaussian(points.float())  # fewer samples than dimensions: still of full rank
    assert torch.linalg.matrix_rank(prior.factor) == 40


def test_noise_of_zero_is_the_mean():
    prior, _ = fit_gaussian(correlated(500)[0])
    assert torch.equal(prior(torch.zeros(2, 6)), prior.mean.expand(2, -1))


def test_one_face_raises():
    with pytest.raises(ValueError, match="at least 2 faces, got 1"):
        fit_gaussian(torch.zeros(1, 4))


# ---- diffusion ----


@pytest.mark.parametrize(
    "settings",
    [{"pca_size": 20, "pca_decode_size": 20}, {"pca_size": 10, "pca_decode_size": 20}],
)
def test_images_of_the_vector_layout_determine_the_latents(settings):
    """After the PCA initialization the branch's encoder inverts its decoder; here the pseudo-inverse does."""
    vae = tiny.random_vae(**settings)
    decoder, encoder = vae.pca_branch.decoder, vae.pca_branch.encoder
    offset = DiffusionPrior.latents_to_images(vae, torch.zeros(1, LATENT_DIM, 1, 1))
    basis = torch.eye(LATENT_DIM)[:, :, None, None]
    columns = torch.nn.functional.pixel_unshuffle(
        DiffusionPrior.latents_to_images(vae, basis) - offset, encoder.patch_size
    ).flatten(1)
    inverse = torch.linalg.pinv(columns.T)
    encoder.linear.weight.data.copy_(inverse)
    encoder.linear.bias.data.copy_(-inverse @ torch.nn.functional.pixel_unshuffle(offset, encoder.patch_size).flatten())
    latents = torch.randn(3, LATENT_DIM, 1, 1, generator=generator())
    images = DiffusionPrior.latents_to_images(vae, latents)
    assert images.shape == (3, 3, settings["pca_size"], settings["pca_size"]) and decoder.patch_size == 20
    torch.testing.assert_close(DiffusionPrior.images_to_latents(vae, images), latents, atol=1e-3, rtol=1e-3)


def test_latents_of_the_spatial_layout_are_the_images():
    vae = tiny.random_vae(latent_layout="spatial", latent_channels=4, latent_size=5, latent_dim=100)
    latents = torch.randn(2, 4, 5, 5)
    assert torch.equal(DiffusionPrior.latents_to_images(vae, latents), latents)
    assert torch.equal(DiffusionPrior.images_to_latents(vae, latents), latents)


def test_a_vector_layout_without_pca_branch_raises():
    with pytest.raises(ValueError, match="needs a PCA branch"):
        DiffusionPrior.latents_to_images(tiny.random_vae(pca_size=None), torch.zeros(1, LATENT_DIM, 1, 1))


class GaussianVelocity(DiffusionPrior):
    """The exact velocity of N(0, std^2): E[noise - x_0 | x], linear in x."""

    std = 0.5

    def forward(self, x, sigma, attributes=None, with_guide=False):
        sigma = sigma[:, None, None, None]
        variance = ((1 - sigma) * self.std).square() + sigma.square()
        velocity = (sigma - (1 - sigma) * self.std**2) / variance * x
        return (velocity, velocity) if with_guide else velocity


@pytest.mark.parametrize(
    ("std", "steps", "tolerance"), [(0.5, 15, 0.1), (0.05, 15, 0.13), (2.0, 15, 0.1), (0.5, 60, 0.02), (0.05, 60, 0.08)]
)
def test_denoise_samples_the_distribution(std, steps, tolerance):
    """Of every standard deviation that occurs, from a face's outline to its finest detail."""
    prior = GaussianVelocity(**DIFFUSION | {"num_inference_steps": steps})
    prior.std = std
    prior.standardize.mean.data.fill_(2.0)
    noise = torch.randn(8, *prior.noise_shape, generator=generator())
    # The exact flow of a Gaussian scales the noise by its standard deviation.
    torch.testing.assert_close((prior.denoise(noise) - 2) / std, noise, atol=1e-3, rtol=tolerance)


def test_add_noise_inverts_denoise():
    prior = GaussianVelocity(**DIFFUSION | {"num_inference_steps": 60})
    noise = torch.randn(8, *prior.noise_shape, generator=generator())
    torch.testing.assert_close(prior.add_noise(prior.denoise(noise)), noise, atol=0.02, rtol=0.02)


def test_noise_levels_fall_and_ignore_the_default_device_of_torch():
    with torch.device("meta"):
        sigmas = sampling_sigmas(15)
    assert sigmas.device.type == "cpu" and (sigmas.diff() < 0).all()
    ratios = sigmas / (1 - sigmas)
    assert float(ratios[0]) == pytest.approx(200, rel=1e-3) and float(ratios[-1]) == pytest.approx(0.02, rel=1e-3)


def test_guidance_extrapolates_from_the_guide_through_the_network():
    prior = random_priors()["diffusion"]
    noise = torch.randn(2, *prior.noise_shape, generator=generator())
    sigma, values = torch.full((2,), 0.5), prior.attribute_values({"Eyeglasses": 1}, 2)
    assert values.tolist() == [[0, 1], [0, 1]] and prior.attribute_values({"Smiling": 0}, 1).tolist() == [[-1, 0]]
    with torch.no_grad():
        velocity, guide = prior(noise, sigma, values, with_guide=True)
        assert torch.equal(velocity, prior(noise, sigma, values))
        assert torch.equal(guide, prior(noise, sigma, with_guide=True)[1])  # does not know the attributes
        assert (velocity - prior(noise, sigma)).abs().max() > 1e-3 and (velocity - guide).abs().max() > 1e-3
        for values_of, expected in ((values, velocity), (None, prior(noise, sigma))):
            guided = prior._velocity(noise, sigma, values_of, 3.0)
            torch.testing.assert_close(guided, guide + 3 * (expected - guide), atol=1e-4, rtol=1e-4)
        stronger = prior._velocity(noise, sigma, values, 3.0, 5.0)
        expected = prior(noise, sigma) + 5 * (velocity - prior(noise, sigma))
        torch.testing.assert_close(stronger, guide + 3 * (expected - guide), atol=1e-4, rtol=1e-4)
        assert torch.equal(prior.denoise(noise, attribute_scale=2), prior.denoise(noise))  # nothing to strengthen
        samples = [prior.denoise(noise, {"Smiling": 1}, attribute_scale=scale) for scale in (None, 4, 1)]
        assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
        assert torch.equal(prior.denoise(noise), prior.denoise(noise, guidance_scale=prior.config.guidance_scale))
        assert not torch.equal(prior.denoise(noise), prior.denoise(noise, guidance_scale=1))
    with pytest.raises(ValueError, match="'Hat' is unknown: this prior was trained on Smiling, Eyeglasses"):
        prior.denoise(noise, {"Hat": 1})


@pytest.mark.parametrize("scale", [-0.5, math.nan, math.inf, "2"])
def test_an_impossible_guidance_scale_raises(scale):
    prior = random_priors()["diffusion"]
    with pytest.raises(ValueError, match="guidance_scale must be a number of at least 0, got .*: 1 has no effect"):
        prior.denoise(torch.zeros(1, *prior.noise_shape), guidance_scale=scale)
    with pytest.raises(ValueError, match="attribute_scale must be a number of at least 0"):
        prior.denoise(torch.zeros(1, *prior.noise_shape), attribute_scale=scale)
    for name in ("guidance_scale", "attribute_scale"):
        with pytest.raises(ValueError, match=f"{name} must be a number of at least 0"):
            DiffusionPrior(**DIFFUSION | {name: scale})


@pytest.mark.parametrize("steps", [0, 1, "15"])
def test_an_impossible_number_of_steps_raises(steps):
    with pytest.raises(ValueError, match="num_inference_steps must be an integer of at least 2"):
        DiffusionPrior(num_inference_steps=steps)


def test_an_image_that_cannot_be_divided_into_patches_raises():
    with pytest.raises(ValueError, match="image_size 20 must be a multiple of 2 x patch_size = 8"):
        DiffusionPrior(image_size=20, patch_size=4)


# ---- saving, precision, offloading ----


@pytest.mark.parametrize("kind", CLASSES)
def test_a_loaded_prior_transforms_noise_bitwise_the_same(kind, tmp_path):
    prior = random_priors()[kind]
    prior.save_pretrained(tmp_path)
    assert not [file.name for file in tmp_path.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    for loaded in (
        CLASSES[kind].from_pretrained(tmp_path),
        AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True),
    ):
        assert tuple(loaded.config.attributes) == ATTRIBUTES
        assert torch.equal(transform(loaded.eval()), transform(prior))


def test_a_file_that_lacks_weights_raises(tmp_path):
    random_priors()["gaussian"].save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"mean": load_file(file)["mean"]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack directions, factor: remove .*, and fit or download the prior again"):
        GaussianPrior.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", CLASSES)
def test_half_precision_transforms_noise_nearly_the_same(kind):
    prior = random_priors()[kind]
    expected = transform(prior)
    half = transform(prior.to(torch.bfloat16))
    assert half.dtype == (torch.bfloat16 if kind == "gaussian" else torch.float32)
    assert (half.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("kind", CLASSES)
def test_noise_is_transformed_the_same_with_offloaded_weights(kind):
    """Hooks of accelerate load weights in the `forward` of their own module."""
    prior = random_priors()[kind]
    expected = transform(prior)
    accelerate.cpu_offload(prior, execution_device=torch.device("cpu"))
    assert next(prior.parameters()).is_meta
    torch.testing.assert_close(transform(prior), expected)
