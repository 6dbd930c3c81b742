"""`python -m training.evaluate` on ours and on diffusers' models, against diffusers, `validate` and scipy."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import scipy.stats
import tiny
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling import AutoencoderKLUltra
from training.config import Config, config_from_dict
from training.data.images import normalize
from training.data.stream import TrainStream, load_validation
from training.evaluate import command as evaluate
from training.evaluate.measure import bootstrap_means, reconstruct
from training.evaluate.models import Autoencoder
from training.evaluate.validation import validate
from training.losses.objective import ReconstructionLoss
from training.losses.perceptual import PerceptualTrunk

SIZE, IMAGES = 40, 6
TRUNK = ["--lpips", "st_alexnet", "--frechet", "st_alexnet"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Tiny models with random weights: `ours`, and diffusers' `kl`, `tiny`, `dc`."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    ours = AutoencoderKLUltra(**tiny.SETTINGS["model"])
    for parameter in ours.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    ours.save_pretrained(folder / "ours")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=SIZE,
    ).save_pretrained(folder / "kl")
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder / "tiny")
    diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ).save_pretrained(folder / "dc")
    return folder


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, faces) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(tiny.tiny_settings(path.parent, faces)))
    return path


@pytest.fixture(scope="module")
def compared(models, config_file, tmp_path_factory) -> tuple[dict, Path]:
    """All four and PCA in one comparison: its JSON, and the folder it was written to."""
    folder = tmp_path_factory.mktemp("compared")
    names = ("ours", "kl", "tiny", "dc")
    arguments = [str(models / name) for name in names] + [
        "--config",
        str(config_file),
        "--resolution",
        str(SIZE),
        *TRUNK,
    ]
    arguments += ["--pca", "5", "--batch-size", "4", "--device", "cpu"]
    arguments += ["--output", str(folder / "out")]
    assert evaluate.main(arguments) == 0
    return json.loads((folder / "out" / "evaluation.json").read_text()), folder


@pytest.fixture(scope="module")
def images(config_file) -> tuple[torch.Tensor, list[int]]:
    data = config_from_dict(json.loads(config_file.read_text())).data
    return load_validation(data, resolution=SIZE, rank=0, world_size=1)


def error(capsys, *arguments: str | Path) -> str:
    """The command's only line, an error."""
    capsys.readouterr()
    assert evaluate.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err and captured.out == ""
    return line


def test_ours_has_the_metrics_of_validation(compared, models, images, session):
    found = compared[0]["models"][0]
    trunk = PerceptualTrunk("st_alexnet")
    values = validate(
        Accelerator(cpu=True),
        AutoencoderKLUltra.from_pretrained(models / "ours"),
        *images,
        batch=4,
        loss=ReconstructionLoss(mse=1, l1=0, perceptual=0, lpips=0),
        lpips_trunk=trunk,
    ).values
    for name, key in (("mse", "mse_-1_1"), ("psnr", "psnr"), ("ssim", "ssim"), ("lpips_st_alexnet",) * 2):
        assert found["reconstruction"][key]["mean"] == pytest.approx(values[name], rel=1e-5), name
    assert found["kl"]["mean"] == pytest.approx(values["kl"], rel=1e-5)
    assert found["posterior_sigma"]["mean"] == pytest.approx(values["posterior_sigma"], rel=1e-5)
    assert found["active_units"] == values["active_units"]
    assert found["class"] == "AutoencoderKLUltra" and found["latent_shape"] == [16, 1, 1]
    assert found["images"] == IMAGES and found["latent_dim"] == 16


@pytest.mark.parametrize("number, cls", [(1, "AutoencoderKL"), (2, "AutoencoderTiny"), (3, "AutoencoderDC")])
def test_diffusers_models_have_the_metrics_of_their_own_encode_and_decode(compared, models, images, number, cls):
    found = compared[0]["models"][number]
    model = getattr(diffusers, cls).from_pretrained(found["model"])
    pixels = normalize(images[0])
    with torch.no_grad():
        encoded = model.encode(pixels, return_dict=False)[0]
        latents = encoded.mode() if cls == "AutoencoderKL" else encoded
        decoded = model.decode(latents, return_dict=False)[0].clamp(-1, 1)
    squared = (decoded - pixels).square().mean(dim=(1, 2, 3))
    part = found["reconstruction"]
    assert found["class"] == cls and found["latent_shape"] == list(latents.shape[1:])
    assert part["mse_-1_1"]["mean"] == pytest.approx(squared.mean().item(), rel=1e-5)
    assert part["mse_0_1"]["mean"] == pytest.approx(squared.mean().item() / 4, rel=1e-5)
    assert part["l1_-1_1"]["mean"] == pytest.approx((decoded - pixels).abs().mean().item(), rel=1e-5)
    assert part["psnr"]["mean"] == pytest.approx((10 * torch.log10(4 / squared)).mean().item(), rel=1e-5)
    assert part["psnr"]["low"] < part["psnr"]["mean"] < part["psnr"]["high"]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    if cls == "AutoencoderKL":  # KL by torch's own formula
        normal = torch.distributions.Normal(encoded.mean, encoded.std)
        kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean().item()
        assert found["kl"]["mean"] == pytest.approx(kl, rel=1e-4)
        assert found["active_units"] == int((encoded.mean.var(dim=0, unbiased=False) > 0.01).sum())
        # The error of a sample is larger: its noise is independent of the image.
        assert found["posterior_sample"]["mse_-1_1"]["mean"] > part["mse_-1_1"]["mean"]
    else:
        assert [found[key] for key in ("posterior_sample", "kl", "active_units", "posterior_sigma")] == [None] * 4


