"""The examples run as a stranger would run them, and the model fits where diffusers expects an `AutoencoderKL`."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.data.synthetic_faces import render_face
from training.pca_init import fit_pca_branch
from training.publish.export import export_model

ROOT = Path(__file__).parent.parent
SIDE = tiny.SETTINGS["model"]["sample_size"]
SPATIAL = {"latent_dim": 100, "latent_layout": "spatial", "latent_channels": 4, "latent_size": 5}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Drawn faces: 32 to learn from, 96 on which a training would measure the scaling, 96 that nobody has seen."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(224):
        kind = folder / ("train" if number < 32 else "validation" if number < 128 else "held_out")
        kind.mkdir(exist_ok=True)
        face = Image.fromarray(render_face(number)).crop((0, 20, 178, 198))
        face.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(kind / f"{number}.png")
    return folder


def vae_layout(model: Path) -> str:
    return json.loads((model / "config.json").read_text())["latent_layout"]


def pixels_of(folder: Path) -> torch.Tensor:
    return torch.stack([pil_to_tensor(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.fixture(scope="module", params=["vector", "spatial"])
def model(request, pictures, tmp_path_factory) -> Path:
    """An exported model with a fitted linear path, its scaling measured as a training does."""
    torch.manual_seed(0)
    vae = AutoencoderKLUltra(**tiny.SETTINGS["model"] | (SPATIAL if request.param == "spatial" else {}))
    fit_pca_branch(vae, pixels_of(pictures / "train"), 0.05)
    with torch.no_grad():
        latents = vae.encode(pixels_of(pictures / "validation").float() / 127.5 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    folder = tmp_path_factory.mktemp(request.param) / "model"
    export_model(vae, folder)
    return folder


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("latent_diffusion", ROOT / "examples" / "latent_diffusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_latent_diffusion_learns_and_draws(example, model, pictures, tmp_path, capsys):
    out = tmp_path / "grid.png"
    sizes = ["--steps", "200", "--batch-size", "32", "--width", "96", "--sample-steps", "10", "--num-samples", "6"]
    assert example.main([str(model), "--images", str(pictures / "train"), *sizes, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "32 latents " in text
    first, last = map(float, re.search(r"loss (\S+) at first, (\S+) at the end", text).groups())
    # Were latents white noise, the best velocity would leave 2 - 2 (1 - pi / 4) = 1.571 unexplained, averaged over times.
    # A vector's numbers are whitened, so the network can get near that; neighbours in a map explain each other.
    assert last < (1.75 if vae_layout(model) == "vector" else 1.5) and last < first, text
    drawn = float(re.search(r"samples: mean \S+, variance (\S+)", text)[1])
    assert 0.5 < drawn < 1.5, text
    with Image.open(out) as grid:
        assert grid.size == (3 * SIDE, 2 * SIDE)


def test_folders_are_encoded_in_the_scaling_of_the_model(example, model, pictures):
    vae = AutoencoderKLUltra.from_pretrained(model)
    latents = example.encode_folder(vae, pictures / "train", limit=20, batch=16)
    with torch.no_grad():
        posterior = vae.encode(pixels_of(pictures / "train")[:20].float() / 127.5 - 1).latent_dist
    wanted = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    off = (latents - wanted) / (posterior.std * vae.config.scaling_factor)  # the draw's standard normal noise
    assert off.std().item() == pytest.approx(1, abs=0.2) and off.abs().max() < 6


def test_no_images_is_one_line(example, model, tmp_path, capsys):
    assert example.main([str(model), "--images", str(tmp_path)]) == 2
    assert "error: there are no images" in capsys.readouterr().err


def test_samples_of_the_example_are_of_the_distribution_it_was_shown(example):
    """A velocity that is known: from N(0, 1) to N(m, s^2), for which Euler steps must arrive at m and s."""
    mean, std = 2.0, 0.5

    def velocity(latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        # x = (1 - t) c + t n with c of N(m, s^2), n of N(0, 1): E[n - c | x], both jointly Gaussian.
        t = (times / 1000)[:, None, None, None]
        share = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return -mean + share * (latents - (1 - t) * mean)

    generator = torch.Generator().manual_seed(0)
    drawn = example.sample(velocity, (4000, 1, 1, 1), torch.device("cpu"), 200, generator)
    assert drawn.mean().item() == pytest.approx(mean, abs=0.03)
    assert drawn.std().item() == pytest.approx(std, abs=0.02)


def test_what_was_learned_is_what_is_drawn(example):
    """Training and sampling agree on which end of time is noise: N(2, 0.5^2) goes in and comes out."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = example.Velocity(numbers=2, width=64, blocks=2)
    example.train(network, 2 + 0.5 * torch.randn(4096, 2, 1, 1, generator=generator), 300, 64, generator)
    drawn = example.sample(network, (1000, 2, 1, 1), torch.device("cpu"), 25, generator)
    assert drawn.mean().item() == pytest.approx(2, abs=0.15)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.15)


def test_held_out_faces_have_unit_variance(model, pictures):
    vae = AutoencoderKLUltra.from_pretrained(model)
    torch.manual_seed(0)
    with torch.no_grad():
        latents = vae.encode(pixels_of(pictures / "held_out").float() / 127.5 - 1).latent_dist.sample()
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    # Brightness dominates a few numbers, and 96 faces measure its variance to 14 % (the root of 2 / 96).
    assert scaled.var().item() == pytest.approx(1, abs=0.2)
    assert scaled.mean().item() == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("model", ["spatial"], indirect=True)
def test_a_pipeline_of_diffusers_takes_the_model_as_its_vae(model):
    vae = AutoencoderKLUltra.from_pretrained(model)
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=1,
        sample_size=vae.config.latent_size,
        patch_size=1,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    )
    pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline([1, 2], num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (2, SIDE, SIDE, 3)
