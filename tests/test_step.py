"""An optimizer step: independent of how its batch is split, equal to the plain formula, skipped if not finite."""

from __future__ import annotations

import math
from functools import partial

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training import cast_weights
from training import step as step_module
from training.ema import EMAWeights
from training.losses.objective import ReconstructionLoss, kl_per_dimension
from training.losses.perceptual import PerceptualTrunk
from training.muon import Muon
from training.randomness import sample_step_noise
from training.step import OutOfMemory, StepResult, TrainStep

RESOLUTION, CROP = 40, 32
LATENT = (16, 1, 1)
SEED = 11


@pytest.fixture(scope="module")
def loss() -> ReconstructionLoss:
    return make_loss()


def make_loss(crop: int | None = CROP) -> ReconstructionLoss:
    torch.manual_seed(1)
    return ReconstructionLoss([PerceptualTrunk("st_alexnet", load_weights=False)], [crop])


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """(8, 3, 40, 40), uint8, smooth."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(8, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(RESOLUTION, RESOLUTION), mode="bilinear").mul(255).byte()


def model_without_zeros() -> AutoencoderKLUltra:
    """The tiny model with every parameter away from zero, so that each has a gradient."""
    torch.manual_seed(3)
    model = AutoencoderKLUltra(**tiny.SETTINGS["model"])
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def make_step(
    loss, *, optimizer=torch.optim.Adam, learning_rate=1e-3, ema=False, precision="no", **changes
) -> TrainStep:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = model_without_zeros()
    parameters = list(model.parameters())
    prepared = accelerator.prepare(model, optimizer(parameters, lr=learning_rate))
    settings = {"loss": loss, "seed": SEED, "latent_shape": LATENT, "micro_batch": 8, "max_grad_norm": 1e9}
    ema_weights = EMAWeights(parameters, decay=0.9, use_ema_warmup=True, power=0.75) if ema else None
    return TrainStep(accelerator, *prepared, parameters, ema=ema_weights, **(settings | changes))


def muon(parameters: list[nn.Parameter], lr: float) -> Muon:
    """Muon for the convolutions, with the fused kernel of AdamW for the rest."""
    groups = [
        {"params": [p for p in parameters if (p.ndim == 4) == each], "muon": each, "lr": lr} for each in (True, False)
    ]
    return Muon(groups, betas=(0.9, 0.999), weight_decay=0.1, fused=True)


def complete(train_step: TrainStep, pixels: torch.Tensor, **settings) -> StepResult:
    """One step and its result."""
    assert train_step(pixels, **settings) is None
    return train_step.finish()


def gradient(step: TrainStep, pixels: torch.Tensor, number: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The gradient of step `number` as one vector, and the loss terms."""
    parts = step.gradients(pixels, step=number, beta=0.01)
    assert all(parameter.grad is not None for parameter in step.parameters)
    return torch.cat([parameter.grad.flatten().double() for parameter in step.parameters]), parts


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("crop", [CROP, None])
def test_the_gradient_does_not_depend_on_the_micro_batch(session, pixels, crop):
    def errors(loss: ReconstructionLoss) -> list[float]:
        found = []
        for number in (5, 6, 7):
            full, parts = gradient(make_step(loss), pixels, number)
            for micro_batch in (3, 1):  # 3: micro-batches of 3, 3 and 2
                split, split_parts = gradient(make_step(loss, micro_batch=micro_batch), pixels, number)
                found.append(relative(split, full))
                assert split_parts.keys() == parts.keys()
                for name, value in parts.items():
                    assert split_parts[name].item() == pytest.approx(value.item(), rel=1e-5), name
        return found

    assert max(errors(ReconstructionLoss(perceptual=0, lpips=0))) <= 1e-6
    # Rounding can carry an activation of the network across the kink of its ReLU, which changes that step's gradient.
    with_network = errors(make_loss(crop))
    assert min(with_network) <= 1e-6 and max(with_network) <= 1e-4


def test_the_gradient_does_not_depend_on_the_number_of_processes(session, loss, pixels):
    full, _ = gradient(make_step(loss), pixels)
    halves = []
    for rank in (0, 1):
        step = make_step(loss)
        step.accelerator = OneOfTwo(step.accelerator, rank)
        halves.append(gradient(step, pixels[4 * rank : 4 * rank + 4])[0])
    assert relative((halves[0] + halves[1]) / 2, full) <= 1e-4


