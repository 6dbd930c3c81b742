"""The feature networks against the `lpips` package, recorded shift-tolerant distances and closed forms."""

import hashlib
import importlib
import pickle
import socket
import sys
import time
import urllib.request
import warnings
from types import SimpleNamespace

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from training.losses import perceptual_weights
from training.losses.perceptual import ARCHITECTURES, IMAGENET_STD, PerceptualTrunk

NAMES = list(ARCHITECTURES)
LPIPS_NETS = {"vgg16": "vgg", "alexnet": "alex", "squeezenet": "squeeze"}


def pattern(height: int, width: int, period: float) -> torch.Tensor:
    """A closed-form image (1, 3, H, W) in [-1, 1]."""
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    waves = [torch.sin(rows / period + c) * torch.cos(columns / (period + 1) - c) for c in range(3)]
    return torch.stack(waves)[None]


def image_pair(size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Three images (3, 3, size, size) and a slightly, a clearly and an entirely different version of them."""
    images = torch.cat([pattern(size, size, period) for period in (2.0, 3.0, 5.0)])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images, images.lerp(noise, torch.tensor([0.05, 0.4, 1.0]).view(3, 1, 1, 1))


def file_tensors(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, of a size that keeps activations near 1 in every layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, tensor in PerceptualTrunk(name, load_weights=False).layers.named_buffers():
        gain = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim == 4 else 0.1
        tensors[f"features.{key}"] = torch.randn(tensor.shape, generator=generator) * gain
    return tensors


def in_trunk(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A file's tensor as the network stores it: the first layer also scales the pixels, from [-1, 1]."""
    if key != "features.0.weight":
        return tensor
    return tensor / (2 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))


def has_first_weight(trunk: PerceptualTrunk, tensors: dict[str, torch.Tensor]) -> bool:
    return torch.equal(trunk.layers[0].weight, in_trunk("features.0.weight", tensors["features.0.weight"]))


@pytest.fixture(scope="module")
def random_trunks() -> dict[str, PerceptualTrunk]:
    torch.manual_seed(0)
    return {name: PerceptualTrunk(name, load_weights=False) for name in NAMES}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, and a proxy that refuses at once: nothing can leave the machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    urllib.request.install_opener(None)  # urlopen keeps the proxies that it saw first
    yield folder
    urllib.request.install_opener(None)


