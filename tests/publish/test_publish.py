"""Publishing: what goes, what never goes, and an upload to a stand-in for the Hub that misbehaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from fake_hub import TOKEN, HubStandIn
from safetensors.torch import save_file

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.config import HubConfig
from training.publish import stage as publish
from training.publish.export import export_model
from training.publish.hub import PushError, check_access, files_to_publish, find_secrets, push

ROOT = Path(__file__).parents[2]
CONFIG = HubConfig(push=True, repo_id="org/faces-vae", private=True)
MODEL_FILES = {"README.md", "autoencoder_kl_ultra.py", "config.json", "diffusion_pytorch_model.safetensors"}
SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 11,
    "a GitHub token": "ghp_" + "x1Y2" * 9,
    "an AWS key": "AKIA" + "ABCD" * 4,
    "a Google key": "AIza" + "Sy0_-" * 7,
    "a Slack token": "xoxb-123456789012-abcdef",
    "an API key": "sk-proj-" + "a1B2" * 8,
    "a JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln",
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "a password in an address": "https://me:swordfish@example.org/data",
}


@pytest.fixture
def model(tmp_path) -> Path:
    """An exported model with a card, and beside it what must stay at home."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    export_model(AutoencoderKLUltra(**tiny.SETTINGS["model"]), folder)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Faces\n")
    for name in ("optimizer.bin", "training.log", "trainer_state.json", "notes.py", "run/config.json", ".env"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"password {SECRETS['a Hugging Face token']}")
    return folder


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Pauses between attempts, which are recorded and not slept."""
    recorded: list[float] = []
    monkeypatch.setattr(time, "sleep", recorded.append)
    return recorded


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No token, and nothing that answers."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(offline, waits, monkeypatch):
    with HubStandIn() as alternative:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", alternative.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield alternative


def bytes_of(folder: Path, names: set[str] = MODEL_FILES) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


# ---------------------------------------------------------------------- what goes


def test_exactly_the_files_of_the_model_go_bit_by_bit(hub, model):
    assert push(model, CONFIG) == f"{hub.endpoint}/org/faces-vae"
    repository = hub.models["org/faces-vae"]
    assert repository.files == bytes_of(model)
    assert repository.private and len(repository.commits) == 1
    assert repository.lfs == {"diffusion_pytorch_model.safetensors"}  # weights through large-file storage


def test_priors_variants_and_pictures_belong_and_their_neighbours_do_not(model):
    prior = model / "priors" / "gaussian"
    prior.mkdir(parents=True)
    (prior / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "latent_prior.LatentPrior"}}))
    for name in ("latent_prior.py", "diffusion_pytorch_model.safetensors", "fit.log", "latents.safetensors"):
        (prior / name).write_text("x")
    for name in ("diffusion_pytorch_model.fp16.safetensors", "training_config.json", "model.safetensors", "vae.pth"):
        (model / name).write_text("x")
    for name in ("images/loss.png", "onnx/encoder.onnx", "images/deep/face.png", "checkpoints/config.json"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("x")
    mine = {
        f"priors/gaussian/{name}" for name in ("config.json", "latent_prior.py", "diffusion_pytorch_model.safetensors")
    }
    others = {
        "diffusion_pytorch_model.fp16.safetensors",
        "training_config.json",
        "images/loss.png",
        "onnx/encoder.onnx",
    }
    assert set(files_to_publish(model)) == MODEL_FILES | mine | others


def test_weights_of_a_real_size_arrive_bit_by_bit(hub, model):
    """32 MB, more than a request's buffers hold."""
    save_file({"w": torch.rand(8_000_000)}, model / "diffusion_pytorch_model.safetensors")
    hub.push_trouble = {"upload": ["cut", "503"]}
    push(model, CONFIG)
    assert hub.models["org/faces-vae"].files == bytes_of(model)


