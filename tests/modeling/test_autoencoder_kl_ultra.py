"""The model as diffusers users meet it: saving, loading, dtypes, slicing, tiling, sizes, training, errors.

The checks are those that diffusers makes of its own autoencoders, on configurations that one core can bear.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils.operations import convert_to_fp32
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from modeling import autoencoder_kl_ultra
from modeling.autoencoder_kl_ultra import (
    LOGVAR_MAX,
    LOGVAR_MIN,
    AutoencoderKLUltra,
    ChannelNorm,
    Downsample,
    PCADecoder,
    ResBlock,
    Upsample,
    VectorStem,
)

SMALL = {
    "sample_size": 32,
    "patch_size": 4,
    "encoder_block_out_channels": (32, 64),
    "encoder_layers_per_block": (1, 2),
    "decoder_block_out_channels": (32, 64),
    "decoder_layers_per_block": (2, 1),
    "vector_width": 16,
}
LAYOUTS = {
    "vector": {"latent_layout": "vector", "latent_dim": 48, "latent_channels": 48, "latent_size": 1}
    | {"pca_size": 8, "pca_decode_size": 16},
    "spatial": {"latent_layout": "spatial", "latent_dim": 96, "latent_channels": 6, "latent_size": 4}
    | {"pca_size": 16, "pca_decode_size": 16},
}
KINDS = ["vector", "vector-plain", "spatial", "spatial-plain"]  # plain: without the PCA branch


def settings(kind: str, **changes: object) -> dict:
    layout, _, plain = kind.partition("-")
    return SMALL | LAYOUTS[layout] | ({"pca_size": None} if plain else {}) | changes


def fresh(kind: str, **changes: object) -> AutoencoderKLUltra:
    torch.manual_seed(0)
    return AutoencoderKLUltra(**settings(kind, **changes)).eval()


def awake(kind: str, **changes: object) -> AutoencoderKLUltra:
    """A model whose layers that start at zero speak too, as after training."""
    model = fresh(kind, **changes)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def faces(count: int = 2, height: int = 32, width: int | None = None, seed: int = 1) -> torch.Tensor:
    """Smooth random images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, height // 8 + 1, (width or height) // 8 + 1, generator=generator)
    return F.interpolate(coarse, size=(height, width or height), mode="bilinear").clamp(-1, 1)


