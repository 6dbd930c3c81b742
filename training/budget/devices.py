"""What GPUs can do at most, from their vendor's documents: the denominators of every calculated hour and share.

Figures are peaks that no program reaches. What it is not for: measuring (python -m benchmarks.step does).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A GPU on paper.

    Attributes:
        title: As people call it.
        half_tflops: Dense bf16 or fp16 matrix products with float32 accumulation, TFLOP/s, without sparsity.
        float32_tflops: Float32 outside the tensor cores, TFLOP/s (TF32 is off unless somebody turns it on).
        memory_gib: On the card. Vendors write GB and mean GiB here.
        bandwidth_gbps: Of that memory, GB/s.
        source: The document.
    """

    title: str
    half_tflops: float
    float32_tflops: float
    memory_gib: float
    bandwidth_gbps: float
    source: str


DEFAULT_DEVICE = "rtx3090"

DEVICES: dict[str, Device] = {
    "rtx3090": Device(
        title="RTX 3090", half_tflops=71, float32_tflops=35.6, memory_gib=24, bandwidth_gbps=936,
        source="NVIDIA Ampere GA102 GPU Architecture whitepaper",
    ),
    "rtx4090": Device(
        title="RTX 4090", half_tflops=165.2, float32_tflops=82.6, memory_gib=24, bandwidth_gbps=1008,
        source="NVIDIA Ada GPU Architecture whitepaper",
    ),
    "rtx5090": Device(
        title="RTX 5090", half_tflops=209.5, float32_tflops=104.8, memory_gib=32, bandwidth_gbps=1792,
        source="NVIDIA RTX Blackwell GPU Architecture whitepaper",
    ),
    "l4": Device(
        title="L4", half_tflops=121, float32_tflops=30.3, memory_gib=24, bandwidth_gbps=300,
        source="NVIDIA L4 datasheet (half of its figure with sparsity)",
    ),
    "l40s": Device(
        title="L40S", half_tflops=362, float32_tflops=91.6, memory_gib=48, bandwidth_gbps=864,
        source="NVIDIA L40S datasheet",
    ),
    "a100": Device(
        title="A100 80 GB SXM", half_tflops=312, float32_tflops=19.5, memory_gib=80, bandwidth_gbps=2039,
        source="NVIDIA A100 datasheet",
    ),
    "h100": Device(
        title="H100 SXM", half_tflops=989, float32_tflops=67, memory_gib=80, bandwidth_gbps=3350,
        source="NVIDIA H100 datasheet (half of its figure with sparsity)",
    ),
    "h200": Device(
        title="H200 SXM", half_tflops=989, float32_tflops=67, memory_gib=141, bandwidth_gbps=4800,
        source="NVIDIA H200 datasheet (half of its figure with sparsity)",
    ),
}  # fmt: skip


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ValueError: It is not in the table.
    """
    if name not in DEVICES:
        raise ValueError(f"--device {name} is not in the table: use one of {', '.join(DEVICES)}.")
    return DEVICES[name]
