"""What a configuration costs, counted before it runs: parameters, floating-point operations, batch arithmetic.

Operations are counted by torch's FlopCounterMode on the meta device (a multiplication and an addition are two), so
counting takes a second and no memory. What it is not for: measuring; time and memory depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.config import Config
from training.linear_init import freeze_linear_path
from training.perceptual import PerceptualTrunk


def _count(function: Callable[[], Any]) -> tuple[float, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops() / 1e9, result


def count_cost(config: Config) -> dict[str, Any]:
    """Parameters and GFLOP of a configuration, for one training image.

    Args:
        config: The configuration; its model is built on the meta device.

    Returns:
        `parameters` (all), `trained_parameters`, `latent_shape`, `gflop`: part -> GFLOP for one image, and
        `gflop_forward` and `gflop_training`, their sums over encoder and decoder, and over everything.
    """
    with torch.device("meta"):
        model = AutoencoderKLUltra(**config.model)
        freeze_linear_path(model, config.training_presets.linear_lr_scale)
        side = model.config.sample_size
        pixels = torch.zeros(1, 3, side, side)
        gflop: dict[str, float] = {}
        gflop["encoder"], encoded = _count(lambda: model.encode(pixels).latent_dist)
        gflop["decoder"], decoded = _count(lambda: model.decode(encoded.mean).sample)
        gflop["model backward"], _ = _count(decoded.sum().backward)
        if config.loss.needs_trunk:
            trunk = PerceptualTrunk(config.loss.trunk, load_weights=False).to("meta")
            crop = min(config.loss.perceptual_crop_px or side, side)
            window = torch.zeros(1, 3, crop, crop, requires_grad=True)
            with torch.no_grad():
                gflop["target features"], _ = _count(lambda: trunk.features(window))
            gflop["reconstruction features"], features = _count(lambda: trunk.features(window))
            gflop["features backward"], _ = _count(sum(tap.sum() for tap in features).backward)
    held = (model.config.latent_channels, model.config.latent_size, model.config.latent_size)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "latent_shape": held,
        "gflop": gflop,
        "gflop_forward": gflop["encoder"] + gflop["decoder"],
        "gflop_training": sum(gflop.values()),
    }


def describe_plan(config: Config, num_processes: int, num_train_images: int | None) -> str:
    """The plan of a run in a few lines, with the arithmetic.

    Args:
        config: The configuration.
        num_processes: Processes of the run.
        num_train_images: Training images of an epoch if known.
    """
    cost = count_cost(config)
    presets, model = config.training_presets, config.model
    local = presets.batch_size // num_processes
    micro = min(presets.micro_batch_size or local, local)
    c, h, w = cost["latent_shape"]
    numbers = c * h * w
    lines = [
        f"model     {cost['parameters'] / 1e6:.1f} M parameters, {cost['trained_parameters'] / 1e6:.1f} M of them trained",
        f"latent    {c} x {h} x {w} = {numbers} numbers ({model.get('latent_layout', 'vector')})",
        f"forward   {cost['gflop']['encoder']:.2f} + {cost['gflop']['decoder']:.2f} = {cost['gflop_forward']:.2f} GFLOP an "
        "image (encoder + decoder)",
        "training  "
        + " + ".join(f"{value:.2f} {name}" for name, value in cost["gflop"].items())
        + f" = {cost['gflop_training']:.2f} GFLOP an image",
        f"batch     {presets.batch_size} = {local} x {num_processes} processes; {-(-local // micro)} x {micro} images a "
        "forward pass",
    ]
    if num_train_images is None:
        lines.append("epoch     unknown length until the data set answers (data.num_train_images says it beforehand)")
    else:
        images = min(num_train_images, presets.max_images_per_epoch or num_train_images)
        steps = images // presets.batch_size
        lines.append(
            f"epoch     {images} images / {presets.batch_size} = {steps} steps; x {presets.num_epochs} epochs = "
            f"{steps * presets.num_epochs} steps, "
            f"{cost['gflop_training'] * steps * presets.batch_size * presets.num_epochs / 1e6:.3g} PFLOP"
        )
    return "\n".join(lines)