class TestLpips:
    @pytest.mark.parametrize("name", LPIPS_NETS)
    def test_equals_the_lpips_package_in_value_and_gradient(self, name, tmp_path, monkeypatch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lpips = importlib.import_module("lpips")

        architecture = "squeezenet1_1" if name == "squeezenet" else name
        build = getattr(torchvision.models, architecture)

        def untrained(pretrained: bool) -> SimpleNamespace:
            with torch.device("meta"):  # spares filling the classifier, which LPIPS does not read
                features = build(weights=None).features
            return SimpleNamespace(features=features.to_empty(device="cpu"))

        with monkeypatch.context() as patch:
            patch.setattr(torchvision.models, architecture, untrained)
            reference = lpips.LPIPS(net=LPIPS_NETS[name], pnet_rand=True, pretrained=True, verbose=False)
        tensors = file_tensors(name)
        for key, parameter in reference.net.named_parameters():
            parameter.data.copy_(tensors["features." + key.split(".", 1)[1]])
        save_file(tensors, tmp_path / f"{name}_features.safetensors")
        trunk = PerceptualTrunk(name, weights_dir=str(tmp_path))

        images, others = image_pair()
        ours_in, theirs_in = images.clone().requires_grad_(), images.clone().requires_grad_()
        ours = trunk.lpips(trunk.features(ours_in), trunk.features(others))
        theirs = reference(theirs_in, others).flatten()
        ours.sum().backward()
        theirs.sum().backward()
        assert theirs.max() > 0.05  # otherwise agreement would prove little
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        scale = theirs_in.grad.abs().max()
        torch.testing.assert_close(ours_in.grad / scale, theirs_in.grad / scale, atol=1e-4, rtol=0)

    # From stlpips_pytorch 0.0.2's own LPIPS(net=..., variant="shift_tolerant") for these closed-form images.
    @pytest.mark.parametrize(
        ("name", "far", "near"),
        [("st_alexnet", 0.8146003, 0.0020409469), ("st_vgg16", 0.6822230, 0.0040364140)],
    )
    def test_equals_recorded_distances_of_the_shift_tolerant_package(self, name, far, near):
        trunk = PerceptualTrunk(name)
        a, b = pattern(40, 56, 2.0), pattern(40, 56, 5.0)
        with torch.no_grad():
            features = trunk.features(torch.cat([a, a]))
            others = trunk.features(torch.cat([b, (a + 0.1 * b).clamp(-1, 1)]))
            distance = trunk.lpips(features, others)
        torch.testing.assert_close(distance, torch.tensor([far, near]), atol=1e-5, rtol=1e-3)

    @pytest.mark.parametrize("name", NAMES)
    def test_gradients_are_finite_for_flat_and_identical_images(self, name, random_trunks):
        trunk = random_trunks[name]
        flat = torch.cat([torch.full((1, 3, 32, 32), value) for value in (-1.0, 0.0, 1.0)])
        for target in (flat, pattern(32, 32, 2.0).expand(3, -1, -1, -1)):
            images = flat.clone().requires_grad_()
            features, target_features = trunk.features(images), trunk.features(target)
            distances = torch.stack(trunk.distances(features, target_features))
            distances.sum().backward()
            assert distances.isfinite().all() and images.grad.isfinite().all()
        identical = trunk.lpips(trunk.features(flat), trunk.features(flat))
        assert identical.abs().max() == 0

    def test_gradient_is_finite_where_all_channels_are_zero(self, random_trunks):
        trunk = random_trunks["alexnet"]
        zeros = [torch.zeros(2, size, 3, 3, requires_grad=True) for size in ARCHITECTURES["alexnet"].channels]
        others = [torch.rand(2, size, 3, 3) for size in ARCHITECTURES["alexnet"].channels]
        distance = trunk.lpips(zeros, others)
        distance.sum().backward()
        assert distance.isfinite().all()
        assert all(layer.grad.isfinite().all() for layer in zeros)


class TestPerceptualTerm:
    def test_is_the_l1_of_unit_vectors_of_each_feature_layer_and_image(self, random_trunks):
        trunk = random_trunks["alexnet"]
        images, others = image_pair()
        with torch.no_grad():
            features, targets = trunk.features(others), trunk.features(images)
            distance, _ = trunk.distances(features, targets)
            alone, _ = trunk.distances([layer[1:2] for layer in features], [layer[1:2] for layer in targets])
        for index in range(3):
            parts = [
                F.l1_loss(F.normalize(f[index], dim=0), F.normalize(t[index], dim=0))
                for f, t in zip(features, targets, strict=True)
            ]
            torch.testing.assert_close(distance[index], torch.stack(parts).mean(), atol=1e-7, rtol=1e-3)
        torch.testing.assert_close(alone, distance[1:2])

    def test_does_not_depend_on_the_scale_of_features(self, random_trunks):
        trunk = random_trunks["alexnet"]
        images, others = image_pair()
        with torch.no_grad():
            features, targets = trunk.features(others), trunk.features(images)
            distance, _ = trunk.distances(features, targets)
            scaled, _ = trunk.distances([100 * layer for layer in features], [3 * layer for layer in targets])
            torch.testing.assert_close(scaled, distance, atol=1e-6, rtol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_to_both_images_equal_those_of_the_formulas(self, random_trunks, dtype):
        trunk = random_trunks["alexnet"]
        channels = ARCHITECTURES["alexnet"].channels
        both = [[torch.randn(3, size, 4, 5).relu().to(dtype) for size in channels] for _ in range(2)]
        weights = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 4.0, -1.0])  # of each image's two distances

        def gradients(distances) -> list[torch.Tensor]:
            features = [[layer.clone().requires_grad_() for layer in layers] for layers in both]
            perceptual, lpips = distances(*features)
            (perceptual @ weights[0] + lpips @ weights[1]).backward()
            return [layer.grad for layers in features for layer in layers]

        def formulas(features, targets):  # on float32, by autograd
            differences = [
                F.normalize(f.float(), dim=1) - F.normalize(t.float(), dim=1) for f, t in zip(features, targets)
            ]
            heads = [len(head) * head.view(1, -1, 1, 1) for head in trunk.heads.split(channels)]
            perceptual = torch.stack([difference.abs().mean(dim=(1, 2, 3)) for difference in differences]).mean(dim=0)
            lpips = [(d.square() * head).sum(dim=1).mean(dim=(1, 2)) for d, head in zip(differences, heads)]
            return perceptual, torch.stack(lpips).sum(dim=0)

        for own, reference in zip(gradients(trunk.distances), gradients(formulas), strict=True):
            assert own.dtype == dtype
            # In bfloat16 the sign of a difference that rounding decides may be wrong.
            error = (own.float() - reference.float()).norm() / reference.float().norm()
            assert error < (1e-5 if dtype.itemsize == 4 else 5e-2)

    def test_the_graph_keeps_three_maps_per_layer(self, random_trunks):
        """The features of the first image, and both unit vectors."""
        trunk = random_trunks["alexnet"]
        both = [[torch.rand(2, size, 4, 5).bfloat16() for size in ARCHITECTURES["alexnet"].channels] for _ in range(2)]
        for layer in both[0]:
            layer.requires_grad_()
        kept = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trunk.distances(*both)
        maps = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() > 384}  # not heads and sums
        assert len(maps) == 3 * len(both[0])


