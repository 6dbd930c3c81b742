"""The pipeline: sampling, reconstruction, interpolation, both folder layouts, and loading without this project."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_latent_prior import ATTRIBUTES, LATENT_DIM, generator, random_priors

from modeling.latent_prior import GaussianPrior
from modeling.pipeline import FITTED_PRIORS, FaceVAEPipeline, slerp
from training.data.images import decode_image

SIZE = tiny.SETTINGS["model"]["sample_size"]
SPATIAL = {"latent_layout": "spatial", "latent_channels": 4, "latent_size": 5, "latent_dim": 100}
PRIORS = ("standard", *FITTED_PRIORS)


def photograph(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pipe() -> FaceVAEPipeline:
    return FaceVAEPipeline(tiny.random_vae(), **random_priors())


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory) -> Path:
    """An exported VAE with its priors, as `training.fit_prior` leaves it."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    pipe.vae.save_pretrained(folder)
    for name in FITTED_PRIORS:
        getattr(pipe, name).save_pretrained(folder / "priors" / name)
    return folder


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    """A saved pipeline."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


# ---- generation ----


@pytest.mark.parametrize("prior", PRIORS)
def test_images_do_not_depend_on_the_batch_size_or_their_number(pipe, prior):
    images = pipe(5, prior, generator=generator(), output_type="pt").images
    assert images.shape == (5, 3, SIZE, SIZE) and 0 <= images.min() and images.max() <= 1 and images.std() > 0.01
    for arguments in ({"num_images": 5, "batch_size": 2}, {"num_images": 3}):
        fewer = pipe(prior=prior, generator=generator(), output_type="pt", **arguments).images
        torch.testing.assert_close(fewer, images[: len(fewer)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prior", PRIORS)
def test_one_generator_per_image(pipe, prior):
    images = pipe(2, prior, generator=[generator(3), generator(4)], output_type="pt").images
    singles = [pipe(1, prior, generator=generator(seed), output_type="pt").images for seed in (3, 4)]
    torch.testing.assert_close(images, torch.cat(singles), atol=1e-5, rtol=1e-5)


def test_output_types(pipe):
    images = {kind: pipe(2, generator=generator(), output_type=kind).images for kind in ("pil", "np", "pt")}
    assert [image.size for image in images["pil"]] == [(SIZE, SIZE)] * 2
    assert images["np"].shape == (2, SIZE, SIZE, 3)
    np.testing.assert_array_equal(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
    assert np.abs(np.asarray(images["pil"][1]) / 255 - images["np"][1]).max() <= 0.51 / 255
    (plain,) = pipe(2, generator=generator(), output_type="np", return_dict=False)
    np.testing.assert_array_equal(plain, images["np"])


def test_the_standard_prior_is_standard_normal(pipe):
    latents = pipe.sample_latents(2000, "standard", generator=generator())
    assert latents.shape == (2000, LATENT_DIM, 1, 1)
    assert latents.mean().abs() < 5 / 32_000**0.5 and (latents.std() - 1).abs() < 5 / 64_000**0.5
    assert torch.equal(pipe.sample_latents(4, "standard", 0.5, generator()), 0.5 * latents[:4])


def test_the_default_prior_is_the_best_that_was_fitted():
    priors, pipe = random_priors(), FaceVAEPipeline(tiny.random_vae())
    for name in PRIORS:
        if name != "standard":
            pipe.register_modules(**{name: priors[name]})
        assert pipe.default_prior == name
        samples = [pipe.sample_latents(2, prior, generator=generator()) for prior in (None, name)]
        assert torch.equal(*samples)


def test_the_spatial_layout_reads_a_flat_latent_as_channels_rows_columns():
    prior = GaussianPrior(100)
    prior.mean.data.copy_(torch.arange(100))
    pipe = FaceVAEPipeline(tiny.random_vae(**SPATIAL), gaussian=prior)
    latents = pipe.sample_latents(2, temperature=0.0)
    assert torch.equal(latents, torch.arange(100.0).view(1, 4, 5, 5).expand(2, -1, -1, -1))
    assert pipe(2, output_type="np").images.shape == (2, SIZE, SIZE, 3)


def test_half_precision_gives_nearly_the_same_images(exported, pipe):
    half = FaceVAEPipeline.from_pretrained(exported, torch_dtype=torch.bfloat16)
    assert half.vae.dtype == half.diffusion.dtype == torch.bfloat16
    for prior in ("standard", "gaussian"):
        images, expected = (each(2, prior, generator=generator(), output_type="np").images for each in (half, pipe))
        assert np.abs(images - expected).mean() < 0.01


# ---- images in ----


def test_reconstruction_decodes_the_posterior_mean(pipe):
    image = photograph()
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae(pixels).sample.clamp(-1, 1) / 2 + 0.5
    for images in (image, [image], np.asarray(image)[None] / 255.0, (pixels + 1) / 2):
        torch.testing.assert_close(pipe.reconstruct(images, "pt").float(), expected, atol=1e-4, rtol=0)
    assert pipe.reconstruct([image, photograph(1)])[1].size == (SIZE, SIZE)


def test_photographs_are_cropped_to_a_centered_square(pipe):
    wide = Image.new("RGB", (3 * SIZE, SIZE))
    wide.paste(photograph(), (SIZE, 0))
    torch.testing.assert_close(pipe.encode(wide), pipe.encode(photograph()))


def test_arrays_of_another_size_type_or_range_raise(pipe):
    with pytest.raises(ValueError):
        pipe.reconstruct(np.zeros((1, SIZE - 1, SIZE, 3), np.float32))
    scaled = torch.linspace(-1, 1, 3 * SIZE**2).view(3, SIZE, SIZE)
    for images in (
        scaled,
        [scaled],
        scaled.numpy().transpose(1, 2, 0),
        255 * scaled.abs(),
        scaled.int(),
        scaled * math.nan,
    ):
        with pytest.raises(ValueError, match=r"must be uint8 or floating-point in \[0, 1\], got .*: scale them"):
            pipe.reconstruct(images)


def test_a_photograph_with_broken_exif_is_encoded_as_it_is(pipe):
    buffer = io.BytesIO()
    photograph().save(buffer, "PNG", exif=b"Exif\0\0no TIFF header")
    with Image.open(buffer) as broken:
        assert torch.equal(pipe.encode(broken), pipe.encode(photograph()))


def test_arrays_and_tensors_of_8_bits_are_scaled(pipe):
    array = np.asarray(photograph())
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for images in (array, [array], tensor, [tensor]):
        torch.testing.assert_close(pipe.encode(images), pipe.encode(photograph()))


def _photographs_of_every_mode() -> dict[str, Image.Image]:
    gray = np.linspace(0, 1, SIZE)[None].repeat(SIZE, 0)
    transparent = photograph().convert("RGBA")
    transparent.putalpha(Image.fromarray((255 * gray).astype(np.uint8)))
    return {
        "RGB": photograph(),
        "L": photograph().convert("L"),
        "16 bits": Image.fromarray((65535 * gray).astype(np.uint16)),
        "16 bits, dark": Image.fromarray((200 * gray).astype(np.uint16)),
        "transparent": transparent,
        "palette": transparent.quantize(16),
    }


@pytest.mark.parametrize("mode", _photographs_of_every_mode())
def test_photographs_become_the_same_as_in_training(pipe, mode, tmp_path):
    image = _photographs_of_every_mode()[mode]
    image.save(tmp_path / "image.png")
    pixels = torch.from_numpy(decode_image((tmp_path / "image.png").read_bytes(), None, SIZE)).permute(2, 0, 1)
    torch.testing.assert_close(pipe.encode(Image.open(tmp_path / "image.png")), pipe.encode(pixels))


@pytest.mark.parametrize("values", [np.float32(0.5), np.int32(70_000), np.int32(-1)])
def test_pixels_without_a_known_range_raise(pipe, values):
    with pytest.raises(ValueError, match="have no known range: convert them to 8 bits"):
        pipe.encode(Image.fromarray(np.full((SIZE, SIZE), values)))


def test_values_a_little_out_of_range_are_clipped(pipe):
    image = np.asarray(photograph()) / 255.0
    over = np.where(image > image.mean(), image + 0.3, image - 0.3).clip(-0.3, 1.3)
    torch.testing.assert_close(pipe.encode(over), pipe.encode(over.clip(0, 1)))


def test_images_are_encoded_in_batches(pipe, monkeypatch):
    images, sizes, encode = [photograph(seed) for seed in range(3)], [], pipe.vae.encode
    expected = pipe.encode(images)
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    torch.testing.assert_close(pipe.encode(images, batch_size=2), expected)
    assert sizes == [2, 1]


def test_an_interpolation_begins_and_ends_with_the_reconstructions(pipe):
    frames = pipe.interpolate(photograph(0), photograph(1), 5, output_type="pt")
    ends = pipe.reconstruct([photograph(0), photograph(1)], "pt")
    assert len(frames) == 5
    torch.testing.assert_close(frames[[0, -1]], ends, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        pipe.interpolate(photograph(0), photograph(1), 1)


def test_slerp_changes_direction_and_norm_linearly():
    east, north = torch.tensor([[[2.0]], [[0.0]]]), torch.tensor([[[0.0]], [[2.0]]])
    for fraction in (0.0, 0.25, 0.5, 1.0):
        angle = fraction * math.pi / 2
        expected = torch.tensor([[[2 * math.cos(angle)]], [[2 * math.sin(angle)]]])
        torch.testing.assert_close(slerp(east, north, fraction), expected)
    assert slerp(east, 3 * east, 0.5).flatten().tolist() == [4, 0]  # one direction: norms only
    assert slerp(east, -east, 0.5).flatten().tolist() == [0, 0]
    assert torch.equal(slerp(torch.zeros(2), torch.ones(2), 0.5), torch.full((2,), 0.5))


@pytest.mark.parametrize("prior", ["standard", "gaussian"])
def test_the_noise_of_latents_becomes_these_latents(pipe, prior):
    latents = torch.randn(3, LATENT_DIM, 1, 1, generator=generator())
    noise = pipe.latents_to_noise(latents, prior)
    torch.testing.assert_close(pipe.noise_to_latents(noise, prior), latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
def test_interpolations_keep_the_norm_of_the_noise(pipe, prior):
    start, end = pipe.sample_latents(2, prior, generator=generator()).split(1)
    middle = pipe.interpolate_latents(start, end, 3, prior)[1:2]
    if prior != "diffusion":  # whose tiny random network is not invertible
        norms = pipe.latents_to_noise(torch.cat([start, middle, end]), prior).flatten(1).norm(dim=1)
        torch.testing.assert_close(norms[1], (norms[0] + norms[2]) / 2, rtol=1e-3, atol=0)
    assert torch.equal(pipe.interpolate_latents(start, end, 3, linear=True)[1:2], torch.lerp(start, end, 0.5))


def test_interpolations_are_not_guided_as_the_noise_is_found_without_guidance(pipe):
    start, end = pipe.sample_latents(2, "diffusion", generator=generator()).split(1)
    noise = pipe.latents_to_noise(torch.cat([start, end]), "diffusion")
    expected = pipe.noise_to_latents(slerp(*noise, 0.5)[None], "diffusion", guidance_scale=1.0)
    assert torch.equal(pipe.interpolate_latents(start, end, 3, "diffusion")[1:2], expected)


# ---- attributes ----


def test_attributes_condition_the_diffusion_prior(pipe):
    def images(**arguments):
        return pipe(2, generator=generator(), output_type="pt", **arguments).images

    assert (images(attributes={"Smiling": 1}) - images()).abs().max() > 1e-4
    for option in ("guidance_scale", "attribute_scale"):
        changed = images(attributes={"Smiling": 1}, **{option: 1})
        assert (changed - images(attributes={"Smiling": 1})).abs().max() > 1e-4
    with pytest.raises(ValueError, match="attributes need the diffusion prior, got the prior 'gaussian'"):
        images(prior="gaussian", attributes={"Smiling": 1})
    assert (images(guidance_scale=1) - images()).abs().max() > 1e-4
    with pytest.raises(ValueError, match="attribute_scale 3 needs attributes"):
        images(attribute_scale=3)
    with pytest.raises(ValueError, match="guidance_scale needs the diffusion prior, got the prior 'standard'"):
        images(prior="standard", guidance_scale=3)
    for value in (-1, 2, math.nan):
        with pytest.raises(ValueError, match=rf"'Smiling' must be from 0 \(absent\) to 1 \(present\), got {value}"):
            images(attributes={"Smiling": value})


def test_edit_adds_directions_to_the_latent(pipe):
    latents, directions = pipe.encode(photograph()), pipe.gaussian.directions
    for kind, index in (("means", 0), ("ridge", 1)):
        edited = latents.flatten() - 2 * directions[index, ATTRIBUTES.index("Eyeglasses")]
        expected = pipe.decode(edited.view_as(latents), "pt")
        torch.testing.assert_close(pipe.edit(photograph(), {"Eyeglasses": -2.0}, kind, "pt"), expected)
    with pytest.raises(ValueError, match="'Hat' is unknown, this model has Smiling, Eyeglasses"):
        pipe.edit(photograph(), {"Hat": 1.0})
    with pytest.raises(ValueError, match="directions must be one of means, ridge, got 'mean'"):
        pipe.edit(photograph(), {"Smiling": 1.0}, "mean")
    with pytest.raises(ValueError, match="'Smiling' is unknown, this model has none"):
        FaceVAEPipeline(tiny.random_vae()).edit(photograph(), {"Smiling": 1.0})


# ---- folders ----


@pytest.mark.parametrize("layout", ["exported", "saved"])
def test_a_loaded_pipeline_generates_bitwise_the_same(pipe, layout, request):
    loaded = FaceVAEPipeline.from_pretrained(request.getfixturevalue(layout))
    assert loaded.fitted_priors == list(FITTED_PRIORS)
    for prior in PRIORS:
        images = [each(2, prior, 0.8, generator(1), output_type="np").images for each in (loaded, pipe)]
        np.testing.assert_array_equal(*images)


def test_a_variant_of_the_vae_loads_with_the_priors(exported, tmp_path):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    FaceVAEPipeline.from_pretrained(exported).vae.half().save_pretrained(tmp_path, variant="fp16")
    loaded = FaceVAEPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.fitted_priors == list(FITTED_PRIORS) and loaded.diffusion.dtype == torch.float16
    loaded.save_pretrained(tmp_path / "saved", variant="fp16")  # of all components
    again = FaceVAEPipeline.from_pretrained(tmp_path / "saved", variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(again.diffusion.network.conv_in.weight, loaded.diffusion.network.conv_in.weight)


def test_a_compiled_component_is_saved_as_it_was(pipe, tmp_path):
    loaded = FaceVAEPipeline(torch.compile(pipe.vae), pipe.gaussian, pipe.diffusion)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"][1] == "AutoencoderKLUltra"
    again = FaceVAEPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.vae.encoder.conv_in.weight, pipe.vae.encoder.conv_in.weight)


def test_weights_may_be_offloaded_to_disk(exported, tmp_path):
    """Their parameters are on the meta device, and are not missing."""
    loaded = FaceVAEPipeline.from_pretrained(exported, device_map={"": "disk"}, offload_folder=tmp_path)
    assert loaded.fitted_priors == list(FITTED_PRIORS) and loaded.gaussian.mean.is_meta
    assert FaceVAEPipeline.from_pretrained(exported, device_map="auto").fitted_priors == list(FITTED_PRIORS)


def test_an_exported_folder_without_priors_and_a_saved_pipeline_without_priors(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("priors"))
    pipe = FaceVAEPipeline.from_pretrained(folder)
    assert pipe.fitted_priors == []
    pipe.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["model_index.json", "pipeline.py", "vae"]
    assert FaceVAEPipeline.from_pretrained(tmp_path / "saved").fitted_priors == []


def test_the_index_names_files_and_no_folder_of_this_machine(exported, tmp_path):
    FaceVAEPipeline.from_pretrained(exported).save_pretrained(tmp_path)
    text = (tmp_path / "model_index.json").read_text()
    index = json.loads(text)
    assert index["_class_name"] == ["pipeline", "FaceVAEPipeline"]
    assert index["vae"] == ["autoencoder_kl_ultra", "AutoencoderKLUltra"]
    assert index["diffusion"] == ["latent_prior", "DiffusionPrior"]
    assert str(exported) not in text


@pytest.mark.parametrize("layout", ["exported", "saved"])
def test_a_repository_loads_from_the_cache_of_the_hub(pipe, layout, request, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "models--someone--faces"
    shutil.copytree(request.getfixturevalue(layout), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = FaceVAEPipeline.from_pretrained("someone/faces", cache_dir=tmp_path, local_files_only=True)
    images = [each(1, "diffusion", generator=generator(), output_type="np").images for each in (loaded, pipe)]
    np.testing.assert_array_equal(*images)


FRESH_PROCESS = """
import json, sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
folder, output = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
images = {}
for prior in ("standard", "gaussian", "diffusion"):
    images[prior] = pipe(3, prior, 0.8, torch.Generator().manual_seed(1), output_type="pt").images
