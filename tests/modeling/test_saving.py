"""Every way of saving carries the source, and the result loads in a process without this project."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from test_autoencoder_kl_ultra import awake, faces, fresh, reconstruct
from tiny_stable_diffusion import stable_diffusion

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra

SOURCE = Path(inspect.getfile(AutoencoderKLUltra))
FRESH_PROCESS = """
import sys
sys.modules["modeling"] = sys.modules["training"] = None  # out of reach, even where the project is installed
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file
folder, component = sys.argv[1], sys.argv[3]
absent = {"text_encoder": None, "tokenizer": None} if component == "vae" else {}
torch.set_num_threads(int(sys.argv[2]))
model = AutoModel.from_pretrained(folder + "/model", trust_remote_code=True)
model.save_pretrained(folder + "/model2")
model = AutoModel.from_pretrained(folder + "/model2", trust_remote_code=True)
type(model).from_pretrained(folder + "/model2").save_pretrained(folder + "/model3")
pipe = DiffusionPipeline.from_pretrained(folder + "/pipe", trust_remote_code=True, **absent)
pipe.save_pretrained(folder + "/pipe2")
pipe = DiffusionPipeline.from_pretrained(folder + "/pipe2", trust_remote_code=True, **absent)
in_pipe = getattr(pipe, component)
pixels = load_file(folder + "/pixels.safetensors")["pixels"]
with torch.no_grad():
    save_file({"model": model(pixels).sample, "in_pipe": in_pipe(pixels).sample}, folder + "/samples.safetensors")
"""


@pytest.mark.parametrize("kind", ["vector", "spatial"])
def test_saved_and_loaded_twice_without_the_project(kind, tmp_path):
    model, pixels = awake(kind), faces()
    model.save_pretrained(tmp_path / "first")
    AutoencoderKLUltra.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "model")
    component = "vae" if kind == "spatial" else "unet"  # no pipeline of diffusers takes a vector latent
    if component == "vae":
        stable_diffusion(model).save_pretrained(tmp_path / "pipe")
    else:
        diffusers.DDPMPipeline(unet=model, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH_PROCESS, str(tmp_path), str(torch.get_num_threads()), component],
        cwd=tmp_path / "home",
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for folder in ("first", "model", "model2", "model3", f"pipe/{component}", f"pipe2/{component}"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["auto_map"] == {"AutoModel": "autoencoder_kl_ultra.AutoencoderKLUltra"}, folder
        assert (tmp_path / folder / SOURCE.name).read_bytes() == SOURCE.read_bytes(), folder
    samples = load_file(tmp_path / "samples.safetensors")
    assert torch.equal(samples["model"], reconstruct(model, pixels))
    assert torch.equal(samples["in_pipe"], reconstruct(model, pixels))


def test_push_to_hub_uploads_the_source(monkeypatch, tmp_path):
    uploaded = {}

    def upload(self, folder, *args, **kwargs):
        uploaded.update({path.name: path.read_bytes() for path in Path(folder).iterdir()})

    monkeypatch.setattr(AutoencoderKLUltra, "_upload_folder", upload)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # looking for a card would retry for minutes
    for module in (diffusers.utils.hub_utils, diffusers.models.modeling_utils):
        monkeypatch.setattr(module, "create_repo", lambda repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
    model = fresh("vector")
    for push in (
        lambda: model.push_to_hub("someone/faces"),
        lambda: model.save_pretrained(str(tmp_path / "faces"), push_to_hub=True),
    ):
        uploaded.clear()
        push()
        assert uploaded[SOURCE.name] == SOURCE.read_bytes() and b"auto_map" in uploaded["config.json"]


def test_a_pipeline_passes_its_options_on(tmp_path):
    stable_diffusion(fresh("spatial").half()).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
