"""Processes and devices: how a run finds its processes, its device and its precision, and how processes agree."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.utils import parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from training.config import COLLECTIVE_TIMEOUT_S

T = TypeVar("T")

# What CUDA's libraries raise when they get no memory, besides the messages that accelerate knows. cuDNN finds no engine if
# the workspace of none fits.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|STATUS_ALLOC_FAILED|ALLOCATION_FAILED|CUDNN_STATUS_(NOT_SUPPORTED|INTERNAL_ERROR|NOT_INITIALIZED)"
    r"|CU(BLAS|SOLVER)_STATUS_NOT_INITIALIZED|unable to find an engine",
    re.IGNORECASE,
)

AUTOCAST_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by mixed precision

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)  # not supported


def join_processes() -> PartialState:
    """Joins the other processes of the launch and selects this process's device.

    Raises:
        ValueError: The launcher's settings contradict the configuration or the machine.
    """
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {accumulation}: accumulation follows from "
            "training_presets.batch_size and micro_batch_size; remove gradient_accumulation_steps from the accelerate "
            "configuration."
        )
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    state = PartialState(cpu=_use_cpu(), **timeout.to_kwargs(), **_store_of_restart())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched but do not find each other (each sees {state.num_processes}): set "
            "ACCELERATE_USE_CPU=true to train on the CPU, or launch one process."
        )
    return state


def _store_of_restart() -> dict[str, Any]:
    """Arguments of `init_process_group` with which processes that torchrun has restarted find each other.

    torchrun keeps the store of the first start, with the addresses of processes that have died; a process that looks
    before all others have registered waits for dead ones (pytorch/pytorch#135712). So each restart uses its own key
    prefix. On several nodes the restart counts may differ; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1" or os.environ.get("WORLD_SIZE", "1") == "1":
        return {}
    store, rank, world_size = next(rendezvous("env://"))
    return {"store": PrefixStore(f"restart_{restart}", store), "rank": rank, "world_size": world_size}


def _use_cpu() -> bool:
    """Whether to train on the CPU; accelerate itself ignores the launcher's choice when it builds its state."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def build_accelerator(precision: str, static_graph: bool) -> Accelerator:
    """Builds the accelerator of a run.

    Args:
        precision: "no", "bf16" or "fp16".
        static_graph: Whether gradients are exchanged after every forward pass. Only then is the graph the same in all
            iterations, so that DDP need not search for unused parameters.

    Raises:
        ValueError: The launcher asks for a sharded model.
    """
    # torch 2.14 renamed the argument, and accelerate knows the old name only. The old one is right in all versions: the model
    # has no buffer that changes.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    accelerator = Accelerator(
        cpu=_use_cpu(),
        mixed_precision=precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True, static_graph=static_graph, broadcast_buffers=False
            )
        ],
    )
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"the accelerate configuration asks for {accelerator.distributed_type.value}: a model of this size fits on "
            "every device (distributed_type: MULTI_GPU); sharding would only add communication."
        )
    return accelerator


def set_backend_options(allow_tf32: bool, deterministic: bool) -> None:
    """Sets how CUDA's libraries compute, for this process.

    Args:
        allow_tf32: Whether float32 convolutions may use TF32; matrix products never do.
        deterministic: Use deterministic kernels where there are any, and warn where not; otherwise cuDNN tries which
            kernel is the fastest for each shape.
    """
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


@contextlib.contextmanager
def float32_without_tf32() -> Iterator[None]:
    """A context, or decorator, in which float32 convolutions are computed in float32, for results that are compared."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def resolve_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """Returns the mixed precision to use, and where the choice comes from.

    A launcher that names a precision wins. "no" is also what `accelerate launch` exports when nobody chose, so it does
    not count as named: a plain launch gets the configuration's precision rather than a silent float32.

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
    """Whether this CPU has bfloat16 instructions; without them bf16 is emulated and several times slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may avoid an error: the device, or a library that needs a workspace, got no memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and (should_reduce_batch_size(error) or _OUT_OF_MEMORY.search(str(error)) is not None)
    )


def with_smaller_batches(function: Callable[[int], T], batch: int) -> T:
    """Calls a function with a batch size, which is halved and tried again while memory runs out.

    Args:
        function: Communicates with no other process, because each process decides for itself.
        batch: First size.

    Raises:
        RuntimeError: Not even one image fits, or an error that is not of missing memory.
    """
    while True:
        try:
            return function(batch)
        except RuntimeError as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
        batch = -(-batch // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@functools.cache
def _host_group() -> torch.distributed.ProcessGroup:
    """A group on the host for work of the main process alone: the others wait without occupying their GPUs.

    NCCL ends a process that waits too long; this group waits as long as the main process lives.
    """
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=2))


def on_main_process(state: Accelerator | PartialState, function: Callable[[], T]) -> T:
    """Runs a function on the main process and broadcasts its result or its exception; every process must call this.

    Args:
        state: The processes.
        function: Its result must be picklable.

    Raises:
        Exception: Whatever the function raised, on every process; as a RuntimeError with the same message on the other
            processes if the exception cannot be pickled.
    """
    if state.num_processes == 1:
        return function()
    group = _host_group()
    result, error = None, None
    if state.is_main_process:
        try:
            result = function()
        except Exception as raised:  # an exception that stays here leaves the others waiting in a collective
            error = raised
    box = [result, error if error is None or _is_picklable(error) else RuntimeError(f"{type(error).__name__}: {error}")]
    torch.distributed.broadcast_object_list(box, src=0, group=group)
    if error is not None:
        raise error
    if box[1] is not None:
        box[1].from_main_process = True  # which prints it, so that the others need not
        raise box[1]
    return box[0]


def main_process_first(state: Accelerator | PartialState, function: Callable[[], T]) -> T:
    """Runs a function on every process, on the main process first, so that it can fill a cache for the others.

    Raises:
        Exception: What the function raised on the main process, on every process; or on this one.
    """
    results: list[T] = []
    on_main_process(state, lambda: results.append(function()))
    return results[0] if state.is_main_process else function()


def _is_picklable(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # pickling runs the exception's own code, which may raise anything
        return False


def read_later(
    accelerator: Accelerator, values: dict[str, Tensor], flags: dict[str, bool]
) -> Callable[[], tuple[dict[str, float], dict[str, bool]]]:
    """Takes means over all processes and combines flags, in one collective and one copy to the host, without waiting.

    Args:
        accelerator: The processes.
        values: Scalars on the device, means over equally many images on every process.
        flags: Conditions of this process.

    Returns:
        A function that waits for the copy and returns the means, and for each flag whether any process raises it.
    """
    on_cuda = accelerator.device.type == "cuda"
    raised = torch.tensor([float(flag) for flag in flags.values()])
    if on_cuda:
        raised = raised.pin_memory()
    vector = torch.stack([*values.values(), *raised.to(accelerator.device, non_blocking=on_cuda).unbind()])
    if accelerator.num_processes > 1:
        vector = accelerator.reduce(vector, reduction="mean")
    on_host = torch.empty(len(vector), pin_memory=on_cuda)
    on_host.copy_(vector, non_blocking=on_cuda)
    copied = torch.cuda.Event() if on_cuda else None
    if copied is not None:
        copied.record()

    def read() -> tuple[dict[str, float], dict[str, bool]]:
        if copied is not None:
            copied.synchronize()
        means = on_host.tolist()
        return dict(zip(values, means)), {name: mean > 0 for name, mean in zip(flags, means[len(values) :])}

    return read
