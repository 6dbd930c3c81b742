"""Samples: ways between latents, distances to faces, and the two command lines from images to grids."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_latent_prior import model, seeded

from modeling import AutoencoderKLUltra
from training.priors import fit as fit_prior
from training.priors import sample
from training.priors.sample import compare, decode_latents, encode_faces, interpolate, nearest_distances, slerp

TRAIN, VALIDATION = 72, 6


# ---- ways and distances ----


def test_slerp_turns_evenly_and_keeps_the_length():
    east, north = torch.tensor([[[2.0]], [[0.0]]]), torch.tensor([[[0.0]], [[2.0]]])
    for fraction in (0.0, 0.25, 0.5, 1.0):
        angle = fraction * math.pi / 2
        wanted = torch.tensor([[[2 * math.cos(angle)]], [[2 * math.sin(angle)]]])
        torch.testing.assert_close(slerp(east, north, fraction), wanted)
    assert slerp(east, 3 * east, 0.5).flatten().tolist() == [4, 0]  # one direction: lengths only
    assert slerp(east, -east, 0.5).flatten().tolist() == [0, 0]
    assert torch.equal(slerp(torch.zeros(2), torch.ones(2), 0.5), torch.full((2,), 0.5))


def test_a_way_leads_around_the_priors_mean_or_straight():
    center = torch.tensor([10.0, 10.0]).view(2, 1, 1)
    start, end = (center + torch.tensor(offset).view(2, 1, 1) for offset in ([1.0, 0.0], [0.0, 1.0]))
    around, straight = (interpolate(start, end, center, 5, linear) for linear in (False, True))
    for way in (around, straight):
        torch.testing.assert_close(way[0], start)
        torch.testing.assert_close(way[-1], end)
    torch.testing.assert_close((around - center).flatten(1).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(straight[2], (start + end) / 2)


def test_nearest_distances_are_those_of_numpy():
    queries, references = torch.randn(130, 7, generator=seeded()), torch.randn(40, 7, generator=seeded(1))
    queries[5] = references[3]
    differences = queries.numpy()[:, None] - references.numpy()[None]
    wanted = np.sqrt((differences**2).mean(axis=2)).min(axis=1)
    np.testing.assert_allclose(nearest_distances(queries, references).numpy(), wanted, atol=1e-6)
    assert nearest_distances(queries, references)[5] == 0


def test_copies_of_training_faces_are_counted_and_new_faces_are_not():
    made = model()
    images = torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8, generator=seeded())
    faces = encode_faces(made, images.split(8), mirrored=True)
    assert len(faces.mean) == 40
    latents = faces.mean[:, :, None, None]
    with torch.no_grad():
        torch.testing.assert_close(made.encode(images.flip(-1)[3:4] / 127.5 - 1).latent_dist.mean, latents[23:24])
    drawn = {"new": latents[:4] + 5, "stolen": torch.cat([latents[30:33], latents[:2] + 5]), "copies": latents[:9]}
    report = compare(made, drawn, faces, None, 4)
    assert list(report) == ["copies", "new", "stolen"]
    assert report["copies"]["copies"] == 9 and report["copies"]["latent_median"] == 0
    assert report["stolen"]["latent_min"] == 0 and report["new"]["latent_min"] > 0
    assert report["stolen"]["copies"] >= 3


# ---- the command lines ----


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of smooth colours, with a split for validation."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        (folder / split).mkdir()
        for index in range(count):
            small = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
            small.resize((40, 40), Image.Resampling.BICUBIC).save(folder / split / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, photographs):
    """A saved model with all priors, fitted by the command; its report."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    model().save_pretrained(folder)
    arguments = [str(folder), "--data", f"imagefolder:{photographs}", "--flow-steps", "5", "--num-samples", "6"]
    assert fit_prior.main([*arguments, "--frechet", "st_alexnet", "--temperature", "1", "0.5"]) == 0
    return folder, json.loads((folder / "prior_report.json").read_text())


def test_the_command_fits_writes_and_compares(fitted):
    folder, report = fitted
    assert list(report["fits"]) == ["gaussian", "mixture", "flow"]
    kinds = [title for name in ("standard", "gaussian", "mixture", "flow") for title in (name, f"{name} at 0.5")]
    assert list(report["nearest"]) == ["copies", "held-out", *kinds]
    near = report["nearest"]
    assert near["gaussian at 0.5"]["latent_median"] < near["gaussian"]["latent_median"]
    for name, values in report["nearest"].items():
        assert values["images"] == {"copies": 64, "held-out": VALIDATION}.get(name, 6)
        assert all(math.isfinite(value) for value in values.values()) and values["frechet"] > 0
    assert sorted(path.name for path in (folder / "priors").iterdir()) == ["flow", "gaussian", "mixture"]


