"""The commands fit_prior and sample: from images to priors, reports and grids; distances from training faces."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from modeling.pipeline import FaceVAEPipeline
from training.priors import fit, sample
from training.priors.latents import compare_samples, encode_faces, nearest_distances

TRAIN, VALIDATION = 72, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- distances to training faces ----


def test_nearest_distances_equal_numpy():
    queries, references = torch.randn(130, 7, generator=generator()), torch.randn(40, 7, generator=generator(1))
    queries[5] = references[3]
    differences = queries.numpy()[:, None] - references.numpy()[None]
    expected = np.sqrt((differences**2).mean(axis=2)).min(axis=1)
    np.testing.assert_allclose(nearest_distances(queries, references).numpy(), expected, atol=1e-6)
    assert nearest_distances(queries, references)[5] == 0


def test_near_duplicates_of_training_faces_are_counted():
    vae = tiny.random_vae()
    images = torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8, generator=generator())
    faces = encode_faces(vae, images.split(8), with_flips=True)
    assert len(faces.mean) == 40
    latents = faces.mean[:, :, None, None]
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(images.flip(-1)[3:4] / 127.5 - 1).latent_dist.mean, latents[23:24])
    mixed = torch.cat([latents[30:33], latents[:2] + 5])
    samples = {"new": latents[:4] + 5, "mixed": mixed, "training": latents[:9]}
    report = compare_samples(FaceVAEPipeline(vae), samples, faces, None, 4)
    assert list(report) == ["training", "new", "mixed"]
    assert report["training"]["near_duplicates"] == 9 and report["training"]["latent_median"] == 0
    assert report["mixed"]["latent_min"] == 0 and report["new"]["latent_min"] > 0
    assert report["mixed"]["near_duplicates"] >= 3


# ---- the commands ----


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of smooth images, with a validation split."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        (folder / split).mkdir()
        for index in range(count):
            small = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
            small.resize((40, 40), Image.Resampling.BICUBIC).save(folder / split / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, photographs):
    """An exported model with all priors, fitted by the command; its report."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    tiny.random_vae().save_pretrained(folder)
    arguments = [str(folder), "--data", f"imagefolder:{photographs}", "--flow-steps", "5", "--num-samples", "6"]
    assert fit.main([*arguments, "--frechet", "st_alexnet", "--temperature", "1", "0.5"]) == 0
    return folder, json.loads((folder / "prior_report.json").read_text())


def test_the_command_fits_writes_and_compares(fitted):
    folder, report = fitted
    assert list(report["fits"]) == ["gaussian", "mixture", "flow"]
    kinds = [title for name in ("standard", "gaussian", "mixture", "flow") for title in (name, f"{name} at 0.5")]
    assert list(report["nearest"]) == ["training", "validation", *kinds]
    near = report["nearest"]
    assert near["gaussian at 0.5"]["latent_median"] < near["gaussian"]["latent_median"]
    for name, values in report["nearest"].items():
        assert values["images"] == {"training": 64, "validation": VALIDATION}.get(name, 6)
        assert all(math.isfinite(value) for value in values.values()) and values["frechet"] > 0
    assert sorted(path.name for path in (folder / "priors").iterdir()) == ["flow", "gaussian", "mixture"]


def test_the_gaussian_is_fitted_to_training_latents_and_those_of_flipped_images(fitted, photographs):
    pipe = FaceVAEPipeline.from_pretrained(fitted[0])
    pixels = [np.asarray(Image.open(path)) for path in sorted((photographs / "train").iterdir())]
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        means = pipe.vae.encode(torch.cat([pixels, pixels.flip(-1)])).latent_dist.mean.flatten(1)
        sigma = pipe.vae.encode(pixels).latent_dist.std.mean()
    prior = pipe.gaussian
    assert (prior.mean - means.mean(dim=0)).abs().max() < 5 * sigma / (2 * TRAIN) ** 0.5  # samples, not means
    assert prior.factor.square().sum() == pytest.approx(
        float(means.var(dim=0).sum() + len(prior.mean) * sigma**2), rel=0.1
    )


