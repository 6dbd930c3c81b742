"""One update: it does not depend on how its batch is cut, equals the plain formula, and refuses what is not finite."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from accelerate import Accelerator
from scipy import stats
from torch import nn

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training import step as step_module
from training.losses.objective import LossWeights
from training.losses.perceptual import PerceptualTrunk
from training.step import EMAWeights, OutOfMemory, TrainStep, image_generator, sample_step_noise

SIDE, CROP = 40, 32
LATENT = (16, 1, 1)
WEIGHTS = LossWeights(0.4, 0.2, 0.2, 0.2)
SEED = 11


@pytest.fixture(scope="module")
def trunk() -> PerceptualTrunk:
    torch.manual_seed(1)
    return PerceptualTrunk("st_alexnet", load_weights=False)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """(8, 3, 40, 40), uint8, smooth."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(8, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear").mul(255).byte()


def awake_model() -> AutoencoderKLUltra:
    """The tiny model with every parameter away from zero, so that each has a gradient."""
    torch.manual_seed(3)
    model = AutoencoderKLUltra(**tiny.SETTINGS["model"])
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def make_step(trunk, *, optimizer=torch.optim.Adam, learning_rate=1e-3, ema=False, **changes) -> TrainStep:
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = awake_model()
    parameters = list(model.parameters())
    prepared = accelerator.prepare(model, optimizer(parameters, lr=learning_rate))
    settings = {"weights": WEIGHTS, "seed": SEED, "latent_shape": LATENT, "micro_batch": 8, "crop_px": CROP}
    settings |= {"max_grad_norm": 1e9, "trunk": trunk}
    averaged = EMAWeights(parameters, decay=0.9, use_ema_warmup=True, power=0.75) if ema else None
    return TrainStep(accelerator, *prepared, parameters, ema=averaged, **(settings | changes))


