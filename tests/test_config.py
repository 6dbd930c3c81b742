"""The configuration: every file of configs/ loads and builds, and what is wrong is named with its remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.budget.plan import count_cost
from training.config import (
    Config,
    DataConfig,
    HubConfig,
    LossConfig,
    OutputConfig,
    TrainingPresets,
    config_from_dict,
    load_config,
)

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.json"))
ULTRA = ROOT / "configs" / "ultra.json"


@pytest.fixture(scope="module")
def ultra() -> Config:
    return load_config(ULTRA)


def test_there_are_the_promised_files():
    assert {path.stem for path in FILES} >= {"quickstart", "standard", "ultra"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads_and_its_model_builds(path):
    config = load_config(path)
    with torch.device("meta"):
        model = AutoencoderKLUltra(**config.model)
        size = model.config.sample_size
        latents = model.encode(torch.zeros(1, 3, size, size)).latent_dist.mean
    assert latents[0].numel() == config.model["latent_dim"]
    written = json.loads(path.read_text())
    for section, values in written.items():  # what the file says is what the configuration holds
        for key, value in values.items():
            assert config.flat()[f"{section}.{key}"] == value


def test_ultra_holds_the_missions_values(ultra):
    presets = vars_of(ultra.training_presets)
    wanted = {"num_epochs": 200, "batch_size": 64, "learning_rate": 5e-5, "optimizer": "adam", "weight_decay": 1e-5}
    wanted |= {"plateau_patience": 10, "early_stopping_patience": 20, "max_grad_norm": 1.0}
    wanted |= {"kl_cycle_enabled": True, "kl_cycle_period": 8, "kl_cooldown_epochs": 2}
    wanted |= {"kl_cooldown_reduction": 0.25, "kl_beta_floor": 5e-5, "kl_floor_growth": 1.02}
    assert {key: presets[key] for key in wanted} == wanted
    # In the file itself, so that a changed default cannot change the mission.
    assert json.loads(ULTRA.read_text())["training_presets"].keys() >= wanted.keys()
    loss = vars_of(ultra.loss)
    assert [loss[f"{name}_weight"] for name in ("mse", "l1", "perceptual", "lpips")] == [0.4, 0.2, 0.2, 0.2]
    assert (ultra.data.dataset, ultra.data.crop_px) == ("flwrlabs/celeba", 178)
    assert re.fullmatch("[0-9a-f]{40}", ultra.data.revision)
    assert (ultra.model["sample_size"], ultra.output.run_name) == (256, "ultra_high_quality")


def test_ultra_keeps_its_budget(ultra):
    cost = count_cost(ultra)
    assert cost["latent_shape"] == (1024, 1, 1)
    assert cost["parameters"] >= 50e6
    assert cost["gflop_forward"] <= 15
    assert cost["gflop_training"] <= 46
    with torch.device("meta"):
        model = AutoencoderKLUltra(**ultra.model)
    widths = {module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)}
    assert 256 in widths


def test_the_default_configuration_is_the_missions_too():
    presets = TrainingPresets()
    assert (presets.num_epochs, presets.batch_size, presets.learning_rate) == (200, 64, 5e-5)
    assert (presets.weight_decay, presets.plateau_patience, presets.early_stopping_patience) == (1e-5, 10, 20)


# ---- what is wrong ----

WRONG = [
    ({"training_preset": {}}, "unknown configuration key training_preset: did you mean training_presets?"),
    (
        {"training_presets": {"learning_rat": 1}},
        "training_presets.learning_rat: did you mean training_presets.learning",
    ),
    ({"loss": {"lpip_weight": 1}}, "unknown configuration key loss.lpip_weight: did you mean loss.lpips_weight?"),
    ({"data": {"kl_cycle_period": 8}}, "unknown configuration key data.kl_cycle_period: known are data.cache"),
    ({"training_presets": {"lr": 8}}, "unknown configuration key training_presets.lr: known are training_presets.ad"),
    ({"output": {"zzz": 1}}, "unknown configuration key output.zzz: known are output.checkpoint_every_epochs"),
    ({"data": [1]}, "section data is [1]: give an object"),
    ({"model": 3}, "model is 3: give an object"),
    ({"training_presets": {"batch_size": 64.0}}, "training_presets.batch_size is 64.0: give a whole number"),
    ({"training_presets": {"batch_size": True}}, "training_presets.batch_size is true: give a whole number"),
    ({"training_presets": {"learning_rate": "5e-5"}}, 'training_presets.learning_rate is "5e-5": give a number'),
    ({"training_presets": {"learning_rate": None}}, "training_presets.learning_rate is null: give a number"),
    ({"training_presets": {"compile": 1}}, "training_presets.compile is 1: give true or false"),
    ({"training_presets": {"micro_batch_size": "x"}}, "micro_batch_size is 'x': use at least 1, \"auto\" or null"),
    ({"data": {"revision": 5}}, "data.revision is 5: give a string or null"),
    ({"training_presets": {"learning_rate": 0}}, "training_presets.learning_rate is 0.0: use a number above 0"),
    ({"training_presets": {"learning_rate": float("nan")}}, "training_presets.learning_rate is nan"),
    ({"training_presets": {"num_epochs": 0}}, "training_presets.num_epochs is 0: use at least 1"),
    ({"training_presets": {"ema_decay": 1.0}}, "training_presets.ema_decay is 1.0: use 0 (off) to less than 1"),
    ({"training_presets": {"optimizer": "sgd"}}, "training_presets.optimizer is 'sgd': use adam or adamw"),
    ({"training_presets": {"mixed_precision": "fp8"}}, "mixed_precision is 'fp8': use auto, no, bf16 or fp16"),
    ({"training_presets": {"max_train_minutes": 0}}, "max_train_minutes is 0.0: use a number above 0, or null"),
    ({"training_presets": {"max_images_per_epoch": 63}}, "max_images_per_epoch is 63: use at least batch_size = 64"),
    ({"training_presets": {"kl_floor_growth": 0.9}}, "training_presets.kl_floor_growth is 0.9: give a factor of at"),
    ({"training_presets": {"kl_cooldown_epochs": 8}}, "training_presets.kl_cooldown_epochs is 8"),
    ({"loss": {"trunk": "resnet"}}, "loss.trunk is 'resnet': use one of vgg16, alexnet"),
    ({"loss": {"mse_weight": -1}}, "loss.mse_weight is -1.0: use 0 or more"),
    ({"loss": {"perceptual_crop_px": 31}}, "loss.perceptual_crop_px is 31: use at least 32 pixels"),
    (
        {"loss": {f"{name}_weight": 0 for name in ("mse", "l1", "perceptual", "lpips")}},
        "the sum of the loss weights is 0.0: give at least one term",
    ),
    ({"output": {"run_name": "a/b"}}, "output.run_name is 'a/b': use letters, digits"),
    ({"output": {"keep_checkpoints": 0}}, "output.keep_checkpoints is 0: use at least 2"),
    ({"data": {"dataset": "parquet"}}, "data.data_files is None: give {"),
    ({"data": {"dataset": "imagefolder"}}, "data.data_dir is None: give the folder"),
    ({"data": {"holdout_fraction": 0.6}}, "data.holdout_fraction is 0.6: use 0.001 to 0.5"),
    ({"hub": {"push": True}}, 'hub.repo_id is None: give "organisation/name"'),
]


@pytest.mark.parametrize(
    ("values", "message"), WRONG, ids=lambda value: None if isinstance(value, dict) else value[:40]
)
def test_what_is_wrong_is_named_with_its_remedy(values, message):
    with pytest.raises(ValueError) as caught:
        config_from_dict(values)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text and len(text) < 2000


def test_whole_numbers_are_taken_for_real_ones():
    rate = config_from_dict({"training_presets": {"learning_rate": 1}}).training_presets.learning_rate
    assert isinstance(rate, float)


def test_sections_cannot_be_changed():
    with pytest.raises(AttributeError):
        TrainingPresets().batch_size = 3


# ---- files and overrides ----


def test_overrides(tmp_path):
    path = tmp_path / "some.json"
    path.write_text('{"training_presets": {"batch_size": 8}}')
    config = load_config(
        path,
        [
            "training_presets.batch_size=32",
            "output.run_name=test-1",  # not JSON, so a string
            'data.data_files={"train": "a=b.parquet"}',  # the first = divides
            "training_presets.learning_rate=1e-3",
            "training_presets.compile=true",
            "training_presets.micro_batch_size=null",
            "model.encoder_block_out_channels=[8, 16]",
        ],
    )
    presets = config.training_presets
    assert (presets.batch_size, presets.learning_rate, presets.compile) == (32, 1e-3, True)
    assert (config.output.run_name, config.data.data_files) == ("test-1", {"train": "a=b.parquet"})
    assert config.model == {"encoder_block_out_channels": [8, 16]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training_presets.batch_size", "--set training_presets.batch_size: write section.key=value"),
        ("batch_size=3", "--set batch_size=3: write section.key=value"),
        ("training_presets.=3", "--set training_presets.=3: write section.key=value"),
        ("trainings.batch_size=3", "trainings.batch_size: did you mean training_presets.batch_size?"),
        ("training_presets.batch_size=many", 'training_presets.batch_size is "many": give a whole number'),
        ("training_presets.batchsize=3", "did you mean training_presets.batch_size?"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(ULTRA, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": {', "is not JSON: "),
        ("", "is not JSON: "),
        ("\xff", "is not JSON: "),
        ("[1]", "holds list: it must be an object of sections"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_an_override_of_a_section_that_is_no_object(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"data": 5}')
    with pytest.raises(ValueError, match="section data is 5: give an object"):
        load_config(path, ["data.crop_px=32"])


def test_a_missing_file_names_those_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"no configuration file configs/ultr.json.*configs/ultra.json"):
        load_config("configs/ultr.json")
    with pytest.raises(ValueError, match="no configuration file configs"):  # a folder
        load_config("configs")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_json_round_trip(path, tmp_path):
    config = load_config(path)
    written = tmp_path / "again.json"
    written.write_text(json.dumps(config.to_dict()))
    assert load_config(written) == config
    sections = (DataConfig, LossConfig, TrainingPresets, OutputConfig, HubConfig)
    assert len(config.flat()) == len(config.model) + sum(len(cls.__dataclass_fields__) for cls in sections)


# ---- what reading a configuration costs ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import runpy, training.config; ULTRA = training.config.load_config('configs/ultra.json')"],
        ["train_vae.py", "--help"],
        ["train_vae.py", "--config", "configs/ultra.json", "--set", "data.crop=3"],
    ],
    ids=["import", "help", "misspelt"],
)
def test_no_torch_is_imported_for_it(arguments):
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (2 if "--set" in arguments else 0), done.stderr
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "training.config" in imported
    third_party = {name.partition(".")[0] for name in imported} & {"torch", "numpy", "diffusers", "datasets", "PIL"}
    assert not third_party


def vars_of(section) -> dict:
    return {name: getattr(section, name) for name in section.__dataclass_fields__}


def test_the_resolution_schedule_says_the_side_of_each_epoch():
    presets = TrainingPresets(num_epochs=6, resolution_schedule={"64": 2, "128": 1})
    assert [presets.resolution(epoch) for epoch in range(6)] == [64, 64, 128, None, None, None]
    assert TrainingPresets().resolution(0) is None


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"128": 6}, "leave some of the 6 epochs for the full resolution"),
        ({"128": 0}, 'write {"pixels": epochs}'),
        ({"128": 1.5}, 'write {"pixels": epochs}'),
        ({"half": 2}, 'write {"pixels": epochs}'),
        ({"16": 2}, 'write {"pixels": epochs}'),
    ],
)
def test_a_resolution_schedule_that_cannot_be_is_refused(schedule, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        TrainingPresets(num_epochs=6, resolution_schedule=schedule)
    assert "training_presets.resolution_schedule" in str(caught.value)


def test_windows_of_lpips_need_its_network():
    with pytest.raises(ValueError, match="loss.lpips_crop_px is 64: set loss.lpips_trunk too"):
        LossConfig(lpips_crop_px=64)
    with pytest.raises(ValueError, match="loss.lpips_trunk is 'alex': use null or one of"):
        LossConfig(lpips_trunk="alex")
    assert LossConfig(lpips_trunk="alexnet", perceptual_crop_px=48).trunks == [("vgg16", 48), ("alexnet", None)]
    assert LossConfig(lpips_trunk="alexnet", perceptual_weight=0, lpips_weight=0).trunks == []
