"""The model card of a run, and loading the published model where this project is not installed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import TOKEN, FakeHub
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from PIL import Image
from safetensors import safe_open

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from modeling.latent_prior import fit_gaussian
from training.config import Config, DataConfig, HubConfig
from training.publish import card as model_card
from training.publish import run_record
from training.publish import stage as publish
from training.publish.run_record import describe_hardware, read_run
from training.run_files import MODEL_FILE, best_checkpoint

ROOT = Path(__file__).parents[2]
REPOSITORY = "org/tiny-faces"


@pytest.fixture(scope="module")
def staged(finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    publish.stage(finished.folder, folder, REPOSITORY)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the run that a test may change; plots are made in one test only."""
    monkeypatch.setattr(model_card, "draw_plots", lambda record, folder: [])
    folder = tmp_path / finished.folder.name
    shutil.copytree(finished.folder, folder, symlinks=True)
    return folder


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def card_of(run: Path, folder: Path) -> ModelCard:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    publish.stage(run, folder, REPOSITORY)
    return ModelCard.load(folder / "README.md")


# ---------------------------------------------------------------------- content


def test_metadata_for_the_hub(staged, finished):
    data = ModelCard.load(staged / "README.md").data
    assert data.library_name == "diffusers" and data.pipeline_tag == "image-to-image" and data.license == "apache-2.0"
    assert {"diffusers", "vae", "autoencoder"} <= set(data.tags)
    best = finished.status["best"]
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    assert measured.keys() == {"psnr", "ssim", "mse", "lpips"}
    for metric, key in (("psnr", "psnr"), ("ssim", "ssim"), ("mse", "mse"), ("lpips", "lpips_st_alexnet")):
        assert measured[metric] == pytest.approx(best[f"validation/{key}"], abs=1e-6)
    assert {result.dataset_split for result in data.eval_results} == {"validation"}


def test_the_card_describes_the_run(staged, finished):
    text = (staged / "README.md").read_text()
    config = json.loads((staged / "config.json").read_text())
    assert "40x40 pixels to **16 latent dimensions**" in text and "300 times fewer" in text
    assert "| shape | (16, 1, 1), layout `vector` |" in text
    assert f"| `scaling_factor` | {config['scaling_factor']:.6g} |" in text
    best = finished.status["best"]
    assert f"| PSNR | {best['validation/psnr']:.2f} dB |" in text
    assert f"of epoch {best['epoch']}, step {best['step']}" in text
    assert "60 images in 3 epochs, batch 4, adam, learning rate 0.001, seed 0" in text
    assert "synthetic faces, rendered by the training program" in text and "CelebA" not in text
    parameters = sum(value.numel() for value in finished.trainer.model.state_dict().values())
    assert model_card.count_parameters(staged) == parameters


def test_every_image_of_the_card_exists(staged):
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (staged / "README.md").read_text())
    assert {"images/loss.png", "images/kl.png", "images/reconstructions.png", "images/samples.png"} <= set(shown)
    for name in shown:
        with Image.open(staged / name) as image:
            image.verify()
    with Image.open(staged / "images" / "loss.png") as image:
        colors = image.convert("RGB").getcolors(1 << 24)
    assert len(colors) > 50  # curves, not empty axes


def test_metrics_that_are_not_finite_are_left_out(run, tmp_path, monkeypatch):
    checkpoint, best = best_checkpoint(run)
    changed = {**best, "validation/ssim": None, "validation/psnr": math.nan}
    monkeypatch.setattr(run_record, "best_checkpoint", lambda folder: (checkpoint, changed))
    card = card_of(run, tmp_path / "card")
    assert {result.metric_type for result in card.data.eval_results} == {"mse", "lpips"}
    assert re.search(r"\bnan\b", str(card).lower()) is None


