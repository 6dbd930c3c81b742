"""Priors: what is fitted is what is drawn, on disk and back, and with the model where this project is absent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import ledoit_wolf

from modeling import AutoencoderKLUltra
from modeling.latent_prior import LatentPrior, VelocityField, fit_gaussian, shrunk_correlation
from training.priors import fit as fit_prior
from training.priors.fit import fit_flow, fit_mixture, flow_loss
from training.priors.sample import Faces
from training.publish.export import export_model

NUMBERS = 16  # of the tiny model's latent


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(count: int, numbers: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws of a known Gaussian, its mean and covariance."""
    mixing = torch.randn(numbers, numbers, generator=seeded(99))
    mean = torch.arange(numbers, dtype=torch.float32)
    return mean + torch.randn(count, numbers, generator=seeded(seed)) @ mixing.T, mean, mixing @ mixing.T


def exact_faces(latents: torch.Tensor) -> Faces:
    """Faces whose posteriors have no spread and whose thumbnails are their latents."""
    return Faces(latents, torch.zeros_like(latents), latents[:, None, None, :])


def energy_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| (Szekely and Rizzo 2013), 0 for equal distributions."""

    def within(rows):
        return torch.cdist(rows, rows).sum() / (len(rows) * (len(rows) - 1))

    return float(2 * torch.cdist(one, other).mean() - within(one) - within(other))


def moons(count: int, seed: int) -> torch.Tensor:
    """Two interleaved half circles of radius 1, blurred."""
    random = seeded(seed)
    angle = torch.pi * torch.rand(count, generator=random)
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.rand(count, generator=random) < 0.5
    points[lower] = torch.tensor([1.0, 0.5]) - points[lower]
    return points + 0.05 * torch.randn(count, 2, generator=random)


# ---- Gaussian ----


def test_samples_of_the_gaussian_have_the_fitted_mean_and_covariance():
    latents, mean, covariance = correlated(8_000)
    prior, weight = fit_gaussian(latents)
    assert 0 <= weight < 0.01  # many rows: next to nothing is shrunk
    drawn = prior.sample(8_000, seeded(1))
    # The standard error of a covariance is at most sqrt(2 C_ii C_jj / n); two samples of it, at five standard errors.
    spread = covariance.diagonal().sqrt()
    error = 5 * 2 * (1 / 8_000) ** 0.5
    assert ((drawn.mean(dim=0) - mean) / spread).abs().max() < error
    assert ((drawn.T.cov() - covariance) / spread[:, None] / spread).abs().max() < error


def test_shrinkage_is_that_of_scikit_learn():
    rows = correlated(30, numbers=40)[0]
    rows = ((rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0)).double()
    found, weight = shrunk_correlation(rows)
    wanted, wanted_weight = ledoit_wolf(rows.numpy(), assume_centered=True)
    assert weight == pytest.approx(wanted_weight, abs=1e-9) and 0.05 < weight < 1
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)
    prior, _ = fit_gaussian(rows.float())  # fewer rows than numbers: still of full rank
    assert torch.linalg.matrix_rank(prior.factor) == 40


def test_white_numbers_come_in_the_order_of_what_they_explain_of_the_images():
    """All numbers are white, so only the images say that the fourth matters most, then the second."""
    latents = torch.randn(4000, 6, generator=seeded())
    images = torch.stack([5 * latents[:, 3], 2 * latents[:, 1]], dim=1)[:, None, None, :]
    prior, _ = fit_gaussian(latents, images)
    unit = prior.factor / prior.factor.norm(dim=0)
    assert unit[3, 0].abs() > 0.99 and unit[1, 1].abs() > 0.99


def test_temperature_scales_around_the_mean():
    prior, _ = fit_gaussian(correlated(500)[0])
    cool, warm = (prior.sample(10, seeded(3), temperature) for temperature in (0.5, 1.0))
    torch.testing.assert_close(cool - prior.mean, 0.5 * (warm - prior.mean))
    assert torch.equal(prior.sample(2, seeded(), 0.0), prior.mean.expand(2, -1))


def test_one_face_is_no_distribution():
    with pytest.raises(ValueError, match="1 faces determine no prior"):
        fit_gaussian(torch.zeros(1, 4))


# ---- mixture ----


def two_clusters(count: int, seed: int) -> torch.Tensor:
    """70 % around (3, 0, ...), 30 % around (-3, 0, ...), with deviations 0.3 and 0.6."""
    random = seeded(seed)
    first = torch.rand(count, 1, generator=random) < 0.7
    noise = torch.randn(count, 5, generator=random)
    center = torch.tensor([3.0, 0, 0, 0, 0])
    return torch.where(first, center + 0.3 * noise, -center + 0.6 * noise)


def test_the_mixture_finds_two_clusters_and_their_weights():
    gaussian, _ = fit_gaussian(two_clusters(3000, 0), two_clusters(3000, 0)[:, None, None])
    prior, facts = fit_mixture(gaussian, exact_faces(two_clusters(3000, 0)), exact_faces(two_clusters(1000, 1)))
    assert facts["component_dims"] == 5 and facts["held_out_gain_nats"] > 1
    drawn = prior.sample(4000, seeded(2))
    right = drawn[:, 0] > 0
    assert right.float().mean() == pytest.approx(0.7, abs=5 * (0.7 * 0.3 * (1 / 4000 + 1 / 3000)) ** 0.5)
    for side, center, deviation in ((right, 3, 0.3), (~right, -3, 0.6)):
        assert drawn[side, 0].mean() == pytest.approx(center, abs=0.1)
        assert drawn[side].std(dim=0).numpy() == pytest.approx(np.full(5, deviation), rel=0.12)


def test_a_mixture_leaves_the_other_numbers_as_the_gaussian_has_them(monkeypatch):
    monkeypatch.setattr(fit_prior, "_MIXTURES", [(4, 2)])
    latents, mean, covariance = correlated(4000, numbers=12)
    gaussian, _ = fit_gaussian(latents)
    prior, facts = fit_mixture(gaussian, exact_faces(latents), exact_faces(correlated(1000, 12, seed=5)[0]))
    assert facts["component_dims"] == 4 and facts["held_out_gain_nats"] < 0.1  # there is nothing to find
    drawn, spread = prior.sample(4000, seeded(1)), covariance.diagonal().sqrt()
    assert ((drawn.T.cov() - covariance) / spread[:, None] / spread).abs().max() < 0.15
    assert ((drawn.mean(dim=0) - mean) / spread).abs().max() < 0.15


def test_too_few_faces_for_a_mixture_are_refused():
    latents = correlated(10)[0]
    with pytest.raises(ValueError, match="10 faces are too few for a mixture"):
        fit_mixture(fit_gaussian(latents)[0], exact_faces(latents), exact_faces(latents))


# ---- flow ----


def test_an_untrained_flow_is_the_gaussian():
    prior = LatentPrior("flow", numbers=3, width=8, blocks=1, steps=16)
    white = torch.randn(200, 3, generator=seeded())
    torch.testing.assert_close(prior.carry(white), white, atol=5e-3, rtol=0)


def test_the_start_of_the_velocity_field_is_the_best_one_for_a_standard_normal():
    """Against least squares on many pairs: the slope of x_1 - x_0 on x_t, equation 9's expectation."""
    field = VelocityField(1, width=8, blocks=1)
    noise, white = torch.randn(2, 200_000, 1, generator=seeded())
    for time in (0.1, 0.5, 0.8):
        positions = (1 - time) * noise + time * white
        slope = ((white - noise) * positions).mean() / positions.square().mean()
        with torch.no_grad():
            found = field(torch.ones(1, 1), torch.tensor([time]))
        assert found.item() == pytest.approx(slope.item(), abs=0.01)


