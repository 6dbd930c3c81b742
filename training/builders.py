"""Turns a configuration into the pieces of a run, and refuses what cannot be, before anything is written.

What it is for: precision, model, batch arithmetic, optimizer. What it is not for: when they act (trainer.py).
"""

from __future__ import annotations

import datetime
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from torch import nn
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.config import COLLECTIVE_TIMEOUT_S, Config, unknown_key

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)  # not supported


def join_processes(mixed_precision: str) -> tuple[PartialState, str, str]:
    """Find the other processes and the device.

    Args:
        mixed_precision: What the configuration wants.

    Returns:
        The state of the processes, the precision and who says so (`resolve_precision`).

    Raises:
        ValueError: The launcher's settings contradict the configuration's or the machine.
    """
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {accumulation}: accumulation follows from "
            "training_presets.batch_size and micro_batch_size; remove gradient_accumulation_steps from the accelerate "
            "configuration."
        )
    # The main process fits the linear path while the others wait for it in their first collective.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    state = PartialState(cpu=_on_cpu(), **patience.to_kwargs(), **_meeting_place())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched but do not find each other (each sees {state.num_processes}): set "
            "ACCELERATE_USE_CPU=true to train on the CPU, or launch one process."
        )
    return state, *resolve_precision(mixed_precision, state.device)


def _meeting_place() -> dict[str, Any]:
    """Arguments of `init_process_group` by which processes that torchrun has restarted find each other.

    torchrun keeps the store of the first start, and in it the addresses of processes that are dead by now: who looks
    before all others have put in theirs waits for the dead (pytorch/pytorch#135712). So each restart gets names of its
    own. On several nodes the count of restarts may differ; there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the remedy.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1" or os.environ.get("WORLD_SIZE", "1") == "1":
        return {}
    store, rank, world_size = next(rendezvous("env://"))
    return {"store": PrefixStore(f"restart_{restart}", store), "rank": rank, "world_size": world_size}


def _on_cpu() -> bool:
    """Said to accelerate, which would not listen to the launcher's choice by itself, nor see several processes where
    there is no GPU."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def build_accelerator(state: PartialState, precision: str, run_dir: Path, single_micro_batch: bool) -> Accelerator:
    """The accelerator of a run.

    Args:
        state: Of the processes.
        precision: "no", "bf16" or "fp16".
        run_dir: Where TensorBoard events go.
        one_piece: Whether every forward pass is followed by an exchange of gradients. Only then is the graph the same
            in all of them, and DDP need not look for what was used.

    Raises:
        ValueError: The launcher asks for a way of sharding the model.
    """
    accelerator = Accelerator(
        cpu=_on_cpu(),
        mixed_precision=precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir)),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True, static_graph=single_micro_batch, broadcast_buffers=False
            )
        ],
    )
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"the accelerate configuration asks for {accelerator.distributed_type.value}: a model of this size is "
            "trained whole on every device (distributed_type: MULTI_GPU); sharding would only cost communication."
        )
    return accelerator


def resolve_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """Which mixed precision to use, and who says so.

    A launcher that names one wins. "no" is also what `accelerate launch` exports when nobody chose, so it does not
    count as named: a plain launch gets the configuration's precision rather than a silent float32.

    Raises:
        ValueError: fp16 on a CPU, which autocast accepts and ignores, or a precision that is not supported.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    source = "the configuration"
    if launcher != "no":
        wanted, source = launcher, "the launcher"
    if wanted == "auto":
        source = f"auto on {device.type}"
        if device.type == "cuda":
            wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif device.type == "cpu":
            wanted = "bf16" if cpu_computes_bf16() else "no"
        else:
            wanted = "no"
    if wanted not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed precision {wanted!r} (from {source}): use no, bf16 or fp16.")
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError(
            f"mixed precision fp16 (from {source}) does nothing on a CPU: use bf16 or no, in "
            "training_presets.mixed_precision or in the accelerate configuration."
        )
    return wanted, source


def cpu_computes_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them bf16 is emulated, several times slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def build_model(config: Config) -> AutoencoderKLUltra:
    """The model of section `model`, on the CPU, with the seed's initial weights.

    Raises:
        ValueError: Unknown key, impossible shape, or a resolution schedule that does not suit it.
    """
    known = [name for name in inspect.signature(AutoencoderKLUltra.__init__).parameters if name != "self"]
    for key in config.model:
        if key not in known:
            raise unknown_key(f"model.{key}", [f"model.{name}" for name in known])
    torch.manual_seed(config.training_presets.seed)
    try:
        model = AutoencoderKLUltra(**config.model)
    except TypeError as error:
        raise ValueError(f"section model: a value has the wrong type ({error}).") from None
    full, unit = model.config.sample_size, model.spatial_compression_ratio
    for side in map(int, config.training_presets.resolution_schedule):
        if model.config.latent_layout == "vector":
            raise ValueError(
                f"training_presets.resolution_schedule has images of {side} pixels, but the vector layout takes {full} "
                "only: leave it empty, or set model.latent_layout=spatial."
            )
        if full % side or side % unit or side >= full:
            raise ValueError(
                f"training_presets.resolution_schedule has images of {side} pixels: the side must be smaller than "
                f"sample_size {full}, divide it, and be a multiple of the downsampling factor {unit}."
            )
    return model


def micro_batch_size(config: Config, processes: int) -> int:
    """Most images in one forward pass of one process, checked; with "auto", what is tried first."""
    batch = config.training_presets.batch_size
    if batch % processes:
        raise ValueError(
            f"training_presets.batch_size {batch} cannot be divided over {processes} processes: "
            f"use {batch // processes * processes or processes} or another multiple of {processes}."
        )
    local = batch // processes
    wanted = config.training_presets.micro_batch_size
    return min(wanted, local) if isinstance(wanted, int) else local


def build_optimizer(
    config: Config, model: AutoencoderKLUltra, parameters: list[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """Adam or AdamW over `parameters`; the linear path's, if they are trained, in a group with their own rate.

    Each group has `lr_scale`, its learning rate over `training_presets.learning_rate`.
    """
    presets = config.training_presets
    linear = set(model.pca_branch.parameters()) if model.pca_branch is not None else set()
    groups = []
    for scale, members in (
        (1.0, [p for p in parameters if p not in linear]),
        (presets.pca_lr_scale, [p for p in parameters if p in linear]),
    ):
        if members:
            groups.append({"params": members, "lr": presets.learning_rate * scale, "lr_scale": scale})
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[presets.optimizer]
    return cls(
        groups,
        betas=(presets.adam_beta1, presets.adam_beta2),
        weight_decay=presets.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
