"""The commands synthetic_faces, reconstruct, compare and encode, on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image
from runs import fork_ranks
from safetensors import safe_open
from safetensors.torch import load_file

from modeling.pipeline import FaceVAEPipeline
from training import compare, encode, reconstruct, synthetic_faces
from training.data.synthetic_faces.render import render_face
from training.evaluate import command as evaluate
from training.evaluate.measure import bootstrap_means

SIZE = tiny.SETTINGS["model"]["sample_size"]
OFFLINE = ["--lpips", "st_alexnet"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Two exported models with different weights and a measured scaling."""
    folders = []
    for name, settings in (("one", {}), ("other", {"pca_decode_size": 40})):
        vae = tiny.random_vae(**settings)
        vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
        folders.append(tmp_path_factory.mktemp(name) / "model")
        vae.save_pretrained(folders[-1])
    return [str(folder) for folder in folders]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "faces"
    assert synthetic_faces.main(["--output", str(folder), "--num-images", "7"]) == 0
    return folder


def output(capsys, command, *arguments: str) -> dict:
    capsys.readouterr()
    assert command.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- synthetic_faces ----


def test_synthetic_faces_are_image_files_of_consecutive_seeds(photographs):
    files = sorted(photographs.iterdir())
    assert [file.name for file in files] == [f"synthetic_{2_000_000_000 + index}.jpg" for index in range(7)]
    pixels = np.asarray(Image.open(files[3])).astype(int)
    assert np.abs(pixels - render_face(2_000_000_003)).mean() < 4  # JPEG


# ---- reconstruct ----


@pytest.mark.parametrize(
    ("place", "reason"), [("strip", "must be a file that ends in .png"), ("file/x.png", "cannot be written")]
)
def test_an_output_that_cannot_be_written_is_an_error_before_the_work(
    models, photographs, tmp_path, capsys, place, reason
):
    (tmp_path / "file").touch()
    (tmp_path / "strip").mkdir()
    assert reconstruct.main([models[0], str(photographs / "missing.jpg"), "--output", str(tmp_path / place)]) == 2
    assert "missing.jpg does not exist" in capsys.readouterr().err
    assert reconstruct.main(["no/model", str(photographs), "--output", str(tmp_path / place)]) == 2
    assert reason in capsys.readouterr().err


