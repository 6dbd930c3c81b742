"""Muon: orthogonal updates of the hidden convolutions, AdamW for the rest, resumed bit for bit."""

from __future__ import annotations

import math
import signal

import pytest
import tiny
import torch
from runs import assert_same_state, run
from torch import nn

from modeling.latent_prior import DiffusionPrior
from training.budget.devices import DEVICES
from training.budget.estimate import estimate_step
from training.budget.memory import trace_memory
from training.builders import build_model, build_optimizer, freeze_parameters, hidden_convolutions
from training.config import TrainingPresets, config_from_dict
from training.muon import Muon, orthogonalization_flop, orthogonalize

MUON = {"optimizer": "muon", "weight_decay": 0.01}


@pytest.mark.parametrize("shape", [(24, 24), (16, 144), (96, 18)])
def test_orthogonalize_takes_all_singular_values_to_about_one(shape):
    matrices = 1e-3 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, singular, v = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices).float()
    rotated = u.mT @ result @ v.mT  # diagonal if the singular vectors are kept
    values = rotated.diagonal(dim1=-2, dim2=-1)
    large = singular > 0.05 * singular.amax(dim=-1, keepdim=True)
    assert values[large].min() > 0.6 and values[large].max() < 1.3
    assert (rotated - torch.diag_embed(values)).abs().max() < 0.05  # bfloat16


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (96, 4, 3, 3), (24, 8, 1, 1)])
def test_a_step_equals_the_formulas(session, shape):
    generator, longer = torch.Generator().manual_seed(0), max(shape[0], math.prod(shape[1:]))
    weight = nn.Parameter(torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last))
    bias, other = (nn.Parameter(torch.ones(8)) for _ in range(2))
    optimizer = Muon(
        [{"params": [weight], "muon": True, "lr": 0.01}, {"params": [bias], "lr": 0.01}],
        betas=(0.9, 0.99), weight_decay=0.1, fused=True,
    )  # fmt: skip
    adamw = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    momentum = torch.zeros_like(weight)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(weight.shape, generator=generator), torch.randn(8, generator=generator)
        other.grad = bias.grad.clone()
        momentum = 0.95 * momentum + 0.05 * weight.grad
        direction = orthogonalize((0.05 * weight.grad + 0.95 * momentum).flatten(1)).float().view(weight.shape)
        wanted = weight.detach() * (1 - 0.01 * 0.1) - 0.01 * 0.2 * longer**0.5 * direction
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(weight.detach(), wanted)
        torch.testing.assert_close(bias, other)
    # The size of Adam's update, whose root mean square is 0.2 to 0.4 of the learning rate.
    assert 0.15 < (0.2 * longer**0.5 * direction).square().mean().sqrt() < 0.5
    assert set(optimizer.state[weight]) == {"exp_avg"}
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_muon_has_the_convolutions_between_feature_maps_and_adamw_the_rest():
    config = config_from_dict({**tiny.SETTINGS, "training_presets": MUON | {"pca_lr_scale": 0.1}})
    model = build_model(config)
    freeze_parameters(model, config.training_presets)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(config.training_presets, model, list(model.parameters()), torch.device("cpu"))
    rest, muon, pca = [[names[each] for each in group["params"]] for group in optimizer.param_groups]
    assert [group["muon"] for group in optimizer.param_groups] == [False, True, False]
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 3.0, 0.1]
    assert "encoder.stages.0.0.conv1.weight" in muon and "decoder.upsamples.0.conv.weight" in muon
    assert all(name.endswith("conv.weight") or "conv1" in name or "conv2" in name for name in muon)
    for part in ("encoder.conv_in", "decoder.conv_out", "encoder.head", "decoder.stem"):
        assert not any(name.startswith(part) for name in muon) and any(name.startswith(part) for name in rest)
    assert all(name.startswith("pca_branch") for name in pca)
    assert sorted([*rest, *muon, *pca]) == sorted(names.values())


def test_muon_takes_the_blocks_of_a_diffusion_prior():
    prior = DiffusionPrior(image_size=8, patch_size=2, block_out_channels=(32, 64), latent_dim=4)
    named = {parameter: name for name, parameter in prior.named_parameters()}
    names = [named[each] for each in hidden_convolutions(prior)]
    assert names and all("conv1" in name or "conv2" in name for name in names)
    trained = [parameter for parameter in prior.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(TrainingPresets(optimizer="muon"), prior, trained, torch.device("cpu"))
    members = [named[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(members) == sorted(named[parameter] for parameter in trained)
    assert not any(name.startswith("guide") for name in members)


def test_an_interrupted_run_resumes_bit_for_bit(faces, tmp_path):
    config = tiny.tiny_config(tmp_path, faces, training_presets=MUON)
    through = run(tiny.tiny_config(tmp_path / "other", faces, training_presets=MUON))
    assert run(config, stop_after={4: signal.SIGTERM}).status["state"] == "stopped"
    resumed = run(config, "auto")
    assert_same_state(through, resumed)
    kinds = {len(entry) for entry in resumed.trainer.setup.optimizer.state_dict()["state"].values()}
    assert kinds == {1, 3}


def test_the_estimate_has_one_state_and_the_iterations_of_muon():
    def memory(optimizer):
        return trace_memory(
            config_from_dict({**tiny.SETTINGS, "training_presets": {"optimizer": optimizer}}), 2, keeps_gradients=True
        )

    adam, muon = memory("adam"), memory("muon")
    model = build_model(config_from_dict(tiny.SETTINGS))
    weights = hidden_convolutions(model)
    assert adam.parts["optimizer state"] - muon.parts["optimizer state"] == 4 * sum(w.numel() for w in weights)
    assert orthogonalization_flop(torch.empty(8, 4, 3, 3)) == 5 * (2 * 2 * 8 * 8 * 36 + 2 * 8 * 8 * 8)
    assert muon.optimizer_flop == sum(map(orthogonalization_flop, weights)) and adam.optimizer_flop == 0
    device = next(iter(DEVICES.values()))
    assert estimate_step(muon, device, 1, 1)["optimizer"] > estimate_step(adam, device, 1, 1)["optimizer"]
