"""One optimizer update: forward and backward over the pieces of a batch, clipping, Adam, the averaged weights.

Everything random in a step is a pure function of (seed, step, position in the global batch): the posterior's noise, the
windows of the perceptual terms, the moves of `augment`. So the mathematics of a step does not depend on how the batch is
cut into processes and pieces, and a resume needs no random state. What this file is not for: when a step happens
(trainer.py), which images it gets (data.py), which beta (kl.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.images import normalize, random_affine
from training.losses.objective import Crop, LossWeights, vae_loss
from training.losses.perceptual import PerceptualTrunk

_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring keys give unrelated seeds
_MASK = (1 << 63) - 1


def image_generator(seed: int, step: int, index: int) -> torch.Generator:
    """A CPU random generator for one image of one step.

    Args:
        seed: Of the run.
        step: Optimizer updates before this one.
        index: Position in the global batch.
    """
    mixed = 0
    for number in (seed, step, index):
        mixed = ((mixed ^ (number + 1)) * _MULTIPLIER) & ((1 << 64) - 1)
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed & _MASK)


@dataclass(frozen=True)
class StepNoise:
    """Random draws for some images of a step.

    Attributes:
        noise: Standard normal numbers (N, C, h, w), float32, on the host.
        windows: Of each window asked for, what `vae_loss` takes: corners, N integers each, and the side, pixels; None
            for the whole image.
        moves: Uniform numbers (N, 5) for `training.data.images.move`, on the host.
    """

    noise: Tensor
    crops: tuple[Crop | None, ...]
    affine_params: Tensor


def _corner(last: int, generator: torch.Generator) -> list[int]:
    """Top and left of a window, each uniform in [0, last]."""
    return torch.randint(0, last + 1, (2,), generator=generator).tolist()


def sample_step_noise(
    seed: int,
    step: int,
    indices: Sequence[int],
    latent_shape: Sequence[int],
    side: int = 0,
    crop_sizes: Sequence[int | None] = (),
) -> StepNoise:
    """Draw what images `indices` of global batch `step` need.

    Args:
        seed, step: See `image_generator`.
        indices: Positions in the global batch.
        latent_shape: (C, h, w).
        side: Of the images, pixels.
        crop_sizes: A window of each of these sides is drawn uniformly; None, or no less than `side`, is the whole
            image.
    """
    cut = [window if window is not None and window < side else None for window in crop_sizes]
    noises, corners, affine_params = [], [], []
    for index in indices:
        generator = image_generator(seed, step, index)
        ranges = [0 if window is None else side - window for window in cut]
        # What came later is drawn later, so that older runs go on with the numbers they began with.
        own = [_corner(last, generator) for last in ranges[:1]]
        noises.append(torch.randn(*latent_shape, generator=generator))
        corners.append(own + [_corner(last, generator) for last in ranges[1:]])
        affine_params.append(torch.rand(5, generator=generator))
    crops = tuple(
        None if window is None else ([own[place][0] for own in corners], [own[place][1] for own in corners], window)
        for place, window in enumerate(cut)
    )
    return StepNoise(torch.stack(noises), crops, torch.stack(affine_params))


@dataclass
class StepResult:
    """What a step leaves for the log.

    Attributes:
        parts: Means over this process's images of the loss terms (`vae_loss`), on the device.
        grad_norm: Norm of the global batch's gradient before clipping.
        skipped: The gradient was not finite, so nothing was updated.
        halved: The micro batch was too large for the memory, and is smaller from this step on.
    """

    parts: dict[str, Tensor]
    grad_norm: float
    skipped: bool
    halved: bool


class EMAWeights(EMAModel):
    """diffusers' averaged weights, updated in one pass over each tensor instead of three.

    A third of the memory traffic: the update is bound by nothing else.
    """

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move the average towards the parameters."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)


class OutOfMemory(RuntimeError):
    """A forward and backward pass does not fit; nothing was updated, so that a checkpoint of this moment is whole."""


class TrainStep:
    """Performs updates on a prepared model and optimizer.

    Args:
        accelerator: Owns precision, processes and gradient scaling.
        model: As `accelerator.prepare` returned it.
        optimizer: As `accelerator.prepare` returned it.
        parameters: The trained parameters.
        ema: Averaged weights of `parameters`, or None.
        trunk: Perceptual trunk on the device, or None if no term needs it.
        weights: Weights of the reconstruction terms.
        seed: Of the run.
        latent_shape: (C, h, w).
        micro_batch: Most images in one forward pass.
        adapt_micro_batch: Whether a process that is out of memory makes all of them halve the micro batch and begin
            the step again. Gradients are then exchanged after the last backward pass and not during it, because the
            processes must first agree that all of them got there.
        crop_px: Side of the perceptual window; None for the whole image.
        lpips_trunk, lpips_crop_px: The same for the second network of LPIPS, if there is one.
        max_grad_norm: Gradients are clipped to this norm.
        augment: Shift, turn and scale each image a little (`training.data.images.move`).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        *,
        ema: EMAWeights | None,
        trunk: PerceptualTrunk | None,
        weights: LossWeights,
        seed: int,
        latent_shape: tuple[int, int, int],
        micro_batch: int,
        crop_px: int | None,
        max_grad_norm: float,
        lpips_trunk: PerceptualTrunk | None = None,
        lpips_crop_px: int | None = None,
        adapt_micro_batch: bool = False,
        augment: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.parameters = parameters
        self.ema = ema
        self.trunk = trunk
        self.weights = weights
        self.seed = seed
        self.latent_shape = latent_shape
        self.micro_batch = micro_batch
        self.adapt_micro_batch = adapt_micro_batch
        self.lpips_trunk = lpips_trunk
        self.crop_sizes = (crop_px, lpips_crop_px)
        self._ahead: dict[tuple, StepNoise] = {}  # what the next step draws first
        self.max_grad_norm = max_grad_norm
        self.augment = augment

    def gradients(
        self, pixels_uint8: Tensor, *, step: int, beta: float, resolution: int | None = None
    ) -> dict[str, Tensor]:
        """Leave the gradient of the mean loss in the parameters: the global batch's, or with `adapt_micro_batch`, this
        process's.

        Args:
            pixels_uint8: This process's slice of the global batch, (N, 3, H, W), uint8; every process has N images.
            step: Optimizer updates before this one.
            beta: Weight of KL.
            resolution: Average the images down to this side first, a divisor of theirs.

        Returns:
            Means over these images of the loss terms, float32 scalars on the device.
        """
        device, count = self.accelerator.device, len(pixels_uint8)
        shrink = 1 if resolution is None else pixels_uint8.shape[-1] // resolution
        side = pixels_uint8.shape[-1] // shrink
        latent_shape = (self.latent_shape[0], *(size // shrink for size in self.latent_shape[1:]))
        first = self.accelerator.process_index * count
        totals: dict[str, Tensor] = {}
        for start in range(0, count, self.micro_batch):
            piece = pixels_uint8[start : start + self.micro_batch].to(device, non_blocking=True)
            indices = range(first + start, first + start + len(piece))
            draws = self._draws(step, indices, latent_shape, side)
            crop, lpips_crop = draws.crops
            is_last = start + self.micro_batch >= count
            # Processes exchange gradients once, during the last piece.
            exchange = is_last and not self.adapt_micro_batch
            sync = contextlib.nullcontext() if exchange else self.accelerator.no_sync(self.model)
            with sync:
                pixels = normalize(piece)
                if self.augment:
                    pixels = random_affine(pixels, draws.affine_params)
                if shrink > 1:
                    pixels = F.avg_pool2d(pixels, shrink)
                output = self.model(pixels, noise=self._to_device(draws.noise))
                with self.accelerator.autocast():  # for the trunk's convolutions; the terms themselves are float32
                    loss, parts = vae_loss(
                        output.sample,
                        pixels,
                        output.posterior.mean,
                        output.posterior.logvar,
                        weights=self.weights,
                        beta=beta,
                        trunk=self.trunk,
                        crop=crop,
                        lpips_trunk=self.lpips_trunk,
                        lpips_crop=lpips_crop,
                    )
                share = len(piece) / count
                # A loss that is not finite makes the gradient NaN, so that no process updates anything.
                self.accelerator.backward(loss * (share + 0.0 * loss.detach()))
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + value * share
        # While the device is still at work, and not after this step's result, when the device waits for the host.
        following = range(first, first + min(self.micro_batch, count))
        self._ahead = {(step + 1, following, latent_shape, side): self._draws(step + 1, following, latent_shape, side)}
        return totals

    def _draws(self, step: int, indices: range, latent_shape: tuple[int, ...], side: int) -> StepNoise:
        """`sample_step_noise`, unless it was drawn ahead."""
        draws = self._ahead.pop((step, indices, latent_shape, side), None)
        return draws or sample_step_noise(self.seed, step, indices, latent_shape, side, self.crop_sizes)

    def _to_device(self, numbers: Tensor) -> Tensor:
        """A copy that the host does not wait for: of memory that is not page-locked, it waits for all work before."""
        device = self.accelerator.device
        return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)

    def find_micro_batch(self, local_batch: int, side: int) -> None:
        """Halve the micro batch until a forward and backward pass fits on every process.

        Args:
            local_batch: Images of a step on this process.
            side: Of the images, pixels.

        Raises:
            OutOfMemory: Not even one image fits.
        """
        blank = torch.zeros(min(self.micro_batch, local_batch), 3, side, side, dtype=torch.uint8)
        self._fitting_gradients(blank, step=0, beta=0.0)
        self.optimizer.zero_grad(set_to_none=True)

    def _fitting_gradients(
        self, pixels_uint8: Tensor, *, step: int, beta: float, resolution: int | None = None
    ) -> dict[str, Tensor]:
        """`gradients` of the global batch, in pieces that fit."""
        while True:
            shortage = None
            try:
                parts = self.gradients(pixels_uint8, step=step, beta=beta, resolution=resolution)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
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
        """Whether any process raises the flag; asked only where processes wait for the answer."""
        if self.accelerator.num_processes == 1 or not self.adapt_micro_batch:
            return flag
        raised = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(raised, reduction="sum").item() > 0)

    def _average_gradients(self) -> None:
        """Replace each process's gradients by their mean, in one exchange."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters]
        flat = self.accelerator.reduce(torch.cat([each.reshape(-1) for each in gradients]), reduction="mean")
        for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients])):
            gradient.copy_(mean.view(gradient.shape))

    def __call__(self, pixels_uint8: Tensor, *, step: int, beta: float, resolution: int | None = None) -> StepResult:
        """Do one update.

        Args:
            pixels_uint8, step, beta, resolution: See `gradients`.

        Raises:
            OutOfMemory: The pieces do not fit, and may not or cannot be smaller.
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
