"""The command sample: grids of samples, temperatures, interpolations, attributes."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from modeling.pipeline import FaceVAEPipeline
from training.priors import fit, sample


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(path, count: int, columns: int) -> np.ndarray:
    """The pixels of a grid of images of 40 pixels with borders of 2, whose size is checked."""
    image = Image.open(path)
    assert image.size == (columns * 42 + 2, count // columns * 42 + 2)
    return np.asarray(image)


def test_grids_depend_on_prior_and_seed_only(fitted, tmp_path):
    def sample_grid(*arguments: str) -> np.ndarray:
        command = [str(fitted), "--num-samples", "4", "--output", str(tmp_path / "grid.png"), *arguments]
        assert sample.main(command) == 0
        return grid(tmp_path / "grid.png", 4, 2)

    first = sample_grid("--prior", "diffusion")
    assert (sample_grid("--prior", "diffusion") == first).all()
    assert (sample_grid("--prior", "diffusion", "--guidance-scale", "1.5") == first).all()
    for change in (
        ["--prior", "gaussian"],
        ["--prior", "diffusion", "--guidance-scale", "1"],
        ["--prior", "diffusion", "--seed", "1"],
        ["--prior", "standard"],
    ):
        assert (sample_grid(*change) != first).any()


def test_temperatures_are_rows_of_the_same_noise(fitted, tmp_path):
    pipe = FaceVAEPipeline.from_pretrained(fitted)
    command = [str(fitted), "--prior", "gaussian", "--num-samples", "3", "--temperature", "0", "1", "--seed", "4"]
    assert sample.main([*command, "--output", str(tmp_path / "grid.png")]) == 0
    pixels = grid(tmp_path / "grid.png", 6, 3)
    assert (pixels[2:42, 2:42] == pixels[2:42, 44:84]).all()  # at 0 all are the mean
    expected = pipe(3, "gaussian", generator=generator(4)).images[1]
    assert np.abs(pixels[44:84, 44:84].astype(int) - np.asarray(expected)).max() <= 1


def test_interpolations_between_samples_and_between_photographs(fitted, photographs, tmp_path):
    output = str(tmp_path / "new" / "grid.png")
    command = [str(fitted), "--prior", "gaussian", "--output", output, "--interpolate"]
    assert sample.main([*command, "--num-samples", "2"]) == 0
    grid(output, 18, 9)
    assert sample.main([*command[:-1], "--num-samples", "4"]) == 0
    samples = grid(output, 4, 2)
    assert sample.main([*command, "--num-samples", "2"]) == 0
    rows = grid(output, 18, 9)
    for row in (0, 1):  # both ends are samples
        for end, column in enumerate((0, 8)):
            index = 2 * row + end
            tile = rows[42 * row + 2 : 42 * row + 42, 42 * column + 2 : 42 * column + 42].astype(int)
            sampled = samples[
                42 * (index // 2) + 2 : 42 * (index // 2) + 42, 42 * (index % 2) + 2 : 42 * (index % 2) + 42
            ]
            assert np.abs(tile - sampled).max() <= 1
    images = [str(photographs / "train" / name) for name in ("0.png", "1.png", "2.png")]
    assert sample.main([str(fitted), "--output", output, "--interpolate", *images, "--linear"]) == 0
    pixels = grid(output, 18, 9)
    assert (pixels[2:42, -42:-2] == pixels[44:84, 2:42]).all()  # one interpolation ends where the next begins


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--output", "grid.txt"], "--output grid.txt must be a file that ends in .png"),
        (["missing"], "there is no folder missing"),
        (["MODEL", "--interpolate", "one.png"], "at least two images"),
        (["MODEL", "--interpolate", "one.png", "two.png"], "one.png is not a readable image"),
        (["MODEL", "--interpolate", "--temperature", "0.5", "1"], "one --temperature, got 2"),
        (["MODEL", "--temperature", "-1"], "at least 0, got -1.0"),
        (["MODEL", "--seed", str(2**64)], f"--seed must be from 0 to {2**64 - 1}, got {2**64}"),
        (["MODEL", "--seed", "-1"], "--seed must be from 0"),
        (["MODEL", "--device", "gpu"], "--device gpu"),
        (["MODEL", "--prior", "gaussian", "--guidance-scale", "2"], "guidance_scale needs the diffusion prior"),
        (["MODEL", "--guidance-scale", "-1"], "guidance_scale must be a number of at least 0, got -1.0"),
        (["MODEL", "--guidance-scale", "2", "--interpolate", "a", "b"], "has no attributes and no guidance"),
        (["MODEL", "--attribute-scale", "2", "--interpolate", "a", "b"], "has no attributes and no guidance"),
        (["MODEL", "--linear"], "--linear interpolates: give --interpolate"),
        (["MODEL", "--crop-px", "20"], "--crop-px crops the images of --interpolate"),
        (["MODEL", "--crop-px", "20", "--interpolate"], "--crop-px crops the images of --interpolate"),
        (["MODEL", "--prior", "standard", "--linear", "--interpolate", "a", "b"], "uses no prior: leave out --prior"),
        (["MODEL", "--attribute-scale", "2"], "attribute_scale 2 needs attributes"),
        (["MODEL", "--attributes", "Smiling"], "write NAME=1 for present"),
        (["MODEL", "--attributes", "Smiling=1"], "'Smiling' is unknown: this prior was trained on no attributes"),
    ],
)
def test_user_errors_of_sample_are_one_line(fitted, arguments, message, capsys, tmp_path):
    command = [str(fitted) if argument == "MODEL" else argument for argument in arguments]
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
    FaceVAEPipeline.from_pretrained(fitted).save_pretrained(tmp_path / "pipeline")
    for name, model in (("a.png", fitted), ("b.png", tmp_path / "pipeline")):
        assert (
            sample.main([str(model), "--prior", "diffusion", "--num-samples", "4", "--output", str(tmp_path / name)])
            == 0
        )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert fit.main([str(tmp_path / "pipeline"), "--data", "synthetic_faces"]) == 2
    assert "is a saved pipeline" in capsys.readouterr().err