def test_an_evaluation_adds_intervals(run, tmp_path, caplog):
    metric = {"mean": 20.5, "low": 19.25, "high": 21.75}
    with safe_open(best_checkpoint(run)[0] / MODEL_FILE, "pt") as weights:
        metadata = weights.metadata()
    ours = {
        "class": "AutoencoderKLUltra",
        "weights": metadata,
        "images": 1234,
        "reconstruction": {"psnr": metric, "mse_-1_1": {"mean": 0.04, "low": 0.03, "high": 0.05}, "frechet_vgg16": 1.5},
        "kl": {"mean": 2.5, "low": 2.25, "high": 2.75},
        "active_units": 16,
        "posterior_sigma": {"mean": 0.1, "low": 0.05, "high": 0.15},
    }
    other = {**ours, "class": "AutoencoderKL"}
    evaluation = {"data": {"dataset": "org/photographs", "split": "test"}, "models": [other, ours]}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    card = card_of(run, tmp_path / "card")
    assert "| PSNR | 20.50 dB | 19.25 dB to 21.75 dB |" in card.text
    assert "| Frechet distance (VGG16) | 1.500 |  |" in card.text
    assert "on 1,234 images: org/photographs, split `test`" in card.text and "bootstrapped" in card.text
    (psnr,) = [result for result in card.data.eval_results if result.metric_type == "psnr"]
    assert (psnr.metric_value, psnr.dataset_type, psnr.dataset_split) == (20.5, "org/photographs", "test")
    held_out = {"data": {"dataset": "imagefolder", "split": None}, "models": [ours]}
    (run / "evaluation.json").write_text(json.dumps(held_out))
    assert "on 1,234 images: a folder of images, examples held out by a hash" in card_of(run, tmp_path / "card").text
    earlier = {**ours, "weights": {**metadata, "step": "1"}}
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "models": [earlier]}))
    assert "org/photographs" not in card_of(run, tmp_path / "card").text
    assert "was measured with other weights than the best model's" in caplog.text
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "models": [other]}))
    with pytest.raises(ValueError, match="holds 0 models of class AutoencoderKLUltra"):
        card_of(run, tmp_path / "card")


def test_celebas_license_and_limits(run, tmp_path):
    data = json.loads((run / "config.json").read_text())["data"]
    hub = {**data, "dataset": "flwrlabs/celeba", "revision": "abc", "validation_split": "valid", "crop_px": 178}
    change(run / "config.json", data=hub)
    card = card_of(run, tmp_path / "card")
    assert card.data.license == "other" and card.data.license_name == "celeba-non-commercial"
    assert card.data.datasets == ["flwrlabs/celeba"]
    assert "non-commercial research purposes only" in card.text and "light-skinned" in card.text
    assert "at revision `abc`" in card.text and "central 178x178 pixels" in card.text
    files = {"train": "/secret/place/celeba-*.parquet", "valid": "/secret/place/valid.parquet"}
    change(run / "config.json", data={**hub, "dataset": "parquet", "data_files": files})
    card = card_of(run, tmp_path / "card")
    assert card.data.license == "other" and card.data.datasets is None and "parquet files (CelebA)" in card.text
    change(run / "config.json", data={**hub, "dataset": "imagefolder", "data_dir": "/secret/place"})
    card = card_of(run, tmp_path / "card")
    assert card.data.license is None and "state it here before you publish the weights" in card.text
    published = "".join(path.read_text() for path in (tmp_path / "card").iterdir() if path.suffix in (".md", ".json"))
    assert "/secret" not in published


