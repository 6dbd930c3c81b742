"""EMA weights: an exponential moving average of the trained weights, which is validated and exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class EMAWeights(EMAModel):
    """diffusers' EMA weights, updated by one fused operation: a third of the memory traffic of `EMAModel.step`."""

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move the EMA weights towards the parameters."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)

    @contextlib.contextmanager
    def applied(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """A context in which the parameters hold the EMA weights; afterwards they hold the trained weights again.

        The trained weights wait on the device. `EMAModel.store` copies them to the host one by one.
        """
        parameters = [parameter.detach() for parameter in parameters]
        trained = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, self.shadow_params)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, trained)
