"""Peak rates of devices: the denominators of every calculated hour.

Those of GPUs in the table are from their vendor's documents and are not reached in practice, so fractions of them are assumed.
The device at hand is looked up by its name, or measured if the table does not have it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.cli import select_device

if TYPE_CHECKING:
    import torch

# Convolutions that are timed for the rate of a measured device, as in the reference configuration: channels, resolution.
_LAYERS = ((96, 64), (192, 32), (256, 16))


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Peak rates of one device.

    Attributes:
        title: Its name for people.
        cuda_name: What CUDA calls it.
        half_tflops: Dense bf16 or fp16 matrix products with float32 accumulation, TFLOP/s, without sparsity; of a measured
            device, convolutions of the reference configuration's sizes.
        float32_tflops: Float32 without TF32, TFLOP/s.
        memory_gib: Its memory, GiB. Vendors write GB and mean GiB here.
        bandwidth_gbps: Of that memory, GB/s.
        link: How devices of one machine exchange gradients.
        link_gbps: Rate that an all-reduce reaches over that link in each direction, GB/s; an assumption.
        tf32_tflops: Float32 convolutions with TF32, TFLOP/s; 0 where there is none.
        efficiency: Fraction of the peak that convolutions and matrix products reach. For the table an assumption, as are
            the next three; a measured device has 1 because its rates are those of convolutions.
        bandwidth_efficiency: Fraction of the memory bandwidth that the other operations reach.
        kernel_us: Duration of the smallest operation, microseconds.
        launch_us: Host time per kernel launch, microseconds; 0 where host and device are the same.
        source: Where the rates come from.
    """

    title: str
    cuda_name: str = ""
    half_tflops: float
    float32_tflops: float
    memory_gib: float
    bandwidth_gbps: float
    link: str = "PCIe 4.0"
    link_gbps: float = 12
    tf32_tflops: float = 0
    efficiency: float = 0.6
    bandwidth_efficiency: float = 0.8
    kernel_us: float = 2
    launch_us: float = 8
    source: str


DEVICES: dict[str, Device] = {
    "rtx3090": Device(
        title="RTX 3090", half_tflops=71, tf32_tflops=35.5, float32_tflops=35.6, memory_gib=24, bandwidth_gbps=936,
        cuda_name="NVIDIA GeForce RTX 3090",
        source="NVIDIA Ampere GA102 GPU Architecture whitepaper",
    ),
    "rtx4090": Device(
        title="RTX 4090", half_tflops=165.2, tf32_tflops=82.6, float32_tflops=82.6, memory_gib=24, bandwidth_gbps=1008,
        cuda_name="NVIDIA GeForce RTX 4090",
        source="NVIDIA Ada GPU Architecture whitepaper",
    ),
    "rtx5090": Device(
        title="RTX 5090", half_tflops=209.5, tf32_tflops=104.75, float32_tflops=104.8, memory_gib=32, bandwidth_gbps=1792,
        cuda_name="NVIDIA GeForce RTX 5090", link="PCIe 5.0", link_gbps=24,
        source="NVIDIA RTX Blackwell GPU Architecture whitepaper",
    ),
    "l4": Device(
        title="L4", half_tflops=121, tf32_tflops=60.5, float32_tflops=30.3, memory_gib=24, bandwidth_gbps=300,
        cuda_name="NVIDIA L4",
        source="NVIDIA L4 datasheet (half of its rate with sparsity)",
    ),
    "l40s": Device(
        title="L40S", half_tflops=362, tf32_tflops=181, float32_tflops=91.6, memory_gib=48, bandwidth_gbps=864,
        cuda_name="NVIDIA L40S",
        source="NVIDIA L40S datasheet",
    ),
    "a100": Device(
        title="A100 80 GB SXM", half_tflops=312, tf32_tflops=156, float32_tflops=19.5, memory_gib=80, bandwidth_gbps=2039,
        cuda_name="NVIDIA A100-SXM4-80GB", link="NVLink 3", link_gbps=200,
        source="NVIDIA A100 datasheet",
    ),
    "h100": Device(
        title="H100 SXM", half_tflops=989, tf32_tflops=494.5, float32_tflops=67, memory_gib=80, bandwidth_gbps=3350,
        cuda_name="NVIDIA H100 80GB HBM3", link="NVLink 4", link_gbps=300,
        source="NVIDIA H100 datasheet (half of its rate with sparsity)",
    ),
    "h200": Device(
        title="H200 SXM", half_tflops=989, tf32_tflops=494.5, float32_tflops=67, memory_gib=141, bandwidth_gbps=4800,
        cuda_name="NVIDIA H200", link="NVLink 4", link_gbps=300,
        source="NVIDIA H200 datasheet (half of its rate with sparsity)",
    ),
}  # fmt: skip


