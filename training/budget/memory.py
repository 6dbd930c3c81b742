"""How much memory a training step takes, by part, from a step on fake tensors.

The forward and backward pass run on tensors that have shapes, types and storages but no contents, under the same autocast as
the real ones. Every storage is followed from its creation to its end, so the peak is that of the real sequence of
allocations on a GPU; saved activations are those that autograd passes to `torch.autograd.graph.saved_tensors_hooks`. Each operation's
FLOPs, bytes and kernel launches are counted too, for `training.budget.estimate.estimate_step`.

Memory outside PyTorch's tensors (driver context, workspaces of convolutions, fragmentation) is an assumption,
`overhead_bytes`.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.builders import build_model, freeze_parameters, hidden_convolutions
from training.cast_weights import CastWeights
from training.config import Config
from training.data.images import normalize
from training.distributed import AUTOCAST_DTYPES
from training.losses.adversarial import AdversarialLoss
from training.losses.objective import ReconstructionLoss, vae_loss
from training.muon import orthogonalization_flop
from training.randomness import sample_crops

GIB = 2**30

# Assumed, because fake tensors cannot show it: the CUDA context, cuBLAS and cuDNN with their workspaces; and the fraction that
# the allocator loses between blocks of different sizes.
CONTEXT_BYTES = 0.75 * GIB
FRAGMENTED_FRACTION = 0.1

_PERSISTENT = ("weights", "gradients", "optimizer state", "EMA weights", "trunk weights")
_TRANSIENT = ("saved activations", "saved in the losses", "temporary")  # grow with the batch


# Kernels of an operation on CUDA, where they are more than one: a bias or its gradient has its own.
_LAUNCHES = {"convolution": 2, "convolution_backward": 3, "native_layer_norm_backward": 3, "slice_backward": 2}


@dataclass(frozen=True)
class Operation:
    """One operation of the step.

    Attributes:
        flop: FLOPs of convolutions and matrix products.
        num_bytes: Read and written.
        half: It computes in half precision.
        launches: Kernels that it starts on CUDA.
        backward: It belongs to the backward pass.
    """

    flop: float
    num_bytes: int
    half: bool
    launches: int = 1
    backward: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one process at the peak of a step.

    Attributes:
        micro_batch: Images in the forward pass.
        parts: Name -> bytes at the peak: weights, gradients, optimizer state, EMA weights, saved activations, saved in
            the losses (features too), trunk weights (of the feature networks), temporary.
        kept_bytes: Activations and features that autograd keeps when the forward pass ends, bytes.
        operations: Of the forward and backward pass.
        trained: Number of trained parameters.
        has_ema: Whether EMA weights are kept.
        optimizer_flop: FLOPs of the optimizer's matrix products, in half precision; 0 for Adam.
    """

    micro_batch: int
    parts: dict[str, int]
    kept_bytes: int
    operations: tuple[Operation, ...]
    trained: int
    has_ema: bool
    optimizer_flop: int = 0

    @property
    def tensor_bytes(self) -> int:
        """All tensors at the peak."""
        return sum(self.parts.values())

    @property
    def overhead_bytes(self) -> int:
        """Assumed beyond tensors: see `CONTEXT_BYTES` and `FRAGMENTED_FRACTION`."""
        return round(CONTEXT_BYTES + FRAGMENTED_FRACTION * sum(self.parts[name] for name in _TRANSIENT))

    @property
    def total_bytes(self) -> int:
        """Tensors and the assumed overhead."""
        return self.tensor_bytes + self.overhead_bytes


class _Ledger(TorchDispatchMode):
    """Follows every storage that operations create, by part, and records the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys((*_PERSISTENT, *_TRANSIENT), 0)
        self.peak = dict(self.bytes)
        self.operations: list[Operation] = []
        self.in_backward = False
        self._part_of: dict[int, tuple[str, int]] = {}  # storage -> its part and bytes

    def enter(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage under `part`; a known storage moves there."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._part_of:
            old, size = self._part_of[key]
            self.bytes[old] -= size
        else:
            size = storage.nbytes()
            weakref.finalize(storage, self._leave, key)
        self._part_of[key] = (part, size)
        self.bytes[part] += size
        if sum(self.bytes.values()) > sum(self.peak.values()):
            self.peak = dict(self.bytes)

    def _leave(self, key: int) -> None:
        part, size = self._part_of.pop(key)
        self.bytes[part] -= size

    def part(self, tensor: Tensor) -> str | None:
        """The part that a tensor's storage is counted under."""
        found = self._part_of.get(tensor.untyped_storage()._cdata)
        return found and found[0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        for tensor in new:
            if self.part(tensor) is None:
                self.enter(tensor, "temporary")
        name = func._schema.name.removeprefix("aten::")
        if (new or func._schema.is_mutable) and not name.startswith(("empty", "new_empty")):  # the others are views
            count = flop_registry.get(func.overloadpacket)
            flop = 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
            written = new or outputs
            traffic = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *written))
            half = bool(outputs) and outputs[0].dtype in (torch.bfloat16, torch.float16)
            launches = _LAUNCHES.get(name, 1)
            self.operations.append(Operation(float(flop), traffic, half, launches, self.in_backward))
        return out