save_file(images, output + "/images.safetensors")
pipe.save_pretrained(output + "/again")
again = DiffusionPipeline.from_pretrained(output + "/again", trust_remote_code=True)
assert torch.equal(again(3, "diffusion", 0.8, torch.Generator().manual_seed(1), output_type="pt").images, images["diffusion"])
for component in (pipe, again, again.vae, again.diffusion):
    assert type(component).__module__.startswith("diffusers_modules."), type(component)
assert not [name for name in sys.modules if name.split(".")[0] in ("modeling", "training")]
"""


@pytest.mark.slow
def test_diffusers_loads_a_saved_pipeline_without_this_project(pipe, saved, tmp_path):
    home = {name: str(tmp_path) for name in ("HOME", "HF_HOME")} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the order of sums depends on it
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH_PROCESS, str(saved), str(tmp_path)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", **home, **threads},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stderr
    for prior, images in load_file(tmp_path / "images.safetensors").items():
        assert torch.equal(images, pipe(3, prior, 0.8, generator(1), output_type="pt").images), prior


# ---- errors ----


def test_a_prior_that_was_not_fitted_raises_with_the_remedy(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("diffusion"))
    pipe = FaceVAEPipeline.from_pretrained(folder)
    expected = rf"\(it has standard, gaussian\).*training.fit_prior {folder} --config FILE --priors diffusion"
    with pytest.raises(ValueError, match=expected):
        pipe(1, "diffusion")
    with pytest.raises(ValueError, match="prior 'normal' does not exist: use one of standard, gaussian"):
        pipe(1, "normal")


def test_arguments_out_of_range_raise(pipe):
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        pipe(0)
    with pytest.raises(ValueError, match="temperature must be a number of at least 0, got nan"):
        pipe(1, temperature=math.nan)
    with pytest.raises(ValueError, match="one generator or 3, got a list of 2"):
        pipe(3, generator=[generator(), generator()])


def test_a_prior_of_another_dimension_raises():
    with pytest.raises(ValueError, match="'gaussian' has 4 dimensions and the latent of the VAE has 16"):
        FaceVAEPipeline(tiny.random_vae(), gaussian=GaussianPrior(4))


def test_incomplete_weights_raise(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["logvar_bias.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack logvar_bias.bias"):
        FaceVAEPipeline.from_pretrained(folder)
