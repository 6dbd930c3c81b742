"""The adversarial term: a discriminator on the features of the frozen networks that the loss computes anyway.

- *Discriminator*: a small head for each feature layer but the first of each network, as in Projected GANs (Sauer et al.
  2021, https://arxiv.org/abs/2111.01007). It learns from few images, and costs little beside the networks.
- *Losses*: each reconstruction is compared with its own target, position by position: softplus(D(target) - D(reconstruction))
  for the decoder and softplus(D(reconstruction) - D(target)) for the discriminator, with a penalty on the squared gradient
  of D at both (R1 and R2), as in R3GAN (Huang et al. 2024, https://arxiv.org/abs/2501.05441), but at the features.
- *Weight*: `loss.adversarial_weight` times the ratio of the gradient norms of the reconstruction terms and of this term (Esser
  et al. 2021, https://arxiv.org/abs/2012.09841), here at the reconstruction, averaged over images and smoothed over steps.
  The discriminator trains alone at first; then the weight rises linearly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import LossConfig
from training.io import restore_fields
from training.losses.perceptual import full_precision, unit_variance

_WIDTH = 64  # channels of a head
_BETAS = (0.0, 0.99)  # of Adam, as usual for discriminators
_HALF_LIFE_IMAGES = 2048  # of the average gradient norms
_STATE = ("first_images", "reconstruction_sum", "adversarial_sum")


class Discriminator(nn.Module):
    """A head for each feature layer: (N, C, h, w) to one logit for each position, (N, h, w).

    Args:
        channels: Of each feature layer.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(count, _WIDTH, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(_WIDTH, 1, 1, bias=False),  # both losses compare logits
            )
            for count in channels
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """See the class."""
        return [head(each)[:, 0] for head, each in zip(self.heads, features, strict=True)]


