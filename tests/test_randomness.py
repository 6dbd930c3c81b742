"""The random numbers of a step: reproducible, independent of how the batch is split, and distributed as documented."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from training.randomness import keyed_generator, sample_crops, sample_step_noise

SEED = 11


def sample(step: int, images: int = 8, seed: int = SEED, dimensions: int = 4):
    return sample_step_noise(
        seed, step, images, latent_shape=(dimensions, 2, 2), resolution=41, crop_sizes=[32, None, 40]
    )


def test_a_step_can_be_repeated():
    first, again = sample(7), sample(7)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.affine_params, again.affine_params)
    assert all(torch.equal(first.crops[place], again.crops[place]) for place in (0, 2))


def test_a_slice_has_the_numbers_of_its_images():
    batch = sample(7)
    part = batch[2:5].to(torch.device("cpu"))
    assert torch.equal(part.noise, batch.noise[2:5]) and torch.equal(part.affine_params, batch.affine_params[2:5])
    assert torch.equal(part.crops[0], batch.crops[0][2:5]) and part.crops[1] is None


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    sample(7)
    assert torch.equal(torch.rand(1), first)


def test_other_seeds_and_steps_have_other_numbers():
    keys = [(seed, step) for seed in (0, 1, 2, 2**63) for step in (0, 1, 2, 63, 500_000)]
    values = {torch.rand(1, generator=keyed_generator(*key), dtype=torch.float64).item() for key in keys}
    assert len(values) == len(keys)


def test_noise_is_standard_normal_and_positions_are_uniform():
    batches = [sample(step, images=32, dimensions=16) for step in range(30)]
    noise = torch.cat([batch.noise for batch in batches]).flatten(1).double()  # (960, 64)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    # Neighbors are uncorrelated: correlations of 64 values are about 0 +- 1/8.
    standardized = (noise - noise.mean(dim=1, keepdim=True)) / noise.std(dim=1, keepdim=True, correction=0)
    correlation = (standardized[1:] * standardized[:-1]).mean(dim=1)
    assert abs(correlation.mean().item()) < 4 / 8 / math.sqrt(959)
    assert correlation.abs().max() < 5 / 8
    for network, count in ((0, 10), (2, 2)):
        for axis in (0, 1):
            positions = torch.cat([batch.crops[network][:, axis] for batch in batches])
            counts = torch.bincount(positions, minlength=count)
            assert len(counts) == count  # from 0 to 41 - size, both included
            assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    params = torch.cat([batch.affine_params for batch in batches])
    assert stats.kstest(params.flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [None, 40, 41])
def test_a_crop_that_is_not_smaller_than_the_image_is_the_image(size):
    assert sample_crops(4, 40, [size, 39], keyed_generator(0))[0] is None
