"""Casts the weights of a model for a training step in a few groups, where autocast would cast them one by one.

Each cast of a weight, and of its gradient, is a kernel launch of its own: 164 of 1,003 in a step of `configs/ultra.json`, more
work for the host than for a GPU. The values are those of autocast, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modeling.autoencoder_kl_ultra import ChannelNorm

# Layers that use their weights in the dtype of autocast. `type` and not isinstance: the PCA branch is linear, in float32.
_LAYERS = (nn.Conv2d, nn.Linear, ChannelNorm)
# As DDP's buckets: the gradients of a group are ready together, and are exchanged while the backward pass goes on.
_GROUP_BYTES = 25 << 20


class _Cast(torch.autograd.Function):
    """Casts tensors, and their gradients back, in one launch each."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_cast(gradients, ctx.dtype)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    results = [torch.empty_like(each, dtype=dtype) for each in tensors]
    torch._foreach_copy_(results, list(tensors))
    return results


class CastWeights:
    """The trained weights of a model that autocast would cast.

    Args:
        model: Unwrapped; its parameters must not be exchanged later.
        dtype: Of autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._groups: list[list[tuple[nn.Module, str, nn.Parameter]]] = []
        size = _GROUP_BYTES
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False) if type(module) in _LAYERS else ():
                if not parameter.requires_grad or parameter.dtype != torch.float32:
                    continue
                if size + parameter.nbytes > _GROUP_BYTES:
                    self._groups.append([])
                    size = 0
                self._groups[-1].append((module, name, parameter))
                size += parameter.nbytes

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """In a forward pass inside, the layers have the cast weights.

        A group is cast when the first of its layers runs. Autograd runs what was recorded last first, so the gradients of
        the group are ready as soon as those of its layers, and not at the end of the backward pass.
        """
        handles: list[list[RemovableHandle]] = []
        try:
            for group in self._groups:
                hooks: list[RemovableHandle] = []
                cast = functools.partial(self._cast, group, hooks)
                hooks += [module.register_forward_pre_hook(cast) for module in {module for module, _, _ in group}]
                handles.append(hooks)
            yield
        finally:
            for handle in (handle for hooks in handles for handle in hooks):
                handle.remove()
            for module, name, parameter in (each for group in self._groups for each in group):
                module._parameters[name] = parameter

    def _cast(self, group: list[tuple[nn.Module, str, nn.Parameter]], hooks: list[RemovableHandle], *_: object) -> None:
        while hooks:
            hooks.pop().remove()
        cast = _Cast.apply(self.dtype, *(parameter for _, _, parameter in group))
        for (module, name, _), tensor in zip(group, cast, strict=True):
            module._parameters[name] = tensor