def test_reconstruct_writes_a_strip_and_the_metrics_of_each_image(models, photographs, tmp_path, capsys):
    strip = tmp_path / "new" / "strip.png"
    result = output(capsys, reconstruct, models[0], photographs, *OFFLINE, "--output", strip)
    assert [Path(row["file"]) for row in result["images"]] == sorted(photographs.iterdir())
    assert result["mean"]["psnr"] == pytest.approx(np.mean([row["psnr"] for row in result["images"]]))
    assert result["skipped"] == {}
    pixels = np.asarray(Image.open(strip))
    assert pixels.shape == (2 * (SIZE + 2) + 2, 8 * (SIZE + 2) + 2, 3)  # two rows of four pairs, borders of 2 pixels
    original, decoded = pixels[2 : 2 + SIZE, 2 : 2 + SIZE], pixels[2 : 2 + SIZE, 4 + SIZE : 4 + 2 * SIZE]
    expected = FaceVAEPipeline.from_pretrained(models[0]).reconstruct(Image.fromarray(original))[0]
    assert np.abs(decoded.astype(int) - np.asarray(expected)).max() <= 1
    mse = np.square(decoded.astype(float) - original).mean()
    assert result["images"][0]["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=0.05)


def test_reconstruct_prints_a_line_for_each_image_and_skips_corrupt_ones(models, photographs, tmp_path, capsys, caplog):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    files = [str(photographs / "synthetic_2000000000.jpg"), str(tmp_path / "broken.jpg")]
    command = [models[0], *files, "--lpips", "none", "--output", str(tmp_path / "strip.png")]
    assert reconstruct.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"PSNR [\d.]+ dB  SSIM [\d.-]+  /", lines[0]) and lines[0].endswith(files[0])
    assert lines[1].endswith("  mean")
    assert lines[2] == f"{tmp_path / 'strip.png'}: 1 originals (left) and reconstructions (right)"
    assert "broken.jpg skipped" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg does not exist"),
        (["empty"], "'empty' holds no image"),
        (["text.jpg"], "no file is a readable image: give"),
        (["face.png", "--output", "strip.txt"], "--output strip.txt"),
        (["face.png", "--lpips", "resnet"], "resnet"),
    ],
)
def test_user_errors_of_reconstruct_are_one_line(models, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.jpg").write_text("a face")
    Image.fromarray(render_face(1)).save("face.png")
    assert reconstruct.main([models[0], "--lpips", "none", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.splitlines()[-1].startswith("error: ") and message in error.splitlines()[-1]


def test_the_feature_network_of_the_configuration_is_the_default(models, photographs, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"output": {"eval_lpips_trunk": "st_alexnet"}}))
    images = ["--data", f"imagefolder:{photographs}", "--max-images", "2", "--config", file]
    assert "lpips_st_alexnet" in output(capsys, compare, *models, *images)["metrics"]
    (model,) = output(capsys, evaluate, models[0], *images)["models"]
    assert {"lpips_st_alexnet", "frechet_st_alexnet"} < model["reconstruction"].keys()
    result = output(capsys, reconstruct, models[0], photographs, "--config", file, "--output", tmp_path / "strip.png")
    assert "lpips_st_alexnet" in result["mean"]


def test_reconstruct_takes_the_first_images_of_a_large_folder(models, photographs, tmp_path, capsys, caplog):
    strip = tmp_path / "strip.png"
    result = output(capsys, reconstruct, models[0], photographs, *OFFLINE, "--max-images", "2", "--output", strip)
    assert len(result["images"]) == 2
    assert "the first 2 of 7 images; --max-images takes more" in caplog.text


# ---- compare ----


def test_compare_gives_paired_intervals(models, photographs, tmp_path, capsys):
    images = ["--data", f"imagefolder:{photographs}", *OFFLINE]
    result = output(capsys, compare, *models, *images)
    assert (result["first"], result["second"], result["images"]) == (*models, 7)
    metrics = [
        output(capsys, reconstruct, model, photographs, *OFFLINE, "--output", tmp_path / "strip.png")
        for model in models
    ]
    for name in ("psnr", "ssim", "lpips_st_alexnet"):
        first, second = (np.array([row[name] for row in each["images"]]) for each in metrics)
        entry = result["metrics"][name]
        assert entry["first"] == pytest.approx(first.mean(), rel=1e-5)
        expected = bootstrap_means({name: second - first})[name]
        assert entry["difference"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        better = second > first if name in ("psnr", "ssim") else second < first
        assert entry["second_better_fraction"] == pytest.approx(better.mean())
    assert compare.main([*models, *images]) == 0
    assert "is better" in capsys.readouterr().out


def test_a_model_does_not_differ_from_itself(models, photographs, capsys):
    result = output(capsys, compare, models[0], models[0], "--data", f"imagefolder:{photographs}", "--lpips", "none")
    for entry in result["metrics"].values():
        assert entry["difference"] == {"mean": 0, "low": 0, "high": 0} and entry["better"] is None


def test_compare_names_the_better_model_in_the_direction_of_each_metric(models, photographs, tmp_path, capsys):
    images = ["--data", f"imagefolder:{photographs}", "--lpips", "none"]
    forward = output(capsys, compare, *models, *images)["metrics"]
    backward = output(capsys, compare, *models[::-1], *images)["metrics"]
    swapped = {"first": "second", "second": "first", None: None}
    assert any(entry["better"] for entry in forward.values())
    for name, entry in forward.items():
        assert backward[name]["better"] == swapped[entry["better"]]
        assert backward[name]["difference"]["mean"] == pytest.approx(-entry["difference"]["mean"])
        if name in ("psnr", "mse_-1_1") and entry["better"]:
            is_higher = entry["second"] > entry["first"]
            assert (entry["better"] == "second") == (is_higher if name == "psnr" else not is_higher)


# ---- encode ----


def encode_folder(model: str, photographs: Path, folder: Path, *arguments: str) -> int:
    images = ["--data", f"imagefolder:{photographs}", "--output", str(folder), "--shard-size", "3"]
    return encode.main([model, *images, "--batch-size", "2", *arguments])


def expected_latents(model: str, photographs: Path) -> tuple[torch.Tensor, torch.Tensor]:
    vae = FaceVAEPipeline.from_pretrained(model).vae
    images = [reconstruct_input(path) for path in sorted(photographs.iterdir())]
    with torch.no_grad():
        posterior = vae.encode(torch.stack(images)).latent_dist
    return (posterior.mean - 0.25) * 0.5, posterior.std * 0.5


def reconstruct_input(path: Path) -> torch.Tensor:
    from training.data.images import decode_image, normalize

    return normalize(torch.from_numpy(decode_image(path.read_bytes(), None, SIZE))).permute(2, 0, 1)


def test_encode_writes_scaled_posteriors_in_the_order_of_the_images(session, models, photographs, tmp_path, capsys):
    assert encode_folder(models[0], photographs, tmp_path) == 0
    assert f"{tmp_path}: 7 latents 16x1x1 in 3 shards" in capsys.readouterr().out
    index = json.loads((tmp_path / "latents.json").read_text())
    assert index["images"] == 7 and index["latent_shape"] == [16, 1, 1]
    shards = [load_file(tmp_path / name) for name in index["shards"]]
    assert [len(shard["mean"]) for shard in shards] == [3, 3, 1]
    mean, std = expected_latents(models[0], photographs)
    torch.testing.assert_close(torch.cat([shard["mean"] for shard in shards]), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([shard["std"] for shard in shards]), std, atol=1e-5, rtol=1e-4)
    with safe_open(tmp_path / index["shards"][1], "pt") as file:
        ids = json.loads(file.metadata()["ids"])
    assert [Path(each).name for each in ids] == [f"synthetic_{2_000_000_000 + i}.jpg" for i in (3, 4, 5)]


def test_parquet_shards_hold_the_same_latents(session, models, photographs, tmp_path):
    assert encode_folder(models[0], photographs, tmp_path, "--format", "parquet") == 0
    table = pq.read_table([str(path) for path in sorted(tmp_path.glob("*.parquet"))])
    mean, std = expected_latents(models[0], photographs)
    for name, expected in (("mean", mean), ("std", std)):
        values = torch.tensor(table[name].to_pylist())
        torch.testing.assert_close(values, expected.flatten(1), atol=1e-5, rtol=1e-4)
    assert json.loads(table.schema.metadata[b"latent_shape"]) == [16, 1, 1]


def test_encode_resumes_with_the_missing_shards(session, models, photographs, tmp_path, monkeypatch):
    def interrupted(path: Path, content: bytes) -> None:
        if "00001" in path.name:
            raise KeyboardInterrupt
        write_file(path, content)

    write_file = encode.write_file
    monkeypatch.setattr(encode, "write_file", interrupted)
    assert encode_folder(models[0], photographs, tmp_path) == 130
    monkeypatch.setattr(encode, "write_file", write_file)
    first = tmp_path / "latents_00000.safetensors"
    written = first.stat().st_mtime_ns
    assert encode_folder(models[0], photographs, tmp_path) == 0
    assert first.stat().st_mtime_ns == written
    assert encode_folder(models[0], photographs, tmp_path / "uninterrupted") == 0
    for path in (tmp_path / "uninterrupted").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.multiprocess
def test_processes_divide_the_shards(session, models, photographs, tmp_path):
    assert encode_folder(models[0], photographs, tmp_path / "one") == 0
    log = tmp_path / "log"
    assert fork_ranks(lambda: encode_folder(models[0], photographs, tmp_path / "two"), log, 2) == [0, 0], (
        log.read_text()
    )
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert log.read_text().count("two: 7 latents 16x1x1 in 3 shards") == 1


def test_latents_of_another_model_are_not_mixed(session, models, photographs, tmp_path, capsys):
    assert encode_folder(models[0], photographs, tmp_path) == 0
    assert encode_folder(models[1], photographs, tmp_path) == 2
    assert "latents of other settings (model, weights_sha256)" in capsys.readouterr().err
    assert encode_folder(models[0], photographs, tmp_path, "--format", "parquet") == 2
    assert "(format)" in capsys.readouterr().err


def test_a_corrupt_image_is_left_out(session, models, photographs, tmp_path, caplog, capsys):
    folder = tmp_path / "faces"
    assert synthetic_faces.main(["--output", str(folder), "--num-images", "4"]) == 0
    (folder / "synthetic_2000000001.jpg").write_bytes(b"\xff\xd8\xff not an image")
    assert encode_folder(models[0], folder, tmp_path / "latents") == 0
    assert "3 latents" in capsys.readouterr().out and "corrupt image skipped" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --data or --config"),
        (["--data", "synthetic_faces", "--set", "data.crop_px=20"], "--set changes a configuration"),
        (["--data", "imagefolder:/nowhere"], "not a folder"),
    ],
)
def test_user_errors_of_encode_are_one_line(session, models, tmp_path, capsys, arguments, message):
    assert encode.main([models[0], "--output", str(tmp_path / "latents"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error
    assert not (tmp_path / "latents").exists()