class OneOfTwo:
    """An accelerator that takes its process for one of two."""

    num_processes = 2

    def __init__(self, accelerator: Accelerator, rank: int) -> None:
        self._accelerator, self.process_index = accelerator, rank

    def __getattr__(self, name: str):
        return getattr(self._accelerator, name)


def test_the_gradient_equals_that_of_the_plain_formula(session, loss, pixels):
    beta, errors = 0.01, []
    (network,) = loss.networks
    for number in (5, 6, 7):
        ours, parts = gradient(make_step(loss, micro_batch=3), pixels, number)

        model = model_without_zeros()
        images = pixels.float() / 127.5 - 1
        sampled = sample_step_noise(SEED, number, 8, latent_shape=LATENT, resolution=RESOLUTION, crop_sizes=[CROP])
        posterior = model.encode(images).latent_dist
        latents = posterior.mean + torch.exp(0.5 * posterior.logvar) * sampled.noise
        reconstruction = model.decode(latents).sample
        crops, target_crops = [], []
        for index, (top, left) in enumerate(sampled.crops[0].tolist()):
            place = (index, slice(None), slice(top, top + CROP), slice(left, left + CROP))
            crops.append(reconstruction[place])
            target_crops.append(images[place])
        perceptual, lpips = network.distances(
            network.features(torch.stack(crops)), network.features(torch.stack(target_crops))
        )
        kl = kl_per_dimension(posterior.mean, posterior.logvar).mean()
        terms = {
            "mse": nn.functional.mse_loss(reconstruction, images),
            "l1": nn.functional.l1_loss(reconstruction, images),
            "perceptual": perceptual.mean(),
            "lpips": lpips.mean(),
        }
        total = 0.4 * terms["mse"] + 0.2 * (terms["l1"] + terms["perceptual"] + terms["lpips"])
        (total + beta * kl).backward()
        theirs = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])

        errors.append(relative(ours, theirs))
        for name, value in {**terms, "kl": kl, "reconstruction": total, "total": total + beta * kl}.items():
            assert parts[name].item() == pytest.approx(value.item(), rel=1e-4), name

    # As above: rounding can carry an activation across its kink in one of the steps, and not in all.
    assert min(errors) <= 1e-6 and max(errors) <= 1e-4, errors


@pytest.mark.parametrize("beta", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.AdamW, fused=True), muon])
def test_a_gradient_that_is_not_finite_changes_nothing(session, loss, pixels, beta, optimizer):
    step = make_step(loss, ema=True, optimizer=optimizer)
    complete(step, pixels[:2], step=0, beta=0.01)  # so that optimizer and EMA weights have a state

    def state() -> list[torch.Tensor]:
        optimizer_state = [value for entry in step.optimizer.state_dict()["state"].values() for value in entry.values()]
        tensors = [*step.parameters, *step.ema.shadow_params, *map(torch.as_tensor, optimizer_state)]
        return [tensor.detach().clone() for tensor in tensors]

    before, count = state(), step.ema.optimization_step
    result = complete(step, pixels[:2], step=1, beta=beta)
    assert result.skipped
    assert not math.isfinite(result.grad_norm)
    assert all(torch.equal(old, new) for old, new in zip(before, state(), strict=True))
    assert step.ema.optimization_step == count
    assert all(parameter.grad is None for parameter in step.parameters)

    result = complete(step, pixels[:2], step=2, beta=0.01)  # the next finite step counts
    assert not result.skipped and math.isfinite(result.grad_norm)
    assert not any(torch.equal(old, new) for old, new in zip(before, state(), strict=True))


@pytest.mark.parametrize("fraction", [0.5, 2.0])
def test_clipping(session, loss, pixels, fraction):
    unclipped, _ = gradient(make_step(loss), pixels[:2], number=0)
    norm = unclipped.norm().item()
    step = make_step(loss, optimizer=torch.optim.SGD, learning_rate=1.0, max_grad_norm=fraction * norm)
    before = torch.cat([parameter.detach().flatten().double() for parameter in step.parameters])
    result = complete(step, pixels[:2], step=0, beta=0.01)
    after = torch.cat([parameter.detach().flatten().double() for parameter in step.parameters])
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)  # as it was before
    assert relative(before - after, unclipped * min(1.0, fraction)) < 1e-4