def find_device(name: str) -> Device:
    """The device of that name in the table.

    Raises:
        ValueError: It is not in the table.
    """
    if name not in DEVICES:
        raise ValueError(f"--device {name} is not in the table: use one of {', '.join(DEVICES)}.")
    return DEVICES[name]


@functools.cache
def local_device(device: torch.device | None = None) -> Device:
    """The device at hand: by its CUDA name from the table, else measured, which takes about a second.

    Args:
        device: Where a run computes; None is what accelerate would choose.
    """
    import psutil
    import torch
    from accelerate.utils import parse_flag_from_env

    if device is None:
        device = torch.device("cpu") if parse_flag_from_env("ACCELERATE_USE_CPU") else select_device(None)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known in DEVICES.values():
            if known.cuda_name == name:
                return known
        return measure_device(device, name, torch.cuda.get_device_properties(device).total_memory)
    return measure_device(device, f"this {device.type.upper()}", psutil.virtual_memory().total)


def measure_device(device: torch.device, title: str, memory_bytes: int) -> Device:
    """Measure the rates of convolutions with their gradients and of elementwise operations, with torch's threads here."""
    import torch
    from torch.nn import functional as F

    images = 4 if device.type == "cpu" else 64

    def seconds(function: Callable[[], Any]) -> float:
        fastest = math.inf
        for _ in range(5):
            start = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            fastest = min(fastest, time.perf_counter() - start)
        return fastest

    def tflops(dtype: torch.dtype) -> float:
        total_flop = total_seconds = 0.0
        for channels, size in _LAYERS:
            shapes = (images, channels, size, size), (channels, channels, 3, 3)
            maps, kernel = (torch.ones(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
            maps, kernel = (each.to(memory_format=torch.channels_last) for each in (maps, kernel))
            output = F.conv2d(maps, kernel, padding=1)
            gradient = torch.ones_like(output)

            def both() -> None:
                F.conv2d(maps, kernel, padding=1).backward(gradient)  # noqa: B023 (called at once)

            total_flop += 3 * 2 * 9 * channels * output.numel()
            total_seconds += seconds(both)
        return total_flop / total_seconds / 1e12

    maps = torch.ones(images, 3, 256, 256, device=device)
    calls = 200

    def many() -> None:  # small operations, forward and backward
        value = small = torch.ones(1, requires_grad=True)
        for _ in range(calls):
            value = value * small
        value.backward()

    on_cpu = device.type == "cpu"
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    half = torch.bfloat16 if has_bf16 else torch.float16  # as `resolve_precision`
    return Device(
        title=title,
        half_tflops=tflops(half),
        float32_tflops=tflops(torch.float32),
        memory_gib=memory_bytes / 2**30,
        bandwidth_gbps=3 * maps.nbytes / seconds(lambda: maps * maps) / 1e9,
        efficiency=1,
        bandwidth_efficiency=1,
        kernel_us=seconds(many) / (2 * calls) * 1e6 if on_cpu else 2,
        launch_us=0 if on_cpu else 8,
        source="measured by convolutions and elementwise operations",
    )