def grid(path, count: int, columns: int) -> np.ndarray:
    """The pixels of a grid of images of 40 pixels with borders of 2, whose size is checked."""
    image = Image.open(path)
    assert image.size == (columns * 42 + 2, count // columns * 42 + 2)
    return np.asarray(image)


def test_grids_depend_on_prior_and_seed_only(fitted, tmp_path):
    def sample_grid(*arguments: str) -> np.ndarray:
        command = [str(fitted[0]), "--num-samples", "4", "--output", str(tmp_path / "grid.png"), *arguments]
        assert sample.main(command) == 0
        return grid(tmp_path / "grid.png", 4, 2)

    first = sample_grid("--prior", "flow")
    assert (sample_grid("--prior", "flow") == first).all()
    for change in (["--prior", "gaussian"], ["--prior", "flow", "--seed", "1"], ["--prior", "standard"]):
        assert (sample_grid(*change) != first).any()


def test_temperatures_are_rows_of_the_same_noise(fitted, tmp_path):
    pipe = FaceVAEPipeline.from_pretrained(fitted[0])
    command = [str(fitted[0]), "--prior", "gaussian", "--num-samples", "3", "--temperature", "0", "1", "--seed", "4"]
    assert sample.main([*command, "--output", str(tmp_path / "grid.png")]) == 0
    pixels = grid(tmp_path / "grid.png", 6, 3)
    assert (pixels[2:42, 2:42] == pixels[2:42, 44:84]).all()  # at 0 all are the mean
    expected = pipe(3, "gaussian", generator=generator(4)).images[1]
    assert np.abs(pixels[44:84, 44:84].astype(int) - np.asarray(expected)).max() <= 1


def test_interpolations_between_samples_and_between_photographs(fitted, photographs, tmp_path):
    output = str(tmp_path / "new" / "grid.png")
    command = [str(fitted[0]), "--prior", "gaussian", "--output", output, "--interpolate"]
    assert sample.main([*command, "--num-samples", "2"]) == 0
    grid(output, 18, 9)
    images = [str(photographs / "train" / name) for name in ("0.png", "1.png", "2.png")]
    assert sample.main([*command, *images, "--linear"]) == 0
    pixels = grid(output, 18, 9)
    assert (pixels[2:42, -42:-2] == pixels[44:84, 2:42]).all()  # one interpolation ends where the next begins


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--output", "grid.txt"], "--output must end in .png"),
        (["missing"], "there is no folder missing"),
        (["MODEL", "--interpolate", "one.png"], "at least two images"),
        (["MODEL", "--interpolate", "one.png", "two.png"], "one.png is not a readable image"),
        (["MODEL", "--interpolate", "--temperature", "0.5", "1"], "one --temperature, got 2"),
        (["MODEL", "--temperature", "-1"], "at least 0, got -1.0"),
        (["MODEL", "--seed", str(2**64)], f"--seed must be from 0 to {2**64 - 1}, got {2**64}"),
        (["MODEL", "--seed", "-1"], "--seed must be from 0"),
        (["MODEL", "--device", "gpu"], "--device gpu"),
    ],
)
def test_user_errors_of_sample_are_one_line(fitted, arguments, message, capsys, tmp_path):
    command = [str(fitted[0]) if argument == "MODEL" else argument for argument in arguments]
    if "--output" not in command:  # before --interpolate, which takes what follows
        command[1:1] = ["--output", str(tmp_path / "x.png")]
    assert sample.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("interpolate", [[], ["--interpolate"], ["--interpolate", "IMAGE", "IMAGE"]])
def test_a_prior_that_was_not_fitted_is_an_error_with_the_remedy(photographs, tmp_path, capsys, interpolate):
    tiny.random_vae().save_pretrained(tmp_path / "model")
    image = str(photographs / "train" / "0.png")
    extra = [image if argument == "IMAGE" else argument for argument in interpolate]
    output = ["--output", str(tmp_path / "x.png")]
    assert sample.main([str(tmp_path / "model"), *output, "--prior", "gaussian", *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "python -m training.fit_prior" in error


def test_sample_takes_a_saved_pipeline_and_fit_prior_does_not(fitted, tmp_path, capsys):
    FaceVAEPipeline.from_pretrained(fitted[0]).save_pretrained(tmp_path / "pipeline")
    for name, model in (("a.png", fitted[0]), ("b.png", tmp_path / "pipeline")):
        assert sample.main([str(model), "--prior", "flow", "--num-samples", "4", "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert fit.main([str(tmp_path / "pipeline"), "--data", "synthetic_faces"]) == 2
    assert "is a saved pipeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --data or --config"),
        (["--data", "synthetic_faces", "--config", "configs/ultra.json"], "give either --data or --config"),
        (["--data", "imagefolder:/nowhere"], "not a folder"),
        (["--data", "parquet"], "write parquet:GLOB"),
        (["--data", "synthetic_faces", "--num-samples", "1"], "--num-samples must be at least 2, got 1"),
        (["--data", "synthetic_faces", "--temperature", "1", "-0.5"], "at least 0, got [1.0, -0.5]"),
        (["--data", "synthetic_faces", "--seed", str(2**64)], f"--seed must be from 0 to {2**64 - 1}, got {2**64}"),
        (["--data", "synthetic_faces", "--validation", "x.parquet"], "goes with --data parquet"),
        (["--data", "synthetic_faces", "--set", "data.crop_px=20"], "give --config"),
    ],
)
def test_user_errors_of_fit_prior_are_one_line(tmp_path, capsys, arguments, message):
    tiny.random_vae().save_pretrained(tmp_path)
    assert fit.main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert fit.main([str(tmp_path / "no"), "--data", "synthetic_faces"]) == 2
    assert "there is no folder" in capsys.readouterr().err