def test_ema_weights_follow_the_documented_decay(session, loss, pixels):
    step = make_step(loss, ema=True, learning_rate=1e-2)
    average = None
    for number in range(4):
        complete(step, pixels[:1], step=number, beta=0.01)
        now = torch.cat([parameter.detach().flatten().double() for parameter in step.parameters])
        # decay = 1 - (1 + step)^-0.75, at most 0.9; the first step copies the weights.
        decay = min(0.9, 1 - (1 + number) ** -0.75)
        average = now if average is None else decay * average + (1 - decay) * now
    shadow = torch.cat([parameter.flatten().double() for parameter in step.ema.shadow_params])
    assert relative(shadow, average) < 1e-6
    assert relative(shadow, now) > 1e-4


def test_without_perceptual_terms_no_network_is_needed(session, pixels):
    step = make_step(ReconstructionLoss(mse=1, l1=0, perceptual=0, lpips=0))
    _, parts = gradient(step, pixels[:2])
    assert "lpips" not in parts
    assert parts["reconstruction"] == parts["mse"]


def test_lpips_reads_a_second_network(session, loss, pixels):
    (network,) = loss.networks
    torch.manual_seed(2)
    other = PerceptualTrunk("st_vgg16", load_weights=False)
    both = ReconstructionLoss([network, other], [CROP, 36])
    sizes = []
    handles = [
        each.layers[0].register_forward_hook(lambda _, x, __, name=name: sizes.append((name, x[0].shape[-1])))
        for name, each in (("first", network), ("second", other))
    ]
    full, _ = gradient(make_step(both), pixels)
    assert sizes == [("first", CROP)] * 2 + [("second", 36)] * 2
    for handle in handles:
        handle.remove()
    errors = []
    for number in (5, 6, 7):
        steps = [make_step(both, micro_batch=size) for size in (8, 3)]
        errors.append(relative(*(gradient(step, pixels, number)[0] for step in steps)))
    assert min(errors) <= 1e-6 and max(errors) <= 1e-4, errors  # the kink of a ReLU, as above
    assert relative(gradient(make_step(loss), pixels)[0], full) > 1e-3


def test_augmented_images_do_not_depend_on_the_micro_batch(session, pixels):
    loss = ReconstructionLoss(perceptual=0, lpips=0)
    plain, _ = gradient(make_step(loss), pixels)
    full, _ = gradient(make_step(loss, augment=True), pixels)
    split, _ = gradient(make_step(loss, augment=True, micro_batch=3), pixels)
    assert relative(split, full) < 1e-6
    assert relative(plain, full) > 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_even_if_its_gradient_is_finite(
    session, loss, pixels, monkeypatch, value
):
    step = make_step(loss)
    real = step_module.vae_loss

    def shifted(*args, **kwargs):
        total, parts = real(*args, **kwargs)
        return total + value, parts

    monkeypatch.setattr(step_module, "vae_loss", shifted)
    before = [parameter.detach().clone() for parameter in step.parameters]
    assert complete(step, pixels, step=0, beta=0.01).skipped
    assert all(torch.equal(old, new) for old, new in zip(before, step.parameters, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_cast_in_groups_give_the_gradients_of_autocast_and_are_put_back(
    session, loss, pixels, monkeypatch, checkpointing
):
    own, autocast = make_step(loss, precision="bf16"), make_step(loss, precision="bf16")
    if checkpointing:
        own.model.enable_gradient_checkpointing(), autocast.model.enable_gradient_checkpointing()
    autocast._cast_weights = None
    monkeypatch.setattr(cast_weights, "_GROUP_BYTES", 4000)  # several groups of the tiny model
    own._cast_weights = cast_weights.CastWeights(own.model, torch.bfloat16)
    assert len(own._cast_weights._groups) > 3
    before = dict(own.model.named_parameters())
    gradients = []
    for step in (own, autocast):
        step.gradients(pixels, step=5, beta=0.01)
        gradients.append([parameter.grad for parameter in step.parameters])
    assert all(gradient.any() for gradient in gradients[0])
    assert all(map(torch.equal, *gradients))
    after = dict(own.model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is parameter for name, parameter in before.items())


def test_gradients_of_weights_cast_in_groups_are_ready_during_the_backward_pass(monkeypatch):
    """So DDP exchanges them meanwhile. Each group is cast when its first layer runs."""
    monkeypatch.setattr(cast_weights, "_GROUP_BYTES", 1000)
    model, order = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4))), []
    for index, layer in enumerate(model):
        layer.weight.register_post_accumulate_grad_hook(lambda _, index=index: order.append(f"weight {index}"))
    groups, x = cast_weights.CastWeights(model, torch.bfloat16), torch.randn(2, 16).bfloat16().requires_grad_()
    with groups.applied():
        assert model[0].weight.dtype == torch.float32  # not yet
        for index, layer in enumerate(model):
            x = layer(x)
            x.register_hook(lambda _, index=index: order.append(f"output {index}"))
    x.float().sum().backward()
    assert len(groups._groups) == 4
    assert order == [f"{what} {index}" for index in (3, 2, 1, 0) for what in ("output", "weight")]
    assert not any(layer._forward_pre_hooks for layer in model)


