"""Estimates what a configuration costs before it runs: parameters, FLOPs, memory, hours.

FLOPs are counted by torch's FlopCounterMode on the meta device (a multiplication and an addition are two), memory by
`training.budget.memory`; rates of devices are in `training.budget.devices`. The time of a step is the sum over its operations,
each as long as its FLOPs, its bytes or its launch take, whichever is longest (Williams et al. 2009, "Roofline"). On a GPU that
nobody has measured, the fractions of its rates are assumed; `python -m benchmarks.gpu` measures them.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.budget.devices import Device, local_device
from training.budget.memory import GIB, MemoryEstimate, Operation, trace_memory
from training.builders import freeze_parameters, micro_batch_size
from training.config import Config, config_from_dict
from training.losses.perceptual import PerceptualTrunk

# Reads and writes of 4 bytes for each trained parameter: clipping reads the gradient twice and writes it; Adam reads weight,
# gradient and two states and writes all but the gradient; EMA reads both weights and writes one. Muon moves about as many.
_STEP_PASSES = {"clipping": 3, "optimizer": 7, "ema": 3}


def _count(function: Callable[[], Any]) -> tuple[float, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops() / 1e9, result


def count_flops(config: Config) -> dict[str, Any]:
    """Parameters, and GFLOPs per training image, of a configuration.

    Gradient checkpointing runs the model's stages a second time, which counts as part of the backward passes.

    Args:
        config: The configuration; its model is built on the meta device.

    Returns:
        `parameters` (all), `trained_parameters`, `latent_shape`, `gflop`: part -> GFLOPs per image, and
        `gflop_forward` and `gflop_training`, their sums over encoder and decoder, and over everything; all at
        `sample_size`. `gflop_average` is the mean of `gflop_training` over the epochs of the resolution schedule.
    """
    with torch.device("meta"):
        model = AutoencoderKLUltra(**config.model)
        freeze_parameters(model, config.training_presets)
        if config.training_presets.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        gflop = _count_parts(config, model, model.config.sample_size)
        presets = config.training_presets
        epochs = {int(size): count for size, count in presets.resolution_schedule.items()}
        total = (presets.num_epochs - sum(epochs.values())) * sum(gflop.values())
        total += sum(count * sum(_count_parts(config, model, size).values()) for size, count in epochs.items())
    latent_shape = model.latent_shape
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "latent_shape": latent_shape,
        "gflop": gflop,
        "gflop_forward": gflop["encoder"] + gflop["decoder"],
        "gflop_training": sum(gflop.values()),
        "gflop_average": total / presets.num_epochs,
    }


def _count_parts(config: Config, model: AutoencoderKLUltra, resolution: int) -> dict[str, float]:
    """GFLOPs of each part of training on one image of a resolution, on the meta device."""
    pixels = torch.zeros(1, 3, resolution, resolution)
    gflop: dict[str, float] = {}
    gflop["encoder"], encoded = _count(lambda: model.encode(pixels).latent_dist.mean)
    # A leaf, so that the two backward passes are counted apart; encoded.mean would join them.
    latents = encoded.detach().requires_grad_(encoded.requires_grad)
    gflop["decoder"], decoded = _count(lambda: model.decode(latents).sample)
    for name, output in (("encoder backward", encoded), ("decoder backward", decoded)):
        gflop[name] = _count(output.sum().backward)[0] if output.requires_grad else 0.0
    trunks = [PerceptualTrunk(name, load_weights=False) for name, _ in config.loss.trunks]
    if trunks:
        sizes = [min(crop or resolution, resolution) for _, crop in config.loss.trunks]
        crops = [torch.zeros(1, 3, size, size, requires_grad=True) for size in sizes]

        def features() -> list[torch.Tensor]:
            return [layer for trunk, crop in zip(trunks, crops) for layer in trunk.features(crop)]

        with torch.no_grad():
            gflop["target features"], _ = _count(features)
        gflop["reconstruction features"], feature_layers = _count(features)
        gflop["features backward"], _ = _count(sum(layer.sum() for layer in feature_layers).backward)
    return gflop


@functools.lru_cache(maxsize=64)
def _cached_memory(settings: str, micro_batch: int, keeps_gradients: bool, precision: str) -> MemoryEstimate:
    config = config_from_dict(json.loads(settings))
    return trace_memory(config, micro_batch, keeps_gradients=keeps_gradients, precision=precision)


def estimate_memory(config: Config, micro_batch: int, processes: int) -> MemoryEstimate:
    """The memory of one process of a run; cached, because an estimate takes seconds.

    Precision is the configuration's; "auto" counts as bf16, which every GPU of the table computes in.
    """
    presets = config.training_presets
    names = (
        "channels_last",
        "compile",
        "ema_decay",
        "gradient_checkpointing",
        "optimizer",
        "pca_lr_scale",
        "train_only",
    )
    settings = {
        "model": config.model,
        "loss": asdict(config.loss),
        "training_presets": {name: getattr(presets, name) for name in names},
    }
    precision = "bf16" if presets.mixed_precision == "auto" else presets.mixed_precision
    keeps_gradients = processes > 1 or micro_batch < presets.batch_size
    return _cached_memory(json.dumps(settings), micro_batch, keeps_gradients, precision)


def estimate_micro_batch(config: Config, processes: int, limit_bytes: float) -> int:
    """The largest micro-batch whose estimated memory fits.

    Args:
        config: The configuration.
        processes: Of the run, one per device.
        limit_bytes: Memory of a device.

    Returns:
        At most the batch of one process; 0 if not even one image fits.
    """

    def too_large(size: int) -> bool:
        return estimate_memory(config, size, processes).total_bytes > limit_bytes

    local_batch = config.training_presets.batch_size // processes
    if not too_large(local_batch):  # first, because gradients of one forward pass need no memory before it
        return local_batch
    return bisect.bisect_left(range(1, local_batch), True, key=too_large)


def estimate_step(
    memory: MemoryEstimate, device: Device, micro_batches: float, processes: int, overlaps: bool = True
) -> dict[str, float]:
    """Seconds of one optimizer step, by part.

    Processes all-reduce their float32 gradients in the backward pass of the last micro-batch: a ring of n processes
    sends and receives 2 (n - 1) / n of the gradients on each device.

        step = max(forward + max(backward, exchange) + optimizer, host)

    Args:
        memory: Its operations.
        device: Its rates.
        micro_batches: Forward passes of a process; a fraction where the last one is smaller.
        processes: One per device.
        overlaps: Whether the exchange runs beside the backward pass, not after it.

    Returns:
        `forward`, `backward`, `exchange`, `optimizer`, `host` (to launch the operations, beside the device) and `step`,
        seconds, and the number of `launches`.
    """
    peak = {half: 1e12 * device.efficiency * rate for half, rate in _tflops(device).items()}
    bandwidth = 1e9 * device.bandwidth_efficiency * device.bandwidth_gbps

    def seconds(operations: Iterable[Operation]) -> float:
        return micro_batches * sum(
            max(op.flop / peak[op.half], op.num_bytes / bandwidth, 1e-6 * device.kernel_us * op.launches)
            for op in operations
        )

    passes = sum(count for name, count in _STEP_PASSES.items() if name != "ema" or memory.has_ema)
    launches = math.ceil(micro_batches) * sum(op.launches for op in memory.operations)
    forward = seconds(op for op in memory.operations if not op.backward)
    backward = seconds(op for op in memory.operations if op.backward)
    exchange = 2 * (processes - 1) / processes * 4 * memory.trained / (device.link_gbps * 1e9)
    optimizer = passes * 4 * memory.trained / bandwidth + memory.optimizer_flop / peak[True]
    host = 1e-6 * device.launch_us * launches
    hidden = min(exchange, backward / math.ceil(micro_batches)) if overlaps else 0.0
    step = max(forward + backward + exchange - hidden + optimizer, host)
    return {
        "forward": forward,
        "backward": backward,
        "exchange": exchange,
        "optimizer": optimizer,
        "host": host,
        "step": step,
        "launches": launches,
    }


def _tflops(device: Device) -> dict[bool, float]:
    """The peak in half precision and in float32."""
    return {True: device.half_tflops, False: device.float32_tflops}


def estimate_cost(
    config: Config,
    num_processes: int,
    num_train_images: int | None,
    *,
    device: Device | None = None,
    search: bool = False,
) -> dict[str, Any]:
    """Everything that can be estimated before a run; plain values, as `--json` prints them.

    Args:
        config: The configuration.
        num_processes: Processes of the run, one per device.
        num_train_images: Training images per epoch if known.
        device: Its rates; None for the device at hand.
        search: Look for the largest micro-batch that fits, which takes seconds where the batch of a process does not.

    Raises:
        ValueError: A batch that cannot be divided over the processes.
    """
    device = device or local_device()
    cost, presets = count_flops(config), config.training_presets
    # "auto" is bf16 where that is faster, as on every GPU of the table.
    half = presets.mixed_precision != "no" and (
        presets.mixed_precision != "auto" or device.half_tflops > device.float32_tflops
    )
    if device.tf32_tflops and presets.allow_tf32:
        device = replace(device, float32_tflops=device.tf32_tflops)
    tflops = _tflops(device)[half]
    micro_batch = micro_batch_size(config, num_processes)
    local_batch = presets.batch_size // num_processes
    batch = {
        "batch_size": presets.batch_size,
        "processes": num_processes,
        "micro_batches": -(-local_batch // micro_batch),
        "micro_batch": micro_batch,
    }
    memory = estimate_memory(config, micro_batch, num_processes)
    limit = device.memory_gib * GIB
    timed = replace(device, half_tflops=tflops)
    roofline = replace(timed, efficiency=1, bandwidth_efficiency=1, kernel_us=0, launch_us=0)
    seconds, roofline_seconds = (
        estimate_step(memory, each, local_batch / micro_batch, num_processes, presets.micro_batch_size != "auto")
        for each in (timed, roofline)
    )
    estimate = {
        **cost,
        "latent_dim": config.model.get("latent_dim", cost["latent_shape"][0] * cost["latent_shape"][1] ** 2),
        "device": {**asdict(device), "tflops": tflops},
        "batch": batch,
        "memory": {
            "parts_bytes": memory.parts,
            "kept_bytes": memory.kept_bytes,
            "tensor_bytes": memory.tensor_bytes,
            "overhead_bytes": memory.overhead_bytes,
            "total_bytes": memory.total_bytes,
            "fits": memory.total_bytes <= limit,
        },
        "time": {
            "seconds": seconds,
            "exchange_overlaps": presets.micro_batch_size != "auto",
            "roofline_step_seconds": roofline_seconds["step"],
        },
    }
    if search:
        estimate["memory"]["largest_micro_batch"] = estimate_micro_batch(config, num_processes, limit)
    if num_train_images is not None:
        images = min(num_train_images, presets.max_images_per_epoch or num_train_images)
        steps = images // presets.batch_size
        flop = cost["gflop_average"] * 1e9 * steps * presets.batch_size * presets.num_epochs
        estimate["epoch"] = {"images": images, "steps": steps, "epochs": presets.num_epochs, "total_flop": flop}
        # Smaller images of the resolution schedule need fewer FLOPs and, in proportion, less memory traffic.
        scale = cost["gflop_average"] / cost["gflop_training"] * steps * presets.num_epochs / 3600
        estimate["time"]["hours"] = scale * seconds["step"]
        estimate["time"]["roofline_hours"] = scale * roofline_seconds["step"]
        estimate["time"]["limit_minutes"] = config.training_presets.max_train_minutes
    return estimate


def describe_estimate(
    config: Config,
    num_processes: int,
    num_train_images: int | None,
    *,
    device: Device | None = None,
    search: bool = False,
) -> str:
    """The cost estimate of a run in a few lines, with its derivation; see `estimate_cost` for the arguments."""
    return format_estimate(
        estimate_cost(config, num_processes, num_train_images, device=device, search=search),
        config.model.get("latent_layout", "vector"),
    )


def format_estimate(estimate: dict[str, Any], layout: str) -> str:
    """An estimate as text, line by line; `layout` is `model.latent_layout`."""
    gflop, batch, memory, time = estimate["gflop"], estimate["batch"], estimate["memory"], estimate["time"]
    device, seconds, processes = estimate["device"], time["seconds"], batch["processes"]
    c, h, w = estimate["latent_shape"]
    lines = [
        f"model     {estimate['parameters'] / 1e6:.1f} M parameters, {estimate['trained_parameters'] / 1e6:.1f} M of them "
        "trained",
        f"latent    {c} x {h} x {w} = {c * h * w} dimensions ({layout})",
        f"forward   {gflop['encoder']:.2f} + {gflop['decoder']:.2f} = {estimate['gflop_forward']:.2f} GFLOPs per image "
        "(encoder + decoder)",
        "training  "
        + " + ".join(f"{value:.2f} {name}" for name, value in gflop.items())
        + f" = {estimate['gflop_training']:.2f} GFLOPs per image",
        f"batch     {batch['batch_size']} = {batch['batch_size'] // processes} x {processes} processes; "
        f"{batch['micro_batches']} x {batch['micro_batch']} images per forward pass",
        "memory    "
        + " + ".join(f"{size / GIB:.2f} {name}" for name, size in memory["parts_bytes"].items() if size)
        + f" = {memory['tensor_bytes'] / GIB:.2f} GiB at the peak of a step; with {memory['overhead_bytes'] / GIB:.2f} "
        f"assumed for driver, workspaces and fragmentation {memory['total_bytes'] / GIB:.2f} GiB (estimated)",
        f"fits      {_fit(estimate)}",
        f"device    {device['title']} ({device['source']}): {_rate(device['tflops'])} in this precision, memory "
        f"{device['bandwidth_gbps']:.3g} GB/s",
    ]
    if device["efficiency"] < 1 or device["launch_us"]:
        lines.append(
            f"assumed   {device['efficiency']:g} of the peak, {device['bandwidth_efficiency']:g} of the memory bandwidth, "
            f"{device['kernel_us']:g} us for the smallest kernel, {device['launch_us']:g} us of host time per launch"
        )
    if processes > 1:
        place = "beside" if time["exchange_overlaps"] else "after"
        size = 4 * estimate["trained_parameters"] / 1e6
        lines.append(
            f"exchange  {size:.1f} MB gradients x 2 x {processes - 1} / {processes} at {device['link_gbps']:g} GB/s "
            f"({device['link']}, assumed) = {1e3 * seconds['exchange']:.1f} ms per step, {place} a backward pass of "
            f"{1e3 * seconds['backward']:.1f} ms"
        )
    if "epoch" not in estimate:
        lines.append(
            "epoch     unknown length until the data set is opened (data.num_train_images states it beforehand)"
        )
        return "\n".join(lines)
    epoch = estimate["epoch"]
    lines.append(
        f"epoch     {epoch['images']} images / {batch['batch_size']} = {epoch['steps']} steps; x {epoch['epochs']} epochs "
        f"= {epoch['steps'] * epoch['epochs']} steps, {_number(epoch['total_flop'] / 1e15)} PFLOPs"
    )
    if not math.isclose(estimate["gflop_average"], estimate["gflop_training"]):
        lines.append(
            f"schedule  {estimate['gflop_average']:.2f} GFLOPs per image, averaged over the resolution schedule"
        )
    lines.append(
        f"time      {_duration(time['hours'])} (estimated) on {processes} x {device['title']}, {_milliseconds(seconds['step'])} "
        f"per full-size step: {_milliseconds(seconds['forward'])} forward, {_milliseconds(seconds['backward'])} backward, "
        f"{_milliseconds(seconds['optimizer'])} optimizer"
    )
    limit = time["limit_minutes"]
    if limit is not None and limit < 60 * time["hours"]:
        lines.append(f"limit     {limit:g} minutes: training_presets.max_train_minutes ends the run before")
    if device["launch_us"]:
        waits = "the device waits for the host" if seconds["host"] == seconds["step"] else "hidden behind the device"
        lines.append(
            f"host      {seconds['launches']} kernel launches per step without torch.compile take "
            f"{_milliseconds(seconds['host'])}: {waits}"
        )
    if device["efficiency"] < 1:
        lines.append(
            f"roofline  {_duration(time['roofline_hours'])} at the full peak and memory bandwidth: no run is faster unless "
            "torch.compile fuses operations"
        )
    return "\n".join(lines)


def _rate(tflops: float) -> str:
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:.3g} GFLOP/s"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:.0f} ms"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.3g} minutes" if 60 * hours >= 1 else f"{3600 * hours:.3g} seconds"
    return f"{_number(hours)} hours" if hours < 100 else f"{hours / 24:,.0f} days"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _fit(estimate: dict[str, Any]) -> str:
    memory, device, batch = estimate["memory"], estimate["device"], estimate["batch"]
    largest = memory.get("largest_micro_batch")
    where = f"{device['memory_gib']:.4g} GiB of {device['title']}"
    if not memory["fits"]:
        remedy = f"to {largest}" if largest else "lower"
        return (
            f"NOT in {where}: set training_presets.micro_batch_size {remedy} (gradients stay the same), or "
            "training_presets.gradient_checkpointing to true"
        )
    text = f"{memory['total_bytes'] / GIB:.2f} of {where}"
    if largest is None:
        return text
    local_batch = batch["batch_size"] // batch["processes"]
    if largest == local_batch:
        return f"{text}; all {local_batch} images of a process fit in one forward pass"
    return f"{text}; the largest micro_batch_size that fits is {largest}"


def known_train_images(config: Config) -> int | None:
    """Training images per epoch, where the configuration itself states them."""
    if config.data.num_train_images is None and config.data.dataset == "synthetic_faces":
        return config.data.synthetic_train_images
    return config.data.num_train_images
