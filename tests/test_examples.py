"""The examples run without this project, and the VAE works in a diffusers pipeline."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training import encode
from training.data.synthetic_faces.render import render_face
from training.pca_init import fit_pca_branch

ROOT = Path(__file__).parent.parent
SIZE = tiny.SETTINGS["model"]["sample_size"]
SPATIAL = {"latent_dim": 100, "latent_layout": "spatial", "latent_channels": 4, "latent_size": 5}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Synthetic faces: 32 for training, 96 for validation (to measure the scaling), 96 for testing."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(224):
        kind = folder / ("train" if number < 32 else "validation" if number < 128 else "test")
        kind.mkdir(exist_ok=True)
        face = Image.fromarray(render_face(number)).crop((0, 20, 178, 198))
        face.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(kind / f"{number}.png")
    return folder


def latent_layout(model: Path) -> str:
    return json.loads((model / "config.json").read_text())["latent_layout"]


def pixels_of(folder: Path) -> torch.Tensor:
    return torch.stack([pil_to_tensor(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.fixture(scope="module", params=["vector", "spatial"])
def model(request, images, tmp_path_factory) -> Path:
    """An exported VAE after PCA initialization, its scaling measured as in training."""
    torch.manual_seed(0)
    vae = AutoencoderKLUltra(**tiny.SETTINGS["model"] | (SPATIAL if request.param == "spatial" else {}))
    fit_pca_branch(vae, pixels_of(images / "train"), 0.05)
    with torch.no_grad():
        latents = vae.encode(pixels_of(images / "validation").float() / 127.5 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    folder = tmp_path_factory.mktemp(request.param) / "model"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("latent_diffusion", ROOT / "examples" / "latent_diffusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_latent_diffusion_trains_and_samples(example, model, images, tmp_path, capsys):
    output = tmp_path / "grid.png"
    sizes = ["--steps", "200", "--batch-size", "32", "--width", "96", "--sample-steps", "10", "--num-samples", "6"]
    assert example.main([str(model), "--images", str(images / "train"), *sizes, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "32 latents " in text
    first, last = map(float, re.search(r"loss (\S+) at the start, (\S+) at the end", text).groups())
    # For white latents the optimal velocity leaves 2 - 2 (1 - pi / 4) = 1.571, averaged over times. The vector layout is
    # nearly white; the positions of a spatial latent are correlated.
    assert last < (1.75 if latent_layout(model) == "vector" else 1.5) and last < first, text
    variance = float(re.search(r"samples: mean \S+, variance (\S+)", text)[1])
    assert 0.5 < variance < 1.5, text
    with Image.open(output) as grid:
        assert grid.size == (3 * SIZE, 2 * SIZE)


def test_a_folder_is_encoded_with_the_scaling_of_the_vae(example, model, images):
    vae = AutoencoderKLUltra.from_pretrained(model)
    latents = example.encode_folder(vae, images / "train", limit=20, batch=16)
    with torch.no_grad():
        posterior = vae.encode(pixels_of(images / "train")[:20].float() / 127.5 - 1).latent_dist
    expected = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    noise = (latents - expected) / (posterior.std * vae.config.scaling_factor)
    assert noise.std().item() == pytest.approx(1, abs=0.2) and noise.abs().max() < 6


def test_latents_of_the_command_encode_are_those_of_the_example(session, example, model, images, tmp_path, capsys):
    folder = tmp_path / "latents"
    arguments = ["--data", f"imagefolder:{images / 'train'}", "--output", str(folder), "--shard-size", "20"]
    assert encode.main([str(model), *arguments]) == 0
    vae = AutoencoderKLUltra.from_pretrained(model)
    latents, expected = example.load_latents(folder, 30), example.encode_folder(vae, images / "train", limit=30)
    std = load_file(folder / "latents_00000.safetensors")["std"]
    assert latents.shape == expected.shape and (latents[:20] - expected[:20]).abs().mean() < 2 * std.mean()
    sizes = ["--steps", "2", "--width", "16", "--sample-steps", "2", "--num-samples", "2"]
    output = ["--output", str(tmp_path / "grid.png")]
    assert example.main([str(model), "--latents", str(folder), *sizes, *output]) == 0
    assert "32 latents" in capsys.readouterr().out
    assert example.main([str(model), "--latents", str(tmp_path), *output]) == 2
    assert "training.encode" in capsys.readouterr().err


def test_a_folder_without_images_is_a_one_line_error(example, model, tmp_path, capsys):
    assert example.main([str(model), "--images", str(tmp_path)]) == 2
    assert "has no images" in capsys.readouterr().err


def test_sampling_with_a_known_velocity(example):
    """The optimal velocity from N(0, 1) to N(m, s^2): Euler steps end at m and s."""
    mean, std = 2.0, 0.5

    def velocity(latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        # x = (1 - t) c + t n with c of N(m, s^2), n of N(0, 1): E[n - c | x], both jointly Gaussian.
        t = (times / 1000)[:, None, None, None]
        slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return -mean + slope * (latents - (1 - t) * mean)

    generator = torch.Generator().manual_seed(0)
    samples = example.sample(velocity, (4000, 1, 1, 1), torch.device("cpu"), 200, generator)
    assert samples.mean().item() == pytest.approx(mean, abs=0.03)
    assert samples.std().item() == pytest.approx(std, abs=0.02)


def test_training_and_sampling_agree(example):
    """Trained on N(2, 0.5^2), the example samples from it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = example.Velocity(latent_dim=2, width=64, blocks=2)
    example.train(network, 2 + 0.5 * torch.randn(4096, 2, 1, 1, generator=generator), 300, 64, generator)
    samples = example.sample(network, (1000, 2, 1, 1), torch.device("cpu"), 25, generator)
    assert samples.mean().item() == pytest.approx(2, abs=0.15)
    assert samples.std().item() == pytest.approx(0.5, abs=0.15)


