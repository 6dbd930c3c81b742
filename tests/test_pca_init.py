"""PCA initialization against numpy in float64, with every flipped image and every patch formed explicitly."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training import pca_init, setup
from training.config import Config
from training.data.synthetic_faces.render import render_portrait
from training.pca_init import (
    fit_pca_branch,
    flip_symmetric_components,
    principal_components,
    split_symmetry,
)

SIZE = 32
SETTINGS = {
    "vector": {"latent_layout": "vector", "latent_channels": 40, "latent_size": 1, "pca_size": 8},
    "spatial": {"latent_layout": "spatial", "latent_channels": 10, "latent_size": 4, "pca_size": 16},
}
LAYOUTS = list(SETTINGS)
NOISE = 0.05


def model_for(layout: str, **changes: object) -> AutoencoderKLUltra:
    torch.manual_seed(0)
    settings = SETTINGS[layout] | {"pca_decode_size": 16} | changes
    return AutoencoderKLUltra(
        **{"sample_size": SIZE} | settings,
        latent_dim=settings["latent_channels"] * settings["latent_size"] ** 2,
        encoder_block_out_channels=(16, 32),
        encoder_layers_per_block=(1, 1),
        decoder_block_out_channels=(16, 32),
        decoder_layers_per_block=(1, 1),
        vector_width=8,
    ).eval()


def some_images(count: int = 200, seed: int = 0) -> torch.Tensor:
    """Smooth random images with a little grain, (count, 3, 32, 32) uint8; more than one chunk."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(count, 3, 6, 6, generator=generator), size=SIZE, mode="bicubic")
    grain = 0.1 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    slope = torch.linspace(0.2, 0.6, SIZE)  # a mean that is not symmetric
    return ((0.3 * coarse + 0.3 * grain + slope) * 127.5 + 100).clamp(0, 255).to(torch.uint8)


def patches(images: torch.Tensor, size: int, latent_size: int) -> np.ndarray:
    """Images and their flips at `size` pixels as patches, float64 (n, 3 p p) in the order channel, row, column."""
    pixels = images.double().numpy() / 127.5 - 1
    pixels = np.concatenate([pixels, pixels[..., ::-1]])
    factor, p = pixels.shape[-1] // size, size // latent_size
    small = pixels.reshape(-1, 3, size, factor, size, factor).mean(axis=(3, 5))
    split = small.reshape(-1, 3, latent_size, p, latent_size, p)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * p * p)


def as_rows(maps: torch.Tensor) -> np.ndarray:
    """(N, C, h, w) to float64 rows (N h w, C)."""
    return maps.detach().double().permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).numpy()


def with_flips(images: torch.Tensor) -> torch.Tensor:
    pixels = images.float() / 127.5 - 1
    return torch.cat([pixels, pixels.flip(-1)])


