"""The configuration: every file in configs/ loads and builds, and errors name the key, the value and the remedy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.budget.estimate import count_flops
from training.builders import build_model
from training.config import (
    RENAMED,
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


def test_folders_of_outputs_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    output = config_from_dict({"output": {"runs_dir": "~/runs"}}).output
    assert (output.runs_dir, output.model_dir) == ("/home/somebody/runs", "model_weights")


def test_the_documented_files_exist():
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
    for section, values in written.items():
        for key, value in values.items():
            assert config.flat()[f"{section}.{key}"] == value


def test_ultra_sets_the_values_of_the_reference_configuration(ultra):
    presets = vars_of(ultra.training_presets)
    wanted = {"num_epochs": 200, "batch_size": 64, "learning_rate": 5e-5, "optimizer": "adam", "weight_decay": 1e-5}
    wanted |= {"plateau_patience": 10, "early_stopping_patience": 20, "max_grad_norm": 1.0}
    wanted |= {"kl_cycle_enabled": True, "kl_cycle_period": 8, "kl_cooldown_epochs": 2}
    wanted |= {"kl_cooldown_reduction": 0.25, "kl_beta_floor": 5e-5, "kl_floor_growth": 1.02}
    assert {key: presets[key] for key in wanted} == wanted
    # In the file itself, so that a changed default cannot change it.
    assert json.loads(ULTRA.read_text())["training_presets"].keys() >= wanted.keys()
    loss = vars_of(ultra.loss)
    assert [loss[f"{name}_weight"] for name in ("mse", "l1", "perceptual", "lpips")] == [0.4, 0.2, 0.2, 0.2]
    assert (ultra.data.dataset, ultra.data.crop_px) == ("flwrlabs/celeba", 178)
    assert re.fullmatch("[0-9a-f]{40}", ultra.data.revision)
    assert (ultra.model["sample_size"], ultra.output.run_name) == (256, "ultra_high_quality")


def test_ultra_is_within_its_budget(ultra):
    cost = count_flops(ultra)
    assert cost["latent_shape"] == (1024, 1, 1)
    assert cost["parameters"] >= 50e6
    assert cost["gflop_forward"] <= 15
    assert cost["gflop_training"] <= 46
    with torch.device("meta"):
        model = AutoencoderKLUltra(**ultra.model)
    widths = {module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)}
    assert 256 in widths


def test_the_defaults_are_those_of_the_reference_configuration():
    presets = TrainingPresets()
    assert (presets.num_epochs, presets.batch_size, presets.learning_rate) == (200, 64, 5e-5)
    assert (presets.weight_decay, presets.plateau_patience, presets.early_stopping_patience) == (1e-5, 10, 20)


# ---- errors ----

NAN, INFINITY = float("nan"), float("inf")
INVALID = [
    # Types: (section, key, value, message)
    ("training_presets", "batch_size", 64.0, "must be an integer, got 64.0."),
    ("training_presets", "batch_size", True, "must be an integer, got true."),
    ("training_presets", "learning_rate", "5e-5", 'must be a number, got "5e-5".'),
    ("training_presets", "learning_rate", False, "must be a number, got false."),
    ("training_presets", "learning_rate", None, "must be a number, got null."),
    ("training_presets", "compile", 1, "must be true or false, got 1."),
    ("training_presets", "max_train_minutes", True, "must be a number or null, got true."),
    ("data", "revision", 5, "must be a string or null, got 5."),
    ("data", "data_files", ["a.parquet"], 'must be an object or null, got ["a.parquet"].'),
    ("data", "validation_split", "", 'must be a non-empty string or null, got "".'),
    # Limits
    ("training_presets", "learning_rate", 0, "must be greater than 0, got 0.0."),
    ("training_presets", "num_epochs", 0, "must be at least 1, got 0."),
    ("training_presets", "ema_decay", 1.0, "must be at least 0 and less than 1, got 1.0."),
    ("training_presets", "max_train_minutes", 0, "must be greater than 0, got 0.0."),
    ("training_presets", "micro_batch_size", 0, "must be at least 1, got 0."),
    ("training_presets", "seed", -1, "must be at least 0 and at most 18446744073709551615, got -1."),
    (
        "training_presets",
        "seed",
        2**64,
        "must be at least 0 and at most 18446744073709551615, got 18446744073709551616.",
    ),
    ("data", "crop_px", 8, "must be at least 16, got 8."),
    ("data", "holdout_fraction", 0.6, "must be greater than 0 and less than 0.5, got 0.6."),
    ("loss", "mse_weight", -1, "must be at least 0, got -1.0."),
    ("loss", "perceptual_crop_px", 31, "must be at least 32, got 31."),
    ("output", "keep_checkpoints", 0, "must be at least 2, got 0."),
    # Choices
    ("training_presets", "optimizer", "sgd", 'must be "adam", "adamw" or "muon", got "sgd".'),
    ("training_presets", "mixed_precision", "fp8", 'must be "auto", "no", "bf16" or "fp16", got "fp8".'),
    ("training_presets", "micro_batch_size", "x", 'must be an integer, "auto" or null, got "x".'),
    ("loss", "trunk", "resnet", 'must be "vgg16", "alexnet", "squeezenet", "st_alexnet" or "st_vgg16", got "resnet".'),
    ("loss", "lpips_trunk", "alex", 'must be "vgg16", "alexnet", "squeezenet", "st_alexnet", "st_vgg16" or null, got'),
    # Numbers that are not finite, at any depth
    ("training_presets", "learning_rate", NAN, "must be finite, got NaN."),
    ("training_presets", "learning_rate", INFINITY, "must be finite, got Infinity."),
    ("training_presets", "learning_rate", 10**400, "must be finite, got 1000"),
    ("training_presets", "resolution_schedule", {"64": NAN}, 'must be finite, got {"64": NaN}.'),
    ("training_presets", "kl_beta_init", NAN, "must be finite, got NaN."),
    ("training_presets", "kl_max_step", INFINITY, "must be finite, got Infinity."),
    ("loss", "mse_weight", INFINITY, "must be finite, got Infinity."),
    ("data", "timeout_s", -INFINITY, "must be finite, got -Infinity."),
    ("data", "data_files", {"train": ["a", NAN]}, 'must be finite, got {"train": ["a", NaN]}.'),
    ("model", "latents_std", [1.0, NAN], "must be finite, got [1.0, NaN]."),
    ("model", "logvar_init", -INFINITY, "must be finite, got -Infinity."),
    # Keys that depend on each other
    ("training_presets", "max_images_per_epoch", 63, "must be at least batch_size = 64, got 63."),
    ("data", "data_files", {"train": 5}, "must be an object of split names and paths (or lists of paths), got {"),
    ("data", "data_files", {"train": []}, "must be an object of split names and paths (or lists of paths), got {"),
    ("output", "run_name", "a/b", "must be letters, digits, '_', '-' and '.', starting with a letter or digit, got"),
    ("hub", "push_every_epochs", 0, "must be at least 1, got 0."),
    # Sections
    ("training_presets", "learning_rat", 1, "did you mean training_presets.learning_rate?"),
    ("loss", "lpip_weight", 1, "did you mean loss.lpips_weight?"),
    ("data", "kl_cycle_period", 8, "valid keys are data.attribute_columns, data.cache"),
    ("output", "zzz", 1, "valid keys are output.checkpoint_every_epochs"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), INVALID)
def test_an_invalid_value_is_an_error_with_key_value_and_remedy(section, key, value, message):
    with pytest.raises(ValueError) as caught:
        config_from_dict({section: {key: value}})
    text = str(caught.value)
    assert f"{section}.{key}" in text and message in text
    assert "\n" not in text and len(text) < 2000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training_preset": {}}, "unknown configuration key training_preset: did you mean training_presets?"),
        ({"data": [1]}, "section data must be an object of keys and values, got [1]."),
        ({"model": 3}, "section model must be an object of keys and values, got 3."),
        ({"data": {"dataset": "parquet"}}, "data.data_files must be an object such as {"),
        ({"data": {"dataset": "imagefolder"}}, "data.data_dir must be the folder of the images, got null."),
        (
            {"data": {"data_dir": "my/faces"}},
            'must be null unless data.dataset is "imagefolder" (set data.dataset=imagefolder, too), got "my/',
        ),
        (
            {"data": {"data_files": {"train": "a"}}},
            'must be null unless data.dataset is "parquet" (set data.dataset=parquet, too), got {',
        ),
        (
            {"output": {"trackers": "trackio,wandb"}},
            'output.trackers must be a list, such as ["trackio", "wandb"], got "trackio,wandb".',
        ),
        ({"data": {"attribute_columns": "Smiling"}}, 'must be a list, such as ["Smiling"], got "Smiling".'),
        ({"hub": {"push": True}}, 'hub.repo_id must be "organization/name" where hub.push is true, got null.'),
        (
            {"loss": {f"{name}_weight": 0 for name in ("mse", "l1", "perceptual", "lpips")}},
            "the sum of the weights in section loss must be greater than 0, got 0.0.",
        ),
        ({"loss": {"lpips_crop_px": 64}}, "loss.lpips_crop_px must be null without loss.lpips_trunk"),
    ],
)
def test_invalid_sections_and_combinations(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_dict(values)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_an_error_that_names_the_new_one(old, new):
    section = new.partition(".")[0]
    config = {section: {old: 1}}
    with pytest.raises(ValueError) as caught:
        build_model(config_from_dict(config))  # checks the keys of `model`
    assert str(caught.value) == f"unknown configuration key {section}.{old}: it was renamed to {new}."
    parameters = inspect.signature(AutoencoderKLUltra.__init__).parameters
    assert new in Config().flat() or new.removeprefix("model.") in parameters


def test_an_access_token_is_an_error():
    with pytest.raises(ValueError, match=r"data\.revision holds what looks like an access token"):
        config_from_dict({"data": {"revision": "hf_" + "a" * 20}})


def test_integers_become_floats_where_those_belong():
    rate = config_from_dict({"training_presets": {"learning_rate": 1}}).training_presets.learning_rate
    assert isinstance(rate, float)


def test_sections_are_immutable():
    with pytest.raises(AttributeError):
        TrainingPresets().batch_size = 3


def test_sections_built_in_python_are_checked_too():
    with pytest.raises(ValueError, match="training_presets.batch_size must be an integer, got true"):
        TrainingPresets(batch_size=True)
    with pytest.raises(ValueError, match="data.crop_px must be at least 16, got 8"):
        dataclasses.replace(DataConfig(), crop_px=8)


# ---- files and overrides ----


def test_overrides(tmp_path):
    path = tmp_path / "some.json"
    path.write_text('{"training_presets": {"batch_size": 8}, "loss": {"mse_weight": 1.0, "trunk": "alexnet"}}')
    config = load_config(
        path,
        [
            "training_presets.batch_size=32",
            "output.run_name=test-1",  # not JSON, so a string
            "data.dataset=parquet",
            'data.data_files={"train": "a=b.parquet"}',  # the first = separates
            "training_presets.learning_rate=1e-3",
            "training_presets.compile=true",
            "training_presets.micro_batch_size=null",
            "model.encoder_block_out_channels=[8, 16]",
            'loss={"l1_weight": 0.5}',  # replaces the section of the file
            "loss.lpips_weight=0.3",
        ],
    )
    presets = config.training_presets
    assert (presets.batch_size, presets.learning_rate, presets.compile) == (32, 1e-3, True)
    assert (config.output.run_name, config.data.data_files) == ("test-1", {"train": "a=b.parquet"})
    assert config.model == {"encoder_block_out_channels": [8, 16]}
    assert config.loss == LossConfig(l1_weight=0.5, lpips_weight=0.3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training_presets.batch_size", "--set training_presets.batch_size: write section.key=value"),
        ("training_presets.=3", "--set training_presets.=3: write section.key=value"),
        ("batch_size=3", "unknown configuration key batch_size: did you mean training_presets.batch_size?"),
        ("linear_size=3", "unknown configuration key linear_size: it was renamed to model.pca_size."),
        ("trainings.batch_size=3", "trainings.batch_size: did you mean training_presets.batch_size?"),
        ("training_presets.batch_size=many", 'training_presets.batch_size must be an integer, got "many".'),
        ("training_presets.batchsize=3", "did you mean training_presets.batch_size?"),
        ("training_presets.learning_rate=1e999", "training_presets.learning_rate must be finite, got Infinity."),
        ("loss=3", "section loss must be an object of keys and values, got 3."),
        ('data.data_files={"train": "a", "train": "b"}', "the key train is given twice in one object"),
        ('loss={"trunk": "alexnet", "trunk": "vgg16"}', "the key trunk is given twice in one object"),
        ("data.crop_px=" + "[" * 100_000, "data.crop_px must be an integer or null, got"),
    ],
)
def test_invalid_overrides(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(ULTRA, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": {', "is not JSON: "),
        ("", "is not JSON: "),
        ("\xff", "is not JSON: "),
        ("[" * 100_000, "is not JSON: "),
        ("[1]", "must be an object of sections, got [1]."),
        ('{"loss": {}, "data": {}, "loss": {}}', "the key loss is given twice in one object: keep one of them."),
        ('{"loss": {"trunk": "alexnet", "trunk": "vgg16"}}', "the key trunk is given twice in one object"),
        ('{"data": {"data_files": {"train": "a", "train": "b"}}}', "the key train is given twice in one object"),
    ],
)
def test_invalid_files(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_an_override_of_a_section_that_is_not_an_object(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"data": 5}')
    with pytest.raises(ValueError, match="section data must be an object of keys and values, got 5"):
        load_config(path, ["data.crop_px=32"])


def test_a_file_that_cannot_be_read_names_those_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"configs/ultr.json \(No such file.*\): use one of .*configs/ultra.json"):
        load_config("configs/ultr.json")
    with pytest.raises(ValueError, match=r"configs \(Is a directory\): use one of"):
        load_config("configs")


def test_a_pipe_is_read(tmp_path):
    """As `--config <(command)` and `--config /dev/stdin` give one."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[ULTRA.read_text()])
    writer.start()
    assert load_config(tmp_path / "pipe") == load_config(ULTRA)
    writer.join()


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "notepad.json"
    path.write_text('{"data": {"crop_px": 32}}', encoding="utf-8-sig")
    assert load_config(path).data.crop_px == 32


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_json_round_trip(path, tmp_path):
    config = load_config(path)
    written = tmp_path / "again.json"
    written.write_text(json.dumps(config.to_dict()))
    assert load_config(written) == config
    sections = (DataConfig, LossConfig, TrainingPresets, OutputConfig, HubConfig)
    assert len(config.flat()) == len(config.model) + sum(len(cls.__dataclass_fields__) for cls in sections)


