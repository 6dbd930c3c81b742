"""The adversarial term: its gradients, the discriminator's training, the weight, and exact resume."""

from __future__ import annotations

import dataclasses
import math
import signal

import pytest
import tiny
import torch
from accelerate import Accelerator
from runs import assert_same_state, run
from safetensors.torch import load_file
from torch.nn import functional as F

from training import setup
from training.budget.memory import trace_memory
from training.config import LossConfig, config_from_dict
from training.losses.adversarial import AdversarialLoss, AdversarialWeight
from training.losses.objective import ReconstructionLoss, kl_per_dimension, vae_loss
from training.losses.perceptual import unit_variance
from training.run_files import DISCRIMINATOR_FILE, list_checkpoints
from training.setup import build_run
from training.trainer import Trainer

CONFIG = LossConfig(trunk="st_alexnet", perceptual_crop_px=32, adversarial_weight=0.5, adversarial_start_images=8)
LOSS = {"adversarial_weight": 0.5, "adversarial_start_images": 8}
CROPS = [torch.tensor([[0, 3], [5, 1], [8, 8], [2, 0]])]


@pytest.fixture
def loss() -> ReconstructionLoss:
    return ReconstructionLoss.from_config(CONFIG, "cpu")


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = F.interpolate(torch.rand(4, 3, 10, 10, generator=generator) * 2 - 1, scale_factor=4, mode="bilinear")
    noise = torch.randn(pixels.shape, generator=generator)
    latents = torch.randn(2, 4, 16, generator=generator)
    return {
        "reconstruction": pixels + 0.2 * noise,
        "pixels": pixels,
        "posterior_mean": latents[0],
        "posterior_logvar": latents[1],
    }


def with_gradient(batch):
    return {name: value.clone().requires_grad_(name != "pixels") for name, value in batch.items()}


def logits(loss: ReconstructionLoss, images: torch.Tensor) -> list[torch.Tensor]:
    """The discriminator on the crops of images, by the formulas."""
    crops = torch.stack(
        [each[:, top : top + 32, left : left + 32] for each, (top, left) in zip(images, CROPS[0].tolist())]
    )
    features = [unit_variance(each).movedim(-1, 1) for each in loss.networks[0].features(crops)[1:]]
    return loss.adversarial.discriminator(features)


