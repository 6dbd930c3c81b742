"""The cost estimate of a configuration, against formulas written here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.budget import estimate as budget
from training.budget.command import main
from training.budget.devices import DEVICES, Device, local_device
from training.budget.estimate import (
    count_flops,
    describe_estimate,
    estimate_cost,
    estimate_memory,
    estimate_micro_batch,
    estimate_step,
)
from training.budget.memory import GIB, MemoryEstimate, Operation
from training.builders import freeze_parameters
from training.config import config_from_dict, load_config
from training.losses.perceptual import PerceptualTrunk

ROOT = Path(__file__).parents[2]
RTX_3090 = DEVICES["rtx3090"]


def conv(channels_in: int, channels_out: int, kernel: int, size: int) -> float:
    """GFLOPs of a convolution onto a map of size x size; a multiplication and an addition are two."""
    return 2 * channels_in * channels_out * kernel**2 * size**2 / 1e9


def enlarging(small: int, large: int) -> float:
    """GFLOPs of enlarging an image by two matrix products: its rows, then its columns."""
    return 3 * 2 * (large * small * small + large * small * large) / 1e9


# The tiny configuration: 40 pixels, patches of 4, so stages at 10 and 5; vector width 8; latent 16; PCA branch 20 -> 20.
ENCODER = (
    conv(3 * 4**2, 16, 3, 10)
    + 2 * conv(16, 16, 3, 10)  # the block at 10
    + conv(16, 32 // 4, 3, 10)  # downsampling
    + 2 * conv(32, 32, 3, 5)
    + conv(32, 8, 1, 5)
    + conv(8 * 5**2, 2 * 16, 1, 1)
    + conv(3 * 20**2, 16, 1, 1)  # the PCA branch
)
DECODER = (
    conv(16, 32 // 2 * 5**2, 1, 1)
    + conv(32 // 2, 32, 3, 5)
    + 2 * conv(32, 32, 3, 5)
    + conv(32, 4 * 16, 3, 5)  # upsampling
    + 2 * conv(16, 16, 3, 10)
    + conv(16, 3 * 4**2, 3, 10)
    + conv(3 * 2**2, 16, 1, 10)  # the PCA image, half the size of the image, into each stage
    + conv(3 * 4**2, 32, 1, 5)
    + conv(16, 3 * 20**2, 1, 1)  # the PCA branch
    + enlarging(20, 40)
)
# Shift-tolerant AlexNet on a crop of 32: kernels 11, 5, 3, 3, 3; strides become dense layers and blurs.
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


def test_forward_flops_equal_the_formula(config):
    cost = count_flops(config)
    assert cost["gflop"]["encoder"] == pytest.approx(ENCODER, rel=1e-9)
    assert cost["gflop"]["decoder"] == pytest.approx(DECODER, rel=1e-9)
    assert cost["gflop_forward"] == pytest.approx(ENCODER + DECODER, rel=1e-9)
    assert cost["gflop"]["target features"] == pytest.approx(TRUNK, rel=1e-9)
    assert cost["gflop"]["reconstruction features"] == cost["gflop"]["target features"]
    assert cost["gflop_training"] == pytest.approx(sum(cost["gflop"].values()), rel=1e-12)


def test_backward_flops_lie_between_one_and_two_forward_passes(config):
    cost = count_flops(config)["gflop"]
    # A trained layer costs twice its forward pass, a frozen one (the PCA branch, the trunk) once.
    assert ENCODER < cost["encoder backward"] < 2 * ENCODER
    assert DECODER < cost["decoder backward"] < 2 * DECODER
    assert cost["features backward"] == pytest.approx(cost["target features"], rel=1e-6)


def test_parameters_equal_those_of_the_model(config):
    cost = count_flops(config)
    model = AutoencoderKLUltra(**config.model)
    frozen = sum(parameter.numel() for parameter in model.pca_branch.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (cost["parameters"], cost["trained_parameters"]) == (total, total - frozen)
    assert cost["latent_shape"] == (16, 1, 1)


def flops_by_shapes(config) -> dict[str, float]:
    """GFLOPs of forward and backward pass from the shapes that convolutions and linear layers see, by hooks.

    A layer's gradient to its weights costs as much as its forward pass, if they are trained, and so does that to its
    input, if anything before it is.
    """
    forward = backward = 0.0

    def hook(layer, inputs, output):
        nonlocal forward, backward
        kernel, trained = layer.weight.shape[1:].numel(), layer.weight.requires_grad  # inputs of one output value
        cost = 2 * output.numel() * kernel / 1e9
        forward += cost
        if torch.is_grad_enabled():
            backward += cost * trained
            backward += cost * inputs[0].requires_grad

    def watch(module):
        for layer in module.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                layer.register_forward_hook(hook)
        return module

    with torch.device("meta"):
        model = watch(AutoencoderKLUltra(**config.model))
        freeze_parameters(model, config.training_presets)
        size = model.config.sample_size
        model(torch.zeros(1, 3, size, size))
        enlarge = enlarging(model.config.pca_decode_size, size) if model.pca_branch is not None else 0.0
        # The frozen PCA branch passes gradients to the encoder, if that is trained.
        enlarge_backward = enlarge * (config.training_presets.train_only != "decoder")
        found = {"model": forward + enlarge, "model backward": backward + enlarge_backward}
        forward = backward = 0.0
        for name, crop in config.loss.trunks:
            trunk = watch(PerceptualTrunk(name, load_weights=False).to("meta"))
            crop = min(crop or size, size)
            with torch.no_grad():
                trunk.features(torch.zeros(1, 3, crop, crop))
            trunk.features(torch.zeros(1, 3, crop, crop, requires_grad=True))
        found |= {"trunk": forward, "trunk backward": backward}
    return found


@pytest.mark.parametrize(
    ("name", "train_only"),
    [("ultra", "all"), ("ultra_spatial", "all"), ("standard", "all"), ("ultra", "decoder"), ("ultra", "encoder")],
)
def test_two_ways_of_counting_agree(name, train_only):
    config = load_config(ROOT / "configs" / f"{name}.json", [f"training_presets.train_only={train_only}"])
    counted, shapes = count_flops(config)["gflop"], flops_by_shapes(config)
    assert counted["encoder"] + counted["decoder"] == pytest.approx(shapes["model"], rel=1e-9)
    both = counted["encoder backward"] + counted["decoder backward"]
    assert both == pytest.approx(shapes["model backward"], rel=1e-9)
    trunk = counted.get("target features", 0) + counted.get("reconstruction features", 0)
    assert trunk == pytest.approx(shapes["trunk"], rel=1e-9)
    assert counted.get("features backward", 0) == pytest.approx(shapes["trunk backward"], rel=1e-9)


def test_gradient_checkpointing_costs_most_of_the_stages_once_more(tmp_path):
    plain, again = (
        count_flops(tiny.tiny_config(tmp_path, tmp_path, training_presets={"gradient_checkpointing": flag}))["gflop"]
        for flag in (False, True)
    )
    # All but the last convolution of a stage, whose result the backward pass does not need.
    repeated = conv(16, 16, 3, 10) + conv(32, 32, 3, 5)
    for part in ("encoder", "decoder"):
        assert again[part] == plain[part]
        assert again[f"{part} backward"] == pytest.approx(plain[f"{part} backward"] + repeated, rel=1e-9)


def test_without_perceptual_terms_the_trunk_costs_nothing(tmp_path):
    config = tiny.tiny_config(tmp_path, tmp_path, loss={"perceptual_weight": 0, "lpips_weight": 0})
    assert set(count_flops(config)["gflop"]) == {"encoder", "decoder", "encoder backward", "decoder backward"}


def test_counting_leaves_the_default_device_and_takes_no_memory(config):
    count_flops(config)
    assert torch.empty(1).device.type == "cpu"


NO_TRUNK = {"perceptual_weight": 0, "lpips_weight": 0}  # half the time of a memory estimate


@pytest.fixture
def light(tmp_path):
    return tiny.tiny_config(tmp_path, tmp_path, loss=NO_TRUNK)


def values(line: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", line)]


def test_every_line_of_the_estimate_adds_up(tmp_path):
    presets = {"num_epochs": 7, "batch_size": 12, "micro_batch_size": 4, "max_images_per_epoch": 90}
    config = tiny.tiny_config(tmp_path, tmp_path, loss=NO_TRUNK, training_presets=presets)
    lines = {line.split()[0]: line for line in describe_estimate(config, 2, 1000, device=RTX_3090).splitlines()}
    names = "model latent forward training batch memory fits device assumed exchange epoch time host roofline"
    assert list(lines) == names.split()
    assert values(lines["latent"]) == [16, 1, 1, 16]
    encoder, decoder, forward = values(lines["forward"])
    assert forward == pytest.approx(encoder + decoder, abs=0.011)
    *parts, training = values(lines["training"])
    assert training == pytest.approx(sum(parts), abs=0.01 * len(parts))
    assert "12 = 6 x 2 processes; 2 x 4 images per forward pass" in lines["batch"]  # micro-batches of 4 and 2
    assert "90 images / 12 = 7 steps; x 7 epochs = 49 steps" in lines["epoch"]
    pflop = float(re.search(r"([\d.e+-]+) PFLOPs", lines["epoch"])[1])
    assert pflop == pytest.approx(count_flops(config)["gflop_training"] * 49 * 12 / 1e6, rel=1e-2)


def test_an_epoch_of_unknown_length(light):
    text = describe_estimate(light, 1, None, device=RTX_3090)
    assert "unknown length" in text and "data.num_train_images" in text


def test_the_reference_configuration_stays_within_its_budget():
    estimate = estimate_cost(load_config(ROOT / "configs" / "ultra.json"), 1, 162_770, device=RTX_3090)
    assert estimate["gflop_training"] <= 46
    assert estimate["parameters"] >= 50e6
    assert estimate["latent_dim"] == 1024
    assert estimate["batch"] == {"batch_size": 64, "processes": 1, "micro_batches": 1, "micro_batch": 64}
    assert estimate["memory"]["total_bytes"] <= 8 * GIB and estimate["memory"]["fits"]
    seconds = estimate["time"]["seconds"]
    assert estimate["time"]["hours"] == pytest.approx(162_770 // 64 * 200 * seconds["step"] / 3600, rel=1e-9)
    assert estimate["time"]["hours"] <= 16
    # Forward and backward pass take longer than their FLOPs, the optimizer as long as 13 passes over the weights.
    assert seconds["forward"] + seconds["backward"] > 64 * estimate["gflop_training"] / (0.6 * 71e3)
    assert seconds["optimizer"] == pytest.approx(13 * 4 * estimate["trained_parameters"] / (0.8 * 936e9))
    assert 0.5 < estimate["time"]["roofline_hours"] / estimate["time"]["hours"] < 0.9
    assert 500 < seconds["launches"] < 2000 and seconds["host"] == pytest.approx(8e-6 * seconds["launches"])


def test_a_step_takes_the_longest_of_compute_memory_and_launches():
    device = Device(
        title="paper", half_tflops=2, float32_tflops=1, memory_gib=1, bandwidth_gbps=100, efficiency=0.5,
        bandwidth_efficiency=1, kernel_us=1e5, launch_us=1e5, link_gbps=8, source="this test",
    )  # fmt: skip
    operations = (
        Operation(flop=4e12, num_bytes=10**9, half=True),  # 4 s of compute, 0.01 s of memory
        Operation(flop=1e9, num_bytes=3 * 10**11, half=False, backward=True),  # 0.002 s, 3 s
        Operation(flop=0, num_bytes=4, half=False, launches=3, backward=True),  # 0.3 s of launches
    )
    memory = MemoryEstimate(1, {}, 0, operations, trained=10**9, has_ema=False)
    seconds = estimate_step(memory, device, 2, 1)
    optimizer = (3 + 7) * 4e9 / 100e9  # clipping and Adam
    wanted = {"forward": 8, "backward": 6.6, "exchange": 0, "optimizer": optimizer, "host": 1, "launches": 10}
    assert seconds == pytest.approx(wanted | {"step": 14.6 + optimizer})
    # Slow launches: the device waits for the host.
    assert estimate_step(memory, replace(device, launch_us=2e6), 2, 1)["step"] == 20
    # The exchange of two processes, 0.5 s, is hidden behind the last backward pass; a slow link's is not.
    assert estimate_step(memory, device, 2, 2)["exchange"] == 0.5
    after = estimate_step(memory, device, 2, 2, overlaps=False)["step"]  # with micro_batch_size "auto"
    assert after == pytest.approx(estimate_step(memory, device, 2, 2)["step"] + 0.5)
    assert estimate_step(memory, device, 2, 2)["step"] == pytest.approx(14.6 + optimizer)
    assert estimate_step(memory, replace(device, link_gbps=1), 2, 2)["step"] == pytest.approx(15.3 + optimizer)


def test_hours_fall_with_efficiency_and_peak(light):
    compute_only = {"bandwidth_gbps": 1e9, "kernel_us": 0, "launch_us": 0, "tf32_tflops": 0}
    hours = [
        estimate_cost(light, 1, 1000, device=replace(DEVICES[name], efficiency=efficiency, **compute_only))
        for name, efficiency in (("rtx3090", 0.5), ("rtx3090", 0.25), ("a100", 0.5))
    ]
    hours = [estimate["time"]["hours"] for estimate in hours]
    assert hours[1] / hours[0] == pytest.approx(2, rel=1e-3)
    assert hours[2] / hours[0] == pytest.approx(35.6 / 19.5, rel=1e-3)  # the tiny configuration computes in float32
    tf32 = estimate_cost(light, 1, 1000, device=replace(DEVICES["a100"], **compute_only | {"tf32_tflops": 156}))
    assert tf32["device"]["tflops"] == 156
    values = light.to_dict()
    values["training_presets"]["allow_tf32"] = False
    assert estimate_cost(config_from_dict(values), 1, 1000, device=DEVICES["a100"])["device"]["tflops"] == 19.5


def test_processes_exchange_gradients():
    """8 RTX 3090 with 8 images each: 190.5 MB through PCIe, longer than the backward pass."""
    ultra = load_config(ROOT / "configs" / "ultra.json")
    one, eight = (estimate_cost(ultra, processes, 162_770, device=RTX_3090)["time"] for processes in (1, 8))
    seconds = eight["seconds"]
    assert one["seconds"]["exchange"] == 0
    assert seconds["exchange"] == pytest.approx(2 * 7 / 8 * 190.5e6 / 12e9, rel=1e-3)
    assert seconds["backward"] < seconds["exchange"] and seconds["optimizer"] == one["seconds"]["optimizer"]
    assert seconds["step"] == pytest.approx(seconds["forward"] + seconds["exchange"] + seconds["optimizer"])
    assert eight["hours"] == pytest.approx(162_770 // 64 * 200 * seconds["step"] / 3600)


def test_the_device_at_hand_is_looked_up_or_measured(monkeypatch):
    measured = local_device(torch.device("cpu"))
    assert measured.title == "this CPU" and "measured" in measured.source
    assert 1e-3 < measured.float32_tflops < 100 and 0.1 < measured.bandwidth_gbps < 5000
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert local_device(torch.device("cuda:7")) is DEVICES["a100"]
    local_device.cache_clear()


def test_the_estimate_is_for_the_device_at_hand(light, capsys, tmp_path, monkeypatch):
    slow = Device(
        title="this CPU",
        half_tflops=0.01,
        float32_tflops=0.02,
        memory_gib=8,
        bandwidth_gbps=10,
        efficiency=1,
        launch_us=0,
        source="measured",
    )
    monkeypatch.setattr(budget, "local_device", lambda: slow)
    text = describe_estimate(light, 1, 1000)
    assert "device    this CPU (measured): 20 GFLOP/s in this precision" in text
    assert all(word not in text for word in ("RTX", "assumed  ", "launches", "roofline"))


def test_the_remedies_where_memory_is_short():
    small = Device(
        title="small card", half_tflops=1, float32_tflops=1, memory_gib=0.7535, bandwidth_gbps=1, source="this test"
    )
    wide = config_from_dict(
        tiny.SETTINGS | {"loss": NO_TRUNK, "training_presets": {"batch_size": 8, "mixed_precision": "no"}}
    )
    estimate = estimate_cost(wide, 1, 100, device=small, search=True)
    assert not estimate["memory"]["fits"]
    largest = estimate["memory"]["largest_micro_batch"]
    assert 1 <= largest < 8
    text = describe_estimate(wide, 1, 100, device=small, search=True)
    assert f"NOT in 0.7535 GiB of small card: set training_presets.micro_batch_size to {largest}" in text
    assert "training_presets.gradient_checkpointing to true" in text


def test_the_command_prints_text_and_json(tmp_path, capsys):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(tiny.SETTINGS | {"loss": NO_TRUNK}))
    assert main(["--config", str(file), "--device", "rtx3090"]) == 0
    text = capsys.readouterr().out
    assert "20 images / 4 = 5 steps" in text and "all 4 images of a process fit in one forward pass" in text
    assert "assumed   0.6 of the peak, 0.8 of the memory bandwidth, 2 us for the smallest kernel, 8 us of host" in text
    assert "kernel launches per step" in text and "the device waits for the host" in text  # the images are tiny
    assert (
        main(["--config", str(file), "--device", "a100", "--efficiency", "0.4", "--num-processes", "2", "--json"]) == 0
    )
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["device"]["title"] == "A100 80 GB SXM" and estimate["batch"]["processes"] == 2
    assert estimate["device"]["efficiency"] == 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "rtx9999"], "--device rtx9999 is not in the table: use one of rtx3090"),
        (["--efficiency", "1.5"], "--efficiency must be above 0 and at most 1, got 1.5"),
        (["--num-processes", "3"], "training_presets.batch_size 4 cannot be divided over 3 processes"),
        (["--set", "model.depth=3"], "unknown configuration key model.depth"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(tiny.SETTINGS))
    assert main(["--config", str(file), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_the_resolution_schedule_is_averaged_over_the_epochs(tmp_path):
    spatial = {
        "sample_size": 64, "latent_layout": "spatial", "latent_channels": 4, "latent_size": 8, "latent_dim": 256,
        "pca_size": None,
    }  # fmt: skip
    model = tiny.SETTINGS["model"] | spatial
    small = count_flops(config_from_dict({"model": model | {"sample_size": 32, "latent_size": 4, "latent_dim": 64}}))
    full = count_flops(config_from_dict({"model": model}))
    presets = {"num_epochs": 10, "resolution_schedule": {"32": 4}}
    mixed = count_flops(config_from_dict({"model": model, "training_presets": presets}))
    assert full["gflop_average"] == pytest.approx(full["gflop_training"])
    assert mixed["gflop_training"] == full["gflop_training"]
    assert mixed["gflop_average"] == pytest.approx(0.4 * small["gflop_training"] + 0.6 * full["gflop_training"])
    assert 0.2 < small["gflop_training"] / full["gflop_training"] < 0.35


def test_both_networks_of_the_loss_are_counted():
    model = tiny.SETTINGS["model"]
    one, other, both = (
        count_flops(config_from_dict({"model": model, "loss": loss}))["gflop"]["target features"]
        for loss in (
            {"trunk": "st_alexnet"},
            {"trunk": "st_vgg16", "perceptual_crop_px": 32},
            {"trunk": "st_vgg16", "perceptual_crop_px": 32, "lpips_trunk": "st_alexnet"},
        )
    )
    assert both == pytest.approx(one + other)


def test_the_optimizer_counts_in_the_memory_of_an_estimate():
    light = {"model": tiny.SETTINGS["model"], "loss": {"perceptual_weight": 0, "lpips_weight": 0}}
    adam, muon = (
        estimate_memory(config_from_dict(light | {"training_presets": {"optimizer": optimizer}}), 4, 1)
        for optimizer in ("adam", "muon")
    )
    assert muon.optimizer_flop > adam.optimizer_flop == 0
    assert muon.parts["optimizer state"] < adam.parts["optimizer state"]


@pytest.mark.parametrize("batch", [4, 16])
def test_the_estimated_micro_batch_fits_and_one_more_does_not(tmp_path, batch):
    presets = {"batch_size": batch, "micro_batch_size": "auto"}
    config = tiny.tiny_config(tmp_path, tmp_path, loss=NO_TRUNK, training_presets=presets)
    for processes in (1, 2):
        local = batch // processes
        sizes = [estimate_memory(config, size, processes).total_bytes for size in range(1, local + 1)]
        assert estimate_micro_batch(config, processes, sizes[-1]) == local
        # Micro-batches keep gradients, which one forward pass does not, so a little less can take more.
        middle = local // 2
        limit = (sizes[middle - 1] + sizes[middle]) / 2
        assert estimate_micro_batch(config, processes, limit) == (local if sizes[-1] <= limit else middle)
        assert estimate_micro_batch(config, processes, sizes[0] / 2) == 0


@pytest.mark.parametrize("batch", [4, 8])
def test_a_small_batch_of_a_large_model_is_not_split_on_a_large_device(batch):
    presets = {"batch_size": batch, "micro_batch_size": "auto"}
    overrides = [f"training_presets.{name}={value}" for name, value in presets.items()]
    config = load_config(ROOT / "configs" / "ultra.json", overrides)
    assert estimate_micro_batch(config, 1, 24 * GIB) == batch


def test_the_benchmarks_page_has_the_estimate_of_today(capsys):
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert main(["--config", str(ROOT / "configs" / "ultra.json"), "--device", "rtx3090"]) == 0
    text = capsys.readouterr().out
    (training,) = re.findall(r"^training .* = ([\d.]+) GFLOPs", text, re.MULTILINE)
    (memory,) = re.findall(r"^fits +([\d.]+) of", text, re.MULTILINE)
    (hours,) = re.findall(r"^time +([\d.]+) hours", text, re.MULTILINE)
    assert f"| **one training image** | **{training}** |" in page, "rerun the commands of the page"
    assert f"| none | {memory} | {training} | {float(hours):.1f} h |" in page, "rerun the commands of the page"
