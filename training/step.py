"""One optimizer step: forward and backward over the micro-batches, clipping, the optimizer, the EMA weights.

Everything random is a pure function of the seed, the step and the position in the global batch (randomness.py), so a step
does not depend on how its batch is split into processes and micro-batches, and a resume needs no random state.

No step waits for the device: a gradient that is not finite is detected and skipped there, and the values of a step are read
while the next one is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from training.cast_weights import CastWeights
from training.cli import UserError
from training.data.images import normalize, random_affine
from training.distributed import AUTOCAST_DTYPES, is_out_of_memory, read_later
from training.ema import EMAWeights
from training.losses.objective import ReconstructionLoss, vae_loss
from training.randomness import sample_step_noise


@dataclass
class StepResult:
    """What is known on the host after a step.

    Attributes:
        terms: Loss terms (`vae_loss`), means over the global batch.
        flags: For each condition that `TrainStep.__call__` was given, whether any process raised it.
        beta: Weight of KL.
        grad_norm: Norm of the global batch's gradient before clipping.
        skipped: The gradient was not finite, so nothing was updated.
        halved: The micro-batch did not fit into memory, and is smaller from this step on.
    """

    terms: dict[str, float]
    flags: dict[str, bool]
    beta: float
    grad_norm: float
    skipped: bool
    halved: bool


class OutOfMemory(UserError):
    """A forward and backward pass does not fit; nothing has changed since the last step, so a checkpoint can be written."""


class TrainStep:
    """Performs optimizer steps on a prepared model and optimizer.

    Args:
        accelerator: Owns precision, processes and gradient scaling.
        model: As `accelerator.prepare` returned it; called as `model(pixels, noise=noise)`.
        optimizer: As `accelerator.prepare` returned it.
        parameters: The trained parameters.
        ema: EMA weights of `parameters`, or None.
        loss: The reconstruction terms, on the device.
        seed: Of the run.
        latent_shape: (C, h, w).
        micro_batch: Most images in one forward pass.
        adapt_micro_batch: Whether all processes halve the micro-batch and restart the step when one of them is out of
            memory. Gradients are then reduced after the last backward pass and not during it, because the processes must
            first agree that all of them got there.
        max_grad_norm: Gradients are clipped to this norm.
        augment: Apply `training.data.images.random_affine` to each image.
        compile: Compile the forward pass with the loss, once for each shape. The model itself stays eager, so other calls
            (validation, sampling) do not compile anything.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        *,
        ema: EMAWeights | None,
        loss: ReconstructionLoss,
        seed: int,
        latent_shape: tuple[int, int, int],
        micro_batch: int,
        max_grad_norm: float,
        adapt_micro_batch: bool = False,
        augment: bool = False,
        compile: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.parameters = parameters
        self.ema = ema
        self.loss = loss
        self.seed = seed
        self.latent_shape = latent_shape
        self.micro_batch = micro_batch
        self.adapt_micro_batch = adapt_micro_batch
        self.max_grad_norm = max_grad_norm
        self.augment = augment
        dtype = AUTOCAST_DTYPES[accelerator.mixed_precision]
        # A compiled step fuses the casts with what comes before and after.
        self._cast_weights = None if dtype is None or compile else CastWeights(accelerator.unwrap_model(model), dtype)
        self._forward = torch.compile(self._eager_forward, dynamic=False) if compile else self._eager_forward
        self._pending: Callable[[], StepResult] | None = None  # reads the values of the latest step

    def gradients(
        self,
        pixels_uint8: Tensor,
        *,
        step: int,
        beta: float,
        resolution: int | None = None,
        adversarial_weight: float = 0.0,
    ) -> dict[str, Tensor]:
        """Leave the gradient of the mean loss in the parameters: the global batch's, or with `adapt_micro_batch`, this
        process's.

        Args:
            pixels_uint8: This process's slice of the global batch, (N, 3, H, W), uint8; every process has N images.
            step: Optimizer steps before this one.
            beta: Weight of KL.
            resolution: Downsample the images to this size first, by averaging; a divisor of theirs.
            adversarial_weight: Weight of the adversarial term, if there is one.

        Returns:
            Means over these images of the loss terms, float32 scalars on the device.
        """
        accelerator, count = self.accelerator, len(pixels_uint8)
        factor = 1 if resolution is None else pixels_uint8.shape[-1] // resolution
        channels, *latent_size = self.latent_shape
        noise = sample_step_noise(
            self.seed,
            step,
            accelerator.num_processes * count,
            latent_shape=(channels, *(size // factor for size in latent_size)),
            resolution=pixels_uint8.shape[-1] // factor,
            crop_sizes=self.loss.crop_sizes,
        )
        first = accelerator.process_index * count
        noise = noise[first : first + count].to(accelerator.device)
        beta = torch.full((), beta, device=accelerator.device)
        means, on_cuda = torch.zeros((), device=accelerator.device), accelerator.device.type == "cuda"
        for start in range(0, count, self.micro_batch):
            images = slice(start, start + self.micro_batch)
            pixels = normalize(pixels_uint8[images].to(accelerator.device, non_blocking=on_cuda))
            micro_noise, fraction = noise[images], len(pixels) / count
            if self.augment:
                pixels = random_affine(pixels, micro_noise.affine_params)
            if factor > 1:
                pixels = F.avg_pool2d(pixels, factor)
            # DDP reduces gradients once, during the last backward pass.
            reduce_now = start + self.micro_batch >= count and not self.adapt_micro_batch
            with contextlib.nullcontext() if reduce_now else accelerator.no_sync(self.model):
                loss, parts = self._forward(pixels, micro_noise.noise, micro_noise.crops, beta, adversarial_weight)
                # `0 * loss` propagates a non-finite loss to every gradient, so all processes skip this step.
                accelerator.backward(loss * (fraction + 0.0 * loss.detach()))
            if self.loss.adversarial is not None:
                parts |= self.loss.adversarial.backward(fraction)
            means = means + torch.stack(list(parts.values())) * fraction
        return dict(zip(parts, means.unbind()))

    def _eager_forward(
        self,
        pixels: Tensor,
        noise: Tensor,
        crops: tuple[Tensor | None, ...],
        beta: Tensor,
        adversarial_weight: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass and loss of a micro-batch: see `vae_loss`."""
        with contextlib.nullcontext() if self._cast_weights is None else self._cast_weights.applied():
            output = self.model(pixels, noise=noise)
        with self.accelerator.autocast():  # for the convolutions of the feature networks; the terms are float32
            mean, logvar = output.posterior.mean, output.posterior.logvar
            return vae_loss(
                self.loss,
                output.sample,
                pixels,
                mean,
                logvar,
                beta=beta,
                crops=crops,
                adversarial_weight=adversarial_weight,
            )

    def find_micro_batch(self, local_batch: int, resolution: int) -> None:
        """Halve the micro batch until a forward and backward pass fits on every process.

        Args:
            local_batch: Images of a step on this process.
            resolution: Of the images, in pixels.

        Raises:
            OutOfMemory: Not even one image fits.
        """
        blank = torch.zeros(min(self.micro_batch, local_batch), 3, resolution, resolution, dtype=torch.uint8)
        self._fitting_gradients(blank, step=0, beta=0.0)
        self._zero_grad()

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.loss.adversarial is not None:
            self.loss.adversarial.zero_grad()

    def _fitting_gradients(self, pixels_uint8: Tensor, **settings: Any) -> dict[str, Tensor]:
        """`gradients` of the global batch, in micro-batches that fit."""
        while True:
            shortage = None
            try:
                parts = self.gradients(pixels_uint8, **settings)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                shortage = str(error)  # and not the error, whose traceback holds on to the tensors
            if not self._any_process(shortage is not None):
                if self.adapt_micro_batch:
                    self._average_gradients()
                return parts
            self._zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.micro_batch == 1:
                raise OutOfMemory(
                    "out of memory with one image in a forward pass: set training_presets.gradient_checkpointing=true or "
                    f"use a smaller model ({shortage or 'on another process'})."
                )
            if not self.adapt_micro_batch:
                raise OutOfMemory(
                    f"out of memory with {self.micro_batch} images in a forward pass: set "
                    f"training_presets.micro_batch_size={self.micro_batch // 2} (gradients stay the same), or "
                    f'"auto", which finds what fits ({shortage}).'
                )
            self.micro_batch = -(-self.micro_batch // 2)

    def _any_process(self, flag: bool) -> bool:
        """Whether any process raises the flag; with a fixed micro-batch only the own flag counts, without communication."""
        if self.accelerator.num_processes == 1 or not self.adapt_micro_batch:
            return flag
        raised = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(raised, reduction="sum").item() > 0)

    def _average_gradients(self) -> None:
        """Replace each process's gradients by their mean, in one reduction."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters]
        flat = self.accelerator.reduce(torch.cat([each.reshape(-1) for each in gradients]), reduction="mean")
        for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients])):
            gradient.copy_(mean.view(gradient.shape))

    def __call__(
        self,
        pixels_uint8: Tensor,
        *,
        beta: float,
        flags: Callable[[], dict[str, bool]] = dict,
        **settings: Any,
    ) -> StepResult | None:
        """Launch one optimizer step, and return the result of the one before.

        Args:
            pixels_uint8, beta: See `gradients`.
            flags: Returns conditions of this process, to share with the others; called after the backward pass.
            settings: The other arguments of `gradients`.

        Returns:
            The result of the step before, unless there is none or `finish` has returned it.

        Raises:
            OutOfMemory: The micro-batches do not fit, and may not or cannot be smaller.
        """
        micro_batch = self.micro_batch
        parts = self._fitting_gradients(pixels_uint8, beta=beta, **settings)
        previous = self.finish()  # before the parameters change: its EMA update reads them
        # The gradient is the mean over processes, so its norm, and every decision on it, is the same on all of them.
        grad_norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        skipped = 1.0 - grad_norm.isfinite().float()
        self._update(skipped)
        if self.loss.adversarial is not None:
            parts["discriminator/skipped"] = self.loss.adversarial.step(self.accelerator, skipped)
        self.optimizer.zero_grad(set_to_none=True)
        read = read_later(self.accelerator, {**parts, "grad_norm": grad_norm, "skipped": skipped}, flags())
        halved = self.micro_batch < micro_batch

        def result() -> StepResult:
            terms, raised = read()
            grad_norm, skipped = terms.pop("grad_norm"), terms.pop("skipped") > 0
            return StepResult(terms, raised, beta, grad_norm, skipped, halved)

        self._pending = result
        return previous

    def _update(self, skipped: Tensor) -> None:
        """Perform the optimizer's step unless `skipped` is 1."""
        optimizer = self.optimizer.optimizer
        if self.accelerator.scaler is not None:  # finds an overflow by itself, and lowers its scale
            self.optimizer.step()
        elif getattr(optimizer, "_step_supports_amp_scaling", False):  # a fused kernel, which skips by itself, too
            optimizer.found_inf = skipped
            self.optimizer.step()
            del optimizer.found_inf
        elif not skipped.item():
            self.optimizer.step()

    def finish(self) -> StepResult | None:
        """Complete the latest step: wait for its values and update the EMA weights.

        Returns:
            Its result; None if there is no step that has not been completed yet.
        """
        if self._pending is None:
            return None
        result, self._pending = self._pending(), None
        if self.ema is not None and not result.skipped:
            self.ema.step(self.parameters)
        return result
