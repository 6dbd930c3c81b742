"""Runs the CUDA path of the project on a machine without a GPU, in a process of its own.

    python tests/pretended_cuda.py train_vae.py --config configs/quickstart.json    # or a module, such as training.evaluate

A tensor on the pretended device wraps a tensor on the CPU. Its device and its dispatch keys (autograd, autocast) are those
of CUDA, its values are computed on the CPU. Operations that mix devices raise as on CUDA; the operations on the device, and
the lines at which the host waits for it, are counted. It needs a CUDA build of torch and gcc: the autograd engine asks the
CUDA runtime and driver for devices, for which two preloaded libraries answer.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAME = "NVIDIA GeForce RTX 3090"
MEMORY = 24 * 2**30

_RUNTIME = """
static signed char count = 0;
void pretend_devices(int value) { count = value; }
signed char _ZN3c104cuda12device_countEv(void) { return count; }
"""
# c10 looks all of them up when it first needs the driver; only the first is called: no device has a context.
_DRIVER = "int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { *f = 0; *a = 0; return 0; }" + "".join(
    f"int cu{name}(void) {{ return 0; }}"
    for name in (
        "CtxGetCurrent CtxSetCurrent DeviceGet DeviceGetAttribute DevicePrimaryCtxRetain FuncGetAttribute "
        "FuncSetAttribute FuncSetCacheConfig GetErrorString LaunchCooperativeKernel LaunchKernel LinkAddData_v2 "
        "LinkComplete LinkCreate_v2 ModuleGetFunction ModuleLoad ModuleLoadData ModuleLoadDataEx ModuleUnload "
        "OccupancyMaxActiveBlocksPerMultiprocessor PointerGetAttribute TensorMapEncodeTiled"
    ).split()
)


def reason_to_skip() -> str | None:
    """Why this machine cannot pretend, or None."""
    import torch

    if shutil.which("gcc") is None:
        return "needs gcc"
    if not torch.backends.cuda.is_built():
        return "needs a CUDA build of torch"
    return "there is a GPU" if torch.cuda.is_available() else None


def environment(folder: str | Path) -> dict[str, str]:
    """Compiles the two libraries into a folder; returns the environment of a process that pretends."""
    for name, source in (("libpretended.so", _RUNTIME), ("libcuda.so.1", _DRIVER)):
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", f"{folder}/{name}"]
        subprocess.run(command, input=source, text=True, check=True)
    library_path = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    values = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    return values | {
        "LD_PRELOAD": f"{folder}/libpretended.so",
        "LD_LIBRARY_PATH": library_path,
        "PRETENDED_CUDA": str(folder),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }


def install() -> Any:
    """Patches torch in a process with `environment`; returns the mode in which tensors on "cuda" are pretended ones."""
    import torch
    from torch._decomp import get_decompositions
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    class Pretended(torch.Tensor):
        """A tensor on the device: `host` has its values."""

        @staticmethod
        def __new__(cls, host: torch.Tensor) -> torch.Tensor:
            return torch.Tensor._make_wrapper_subclass(
                cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
                device="cuda:0",
            )  # fmt: skip

        def __init__(self, host: torch.Tensor) -> None:
            self.host = host

        def __repr__(self, *, tensor_contents: Any = None) -> str:
            return f"Pretended({self.host})"

        def tolist(self) -> Any:
            _count_wait("tolist")
            return self.host.tolist()

        def numpy(self, **keywords: Any) -> Any:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return compute(func, args, kwargs or {})

    def on_cuda(device: Any) -> bool:
        return device is not None and torch.device(device).type == "cuda"

    def is_pinned(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in PINNED

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        PINNED[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other tensor gets its address
        return tensor

    def compute(func: Any, args: Any, kwargs: Any) -> Any:
        set_devices(0)  # of ATen only the autograd engine may find a device
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        device = kwargs.get("device")
        if name == "is_pinned":
            return is_pinned(args[0])
        if name == "_pin_memory":
            return pin(args[0].clone())
        copies = name in ("copy_", "_to_copy")
        if ours and not copies and name not in _TWO_DEVICES:
            for tensor in tensors:
                if not isinstance(tensor, Pretended) and tensor.dim():
                    raise RuntimeError(
                        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                        f"({name} of {tuple(tensor.shape)})"
                    )
        if ours and name in _READS:
            _count_wait(name)
        if ours and name == "index":
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) or not isinstance(index, Pretended) for index in indices):
                _count_wait("index by a mask or by a host tensor")
        to_device = bool(ours) if device is None else on_cuda(device)
        if copies:
            target, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
            to_device = isinstance(target, Pretended) if target is not None else to_device and (
                on_cuda(device) or isinstance(source, Pretended)
            )  # fmt: skip
            from_device = isinstance(source, Pretended)
            if to_device != from_device:
                asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
                host = (source if to_device else target) if not (to_device is False and target is None) else None
                # A copy to new pageable host memory waits; one from or to pinned memory does not.
                if not (asynchronous and host is not None and is_pinned(host)):
                    _count_wait("copy to the device" if to_device else "copy to the host")
        if (ours or to_device) and not func.is_view and not name.startswith(("empty", "new_empty")):
            OPERATIONS[name] += 1
        args, kwargs = tree_map_only(Pretended, lambda tensor: tensor.host, (args, kwargs))
        if on_cuda(device):
            kwargs = kwargs | {"device": torch.device("cpu")}
        if kwargs.get("pin_memory"):
            return pin(func(*args, **kwargs | {"pin_memory": False}))
        if to_device and name in _NO_HALF_ON_CPU and any(tensor.dtype == torch.float16 for tensor in tensors):
            is_half = lambda each: isinstance(each, torch.Tensor) and each.dtype == torch.float16  # noqa: E731
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.float() if is_half(t) else t, (args, kwargs))
            result = func(*args, **kwargs)
            result = tree_map_only(torch.Tensor, lambda t: t.half() if t.dtype == torch.float32 else t, result)
        else:
            result = on_cpu.get(func, func)(*args, **kwargs)
        known = {id(tensor.host): tensor for tensor in ours}  # what an operation in place returns
        if not to_device:
            return tree_map_only(torch.Tensor, lambda tensor: known.get(id(tensor), tensor), result)
        return tree_map_only(
            torch.Tensor, lambda each: known[id(each)] if id(each) in known else Pretended(each), result
        )

    aten = torch.ops.aten
    on_cpu = get_decompositions([aten._fused_rms_norm, aten._fused_rms_norm_backward])  # kernels of CUDA alone

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return compute(func, args, kwargs or {})

    set_devices = ctypes.CDLL(None).pretend_devices
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the host and copied
    backward = torch.autograd.graph._engine_run_backward

    def backward_with_devices(*args: Any, **kwargs: Any) -> Any:
        set_devices(127)  # all indices of a device are valid
        try:
            return backward(*args, **kwargs)
        finally:
            set_devices(0)

    torch.autograd.graph._engine_run_backward = backward_with_devices
    torch.autograd._engine_run_backward = backward_with_devices
    torch.autograd.set_multithreading_enabled(False).__enter__()
    _patch_cuda(torch)
    _patch_libraries(torch, Pretended, pin)
    return Mode()


OPERATIONS: collections.Counter[str] = collections.Counter()
WAITS: collections.Counter[str] = collections.Counter()
PINNED: dict[int, Any] = {}
_READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_dim")
_TWO_DEVICES = (
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_foreach_copy_",
    "is_same_size",
    "lift_fresh",
    "set_",
)
_NO_HALF_ON_CPU = (
    "convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "mv", "native_layer_norm",
    "native_layer_norm_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d",
    "avg_pool2d_backward", "reflection_pad2d", "reflection_pad2d_backward",
)  # fmt: skip


def _count_wait(what: str) -> None:
    """Counts a wait of the host, with the innermost line of the project or else of a library."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename.startswith(str(ROOT)) and "site-packages" not in frame.filename]
    libraries = [frame for frame in frames if "/torch/" not in frame.filename]
    frame = (own or libraries or frames)[-1]
    WAITS[f"{what} {frame.filename.removeprefix(f'{ROOT}/')}:{frame.lineno}"] += 1