def test_pca_baseline(compared, config_file, images):
    """Against numpy's singular value decomposition of the same training images."""
    found = compared[0]["models"][4]
    values = json.loads(config_file.read_text())
    values["data"] |= {"horizontal_flip": False}
    stream = TrainStream(config_from_dict(values).data, resolution=SIZE, seed=3, global_batch=20, rank=0, world_size=1)
    train = next(iter(stream.epoch_batches(5))).pixels
    samples = normalize(train).flatten(1).double().numpy()
    mean = samples.mean(axis=0)
    axes = np.linalg.svd(samples - mean, full_matrices=False)[2][:5]
    pixels = normalize(images[0]).flatten(1).double().numpy()
    decoded = np.clip(mean + (pixels - mean) @ axes.T @ axes, -1, 1)
    assert found["class"] == "PCA" and found["model"] == "PCA of 20 training images" and found["latent_dim"] == 5
    assert found["reconstruction"]["mse_-1_1"]["mean"] == pytest.approx(((decoded - pixels) ** 2).mean(), rel=1e-4)
    assert found["kl"] is None and found["posterior_sample"] is None


def test_an_image_does_not_depend_on_its_batch(compared, models, config_file, capsys):
    """Nor does the posterior's noise: the same images in batches of 1 and of 4."""
    arguments = [
        str(models / "kl"),
        "--config",
        str(config_file),
        *TRUNK,
        "--batch-size",
        "1",
        "--device",
        "cpu",
        "--json",
    ]
    capsys.readouterr()
    assert evaluate.main(arguments) == 0
    alone = json.loads(capsys.readouterr().out)["models"][0]  # standard output is JSON and nothing else
    together = compared[0]["models"][1]
    for kind in ("reconstruction", "posterior_sample"):
        for name, value in together[kind].items():
            other = alone[kind][name]
            assert other == pytest.approx(value, rel=1e-4), (kind, name)


class Transparent(Autoencoder):
    """Latents are the pixels, with a posterior of sigma 0.2: what is decoded shows the latents."""

    def __init__(self) -> None:
        super().__init__("transparent", torch.nn.Identity(), SIZE)

    def encode(self, pixels):
        return pixels, torch.full_like(pixels, 2 * math.log(0.2))

    def decode(self, latents):
        return latents


def test_a_posterior_sample_has_the_posteriors_spread():
    pixels = torch.zeros(3, 3, SIZE, SIZE)
    mean, sampled, _, _ = reconstruct(Transparent(), pixels, [4, 7, 9])
    assert torch.equal(mean, pixels)
    assert sampled.std(dim=(1, 2, 3)).tolist() == pytest.approx([0.2] * 3, rel=0.05)
    assert sampled.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.0] * 3, abs=0.02)
    # The noise depends on the image's index alone.
    again = reconstruct(Transparent(), pixels[:2], [9, 5])[1]
    assert torch.equal(again[0], sampled[2]) and not any(torch.equal(again[1], other) for other in sampled)


def test_a_posterior_sample_that_changes_no_pixel_is_left_out(models, config_file, tmp_path, capsys):
    model = AutoencoderKLUltra.from_pretrained(models / "ours")
    torch.nn.init.constant_(model.logvar_bias.bias, -40.0)  # clamped to a sigma of 4.5e-5
    model.save_pretrained(tmp_path / "sharp")
    assert evaluate.main([str(tmp_path / "sharp"), "--config", str(config_file), *TRUNK, "--device", "cpu"]) == 0
    assert "posterior mean" in (out := capsys.readouterr().out) and "posterior sample" not in out
    assert "\n│ LPIPS, st_alexnet " in out and "not FID" in out and "6 are few" in out


