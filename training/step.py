"""One optimizer step: forward and backward over the micro-batches, clipping, the optimizer, the EMA weights.

Everything random is a pure function of the seed, the step and the position in the global batch (randomness.py), so a step
does not depend on how its batch is split into processes and micro-batches, and a resume needs no random state.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.images import normalize, random_affine
from training.distributed import is_out_of_memory
from training.ema import EMAWeights
from training.losses.objective import ReconstructionLoss, vae_loss
from training.randomness import sample_step_noise


@dataclass
class StepResult:
    """What a step leaves for the log.

    Attributes:
        parts: Means over this process's images of the loss terms (`vae_loss`), on the device.
        grad_norm: Norm of the global batch's gradient before clipping.
        skipped: The gradient was not finite, so nothing was updated.
        halved: The micro-batch did not fit into memory, and is smaller from this step on.
    """

    parts: dict[str, Tensor]
    grad_norm: float
    skipped: bool
    halved: bool


class OutOfMemory(RuntimeError):
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

    def gradients(
        self, pixels_uint8: Tensor, *, step: int, beta: float, resolution: int | None = None
    ) -> dict[str, Tensor]:
        """Leave the gradient of the mean loss in the parameters: the global batch's, or with `adapt_micro_batch`, this
        process's.

        Args:
            pixels_uint8: This process's slice of the global batch, (N, 3, H, W), uint8; every process has N images.
            step: Optimizer steps before this one.
            beta: Weight of KL.
            resolution: Downsample the images to this size first, by averaging; a divisor of theirs.

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
        means: dict[str, Tensor] = {}
        for start in range(0, count, self.micro_batch):
            images = slice(start, start + self.micro_batch)
            pixels = normalize(pixels_uint8[images].to(accelerator.device, non_blocking=True))
            micro_noise, fraction = noise[images], len(pixels) / count
            if self.augment:
                pixels = random_affine(pixels, micro_noise.affine_params)
            if factor > 1:
                pixels = F.avg_pool2d(pixels, factor)
            # DDP reduces gradients once, during the last backward pass.
            reduce_now = start + self.micro_batch >= count and not self.adapt_micro_batch
            with contextlib.nullcontext() if reduce_now else accelerator.no_sync(self.model):
                output = self.model(pixels, noise=micro_noise.noise)
                with accelerator.autocast():  # for the convolutions of the feature networks; the terms are float32
                    loss, parts = vae_loss(
                        self.loss,
                        output.sample,
                        pixels,
                        output.posterior.mean,
                        output.posterior.logvar,
                        beta=beta,
                        crops=micro_noise.crops,
                    )
                # `0 * loss` propagates a non-finite loss to every gradient, so all processes skip this step.
                accelerator.backward(loss * (fraction + 0.0 * loss.detach()))
            for name, value in parts.items():
                means[name] = means.get(name, 0.0) + value * fraction
        return means

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
        self.optimizer.zero_grad(set_to_none=True)

    def _fitting_gradients(
        self, pixels_uint8: Tensor, *, step: int, beta: float, resolution: int | None = None
    ) -> dict[str, Tensor]:
        """`gradients` of the global batch, in micro-batches that fit."""
        while True:
            shortage = None
            try:
                parts = self.gradients(pixels_uint8, step=step, beta=beta, resolution=resolution)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                shortage = str(error)  # and not the error, whose traceback holds on to the tensors
            if not self._any_process(shortage is not None):
                if self.adapt_micro_batch:
                    self._average_gradients()
                return parts
            self.optimizer.zero_grad(set_to_none=True)
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

    def __call__(self, pixels_uint8: Tensor, *, step: int, beta: float, resolution: int | None = None) -> StepResult:
        """Perform one optimizer step.

        Args:
            pixels_uint8, step, beta, resolution: See `gradients`.

        Raises:
            OutOfMemory: The micro-batches do not fit, and may not or cannot be smaller.
        """
        micro_batch = self.micro_batch
        parts = self._fitting_gradients(pixels_uint8, step=step, beta=beta, resolution=resolution)
        # The gradient is the mean over processes, so its norm, and every decision on it, is the same on all of them.
        grad_norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm))
        finite = grad_norm < float("inf")  # False for NaN
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()  # with fp16 the scaler itself skips overflowing steps and lowers its scale
        skipped = not finite or self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and not skipped:
            self.ema.step(self.parameters)
        return StepResult(parts, grad_norm, skipped, halved=self.micro_batch < micro_batch)