def test_a_second_model_replaces_the_first_and_leaves_the_rest_alone(hub, model):
    save_file({"w": torch.ones(3).half()}, model / "diffusion_pytorch_model.fp16.safetensors")
    push(model, CONFIG)
    hub.models["org/faces-vae"].files["LICENSE"] = b"somebody's own"
    (model / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (model / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Better faces\n")
    push(model, CONFIG)
    assert hub.models["org/faces-vae"].files == {**bytes_of(model), "LICENSE": b"somebody's own"}
    puts = [path for method, path in hub.requests if method == "PUT"]
    assert len(puts) == len(set(puts)) == 2  # the two weights of the first push; nothing large went twice


def test_a_pull_request_leaves_the_main_branch_alone(hub, model):
    push(model, CONFIG)
    before = dict(hub.models["org/faces-vae"].files)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert push(model, CONFIG, create_pr=True) == f"{hub.endpoint}/org/faces-vae/discussions/1"
    assert hub.models["org/faces-vae"].files == before
    assert hub.models["org/faces-vae"].pull_requests == [bytes_of(model)]


# ---------------------------------------------------------------------- secrets


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_stops_everything_before_the_first_request(hub, model, kind):
    source = model / "autoencoder_kl_ultra.py"
    lines = source.read_text().splitlines()
    lines.insert(41, f'KEY = "{SECRETS[kind]}"')
    source.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"autoencoder_kl_ultra.py, line 42: {kind}") as error:
        push(model, CONFIG)
    assert SECRETS[kind] not in str(error.value)
    assert hub.requests == []


def test_secrets_in_metadata_of_weights_in_cards_and_of_this_machine(model, monkeypatch):
    assert find_secrets(files_to_publish(model)) == []
    monkeypatch.setenv("HF_TOKEN", "not-a-known-shape")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # a switch, and no secret
    (model / "README.md").write_text("false\nwandb 0123456789abcdef0123456789abcdef01234567")
    (model / "config.json").write_text('{"note": "not-a-known-shape"}')
    metadata = {"command": f"train --token {SECRETS['a Hugging Face token']}"}
    save_file({"w": torch.zeros(3)}, model / "diffusion_pytorch_model.safetensors", metadata=metadata)
    assert set(find_secrets(files_to_publish(model))) == {
        "README.md, line 2: the value of WANDB_API_KEY",
        "config.json, line 1: the Hub token of this machine",
        "config.json, line 1: the value of HF_TOKEN",
        "diffusion_pytorch_model.safetensors, line 1: a Hugging Face token",
    }


def test_weights_cut_short_are_not_published(hub, model):
    weights = model / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-4], whole[:100], b"", b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            push(model, CONFIG)
    assert hub.requests == []


# ---------------------------------------------------------------------- trouble

KINDS = ("create", "validate", "preupload", "batch", "upload", "verify", "commit")


