"""A file of weights that has left its folder names its run, step, configuration and metrics."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace

import torch
from safetensors import safe_open

from training.evaluate.models import load_autoencoder, weights_metadata
from training.evaluate.report import table_rows
from training.publish.export_formats import write_variant
from training.run_files import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    best_checkpoint,
    list_checkpoints,
    read_state,
)


def test_every_file_of_a_checkpoint_names_its_run_and_step(finished):
    for checkpoint in list_checkpoints(finished.folder):
        state = read_state(checkpoint)
        config = hashlib.sha256(json.dumps(state["config"], sort_keys=True).encode()).hexdigest()
        for name in (MODEL_FILE, WEIGHTS_FILE, OPTIMIZER_FILE):
            with safe_open(checkpoint / name, "pt") as file:
                metadata = file.metadata()
            assert metadata["run"] == finished.folder.name and metadata["config_sha256"] == config
            assert checkpoint.name == f"step_{int(metadata['step']):08d}"
            assert metadata["images_seen"] == str(state["progress"]["images_seen"])


def test_the_exported_model_has_the_metrics_of_its_validation(finished, tmp_path):
    _, best = best_checkpoint(finished.folder)
    metadata = weights_metadata(finished.status["model_dir"])
    assert float(metadata["validation/psnr"]) == best["validation/psnr"] and metadata["step"] == str(best["step"])
    folder = tmp_path / "model"
    shutil.copytree(finished.status["model_dir"], folder)
    with safe_open(write_variant(folder, "fp16"), "pt") as file:
        assert file.metadata() == metadata


def test_evaluate_shows_where_the_weights_come_from(finished):
    model = load_autoencoder(finished.status["model_dir"], None, None, torch.device("cpu"))
    common = {"class": "", "resolution": 40, "latent_dim": 16, "latent_shape": [16, 1, 1], "parameters": 1}
    metrics = {"reconstruction": {}, "posterior_sample": None, "kl": 0.1, "active_units": 1, "posterior_sigma": 0.1}
    networks = SimpleNamespace(frechet=None)
    ours = {"model": "a", "weights": model.metadata, **common, **metrics}
    theirs = {**ours, "weights": {"format": "pt"}}
    _, rows = table_rows([ours, theirs], networks)
    step = best_checkpoint(finished.folder)[1]["step"]
    assert ["trained in", f"{finished.folder.name}, step {step}", "-"] in rows
    assert not any(row[0] == "trained in" for row in table_rows([theirs], networks)[1])
