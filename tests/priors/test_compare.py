"""The command compare_priors: distances to training faces, near-duplicates, coverage, the report."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch

from modeling.pipeline import FaceVAEPipeline
from training.priors import compare
from training.priors.compare import coverage, nearest_distances
from training.priors.latents import encode_faces


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nearest_distances_equal_numpy():
    queries, references = torch.randn(130, 7, generator=generator()), torch.randn(40, 7, generator=generator(1))
    queries[5] = references[3]
    differences = queries.numpy()[:, None] - references.numpy()[None]
    expected = np.sqrt((differences**2).mean(axis=2)).min(axis=1)
    np.testing.assert_allclose(nearest_distances(queries, references).numpy(), expected, atol=1e-6)
    assert nearest_distances(queries, references)[5] == 0


def test_coverage_of_the_same_distribution_is_high_and_of_another_low():
    references = torch.randn(200, 4, generator=generator())
    assert coverage(torch.randn(200, 4, generator=generator(1)), references) > 0.9
    assert coverage(references[:1].repeat(200, 1), references) < 0.1
    assert coverage(references + 50, references) == 0


def test_near_duplicates_of_training_faces_are_counted():
    vae = tiny.random_vae()
    pixels = torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8, generator=generator())
    batches = zip(pixels.split(8), torch.zeros(20, 0).split(8))
    faces = encode_faces(vae, batches, with_flips=True)
    assert len(faces.mean) == 40
    with torch.no_grad():
        flipped = vae.encode(pixels.flip(-1)[3:4] / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(flipped.flatten(1), faces.mean[23:24])
    pipe = FaceVAEPipeline(vae)

    def decoded(latents):
        return 2 * pipe.decode(latents[:, :, None, None], "pt") - 1, latents

    mixed = torch.cat([faces.mean[30:33], faces.mean[:2] + 5])
    images = {"training": decoded(faces.mean[:9]), "new": decoded(faces.mean[:4] + 5), "mixed": decoded(mixed)}
    report = compare.compare(images, faces, {})
    assert report["training"]["near_duplicates"] == 9 and report["training"]["latent_median"] == 0
    assert report["new"]["latent_median"] > 0 and report["mixed"]["near_duplicates"] >= 3
    assert report["mixed"]["variety"] > 0


def test_the_command_compares_priors_with_photographs(fitted, photographs, capsys):
    command = [str(fitted), "--data", f"imagefolder:{photographs}", "--num-samples", "6", "--frechet", "st_alexnet"]
    assert compare.main([*command, "--temperature", "1", "0.5", "--guidance-scale", "1", "2"]) == 0
    report = json.loads((fitted / "prior_report.json").read_text())
    priors = [title for name in ("standard", "gaussian") for title in (name, f"{name} at 0.5")]
    priors += [f"{name}, guided {scale}" for name in ("diffusion", "diffusion at 0.5") for scale in (1, 2)]
    references = ["training through the VAE", "validation", "validation through the VAE"]
    assert list(report) == [*references, *priors]
    assert report["gaussian at 0.5"]["latent_median"] < report["gaussian"]["latent_median"]
    assert report["gaussian at 0.5"]["variety"] < report["gaussian"]["variety"]
    assert report["diffusion, guided 1"]["latent_median"] != report["diffusion, guided 2"]["latent_median"]
    printed = capsys.readouterr().out
    for name, values in report.items():
        assert values["images"] == {"training through the VAE": 64}.get(name, 6)
        assert all(math.isfinite(value) for value in values.values()) and values["frechet_st_alexnet"] > 0
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-samples", "1"], "--num-samples must be at least 2, got 1"),
        (["--temperature", "1", "-0.5"], "at least 0, got [1.0, -0.5]"),
        (["--guidance-scale", "-1"], "--guidance-scale must be numbers of at least 0, got [-1.0]"),
        (["--seed", "-1"], "--seed must be from 0"),
    ],
)
def test_user_errors_of_compare_priors_are_one_line(fitted, capsys, arguments, message):
    assert compare.main([str(fitted), "--data", "synthetic_faces", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
