"""Random numbers of a training step, as a pure function of the seed, the step and the position in the global batch.

One generator per step samples for the global batch, and each process takes its slice, as the training loop of EDM2 does
(Karras et al. 2024). So a step does not depend on how the batch is split into processes and micro-batches, and a
checkpoint needs no random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by a hash of non-negative integers, such as a seed and a step."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed))


@dataclass(frozen=True)
class StepNoise:
    """Random numbers for the N images of a batch or of a slice of it.

    Attributes:
        noise: Of the posterior, standard normal, (N, C, h, w), float32.
        crops: For each feature network of the loss, top and left of each random crop in pixels, (N, 2), int64; None
            where the network reads the full image.
        affine_params: For `training.data.images.random_affine`, uniform in [0, 1), (N, 5), float32.
    """

    noise: Tensor
    crops: tuple[Tensor | None, ...]
    affine_params: Tensor

    def __getitem__(self, images: slice) -> StepNoise:
        """The noise of some of the images."""
        return StepNoise(self.noise[images], take_crops(self.crops, images), self.affine_params[images])

    def to(self, device: torch.device) -> StepNoise:
        """Copy to a device; to CUDA from page-locked memory, so that the host does not wait."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or device.type == "cpu":
                return tensor
            # Elsewhere (MPS) a copy that does not wait would read memory that is free again.
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        return StepNoise(move(self.noise), tuple(move(crop) for crop in self.crops), move(self.affine_params))


def take_crops(crops: Sequence[Tensor | None], images: slice | list[int]) -> tuple[Tensor | None, ...]:
    """The crop positions of some of the images."""
    return tuple(None if positions is None else positions[images] for positions in crops)


def sample_crops(
    num_images: int, resolution: int, crop_sizes: Sequence[int | None], generator: torch.Generator
) -> tuple[Tensor | None, ...]:
    """Sample uniform positions of random crops.

    Args:
        num_images: N.
        resolution: Height and width of the images, in pixels.
        crop_sizes: Height and width of each network's crops, in pixels; None, or at least `resolution`, is the full
            image.
        generator: On the CPU.

    Returns:
        For each network top and left of each crop, (N, 2), int64, or None for the full image.
    """
    return tuple(
        torch.randint(0, resolution - size + 1, (num_images, 2), generator=generator)
        if size is not None and size < resolution
        else None
        for size in crop_sizes
    )


def sample_step_noise(
    seed: int,
    step: int,
    global_batch: int,
    *,
    latent_shape: Sequence[int],
    resolution: int,
    crop_sizes: Sequence[int | None] = (),
) -> StepNoise:
    """Sample all random numbers of one step, on the host.

    Args:
        seed: Of the run.
        step: Optimizer steps before this one.
        global_batch: Images of the step, over all processes.
        latent_shape: (C, h, w) of one image.
        resolution, crop_sizes: See `sample_crops`.
    """
    generator = keyed_generator(seed, step)
    crops = sample_crops(global_batch, resolution, crop_sizes, generator)
    noise = torch.randn(global_batch, *latent_shape, generator=generator)
    return StepNoise(noise, crops, torch.rand(global_batch, 5, generator=generator))