def _patch_cuda(torch: Any) -> None:
    """Gives torch.cuda and torch.accelerator one device."""
    properties = types.SimpleNamespace(
        name=NAME, total_memory=MEMORY, major=8, minor=6, multi_processor_count=82, L2_cache_size=6 * 2**20
    )
    values = {
        "is_available": True, "is_initialized": True, "init": None, "_lazy_init": None, "device_count": 1,
        "current_device": 0, "set_device": None, "empty_cache": None, "get_device_name": NAME,
        "get_device_properties": properties, "get_device_capability": (8, 6), "mem_get_info": (MEMORY, MEMORY),
        "memory_reserved": 0, "memory_allocated": 0, "max_memory_allocated": 2**30, "max_memory_reserved": 2**30,
        "reset_peak_memory_stats": None, "manual_seed": None, "manual_seed_all": None, "get_rng_state_all": [],
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "is_bf16_supported": True,
        "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.cuda.device = lambda *args: contextlib.nullcontext()
    # Of the latest copy of a step's values: the step after it has been launched by then, so nothing is idle.
    torch.cuda.Event = lambda: types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    torch.accelerator.synchronize = torch.cuda.synchronize = lambda *args: _count_wait("synchronize")
    torch.accelerator.empty_cache = lambda *args: None


def _patch_libraries(torch: Any, pretended: type, pin: Any) -> None:
    """What wrappers cannot do: pinned memory in threads, parameters exchanged in place, safetensors by address."""
    import safetensors.torch
    from diffusers.models.modeling_utils import ModelMixin

    import training.data.stream

    class Torch:  # of stream.py, whose threads have no mode
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            return pin(torch.empty(*args, **kwargs)) if pin_memory else torch.empty(*args, **kwargs)

    training.data.stream.torch = Torch()

    def on_host(value: Any) -> Any:
        return value.host if isinstance(value, pretended) else value

    for name in ("save", "save_file"):
        function = getattr(safetensors.torch, name)
        setattr(safetensors.torch, name, lambda tensors, *args, function=function, **kwargs: function(
            {key: on_host(value.detach()) for key, value in tensors.items()}, *args, **kwargs))  # fmt: skip

    save_pretrained, apply = ModelMixin.save_pretrained, torch.nn.Module._apply

    def save_from_host(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(each, pretended) for each in self.parameters()):
            return save_pretrained(self, *args, **kwargs)
        host = type(self)(**{key: value for key, value in self.config.items() if not key.startswith("_")})
        host.load_state_dict({key: value.cpu() for key, value in self.state_dict().items()})
        return save_pretrained(host, *args, **kwargs)

    def apply_with_new_parameters(self: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            changes = any(function(each) is not each for each in self.parameters(recurse=False))
        torch.__future__.set_overwrite_module_params_on_conversion(changes)
        return apply(self, function, *args, **kwargs)

    ModelMixin.save_pretrained, torch.nn.Module._apply = save_from_host, apply_with_new_parameters


def main() -> None:
    """The command: runs a script or a module of the project, then prints what was counted."""
    if "PRETENDED_CUDA" not in os.environ:
        command = [sys.executable, *sys.argv]
        os.execve(sys.executable, command, environment(tempfile.mkdtemp(prefix="pretended_cuda_")))
    mode, sys.argv = install(), sys.argv[1:]

    def report() -> None:
        counts = {"operations": sum(OPERATIONS.values()), "waits": dict(WAITS.most_common())}
        print(json.dumps(counts, indent=2), file=sys.stderr)

    atexit.register(report)
    sys.path.insert(0, str(ROOT))
    with mode:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
