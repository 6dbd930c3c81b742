"""Muon: an optimizer that orthogonalizes the momentum of weight matrices (Jordan et al. 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# A quintic polynomial that takes singular values from (0, 1] to about 1 in five iterations: from the authors' description,
# https://kellerjordan.github.io/posts/muon/.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# Root mean square of an update at learning rate 1, about Adam's, so that both can share a learning rate: Liu et al. 2025
# (https://arxiv.org/abs/2502.16982), section 2.2.
_UPDATE_RMS = 0.2


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of matrices by values of 0.7 to 1.2, by Newton-Schulz iterations in bfloat16.

    Args:
        matrices: (..., rows, columns).

    Returns:
        The same shape, bfloat16.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).bfloat16()
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def orthogonalization_flop(weight: Tensor) -> int:
    """FLOPs of `orthogonalize` for a convolution weight: a multiplication and an addition are two."""
    short, long = sorted((len(weight), weight[0].numel()))
    return _ITERATIONS * (4 * short**2 * long + 2 * short**3)


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `muon=True`, AdamW for the others.

    Muon takes a step of Nesterov momentum, m = momentum m + (1 - momentum) g, along the orthogonalized matrix (out channels)
    x (in channels x height x width), scaled to Adam's size. Its weight decay is decoupled like AdamW's.

    Args:
        groups: Parameter groups; those with `muon=True` contain convolution weights only.
        betas: Of AdamW.
        weight_decay: Of both.
        momentum: Of Muon.
        fused: Use the fused kernel of AdamW; then `found_inf`, which a gradient scaler sets, skips a step on the device.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        momentum: float = 0.95,
        fused: bool = False,
    ) -> None:
        defaults = {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(groups, defaults | {"muon": False, "fused": fused})
        self._step_supports_amp_scaling = fused

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._muon if group["muon"] else self._adamw)(group, parameters)
        return result

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        found_inf, keep = getattr(self, "found_inf", None), 1.0
        if found_inf is not None:  # 1 where the step is to be skipped
            keep = 1.0 - found_inf.to(parameters[0].device)
        updates = defaultdict(list)
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
            if found_inf is not None:
                gradient = torch.where(keep > 0, gradient, 0.0)
            momentum = state["exp_avg"].lerp_(gradient, (1 - group["momentum"]) * keep)
            update = gradient.lerp(momentum, group["momentum"]).flatten(1)
            updates[update.shape].append((parameter, update))
        for shape, members in updates.items():  # matrices of one shape in one batch, for fewer launches
            scale = group["lr"] * _UPDATE_RMS * max(shape) ** 0.5 * keep
            orthogonal = orthogonalize(torch.stack([update for _, update in members]))
            for (parameter, _), update in zip(members, orthogonal, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"] * keep)
                parameter.sub_(scale * update.float().view(parameter.shape))

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device if group["fused"] else None)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