def test_flow_loss_of_the_true_velocity_is_zero():
    noise, white = torch.randn(2, 7, 3, generator=seeded())
    t = torch.linspace(0, 1, 7)
    assert flow_loss(lambda x, time: white - noise, noise, white, t) == 0
    assert flow_loss(lambda x, time: x, noise, white, torch.zeros(7)) > 0  # there positions are the noise


def test_the_flow_draws_moons_where_the_gaussian_draws_a_blob():
    train, held_out, fresh = moons(2000, 0), moons(1000, 1), moons(1000, 2)
    gaussian, _ = fit_gaussian(train)
    prior, facts = fit_flow(
        gaussian, exact_faces(train), exact_faces(held_out), steps=400, width=64, blocks=2, learning_rate=3e-3
    )
    assert facts["held_out_loss"] < 0.98 * facts["gaussian_loss"] and facts["best_step"] > 0
    flow = energy_distance(prior.sample(1000, seeded(3)), fresh)
    blob = energy_distance(gaussian.sample(1000, seeded(3)), fresh)
    standard = energy_distance(torch.randn(1000, 2, generator=seeded(3)), fresh)
    assert flow < 0.5 * blob and flow < 0.05 * standard, (flow, blob, standard)


def test_the_flow_draws_plain_and_busy_faces_where_the_gaussian_knows_their_mean_only():
    """Coefficients that are small together in one half of the faces, and large together in the other."""

    def scaled(count: int, seed: int) -> torch.Tensor:
        random = seeded(seed)
        scale = torch.tensor([0.4, 1.36])[torch.randint(0, 2, (count, 1), generator=random)]
        return scale * torch.randn(count, 24, generator=random)

    def spread(rows: torch.Tensor) -> float:
        return rows.square().mean(dim=1).log().std().item()

    train, held_out, fresh = scaled(2000, 0), scaled(1000, 1), scaled(1000, 2)
    gaussian, _ = fit_gaussian(train)
    prior, _ = fit_flow(
        gaussian, exact_faces(train), exact_faces(held_out), steps=300, width=48, blocks=1, learning_rate=3e-3
    )
    assert spread(gaussian.sample(1000, seeded(3))) < 0.3 * spread(fresh)
    assert spread(prior.sample(1000, seeded(3))) == pytest.approx(spread(fresh), rel=0.2)