def reconstruct(model: AutoencoderKLUltra, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixels).sample


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference over the standard deviation of `b`."""
    return ((a.double() - b.double()).square().mean().sqrt() / b.double().std()).item()


# ---------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back_bit_for_bit(kind, tmp_path):
    model, pixels = awake(kind, latents_mean=[0.5] * 3, scaling_factor=0.7), faces()
    model.save_pretrained(tmp_path)
    loaded, info = AutoencoderKLUltra.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    assert loaded.config.scaling_factor == 0.7
    assert list(loaded.config.latents_mean) == [0.5] * 3
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(reconstruct(loaded, pixels), reconstruct(model, pixels))
    posterior = loaded.encode(pixels).latent_dist
    assert torch.equal(posterior.parameters, model.encode(pixels).latent_dist.parameters)


def test_the_source_file_needs_torch_and_diffusers_only():
    tree = ast.parse(inspect.getsource(autoencoder_kl_ultra))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import would not travel with the file"
            roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "diffusers"}


def test_a_variant_is_saved_beside_the_float32_weights(tmp_path):
    model = awake("vector")
    model.save_pretrained(tmp_path)
    half = copy.deepcopy(model).half()
    half.save_pretrained(tmp_path, variant="fp16")
    weights = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
    loaded = AutoencoderKLUltra.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    pixels = faces().half()
    assert torch.equal(reconstruct(loaded, pixels), reconstruct(half, pixels))
    loaded = AutoencoderKLUltra.from_pretrained(tmp_path)
    assert torch.equal(reconstruct(loaded, faces()), reconstruct(model, faces()))
    weights.unlink()
    with pytest.raises(OSError, match="fp16"):
        AutoencoderKLUltra.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.005), (torch.bfloat16, 0.04)])
def test_loading_in_half_precision(kind, dtype, tolerance, tmp_path):
    model, pixels = awake(kind), faces()
    model.save_pretrained(tmp_path)
    half = AutoencoderKLUltra.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    with torch.no_grad():
        output, full = half(pixels.to(dtype)), model(pixels)
    assert output.sample.dtype == output.posterior.mean.dtype == output.posterior.logvar.dtype == dtype
    assert relative(output.sample, full.sample) < tolerance
    assert relative(output.posterior.mean, full.posterior.mean) < tolerance
    assert torch.isfinite(output.posterior.sample()).all()


def test_config_round_trip(tmp_path):
    for kind in KINDS:
        model = fresh(kind)
        again = AutoencoderKLUltra.from_config(model.config)
        model.save_config(tmp_path)
        read = AutoencoderKLUltra.from_config(AutoencoderKLUltra.load_config(tmp_path))
        wanted = {name: value for name, value in model.config.items() if not name.startswith("_")}
        for other in (again, read):
            config = {name: value for name, value in other.config.items() if not name.startswith("_")}
            assert json.dumps(config, sort_keys=True) == json.dumps(wanted, sort_keys=True)
            shapes = {name: value.shape for name, value in other.state_dict().items()}
            assert shapes == {name: value.shape for name, value in model.state_dict().items()}
        derived = {"block_out_channels", "force_upcast"} if kind.startswith("spatial") else set()
        assert set(wanted) == set(inspect.signature(AutoencoderKLUltra).parameters) | derived


# ---------------------------------------------------------------------- the interface


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_determinism_and_plain_tuples(kind):
    model, pixels = awake(kind), faces(3)
    with torch.no_grad():
        output = model(pixels)
        latents = output.posterior.mode()
        assert output.sample.shape == pixels.shape
        config = model.config
        assert latents.shape == (3, config.latent_channels, config.latent_size, config.latent_size)
        assert latents[0].numel() == config.latent_dim
        assert torch.equal(model(pixels).sample, output.sample)
        assert torch.equal(copy.deepcopy(model)(pixels).sample, output.sample)

        def sample(seed: int) -> torch.Tensor:
            return model(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample

        assert torch.equal(sample(5), sample(5))
        assert not torch.equal(sample(5), sample(6))
        assert not torch.equal(sample(5), output.sample)

        sample, posterior = model(pixels, return_dict=False)
        assert torch.equal(sample, output.sample)
        assert torch.equal(posterior.parameters, output.posterior.parameters)
        assert torch.equal(model.encode(pixels, return_dict=False)[0].parameters, posterior.parameters)
        assert torch.equal(model.decode(latents, return_dict=False)[0], model.decode(latents).sample)
        assert torch.equal(output.to_tuple()[0], output.sample)


@pytest.mark.parametrize("kind", KINDS)
def test_given_noise_is_the_draw(kind):
    model, pixels = awake(kind), faces(3)
    with torch.no_grad():
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn_like(posterior.mean)
        latents = posterior.mean + (0.5 * posterior.logvar).exp() * noise
        expected = model.decode(latents).sample
        sample = model(pixels, noise=noise).sample
        micro_batches = [model(pixels[i : i + 1], noise=noise[i : i + 1]).sample for i in range(3)]
    torch.testing.assert_close(sample, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat(micro_batches), expected, rtol=0, atol=1e-5)


def test_posterior_kl_and_its_bounds():
    model, pixels = awake("spatial", logvar_init=-1.0), faces()
    posterior = model.encode(pixels).latent_dist
    reference = kl_divergence(Normal(posterior.mean.double(), posterior.std.double()), Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl().double(), reference.sum(dim=(1, 2, 3)), rtol=1e-5, atol=0)
    for start, bound in ((1e3, LOGVAR_MAX), (-1e3, LOGVAR_MIN)):
        nn.init.constant_(model.logvar_bias.bias, start)
        assert (model.encode(pixels).latent_dist.logvar == bound).all()


def test_logvar_init_is_the_first_log_variance():
    for kind in ("vector", "spatial"):
        assert (fresh(kind, logvar_init=-3.5).encode(faces()).latent_dist.logvar == -3.5).all()


@pytest.mark.parametrize("kind", ["vector", "spatial"])
def test_convolutions_are_silent_at_first(kind):
    model = fresh(kind)
    nn.init.normal_(model.pca_branch.encoder.linear.weight)
    nn.init.normal_(model.pca_branch.decoder.linear.weight)
    pixels, decoder = faces(), model.pca_branch.decoder
    with torch.no_grad():
        output = model(pixels)
        latents = model.pca_branch.encoder(pixels)
        assert torch.equal(output.posterior.mean, latents)
        assert torch.equal(output.sample, decoder.enlarge(decoder(latents)))
    assert output.sample.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_half_precision_model(kind):
    for dtype in (torch.float16, torch.bfloat16):
        sample = reconstruct(awake(kind).to(dtype), faces().to(dtype))
        assert sample.dtype == dtype
        assert torch.isfinite(sample).all()


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_changes_nothing(kind):
    model, pixels = awake(kind), faces()
    expected = reconstruct(model, pixels)
    model.to(memory_format=torch.channels_last)
    result = reconstruct(model, pixels.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_keeps_the_posterior_in_float32(kind):
    model, pixels = awake(kind), faces()
    full = model(pixels)
    inside = []
    hook = model.decoder.norm_out.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels)
    hook.remove()
    assert inside == [torch.bfloat16], "normalization must not fall back to float32 under autocast"
    assert output.posterior.mean.dtype == output.posterior.logvar.dtype == torch.float32
    assert relative(output.posterior.mean, full.posterior.mean) < 0.04
    assert relative(output.sample, full.sample) < 0.04
    output.sample.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_pca_branch_is_float32_under_autocast():
    model, pixels = fresh("vector"), faces()
    nn.init.normal_(model.pca_branch.encoder.linear.weight)
    nn.init.normal_(model.pca_branch.decoder.linear.weight)
    expected = model(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels)
    torch.testing.assert_close(output.posterior.mean, expected.posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.sample, expected.sample, rtol=0, atol=1e-5)


def test_output_survives_the_launchers_conversion_to_float32():
    # accelerate rebuilds the output from a dict on the way out of a forward pass in mixed precision.
    output = awake("vector").to(torch.bfloat16)(faces().bfloat16())
    converted = convert_to_fp32(output)
    assert type(converted) is type(output)
    assert torch.equal(converted.sample, output.sample.float())
    assert converted.posterior is output.posterior


def test_diffusers_image_processor():
    model = awake("spatial")
    processor = VaeImageProcessor(vae_scale_factor=model.spatial_compression_ratio)
    uint8 = ((faces(1)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    pixels = processor.preprocess(processor.numpy_to_pil(uint8 / 255.0))
    assert pixels.shape == (1, 3, 32, 32)
    sample = reconstruct(model, pixels)
    image = processor.postprocess(sample, output_type="pil")[0]
    expected = ((sample[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    assert image.size == (32, 32)
    assert torch.equal(torch.tensor(list(image.tobytes()), dtype=torch.uint8), expected.flatten())


# ---------------------------------------------------------------------- memory savers


@pytest.mark.parametrize("kind", KINDS)
def test_slicing_changes_nothing(kind):
    model, pixels = awake(kind), faces(3)
    expected, calls = reconstruct(model, pixels), []
    hooks = [
        part.register_forward_hook(lambda module, args, out: calls.append(len(out)))
        for part in (model.encoder, model.decoder)
    ]
    model.enable_slicing()
    sliced = reconstruct(model, pixels)
    assert calls == [1] * 6
    torch.testing.assert_close(sliced, expected, rtol=0, atol=1e-5)
    model.disable_slicing()
    assert torch.equal(reconstruct(model, pixels), expected)
    assert calls == [1] * 6 + [3] * 2
    for hook in hooks:
        hook.remove()


def test_an_image_that_fits_in_one_tile_is_not_changed_by_tiling():
    for kind in ("spatial", "spatial-plain"):
        model, pixels = awake(kind), faces()
        expected = reconstruct(model, pixels)
        model.enable_tiling()
        assert torch.equal(reconstruct(model, pixels), expected)


def test_large_images_in_tiles():
    model, pixels = awake("spatial"), faces(2, 72, 40)
    full, latents = reconstruct(model, pixels), model.encode(pixels).latent_dist.mean
    sizes = []
    hook = model.encoder.register_forward_hook(lambda module, args, out: sizes.append(max(args[0].shape[2:])))
    model.enable_tiling()
    tiled = reconstruct(model, pixels)
    hook.remove()
    assert len(sizes) == 6
    assert max(sizes) == 32
    assert tiled.shape == pixels.shape
    # A tile has zero padding at its borders, so the result is approximate; an unrelated image has a
    # relative error of about 1.4.
    assert 0 < relative(model.encode(pixels).latent_dist.mean, latents) < 0.8
    assert 0 < relative(tiled, full) < 0.8
    model.disable_tiling()
    assert torch.equal(reconstruct(model, pixels), full)


@pytest.mark.parametrize(("height", "width", "factor"), [(20, 28, 2), (5, 4, 4), (1, 7, 3)])
def test_the_pca_image_is_enlarged_like_interpolate(height, width, factor):
    decoder = PCADecoder(1, factor, 1)
    image = torch.randn(2, 3, height, width)
    expected = torch.nn.functional.interpolate(image, scale_factor=factor, mode="bicubic", align_corners=False)
    torch.testing.assert_close(decoder.enlarge(image), expected, rtol=0, atol=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(decoder.enlarge(image), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_norm_is_that_of_each_positions_channels(layout):
    norm = ChannelNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    maps = (3 + 2 * torch.randn(2, 8, 5, 6)).to(memory_format=layout)
    mean, deviation = maps.mean(dim=1, keepdim=True), maps.std(dim=1, keepdim=True, correction=0)
    expected = (maps - mean) / deviation * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(maps), expected, rtol=1e-4, atol=1e-4)
    assert norm(maps).is_contiguous(memory_format=layout), "no copy for the next convolution"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_lie_in_memory_as_their_weights_do(layout):
    """Strides of axes of length 1 included: DDP compares them, and copies each step what differs."""
    model = awake("vector").to(memory_format=layout)
    model(faces(2).to(memory_format=layout), sample_posterior=True).sample.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_convolution_gets_maps_in_the_memory_format_of_the_model(kind, layout):
    """Otherwise cuDNN copies the map first. The vector layout's first map is small, and the output of a linear layer."""
    model = awake(kind).to(memory_format=layout)
    checked = []

    def check(module, args, out):
        assert args[0].is_contiguous(memory_format=layout), "input"
        assert out.is_contiguous(memory_format=layout), "output"
        checked.append(module)

    small = [module.conv for module in model.modules() if isinstance(module, VectorStem)]
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d) and each not in small]
    for module in convolutions:
        module.register_forward_hook(check)
    model(faces(2).to(memory_format=layout), sample_posterior=True)
    assert len(checked) == len(convolutions) > 10


