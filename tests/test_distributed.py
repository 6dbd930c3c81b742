"""What one process raises, every process raises; a process that dies takes the others down at once."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable

import pytest
import tiny
import torch
from runs import fork, run_ranks, wait_for_all

from training.data.images import DataError
from training.distributed import (
    float32_without_tf32,
    is_out_of_memory,
    join_processes,
    main_process_first,
    on_main_process,
    set_backend_options,
    with_smaller_batches,
)
from training.trainer import Trainer


class Unpicklable(RuntimeError):
    """An exception whose constructor takes other arguments than its message, so that unpickling it fails."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def run_on_two(job: Callable[[], int], log) -> list[int]:
    """Exit codes of `job` on two processes of one group."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    return wait_for_all([fork(job, log, **group, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)], 60)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("a wrong value"), ValueError),
        (OSError(28, "No space left on device"), OSError),
        (DataError("no such data set"), DataError),
        (Unpicklable("two", "arguments"), RuntimeError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.multiprocess
def test_an_exception_on_the_main_process_reaches_every_process(session, tmp_path, error, raised):
    def job() -> int:
        state = join_processes()

        def fail() -> None:
            raise error

        for call in (on_main_process, main_process_first):
            try:
                call(state, fail)
            except raised as received:
                assert str(error) in str(received)
            else:
                return 1
        return 0

    assert run_on_two(job, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()


def test_tf32_is_an_option_of_training_and_off_where_results_are_compared():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    try:
        for allowed, deterministic in ((True, True), (False, False)):
            set_backend_options(allowed, deterministic)
            assert (cudnn.allow_tf32, cudnn.benchmark) == (allowed, not deterministic)
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert not torch.backends.cuda.matmul.allow_tf32
            with float32_without_tf32():
                assert not cudnn.allow_tf32
            assert cudnn.allow_tf32 == allowed
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before
        torch.use_deterministic_algorithms(False)


@pytest.mark.multiprocess
def test_results_reach_every_process(session, tmp_path):
    def job() -> int:
        state = join_processes()
        main = on_main_process(state, os.getpid)
        own = main_process_first(state, os.getpid)
        return 0 if own == os.getpid() and (main == own) == state.is_main_process else 1

    assert run_on_two(job, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()


@pytest.mark.multiprocess
def test_a_process_that_fails_takes_the_others_down_at_once_and_logs_why(faces, tmp_path):
    config = tiny.tiny_config(tmp_path, faces, loss={"perceptual_weight": 0, "lpips_weight": 0})

    def fail_in_step_3(trainer: Trainer) -> None:
        step = trainer.train_step.gradients

        def gradients(*args, step: int, **kwargs):
            if step == 3 and trainer.accelerator.process_index == 1:
                raise OSError("the disk of the second process fails")
            return original(*args, step=step, **kwargs)

        original, trainer.train_step.gradients = step, gradients

    started = time.monotonic()
    codes = run_ranks(config, None, tmp_path / "log", 2, prepare=fail_in_step_3)
    log = (tmp_path / "log").read_text()
    assert all(codes) and time.monotonic() - started < 60, log
    errors = [line for line in log.splitlines() if "failed: " in line]
    assert "[1] ERROR failed: OSError: the disk of the second process fails" in errors[0]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.69 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.",
    ],
)
def test_messages_of_missing_memory(message):
    assert is_out_of_memory(RuntimeError(message)) and is_out_of_memory(torch.OutOfMemoryError(message))
    assert not is_out_of_memory(ValueError(message))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: device-side assert triggered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "cuDNN error: CUDNN_STATUS_BAD_PARAM",
        "mat1 and mat2 shapes cannot be multiplied (8x16 and 8x16)",
    ],
)
def test_other_messages_are_not_of_missing_memory(message):
    assert not is_out_of_memory(RuntimeError(message))


def test_a_batch_is_halved_until_it_fits():
    tried = []

    def fits(limit: int, message: str = "CUDA error: out of memory"):
        def function(batch: int) -> int:
            tried.append(batch)
            if batch > limit:
                raise RuntimeError(message)
            return batch

        return function

    assert with_smaller_batches(fits(2), 9) == 2 and tried == [9, 5, 3, 2]
    with pytest.raises(RuntimeError, match="out of memory"):
        with_smaller_batches(fits(0), 2)
    tried.clear()
    with pytest.raises(RuntimeError, match="shapes"):
        with_smaller_batches(fits(1, "shapes differ"), 8)
    assert tried == [8]
