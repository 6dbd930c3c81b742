"""Every file in configs/ has a cost estimate and trains: ten steps of a small model, with its data section and presets."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image
from runs import run

from training.budget import command
from training.config import config_from_dict
from training.data.synthetic_faces.render import render_face
from training.losses.kl_control import KLController

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))
STEPS, BATCH = 10, 4


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """60 faces as JPEG."""
    encoded = []
    for seed in range(60):
        buffer = io.BytesIO()
        Image.fromarray(render_face(seed)).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    return encoded


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_estimate_needs_no_data(path, capsys):
    assert command.main(["--config", str(path), "--device", "rtx3090"]) == 0
    assert "epoch  " in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_minimum_beta_stays_below_the_first_beta(path):
    presets = config_from_dict(json.loads(path.read_text())).training_presets
    last = KLController(presets, presets.kl_control_enabled).minimum_beta(presets.num_epochs - 1)
    assert last <= presets.kl_beta_init, f"lower kl_floor_growth: {last:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_trains_ten_steps(path, images, tmp_path, session):
    """A data set of the Hub is replaced by parquet files with the same splits."""
    values = json.loads(path.read_text())
    data = values["data"]
    if data["dataset"] == "imagefolder":
        (tmp_path / "faces").mkdir()
        for number, content in enumerate(images):
            (tmp_path / "faces" / f"{number}.jpg").write_bytes(content)
        data["data_dir"] = str(tmp_path / "faces")
    elif data["dataset"] == "synthetic_faces":
        data |= {"synthetic_train_images": STEPS * BATCH, "synthetic_validation_images": 6}
    else:
        split = data["validation_split"]
        parts = {data["train_split"]: images[:52]} | ({split: images[52:]} if split else {})
        for name, part in parts.items():
            pq.write_table(pa.table({"image": part}), tmp_path / f"{name}.parquet")
        files = {name: str(tmp_path / f"{name}.parquet") for name in parts}
        data |= {"dataset": "parquet", "revision": None, "data_files": files}
    if data.get("validation_split", "") is None:
        data["holdout_fraction"] = 0.1
    data |= {"cache_dir": str(tmp_path / "cache"), "decode_threads": 1}
    values["model"] = tiny.SETTINGS["model"]
    loss = {name: value for name, value in values.get("loss", {}).items() if name.endswith("_weight")}
    values["loss"] = loss | {"trunk": "st_alexnet", "perceptual_crop_px": 32}
    presets = values["training_presets"]
    presets |= {"num_epochs": 1, "batch_size": BATCH, "pca_init_images": 18, "mixed_precision": "no"}
    presets |= {"max_images_per_epoch": STEPS * BATCH, "resolution_schedule": {}, "pca_init_augmented_copies": 1}
    if presets.get("init_from"):
        presets["init_from"] = str(tmp_path / "base")
        tiny.random_vae().save_pretrained(presets["init_from"])
    values["output"] |= {"runs_dir": str(tmp_path / "runs"), "model_dir": str(tmp_path / "models")}
    values["output"] |= {"eval_lpips_trunk": "st_alexnet", "num_samples": 4}
    result = run(config_from_dict(values))
    assert result.code == 0 and result.status["state"] == "finished"
    assert result.lines("validation")[-1]["step"] == STEPS