class AdversarialLoss:
    """The discriminator, its optimizer and both losses.

    Args:
        channels: For each network the channels of its feature layers.
        config: The `loss` section.
        device: Of the features.

    Attributes:
        discriminator: The same weights on every process.
        optimizer: Adam over them.
    """

    def __init__(self, channels: Sequence[Sequence[int]], config: LossConfig, device: torch.device | str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.discriminator = Discriminator([count for layers in channels for count in layers[1:]])
        if torch.device(device).type != "cpu":  # `to` cannot move what FakeTensorMode has built, even to where it is
            self.discriminator.to(device)
        self.penalty = config.discriminator_penalty
        self.parameters = list(self.discriminator.parameters())
        fused = torch.device(device).type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=config.discriminator_learning_rate, betas=_BETAS, fused=fused
        )
        self._features: list[tuple[Tensor, Tensor]] = []

    def generator_loss(self, pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
        """The decoder's term; the features are kept for `backward`.

        Args:
            pairs: For each network its features of the reconstructions and of the targets.

        Returns:
            (N,), float32, mean over positions and feature layers, with gradient to the reconstructions only.
        """
        with full_precision(pairs[0][0][0].device):
            layers = [
                (unit_variance(a.float()).movedim(-1, 1), unit_variance(b.float()).movedim(-1, 1))
                for features, targets in pairs
                for a, b in zip(features[1:], targets[1:], strict=True)
            ]
            self._features = [(a.detach(), b.detach()) for a, b in layers]
            frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            logits = [
                torch.func.functional_call(self.discriminator, frozen, (list(each),))
                for each in zip(*layers, strict=True)
            ]
            return _mean_over_layers([F.softplus(target - own) for own, target in zip(*logits, strict=True)])

    def backward(self, fraction: float) -> dict[str, Tensor]:
        """Add the gradient of the discriminator's loss to its parameters, at the features of the last `generator_loss`.

        Args:
            fraction: Of the batch of this process that these images are.

        Returns:
            `discriminator` (its loss without the penalty; log 2 at chance level) and `discriminator/penalty`, detached.
        """
        inputs = [[each.requires_grad_() for each in features] for features in zip(*self._features, strict=True)]
        with full_precision(inputs[0][0].device):
            own, target = (self.discriminator(features) for features in inputs)
            loss = _mean_over_layers([F.softplus(a - b) for a, b in zip(own, target, strict=True)]).mean()
            penalty = torch.stack([self._squared_gradient(*each) for each in zip((own, target), inputs)]).sum()
            gradients = torch.autograd.grad(fraction * (loss + self.penalty / 2 * penalty), self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._features = []
        return {"discriminator": loss.detach(), "discriminator/penalty": penalty.detach()}

    def _squared_gradient(self, logits: list[Tensor], features: list[Tensor]) -> Tensor:
        """C times the squared norm of the gradient of a logit at the C features of its position, mean over positions and
        layers: the features have a mean square of 1, so this is the gradient at their unit vector."""
        gradients = torch.autograd.grad([each.sum() for each in logits], features, create_graph=True)
        return torch.stack([len(each[0]) * each.square().sum(dim=1).mean() for each in gradients]).mean()

    def zero_grad(self) -> None:
        """Drop the gradients, and features that nothing has read."""
        self.optimizer.zero_grad(set_to_none=True)
        self._features = []

    def step(self, accelerator: Accelerator, skipped: Tensor) -> Tensor:
        """Update the discriminator by the mean gradient over the processes.

        Args:
            accelerator: The processes.
            skipped: 1 where the step of the model is skipped, a scalar on the device.

        Returns:
            1 where this step was skipped, for that reason or because its own gradient is not finite, else 0.
        """
        flat = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(flat, reduction="mean")
        norm = torch.linalg.vector_norm(flat)
        skipped = torch.maximum(skipped, 1.0 - norm.isfinite().float())
        flat = flat * (1.0 / norm.clamp_min(1.0))
        for parameter, gradient in zip(self.parameters, flat.split([each.numel() for each in self.parameters])):
            parameter.grad = gradient.view_as(parameter)
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = skipped
            self.optimizer.step()
            del self.optimizer.found_inf
        elif not skipped.item():
            self.optimizer.step()
        self.zero_grad()
        return skipped

    def tensors(self) -> dict[str, Tensor]:
        """Weights and Adam's state by name, the tensors themselves, for a checkpoint."""
        if not self.optimizer.state:
            zeros = {
                index: {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(each),
                    "exp_avg_sq": torch.zeros_like(each),
                }
                for index, each in enumerate(self.parameters)
            }
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": zeros, "param_groups": groups})
        tensors = dict(self.discriminator.named_parameters())
        for name, parameter in self.discriminator.named_parameters():
            tensors |= {f"{kind}/{name}": value for kind, value in self.optimizer.state[parameter].items()}
        return tensors


def _mean_over_layers(values: Sequence[Tensor]) -> Tensor:
    """(N, h, w) of each layer to (N,)."""
    return torch.stack([each.mean(dim=(1, 2)) for each in values]).mean(dim=0)


class AdversarialWeight:
    """The weight of the adversarial term: see the module.

    Every process observes the same values, means over the global batch, and so has the same state.

    Args:
        config: The `loss` section.
    """

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self._first_images: int | None = None  # images seen by the run before the first observation
        self._reconstruction_sum = self._adversarial_sum = 0.0

    def value(self, images_seen: int) -> float:
        """The weight after so many training images; 0 while the discriminator trains alone."""
        config, start = self._config, self._config.adversarial_start_images
        if self._first_images is None or images_seen - self._first_images < start or self._adversarial_sum <= 0:
            return 0.0
        ramp = min(1.0, (images_seen - self._first_images - start) / start) if start else 1.0
        ratio = self._reconstruction_sum / self._adversarial_sum
        return ramp * min(config.adversarial_weight * ratio, config.adversarial_max_weight)

    def observe(self, terms: Mapping[str, float], num_images: int, images_seen: int) -> None:
        """Update the averages.

        Args:
            terms: `gradient/reconstruction` and `gradient/adversarial` of `vae_loss`; others are ignored.
            num_images: Of the step.
            images_seen: Training images so far, these included.
        """
        values = terms["gradient/reconstruction"], terms["gradient/adversarial"]
        if not all(map(math.isfinite, values)):
            return
        if self._first_images is None:
            self._first_images = images_seen - num_images
        keep = 0.5 ** (num_images / _HALF_LIFE_IMAGES)
        self._reconstruction_sum = keep * self._reconstruction_sum + (1 - keep) * values[0]
        self._adversarial_sum = keep * self._adversarial_sum + (1 - keep) * values[1]

    def state_dict(self) -> dict[str, Any]:
        """The averages, as JSON values."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the averages."""
        for name, value in restore_fields(self.state_dict(), dict(state), "adversarial weight").items():
            setattr(self, f"_{name}", value)