def test_hardware_time_and_energy_are_stated_if_known(run, tmp_path):
    change(run / "status.json", hardware=None)
    assert "Hardware" not in card_of(run, tmp_path / "card").text
    hardware = {"device": "Card X", "processes": 2, "precision": "bf16", "watts": 350.0}
    change(run / "status.json", hardware=hardware)
    lines = [
        {
            "kind": "train",
            "step": 100 * n,
            "images_seen": 36_000 * n,
            "speed/images_per_second": 10.0,
            "loss/reconstruction": 1,
        }
        for n in (1, 2, 3)
    ]
    # A resume from step 200 repeats step 300, which counts twice in the time and once in the plot.
    again = [{**lines[1], "images_seen": 72_000}, lines[2]]
    text = (
        "".join(json.dumps(line) + "\n" for line in [*lines, *again]) + '{"kind": "train", "ste'
    )  # truncated by a crash
    (run / "metrics.jsonl").write_text(text)
    record = read_run(run)
    assert record.train_seconds == pytest.approx(4 * 3600)
    assert [line["step"] for line in record.train] == [100, 200, 300]
    shown = card_of(run, tmp_path / "card").text
    assert "4.00 hours" in shown and "2 x Card X, precision bf16" in shown
    assert "at most about 2.8 kWh, an estimate: power limit 350 W x 2 x 4.00 h" in shown  # 0.35 x 2 x 4
    change(run / "status.json", hardware={**hardware, "watts": None})
    assert "kWh" not in card_of(run, tmp_path / "card").text


def test_the_hardware_of_this_machine():
    found = describe_hardware(torch.device("cpu"), 2, "no")
    assert found["processes"] == 2 and found["precision"] == "no" and found["watts"] is None and found["device"]


def test_a_model_without_a_run_gets_a_card(finished, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished.folder / "best", folder)
    (tmp_path / "staged").mkdir()
    publish.stage(folder, tmp_path / "staged", REPOSITORY)
    card = ModelCard.load(tmp_path / "staged" / "README.md")
    assert card.data.library_name == "diffusers" and card.data.eval_results is None
    assert "## Use" in card.text and "## Training" not in card.text
    (folder / "README.md").write_text("my own card")
    publish.stage(folder, tmp_path / "staged", REPOSITORY)
    assert (tmp_path / "staged" / "README.md").read_text() == "my own card"


def test_an_exported_model_finds_its_run(finished, tmp_path):
    publish.stage(Path(finished.status["model_dir"]), tmp_path, REPOSITORY)
    assert "## Training" in ModelCard.load(tmp_path / "README.md").text


def test_photographs_are_published_on_request_only(finished, tmp_path):
    record = read_run(finished.folder)
    data = dataclasses.replace(record.config.data, dataset="imagefolder", data_dir="faces")
    record.config = dataclasses.replace(record.config, data=data)
    for asked in (False, True):
        folder = tmp_path / str(asked)
        shutil.copytree(finished.folder / "best", folder)
        model_card.write_card(folder, REPOSITORY, record, with_photographs=asked)
        assert (folder / "images" / "samples.png").is_file()
        assert (folder / "images" / "reconstructions.png").is_file() == asked
        assert ("images/reconstructions.png" in (folder / "README.md").read_text()) == asked


def test_the_loss_of_a_sharpened_decoder_is_described(finished):
    record = read_run(finished.folder)
    assert "+ beta x KL, beta controlled" in model_card._training(record)
    loss = dataclasses.replace(record.config.loss, adversarial_weight=0.5, adversarial_start_images=2048)
    presets = dataclasses.replace(record.config.training_presets, train_only="decoder")
    record.config = dataclasses.replace(record.config, loss=loss, training_presets=presets)
    text = model_card._training(record)
    assert "; an adversarial term with 0.5 times the gradient of the others, after 2,048 images." in text
    assert "beta" not in text


