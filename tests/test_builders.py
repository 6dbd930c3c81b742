"""Which parameters are trained, and what the optimizer keeps for them."""

from __future__ import annotations

import pytest
import tiny
import torch

from training.builders import build_model, build_optimizer, freeze_parameters
from training.config import config_from_dict

PCA = {"pca_branch.encoder": ("encoder", "all"), "pca_branch.decoder": ("decoder", "all")}
HALVES = {"encoder": ("encoder", "all"), "logvar_bias": ("encoder", "all"), "decoder": ("decoder", "all")}


@pytest.mark.parametrize("pca_lr_scale", [0.0, 0.1])
@pytest.mark.parametrize("train_only", ["all", "encoder", "decoder"])
def test_the_optimizer_has_the_trained_half_only(train_only, pca_lr_scale):
    presets = {"train_only": train_only, "pca_lr_scale": pca_lr_scale, "weight_decay": 0.1}
    config = config_from_dict({**tiny.SETTINGS, "training_presets": presets})
    model = build_model(config)
    freeze_parameters(model, config.training_presets)
    parts = HALVES | (PCA if pca_lr_scale else {})
    expected = {part for part, trained_with in parts.items() if train_only in trained_with}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {
        name for name, _ in model.named_parameters() if name.startswith(tuple(f"{each}." for each in expected))
    } == (trained.keys())
    optimizer = build_optimizer(config.training_presets, model, list(trained.values()), torch.device("cpu"))
    groups = optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert all(group["weight_decay"] == 0.1 for group in groups)
    assert [group["lr_scale"] for group in groups] == [1.0, 0.1][: len(groups)]
    assert len(groups) == (2 if pca_lr_scale else 1)


def test_a_model_without_a_pca_branch_is_frozen_by_halves_too():
    settings = {**tiny.SETTINGS, "model": tiny.SETTINGS["model"] | {"pca_size": None}}
    config = config_from_dict({**settings, "training_presets": {"train_only": "decoder"}})
    model = build_model(config)
    freeze_parameters(model, config.training_presets)
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"decoder"}