def test_a_step_returns_the_result_of_the_one_before(session, loss, pixels):
    """Late results and EMA updates are those of steps that are completed one by one."""
    late, at_once = (make_step(loss, ema=True, optimizer=partial(torch.optim.Adam, fused=True)) for _ in range(2))
    betas = [0.01, 0.02, math.nan, 0.04]
    wanted = [complete(at_once, pixels[:2], step=step, beta=beta) for step, beta in enumerate(betas)]
    flags = [{"stop": False, "save": step == 1} for step in range(4)]
    results = [
        late(pixels[:2], step=step, beta=beta, flags=lambda: flags[step])  # noqa: B023
        for step, beta in enumerate(betas)
    ]
    results = [*results[1:], late.finish()]
    assert late.finish() is None
    for result, other, flag in zip(results, wanted, flags, strict=True):
        assert result.flags == flag
        assert (result.skipped, math.isnan(result.beta)) == (other.skipped, other.skipped)
        if not result.skipped:
            assert (result.terms, result.grad_norm, result.beta) == (other.terms, other.grad_norm, other.beta)
    assert [result.skipped for result in results] == [False, False, True, False]
    assert late.ema.optimization_step == at_once.ema.optimization_step == 3
    for one, other in ((late.parameters, at_once.parameters), (late.ema.shadow_params, at_once.ema.shadow_params)):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("optimizer", [partial(torch.optim.Adam, fused=True), muon])
def test_float16_overflow_skips_the_step_and_lowers_the_scale(session, loss, pixels, monkeypatch, optimizer):
    """With a GradScaler, whose scale is part of a checkpoint; clipping sees gradients without the scale."""
    plain = complete(make_step(loss), pixels[:2], step=0, beta=0.01)
    step = make_step(loss, ema=True, optimizer=optimizer)
    accelerator = step.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step.optimizer = AcceleratedOptimizer(step.optimizer.optimizer, scaler=accelerator.scaler)
    accelerator.native_amp = True  # as on CUDA
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    scaled = complete(step, pixels[:2], step=0, beta=0.01)
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-3) and not scaled.skipped
    before = [parameter.detach().clone() for parameter in step.parameters]
    accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | {"scale": 2.0**127})  # the loss becomes inf
    result = complete(step, pixels[:2], step=1, beta=0.01)
    assert result.skipped and accelerator.scaler.get_scale() == 2.0**126
    assert all(map(torch.equal, before, step.parameters)) and step.ema.optimization_step == 1


