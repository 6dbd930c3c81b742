"""Priors: samples follow the fitted distribution, and a saved prior samples the same after loading."""

from __future__ import annotations

import accelerate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import ledoit_wolf

from modeling.latent_prior import LatentPrior, VelocityField, fit_gaussian, shrunk_correlation
from training.priors import fit as fit_module
from training.priors.fit import fit_flow, fit_mixture, flow_loss
from training.priors.latents import FaceLatents

LATENT_DIM = 16  # of the tiny model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(count: int, latent_dim: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples of a known Gaussian, its mean and covariance."""
    mixing = torch.randn(latent_dim, latent_dim, generator=generator(99))
    mean = torch.arange(latent_dim, dtype=torch.float32)
    return mean + torch.randn(count, latent_dim, generator=generator(seed)) @ mixing.T, mean, mixing @ mixing.T


def exact_faces(latents: torch.Tensor) -> FaceLatents:
    """Faces whose posteriors have no variance and whose thumbnails are their latents."""
    return FaceLatents(latents, torch.zeros_like(latents), latents[:, None, None, :])


def energy_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| (Szekely and Rizzo 2013), 0 for equal distributions."""

    def within(points):
        return torch.cdist(points, points).sum() / (len(points) * (len(points) - 1))

    return float(2 * torch.cdist(one, other).mean() - within(one) - within(other))


def moons(count: int, seed: int) -> torch.Tensor:
    """Two interleaved half circles of radius 1, with noise."""
    random = generator(seed)
    angle = torch.pi * torch.rand(count, generator=random)
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.rand(count, generator=random) < 0.5
    points[lower] = torch.tensor([1.0, 0.5]) - points[lower]
    return points + 0.05 * torch.randn(count, 2, generator=random)


# ---- Gaussian ----


def test_samples_of_the_gaussian_have_the_fitted_mean_and_covariance():
    latents, mean, covariance = correlated(8_000)
    prior, weight = fit_gaussian(latents)
    assert 0 <= weight < 0.01  # many samples: almost no shrinkage
    samples = prior.sample(8_000, generator(1))
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


def test_whitened_dimensions_are_ordered_by_what_they_explain_of_the_images():
    """The latents are white; the images depend on dimension 3 most, then on dimension 1."""
    latents = torch.randn(4000, 6, generator=generator())
    images = torch.stack([5 * latents[:, 3], 2 * latents[:, 1]], dim=1)[:, None, None, :]
    prior, _ = fit_gaussian(latents, images)
    directions = prior.factor / prior.factor.norm(dim=0)
    assert directions[3, 0].abs() > 0.99 and directions[1, 1].abs() > 0.99


def test_temperature_scales_around_the_mean():
    prior, _ = fit_gaussian(correlated(500)[0])
    cool, warm = (prior.sample(10, generator(3), temperature) for temperature in (0.5, 1.0))
    torch.testing.assert_close(cool - prior.mean, 0.5 * (warm - prior.mean))
    assert torch.equal(prior.sample(2, generator(), 0.0), prior.mean.expand(2, -1))


def test_one_face_is_too_few():
    with pytest.raises(ValueError, match="at least 2 faces, got 1"):
        fit_gaussian(torch.zeros(1, 4))


# ---- mixture ----


def two_clusters(count: int, seed: int) -> torch.Tensor:
    """70 % around (3, 0, ...), 30 % around (-3, 0, ...), with standard deviations 0.3 and 0.6."""
    random = generator(seed)
    first = torch.rand(count, 1, generator=random) < 0.7
    noise = torch.randn(count, 5, generator=random)
    center = torch.tensor([3.0, 0, 0, 0, 0])
    return torch.where(first, center + 0.3 * noise, -center + 0.6 * noise)


def test_the_mixture_finds_two_clusters_and_their_weights():
    gaussian, _ = fit_gaussian(two_clusters(3000, 0), two_clusters(3000, 0)[:, None, None])
    prior, report = fit_mixture(gaussian, exact_faces(two_clusters(3000, 0)), exact_faces(two_clusters(1000, 1)))
    assert report["component_dims"] == 5 and report["validation_gain_nats"] > 1
    samples = prior.sample(4000, generator(2))
    right = samples[:, 0] > 0
    assert right.float().mean() == pytest.approx(0.7, abs=5 * (0.7 * 0.3 * (1 / 4000 + 1 / 3000)) ** 0.5)
    for cluster, center, std in ((right, 3, 0.3), (~right, -3, 0.6)):
        assert samples[cluster, 0].mean() == pytest.approx(center, abs=0.1)
        assert samples[cluster].std(dim=0).numpy() == pytest.approx(np.full(5, std), rel=0.12)


def test_a_mixture_leaves_the_other_dimensions_gaussian(monkeypatch):
    monkeypatch.setattr(fit_module, "_MIXTURE_SIZES", [(4, 2)])
    latents, mean, covariance = correlated(4000, latent_dim=12)
    gaussian, _ = fit_gaussian(latents)
    prior, report = fit_mixture(gaussian, exact_faces(latents), exact_faces(correlated(1000, 12, seed=5)[0]))
    assert report["component_dims"] == 4 and report["validation_gain_nats"] < 0.1  # there is nothing to find
    samples, spread = prior.sample(4000, generator(1)), covariance.diagonal().sqrt()
    assert ((samples.T.cov() - covariance) / spread[:, None] / spread).abs().max() < 0.15
    assert ((samples.mean(dim=0) - mean) / spread).abs().max() < 0.15


def test_too_few_faces_for_a_mixture_raise():
    latents = correlated(10)[0]
    with pytest.raises(ValueError, match="10 faces are too few for a mixture"):
        fit_mixture(fit_gaussian(latents)[0], exact_faces(latents), exact_faces(latents))


# ---- flow ----


def test_an_untrained_flow_is_the_gaussian():
    prior = LatentPrior("flow", latent_dim=3, width=8, blocks=1, steps=16)
    noise = torch.randn(200, 3, generator=generator())
    torch.testing.assert_close(prior.integrate(noise), noise, atol=5e-3, rtol=0)


def test_the_initial_velocity_field_is_optimal_for_a_standard_normal():
    """Compared with least squares on many pairs: the slope of x_1 - x_0 on x_t, the expectation of equation 9."""
    field = VelocityField(1, width=8, blocks=1)
    noise, white = torch.randn(2, 200_000, 1, generator=generator())
    for time in (0.1, 0.5, 0.8):
        positions = (1 - time) * noise + time * white
        slope = ((white - noise) * positions).mean() / positions.square().mean()
        with torch.no_grad():
            velocity = field(torch.ones(1, 1), torch.tensor([time]))
        assert velocity.item() == pytest.approx(slope.item(), abs=0.01)


def test_flow_loss_of_the_true_velocity_is_zero():
    noise, white = torch.randn(2, 7, 3, generator=generator())
    t = torch.linspace(0, 1, 7)
    assert flow_loss(lambda x, time: white - noise, noise, white, t) == 0
    assert flow_loss(lambda x, time: x, noise, white, torch.zeros(7)) > 0  # there positions are the noise


def test_the_flow_fits_two_moons_better_than_the_gaussian():
    train, validation, fresh = moons(2000, 0), moons(1000, 1), moons(1000, 2)
    gaussian, _ = fit_gaussian(train)
    prior, report = fit_flow(
        gaussian, exact_faces(train), exact_faces(validation), steps=400, width=64, blocks=2, learning_rate=3e-3
    )
    assert report["validation_loss"] < 0.98 * report["gaussian_loss"] and report["best_step"] > 0
    flow_distance = energy_distance(prior.sample(1000, generator(3)), fresh)
    gaussian_distance = energy_distance(gaussian.sample(1000, generator(3)), fresh)
    standard_distance = energy_distance(torch.randn(1000, 2, generator=generator(3)), fresh)
    assert flow_distance < 0.5 * gaussian_distance and flow_distance < 0.05 * standard_distance


def test_the_flow_fits_a_mixture_of_scales():
    """All coefficients are small in one half of the faces, and large in the other."""

    def scaled(count: int, seed: int) -> torch.Tensor:
        random = generator(seed)
        scale = torch.tensor([0.4, 1.36])[torch.randint(0, 2, (count, 1), generator=random)]
        return scale * torch.randn(count, 24, generator=random)

    def spread(points: torch.Tensor) -> float:
        return points.square().mean(dim=1).log().std().item()

    train, validation, fresh = scaled(2000, 0), scaled(1000, 1), scaled(1000, 2)
    gaussian, _ = fit_gaussian(train)
    prior, _ = fit_flow(
        gaussian, exact_faces(train), exact_faces(validation), steps=300, width=48, blocks=1, learning_rate=3e-3
    )
    assert spread(gaussian.sample(1000, generator(3))) < 0.3 * spread(fresh)
    assert spread(prior.sample(1000, generator(3))) == pytest.approx(spread(fresh), rel=0.2)


def test_a_flow_that_overfits_stays_the_gaussian():
    """Three training faces, and standard normal validation faces: step 0 is kept."""
    gaussian, _ = fit_gaussian(torch.randn(2000, 8, generator=generator()))
    three = exact_faces(10 * torch.randn(3, 8, generator=generator(1)))
    prior, report = fit_flow(
        gaussian, three, exact_faces(torch.randn(500, 8, generator=generator(2))), steps=60, width=32
    )
    assert report["best_step"] == 0 and report["validation_loss"] == report["gaussian_loss"]
    torch.testing.assert_close(prior.sample(50, generator()), gaussian.sample(50, generator()), atol=0.05, rtol=0)


# ---- sampling ----


def random_priors() -> dict[str, LatentPrior]:
    """One of each kind, with random parameters that are the same in every test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        priors = {
            "gaussian": LatentPrior("gaussian", latent_dim=LATENT_DIM),
            "mixture": LatentPrior("mixture", latent_dim=LATENT_DIM, components=3, component_dims=5),
            "flow": LatentPrior("flow", latent_dim=LATENT_DIM, width=12, blocks=2, steps=4),
        }
    for prior in priors.values():
        for name, parameter in prior.named_parameters():
            if name != "component_weights":
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator(len(name)))
        prior.eval()
    return priors


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
def test_a_generator_gives_the_same_latents_in_parts_or_one_per_latent(kind):
    prior, continued = random_priors()[kind], generator(7)
    samples = prior.sample(5, generator(7))
    parts = torch.cat([prior.sample(2, continued), prior.sample(3, continued)])
    torch.testing.assert_close(parts, samples, atol=1e-5, rtol=1e-5)
    singles = torch.cat([prior.sample(1, generator(seed)) for seed in (3, 4)])
    torch.testing.assert_close(prior.sample(2, [generator(3), generator(4)]), singles, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
def test_a_loaded_prior_samples_bitwise_the_same(kind, tmp_path):
    prior = random_priors()[kind]
    prior.save_pretrained(tmp_path / kind)
    assert not [file.name for file in (tmp_path / kind).iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    loaded = LatentPrior.from_pretrained(tmp_path / kind)
    assert torch.equal(loaded.sample(9, generator()), prior.sample(9, generator()))


@pytest.mark.parametrize(
    "arguments",
    [{"kind": "vae"}, {"kind": "mixture"}, {"kind": "mixture", "components": 2, "component_dims": 99}]
    + [{"kind": "flow", "width": 0, "blocks": 1}],
)
def test_impossible_arguments_raise(arguments):
    with pytest.raises(ValueError, match=r"must be one of|at least"):
        LatentPrior(latent_dim=16, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
def test_half_precision_samples_nearly_the_same(kind, dtype):
    prior = random_priors()[kind]
    samples = prior.sample(4, generator())
    half = prior.to(dtype).sample(4, generator())
    assert half.dtype == dtype
    assert (half.float() - samples).norm() < 0.15 * samples.norm()


def test_a_file_that_lacks_weights_raises(tmp_path):
    random_priors()["gaussian"].save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"mean": load_file(file)["mean"]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack factor"):
        LatentPrior.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
def test_samples_are_the_same_with_offloaded_weights(kind):
    """Hooks of accelerate load weights in the `forward` of their own module."""
    prior = random_priors()[kind]
    samples = prior.sample(3, generator())
    accelerate.cpu_offload(prior, execution_device=torch.device("cpu"))
    assert prior.mean.is_meta
    assert torch.equal(prior.sample(3, generator()), samples)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
def test_layerwise_casting_samples_nearly_the_same(kind):
    prior = random_priors()[kind]
    samples = prior.sample(3, generator())
    prior.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    cast = prior.sample(3, generator())
    assert cast.dtype == torch.float32
    assert (cast - samples).norm() < 0.05 * samples.norm()
