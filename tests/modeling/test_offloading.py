"""Weights that are moved, cast or adapted through hooks on a module's forward: the images stay exact."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from test_autoencoder_kl_ultra import awake, faces, reconstruct

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra

CPU = torch.device("cpu")
LAYOUTS = ["vector", "spatial"]


@pytest.mark.parametrize("kind", ["vector", "vector-plain", "spatial", "spatial-plain"])
def test_every_weight_is_used_by_the_forward_of_its_module(kind):
    model, called = awake(kind), set()
    with_parameters = {
        name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))
    }
    for name in with_parameters:
        assert not list(model.get_submodule(name).children()), f"{name} owns weights and submodules"
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        model.decode(model.encode(faces()).latent_dist.mean)
    assert called == with_parameters and "logvar_bias" in with_parameters


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("method", ["cpu", "disk", "device_map", "block_level", "leaf_level"])
def test_offloading_changes_no_bit(kind, method, tmp_path):
    model, pixels = awake(kind), faces()
    expected = reconstruct(model, pixels)
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mode()
    if method == "cpu":
        cpu_offload(model, execution_device=CPU)
    elif method == "disk":
        disk_offload(model, tmp_path / "offload", execution_device=CPU)
    elif method == "device_map":
        model.save_pretrained(tmp_path / "model")
        device_map = {name: "cpu" for name, _ in model.named_children()} | {"decoder": "disk", "logvar_bias": "disk"}
        model = AutoencoderKLUltra.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
        )
        assert next(model.decoder.parameters()).is_meta
    else:
        model.enable_group_offload(
            CPU, CPU, offload_type=method, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path / "offload")
        )
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model.encode(pixels).latent_dist.mode(), latents)
            assert torch.equal(model.decode(latents).sample, expected)
        assert torch.equal(reconstruct(model, pixels), expected)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting_rounds_the_weights_only(kind, storage, compute):
    cast, rounded, pixels = awake(kind), awake(kind), faces().to(compute)
    cast.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    layers = [m for name, m in rounded.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    for layer in layers:
        layer.to(storage).to(compute)
    with torch.no_grad():
        output, expected = cast(pixels), rounded(pixels)
        assert {p.dtype for p in cast.encoder.conv_in.parameters()} == {storage}
    assert output.sample.dtype == compute
    assert torch.equal(output.sample, expected.sample)
    assert torch.equal(output.posterior.parameters, expected.posterior.parameters)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_lora_on_each_layer_changes_the_image_and_merges(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model, pixels = awake(kind), faces()
    plain = reconstruct(model, pixels)
    layers = [name for name, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    for layer in layers:
        config = peft.LoraConfig(r=2, target_modules=[layer])
        adapted = peft.get_peft_model(awake(kind), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        changed = reconstruct(adapted, pixels)
        assert not torch.allclose(changed, plain, atol=1e-5), layer
        merged = reconstruct(adapted.merge_and_unload(), pixels)
        torch.testing.assert_close(merged, changed, rtol=0, atol=1e-4)