def test_a_flow_that_learns_nothing_true_of_others_stays_the_gaussian():
    """Three faces known by heart, and held-out ones that are plain normal: step 0 is kept."""
    gaussian, _ = fit_gaussian(torch.randn(2000, 8, generator=seeded()))
    three = exact_faces(10 * torch.randn(3, 8, generator=seeded(1)))
    prior, facts = fit_flow(gaussian, three, exact_faces(torch.randn(500, 8, generator=seeded(2))), steps=60, width=32)
    assert facts["best_step"] == 0 and facts["held_out_loss"] == facts["gaussian_loss"]
    torch.testing.assert_close(prior.sample(50, seeded()), gaussian.sample(50, seeded()), atol=0.05, rtol=0)


# ---- drawing ----


def priors() -> dict[str, LatentPrior]:
    """One of each kind, in which every parameter tells."""
    made = {
        "gaussian": LatentPrior("gaussian", numbers=NUMBERS),
        "mixture": LatentPrior("mixture", numbers=NUMBERS, components=3, component_dims=5),
        "flow": LatentPrior("flow", numbers=NUMBERS, width=12, blocks=2, steps=4),
    }
    for prior in made.values():
        for name, parameter in prior.named_parameters():
            if name != "component_weights":
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(len(name)))
        prior.eval()
    return made


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
def test_a_generator_gives_the_same_latents_in_parts(kind):
    prior, parts = priors()[kind], seeded(7)
    whole = prior.sample(5, seeded(7))
    torch.testing.assert_close(torch.cat([prior.sample(2, parts), prior.sample(3, parts)]), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
def test_saved_and_loaded_samples_are_bit_equal(kind, tmp_path):
    prior = priors()[kind]
    prior.save_pretrained(tmp_path / kind)
    assert not [file.name for file in (tmp_path / kind).iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    loaded = LatentPrior.from_pretrained(tmp_path / kind)
    assert torch.equal(loaded.sample(9, seeded()), prior.sample(9, seeded()))


@pytest.mark.parametrize(
    "arguments",
    [{"kind": "vae"}, {"kind": "mixture"}, {"kind": "mixture", "components": 2, "component_dims": 99}]
    + [{"kind": "flow", "width": 0, "blocks": 1}],
)
def test_shapes_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError, match=r"use one of|at least"):
        LatentPrior(numbers=16, **arguments)


# ---- with the model ----


def model() -> AutoencoderKLUltra:
    """The tiny model, in which latents reach the image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoencoderKLUltra(**tiny.SETTINGS["model"])
        for parameter in made.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return made.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with all priors, and its folder."""
    folder, made = tmp_path_factory.mktemp("saved") / "model", model()
    for name, prior in priors().items():
        made.set_prior(name, prior)
    auto_class = AutoencoderKLUltra._auto_class
    export_model(made, folder)
    AutoencoderKLUltra._auto_class = auto_class
    return made, folder


@pytest.mark.parametrize("prior", ["standard", "gaussian", "mixture", "flow"])
def test_a_loaded_model_samples_what_the_saved_one_did(saved, prior):
    made, folder = saved
    wanted = made.sample(3, prior, seeded(1), temperature=0.8)
    assert wanted.shape == (3, 3, 40, 40) and wanted.abs().max() <= 1 and wanted.std() > 0.01
    assert torch.equal(AutoencoderKLUltra.from_pretrained(folder).sample(3, prior, seeded(1), temperature=0.8), wanted)


def test_the_standard_prior_is_standard_normal_and_decoding_in_parts_changes_nothing():
    made = model()
    latents = made.sample_latents(2000, "standard", seeded())
    assert latents.shape == (2000, NUMBERS, 1, 1)
    assert latents.mean().abs() < 5 / 32_000**0.5 and (latents.std() - 1).abs() < 5 / 64_000**0.5
    assert torch.equal(made.sample_latents(4, temperature=0.5, generator=seeded()), 0.5 * latents[:4])
    whole, parts = (made.sample(5, generator=seeded(), batch_size=size) for size in (5, 2))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_priors_are_fetched_when_asked_for_and_saved_again(saved, tmp_path):
    made, folder = saved
    loaded = AutoencoderKLUltra.from_pretrained(folder)
    assert loaded._priors == {}
    loaded.sample(1, "flow")
    assert list(loaded._priors) == ["flow"]
    loaded.save_pretrained(tmp_path / "again")
    for name in ("gaussian", "mixture", "flow"):
        file = f"priors/{name}/diffusion_pytorch_model.safetensors"
        one, other = load_file(folder / file), load_file(tmp_path / "again" / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(
        AutoencoderKLUltra.from_pretrained(tmp_path / "again").sample(1, "mixture", seeded()),
        made.sample(1, "mixture", seeded()),
    )


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # diffusers' own call
def test_priors_of_a_repository_are_found_in_the_hubs_cache(saved, tmp_path):
    made, folder = saved
    commit = "0" * 40
    repository = tmp_path / "models--someone--faces"
    shutil.copytree(folder, repository / "snapshots" / commit)
    shutil.rmtree(repository / "snapshots" / commit / "priors" / "mixture")
    missing = repository / ".no_exist" / commit / "priors" / "mixture" / "config.json"
    for file, text in ((repository / "refs" / "main", commit), (missing, "")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    loaded = AutoencoderKLUltra.from_pretrained("someone/faces", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(loaded.sample(2, "flow", seeded()), made.sample(2, "flow", seeded()))
    with pytest.raises(OSError):  # without a network nobody can tell
        loaded.sample(1, "mixture")
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again" / "priors").iterdir()) == ["flow", "gaussian"]


def test_a_file_that_lacks_weights_is_refused(tmp_path):
    priors()["gaussian"].save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"mean": load_file(file)["mean"]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack factor"):
        LatentPrior.from_pretrained(tmp_path)


def test_the_model_counts_and_moves_without_its_priors(saved):
    made, plain = saved[0], model()
    assert made.num_parameters() == plain.num_parameters()
    assert made.state_dict().keys() == plain.state_dict().keys()


def test_a_missing_prior_is_named_with_those_there_and_the_command(tmp_path):
    made = model()
    with pytest.raises(ValueError, match=r"no fitted prior 'flow' \(it has standard\).*training.fit_prior MODEL"):
        made.sample(1, "flow")
    made.set_prior("gaussian", priors()["gaussian"])
    made.save_pretrained(tmp_path)
    loaded = AutoencoderKLUltra.from_pretrained(tmp_path)
    wanted = rf"\(it has standard, gaussian\).*fit_prior {tmp_path} --data IMAGES --priors mixture"
    with pytest.raises(ValueError, match=wanted):
        loaded.sample(1, "mixture")
    with pytest.raises(ValueError, match="prior 'normal' does not exist: use one of standard, gaussian"):
        loaded.sample(1, "normal")
    with pytest.raises(ValueError, match="over 4 numbers and the latent has 16"):
        made.set_prior("gaussian", LatentPrior("gaussian", numbers=4))
    with pytest.raises(ValueError, match="num_images is 0"):
        made.sample(0)
    with pytest.raises(ValueError, match="temperature -1"):
        made.sample(1, temperature=-1)


def test_the_spatial_layout_takes_the_numbers_as_channels_rows_columns():
    settings = tiny.SETTINGS["model"] | {"latent_layout": "spatial", "latent_channels": 4, "latent_size": 5}
    made = AutoencoderKLUltra(**settings | {"latent_dim": 100}).eval()
    prior = LatentPrior("gaussian", numbers=100)
    prior.mean.data.copy_(torch.arange(100))
    made.set_prior("gaussian", prior)
    latents = made.sample_latents(2, "gaussian", temperature=0.0)
    assert torch.equal(latents, torch.arange(100.0).view(1, 4, 5, 5).expand(2, -1, -1, -1))
    assert made.sample(2, "gaussian").shape == (2, 3, 40, 40)


LOADER = """
import sys, torch
from diffusers import AutoModel
from safetensors.torch import save_file
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
images = {}
for name in ("standard", "gaussian", "mixture", "flow"):
    images[name] = model.sample(3, name, torch.Generator().manual_seed(1), temperature=0.8)
alone = AutoModel.from_pretrained(folder + "/priors/flow", trust_remote_code=True)
for found in (model, model.get_prior("flow"), alone):
    assert type(found).__module__.startswith("diffusers_modules."), type(found)
assert not [name for name in sys.modules if name.split(".")[0] in ("modeling", "training")]
model.save_pretrained(folder + "/again")
save_file(images, folder + "/images.safetensors")
"""


def test_remote_code_samples_the_same_where_the_project_is_absent(saved, tmp_path):
    made, folder = saved
    home = {name: str(tmp_path) for name in ("HOME", "HF_HOME")} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", **home}
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADER, str(folder)],
        cwd=tmp_path,
        env=environment | threads,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stderr
    for name, images in load_file(folder / "images.safetensors").items():
        assert torch.equal(images, made.sample(3, name, seeded(1), temperature=0.8)), name
    # Saved from there, the priors still bring their source.
    config = json.loads((folder / "again/priors/flow/config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "latent_prior.LatentPrior"}
    assert (folder / "again/priors/flow/latent_prior.py").is_file()