class TestFeatures:
    @pytest.mark.parametrize("name", NAMES)
    def test_features_are_those_of_the_relus_and_survive_later_layers(self, name, random_trunks):
        trunk = random_trunks[name]
        at_once: list[torch.Tensor] = []
        handles = [
            trunk.layers[layer].register_forward_hook(lambda _, __, output: at_once.append(output.detach().clone()))
            for layer in trunk.feature_layers
        ]
        features = trunk.features(pattern(40, 48, 3.0))
        for handle in handles:
            handle.remove()
        assert [feature.shape[1] for feature in features] == list(ARCHITECTURES[name].channels)
        assert len(trunk.layers) == trunk.feature_layers[-1] + 1  # nothing runs after the last feature layer
        for feature, copy in zip(features, at_once, strict=True):
            assert torch.equal(feature, copy) and feature.min() == 0

    @pytest.mark.parametrize("name", NAMES)
    def test_min_size_is_the_smallest_size_that_works(self, name):
        trunk = PerceptualTrunk(name, load_weights=False)
        size = trunk.min_size
        assert all(min(feature.shape) > 0 for feature in trunk.features(torch.zeros(1, 3, size, size + 1)))
        with pytest.raises(ValueError, match=f"at least {size} x {size} pixels and got {size - 1} x {size}"):
            trunk.features(torch.zeros(1, 3, size - 1, size))
        trunk.min_size = 1
        with pytest.raises(RuntimeError):
            trunk.features(torch.zeros(1, 3, size - 1, size))

    @pytest.mark.parametrize("pixels", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64),
                                        torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])  # fmt: skip
    def test_raises_for_what_is_not_an_image_batch(self, pixels, random_trunks):
        with pytest.raises(ValueError, match="floating-point images"):
            random_trunks["alexnet"].features(pixels)

    @pytest.mark.parametrize("name", NAMES)
    def test_keeps_channels_last(self, name, random_trunks):
        pixels = torch.rand(2, 3, 40, 40).contiguous(memory_format=torch.channels_last)
        for feature in random_trunks[name].features(pixels):
            assert feature.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("name", ["alexnet", "st_alexnet"])
    def test_convolutions_follow_autocast_and_distances_stay_float32(self, name, random_trunks):
        trunk = random_trunks[name]
        images, others = image_pair(32)
        with torch.no_grad():
            exact = trunk.distances(trunk.features(images), trunk.features(others))
            with torch.autocast("cpu", torch.bfloat16):
                features, other_features = trunk.features(images), trunk.features(others)
                distances = trunk.distances(features, other_features)
        assert features[-1].dtype == torch.bfloat16
        # bf16 has 8 bits: the clearly different images keep two digits.
        for value, exact_value in zip(distances, exact, strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value[1:], exact_value[1:], rtol=0.05, atol=1e-5)

    def test_counts_flops_on_the_meta_device(self):
        with torch.device("meta"):
            trunk = PerceptualTrunk("vgg16", load_weights=False)
            with FlopCounterMode(display=False) as counter:
                trunk.features(torch.empty(1, 3, 64, 64))
        maps = [(3, 64, 64), (64, 64, 64), (64, 128, 32), (128, 128, 32), (128, 256, 16), (256, 256, 16)]
        maps += [(256, 256, 16), (256, 512, 8), (512, 512, 8), (512, 512, 8)] + 3 * [(512, 512, 4)]
        assert counter.get_total_flops() == sum(2 * 9 * a * b * size * size for a, b, size in maps)


