"""Every loss term against torch's own functions, and the sum against its arithmetic."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from training.losses.objective import LossWeights, kl_per_dimension, random_crops, vae_loss
from training.losses.perceptual import PerceptualTrunk

RAW = {"mse", "l1", "perceptual", "lpips", "kl"}
ONLY_PIXELS = LossWeights(perceptual=0.0, lpips=0.0)


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
        "mean": torch.randn(4, 4, 3, 3, generator=generator).requires_grad_(),
        "logvar": torch.randn(4, 4, 3, 3, generator=generator).requires_grad_(),
    }


CROP = ([0, 5, 8, 3], [16, 0, 7, 9], 40)


def crop_by_hand(pixels: torch.Tensor) -> torch.Tensor:
    tops, lefts, size = CROP
    return torch.stack([pixels[i, :, tops[i] : tops[i] + size, lefts[i] : lefts[i] + size] for i in range(len(pixels))])


class TestLossWeights:
    @pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
    def test_refuses_what_is_no_weight(self, weight):
        with pytest.raises(ValueError, match="the weight of l1 is"):
            LossWeights(l1=weight)

    def test_tells_whether_a_trunk_is_needed(self):
        assert LossWeights().needs_trunk
        assert LossWeights(perceptual=0).needs_trunk and LossWeights(lpips=0).needs_trunk
        assert not ONLY_PIXELS.needs_trunk


class TestKl:
    def test_equals_torch_distributions(self, batch):
        mean, logvar = batch["mean"], batch["logvar"]
        reference = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).flatten(1).mean(dim=1)
        torch.testing.assert_close(kl_per_dimension(mean, logvar), reference)

    def test_keeps_its_digits_near_the_prior(self):
        logvar = torch.tensor([[0.0], [1e-4], [-1e-3]])
        exact = (torch.expm1(logvar.double()) - logvar.double()).flatten() / 2
        assert kl_per_dimension(torch.zeros(3, 1), logvar)[0] == 0
        torch.testing.assert_close(kl_per_dimension(torch.zeros(3, 1), logvar).double(), exact, rtol=0.02, atol=0)

    def test_is_float32_under_autocast_and_for_half_inputs(self, batch):
        mean, logvar = batch["mean"].bfloat16(), batch["logvar"].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            kl = kl_per_dimension(mean, logvar)
        assert kl.dtype == torch.float32
        torch.testing.assert_close(kl, kl_per_dimension(mean.float(), logvar.float()))

    def test_refuses_shapes_that_would_broadcast(self):
        with pytest.raises(ValueError, match="give equal shapes"):
            kl_per_dimension(torch.zeros(4, 8), torch.zeros(4, 1))


class TestCrops:
    def test_takes_the_same_window_of_each_tensor(self):
        rows = torch.arange(48.0).view(1, 1, -1, 1).expand(4, 1, 48, 56)
        columns = torch.arange(56.0).view(1, 1, 1, -1).expand(4, 1, 48, 56)
        image = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 48, 56)
        pixels = torch.cat([rows, columns, image], dim=1)
        tops, lefts, size = CROP
        first, second = random_crops((pixels, pixels + 1000), tops, lefts, size)
        assert first.shape == (4, 3, size, size)
        assert torch.equal(second - 1000, first)
        for index in range(4):
            assert first[index, :, 0, 0].tolist() == [tops[index], lefts[index], index]
            corner = [tops[index] + size - 1, lefts[index] + size - 1, index]
            assert first[index, :, -1, -1].tolist() == corner

    @pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
    def test_keeps_the_memory_format(self, memory_format):
        pixels = torch.rand(4, 3, 48, 56).contiguous(memory_format=memory_format)
        for crop in random_crops((pixels, pixels), *CROP):
            assert crop.is_contiguous(memory_format=memory_format)

    def test_gradient_reaches_the_window_and_nothing_else(self, batch):
        pixels = batch["reconstruction"]
        random_crops((pixels, batch["pixels"]), *CROP)[0].sum().backward()
        expected = torch.zeros_like(pixels)
        for index, (top, left) in enumerate(zip(CROP[0], CROP[1], strict=True)):
            expected[index, :, top : top + CROP[2], left : left + CROP[2]] = 1
        assert torch.equal(pixels.grad, expected)

    @pytest.mark.parametrize(
        ("tops", "lefts", "size", "message"),
        [
            ([0, 0, 0, 9], [0] * 4, 40, "leaves the image of 48 x 56"),
            ([0] * 4, [0, 0, -1, 0], 40, "leaves the image"),
            ([0] * 4, [0] * 4, 49, "no larger than the image"),
            ([0] * 4, [0] * 4, 0, "a crop of 0 pixels"),
            ([0] * 3, [0] * 4, 40, "there are 4 images, 3 tops and 4 lefts"),
        ],
    )
    def test_refuses_windows_outside_the_image(self, tops, lefts, size, message):
        with pytest.raises(ValueError, match=message):
            random_crops((torch.zeros(4, 3, 48, 56),), tops, lefts, size)

    def test_refuses_tensors_of_different_shape(self):
        with pytest.raises(ValueError, match="give equal shapes"):
            random_crops((torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9)), [0], [0], 4)


class TestVaeLoss:
    @pytest.mark.parametrize("crop", [None, CROP])
    def test_every_term_and_the_sum(self, batch, trunk, crop):
        weights = LossWeights(mse=0.5, l1=0.3, perceptual=0.7, lpips=1.1)
        total, parts = vae_loss(**batch, weights=weights, beta=0.01, trunk=trunk, crop=crop)
        reconstruction, pixels = batch["reconstruction"], batch["pixels"]
        seen = [reconstruction, pixels] if crop is None else [crop_by_hand(reconstruction), crop_by_hand(pixels)]
        features = [trunk.features(images) for images in seen]
        expected = {
            "mse": F.mse_loss(reconstruction, pixels),
            "l1": F.l1_loss(reconstruction, pixels),
            "perceptual": trunk.feature_distance(*features).mean(),
            "lpips": trunk.lpips(*features).mean(),
            "kl": kl_divergence(Normal(batch["mean"], (batch["logvar"] / 2).exp()), Normal(0.0, 1.0)).mean(),
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
        gradients = torch.autograd.grad(expected["total"], [batch["reconstruction"], batch["mean"], batch["logvar"]])
        for name, gradient in zip(("reconstruction", "mean", "logvar"), gradients, strict=True):
            torch.testing.assert_close(batch[name].grad, gradient)

    def test_default_weights(self):
        weights = LossWeights()
        assert (weights.mse, weights.l1, weights.perceptual, weights.lpips) == (0.4, 0.2, 0.2, 0.2)

    def test_mean_over_equal_shards_is_the_global_batch(self, batch, trunk):
        whole, parts = vae_loss(**batch, weights=LossWeights(), beta=0.1, trunk=trunk, crop=CROP)
        shards = []
        for rows in (slice(0, 2), slice(2, 4)):
            shard = {name: tensor[rows] for name, tensor in batch.items()}
            crop = (CROP[0][rows], CROP[1][rows], CROP[2])
            shards.append(vae_loss(**shard, weights=LossWeights(), beta=0.1, trunk=trunk, crop=crop))
        torch.testing.assert_close((shards[0][0] + shards[1][0]) / 2, whole)
        for name, value in parts.items():
            torch.testing.assert_close((shards[0][1][name] + shards[1][1][name]) / 2, value)

    def test_lpips_alone_teaches_the_reconstruction(self, batch, trunk):
        weights = LossWeights(mse=0, l1=0, perceptual=0, lpips=1)
        total, parts = vae_loss(**batch, weights=weights, beta=0.0, trunk=trunk, crop=None)
        total.backward()
        gradient = batch["reconstruction"].grad
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()
        assert parts["total"] == parts["lpips"] and parts["perceptual"] > 0  # logged, though of weight 0
        with torch.no_grad():  # a step against the gradient brings the image nearer
            batch["reconstruction"] -= 0.01 * gradient / gradient.abs().max()
        assert vae_loss(**batch, weights=weights, beta=0.0, trunk=trunk, crop=None)[0] < total

    def test_trunk_runs_once_without_and_once_with_gradient(self, batch, trunk):
        calls = []
        handle = trunk.layers[0].register_forward_hook(
            lambda _, inputs, output: calls.append((torch.is_grad_enabled(), inputs[0].shape))
        )
        vae_loss(**batch, weights=LossWeights(), beta=0.1, trunk=trunk, crop=CROP)
        assert calls == [(False, (4, 3, 40, 40)), (True, (4, 3, 40, 40))]
        calls.clear()
        _, parts = vae_loss(**batch, weights=ONLY_PIXELS, beta=0.1, trunk=trunk, crop=CROP)
        handle.remove()
        assert calls == []
        assert not {name for name in parts if "lpips" in name or "perceptual" in name}

    def test_lpips_may_read_a_second_network_through_another_window(self, batch, trunk):
        torch.manual_seed(5)
        other = PerceptualTrunk("st_vgg16", load_weights=False)
        window = ([3, 0, 1, 2], [0, 4, 2, 1], 32)
        weights = LossWeights(mse=0.5, l1=0.3, perceptual=0.7, lpips=1.1)
        common = batch | {"weights": weights, "beta": 0.0, "trunk": trunk, "crop": CROP}
        total, parts = vae_loss(**common, lpips_trunk=other, lpips_crop=window)
        _, alone = vae_loss(**common)
        seen = random_crops((batch["reconstruction"], batch["pixels"]), *window)
        second = other.lpips(*(other.features(images) for images in seen)).mean()
        assert parts["perceptual"] == alone["perceptual"] and parts["lpips"] != alone["lpips"]
        torch.testing.assert_close(parts["lpips"], (alone["lpips"] + second.detach()) / 2)
        torch.testing.assert_close(total, parts["total"])
        torch.testing.assert_close(parts["total"] - alone["total"], 1.1 * (parts["lpips"] - alone["lpips"]))

    def test_without_trunk(self, batch):
        total, parts = vae_loss(**batch, weights=ONLY_PIXELS, beta=0.5, trunk=None, crop=None)
        torch.testing.assert_close(total, 0.4 * parts["mse"] + 0.2 * parts["l1"] + 0.5 * parts["kl"])
        for weights in (LossWeights(), LossWeights(lpips=0), LossWeights(perceptual=0)):
            with pytest.raises(ValueError, match="need a perceptual trunk and there is none"):
                vae_loss(**batch, weights=weights, beta=0.5, trunk=None, crop=None)

    def test_is_float32_under_autocast_and_finite_for_flat_images(self, batch, trunk):
        flat = torch.zeros_like(batch["pixels"])
        reconstruction = flat.bfloat16().requires_grad_()
        arguments = batch | {"pixels": flat, "reconstruction": reconstruction}
        with torch.autocast("cpu", torch.bfloat16):
            total, parts = vae_loss(**arguments, weights=LossWeights(), beta=0.1, trunk=trunk, crop=None)
        assert total.dtype == torch.float32
        assert {value.dtype for value in parts.values()} == {torch.float32}
        total.backward()
        assert reconstruction.grad.isfinite().all() and batch["logvar"].grad.isfinite().all()
        torch.testing.assert_close(total, parts["weighted/kl"])  # identical images: nothing else is left

    def test_no_term_is_computed_under_autocast_but_the_convolutions(self, batch, trunk):
        autocast_of: dict[str, set[bool]] = {}

        class Recorder(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                autocast_of.setdefault(function.__name__, set()).add(torch.is_autocast_enabled("cpu"))
                return function(*args, **(kwargs or {}))

        with torch.autocast("cpu", torch.bfloat16), Recorder():
            vae_loss(**batch, weights=LossWeights(), beta=0.1, trunk=trunk, crop=CROP)
        assert autocast_of["conv2d"] == {True}
        for name in ("square", "abs", "mean", "sum", "rsqrt", "expm1"):
            assert autocast_of[name] == {False}, name

    def test_a_term_of_weight_zero_cannot_spoil_the_total(self, batch):
        batch["reconstruction"] = torch.full_like(batch["pixels"], 1e25)  # squared, this is infinite in float32
        total, parts = vae_loss(
            **batch, weights=LossWeights(mse=0, perceptual=0, lpips=0), beta=0.1, trunk=None, crop=None
        )
        assert parts["mse"].isinf()
        assert total.isfinite()

    def test_refuses_shapes_that_would_broadcast(self, batch):
        batch["pixels"] = batch["pixels"][:1]
        with pytest.raises(ValueError, match="give equal shapes"):
            vae_loss(**batch, weights=ONLY_PIXELS, beta=0.1, trunk=None, crop=None)
