"""Half precision, ONNX and `.pth`: the same model, as near as each format can be."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoModel
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.data.synthetic_faces.render import render_face
from training.pca_init import fit_pca_branch
from training.publish import export_formats
from training.run_files import list_checkpoints

# Largest allowed differences from float32, in latents (of standard deviation 1) and images (in [-1, 1]). Rounding to 11
# and 8 bits is 2^-12 and 2^-9 of a value; a handful of layers add up.
TOLERANCE = {"fp16": 0.02, "bf16": 0.15}


@pytest.fixture(scope="module")
def faces_pixels() -> torch.Tensor:
    size = tiny.SETTINGS["model"]["sample_size"]
    crops = (Image.fromarray(render_face(number)).crop((0, 20, 178, 198)) for number in range(24))
    return torch.stack([pil_to_tensor(crop.resize((size, size))) for crop in crops])


@pytest.fixture(scope="module", params=["vector", "spatial"])
def trained(request, tmp_path_factory, faces_pixels) -> Path:
    """An exported model of each layout, with a fitted PCA branch and convolutions that are not zero."""
    torch.manual_seed(0)
    settings = dict(tiny.SETTINGS["model"])
    if request.param == "spatial":
        settings |= {"latent_dim": 100, "latent_layout": "spatial", "latent_channels": 4, "latent_size": 5}
    model = AutoencoderKLUltra(**settings)
    fit_pca_branch(model, faces_pixels, 0.05)
    with torch.no_grad():
        for last in (model.encoder.head.out, model.decoder.conv_out):
            last.weight.normal_(0, 0.02)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    return folder


def test_a_variant_is_finite_and_close(trained, faces_pixels):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    vae = AutoencoderKLUltra.from_pretrained(trained)
    pixels = faces_pixels[:4].float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        image = vae.decode(latents).sample
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        assert export_formats.main([str(trained), "--variant", variant]) == 0
        weights = load_file(trained / f"diffusion_pytorch_model.{variant}.safetensors")
        assert {value.dtype for value in weights.values()} == {dtype}
        half = AutoencoderKLUltra.from_pretrained(trained, variant=variant, torch_dtype=dtype)
        with torch.no_grad():
            half_latents = half.encode(pixels.to(dtype)).latent_dist.mean
            half_image = half.decode(latents.to(dtype)).sample
        assert half_latents.isfinite().all() and half_image.isfinite().all()
        differences = [(half_latents.float() - latents).abs().max(), (half_image.float() - image).abs().max()]
        assert 0 < max(differences) < TOLERANCE[variant], (variant, differences)
    after = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert {name: after[name] for name in before} == before  # config.json and the float32 weights are as they were


def test_weights_beyond_half_precision_raise(tmp_path, capsys):
    model = AutoencoderKLUltra(**tiny.SETTINGS["model"])
    with torch.no_grad():
        model.pca_branch.encoder.linear.weight[0, 0] = 70_000.0  # above 65,504, the largest value of fp16
    model.save_pretrained(tmp_path / "model")
    assert export_formats.main([str(tmp_path / "model"), "--variant", "fp16"]) == 2
    assert "pca_branch.encoder.linear.weight has weights that fp16 cannot hold" in capsys.readouterr().err
    assert not list((tmp_path / "model").glob("*fp16*"))
    assert export_formats.main([str(tmp_path / "model"), "--variant", "bf16"]) == 0


def test_a_pth_holds_config_and_weights_and_no_code(trained, tmp_path, faces_pixels):
    assert export_formats.main([str(trained), "--pth", str(tmp_path / "vae.pth")]) == 0
    saved = torch.load(tmp_path / "vae.pth", weights_only=True)
    json.dumps(saved["config"])  # plain values
    rebuilt = AutoencoderKLUltra.from_config(saved["config"]).eval()
    rebuilt.load_state_dict(saved["state_dict"])
    vae = AutoencoderKLUltra.from_pretrained(trained)
    assert dict(rebuilt.config).keys() >= saved["config"].keys()
    pixels = faces_pixels[:2].float() / 127.5 - 1
    with torch.no_grad():
        assert torch.equal(rebuilt(pixels).sample, vae(pixels).sample)


@pytest.mark.slow
def test_onnx_computes_what_torch_computes(trained, tmp_path, faces_pixels, capsys):
    reason = "optional: pip install onnx onnxscript onnxruntime"
    pytest.importorskip("onnxscript", reason=reason)
    runtime = pytest.importorskip("onnxruntime", reason=reason)
    assert export_formats.main([str(trained), "--onnx", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: at most " in out for name in ("latent_mean", "latent_logvar", "image"))
    encoder, decoder = (runtime.InferenceSession(str(tmp_path / f"{name}.onnx")) for name in ("encoder", "decoder"))
    vae = AutoencoderKLUltra.from_pretrained(trained)
    for count in (1, 3):
        pixels = faces_pixels[:count].float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
            image = vae.decode(posterior.mean).sample
        mean, logvar = encoder.run(["latent_mean", "latent_logvar"], {"pixels": pixels.numpy()})
        (decoded,) = decoder.run(["image"], {"latents": mean})
        for result, expected in ((mean, posterior.mean), (logvar, posterior.logvar), (decoded, image)):
            torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("package", ("onnxruntime", "onnxscript"))
def test_onnx_without_its_packages_names_what_to_install(trained, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    if package == "onnxscript" and not importlib.util.find_spec("onnxruntime"):
        monkeypatch.setitem(sys.modules, "onnxruntime", sys)
    assert export_formats.main([str(trained), "--onnx", str(tmp_path)]) == 2
    assert f"ONNX needs {package}, which is not installed: pip install" in capsys.readouterr().err


def test_errors_are_one_line(trained, tmp_path, capsys):
    for arguments, expected in (
        ([str(tmp_path), "--variant", "fp16"], "holds no model: looked for"),
        ([str(trained), "--pth", str(tmp_path / "nowhere" / "vae.pth")], "make it first"),
    ):
        assert export_formats.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and expected in err and err.count("\n") == 1


def test_a_checkpoint_does_not_get_a_variant(finished, capsys):
    checkpoint = list_checkpoints(finished.folder)[-1]
    assert export_formats.main([str(checkpoint), "--variant", "fp16"]) == 2
    assert "belongs to a checkpoint, which is removed when a better one comes" in capsys.readouterr().err


def test_incomplete_weights_raise(trained, tmp_path, capsys):
    config = json.loads((trained / "config.json").read_text())
    broken = tmp_path / "broken"
    AutoencoderKLUltra.from_pretrained(trained).save_pretrained(broken)
    (broken / "config.json").write_text(json.dumps({**config, "encoder_layers_per_block": [2, 1]}))
    assert export_formats.main([str(broken), "--pth", str(tmp_path / "vae.pth")]) == 2
    assert "do not fit its config.json, such as encoder.stages.0.1" in capsys.readouterr().err


def test_the_class_by_name_finds_the_variant_too(trained):
    export_formats.write_variant(trained, "fp16")
    half = AutoModel.from_pretrained(str(trained), trust_remote_code=True, variant="fp16", torch_dtype=torch.float16)
    assert half.dtype == torch.float16