@inductor_config.patch({"cpp.simdlen": 1})  # compiles faster
@pytest.mark.parametrize(
    ("backend", "resolutions"),
    [("aot_eager", [8, 8, None, None, 8]), pytest.param("inductor", [None, None], marks=pytest.mark.slow)],
)
def test_a_compiled_step_equals_the_eager_one_and_only_a_new_resolution_compiles_again(
    session, monkeypatch, backend, resolutions
):
    """As graphs of the backward pass too; the default backend, inductor, compiles C++ besides."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    settings = {"sample_size": 16, "latent_layout": "spatial", "latent_channels": 4, "latent_size": 4, "latent_dim": 64}
    settings |= {f"{part}_block_out_channels": [8] for part in ("encoder", "decoder")}
    settings |= {f"{part}_layers_per_block": [1] for part in ("encoder", "decoder")}
    loss = ReconstructionLoss(perceptual=0, lpips=0)
    steps = []
    for compiled in (False, True):
        torch.manual_seed(5)
        model = AutoencoderKLUltra(**settings, patch_size=4, pca_size=None).to(memory_format=torch.channels_last)
        accelerator, parameters = Accelerator(cpu=True), list(model.parameters())
        prepared = accelerator.prepare(model, torch.optim.Adam(parameters, fused=True))
        more = {
            "ema": None,
            "loss": loss,
            "seed": SEED,
            "latent_shape": (4, 4, 4),
            "micro_batch": 4,
            "max_grad_norm": 1,
        }
        steps.append(TrainStep(accelerator, *prepared, parameters, **more, compile=compiled))
    counters.clear()
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    for number, resolution in enumerate(resolutions):
        eager, traced = (
            complete(step, pixels, step=number, beta=0.01 + number, resolution=resolution) for step in steps
        )
        assert traced.grad_norm == pytest.approx(eager.grad_norm, rel=1e-4)
        assert traced.terms == pytest.approx(eager.terms, rel=1e-4)
        with torch.no_grad():  # as a validation: another batch, another resolution, a changed configuration
            steps[1].model(torch.zeros(3, 3, 32, 32))
        steps[1].model.register_to_config(scaling_factor=2.0 + number)
    assert counters["stats"]["unique_graphs"] == len(set(resolutions)) and not counters["graph_break"]


# ---- out of memory ----


def limit_memory(step: TrainStep, fits: int) -> list[int]:
    """Make forward passes of more than `fits` images fail as the allocator does; returns the sizes tried."""
    tried, forward = [], step.model.forward

    def limited(pixels, **kwargs):
        tried.append(len(pixels))
        if len(pixels) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(pixels, **kwargs)

    step.model.forward = limited
    return tried


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(session, loss, pixels):
    step = make_step(loss, micro_batch=8, adapt_micro_batch=True)
    tried = limit_memory(step, fits=3)
    reference = make_step(loss, micro_batch=2)
    for number in (0, 1):
        result = complete(step, pixels, step=number, beta=0.01)
        wanted = complete(reference, pixels, step=number, beta=0.01)
        assert (result.halved, result.skipped, wanted.halved) == (number == 0, False, False)
        assert result.grad_norm == wanted.grad_norm
        assert result.terms == wanted.terms
    assert tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert all(torch.equal(one, other) for one, other in zip(step.parameters, reference.parameters, strict=True))


def test_out_of_memory_in_the_last_micro_batch_restarts_the_step(session, loss, pixels):
    step = make_step(loss, micro_batch=4, adapt_micro_batch=True)
    calls, backward = [], step.accelerator.backward

    def failing(total):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        backward(total)

    step.accelerator.backward = failing
    result = complete(step, pixels, step=0, beta=0.01)
    wanted = complete(make_step(loss, micro_batch=2), pixels, step=0, beta=0.01)
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
def test_out_of_memory_without_remedy_changes_nothing_and_names_the_settings(
    session, loss, pixels, settings, fits, remedy
):
    step = make_step(loss, **settings)
    before = [parameter.detach().clone() for parameter in step.parameters]
    limit_memory(step, fits)
    with pytest.raises(OutOfMemory, match=remedy):
        step(pixels, step=0, beta=0.01)
    assert all(torch.equal(old, new) for old, new in zip(before, step.parameters, strict=True))
    assert all(parameter.grad is None for parameter in step.parameters)


def test_other_errors_are_not_treated_as_out_of_memory(session, loss, pixels):
    step = make_step(loss, micro_batch=8, adapt_micro_batch=True)
    step.model.forward = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        step(pixels, step=0, beta=0.01)


def test_the_micro_batch_is_found_before_training(session, loss):
    step = make_step(loss, micro_batch=8, adapt_micro_batch=True)
    tried = limit_memory(step, fits=5)
    before = [parameter.detach().clone() for parameter in step.parameters]
    step.find_micro_batch(8, RESOLUTION)
    assert (step.micro_batch, tried) == (4, [8, 4, 4])
    assert all(parameter.grad is None for parameter in step.parameters)
    assert all(torch.equal(old, new) for old, new in zip(before, step.parameters, strict=True))


def test_ema_weights_are_applied_within_the_context_only():
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0]))]
    ema = EMAWeights(parameters)
    parameters[0].data += 5
    with pytest.raises(KeyError), ema.applied(parameters):
        assert parameters[0].tolist() == [1, 2]
        raise KeyError
    assert parameters[0].tolist() == [6, 7] and ema.shadow_params[0].tolist() == [1, 2]


def test_a_lower_resolution_trains_on_downsampled_images(session, loss):
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
        loss=loss,
        seed=SEED,
        latent_shape=(4, 8, 8),
        micro_batch=2,
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