class TestFrozen:
    def test_stays_in_eval_mode_and_has_nothing_to_train(self):
        trunk = PerceptualTrunk("alexnet", load_weights=False)
        parent = nn.Sequential(nn.Linear(2, 2), trunk).train()
        assert parent.training and not any(module.training for module in trunk.modules())
        assert sum(parameter.numel() for parameter in parent.parameters()) == 6
        pixels = torch.rand(1, 3, 40, 40, requires_grad=True)
        trunk.features(pixels)[-1].sum().backward()
        assert pixels.grad.abs().max() > 0
        assert all(not buffer.requires_grad and buffer.grad is None for buffer in trunk.buffers())

    def test_is_not_in_checkpoints(self):
        parent = nn.Sequential(nn.Linear(2, 2), PerceptualTrunk("alexnet", load_weights=False))
        assert set(parent.state_dict()) == {"0.weight", "0.bias"}
        parent.load_state_dict(parent.state_dict(), strict=True)

    def test_moves_with_to(self):
        trunk = PerceptualTrunk("st_alexnet", load_weights=False).to("meta")
        assert all(buffer.device.type == "meta" for buffer in trunk.buffers())


class TestWeights:
    def test_come_from_the_folder_then_the_cache_then_the_download(self, hub_cache, tmp_path, monkeypatch):
        weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
        by_source = {source: file_tensors("squeezenet", seed) for seed, source in enumerate(("web", "cache", "mine"))}
        surplus = {"classifier.1.weight": torch.zeros(2, 2)}  # torchvision's files have the classifier too

        origin = tmp_path / "origin.pth"
        torch.save(by_source["web"] | surplus, origin)
        digest = hashlib.sha256(origin.read_bytes()).hexdigest()[:8]
        origin = origin.rename(tmp_path / f"squeezenet1_1-{digest}.pth")
        monkeypatch.setattr(weights.value, "url", origin.as_uri())
        loaded = PerceptualTrunk("squeezenet", weights_dir=tmp_path)  # a folder without the file is skipped
        assert has_first_weight(loaded, by_source["web"])
        assert (hub_cache / origin.name).exists()

        torch.save(by_source["cache"] | surplus, hub_cache / origin.name)
        loaded = PerceptualTrunk("squeezenet")
        assert has_first_weight(loaded, by_source["cache"])

        save_file(by_source["mine"], tmp_path / "squeezenet_features.safetensors")
        loaded = PerceptualTrunk("squeezenet", weights_dir=tmp_path)
        state = {f"features.{key}": tensor for key, tensor in loaded.layers.named_buffers()}
        assert state.keys() == by_source["mine"].keys()
        assert all(torch.equal(state[key], in_trunk(key, tensor)) for key, tensor in by_source["mine"].items())

    def test_a_download_with_a_wrong_hash_raises(self, hub_cache, tmp_path, monkeypatch):
        origin = tmp_path / "squeezenet1_1-00000000.pth"
        torch.save(file_tensors("squeezenet"), origin)
        weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
        monkeypatch.setattr(weights.value, "url", origin.as_uri())
        with pytest.raises(ValueError, match="invalid hash value"):
            PerceptualTrunk("squeezenet")
        assert not list(hub_cache.iterdir())

    @pytest.mark.parametrize("name", LPIPS_NETS)
    def test_without_any_source_the_error_names_all_three_and_the_remedy(self, name, hub_cache, tmp_path):
        with pytest.raises(ValueError, match=f"weights of the feature network {name} cannot be downloaded") as caught:
            PerceptualTrunk(name, weights_dir=tmp_path)
        message = str(caught.value)
        for part in (
            f"{name}_features.safetensors",
            str(tmp_path),
            str(hub_cache),
            "download.pytorch.org",
            "st_",
        ):
            assert part in message
        assert "\n" not in message
        assert str(pickle.loads(pickle.dumps(caught.value))) == message  # on the way to other processes

    def test_a_server_that_never_answers_does_not_hang_the_start(self, hub_cache, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            for variable in ("https_proxy", "HTTPS_PROXY"):
                monkeypatch.setenv(variable, f"http://127.0.0.1:{silent.getsockname()[1]}")
            urllib.request.install_opener(None)
            monkeypatch.setattr(perceptual_weights, "DOWNLOAD_TIMEOUT_S", 0.2)
            begin = time.monotonic()
            with pytest.raises(ValueError, match="timed out"):
                PerceptualTrunk("alexnet")
            assert time.monotonic() - begin < 5
        assert socket.getdefaulttimeout() is None

    @pytest.mark.parametrize("name", NAMES)
    def test_packages_are_not_imported(self, name, tmp_path, monkeypatch):
        for module in [key for key in sys.modules if key.split(".")[0] in ("lpips", "stlpips_pytorch")]:
            monkeypatch.delitem(sys.modules, module)
        if name in LPIPS_NETS:
            save_file(file_tensors(name), tmp_path / f"{name}_features.safetensors")
        trunk = PerceptualTrunk(name, weights_dir=tmp_path)
        assert not {"lpips", "stlpips_pytorch"} & set(sys.modules)
        heads = trunk.heads.split(trunk.channels)
        assert [tuple(head.shape) for head in heads] == [(size,) for size in ARCHITECTURES[name].channels]
        assert min(head.min() for head in heads) >= 0  # trained heads are constrained so

    def test_the_error_names_a_wrong_file_and_its_tensor(self, tmp_path):
        path = tmp_path / "squeezenet_features.safetensors"
        good = file_tensors("squeezenet")
        key = "features.3.squeeze.bias"
        faults = {
            "has no tensor": {name: tensor for name, tensor in good.items() if name != key},
            r"of shape \(15,\) where \(16,\)": good | {key: torch.zeros(15)},
            "has an unknown tensor 'features.13.bias'": good | {"features.13.bias": torch.zeros(1)},
        }
        for message, tensors in faults.items():
            save_file(tensors, path)
            with pytest.raises(ValueError, match=message) as caught:
                PerceptualTrunk("squeezenet", weights_dir=tmp_path)
            assert str(path) in str(caught.value)
            assert key in str(caught.value) or "unknown" in message
        path.write_bytes(b"not a weight file")
        with pytest.raises(ValueError, match="cannot read the weight file"):
            PerceptualTrunk("squeezenet", weights_dir=tmp_path)

    @pytest.mark.parametrize("content", [b"", b"<html>404</html>", None])
    def test_the_error_names_a_corrupt_cache_file_and_the_remedy(self, content, hub_cache):
        path = hub_cache / "alexnet-owt-7be5be79.pth"
        if content is None:
            torch.save(torch.zeros(3), path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read the weight file .*alexnet-owt.*delete it") as caught:
            PerceptualTrunk("alexnet")
        assert "\n" not in str(caught.value)

    def test_unknown_name_missing_folder_and_missing_package(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="unknown feature network 'vgg19': choose one of vgg16, alexnet"):
            PerceptualTrunk("vgg19")
        with pytest.raises(ValueError, match="which is not a folder"):
            PerceptualTrunk("vgg16", weights_dir=tmp_path / "absent")
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.delitem(sys.modules, "stlpips_pytorch", raising=False)
        with pytest.raises(ValueError, match="pip install stlpips-pytorch"):
            PerceptualTrunk("st_vgg16")
