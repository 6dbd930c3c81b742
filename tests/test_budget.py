"""What a configuration costs, against formulas written here, and the plan's arithmetic."""

from __future__ import annotations

import re

import pytest
import tiny
import torch

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.budget import count_cost, describe_plan
from training.config import config_from_dict


def conv(channels_in: int, channels_out: int, kernel: int, size: int) -> float:
    """GFLOP of a convolution onto a map of size x size; a multiplication and an addition are two."""
    return 2 * channels_in * channels_out * kernel**2 * size**2 / 1e9


# The tiny configuration: 40 pixels, patches of 4, so stages at 10 and 5; vector width 8; latent 16; linear 20 -> 20.
ENCODER = (
    conv(3 * 4**2, 16, 3, 10)
    + 2 * conv(16, 16, 3, 10)  # the block at 10
    + conv(16, 32 // 4, 3, 10)  # downsampling
    + 2 * conv(32, 32, 3, 5)
    + conv(32, 8, 1, 5)
    + conv(8 * 5**2, 2 * 16, 1, 1)
    + conv(3 * 20**2, 16, 1, 1)  # the linear path
)
DECODER = (
    conv(16, 32 // 2 * 5**2, 1, 1)
    + conv(32 // 2, 32, 3, 5)
    + 2 * conv(32, 32, 3, 5)
    + conv(32, 4 * 16, 3, 5)  # upsampling
    + 2 * conv(16, 16, 3, 10)
    + conv(16, 3 * 4**2, 3, 10)
    + conv(3 * 2**2, 16, 1, 10)  # the linear image, half the size of the image, into each stage
    + conv(3 * 4**2, 32, 1, 5)
    + conv(16, 3 * 20**2, 1, 1)  # the linear path
)
# Shift-tolerant AlexNet on a window of 32: kernels 11, 5, 3, 3, 3; strides become dense layers and blurs.
TRUNK = (
    conv(3, 64, 11, 26)  # 32 + 2 x 2 - 10
    + conv(64, 192, 5, 7)  # blurred to 14, pooled to 12, blurred to 7
    + conv(192, 384, 3, 4)  # pooled to 5, blurred to 4
    + conv(384, 256, 3, 4)
    + conv(256, 256, 3, 4)
)


@pytest.fixture
def config(tmp_path):
    return tiny.tiny_config(tmp_path, tmp_path)


def test_forward_operations_equal_the_formula(config):
    cost = count_cost(config)
    assert cost["gflop"]["encoder"] == pytest.approx(ENCODER, rel=1e-9)
    assert cost["gflop"]["decoder"] == pytest.approx(DECODER, rel=1e-9)
    assert cost["gflop_forward"] == pytest.approx(ENCODER + DECODER, rel=1e-9)
    assert cost["gflop"]["target features"] == pytest.approx(TRUNK, rel=1e-9)
    assert cost["gflop"]["reconstruction features"] == cost["gflop"]["target features"]
    assert cost["gflop_training"] == pytest.approx(sum(cost["gflop"].values()), rel=1e-12)


def test_backward_operations_lie_between_one_and_two_forward_passes(config):
    cost = count_cost(config)["gflop"]
    # A trained layer costs twice its forward pass, a frozen one (the linear path, the trunk) once.
    assert ENCODER + DECODER < cost["model backward"] < 2 * (ENCODER + DECODER)
    assert cost["features backward"] == pytest.approx(cost["target features"], rel=1e-6)


def test_parameters_equal_those_of_the_model(config):
    cost = count_cost(config)
    model = AutoencoderKLUltra(**config.model)
    frozen = sum(parameter.numel() for parameter in model.linear_path.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (cost["parameters"], cost["trained_parameters"]) == (total, total - frozen)
    assert cost["latent_shape"] == (16, 1, 1)


def test_without_perceptual_terms_the_trunk_costs_nothing(tmp_path):
    config = tiny.tiny_config(tmp_path, tmp_path, loss={"perceptual_weight": 0, "lpips_weight": 0})
    assert set(count_cost(config)["gflop"]) == {"encoder", "decoder", "model backward"}


def test_counting_leaves_the_default_device_and_takes_no_memory(config):
    count_cost(config)
    assert torch.empty(1).device.type == "cpu"


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", line)]


def test_every_line_of_the_plan_adds_up(tmp_path):
    presets = {"num_epochs": 7, "batch_size": 12, "micro_batch_size": 4, "max_images_per_epoch": 90}
    config = tiny.tiny_config(tmp_path, tmp_path, training_presets=presets)
    lines = {line.split()[0]: line for line in describe_plan(config, 2, 1000).splitlines()}
    assert set(lines) == {"model", "latent", "forward", "training", "batch", "epoch"}
    assert numbers(lines["latent"]) == [16, 1, 1, 16]
    encoder, decoder, forward = numbers(lines["forward"])
    assert forward == pytest.approx(encoder + decoder, abs=0.011)
    *parts, training = numbers(lines["training"])
    assert training == pytest.approx(sum(parts), abs=0.01 * len(parts))
    assert "12 = 6 x 2 processes; 2 x 4 images a forward pass" in lines["batch"]  # pieces of 4 and 2
    assert "90 images / 12 = 7 steps; x 7 epochs = 49 steps" in lines["epoch"]
    pflop = float(re.search(r"([\d.e+-]+) PFLOP", lines["epoch"])[1])
    assert pflop == pytest.approx(count_cost(config)["gflop_training"] * 49 * 12 / 1e6, rel=1e-2)


def test_a_plan_whose_length_nobody_knows():
    plan = describe_plan(config_from_dict(tiny.SETTINGS), 1, None)
    assert "unknown length" in plan and "data.num_train_images" in plan