@pytest.mark.parametrize("kind", KINDS)
def test_trouble_at_any_stage_is_overcome(hub, model, kind):
    hub.push_trouble = {kind: ["429", "503", "cut", "page", "cut"]}
    push(model, CONFIG)
    assert hub.push_trouble[kind] == []
    assert hub.models["org/faces-vae"].files == bytes_of(model)
    assert len(hub.models["org/faces-vae"].commits) == 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, model):
    hub.push_trouble = {"commit": ["lost"]}
    push(model, CONFIG)
    assert hub.models["org/faces-vae"].files == bytes_of(model)
    assert len(hub.models["org/faces-vae"].commits) == 1


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, model):
    push(model, CONFIG)
    (model / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Better\n")
    hub.push_trouble = {"commit": ["503", "lost"]}
    with pytest.raises(PushError, match="discussions, where the pull request may be"):
        push(model, CONFIG, create_pr=True)
    assert len(hub.models["org/faces-vae"].pull_requests) == 1


@pytest.mark.parametrize("kind", ("upload", "commit"))
def test_a_push_that_failed_shows_nothing_and_can_be_repeated(hub, model, waits, kind):
    hub.push_trouble = {kind: ["503"] * 200}
    with pytest.raises(
        PushError, match=r"^the upload to org/faces-vae failed \(.*503.*\): repeat the same command\.$"
    ) as e:
        push(model, CONFIG)
    assert "secret" not in str(e.value)  # the signature in the address of an upload
    assert hub.models["org/faces-vae"].files == {}
    if kind == "commit":
        assert waits == [2, 4, 8, 16, 32]
    hub.push_trouble = {}
    before = sum(method == "PUT" for method, _ in hub.requests)
    push(model, CONFIG)
    assert hub.models["org/faces-vae"].files == bytes_of(model)
    # What had arrived before the failure does not travel again.
    assert sum(method == "PUT" for method, _ in hub.requests) - before == (1 if kind == "upload" else 0)


def test_what_repeating_cannot_mend_is_not_repeated(hub, model, waits, monkeypatch):
    (model / "README.md").write_text("---\nmodel-index:\n- value: .nan\n---\n")
    with pytest.raises(PushError, match="Invalid metadata in README.md.*correct that"):
        push(model, CONFIG)
    monkeypatch.setenv("HF_TOKEN", "hf_somebody")
    with pytest.raises(PushError, match="401.*log in with a token that may write there"):
        push(model, CONFIG)
    assert waits == []


# ---------------------------------------------------------------------- access before a training


def test_access_is_known_before_training(hub, waits):
    hub.push_trouble = {"whoami": ["429", "503"]}
    check_access(CONFIG)
    assert waits == [2.0, 4.0]
    with pytest.raises(ValueError, match="somebody is not else and no member of it; known are somebody, org"):
        check_access(HubConfig(push=True, repo_id="else/faces"))
    hub.user["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(ValueError, match="the token of somebody may only read"):
        check_access(CONFIG)


# ---------------------------------------------------------------------- the command


def test_a_dry_run_needs_no_network_and_no_token(offline, model, capsys):
    assert publish.main([str(model), "--repo-id", "org/faces-vae", "--dry-run", "--private"]) == 0
    out = capsys.readouterr().out
    listed = dict(reversed(line.split()) for line in out.splitlines() if line.startswith("   ") and "bytes" not in line)
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == {
        name: len(data) for name, data in bytes_of(model).items()
    }
    assert "to org/faces-vae (private" in out and "nothing was sent" in out
    for name in ("optimizer.bin", "training.log", "trainer_state.json", "notes.py", "run/config.json", ".env"):
        assert f"stays here: {name}" in out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["model", "--repo-id", "faces"], "--repo-id faces: give organisation/name"),
        (["nowhere", "--repo-id", "org/faces"], "there is no folder nowhere"),
        ([".", "--repo-id", "org/faces"], "holds neither a run (status.json) nor a model"),
        (["model", "--repo-id", "org/faces"], "needs a token and there is none: run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_what_is_wrong_is_one_line(offline, model, capsys, arguments, wanted):
    assert publish.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and wanted in err and err.count("\n") == 1


def test_the_command_publishes_a_run(hub, finished, capsys):
    assert publish.main([str(finished.folder), "--repo-id", "org/tiny"]) == 0
    assert capsys.readouterr().out == f"{hub.endpoint}/org/tiny\n"
    repository = hub.models["org/tiny"]
    assert not repository.private
    pictures = {name for name in repository.files if name.startswith("images/")}
    priors = {name for name in repository.files if name.startswith("priors/")}
    assert set(repository.files) - pictures - priors == MODEL_FILES | {"training_config.json"}
    assert {"images/loss.png", "images/kl.png", "images/reconstructions.png", "images/samples.png"} <= pictures
    weights = (finished.folder / "best" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert repository.files["diffusion_pytorch_model.safetensors"] == weights
    home = str(finished.folder.parent.parent).encode()
    assert [name for name, data in repository.files.items() if home in data] == []


def test_a_run_is_never_published_with_another_runs_weights(finished, tmp_path):
    run = tmp_path / "tiny_20250101_000000"
    shutil.copytree(finished.folder, run, ignore=shutil.ignore_patterns("checkpoints"))
    status = json.loads((run / "status.json").read_text())
    later = tmp_path / "vae_tiny"
    shutil.copytree(run / "best", later)
    (run / "status.json").write_text(json.dumps({**status, "model_dir": str(later)}))
    assert publish.find_model(run) == (later, run)
    save_file({"w": torch.ones(3)}, later / "diffusion_pytorch_model.safetensors")
    assert publish.find_model(run) == (run / "best", run)
    assert publish.find_model(later) == (later, None)
    assert publish.find_model(run / "best") == (run / "best", run)
    shutil.rmtree(run / "best")
    shutil.rmtree(later)
    with pytest.raises(ValueError, match="has no model yet"):
        publish.find_model(run)


def test_paths_of_this_machine_are_cut_from_the_training_configuration():
    files = {"train": ["/data/me/faces-*.parquet", "faces/train.parquet"], "validation": "~/x/valid.parquet"}
    assert publish.without_paths(
        {"data_files": files, "dataset": "flwrlabs/celeba", "dir": "C:\\Users\\me\\faces", "n": 3}
    ) == {
        "data_files": {"train": ["faces-*.parquet", "faces/train.parquet"], "validation": "valid.parquet"},
        "dataset": "flwrlabs/celeba",
        "dir": "faces",
        "n": 3,
    }


def test_help_needs_no_torch():
    code = "import sys; from training.publish import stage\ntry: stage.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--create-pr" in done.stdout and done.stdout.endswith("False\n"), done
