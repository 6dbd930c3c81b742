"""Peak rates of devices: the denominators of every calculated hour.

Those of GPUs in the table are from their vendor's documents and are not reached in practice; the device at hand is looked
up by its name, or measured if the table does not have it.
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

DEFAULT_EFFICIENCY = 0.5  # fraction of the peak that forward and backward pass reach; assumed


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Peak rates of one device.

    Attributes:
        title: Its name for people.
        cuda_name: What CUDA calls it.
        half_tflops: Dense bf16 or fp16 matrix products with float32 accumulation, TFLOP/s, without sparsity.
        float32_tflops: Float32 outside the tensor cores, TFLOP/s (TF32 is off by default).
        memory_gib: Its memory, GiB. Vendors write GB and mean GiB here.
        bandwidth_gbps: Of that memory, GB/s.
        link: How devices of one machine exchange gradients.
        link_gbps: Rate that an all-reduce reaches over that link in each direction, GB/s; an assumption.
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
    source: str


DEVICES: dict[str, Device] = {
    "rtx3090": Device(
        title="RTX 3090", half_tflops=71, float32_tflops=35.6, memory_gib=24, bandwidth_gbps=936,
        cuda_name="NVIDIA GeForce RTX 3090",
        source="NVIDIA Ampere GA102 GPU Architecture whitepaper",
    ),
    "rtx4090": Device(
        title="RTX 4090", half_tflops=165.2, float32_tflops=82.6, memory_gib=24, bandwidth_gbps=1008,
        cuda_name="NVIDIA GeForce RTX 4090",
        source="NVIDIA Ada GPU Architecture whitepaper",
    ),
    "rtx5090": Device(
        title="RTX 5090", half_tflops=209.5, float32_tflops=104.8, memory_gib=32, bandwidth_gbps=1792,
        cuda_name="NVIDIA GeForce RTX 5090", link="PCIe 5.0", link_gbps=24,
        source="NVIDIA RTX Blackwell GPU Architecture whitepaper",
    ),
    "l4": Device(
        title="L4", half_tflops=121, float32_tflops=30.3, memory_gib=24, bandwidth_gbps=300,
        cuda_name="NVIDIA L4",
        source="NVIDIA L4 datasheet (half of its rate with sparsity)",
    ),
    "l40s": Device(
        title="L40S", half_tflops=362, float32_tflops=91.6, memory_gib=48, bandwidth_gbps=864,
        cuda_name="NVIDIA L40S",
        source="NVIDIA L40S datasheet",
    ),
    "a100": Device(
        title="A100 80 GB SXM", half_tflops=312, float32_tflops=19.5, memory_gib=80, bandwidth_gbps=2039,
        cuda_name="NVIDIA A100-SXM4-80GB", link="NVLink 3", link_gbps=200,
        source="NVIDIA A100 datasheet",
    ),
    "h100": Device(
        title="H100 SXM", half_tflops=989, float32_tflops=67, memory_gib=80, bandwidth_gbps=3350,
        cuda_name="NVIDIA H100 80GB HBM3", link="NVLink 4", link_gbps=300,
        source="NVIDIA H100 datasheet (half of its rate with sparsity)",
    ),
    "h200": Device(
        title="H200 SXM", half_tflops=989, float32_tflops=67, memory_gib=141, bandwidth_gbps=4800,
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
    """Measure the rates of matrix products and of copies in memory, with the threads that torch has here."""
    import torch

    size = 512 if device.type == "cpu" else 4096

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
        matrix = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
        return 2 * size**3 / seconds(lambda: matrix @ matrix) / 1e12

    source = torch.ones(64 * size * size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = seconds(lambda: target.copy_(source))
    return Device(
        title=title,
        half_tflops=tflops(torch.bfloat16),
        float32_tflops=tflops(torch.float32),
        memory_gib=memory_bytes / 2**30,
        bandwidth_gbps=2 * source.nbytes / copy_seconds / 1e9,
        source="measured by matrix products and copies",
    )