class _FusedRMSNorm(torch.autograd.Function):
    """Reads, writes and saves what the kernels of RMS normalization on CUDA do, but for one value for each vector."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.neg()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.add(ctx.saved_tensors[0])


class _CUDAKernels(TorchFunctionMode):
    """Counts what is one kernel on CUDA as one, though fake tensors of the CPU compose it from several operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if func is torch.nn.functional.rms_norm:
            return _FusedRMSNorm.apply(args[0])
        return func(*args, **(kwargs or {}))


def trace_memory(config: Config, micro_batch: int, *, keeps_gradients: bool, precision: str = "bf16") -> MemoryEstimate:
    """Run a forward and a backward pass of a configuration on fake tensors.

    Args:
        config: The configuration.
        micro_batch: Images in the forward pass.
        keeps_gradients: Gradients exist before the backward pass, because several micro-batches accumulate into them or
            because DDP keeps buckets for them.
        precision: "bf16", "fp16" or "no".

    Raises:
        ValueError: The model's section cannot be built.
    """
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        return _trace_step(
            config, build_model(config), _fake_loss(config, precision), micro_batch, keeps_gradients, precision
        )


def _fake_loss(config: Config, precision: str) -> ReconstructionLoss:
    with unset_fake_temporarily(), torch.device("meta"):
        loss = ReconstructionLoss.from_config(config.loss, "meta", dtype=AUTOCAST_DTYPES[precision], load_weights=False)
    for network in loss.networks:
        for module in network.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    if loss.adversarial is not None:
        loss.adversarial = AdversarialLoss([network.channels for network in loss.networks], config.loss, "cpu")
    return loss


def _trace_step(
    config: Config,
    model: AutoencoderKLUltra,
    loss: ReconstructionLoss,
    micro_batch: int,
    keeps_gradients: bool,
    precision: str,
) -> MemoryEstimate:
    presets = config.training_presets
    freeze_parameters(model, presets)
    if presets.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if presets.channels_last:  # Module.to cannot exchange parameters without contents
        maps = [*model.parameters(), *(buffer for network in loss.networks for buffer in network.buffers())]
        for tensor in (each for each in maps if each.ndim == 4):
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    muon = set(hidden_convolutions(model)) if presets.optimizer == "muon" else set()
    orthogonalized = [parameter for parameter in trained if parameter in muon]
    states = [*trained, *(parameter for parameter in trained if parameter not in muon)]  # Muon keeps one of two
    has_ema = presets.ema_decay > 0
    ledger = _Ledger()
    lasting: dict[str, list[Tensor]] = {
        "weights": [*model.parameters(), *model.buffers()],
        "trunk weights": [buffer for network in loss.networks for buffer in network.buffers()],
        "optimizer state": [torch.empty_like(parameter) for parameter in states],
        "EMA weights": [torch.empty_like(parameter) for parameter in trained] if has_ema else [],
    }
    for part, tensors in lasting.items():
        for tensor in tensors:
            ledger.enter(tensor, part)
    for parameter in trained:
        if keeps_gradients:
            parameter.grad = torch.empty_like(parameter)
            ledger.enter(parameter.grad, "gradients")
        else:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.enter(p.grad, "gradients"))

    resolution = model.config.sample_size
    crops = sample_crops(micro_batch, resolution, loss.crop_sizes, torch.Generator())
    saving = "saved activations"

    def pack(tensor: Tensor) -> Tensor:
        if ledger.part(tensor) not in _PERSISTENT:
            ledger.enter(tensor, saving)
        return tensor

    dtype = AUTOCAST_DTYPES[precision]
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
    casts = contextlib.nullcontext() if dtype is None or presets.compile else CastWeights(model, dtype).applied()
    # As in `training.step.TrainStep.gradients`, where accelerate's wrapper puts the model under autocast of its own.
    with ledger, _CUDAKernels(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pixels = normalize(torch.zeros(micro_batch, 3, resolution, resolution, dtype=torch.uint8))
        noise = torch.zeros(micro_batch, *model.latent_shape)
        with autocast, casts:
            output = model(pixels, noise=noise)
        saving = "saved in the losses"
        mean, logvar = output.posterior.mean, output.posterior.logvar
        with autocast:
            total, _ = vae_loss(loss, output.sample, pixels, mean, logvar, beta=1.0, crops=crops)
        kept_bytes = ledger.bytes["saved activations"] + ledger.bytes["saved in the losses"]
        saving = "saved activations"  # what gradient checkpointing computes again
        ledger.in_backward = True
        total.backward()
        if loss.adversarial is not None:
            loss.adversarial.backward(1.0)
    return MemoryEstimate(
        micro_batch=micro_batch,
        parts=ledger.peak,
        kept_bytes=kept_bytes,
        operations=tuple(ledger.operations),
        trained=sum(parameter.numel() for parameter in trained),
        has_ema=has_ema,
        optimizer_flop=sum(map(orthogonalization_flop, orthogonalized)),
    )