def test_scaled_latents_of_test_images_have_unit_variance(model, images):
    vae = AutoencoderKLUltra.from_pretrained(model)
    torch.manual_seed(0)
    with torch.no_grad():
        latents = vae.encode(pixels_of(images / "test").float() / 127.5 - 1).latent_dist.sample()
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    # Brightness dominates a few dimensions, and 96 faces determine its variance to 14 % (sqrt(2 / 96)).
    assert scaled.var().item() == pytest.approx(1, abs=0.2)
    assert scaled.mean().item() == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("model", ["spatial"], indirect=True)
def test_a_diffusers_pipeline_takes_the_vae(model):
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
    assert images.shape == (2, SIZE, SIZE, 3)


# ---- the notebook ----


def code_cells() -> list[str]:
    cells = json.loads((ROOT / "examples" / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs():
    notebook = json.loads((ROOT / "examples" / "walkthrough.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Every cell in one namespace; an expression at the end of a cell is what Jupyter would show."""
    monkeypatch.chdir(ROOT)
    namespace, shown = {}, []
    for source in code_cells():
        if "FOLDER, MINUTES" in source:
            source = f"FOLDER, MINUTES, IMAGES = Path({str(tmp_path)!r}), 0.02, 48"
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "walkthrough.ipynb", "exec"), namespace)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "walkthrough.ipynb", "eval"), namespace))
    assert "grids  " in capsys.readouterr().out
    images = [image for image in shown if isinstance(image, Image.Image)]
    assert [image.size for image in images[1:]] == [(8 * 64, rows * 64) for rows in (2, 3, 1)]
    images[0].close()


# ---- rented hardware ----


def test_the_dependencies_of_the_job_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    source = (ROOT / "examples" / "train_job.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+)^# ///$", source)  # the expression of PEP 723
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["dependencies"] == project["dependencies"]
    assert metadata["requires-python"] == project["requires-python"]


def test_the_job_clones_trains_on_every_gpu_and_uploads(tmp_path):
    """Commands are printed instead of run; an existing clone is used."""
    job = ROOT / "examples" / "train_job.py"
    assert subprocess.run([sys.executable, job, "--help"], capture_output=True).returncode == 0
    code = (
        "import runpy, subprocess, sys; real = subprocess.run; sys.argv = sys.argv[1:]\n"
        "subprocess.run = lambda words, cwd=None: real(['echo', *words[words[0] == sys.executable:], cwd or ''])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = ["--repository", "https://example.com/x.git", "--repo-id", "org/name", "--config", "configs/ultra.json"]
    command = [sys.executable, "-c", code, job, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    clone, train = done.stdout.splitlines()
    assert clone.startswith("git clone --depth 1 --branch main https://example.com/x.git /")
    assert train.startswith("-m torch.distributed.run --standalone --nproc_per_node gpu train_vae.py ")
    assert "--set hub.push=true --set hub.repo_id=org/name --config configs/ultra.json" in train
    assert train.split()[-1] == clone.split()[-1] == str(tmp_path / "face-vae-trainer")  # in the clone
    (tmp_path / "face-vae-trainer").mkdir()
    assert subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout == train + "\n"


def test_the_dockerfile_has_a_cpu_and_a_gpu_target_and_copies_what_exists():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert [line.split(" AS ")[1] for line in lines if line.startswith("FROM")] == ["base", "cpu", "gpu"]
    for name in re.findall(r"/app/([\w/.]+)", "\n".join(lines)):
        assert (ROOT / name).is_file(), name
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {"training", "modeling", "configs", "train_vae.py", "pyproject.toml", "README.md"} & set(ignored)