def gradient(step: TrainStep, pixels: torch.Tensor, number: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The gradient of step `number` as one vector, and the loss terms."""
    parts = step.gradients(pixels, step=number, beta=0.01)
    assert all(parameter.grad is not None for parameter in step.parameters)
    return torch.cat([parameter.grad.flatten().double() for parameter in step.parameters]), parts


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("crop_px", [CROP, None])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(session, trunk, pixels, crop_px):
    def errors(**changes) -> list[float]:
        found = []
        for number in (5, 6, 7):
            whole, parts = gradient(make_step(trunk, crop_px=crop_px, **changes), pixels, number)
            for micro_batch in (3, 1):  # 3: pieces of 3, 3 and 2
                step = make_step(trunk, crop_px=crop_px, micro_batch=micro_batch, **changes)
                cut, cut_parts = gradient(step, pixels, number)
                found.append(relative(cut, whole))
                assert cut_parts.keys() == parts.keys()
                for name, value in parts.items():
                    assert cut_parts[name].item() == pytest.approx(value.item(), rel=1e-5), name
        return found

    assert max(errors(weights=LossWeights(0.4, 0.2, 0.0, 0.0))) <= 1e-6
    # Rounding can carry a unit of the trunk over the bend of its ReLU, which changes that step's gradient by more.
    with_trunk = errors()
    assert min(with_trunk) <= 1e-6 and max(with_trunk) <= 1e-4


def test_the_gradient_equals_that_of_the_plain_formula(session, trunk, pixels):
    beta, errors = 0.01, []
    for number in (5, 6, 7):
        ours, parts = gradient(make_step(trunk, micro_batch=3), pixels, number)

        model = awake_model()
        images = pixels.float() / 127.5 - 1
        draws = [image_generator(SEED, number, index) for index in range(len(images))]
        corners = [torch.randint(0, SIDE - CROP + 1, (2,), generator=draw).tolist() for draw in draws]
        noise = torch.stack([torch.randn(LATENT, generator=draw) for draw in draws])
        posterior = model.encode(images).latent_dist
        made = model.decode(posterior.mean + torch.exp(0.5 * posterior.logvar) * noise).sample
        seen, wanted = [], []
        for index, (top, left) in enumerate(corners):
            crops = (index, slice(None), slice(top, top + CROP), slice(left, left + CROP))
            seen.append(made[crops])
            wanted.append(images[crops])
        features, targets = trunk.features(torch.stack(seen)), trunk.features(torch.stack(wanted))
        kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).mean()
        terms = {
            "mse": nn.functional.mse_loss(made, images),
            "l1": nn.functional.l1_loss(made, images),
            "perceptual": trunk.feature_distance(features, targets).mean(),
            "lpips": trunk.lpips(features, targets).mean(),
        }
        loss = 0.4 * terms["mse"] + 0.2 * (terms["l1"] + terms["perceptual"] + terms["lpips"])
        (loss + beta * kl).backward()
        theirs = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])

        errors.append(relative(ours, theirs))
        for name, value in {**terms, "kl": kl, "reconstruction": loss, "total": loss + beta * kl}.items():
            assert parts[name].item() == pytest.approx(value.item(), rel=1e-4), name

    # As above: rounding can carry a unit over its bend in one of the steps, and not in all.
    assert min(errors) <= 1e-6 and max(errors) <= 1e-4, errors


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_what_the_next_step_draws_is_drawn_before_this_ones_result_is_read(
    session, trunk, pixels, micro_batch, monkeypatch
):
    drawn = []

    def recorded(seed, step, indices, *rest):
        drawn.append((step, indices))
        return sample_step_noise(seed, step, indices, *rest)

    step = make_step(trunk, micro_batch=micro_batch)
    monkeypatch.setattr(step_module, "sample_step_noise", recorded)
    micro_batches = [range(start, min(start + micro_batch, 8)) for start in range(0, 8, micro_batch)]
    gradient(step, pixels, number=5)
    assert drawn == [*((5, piece) for piece in micro_batches), (6, micro_batches[0])]
    drawn.clear()
    step.optimizer.zero_grad()
    found, _ = gradient(step, pixels, number=6)
    assert drawn == [*((6, piece) for piece in micro_batches[1:]), (7, micro_batches[0])]
    drawn.clear()
    step.optimizer.zero_grad()
    gradient(step, pixels[:2], number=2)  # back, and with fewer images
    assert drawn == [(2, range(2)), (3, range(2))]
    alone, _ = gradient(make_step(trunk, micro_batch=micro_batch), pixels, number=6)
    assert torch.equal(found, alone)


@pytest.mark.parametrize("beta", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(session, trunk, pixels, beta):
    step = make_step(trunk, ema=True)
    step(pixels[:2], step=0, beta=0.01)  # so that optimizer and averages have a state

    def state() -> list[torch.Tensor]:
        moments = [value for entry in step.optimizer.state_dict()["state"].values() for value in entry.values()]
        tensors = [*step.parameters, *step.ema.shadow_params, *map(torch.as_tensor, moments)]
        return [tensor.detach().clone() for tensor in tensors]

    before, count = state(), step.ema.optimization_step
    result = step(pixels[:2], step=1, beta=beta)
    assert result.skipped
    assert not math.isfinite(result.grad_norm)
    assert all(torch.equal(old, new) for old, new in zip(before, state(), strict=True))
    assert step.ema.optimization_step == count
    assert all(parameter.grad is None for parameter in step.parameters)

    result = step(pixels[:2], step=2, beta=0.01)  # and the next good one counts
    assert not result.skipped and math.isfinite(result.grad_norm)
    assert not any(torch.equal(old, new) for old, new in zip(before, state(), strict=True))


@pytest.mark.parametrize("fraction", [0.5, 2.0])
def test_clipping(session, trunk, pixels, fraction):
    whole, _ = gradient(make_step(trunk), pixels[:2], number=0)
    norm = whole.norm().item()
    step = make_step(trunk, optimizer=torch.optim.SGD, learning_rate=1.0, max_grad_norm=fraction * norm)
    before = torch.cat([parameter.detach().flatten().double() for parameter in step.parameters])
    result = step(pixels[:2], step=0, beta=0.01)
    after = torch.cat([parameter.detach().flatten().double() for parameter in step.parameters])
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)  # as it was before
    assert relative(before - after, whole * min(1.0, fraction)) < 1e-4


def test_the_averaged_weights_follow_the_documented_law(session, trunk, pixels):
    step = make_step(trunk, ema=True, learning_rate=1e-2)
    average = None
    for number in range(4):
        step(pixels[:1], step=number, beta=0.01)
        now = torch.cat([parameter.detach().flatten().double() for parameter in step.parameters])
        # decay = 1 - (1 + step)^-0.75, at most 0.9; the first update takes the weights as they are.
        decay = min(0.9, 1 - (1 + number) ** -0.75)
        average = now if average is None else decay * average + (1 - decay) * now
    shadow = torch.cat([parameter.flatten().double() for parameter in step.ema.shadow_params])
    assert relative(shadow, average) < 1e-6
    assert relative(shadow, now) > 1e-4


def test_without_perceptual_terms_no_trunk_is_needed(session, pixels):
    step = make_step(None, weights=LossWeights(1.0, 0.0, 0.0, 0.0), crop_px=None)
    _, parts = gradient(step, pixels[:2])
    assert "lpips" not in parts
    assert parts["reconstruction"] == parts["mse"]


def test_lpips_reads_a_second_network(session, trunk, pixels):
    seen = []
    torch.manual_seed(2)
    other = PerceptualTrunk("st_vgg16", load_weights=False)
    handles = [
        network.layers[0].register_forward_hook(lambda _, x, __, name=name: seen.append((name, x[0].shape[-1])))
        for name, network in (("first", trunk), ("second", other))
    ]
    whole, _ = gradient(make_step(trunk, lpips_trunk=other, lpips_crop_px=36), pixels)
    assert seen == [("first", CROP)] * 2 + [("second", 36)] * 2
    for handle in handles:
        handle.remove()
    errors = []
    for number in (5, 6, 7):
        both = [make_step(trunk, lpips_trunk=other, lpips_crop_px=36, micro_batch=size) for size in (8, 3)]
        errors.append(relative(*(gradient(step, pixels, number)[0] for step in both)))
    assert min(errors) <= 1e-6 and max(errors) <= 1e-4, errors  # the bend of a ReLU, as above
    assert relative(gradient(make_step(trunk), pixels)[0], whole) > 1e-3


def test_moved_images_do_not_depend_on_how_the_batch_is_cut(session, trunk, pixels):
    still, _ = gradient(make_step(trunk), pixels)
    whole, _ = gradient(make_step(trunk, augment=True), pixels)
    cut, _ = gradient(make_step(trunk, augment=True, micro_batch=3), pixels)
    assert relative(cut, whole) < 1e-5
    assert relative(still, whole) > 1e-3


# ---- the random draws ----


def test_draws_depend_on_the_place_in_the_global_batch_only():
    whole = sample_step_noise(SEED, 7, range(8), (4, 2, 2), 41, [32, 40])
    for cuts in ([range(3), range(3, 8)], [[index] for index in range(8)]):
        parts = [sample_step_noise(SEED, 7, indices, (4, 2, 2), 41, [32, 40]) for indices in cuts]
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
        for place in (0, 1):
            for corner in (0, 1):
                drawn = [number for part in parts for number in part.crops[place][corner]]
                assert drawn == whole.crops[place][corner]


def test_draws_leave_torchs_own_generator_alone():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    sample_step_noise(SEED, 7, range(3), (4, 2, 2), 41, [32])
    assert torch.equal(torch.rand(1), first)


def test_other_seeds_steps_and_images_draw_other_numbers():
    keys = [(seed, step, index) for seed in (0, 1, 2) for step in (0, 1, 2, 500_000) for index in (0, 1, 2, 63)]
    draws = {torch.rand(1, generator=image_generator(*key), dtype=torch.float64).item() for key in keys}
    assert len(draws) == len(keys)


def test_the_noise_is_standard_normal_and_the_windows_uniform():
    draws = [sample_step_noise(SEED, step, range(32), (64, 1, 1), 40, [32, 32]) for step in range(30)]
    noise = torch.cat([draw.noise for draw in draws]).flatten(1).double()  # (960, 64)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    # Neighbours have nothing in common: correlations of 64 numbers are about 0 +- 1/8.
    unit = (noise - noise.mean(dim=1, keepdim=True)) / noise.std(dim=1, keepdim=True, correction=0)
    correlation = (unit[1:] * unit[:-1]).mean(dim=1)
    assert abs(correlation.mean().item()) < 4 / 8 / math.sqrt(959)
    assert correlation.abs().max() < 5 / 8
    for window, corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        places = [place for draw in draws for place in draw.crops[window][corner]]
        counts = torch.bincount(torch.tensor(places), minlength=9)
        assert len(counts) == 9  # 0 to 8, both ends included
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_a_window_no_smaller_than_the_image_is_the_image():
    draw = sample_step_noise(SEED, 0, range(4), LATENT, 40, [None, 40, 41, 39])
    assert draw.crops[:3] == (None, None, None) and draw.crops[3][2] == 39


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_updates_nothing_though_its_gradient_is(session, trunk, pixels, monkeypatch, value):
    step = make_step(trunk)
    real = step_module.vae_loss

    def shifted(*args, **kwargs):
        loss, parts = real(*args, **kwargs)
        return loss + value, parts

    monkeypatch.setattr(step_module, "vae_loss", shifted)
    before = [parameter.detach().clone() for parameter in step.parameters]
    assert step(pixels, step=0, beta=0.01).skipped
    assert all(torch.equal(old, new) for old, new in zip(before, step.parameters, strict=True))


# ---- out of memory ----


def short_of_memory(step: TrainStep, fits: int) -> list[int]:
    """Make forward passes of more than `fits` images fail as the allocator does; returns the sizes tried."""
    tried, forward = [], step.model.forward

    def limited(pixels, **kwargs):
        tried.append(len(pixels))
        if len(pixels) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(pixels, **kwargs)

    step.model.forward = limited
    return tried


def test_out_of_memory_halves_the_pieces_and_changes_nothing_else(session, trunk, pixels):
    step = make_step(trunk, micro_batch=8, adapt_micro_batch=True)
    tried = short_of_memory(step, fits=3)
    reference = make_step(trunk, micro_batch=2)
    for number in (0, 1):
        result = step(pixels, step=number, beta=0.01)
        wanted = reference(pixels, step=number, beta=0.01)
        assert (result.halved, result.skipped, wanted.halved) == (number == 0, False, False)
        assert result.grad_norm == wanted.grad_norm
        assert all(torch.equal(value, wanted.parts[name]) for name, value in result.parts.items())
    assert tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert all(torch.equal(one, other) for one, other in zip(step.parameters, reference.parameters, strict=True))


def test_out_of_memory_in_the_last_piece_begins_the_step_again(session, trunk, pixels):
    step = make_step(trunk, micro_batch=4, adapt_micro_batch=True)
    calls, backward = [], step.accelerator.backward

    def failing(loss):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        backward(loss)

    step.accelerator.backward = failing
    result = step(pixels, step=0, beta=0.01)
    wanted = make_step(trunk, micro_batch=2)(pixels, step=0, beta=0.01)
    assert (step.micro_batch, result.halved, result.grad_norm) == (2, True, wanted.grad_norm)


@pytest.mark.parametrize(
    ("settings", "fits", "remedy"),
    [
        ({"micro_batch": 8}, 3, 'out of memory with 8 images in a forward pass: set .*micro_batch_size=4 .* or "auto"'),
        (
            {"micro_batch": 8, "adapt_micro_batch": True},
            0,
            "out of memory with one image .*gradient_checkpointing=true",
        ),
    ],
)
def test_out_of_memory_that_cannot_be_helped_updates_nothing_and_says_what_to_set(
    session, trunk, pixels, settings, fits, remedy
):
    step = make_step(trunk, **settings)
    before = [parameter.detach().clone() for parameter in step.parameters]
    short_of_memory(step, fits)
    with pytest.raises(OutOfMemory, match=remedy):
        step(pixels, step=0, beta=0.01)
    assert all(torch.equal(old, new) for old, new in zip(before, step.parameters, strict=True))
    assert all(parameter.grad is None for parameter in step.parameters)


def test_other_errors_are_not_taken_for_a_lack_of_memory(session, trunk, pixels):
    step = make_step(trunk, micro_batch=8, adapt_micro_batch=True)
    step.model.forward = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        step(pixels, step=0, beta=0.01)


def test_the_micro_batch_is_found_before_training(session, trunk):
    step = make_step(trunk, micro_batch=8, adapt_micro_batch=True)
    tried = short_of_memory(step, fits=5)
    before = [parameter.detach().clone() for parameter in step.parameters]
    step.find_micro_batch(8, SIDE)
    assert (step.micro_batch, tried) == (4, [8, 4, 4])
    assert all(parameter.grad is None for parameter in step.parameters)
    assert all(torch.equal(old, new) for old, new in zip(before, step.parameters, strict=True))


def test_a_lower_resolution_is_training_on_averaged_images(session, trunk):
    settings = {"sample_size": 64, "latent_layout": "spatial", "latent_channels": 4, "latent_size": 8, "patch_size": 4}
    model = AutoencoderKLUltra(**tiny.SETTINGS["model"] | settings | {"latent_dim": 256, "pca_size": None})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    parameters = list(model.parameters())
    step = TrainStep(
        accelerator,
        *accelerator.prepare(model, torch.optim.Adam(parameters)),
        parameters,
        ema=None,
        trunk=trunk,
        weights=WEIGHTS,
        seed=SEED,
        latent_shape=(4, 8, 8),
        micro_batch=2,
        crop_px=32,
        max_grad_norm=1.0,
    )
    # Blocks of four equal pixels, so that averaging is exact in bytes too.
    small = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    found, parts = step.gradients(large, step=1, beta=0.01, resolution=32), None
    lowered = torch.cat([parameter.grad.flatten() for parameter in parameters])
    step.optimizer.zero_grad()
    step.latent_shape = (4, 4, 4)
    parts = step.gradients(small, step=1, beta=0.01)
    assert relative(lowered, torch.cat([parameter.grad.flatten() for parameter in parameters])) < 1e-5
    assert found.keys() == parts.keys()
    for name, value in parts.items():
        torch.testing.assert_close(found[name], value, msg=name)