def test_fitted_priors_are_named(finished, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished.folder / "best", folder)
    prior, _ = fit_gaussian(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    prior.save_pretrained(folder / "priors" / "gaussian")
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged again").mkdir()
    publish.stage(folder, tmp_path / "staged", REPOSITORY)
    text = (tmp_path / "staged" / "README.md").read_text()
    assert "Fitted priors: `gaussian`." in text
    assert f'AutoModel.from_pretrained("{REPOSITORY}", subfolder="priors/gaussian", trust_remote_code=True)' in text
    (folder / "priors" / "gaussian" / "latent_prior.py").unlink()
    with pytest.raises(ValueError, match="priors/gaussian cannot be loaded from its files"):
        publish.stage(folder, tmp_path / "staged again", REPOSITORY)


def test_data_is_described_without_paths():
    def describe(**data) -> str:
        return model_card.describe_data(dataclasses.replace(Config(), data=DataConfig(**data)))

    assert describe(dataset="imagefolder", data_dir="/home/me/faces") == "a folder of images"
    assert describe(dataset="org/faces") == "[org/faces](https://huggingface.co/datasets/org/faces)"


# ---------------------------------------------------------------------- loading elsewhere


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory) -> list[str]:
    """A Python with torch, diffusers and their requirements only: without this project and its other dependencies
    (accelerate, transformers, torchvision, ...), as in a fresh environment.

    Its path is the standard library and one folder with links to these packages.
    """
    required, folder = {"torch", "diffusers"}, tmp_path_factory.mktemp("site")
    found: dict[str, importlib.metadata.Distribution] = {}
    while required - found.keys():
        name = (required - found.keys()).pop()
        found[name] = distribution = importlib.metadata.distribution(name)
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                required.add(requirement.name.lower().replace("_", "-"))
    for distribution in found.values():
        for part in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = folder / part
            if not link.exists() and not part.endswith(".pth"):
                link.symlink_to(Path(distribution.locate_file(part)).resolve())
    # -S: no site-packages; -I: neither the current folder nor PYTHONPATH.
    start = (
        f"import sys; sys.path.append({str(folder)!r}); exec(compile(open(sys.argv[1]).read(), sys.argv[1], 'exec'))"
    )
    return [sys.executable, "-I", "-S", "-c", start]


def run_elsewhere(fresh_python: list[str], code: str, folder: Path, **environment: str) -> str:
    script = folder / "script.py"
    script.write_text(code)
    environment = {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    command = [*fresh_python, str(script)]
    done = subprocess.run(command, cwd=folder, env={**kept, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_and_diffusers_alone_give_bitwise_identical_outputs(fresh_python, staged, tmp_path):
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 40, 40) * 2 - 1
    vae = AutoencoderKLUltra.from_pretrained(staged)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        expected = {"latents": latents, "image": vae.decode(latents).sample}
    torch.save(pixels, tmp_path / "pixels.pt")
    code = f"""
import importlib.util, torch
from diffusers import AutoModel
for name in ("training", "modeling", "accelerate", "transformers", "torchvision", "datasets", "lpips", "stlpips_pytorch",
             "tensorboard", "torchmetrics", "matplotlib", "scipy"):
    assert importlib.util.find_spec(name) is None, name
torch.set_num_threads({torch.get_num_threads()})
vae = AutoModel.from_pretrained({str(staged)!r}, trust_remote_code=True)
with torch.no_grad():
    latents = vae.encode(torch.load("pixels.pt")).latent_dist.mean
    torch.save({{"latents": latents, "image": vae.decode(latents).sample}}, "result.pt")
print(type(vae).__module__)
"""
    module = run_elsewhere(fresh_python, code, tmp_path, HF_HUB_OFFLINE="1")
    assert module.startswith("diffusers_modules.")
    result = torch.load(tmp_path / "result.pt")
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def test_the_code_of_the_card_runs_unchanged(fresh_python, finished, staged, tmp_path, monkeypatch):
    """Published to a fake Hub, and loaded from it by name."""
    (code,) = re.findall(r"```python\n(.*?)```", (staged / "README.md").read_text(), flags=re.DOTALL)
    Image.effect_noise((178, 178), 60).convert("RGB").save(tmp_path / "face.png")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        publish.publish(finished.folder, HubConfig(push=True, repo_id=REPOSITORY))
        run_elsewhere(fresh_python, code, tmp_path, HF_ENDPOINT=hub.endpoint)
    with Image.open(tmp_path / "reconstruction.png") as image:
        assert image.size == (40, 40) and len(image.getcolors(1 << 16)) > 100