# ---- imports ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import runpy, training.config; ULTRA = training.config.load_config('configs/ultra.json')"],
        ["train_vae.py", "--help"],
        ["train_vae.py", "--config", "configs/ultra.json", "--set", "data.crop=3"],
    ],
    ids=["import", "help", "misspelled"],
)
def test_reading_a_configuration_does_not_import_torch(arguments):
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (2 if "--set" in arguments else 0), done.stderr
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "training.config" in imported
    third_party = {name.partition(".")[0] for name in imported} & {"torch", "numpy", "diffusers", "datasets", "PIL"}
    assert not third_party


def vars_of(section) -> dict:
    return {name: getattr(section, name) for name in section.__dataclass_fields__}


def test_the_resolution_schedule_gives_the_resolution_of_each_epoch():
    presets = TrainingPresets(num_epochs=6, resolution_schedule={"64": 2, "128": 1})
    assert [presets.resolution(epoch) for epoch in range(6)] == [64, 64, 128, None, None, None]
    assert TrainingPresets().resolution(0) is None


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"128": 6}, "must be shorter than num_epochs = 6, got"),
        ({"128": 0}, 'must be an object {"pixels": epochs} of at least'),
        ({"128": 1.5}, 'must be an object {"pixels": epochs} of at least'),
        ({"half": 2}, 'must be an object {"pixels": epochs} of at least'),
        ({"16": 2}, 'must be an object {"pixels": epochs} of at least'),
    ],
)
def test_an_invalid_resolution_schedule_is_an_error(schedule, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        TrainingPresets(num_epochs=6, resolution_schedule=schedule)
    assert "training_presets.resolution_schedule" in str(caught.value)


def test_trunks_are_the_networks_in_use_with_their_crops():
    assert LossConfig(lpips_trunk="alexnet", perceptual_crop_px=48).trunks == [("vgg16", 48), ("alexnet", None)]
    assert LossConfig(lpips_trunk="alexnet", perceptual_weight=0, lpips_weight=0).trunks == []
    assert LossConfig(lpips_trunk="alexnet", lpips_weight=0).trunks == [("vgg16", None)]
    assert LossConfig(lpips_trunk="alexnet", perceptual_weight=0).trunks == [("vgg16", None), ("alexnet", None)]