def test_files(compared, images):
    result, folder = compared
    with (folder / "out" / "per_image.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    kinds = [(m["model"], kind) for m in result["models"] for kind in ("reconstruction", "posterior_sample") if m[kind]]
    assert len(kinds) == 7 and len(lines) == 7 * IMAGES
    first = [line for line in lines if (line["model"], line["set"]) == kinds[0]]
    assert [int(line["image"]) for line in first] == images[1]
    mean = np.mean([float(line["psnr"]) for line in first])
    assert mean == pytest.approx(result["models"][0]["reconstruction"]["psnr"]["mean"])

    # The first picture of the grid is the image with the largest LPIPS, enlarged four times, beside its reconstruction.
    worst = max(first, key=lambda line: float(line["lpips_st_alexnet"]))
    (path,) = (folder / "out").glob("extremes_0_*ours.png")
    grid = np.asarray(Image.open(path))
    tile = images[0][images[1].index(int(worst["image"]))].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)
    assert np.array_equal(grid[40 : 40 + 160, 8 : 8 + 160], tile)
    beside = grid[40 : 40 + 160, 168 : 168 + 160].astype(float) / 127.5 - 1
    mse = ((beside - (tile / 127.5 - 1)) ** 2).mean()
    assert 10 * math.log10(4 / mse) == pytest.approx(float(worst["psnr"]), abs=0.05)
    assert len(list((folder / "out").glob("extremes_*.png"))) == 5

    page = (folder / "out" / "evaluation.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and page.count("data:image/svg+xml;base64,") == 5
    assert "://" not in page and "<script" not in page
    assert "content=\"default-src 'none'; img-src data:" in page
    assert f"{result['models'][1]['reconstruction']['psnr']['mean']:.2f} [" in page


def test_bootstrap_interval():
    values = np.random.default_rng(0).gamma(2.0, size=200)
    found = bootstrap_means({"gamma": values, "shifted": values + 5, "constant": np.full(200, 3.0)})
    wanted = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    width = wanted.high - wanted.low
    assert found["gamma"]["mean"] == pytest.approx(values.mean())
    assert found["gamma"]["low"] == pytest.approx(wanted.low, abs=0.05 * width)
    assert found["gamma"]["high"] == pytest.approx(wanted.high, abs=0.05 * width)
    # All metrics are resampled alike, and again in a second call.
    assert found["shifted"]["low"] - found["gamma"]["low"] == pytest.approx(5)
    assert found["constant"] == {"mean": 3.0, "low": pytest.approx(3.0), "high": pytest.approx(3.0)}
    assert bootstrap_means({"gamma": values})["gamma"] == pytest.approx(found["gamma"])
    assert bootstrap_means({"one": np.array([2.0])})["one"] == {"mean": 2.0, "low": 2.0, "high": 2.0}


def test_a_pipelines_autoencoder_is_in_its_subfolder(models, config_file, tmp_path, capsys):
    diffusers.AutoencoderTiny.from_pretrained(models / "tiny").save_pretrained(tmp_path / "pipe" / "vae")
    rest = ["--config", config_file, "--resolution", SIZE, *TRUNK, "--device", "cpu", "--max-images", "2"]
    # Beside another model, which has its config.json at the top.
    arguments = [tmp_path / "pipe", models / "ours", *rest, "--json"]
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    assert [m["class"] for m in json.loads(capsys.readouterr().out)["models"]] == [
        "AutoencoderTiny",
        "AutoencoderKLUltra",
    ]


def test_models_that_cannot_be_evaluated(models, config_file, tmp_path, capsys):
    rest = ("--config", config_file, *TRUNK, "--device", "cpu")
    assert "there is no folder /none/at/all" in error(capsys, "/none/at/all", *rest)
    (tmp_path / "empty").mkdir()
    assert "holds no model: looked for config.json" in error(capsys, tmp_path / "empty", *rest)
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "is not JSON" in error(capsys, tmp_path / "empty", *rest)
    (tmp_path / "empty" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "names UNet2DModel, which must be AutoencoderKLUltra or " in error(capsys, tmp_path / "empty", *rest)
    assert "has no sample_size in its config.json: give --resolution" in error(capsys, models / "tiny", *rest)
    line = error(capsys, models / "ours", *rest, "--resolution", "48")
    assert "cannot reconstruct 48x48 images" in line and "40x40" in line
    assert "cannot reconstruct 41x41" in error(capsys, models / "kl", *rest, "--resolution", "41")
    for name in ("lost", "cut"):
        model = AutoencoderKLUltra.from_pretrained(models / "ours")
        model.save_pretrained(tmp_path / name)
    weights = tmp_path / "lost" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if key != "logvar_bias.bias"}, weights, {"format": "pt"})
    assert "1 weights do not fit its config.json, such as logvar_bias.bias" in error(capsys, tmp_path / "lost", *rest)
    save_file(state | {"logvar_bias.bias": torch.full((16,), math.nan)}, weights, {"format": "pt"})
    assert "values that are not finite" in error(capsys, tmp_path / "lost", *rest)
    (tmp_path / "cut" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert "(AutoencoderKLUltra) cannot be loaded" in error(capsys, tmp_path / "cut", *rest)


def test_a_hub_that_does_not_answer(config_file, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = error(capsys, "someone/something-not-cached", "--config", config_file, *TRUNK)
    assert "there is no folder someone/something-not-cached, and the Hub does not answer" in line


def test_a_misspelled_folder_names_similar_ones(models, config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("vae_quickstart", "other"):
        (tmp_path / "model_weights" / name).mkdir(parents=True)
    for wrong in ("model_weights/vae_quickstrat", "./model_weights/vae_quickstrat"):
        line = error(capsys, wrong, "--config", config_file, *TRUNK)
        assert line.startswith(f"error: there is no folder {wrong} (similar: model_weights/vae_quickstart), and ")
    assert "similar:" not in error(capsys, "nothing/similar", "--config", config_file, *TRUNK)


def test_impossible_data_and_metrics(models, config_file, tmp_path, capsys):
    ours = models / "ours"
    rest = ("--config", config_file, *TRUNK, "--device", "cpu")
    assert "no images are named: give --data or --config" in error(capsys, ours)
    assert "--set changes a configuration" in error(capsys, ours, "--data", "synthetic_faces", "--set", "a.b=1")
    assert "write imagefolder:DIR" in error(capsys, ours, "--data", "imagefolder")
    assert "synthetic_faces have the split validation only" in error(capsys, ours, *rest, "--split", "train")
    assert "is not a folder of images" in error(capsys, ours, *TRUNK, "--data", f"imagefolder:{tmp_path}/none")
    assert "matches no file" in error(capsys, ours, *TRUNK, "--data", f"parquet:{tmp_path}/*.parquet")
    assert "no training images besides" in error(capsys, ours, "--data", "parquet:x-*.parquet", "--pca", "4")
    assert "determine at most 19 components" in error(capsys, ours, *rest, "--pca", "20")
    assert "unknown feature network 'vgg'" in error(capsys, ours, *rest, "--lpips", "vgg")
    assert "too small for the feature network st_alexnet" in error(capsys, models / "kl", *rest, "--resolution", "16")
    assert "SSIM needs images of at least 11 pixels, these have 8" in error(
        capsys, models / "kl", *rest, "--resolution", "8"
    )
    assert "is not a folder" in error(capsys, ours, *rest, "--lpips", "alexnet", "--trunk-weights", tmp_path / "none")
    assert "a Frechet distance needs at least two images" in error(capsys, ours, *rest, "--max-images", "1")


def parsed(*arguments: str, config: Config | None = None):
    return evaluate.data_config(evaluate.build_parser().parse_args(["m", *arguments]), config or Config())


def test_where_images_come_from(tmp_path):
    data = parsed("--data", "parquet:faces/*.parquet", "--max-images", "7", "--crop-px", "178")
    assert (data.dataset, data.data_files) == ("parquet", {"validation": "faces/*.parquet"})
    assert (data.validation_split, data.max_validation_images, data.crop_px) == ("validation", 7, 178)
    data = parsed(
        "--data", "flwrlabs/celeba", "--split", "test", config=config_from_dict({"data": {"revision": "abc"}})
    )
    assert (data.dataset, data.revision, data.validation_split) == ("flwrlabs/celeba", None, "test")
    ultra = config_from_dict({"data": {"crop_px": 178}})
    assert parsed("--data", "imagefolder:.", config=ultra).crop_px is None  # the crop belongs to the other images
    held_out = config_from_dict({"data": {"validation_split": None}})
    assert parsed("--config", "x", config=held_out).validation_split is None  # as in training


def test_an_image_folder_is_evaluated_in_full_or_by_its_split(models, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for place in ("a.png", "below/b.png", "validation/c.png"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(path)
    arguments = [
        str(models / "kl"),
        "--data",
        f"imagefolder:{tmp_path}",
        "--lpips",
        "none",
        "--frechet",
        "none",
        "--json",
    ]

    def count(*more: str) -> int:
        capsys.readouterr()
        assert evaluate.main([*arguments, "--device", "cpu", *more]) == 0
        found = json.loads(capsys.readouterr().out)["models"][0]
        assert set(found["reconstruction"]) == {"psnr", "ssim", "mse_-1_1", "mse_0_1", "l1_-1_1"}
        return found["images"]

    assert count() == 1 and count("--split", "below") == 1
    (tmp_path / "validation").rename(tmp_path / "more")
    assert count() == 3 and count("--max-images", "2") == 2
