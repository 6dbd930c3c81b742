"""What a configuration costs, counted before it runs: parameters, operations, memory, hours.

    python -m training.budget --config configs/ultra.json
    python -m training.budget --config configs/ultra.json --device a100 --num-processes 8 --efficiency 0.4 --json

Operations are counted by torch's FlopCounterMode on the meta device (a multiplication and an addition are two), memory
by memory_plan.py, the devices' peaks are in devices.py. Hours follow from an efficiency that is assumed unless it has
been measured. What it is not for: measuring; `python -m benchmarks.step` does.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.budget.devices import DEFAULT_DEVICE, DEVICES, find_device
from training.budget.memory import GIB, MemoryPlan, largest_micro_batch, plan_memory
from training.builders import build_model, micro_batch_size
from training.config import Config, config_from_dict, load_config
from training.losses.perceptual import PerceptualTrunk
from training.pca_init import freeze_pca_branch

DEFAULT_EFFICIENCY = 0.5  # of the device's peak, over the whole step; assumed


def _count(function: Callable[[], Any]) -> tuple[float, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops() / 1e9, result


def count_cost(config: Config) -> dict[str, Any]:
    """Parameters and GFLOP of a configuration, for one training image.

    Gradient checkpointing runs the model's stages a second time; what that adds is part of the backward passes.

    Args:
        config: The configuration; its model is built on the meta device.

    Returns:
        `parameters` (all), `trained_parameters`, `latent_shape`, `gflop`: part -> GFLOP for one image, and
        `gflop_forward` and `gflop_training`, their sums over encoder and decoder, and over everything; all at
        `sample_size`. `gflop_average` is the mean of `gflop_training` over the epochs of the resolution schedule.
    """
    with torch.device("meta"):
        model = AutoencoderKLUltra(**config.model)
        freeze_pca_branch(model, config.training_presets.pca_lr_scale)
        if config.training_presets.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        gflop = _count_parts(config, model, model.config.sample_size)
        presets = config.training_presets
        epochs = {int(side): count for side, count in presets.resolution_schedule.items()}
        at_full = presets.num_epochs - sum(epochs.values())
        spent = at_full * sum(gflop.values())
        spent += sum(count * sum(_count_parts(config, model, side).values()) for side, count in epochs.items())
    held = (model.config.latent_channels, model.config.latent_size, model.config.latent_size)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "latent_shape": held,
        "gflop": gflop,
        "gflop_forward": gflop["encoder"] + gflop["decoder"],
        "gflop_training": sum(gflop.values()),
        "gflop_average": spent / presets.num_epochs,
    }


def _count_parts(config: Config, model: AutoencoderKLUltra, side: int) -> dict[str, float]:
    """GFLOP of each part of training on one image of a side, on the meta device."""
    pixels = torch.zeros(1, 3, side, side)
    gflop: dict[str, float] = {}
    gflop["encoder"], encoded = _count(lambda: model.encode(pixels).latent_dist.mean)
    # A leaf, so that the two backward passes are counted apart; encoded.mean would join them.
    latents = encoded.detach().requires_grad_()
    gflop["decoder"], decoded = _count(lambda: model.decode(latents).sample)
    gflop["encoder backward"], _ = _count(encoded.sum().backward)
    gflop["decoder backward"], _ = _count(decoded.sum().backward)
    trunks = [(PerceptualTrunk(name, load_weights=False), min(seen or side, side)) for name, seen in config.loss.trunks]
    if trunks:
        crops = [torch.zeros(1, 3, seen, seen, requires_grad=True) for _, seen in trunks]

        def features() -> list[torch.Tensor]:
            return [tap for (trunk, _), window in zip(trunks, crops) for tap in trunk.features(window)]

        with torch.no_grad():
            gflop["target features"], _ = _count(features)
        gflop["reconstruction features"], feature_layers = _count(features)
        gflop["features backward"], _ = _count(sum(tap.sum() for tap in feature_layers).backward)
    return gflop


@functools.lru_cache(maxsize=64)
def _cached_memory(settings: str, micro_batch: int, keeps_gradients: bool, precision: str) -> MemoryPlan:
    config = config_from_dict(json.loads(settings))
    return plan_memory(config, micro_batch, keeps_gradients=keeps_gradients, precision=precision)


def memory_of(config: Config, micro_batch: int, processes: int) -> MemoryPlan:
    """The memory plan of one process of a run; a walk takes seconds, so repetitions are remembered.

    Precision is the configuration's; "auto" counts as bf16, which every device of the table computes in.
    """
    presets = config.training_presets
    names = ("ema_decay", "gradient_checkpointing", "pca_lr_scale")
    settings = {
        "model": config.model,
        "loss": asdict(config.loss),
        "training_presets": {name: getattr(presets, name) for name in names},
    }
    precision = "bf16" if presets.mixed_precision == "auto" else presets.mixed_precision
    keeps_gradients = processes > 1 or micro_batch < presets.batch_size
    return _cached_memory(json.dumps(settings), micro_batch, keeps_gradients, precision)


def planned_micro_batch(config: Config, processes: int, limit_bytes: float) -> int:
    """The most images in one forward pass that the memory plan lets through.

    Args:
        config: The configuration.
        processes: Of the run, one a device.
        limit_bytes: Memory of a device.

    Returns:
        From 1, whether or not that fits, to a process's share of the batch.
    """
    local = config.training_presets.batch_size // processes
    sizes = sorted({max(1, local // 2), max(2, local)})
    most = largest_micro_batch(*(memory_of(config, size, processes) for size in sizes), limit_bytes)
    return min(local, max(1, most))


def plan_run(
    config: Config,
    num_processes: int,
    num_train_images: int | None,
    *,
    device: str = DEFAULT_DEVICE,
    efficiency: float = DEFAULT_EFFICIENCY,
    search: bool = False,
) -> dict[str, Any]:
    """Everything that can be said about a run before it starts; plain values, as `--json` prints them.

    Args:
        config: The configuration.
        num_processes: Processes of the run, one a device.
        num_train_images: Training images of an epoch if known.
        device: Name in `devices.DEVICES`.
        efficiency: Share of the device's peak that the whole step reaches.
        search: Look for the largest micro batch that fits, which takes as long again.

    Raises:
        ValueError: Unknown device, an efficiency outside (0, 1], or a batch that cannot be divided.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"--efficiency is {efficiency:g}: use a share of the device's peak, above 0 to 1.")
    card, cost, presets = find_device(device), count_cost(config), config.training_presets
    micro = micro_batch_size(config, num_processes)
    local = presets.batch_size // num_processes
    micro_batches = -(-local // micro)
    memory = memory_of(config, micro, num_processes)
    limit = card.memory_gib * GIB
    step_seconds, arithmetic_seconds = memory.roofline_seconds(card, local / micro)
    plan = {
        **cost,
        "latent_dim": config.model.get("latent_dim", cost["latent_shape"][0] * cost["latent_shape"][1] ** 2),
        "device": {"name": device, **asdict(card)},
        "batch": {
            "batch_size": presets.batch_size,
            "processes": num_processes,
            "micro_batches": micro_batches,
            "micro_batch": micro,
        },
        "memory": {
            "parts_bytes": memory.parts,
            "kept_bytes": memory.kept_bytes,
            "tensor_bytes": memory.tensor_bytes,
            "overhead_bytes": memory.overhead_bytes,
            "total_bytes": memory.total_bytes,
            "fits": memory.total_bytes <= limit,
        },
        "time": {
            "efficiency": efficiency,
            "roofline_step_seconds": step_seconds,
            "roofline_efficiency": arithmetic_seconds / step_seconds,
        },
    }
    if search:
        other = memory_of(config, micro // 2 if micro > 1 else 2, num_processes)
        pair = sorted((memory, other), key=lambda plan: plan.micro_batch)
        plan["memory"]["largest_micro_batch"] = largest_micro_batch(*pair, limit)
    if num_train_images is not None:
        images = min(num_train_images, presets.max_images_per_epoch or num_train_images)
        steps = images // presets.batch_size
        operations = cost["gflop_average"] * 1e9 * steps * presets.batch_size * presets.num_epochs
        peak = 1e12 * (card.float32_tflops if presets.mixed_precision == "no" else card.half_tflops)
        plan["epoch"] = {"images": images, "steps": steps, "epochs": presets.num_epochs, "total_flop": operations}
        plan["time"]["hours"] = operations / (peak * efficiency * num_processes) / 3600
        # Memory traffic shrinks with the pixels, as arithmetic does.
        share = cost["gflop_average"] / cost["gflop_training"]
        plan["time"]["roofline_hours"] = share * step_seconds * steps * presets.num_epochs / 3600
    return plan


def describe_plan(
    config: Config,
    num_processes: int,
    num_train_images: int | None,
    *,
    device: str = DEFAULT_DEVICE,
    efficiency: float = DEFAULT_EFFICIENCY,
    search: bool = False,
) -> str:
    """The plan of a run in a few lines, with the arithmetic; see `plan_run` for the arguments."""
    return _describe(
        plan_run(config, num_processes, num_train_images, device=device, efficiency=efficiency, search=search),
        config.model.get("latent_layout", "vector"),
    )


def _describe(plan: dict[str, Any], layout: str) -> str:
    gflop, batch, memory, time = plan["gflop"], plan["batch"], plan["memory"], plan["time"]
    card = plan["device"]
    c, h, w = plan["latent_shape"]
    lines = [
        f"model     {plan['parameters'] / 1e6:.1f} M parameters, {plan['trained_parameters'] / 1e6:.1f} M of them trained",
        f"latent    {c} x {h} x {w} = {c * h * w} numbers ({layout})",
        f"forward   {gflop['encoder']:.2f} + {gflop['decoder']:.2f} = {plan['gflop_forward']:.2f} GFLOP an "
        "image (encoder + decoder)",
        "training  "
        + " + ".join(f"{value:.2f} {name}" for name, value in gflop.items())
        + f" = {plan['gflop_training']:.2f} GFLOP an image",
        f"batch     {batch['batch_size']} = {batch['batch_size'] // batch['processes']} x {batch['processes']} processes; "
        f"{batch['micro_batches']} x {batch['micro_batch']} images a forward pass",
        "memory    "
        + " + ".join(f"{size / GIB:.2f} {name}" for name, size in memory["parts_bytes"].items() if size)
        + f" = {memory['tensor_bytes'] / GIB:.2f} GiB at the peak of a step; with {memory['overhead_bytes'] / GIB:.2f} "
        f"assumed for driver, workspaces and fragmentation {memory['total_bytes'] / GIB:.2f} GiB (calculated)",
        f"fits      {_fit(plan)}",
    ]
    if "epoch" not in plan:
        lines.append("epoch     unknown length until the data set answers (data.num_train_images says it beforehand)")
        return "\n".join(lines)
    epoch = plan["epoch"]
    lines.append(
        f"epoch     {epoch['images']} images / {batch['batch_size']} = {epoch['steps']} steps; x {epoch['epochs']} epochs "
        f"= {epoch['steps'] * epoch['epochs']} steps, {epoch['total_flop'] / 1e15:.3g} PFLOP"
    )
    if plan["gflop_average"] != plan["gflop_training"]:
        lines.append(f"schedule  {plan['gflop_average']:.2f} GFLOP an image, averaged over the resolution schedule")
    reach = (
        "which leaves room for it" if time["roofline_hours"] <= time["hours"] else "so it is NOT within reach unfused"
    )
    lines.append(
        f"time      {time['hours']:.3g} hours on {batch['processes']} x {card['title']} at {time['efficiency']:g} of their "
        "peak (a calculation; the efficiency is assumed unless it was measured)"
    )
    lines.append(
        f"roofline  {time['roofline_hours']:.3g} hours, {time['roofline_efficiency']:.2f} of the peak, if every operation "
        f"reads and writes memory at {card['bandwidth_gbps']:g} GB/s and nothing else takes time (a calculation): {reach}"
    )
    return "\n".join(lines)


def _fit(plan: dict[str, Any]) -> str:
    memory, card = plan["memory"], plan["device"]
    largest = memory.get("largest_micro_batch")
    where = f"{card['memory_gib']:g} GiB of {card['title']}"
    if memory["fits"]:
        text = f"{memory['total_bytes'] / GIB:.2f} of {where}"
    else:
        remedy = f"to {largest}" if largest else "lower"
        text = (
            f"NOT in {where}: set training_presets.micro_batch_size {remedy} (gradients stay the same), or "
            "training_presets.gradient_checkpointing to true"
        )
    return text if largest is None else f"{text}; the largest micro_batch_size that fits is {largest}"


def known_train_images(config: Config) -> int | None:
    """Training images of an epoch where the configuration itself says how many."""
    if config.data.num_train_images is None and config.data.dataset == "synthetic_faces":
        return config.data.synthetic_train_images
    return config.data.num_train_images


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, 2 for something that must be changed."""
    parser = argparse.ArgumentParser(prog="python -m training.budget", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON configuration")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--device", default=DEFAULT_DEVICE, help=", ".join(DEVICES))
    parser.add_argument("--num-processes", type=int, default=1, help="devices of the run")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=DEFAULT_EFFICIENCY,
        help=f"share of the device's peak that a whole step reaches; {DEFAULT_EFFICIENCY:g} is an assumption",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    try:
        if arguments.num_processes < 1:
            raise ValueError(f"--num-processes is {arguments.num_processes}: use at least 1.")
        config = load_config(arguments.config, arguments.overrides)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            build_model(config)  # refuses what the section `model` cannot be
        plan = plan_run(
            config,
            arguments.num_processes,
            known_train_images(config),
            device=arguments.device,
            efficiency=arguments.efficiency,
            search=True,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(plan, indent=2))
    else:
        print(_describe(plan, config.model.get("latent_layout", "vector")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