@pytest.mark.parametrize("decode_size", [32, 16])
def test_tiling_the_pca_branch_is_exact(decode_size):
    model = fresh("spatial", pca_decode_size=decode_size)
    nn.init.normal_(model.pca_branch.encoder.linear.weight)
    nn.init.normal_(model.pca_branch.decoder.linear.weight)
    pixels = faces(1, 64)
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mean
        expected = model.decode(latents).sample
        model.enable_tiling()
        torch.testing.assert_close(model.encode(pixels).latent_dist.mean, latents, rtol=0, atol=1e-5)
        error = (model.decode(latents).sample - expected).abs()
    if decode_size == 16:
        # Enlarging reaches two pixels of the PCA image, four of the image, across a tile's border. Tiles
        # begin at 0, 24 and 32 and end at 32, 56 and 64.
        near = torch.zeros(64, dtype=torch.bool)
        for border in (24, 32, 56):
            near[border - 4 : border + 4] = True
        assert error[..., near, :].max() > 1e-3
        error = error[..., ~near, :][..., ~near]
    assert error.max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", [(20, 20), (17, 9), (5, 33), (8, 8), (9, 8)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0.25), (8, 0.0), (8, 0.5), (1, 0.25)])
def test_blending_tiles_of_a_local_function_gives_the_function(shape, tile, overlap):
    model = fresh("spatial")
    model.tile_overlap_factor = overlap
    x = torch.randn(1, 2, *shape)

    def enlarge(part: torch.Tensor) -> torch.Tensor:
        return part.repeat_interleave(4, 2).repeat_interleave(4, 3)

    up = model._tiled(x, enlarge, tile, unit=1, scale=4)
    torch.testing.assert_close(up, enlarge(x), rtol=0, atol=1e-6)
    down = model._tiled(up, lambda part: F.avg_pool2d(part, 4), 4 * tile, unit=4, scale=1 / 4)
    torch.testing.assert_close(down, x, rtol=0, atol=1e-6)