def test_the_total_has_the_gradient_of_the_sum(loss, batch):
    own, reference = with_gradient(batch), with_gradient(batch)
    total, parts = vae_loss(loss, **own, beta=0.1, crops=CROPS, adversarial_weight=0.7)
    total.backward()
    assert all(parameter.grad is None for parameter in loss.adversarial.parameters)
    terms = loss(**{name: reference[name] for name in ("reconstruction", "pixels")}, crops=CROPS)
    rec = sum(loss.weights[name] * terms[name].mean() for name in loss.weights)
    pairs = zip(logits(loss, reference["reconstruction"]), logits(loss, batch["pixels"]))
    adversarial = torch.stack([F.softplus(target - mine).mean() for mine, target in pairs]).mean()
    kl = kl_per_dimension(reference["posterior_mean"], reference["posterior_logvar"]).mean()
    norms = [
        4 * torch.autograd.grad(each, reference["reconstruction"], retain_graph=True)[0].flatten(1).norm(dim=1).mean()
        for each in (rec, adversarial)
    ]
    (rec + 0.7 * adversarial + 0.1 * kl).backward()
    for name in ("reconstruction", "posterior_mean", "posterior_logvar"):
        torch.testing.assert_close(own[name].grad, reference[name].grad, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(parts["total"], (rec + 0.7 * adversarial + 0.1 * kl).detach())
    torch.testing.assert_close(total.detach(), parts["total"])
    torch.testing.assert_close(parts["weighted/adversarial"], 0.7 * adversarial.detach())
    torch.testing.assert_close(parts["reconstruction"], rec.detach())
    torch.testing.assert_close(parts["gradient/reconstruction"], norms[0])
    torch.testing.assert_close(parts["gradient/adversarial"], norms[1])


def test_validation_has_no_adversarial_term(loss, batch):
    _, parts = vae_loss(loss, **batch, beta=0.1, crops=CROPS)
    assert not any("adversarial" in name for name in parts)


def test_the_gradient_of_the_discriminator_does_not_depend_on_how_a_batch_is_split(loss, batch):
    def gradients(splits):
        loss.adversarial.zero_grad()
        start = 0
        for count in splits:
            part = {name: value[start : start + count] for name, value in with_gradient(batch).items()}
            vae_loss(loss, **part, beta=0.1, crops=[CROPS[0][start : start + count]])
            loss.adversarial.backward(count / 4)
            start += count
        return [parameter.grad.clone() for parameter in loss.adversarial.parameters]

    for one, other in zip(gradients([4]), gradients([3, 1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_discriminator_learns_and_a_decoder_can_deceive_it(batch):
    torch.manual_seed(0)
    adversarial = AdversarialLoss([[4, 8]], dataclasses.replace(CONFIG, discriminator_learning_rate=3e-3), "cpu")
    accelerator = Accelerator(cpu=True)
    target = torch.randn(16, 8, 6, 6)
    own = (target + torch.linspace(-2, 2, 8)[:, None, None]).requires_grad_()  # another mean of each channel
    pairs = [([own, own], [target, target])]
    losses = []
    for _ in range(60):
        adversarial.generator_loss(pairs)
        losses.append(adversarial.backward(1.0)["discriminator"].item())
        assert adversarial.step(accelerator, torch.zeros(())).item() == 0
    assert losses[0] == pytest.approx(math.log(2), abs=0.1) and losses[-1] < 0.5 * losses[0]
    term = adversarial.generator_loss(pairs).mean()
    (direction,) = torch.autograd.grad(term, own)
    moved = own.detach() - 20 * len(own) * direction
    assert adversarial.generator_loss([([moved, moved], [target, target])]).mean() < term
    assert (moved - target).mean(dim=(0, 2, 3)).abs().mean() < (own - target).mean(dim=(0, 2, 3)).abs().mean()


@pytest.mark.parametrize("cause", ["the model", "the discriminator"])
def test_a_skipped_step_leaves_the_discriminator_as_it_is(loss, batch, cause):
    def tensors():
        return {name: value.detach().clone() for name, value in loss.adversarial.tensors().items()}

    before = tensors()
    vae_loss(loss, **with_gradient(batch), beta=0.1, crops=CROPS)
    loss.adversarial.backward(math.nan if cause == "the discriminator" else 1.0)
    skipped = torch.ones(()) if cause == "the model" else torch.zeros(())
    assert loss.adversarial.step(Accelerator(cpu=True), skipped).item() == 1
    assert all(torch.equal(value, before[name]) for name, value in tensors().items())
    vae_loss(loss, **with_gradient(batch), beta=0.1, crops=CROPS)
    loss.adversarial.backward(1.0)
    assert loss.adversarial.step(Accelerator(cpu=True), torch.zeros(())).item() == 0
    assert not any(torch.equal(value, before[name]) for name, value in tensors().items())


def test_the_weight_starts_late_rises_and_has_a_limit():
    weight = AdversarialWeight(CONFIG)
    assert weight.value(100) == 0  # nothing observed
    terms = {"gradient/reconstruction": 0.6, "gradient/adversarial": 2.0}
    weight.observe(terms, 8, 1008)  # added to a run after 1,000 images
    weight.observe(terms | {"gradient/adversarial": math.nan}, 8, 1016)
    assert weight.value(1007) == 0
    assert weight.value(1012) == pytest.approx(0.5 * 0.5 * 0.3)
    assert weight.value(1016) == weight.value(1100) == pytest.approx(0.5 * 0.3)
    again = AdversarialWeight(CONFIG)
    again.load_state_dict(weight.state_dict())
    assert again.value(1016) == weight.value(1016)
    for _ in range(10):
        weight.observe(terms | {"gradient/adversarial": 1e-3}, 100_000, 10**6)
    assert weight.value(1016) == 1.0


def test_an_interrupted_run_resumes_bit_for_bit(faces, tmp_path):
    def config(name):
        presets = {"train_only": "decoder", "best_metric": "lpips"}
        return tiny.tiny_config(tmp_path / name, faces, loss=LOSS, training_presets=presets)

    through = run(config("through"))
    assert run(config("stopped"), stop_after={7: signal.SIGTERM}).status["state"] == "stopped"
    resumed = run(config("stopped"), "auto")
    assert_same_state(resumed, through)
    states = [load_file(list_checkpoints(each.folder)[-1] / DISCRIMINATOR_FILE) for each in (through, resumed)]
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )
    assert states[0]["step/heads.0.0.weight"] == 10
    lines = resumed.lines("train")
    assert lines == through.lines("train")
    assert lines[0]["weighted/adversarial"] == 0 < lines[-1]["weighted/adversarial"]
    assert {"loss/adversarial", "loss/discriminator", "discriminator/skipped", "gradient/adversarial"} <= lines[
        -1
    ].keys()
    validations = {
        line["step"]: line["validation/lpips_st_alexnet"] for line in resumed.lines("validation") if line["step"]
    }
    assert resumed.status["best"]["step"] == min(validations, key=validations.get)


def test_the_term_and_the_best_metric_can_change_on_resume_where_it_is_allowed(faces, tmp_path, capsys):
    def config(num_epochs, **presets):
        loss = LOSS if presets else {}
        presets = presets | {"num_epochs": num_epochs, "early_stopping_patience": 1, "plateau_threshold": 0.0}
        return tiny.tiny_config(tmp_path, faces, loss=loss, training_presets=presets)

    run(config(1))
    allowed = ["loss.adversarial_weight", "loss.adversarial_start_images", "training_presets.best_metric"]
    later = config(3, best_metric="lpips")
    with pytest.raises(ValueError, match="training_presets.best_metric .*reconstruction_loss. -> .lpips"):
        run(later, "auto")
    with tiny.process_state():
        trainer = Trainer(later, "auto", allowed)
        assert "the checkpoint has no discriminator, which starts from its initial weights" in capsys.readouterr().err
        assert trainer.progress.best is None and trainer.learning_rate._plateau.best == math.inf
        assert trainer.run() == 0
    assert trainer.progress.best["epoch"] > 1
    assert trainer.setup.adversarial_weight.state_dict()["first_images"] == 20
    values = later.to_dict()
    values["output"]["eval_lpips_trunk"] = "st_vgg16"
    with pytest.raises(ValueError, match="output.eval_lpips_trunk"), tiny.process_state():
        Trainer(config_from_dict(values), "auto")


def test_out_of_memory_in_the_discriminator_leaves_nothing_behind(faces, tmp_path, session, monkeypatch):
    """The micro-batch is halved, and the gradients are those of a run that began with the smaller one."""

    def gradients(folder, **presets):
        setup = build_run(tiny.tiny_config(tmp_path / folder, faces, loss=LOSS, training_presets=presets))
        (batch,) = setup.stream.epoch_batches(0, max_batches=1)
        backward, calls = setup.loss.adversarial.backward, []

        def failing(fraction):
            calls.append(fraction)
            if presets["micro_batch_size"] == "auto" and len(calls) == 1:
                raise torch.OutOfMemoryError("out of memory")
            return backward(fraction)

        monkeypatch.setattr(setup.loss.adversarial, "backward", failing)
        setup.train_step._fitting_gradients(batch.pixels, step=0, beta=0.1)
        parameters = [*setup.parameters, *setup.loss.adversarial.parameters]
        found = [parameter.grad.clone() for parameter in parameters]
        setup.folder.release()
        return found

    halved, small = gradients("auto", micro_batch_size="auto"), gradients("small", micro_batch_size=2)
    assert all(map(torch.equal, halved, small))


@pytest.mark.parametrize(
    ("loss", "presets", "message"),
    [
        ({}, {"compile": True}, "training_presets.compile must be false with loss.adversarial_weight, got true"),
        ({}, {"train_only": "encoder"}, 'training_presets.train_only must be "decoder" or "all" with'),
        (
            {"perceptual_weight": 0, "lpips_weight": 0},
            {},
            "loss.adversarial_weight must be 0 without a feature network",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(loss, presets, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict({**tiny.SETTINGS, "loss": tiny.SETTINGS["loss"] | LOSS | loss, "training_presets": presets})


def test_fp16_is_refused(faces, tmp_path, session, monkeypatch):
    monkeypatch.setattr(setup, "resolve_precision", lambda *_: ("fp16", "a test"))
    with pytest.raises(ValueError, match="mixed_precision is fp16 .* use bf16 or no"):
        build_run(tiny.tiny_config(tmp_path, faces, loss=LOSS))


def test_the_estimate_contains_it():
    def operations(weight):
        values = {**tiny.SETTINGS, "loss": tiny.SETTINGS["loss"] | {"adversarial_weight": weight}}
        return trace_memory(config_from_dict(values), 2, keeps_gradients=True).operations

    assert sum(op.flop for op in operations(0.5)) > sum(op.flop for op in operations(0.0))
