"""Every loss term against torch's own functions, and the weighted sum."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from training.config import LossConfig
from training.losses.objective import ReconstructionLoss, kl_per_dimension, random_crops, vae_loss
from training.losses.perceptual import PerceptualTrunk

RAW = {"mse", "l1", "perceptual", "lpips", "kl"}
POSITIONS, CROP_SIZE = torch.tensor([[0, 16], [5, 0], [8, 7], [3, 9]]), 40


@pytest.fixture(scope="module")
def trunk() -> PerceptualTrunk:
    torch.manual_seed(0)
    return PerceptualTrunk("alexnet", load_weights=False)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(4, 3, 48, 56, generator=generator) * 2 - 1
    noise = torch.randn(pixels.shape, generator=generator) * 0.3
    return {
        "reconstruction": (pixels + noise).requires_grad_(),
        "pixels": pixels,
        "posterior_mean": torch.randn(4, 4, 3, 3, generator=generator).requires_grad_(),
        "posterior_logvar": torch.randn(4, 4, 3, 3, generator=generator).requires_grad_(),
    }


def crop_by_hand(images: torch.Tensor) -> torch.Tensor:
    places = zip(images, POSITIONS.tolist(), strict=True)
    return torch.stack([image[:, top : top + CROP_SIZE, left : left + CROP_SIZE] for image, (top, left) in places])


def only_pixels(**weights: float) -> ReconstructionLoss:
    return ReconstructionLoss(perceptual=0, lpips=0, **weights)


class TestReconstructionLoss:
    @pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
    def test_a_weight_must_be_finite_and_not_negative(self, weight):
        with pytest.raises(ValueError, match="the weight of l1 is"):
            only_pixels(l1=weight)
        with pytest.raises(ValueError, match="the weight of edges is"):
            only_pixels().add_term("edges", weight, lambda reconstruction, pixels: pixels.mean(dim=(1, 2, 3)))

    def test_default_weights(self, trunk):
        assert ReconstructionLoss([trunk]).weights == {"mse": 0.4, "l1": 0.2, "perceptual": 0.2, "lpips": 0.2}

    def test_a_perceptual_weight_needs_a_network(self):
        for weights in ({}, {"lpips": 0}, {"perceptual": 0}):
            with pytest.raises(ValueError, match="need a feature network"):
                ReconstructionLoss(**weights)

    def test_from_config(self, trunk):
        config = LossConfig(
            mse_weight=1, l1_weight=2, perceptual_weight=3, lpips_weight=4,
            trunk="alexnet", perceptual_crop_px=48, lpips_trunk="st_vgg16",
        )  # fmt: skip
        loss = ReconstructionLoss.from_config(
            config, "cpu", memory_format=torch.channels_last, load_weights=False, networks={"alexnet": trunk}
        )
        assert loss.networks[0] is trunk and loss.networks[1].name == "st_vgg16"
        assert loss.networks[1].layers[2].weight.is_contiguous(memory_format=torch.channels_last)
        assert loss.crop_sizes == [48, None]
        assert loss.weights == {"mse": 1, "l1": 2, "perceptual": 3, "lpips": 4}

    def test_from_config_loads_a_network_once_and_none_without_perceptual_weights(self):
        twice = LossConfig(trunk="st_alexnet", lpips_trunk="st_alexnet", lpips_crop_px=32)
        first, second = ReconstructionLoss.from_config(twice, "cpu").networks
        assert first is second
        none = LossConfig(perceptual_weight=0, lpips_weight=0)
        assert ReconstructionLoss.from_config(none, "cpu").networks == []

    def test_check_resolution_names_the_key(self, trunk):
        loss = ReconstructionLoss([trunk, trunk], [None, 30])
        with pytest.raises(ValueError, match="loss.trunk alexnet needs .* at least 31 pixels, got 30"):
            loss.check_resolution(30)
        with pytest.raises(ValueError, match="loss.lpips_trunk alexnet needs .* at least 31 pixels, got 30"):
            loss.check_resolution(31)
        ReconstructionLoss([trunk, trunk], [48, 31]).check_resolution(31)

    def test_an_added_term_is_weighted_summed_and_logged(self, batch):
        loss = only_pixels()
        _, before = vae_loss(loss, **batch, beta=0.5)
        loss.add_term("largest", 3.0, lambda reconstruction, pixels: (reconstruction - pixels).flatten(1).amax(dim=1))
        loss.add_term("logged_only", 0.0, lambda reconstruction, pixels: reconstruction.flatten(1).amax(dim=1) / 0)
        total, parts = vae_loss(loss, **batch, beta=0.5)
        largest = (batch["reconstruction"] - batch["pixels"]).flatten(1).amax(dim=1).mean()
        torch.testing.assert_close(parts["largest"], largest.detach())
        torch.testing.assert_close(parts["weighted/largest"], 3 * largest.detach())
        torch.testing.assert_close(total.detach(), before["total"] + 3 * largest.detach())
        assert parts["logged_only"].isinf()
        for name in ("largest", "mse", "lpips", "kl", "total", "kl/other"):
            with pytest.raises(ValueError, match="cannot be called"):
                loss.add_term(name, 1.0, lambda reconstruction, pixels: pixels)


class TestKl:
    def test_equals_torch_distributions(self, batch):
        mean, logvar = batch["posterior_mean"], batch["posterior_logvar"]
        reference = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0))
        torch.testing.assert_close(kl_per_dimension(mean, logvar), reference)

    def test_keeps_its_digits_near_the_prior(self):
        logvar = torch.tensor([0.0, 1e-4, -1e-3])
        exact = (torch.expm1(logvar.double()) - logvar.double()) / 2
        assert kl_per_dimension(torch.zeros(3), logvar)[0] == 0
        torch.testing.assert_close(kl_per_dimension(torch.zeros(3), logvar).double(), exact, rtol=0.02, atol=0)

    def test_is_float32_under_autocast_and_for_half_inputs(self, batch):
        mean, logvar = batch["posterior_mean"].bfloat16(), batch["posterior_logvar"].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            kl = kl_per_dimension(mean, logvar)
        assert kl.dtype == torch.float32
        torch.testing.assert_close(kl, kl_per_dimension(mean.float(), logvar.float()))

    def test_shapes_that_would_broadcast_raise(self):
        with pytest.raises(ValueError, match="give equal shapes"):
            kl_per_dimension(torch.zeros(4, 8), torch.zeros(4, 1))


class TestCrops:
    def test_each_image_is_cropped_at_its_own_position(self):
        images = torch.arange(4 * 3 * 48 * 56.0).view(4, 3, 48, 56)
        for crops, batch in zip(random_crops([images, -images], POSITIONS, CROP_SIZE), (images, -images), strict=True):
            assert torch.equal(crops, crop_by_hand(batch))
        assert torch.equal(random_crops([images], torch.zeros(4, 2, dtype=torch.long), 48)[0], images[..., :48])

    def test_crops_are_channels_last_whatever_the_images_are(self):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            images = torch.rand(4, 3, 48, 56).contiguous(memory_format=memory_format)
            (crops,) = random_crops([images], POSITIONS, CROP_SIZE)
            assert torch.equal(crops, crop_by_hand(images))
            assert crops.is_contiguous(memory_format=torch.channels_last)

    def test_the_gradient_reaches_the_crop_and_nothing_else(self, batch):
        images = batch["reconstruction"]
        random_crops([images], POSITIONS, CROP_SIZE)[0].sum().backward()
        expected = torch.zeros_like(images)
        for index, (top, left) in enumerate(POSITIONS.tolist()):
            expected[index, :, top : top + CROP_SIZE, left : left + CROP_SIZE] = 1
        assert torch.equal(images.grad, expected)


class TestVaeLoss:
    @pytest.mark.parametrize("crops", [None, [POSITIONS]])
    def test_every_term_and_the_sum(self, batch, trunk, crops):
        loss = ReconstructionLoss([trunk], [CROP_SIZE], mse=0.5, l1=0.3, perceptual=0.7, lpips=1.1)
        total, parts = vae_loss(loss, **batch, beta=0.01, crops=crops)
        reconstruction, pixels = batch["reconstruction"], batch["pixels"]
        both = [reconstruction, pixels] if crops is None else [crop_by_hand(reconstruction), crop_by_hand(pixels)]
        perceptual, lpips = trunk.distances(*(trunk.features(images) for images in both))
        posterior = Normal(batch["posterior_mean"], (batch["posterior_logvar"] / 2).exp())
        expected = {
            "mse": F.mse_loss(reconstruction, pixels),
            "l1": F.l1_loss(reconstruction, pixels),
            "perceptual": perceptual.mean(),
            "lpips": lpips.mean(),
            "kl": kl_divergence(posterior, Normal(0.0, 1.0)).mean(),
        }
        factors = {"mse": 0.5, "l1": 0.3, "perceptual": 0.7, "lpips": 1.1, "kl": 0.01}
        weighted = {name: factors[name] * value for name, value in expected.items()}
        expected |= {f"weighted/{name}": value for name, value in weighted.items()}
        expected["reconstruction"] = sum(weighted.values()) - weighted["kl"]
        expected["total"] = sum(weighted.values())
        assert parts.keys() == expected.keys() == RAW | {f"weighted/{n}" for n in RAW} | {"reconstruction", "total"}
        for name, value in expected.items():
            torch.testing.assert_close(parts[name], value.detach(), msg=lambda text, name=name: f"{name}: {text}")
            assert parts[name].dtype == torch.float32 and parts[name].ndim == 0
            assert not parts[name].requires_grad
        assert total.requires_grad and total.item() == parts["total"].item()

        total.backward()
        inputs = {name: batch[name] for name in ("reconstruction", "posterior_mean", "posterior_logvar")}
        gradients = torch.autograd.grad(expected["total"], list(inputs.values()))
        for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
            torch.testing.assert_close(tensor.grad, gradient, msg=name)

    def test_mean_over_equal_shards_is_the_global_batch(self, batch, trunk):
        loss = ReconstructionLoss([trunk], [CROP_SIZE])
        total, parts = vae_loss(loss, **batch, beta=0.1, crops=[POSITIONS])
        shards = []
        for images in (slice(0, 2), slice(2, 4)):
            shard = {name: tensor[images] for name, tensor in batch.items()}
            shards.append(vae_loss(loss, **shard, beta=0.1, crops=[POSITIONS[images]]))
        torch.testing.assert_close((shards[0][0] + shards[1][0]) / 2, total)
        for name, value in parts.items():
            torch.testing.assert_close((shards[0][1][name] + shards[1][1][name]) / 2, value)

    def test_lpips_alone_improves_the_reconstruction(self, batch, trunk):
        loss = ReconstructionLoss([trunk], mse=0, l1=0, perceptual=0, lpips=1)
        total, parts = vae_loss(loss, **batch, beta=0.0)
        total.backward()
        gradient = batch["reconstruction"].grad
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()
        assert parts["total"] == parts["lpips"] and parts["perceptual"] > 0  # logged, though of weight 0
        with torch.no_grad():
            batch["reconstruction"] -= 0.01 * gradient / gradient.abs().max()
        assert vae_loss(loss, **batch, beta=0.0)[0] < total

    def test_a_network_runs_once_without_and_once_with_gradient(self, batch, trunk):
        calls = []
        handle = trunk.layers[0].register_forward_hook(
            lambda _, inputs, output: calls.append((torch.is_grad_enabled(), inputs[0].shape))
        )
        vae_loss(ReconstructionLoss([trunk], [CROP_SIZE]), **batch, beta=0.1, crops=[POSITIONS])
        assert calls == [(False, (4, 3, 40, 40)), (True, (4, 3, 40, 40))]
        calls.clear()
        unused = ReconstructionLoss([trunk], [CROP_SIZE], perceptual=0, lpips=0)
        _, parts = vae_loss(unused, **batch, beta=0.1, crops=[POSITIONS])
        handle.remove()
        assert calls == []
        assert not {name for name in parts if "lpips" in name or "perceptual" in name}

    def test_lpips_is_the_mean_over_both_networks_each_with_its_own_crops(self, batch, trunk):
        torch.manual_seed(5)
        other = PerceptualTrunk("st_vgg16", load_weights=False)
        positions = torch.tensor([[3, 0], [0, 4], [1, 2], [2, 1]])
        weights = {"mse": 0.5, "l1": 0.3, "perceptual": 0.7, "lpips": 1.1}
        both = ReconstructionLoss([trunk, other], [CROP_SIZE, 32], **weights)
        total, parts = vae_loss(both, **batch, beta=0.0, crops=[POSITIONS, positions])
        first = ReconstructionLoss([trunk], [CROP_SIZE], **weights)
        _, alone = vae_loss(first, **batch, beta=0.0, crops=[POSITIONS])
        crops = [random_crops([batch[name]], positions, 32)[0] for name in ("reconstruction", "pixels")]
        second = other.lpips(*(other.features(images) for images in crops)).mean()
        assert parts["perceptual"] == alone["perceptual"] and parts["lpips"] != alone["lpips"]
        torch.testing.assert_close(parts["lpips"], (alone["lpips"] + second.detach()) / 2)
        torch.testing.assert_close(total, parts["total"])
        torch.testing.assert_close(parts["total"] - alone["total"], 1.1 * (parts["lpips"] - alone["lpips"]))

    def test_without_networks(self, batch):
        total, parts = vae_loss(only_pixels(), **batch, beta=0.5)
        torch.testing.assert_close(total, 0.4 * parts["mse"] + 0.2 * parts["l1"] + 0.5 * parts["kl"])

    def test_is_float32_under_autocast_and_finite_for_flat_images(self, batch, trunk):
        flat = torch.zeros_like(batch["pixels"])
        reconstruction = flat.bfloat16().requires_grad_()
        arguments = batch | {"pixels": flat, "reconstruction": reconstruction}
        with torch.autocast("cpu", torch.bfloat16):
            total, parts = vae_loss(ReconstructionLoss([trunk]), **arguments, beta=0.1)
        assert total.dtype == torch.float32
        assert {value.dtype for value in parts.values()} == {torch.float32}
        total.backward()
        assert reconstruction.grad.isfinite().all() and batch["posterior_logvar"].grad.isfinite().all()
        torch.testing.assert_close(total, parts["weighted/kl"])  # identical images: nothing else is left

    def test_only_convolutions_follow_autocast(self, batch, trunk):
        autocast_of: dict[str, set[bool]] = {}

        class Recorder(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                autocast_of.setdefault(function.__name__, set()).add(torch.is_autocast_enabled("cpu"))
                return function(*args, **(kwargs or {}))

        loss = ReconstructionLoss([trunk], [CROP_SIZE])
        with torch.autocast("cpu", torch.bfloat16), Recorder():
            vae_loss(loss, **batch, beta=0.1, crops=[POSITIONS])
        assert autocast_of["conv2d"] == {True}
        for name in ("mse_loss", "smooth_l1_loss", "rms_norm", "mean", "sum", "expm1"):
            assert autocast_of[name] == {False}, name

    def test_an_infinite_term_of_weight_zero_leaves_the_total_finite(self, batch):
        batch["reconstruction"] = torch.full_like(batch["pixels"], 1e25)  # squared, this is infinite in float32
        total, parts = vae_loss(only_pixels(mse=0), **batch, beta=0.1)
        assert parts["mse"].isinf()
        assert total.isfinite()

    def test_shapes_that_would_broadcast_raise(self, batch):
        batch["pixels"] = batch["pixels"][:1]
        with pytest.raises(ValueError, match="give equal shapes"):
            vae_loss(only_pixels(), **batch, beta=0.1)
