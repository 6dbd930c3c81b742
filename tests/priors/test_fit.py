"""The command fit_prior: the Gaussian prior and attribute directions."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from modeling.pipeline import FaceVAEPipeline
from training.priors import fit
from training.run_files import list_checkpoints

TRAIN = 72  # photographs


def test_the_gaussian_is_fitted_to_training_latents_and_those_of_flipped_images(fitted, photographs):
    pipe = FaceVAEPipeline.from_pretrained(fitted)
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


def test_directions_of_attributes():
    """Latents are linear in two attributes that often occur together; ridge regression separates them."""
    random = torch.Generator().manual_seed(0)
    first = torch.rand(4000, generator=random) < 0.5
    second = torch.where(torch.rand(4000, generator=random) < 0.8, first, ~first)
    attributes = torch.stack([first, second, torch.zeros_like(first)], dim=1).to(torch.int8) * 2 - 1
    effects = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    latents = 0.5 * attributes.float() @ effects + 0.1 * torch.randn(4000, 3, generator=random)
    means, ridge = fit.attribute_directions(latents, attributes)
    torch.testing.assert_close(ridge, effects, atol=0.05, rtol=0)
    assert means[0, 1] > 0.5  # of the attribute that comes with it
    assert (means[2] == 0).all()  # nobody has it


def test_directions_are_saved_with_the_gaussian(tmp_path):
    tiny.random_vae().save_pretrained(tmp_path)
    names = '["Eyeglasses", "Smiling"]'
    config = tmp_path / "data.json"
    config.write_text('{"data": {"synthetic_train_images": 24, "synthetic_validation_images": 4}}')
    assert fit.main([str(tmp_path), "--config", str(config), "--set", f"data.attribute_columns={names}"]) == 0
    gaussian = FaceVAEPipeline.from_pretrained(tmp_path).gaussian
    assert list(gaussian.config.attributes) == ["Eyeglasses", "Smiling"]
    assert gaussian.directions.shape == (2, 2, 16) and gaussian.directions.abs().sum() > 0


def test_a_checkpoint_does_not_get_priors(finished, capsys):
    checkpoint = list_checkpoints(finished.folder)[-1]
    assert fit.main([str(checkpoint), "--data", "synthetic_faces"]) == 2
    assert "belongs to a checkpoint, which is removed when a better one comes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --data or --config"),
        (["--data", "synthetic_faces", "--config", "configs/ultra.json"], "give either --data or --config"),
        (["--data", "imagefolder:/nowhere"], "not a folder"),
        (["--data", "parquet"], "write parquet:GLOB"),
        (["--data", "synthetic_faces", "--seed", str(2**64)], f"--seed must be from 0 to {2**64 - 1}, got {2**64}"),
        (["--data", "synthetic_faces", "--validation", "x.parquet"], "goes with --data parquet"),
        (["--data", "synthetic_faces", "--set", "data.crop_px=20"], "give --config"),
        (["--data", "synthetic_faces", "--priors", "diffusion"], "give --config configs/priors/diffusion.json"),
        (["--data", "synthetic_faces", "--resume", "auto"], "give --priors diffusion"),
        (["--data", "synthetic_faces", "--allow-changed", "processes"], "--allow-changed processes goes with --resume"),
        (
            ["--config", "configs/priors/diffusion.json", "--priors", "diffusion", "--device", "cpu"],
            "--device does not choose the device of a training: set CUDA_VISIBLE_DEVICES",
        ),
    ],
)
def test_user_errors_of_fit_prior_are_one_line(tmp_path, capsys, arguments, message):
    tiny.random_vae().save_pretrained(tmp_path)
    assert fit.main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert fit.main([str(tmp_path / "no"), "--data", "synthetic_faces"]) == 2
    assert "there is no folder" in capsys.readouterr().err