def test_the_fitted_gaussian_is_that_of_the_training_latents_and_their_mirror_images(fitted, photographs):
    made = AutoencoderKLUltra.from_pretrained(fitted[0])
    pixels = [np.asarray(Image.open(path)) for path in sorted((photographs / "train").iterdir())]
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        means = made.encode(torch.cat([pixels, pixels.flip(-1)])).latent_dist.mean.flatten(1)
        sigma = made.encode(pixels).latent_dist.std.mean()
    prior = made.get_prior("gaussian")
    assert (prior.mean - means.mean(dim=0)).abs().max() < 5 * sigma / (2 * TRAIN) ** 0.5  # draws, not means
    assert prior.factor.square().sum() == pytest.approx(
        float(means.var(dim=0).sum() + len(prior.mean) * sigma**2), rel=0.1
    )


def grid(path, count: int, columns: int) -> np.ndarray:
    """The pixels of a grid of images of 40 pixels with borders of 2, whose size is checked."""
    image = Image.open(path)
    assert image.size == (columns * 42 + 2, count // columns * 42 + 2)
    return np.asarray(image)


def test_grids_of_samples_repeat_and_follow_prior_and_seed(fitted, tmp_path):
    def draw(*arguments: str) -> np.ndarray:
        command = [str(fitted[0]), "--num", "4", "--output", str(tmp_path / "grid.png"), *arguments]
        assert sample.main(command) == 0
        return grid(tmp_path / "grid.png", 4, 2)

    first = draw("--prior", "flow")
    assert (draw("--prior", "flow") == first).all()
    for change in (["--prior", "gaussian"], ["--prior", "flow", "--seed", "1"], ["--prior", "standard"]):
        assert (draw(*change) != first).any()


def test_temperatures_are_rows_of_the_same_draws(fitted, tmp_path):
    made = AutoencoderKLUltra.from_pretrained(fitted[0])
    command = [str(fitted[0]), "--prior", "gaussian", "--num", "3", "--temperature", "0", "1", "--seed", "4"]
    assert sample.main([*command, "--output", str(tmp_path / "grid.png")]) == 0
    pixels = grid(tmp_path / "grid.png", 6, 3)
    assert (pixels[2:42, 2:42] == pixels[2:42, 44:84]).all()  # at 0 all are the mean
    wanted = decode_latents(made, made.sample_latents(3, "gaussian", seeded(4)), 8)[1]
    found = torch.from_numpy(pixels[44:84, 44:84].copy()).permute(2, 0, 1) / 127.5 - 1
    assert (found - wanted).abs().max() < 0.02


def test_ways_between_samples_and_between_photographs(fitted, photographs, tmp_path):
    output = str(tmp_path / "new" / "grid.png")
    command = [str(fitted[0]), "--prior", "gaussian", "--output", output, "--interpolate"]
    assert sample.main([*command, "--num", "2"]) == 0
    grid(output, 18, 9)
    images = [str(photographs / "train" / name) for name in ("0.png", "1.png", "2.png")]
    assert sample.main([*command, *images, "--linear"]) == 0
    pixels = grid(output, 18, 9)
    assert (pixels[2:42, -42:-2] == pixels[44:84, 2:42]).all()  # one way ends where the next begins


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--num", "0"], "--num is 0"),
        (["MODEL", "--output", "grid.txt"], "end its name in .png"),
        (["missing"], "no folder missing"),
        (["MODEL", "--interpolate", "one.png"], "give two photographs"),
        (["MODEL", "--interpolate", "one.png", "two.png"], "one.png is no image"),
        (["MODEL", "--interpolate", "--temperature", "0.5", "1"], "2 temperatures"),
        (["MODEL", "--temperature", "-1"], "temperature -1.0"),
    ],
)
def test_what_a_user_got_wrong_in_sampling(fitted, arguments, message, capsys, tmp_path):
    place = str(fitted[0])
    command = [place if argument == "MODEL" else argument for argument in arguments]
    if "--output" not in command:  # before --interpolate, which takes what follows
        command[1:1] = ["--output", str(tmp_path / "x.png")]
    assert sample.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "x.png").exists()


def test_a_prior_that_was_not_fitted_is_an_error_with_the_remedy(tmp_path, capsys):
    model().save_pretrained(tmp_path / "model")
    assert sample.main([str(tmp_path / "model"), "--prior", "flow", "--output", str(tmp_path / "x.png")]) == 2
    assert "python -m training.fit_prior" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of them"),
        (["--data", "synthetic_faces", "--config", "configs/ultra.json"], "give one of them"),
        (["--data", "imagefolder:/nowhere"], "not a folder"),
        (["--data", "parquet"], "data.data_files"),
        (["--data", "synthetic_faces", "--num-samples", "1"], "--num-samples is 1"),
        (["--data", "synthetic_faces", "--temperature", "1", "-0.5"], "--temperature [1.0, -0.5]"),
        (["--data", "synthetic_faces", "--held-out", "x.parquet"], "goes with --data parquet"),
        (["--data", "synthetic_faces", "--set", "data.crop_px=20"], "give --config"),
    ],
)
def test_what_a_user_got_wrong_in_fitting(tmp_path, capsys, arguments, message):
    model().save_pretrained(tmp_path)
    assert fit_prior.main([str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert fit_prior.main([str(tmp_path / "no"), "--data", "synthetic_faces"]) == 2
    assert "holds no config.json" in capsys.readouterr().err