def test_tiles_that_disagree_are_blended_without_a_seam():
    model, count = fresh("spatial"), iter(range(9))
    x = torch.zeros(1, 1, 20, 8)
    blended = model._tiled(x, lambda part: part + next(count), 8, unit=1, scale=1)[0, 0, :, 0]
    # Tiles begin at 0, 6 and 12; over their two common positions the weights are 1 : 1/2, then 1/2 : 1.
    expected = [0.0] * 6 + [1 / 3, 2 / 3] + [1.0] * 4 + [4 / 3, 5 / 3] + [2.0] * 6
    torch.testing.assert_close(blended, torch.tensor(expected))


def test_tiling_refusals():
    with pytest.raises(NotImplementedError, match="spatial latent.*whole image.*enable_slicing"):
        fresh("vector").enable_tiling()
    model = fresh("spatial")
    with pytest.raises(ValueError, match="tile_sample_min_size must be a positive multiple of 8, got 20"):
        model.enable_tiling(tile_sample_min_size=20)
    with pytest.raises(ValueError, match="tile_overlap_factor must be .*got 0.7"):
        model.enable_tiling(tile_overlap_factor=0.7)
    assert not model.use_tiling


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_recomputes_and_changes_nothing(kind):
    pixels = faces()
    noise = torch.randn(2, *awake(kind).encode(pixels).latent_dist.mean.shape[1:])
    results = []
    for checkpointing in (False, True):
        model, calls = awake(kind).train(), []
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        blocks = [block for block in model.modules() if isinstance(block, ResBlock)]
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        output = model(pixels, noise=noise)
        loss = (output.sample - pixels).square().mean() + 1e-3 * output.posterior.kl().mean()
        loss.backward()
        assert len(calls) == len(blocks) * (2 if checkpointing else 1)
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing
    (loss, gradients), (loss_again, gradients_again) = results
    assert abs(loss - loss_again) <= 1e-6
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=0, atol=1e-6, msg=name)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_every_parameter(kind):
    model = fresh(kind).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pixels, losses = faces(4), []
    for _ in range(5):  # layers that start at zero let no gradient through at first
        noise = torch.randn(4, *model.encode(pixels).latent_dist.mean.shape[1:])
        output = model(pixels, noise=noise)
        loss = (output.sample - pixels).square().mean() + 1e-3 * output.posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, before[name]), f"{name} did not move"
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize("kind", ["spatial", "spatial-plain"])
def test_spatial_takes_other_sizes(kind):
    model = awake(kind)
    for height, width in ((8, 8), (24, 56), (64, 32)):
        pixels = faces(1, height, width)
        latents = model.encode(pixels).latent_dist.mean
        assert latents.shape == (1, 6, height // 8, width // 8)
        assert model.decode(latents).sample.shape == pixels.shape
    with pytest.raises(ValueError, match="multiples of 8, got 30x32: resize or pad"):
        model.encode(faces(1, 30, 32))


def test_vector_takes_its_own_size_only():
    model = awake("vector")
    for height, width in ((64, 64), (32, 40), (16, 16)):
        with pytest.raises(ValueError, match=f"32x32 pixels only, got {height}x{width}: resize them"):
            model.encode(faces(1, height, width))


def test_wrong_shapes_are_named():
    model = fresh("vector")
    for shape in ((3, 32, 32), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"images .* shape \(N, 3, height, width\), got \("):
            model.encode(torch.zeros(shape))
    for shape in ((2, 48), (2, 48, 2, 2), (2, 47, 1, 1)):
        with pytest.raises(ValueError, match=r"latents .* shape \(N, 48, 1, 1\), got \("):
            model.decode(torch.zeros(shape))
    for shape in ((6, 4, 4), (2, 5, 4, 4)):
        with pytest.raises(ValueError, match=r"latents .* shape \(N, 6, height, width\), got \("):
            fresh("spatial").decode(torch.zeros(shape))


@pytest.mark.parametrize("sizes", [(8, 8), (8, 32), (32, 8), (32, 32)])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_other_depths_and_pca_sizes(sizes, stages):
    widths = (16, 32, 64)[:stages]
    model = awake(
        "vector",
        pca_size=sizes[0],
        pca_decode_size=sizes[1],
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * stages,
        decoder_layers_per_block=(0,) * stages,
    )
    assert reconstruct(model, faces()).shape == (2, 3, 32, 32)
    # The PCA image enters the stages that are not finer than it.
    finer = [4 * 2**index < 32 // sizes[1] for index in range(stages)]
    assert [factor == 0 for factor in model.decoder.pca_factors] == finer


def test_the_defaults_hold_what_they_promise():
    with torch.device("meta"):
        model = AutoencoderKLUltra()
        with FlopCounterMode(display=False) as counter:
            output = model(torch.zeros(1, 3, 256, 256))
    assert output.posterior.mean.shape == (1, 1024, 1, 1)
    assert output.sample.shape == (1, 3, 256, 256)
    assert sum(parameter.numel() for parameter in model.parameters()) >= 50e6
    assert counter.get_total_flops() <= 15e9


INVALID = [
    ("vector", {"latent_dim": 50}, r"latent_dim must be .* 48 x 1\^2 = 48, got 50"),
    ("spatial", {"latent_dim": 48}, r"latent_dim must be .* 6 x 4\^2 = 96, got 48"),
    ("vector", {"latent_layout": "flat"}, "latent_layout must be 'vector' or 'spatial', got 'flat'"),
    ("vector", {"latent_layout": "spatial"}, "latent_size must be .* at least 2 for 'spatial', got 1 for 'spatial'"),
    ("spatial", {"latent_layout": "vector"}, "latent_size must be 1 for latent_layout 'vector' .*got 4 for 'vector'"),
    (
        "vector",
        {"encoder_layers_per_block": (1,)},
        r"encoder_layers_per_block must .* each of the 2 stages .*got \(1,\)",
    ),
    (
        "vector",
        {"decoder_layers_per_block": (1, 1, 1)},
        r"decoder_layers_per_block must .* each of the 2 stages .*got \(1, 1, 1\)",
    ),
    ("vector", {"encoder_layers_per_block": (-1, 1)}, r"encoder_layers_per_block must .* at least 0.*got \(-1, 1\)"),
    ("vector", {"decoder_layers_per_block": (1, -2)}, r"decoder_layers_per_block must .* at least 0.*got \(1, -2\)"),
    ("vector", {"encoder_layers_per_block": (1, 1.0)}, r"encoder_layers_per_block must list integers.*got \(1, 1.0\)"),
    ("vector", {"encoder_layers_per_block": (True, 1)}, r"encoder_layers_per_block .*got \(True, 1\)"),
    (
        "vector",
        {"decoder_block_out_channels": (32, 64, 64), "decoder_layers_per_block": (1, 1, 1)},
        r"decoder_block_out_channels must .* each of the 2 stages .*got \(32, 64, 64\)",
    ),
    (
        "vector",
        {"encoder_block_out_channels": (38, 64)},
        "encoder_block_out_channels must be multiples of 4, .*got 38 before 64",
    ),
    (
        "vector",
        {"decoder_block_out_channels": (33, 64)},
        "decoder_block_out_channels must be multiples of 4, .*got 33 before 64",
    ),
    ("vector", {"encoder_block_out_channels": (32.0, 64)}, r"must list integers of at least 1.*got \(32.0, 64\)"),
    ("vector", {"encoder_block_out_channels": (8, 64)}, "4 times each .* a multiple of the next, got 8 before 64"),
    ("vector", {"sample_size": 36}, "sample_size must be a multiple of .* 4 x 2 = 8, got 36"),
    ("spatial", {"patch_size": 2}, "sample_size must be latent_size 4 x .* 2 x 2 = 4, got 32"),
    ("vector", {"pca_size": 7}, "pca_size must divide sample_size 32 .*got 7"),
    ("vector", {"pca_size": 64}, "pca_size must divide sample_size 32 .*got 64"),
    ("vector", {"pca_decode_size": 12}, "pca_decode_size must divide sample_size 32 .*got 12"),
    ("spatial", {"pca_size": 2}, "pca_size must .* multiple of latent_size 4, got 2"),
    ("vector", {"pca_size": 2}, r"latent_channels must be at most .* = 12, .*got 48: raise pca_size"),
    (
        "vector",
        {"sample_size": 48, "pca_decode_size": 16},
        "pca_decode_size 16 is 1/3 of sample_size 48, .* at 1/4 .*multiple of 3",
    ),
    ("vector", {"pca_size": "8"}, "pca_size must be an integer of at least 1, got '8'"),
    ("vector", {"pca_size": 0}, "pca_size must be an integer of at least 1, got 0"),
    ("vector", {"patch_size": 0}, "patch_size must be an integer of at least 1, got 0"),
    ("vector", {"patch_size": 4.0}, "patch_size must be an integer of at least 1, got 4.0"),
    ("vector", {"vector_width": 0}, "vector_width must be an integer of at least 1, got 0"),
    (
        "vector",
        {"encoder_block_out_channels": (), "encoder_layers_per_block": ()},
        r"encoder_block_out_channels must list integers .*got \(\)",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "message"), INVALID)
def test_invalid_sizes_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        AutoencoderKLUltra(**settings(kind, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "channels", [(8, 16), (8, 8), (4, 16), (12, 16)]
)  # coarse: groups and repetitions of 2, 4, 1, 3
def test_resampling_is_a_convolution_beside_shuffled_channels(channels, memory_format):
    """DC-AE's resampling, in the words of its paper; the layers compute it in another order."""
    fine, coarse = channels
    torch.manual_seed(0)
    down, up = Downsample(fine, coarse), Upsample(coarse, fine)
    assert down.state_dict().keys() == up.state_dict().keys() == {"conv.weight", "conv.bias"}
    x = torch.randn(2, fine, 6, 4).to(memory_format=memory_format)
    grouped = F.pixel_unshuffle(x, 2).unflatten(1, (coarse, -1)).mean(dim=2)
    assert torch.allclose(down(x), F.pixel_unshuffle(down.conv(x), 2) + grouped, atol=1e-6)
    x = torch.randn(2, coarse, 3, 2).to(memory_format=memory_format)
    repeated = x.repeat_interleave(4 * fine // coarse, dim=1)
    made = up(x)
    assert torch.allclose(made, F.pixel_shuffle(up.conv(x) + repeated, 2), atol=1e-6)
    assert made.is_contiguous(memory_format=memory_format)