def pca(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variances in descending order, components as columns."""
    mean = rows.mean(axis=0)
    _, singular, components = np.linalg.svd(rows - mean, full_matrices=False)
    return mean, singular**2 / len(rows), components.T


def projector(columns: torch.Tensor | np.ndarray) -> np.ndarray:
    columns = np.asarray(columns, dtype=np.float64)
    return columns @ columns.T


# ---------------------------------------------------------------------- components


@pytest.mark.parametrize(("n", "d"), [(30, 80), (80, 30), (50, 50)])
def test_principal_components_against_svd(n, d):
    random = np.random.default_rng(0)
    samples = random.normal(size=(n, d)) * np.exp(-0.1 * np.arange(d))
    _, singular, components = np.linalg.svd(samples, full_matrices=False)
    variances, vectors = principal_components(torch.tensor(samples, dtype=torch.float32), 12)
    assert vectors.shape == (d, 12)
    np.testing.assert_allclose(variances, singular[:12] ** 2 / n, rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.diag(components[:12] @ vectors.numpy())), 1, atol=1e-5)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(12), atol=1e-5)


@pytest.mark.parametrize(("n", "d"), [(60, 100), (100, 60)])
def test_small_variances_are_accurate(n, d):
    # Variances from 1 to 1e-5: a float32 Gram matrix alone gives the last of them to 1 %.
    random = np.random.default_rng(1)
    left = np.linalg.qr(random.normal(size=(n, 30)))[0]
    right = np.linalg.qr(random.normal(size=(d, 30)))[0]
    variances = np.logspace(0, -5, 30)
    samples = left * np.sqrt(variances * n) @ right.T
    found, vectors = principal_components(torch.tensor(samples, dtype=torch.float32), 30)
    np.testing.assert_allclose(found, variances, rtol=0.01)
    white = samples @ (vectors / found.sqrt()).double().numpy()
    np.testing.assert_allclose(white.T @ white / n, np.eye(30), atol=1e-3)


@pytest.mark.parametrize(("n", "d"), [(20, 50), (50, 20)])
def test_no_more_components_than_the_rank(n, d):
    random = np.random.default_rng(2)
    samples = random.normal(size=(n, 7)) @ random.normal(size=(7, d))
    variances, vectors = principal_components(torch.tensor(samples, dtype=torch.float32), 15)
    assert vectors.shape == (d, 7)
    assert variances.min() > 0
    assert len(principal_components(torch.zeros(n, d), 15)[0]) == 0


@pytest.mark.parametrize("n", [40, 400])  # fewer and more than values in a patch
def test_components_against_those_of_explicit_flips(n):
    images = some_images(n)
    small = F.avg_pool2d(images.float() / 127.5 - 1, 4)
    mean, total, variances, vectors = flip_symmetric_components(small.split(30), n, 30)
    wanted_mean, wanted_variances, components = pca(patches(images, 8, 1))
    np.testing.assert_allclose(mean, wanted_mean, atol=1e-6)
    np.testing.assert_allclose(total, wanted_variances.sum(), rtol=1e-5)
    np.testing.assert_allclose(variances, wanted_variances[:30], rtol=1e-4)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(30), atol=1e-5)
    np.testing.assert_allclose(projector(vectors), projector(components[:, :30]), atol=1e-3)
    # Each component is symmetric or antisymmetric.
    flipped = vectors.T.view(30, 3, 8, 8).flip(-1).reshape(30, -1)
    assert torch.allclose((flipped * vectors.T).sum(dim=1).abs(), torch.ones(30), atol=1e-5)


def test_symmetric_images_have_no_antisymmetric_component():
    images = some_images(100)
    images = torch.cat([images[..., : SIZE // 2], images[..., : SIZE // 2].flip(-1)], dim=-1)
    _, _, variances, vectors = flip_symmetric_components([F.avg_pool2d(images.float() / 127.5 - 1, 4)], 100, 192)
    assert len(variances) == 96
    flipped = vectors.T.view(96, 3, 8, 8).flip(-1).reshape(96, -1)
    assert torch.allclose(flipped, vectors.T, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_symmetric_and_antisymmetric_parts_are_orthonormal_coordinates(size):
    patches = torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(0))
    even, odd = split_symmetry(patches)
    same, negated = split_symmetry(patches.flip(-1))
    torch.testing.assert_close(same, even)
    torch.testing.assert_close(negated, -odd)
    torch.testing.assert_close(even.square().sum(1) + odd.square().sum(1), patches.square().sum((1, 2, 3)))
    _, _, variances, vectors = flip_symmetric_components([patches], 7, 6)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(variances)), atol=1e-5)


def test_patches_are_in_memory_once():
    """Augmented copies of thousands of images are gigabytes."""
    n, size = 4096, 3 * 16**2
    chunks = (torch.randn(64, 3, 16, 16) for _ in range(n // 64))
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as run:
        flip_symmetric_components(chunks, n, 20)
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    assert 4 * n * size < peak < 1.5 * 4 * n * size


# ---------------------------------------------------------------------- the fitted model


def test_subspace_iteration_agrees_with_the_exact_solution(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    spectrum = torch.arange(1, 301, dtype=torch.float32) ** -1.0  # decays as slowly as that of faces
    samples = torch.randn(400, 300, generator=generator) * spectrum.sqrt()
    exact, _ = principal_components(samples, 20)
    monkeypatch.setattr(pca_init, "_EXACT_SIZE", 100)
    monkeypatch.setattr(pca_init, "_EXTRA_COLUMNS", 30)
    found, vectors = principal_components(samples, 20)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(20), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:15], exact[:15], rtol=1e-3, atol=0)
    assert found.sum() > 0.999 * exact.sum()


def test_augmented_copies_fit_other_images_better():
    # A blob at a random position: a few images leave gaps between positions, which augmented copies close.
    def blobs(count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        positions = 10 + 12 * torch.rand(2, count, 1, 1, generator=generator)
        rows, columns = torch.arange(SIZE).view(1, -1, 1), torch.arange(SIZE).view(1, 1, -1)
        blob = torch.exp(-((rows - positions[0]) ** 2 + (columns - positions[1]) ** 2) / 8)
        return (255 * blob)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)

    others = blobs(100, 1).float() / 127.5 - 1
    errors = []
    for copies in (0, 4):
        model = model_for("vector", latent_channels=24)
        fit_pca_branch(model, blobs(24, 0), NOISE, copies)
        small = F.avg_pool2d(others, 2)
        branch = model.pca_branch
        errors.append((branch.decoder(branch.encoder(others)) - small).square().mean())
    assert errors[1] < 0.8 * errors[0], errors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_are_centered_and_white(layout):
    model, images = model_for(layout), some_images()
    result = fit_pca_branch(model, images, NOISE)
    count = model.config.latent_channels
    assert result["components"] == count
    latents = as_rows(model.encode(with_flips(images)).latent_dist.mean)
    np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(latents.T @ latents / len(latents), np.eye(count), atol=1e-4)
    _, variances, _ = pca(patches(images, model.config.pca_size, model.config.latent_size))
    assert result["kept_fraction"] == pytest.approx(variances[:count].sum() / variances.sum(), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_at_the_size_of_encoding_is_the_pca_reconstruction(layout):
    pca_size, latent_size = SETTINGS[layout]["pca_size"], SETTINGS[layout]["latent_size"]
    model, images = model_for(layout, pca_decode_size=pca_size), some_images()
    fit_pca_branch(model, images, NOISE)
    rows = patches(images, pca_size, latent_size)
    mean, _, components = pca(rows)
    expected = mean + (rows - mean) @ projector(components[:, : model.config.latent_channels])
    with torch.no_grad():
        decoded = model.pca_branch.decoder(model.encode(with_flips(images)).latent_dist.mean)
    np.testing.assert_allclose(as_rows(F.pixel_unshuffle(decoded, pca_size // latent_size)), expected, atol=1e-4)


def test_patches_of_an_odd_size():
    images = some_images()[..., 4:28, 4:28]
    model = model_for("vector", sample_size=24, latent_channels=20, pca_size=3, pca_decode_size=3)
    fit_pca_branch(model, images, NOISE)
    rows = patches(images, 3, 1)
    mean, variances, components = pca(rows)
    latents = model.encode(with_flips(images)).latent_dist.mean
    white = as_rows(latents)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(20), atol=1e-4)
    expected = mean + (rows - mean) @ projector(components[:, :20])
    np.testing.assert_allclose(model.pca_branch.decoder(latents).detach().flatten(1), expected, atol=1e-4)


@pytest.mark.parametrize("decode_size", [16, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_at_a_larger_size_is_the_least_squares_solution(layout, decode_size):
    model, images = model_for(layout, pca_decode_size=decode_size), some_images()
    fit_pca_branch(model, images, NOISE)
    with torch.no_grad():
        latents = model.encode(with_flips(images)).latent_dist.mean
        decoded = model.pca_branch.decoder(latents)
    known = as_rows(latents)
    known = np.concatenate([known, np.ones((len(known), 1))], axis=1)
    targets = patches(images, decode_size, model.config.latent_size)
    solution = np.linalg.lstsq(known, targets, rcond=None)[0]
    p = decode_size // model.config.latent_size
    np.testing.assert_allclose(as_rows(F.pixel_unshuffle(decoded, p)), known @ solution, atol=1e-4)
    linear = model.pca_branch.decoder.linear
    np.testing.assert_allclose(linear.weight.detach().T, solution[:-1], atol=1e-4)
    np.testing.assert_allclose(linear.bias.detach(), solution[-1], atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_reconstruction_is_the_enlarged_pca_image(layout):
    model, images = model_for(layout), some_images()
    fit_pca_branch(model, images, NOISE)
    pixels = with_flips(images)[:5]
    with torch.no_grad():
        output = model(pixels)
        pca_image = model.pca_branch.decoder(output.posterior.mean)
        enlarged = F.interpolate(pca_image, size=SIZE, mode="bicubic", align_corners=False)
    torch.testing.assert_close(output.sample, enlarged, rtol=0, atol=1e-6)
    error = (output.sample - pixels).square().mean()
    assert error < 0.6 * (pixels - pixels.mean(dim=0)).square().mean()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_noise_adds_the_given_fraction_of_the_squared_error(layout):
    pca_size, latent_size = SETTINGS[layout]["pca_size"], SETTINGS[layout]["latent_size"]
    model, images = model_for(layout, pca_decode_size=pca_size), some_images()
    fit_pca_branch(model, images, NOISE)
    count = model.config.latent_channels
    _, variances, _ = pca(patches(images, pca_size, latent_size))
    residual = variances[count:].sum()
    sigma2 = model.logvar_bias.bias.detach().exp().double().numpy()
    np.testing.assert_allclose(variances[:count] * sigma2, NOISE * residual / count, rtol=1e-3)
    # Squared error that a sample from the posterior adds to a decoded patch.
    columns = model.pca_branch.decoder.linear.weight.detach().double().numpy()
    added = (columns**2).sum(axis=0) @ sigma2
    assert added == pytest.approx(NOISE * residual, rel=1e-3)
    posterior = model.encode(with_flips(images)[:3]).latent_dist
    for position in posterior.logvar.permute(0, 2, 3, 1).reshape(-1, count):
        assert torch.equal(position, model.logvar_bias.bias)


@pytest.mark.parametrize(("layout", "count"), [("vector", 30), ("spatial", 3)])
def test_channels_below_the_water_level_start_at_the_prior(layout, count):
    model, images = model_for(layout, latent_channels=count), some_images()
    fit_pca_branch(model, images, 1.0)
    _, variances, _ = pca(patches(images, model.config.pca_size, model.config.latent_size))
    level = variances[count:].sum() / count
    at_prior = variances[:count] < level
    assert 0 < at_prior.sum() < count
    sigma2 = model.logvar_bias.bias.detach().exp().double().numpy()
    np.testing.assert_allclose(sigma2, np.where(at_prior, 1.0, level / variances[:count]), rtol=1e-3)
    assert (sigma2[at_prior] == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reported_kl_is_that_of_the_posterior(layout):
    model, images = model_for(layout), some_images()
    result = fit_pca_branch(model, images, NOISE)
    kl = model.encode(with_flips(images)).latent_dist.kl().mean().item() / model.config.latent_dim
    assert kl > 0.1
    assert result["kl_per_dimension"] == pytest.approx(kl, rel=1e-4)
    # The means of whitened latents contribute 1/2 on average.
    logvar = model.logvar_bias.bias.detach()
    assert kl == pytest.approx(0.5 * (logvar.exp() - logvar).mean().item(), rel=1e-3)


def test_the_fraction_of_the_contrast_in_the_mean():
    rows = patches(some_images(), 16, 1).reshape(-1, 3, 256)
    of_mean, rest = rows.mean(axis=0).var(axis=1).sum(), rows.var(axis=0).mean(axis=1).sum()
    assert pca_init.mean_fraction(some_images(), 16) == pytest.approx(of_mean / (of_mean + rest), rel=1e-5)


def test_images_that_the_pca_branch_does_not_describe_give_a_warning(caplog):
    model, images = model_for("spatial"), some_images()
    fit_pca_branch(model, images, NOISE)
    of_more_contrast = (3 * (images.float() - 128) + 128).clamp(0, 255).to(torch.uint8)
    for given, expected in ((images, False), (of_more_contrast, True)):
        caplog.clear()
        pca_init.check_images(model, given, fitted_to="model_weights/vae_base")
        assert ("the PCA branch of model_weights/vae_base was fitted to other images" in caplog.text) == expected


def test_images_that_are_not_aligned_give_a_warning(monkeypatch, caplog):
    portraits = np.stack([render_portrait(seed)[0][20:198] for seed in range(48)])
    faces = F.adaptive_avg_pool2d(torch.from_numpy(portraits).permute(0, 3, 1, 2).float(), SIZE).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    shifts = torch.randint(0, SIZE, (48, 2), generator=generator).tolist()
    shifted = torch.stack([face.roll(shift, dims=(1, 2)) for face, shift in zip(faces, shifts)])
    for images, expected in ((faces, False), (shifted, True)):
        monkeypatch.setattr(setup, "first_training_images", lambda *arguments, images=images: images)
        caplog.clear()
        setup._fit_pca_branch(Config(), model_for("vector"), torch.device("cpu"))
        assert ("do not look like aligned faces" in caplog.text) == expected


def test_too_few_images_leave_channels_at_the_prior(caplog):
    model, images = model_for("vector"), some_images(5)
    with caplog.at_level(logging.WARNING):
        result = fit_pca_branch(model, images, NOISE)
    # The mean takes one dimension of the symmetric parts and none of the antisymmetric ones.
    assert result["components"] == 4 + 5
    assert "found 9 components for 40 latent channels in 5 images" in caplog.text
    posterior = model.encode(with_flips(some_images(3, seed=9))).latent_dist
    assert (posterior.mean[:, 9:] == 0).all()
    assert (posterior.logvar[:, 9:] == 0).all()
    assert (model.pca_branch.decoder.linear.weight[:, 9:].abs() < 1e-6).all()
    assert (posterior.logvar[:, :9] < 0).all()
    fitted = model.encode(with_flips(images)).latent_dist
    white = as_rows(fitted.mean)[:, :9]
    np.testing.assert_allclose(white.T @ white / 10, np.eye(9), atol=1e-3)
    # Nine components span five images and their flips, so the PCA images are the 16 px images.
    small = F.avg_pool2d(with_flips(images), 2)
    enlarged = F.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False)
    np.testing.assert_allclose(model(with_flips(images)).sample.detach(), enlarged, atol=1e-3)
    kl = fitted.kl().mean().item() / model.config.latent_dim
    assert result["kl_per_dimension"] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gray_images_have_a_third_of_the_components(layout):
    gray = some_images()[:, :1].repeat(1, 3, 1, 1)
    model = model_for(layout, latent_channels=48, pca_size=SETTINGS[layout]["latent_size"] * 4)
    result = fit_pca_branch(model, gray, NOISE)
    assert result["components"] == 16
    assert all(math.isfinite(value) for value in result.values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert result["kept_fraction"] == pytest.approx(1, abs=1e-5)
    sample = model(with_flips(gray)).sample
    assert (sample[:, 0] - sample[:, 1]).abs().max() < 1e-4


def test_a_second_initialization_replaces_the_first():
    model, again, images = model_for("vector"), model_for("vector"), some_images(5)
    fit_pca_branch(model, some_images(seed=5), NOISE)  # of more components
    fit_pca_branch(model, images, NOISE)
    fit_pca_branch(again, images, NOISE)
    for (name, left), right in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_unusable_images_are_refused():
    model = model_for("vector")
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fit_pca_branch(model, some_images(1), NOISE)
    with pytest.raises(ValueError, match="the 4 images are identical"):
        fit_pca_branch(model, torch.full((4, 3, SIZE, SIZE), 77, dtype=torch.uint8), NOISE)
    with pytest.raises(ValueError, match=r"uint8 images of shape \(n, 3, 32, 32\), got torch.float32"):
        fit_pca_branch(model, some_images(4).float(), NOISE)
    with pytest.raises(ValueError, match=r"uint8 images of shape \(n, 3, 32, 32\), got torch.uint8 \(4, 3, 16, 16\)"):
        fit_pca_branch(model, some_images(4)[..., :16, :16], NOISE)
    with pytest.raises(ValueError, match="no PCA branch to initialize: set model.pca_size"):
        fit_pca_branch(model_for("vector", pca_size=None), some_images(4), NOISE)
