"""Publishing: which files, no secrets, only models that load, and uploads to a fake Hub that fails."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from fake_hub import TOKEN, FakeHub
from safetensors.torch import load_file, save_file

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from modeling.latent_prior import GaussianPrior
from training.config import HubConfig
from training.initial_weights import fitted_priors
from training.priors.sample import load_pipeline
from training.publish import stage as publish
from training.publish.hub import PushError, check_access, files_to_publish, find_secrets, push
from training.run_files import MODEL_FILE, WEIGHTS, best_checkpoint, find_model

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
    "a password in a URL": "https://me:swordfish@example.org/data",
}


@pytest.fixture
def model(tmp_path) -> Path:
    """An exported model with a card, and files beside it that must not be published."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoencoderKLUltra(**tiny.SETTINGS["model"]).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Faces\n")
    for name in ("optimizer.bin", "training.log", "trainer_state.json", "notes.py", "run/config.json", ".env"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"password {SECRETS['a Hugging Face token']}")
    return folder


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Delays between attempts, recorded instead of slept."""
    recorded: list[float] = []
    monkeypatch.setattr(time, "sleep", recorded.append)
    return recorded


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No token, and a Hub that does not answer."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(offline, waits, monkeypatch):
    with FakeHub() as alternative:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", alternative.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield alternative


def best_weights(run_dir: Path) -> bytes:
    return (best_checkpoint(run_dir)[0] / MODEL_FILE).read_bytes()


def bytes_of(folder: Path, names: set[str] = MODEL_FILES) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


# ---------------------------------------------------------------------- files


def test_exactly_the_files_of_the_model_are_uploaded_bitwise(hub, model):
    assert push(model, CONFIG) == f"{hub.endpoint}/org/faces-vae"
    repository = hub.models["org/faces-vae"]
    assert repository.files == bytes_of(model)
    assert repository.private and len(repository.commits) == 1
    assert repository.lfs == {"diffusion_pytorch_model.safetensors"}  # weights through large-file storage


def test_priors_variants_and_images_are_published_and_other_files_are_not(model):
    prior = model / "priors" / "gaussian"
    prior.mkdir(parents=True)
    (prior / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "latent_prior.GaussianPrior"}}))
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


def test_large_weights_arrive_bitwise(hub, model):
    """32 MB, larger than a request's buffers."""
    save_file({"w": torch.rand(8_000_000)}, model / "diffusion_pytorch_model.safetensors")
    hub.push_faults = {"upload": ["cut", "503"]}
    push(model, CONFIG)
    assert hub.models["org/faces-vae"].files == bytes_of(model)


def test_a_second_model_replaces_the_first_and_leaves_the_rest_alone(hub, model):
    save_file({"w": torch.ones(3).half()}, model / "diffusion_pytorch_model.fp16.safetensors")
    push(model, CONFIG)
    hub.models["org/faces-vae"].files["LICENSE"] = b"edited on the Hub"
    (model / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (model / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Better faces\n")
    push(model, CONFIG)
    assert hub.models["org/faces-vae"].files == {**bytes_of(model), "LICENSE": b"edited on the Hub"}
    puts = [path for method, path in hub.requests if method == "PUT"]
    assert len(puts) == len(set(puts)) == 2  # the two weights of the first push; no large file is uploaded twice


def test_a_pull_request_leaves_the_main_branch_alone(hub, model):
    push(model, CONFIG)
    before = dict(hub.models["org/faces-vae"].files)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert push(model, CONFIG, create_pr=True) == f"{hub.endpoint}/org/faces-vae/discussions/1"
    assert hub.models["org/faces-vae"].files == before
    assert hub.models["org/faces-vae"].pull_requests == [bytes_of(model)]


# ---------------------------------------------------------------------- secrets


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_stops_the_upload_before_the_first_request(hub, model, kind):
    source = model / "autoencoder_kl_ultra.py"
    lines = source.read_text().splitlines()
    lines.insert(41, f'KEY = "{SECRETS[kind]}"')
    source.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"autoencoder_kl_ultra.py, line 42: {kind}") as error:
        push(model, CONFIG)
    assert SECRETS[kind] not in str(error.value)
    assert hub.requests == []


def test_secrets_in_headers_of_weights_in_cards_and_of_this_machine(model, monkeypatch):
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


def test_weights_in_onnx_files_are_no_secrets(model):
    (model / "onnx").mkdir()
    file = model / "onnx" / "decoder.onnx"
    file.write_bytes(b"a://\x01b:\x02@" * 40)  # as random bytes may be
    assert find_secrets(files_to_publish(model)) == []
    file.write_bytes(b"\x00\x01" + SECRETS["a Hugging Face token"].encode() + b"\x02")
    assert [found.partition(", ")[0] for found in find_secrets(files_to_publish(model))] == ["onnx/decoder.onnx"]


def test_remains_of_an_interrupted_fit_are_not_published(model):
    names = set(files_to_publish(model))
    (model / "priors" / ".gaussian.tmp").mkdir(parents=True)
    (model / "priors" / ".gaussian.tmp" / "config.json").write_text("{}")
    assert set(files_to_publish(model)) == names


def test_truncated_weights_are_not_published(hub, model):
    weights = model / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    for broken in (data[:-4], data[:100], b"", b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="is not a complete safetensors file"):
            push(model, CONFIG)
    assert hub.requests == []


# ---------------------------------------------------------------------- faults

KINDS = ("create", "validate", "preupload", "batch", "upload", "verify", "commit")


@pytest.mark.parametrize("kind", KINDS)
def test_faults_at_any_stage_are_retried(hub, model, kind):
    hub.push_faults = {kind: ["429", "503", "cut", "page", "cut"]}
    push(model, CONFIG)
    assert hub.push_faults[kind] == []
    assert hub.models["org/faces-vae"].files == bytes_of(model)
    assert len(hub.models["org/faces-vae"].commits) == 1


def test_a_commit_whose_response_was_lost_is_not_repeated(hub, model):
    hub.push_faults = {"commit": ["lost"]}
    push(model, CONFIG)
    assert hub.models["org/faces-vae"].files == bytes_of(model)
    assert len(hub.models["org/faces-vae"].commits) == 1


def test_a_pull_request_whose_response_was_lost_is_not_opened_twice(hub, model):
    push(model, CONFIG)
    (model / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Better\n")
    hub.push_faults = {"commit": ["503", "lost"]}
    with pytest.raises(PushError, match="discussions, where the pull request may be"):
        push(model, CONFIG, create_pr=True)
    assert len(hub.models["org/faces-vae"].pull_requests) == 1


@pytest.mark.parametrize("kind", ("upload", "commit"))
def test_a_failed_push_is_invisible_and_can_be_repeated(hub, model, waits, kind):
    hub.push_faults = {kind: ["503"] * 200}
    with pytest.raises(
        PushError, match=r"^the upload to org/faces-vae failed \(.*503.*\): run the same command again\.$"
    ) as e:
        push(model, CONFIG)
    assert "secret" not in str(e.value)  # the signature in an upload URL
    assert hub.models["org/faces-vae"].files == {}
    if kind == "commit":
        assert waits == [2, 4, 8, 16, 32]
    hub.push_faults = {}
    before = sum(method == "PUT" for method, _ in hub.requests)
    push(model, CONFIG)
    assert hub.models["org/faces-vae"].files == bytes_of(model)
    # What was uploaded before the failure is not uploaded again.
    assert sum(method == "PUT" for method, _ in hub.requests) - before == (1 if kind == "upload" else 0)


def test_permanent_errors_are_not_retried(hub, model, waits, monkeypatch):
    (model / "README.md").write_text("---\nmodel-index:\n- value: .nan\n---\n")
    with pytest.raises(PushError, match="Invalid metadata in README.md.*fix that"):
        push(model, CONFIG)
    monkeypatch.setenv("HF_TOKEN", "hf_somebody")
    with pytest.raises(PushError, match="401.*log in with a token that may write there"):
        push(model, CONFIG)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="unset the `HF_HUB_OFFLINE` environment variable.*fix that and try again"):
        push(model, CONFIG)
    assert waits == []


# ---------------------------------------------------------------------- access before a training


def test_access_is_checked_before_training(hub, waits):
    hub.push_faults = {"whoami": ["429", "503"]}
    check_access(CONFIG)
    assert waits == [2.0, 4.0]
    with pytest.raises(ValueError, match="somebody is neither else nor a member of it: use one of somebody, org"):
        check_access(HubConfig(push=True, repo_id="else/faces"))
    hub.user["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(ValueError, match="the token of somebody is read-only"):
        check_access(CONFIG)


# ---------------------------------------------------------------------- the command


def test_a_dry_run_needs_no_network_and_no_token(offline, model, capsys):
    assert publish.main([str(model), "--repo-id", "org/faces-vae", "--dry-run"]) == 0
    out = capsys.readouterr().out
    listed = dict(reversed(line.split()) for line in out.splitlines() if line.startswith("   ") and "bytes" not in line)
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == {
        name: len(data) for name, data in bytes_of(model).items()
    }
    assert "to org/faces-vae (private" in out and "nothing was sent" in out
    for name in ("optimizer.bin", "training.log", "trainer_state.json", "notes.py", "run/config.json", ".env"):
        assert f"not published: {name}" in out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["model", "--repo-id", "faces"], "--repo-id must be organization/name, got faces"),
        (["nowhere", "--repo-id", "org/faces"], "nowhere does not exist: give the folder"),
        ([".", "--repo-id", "org/faces"], ". holds no exported model"),
        (["model", "--repo-id", "org/faces"], "needs a token and there is none: run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_errors_are_one_line(offline, model, capsys, arguments, wanted):
    assert publish.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and wanted in err and err.count("\n") == 1


def test_the_command_publishes_a_run(hub, finished, capsys):
    assert publish.main([str(finished.folder), "--repo-id", "org/tiny"]) == 0
    assert capsys.readouterr().out == f"{hub.endpoint}/org/tiny\n"
    repository = hub.models["org/tiny"]
    assert repository.private
    images = {name for name in repository.files if name.startswith("images/")}
    priors = {name for name in repository.files if name.startswith("priors/")}
    assert set(repository.files) - images - priors == MODEL_FILES | {"training_config.json"}
    assert {"images/loss.png", "images/kl.png", "images/reconstructions.png", "images/samples.png"} <= images
    assert repository.files[WEIGHTS] == best_weights(finished.folder)
    path = str(finished.folder.parent.parent).encode()
    assert [name for name, data in repository.files.items() if path in data] == []


def test_an_unfinished_run_has_the_priors_that_it_started_with(finished, tmp_path):
    """Of a run of the decoder alone, until it exports its model."""
    run_dir = shutil.copytree(finished.folder, tmp_path / finished.folder.name, symlinks=True)
    status = json.loads((run_dir / "status.json").read_text())
    (run_dir / "status.json").write_text(json.dumps({**status, "model_dir": None}))
    vae, _ = find_model(run_dir)
    assert load_pipeline(str(run_dir), "cpu").fitted_priors == []
    GaussianPrior(latent_dim=16).save_pretrained(run_dir / "priors" / "gaussian")
    published = {name for name in files_to_publish(vae) if name.startswith("priors/")}
    assert "priors/gaussian/config.json" in published and len(published) == 3
    assert load_pipeline(str(run_dir), "cpu").fitted_priors == ["gaussian"]
    assert fitted_priors(str(run_dir), 16) == [run_dir / "priors" / "gaussian"]


def test_a_copied_run_is_published_with_its_best_weights_and_their_metrics(hub, finished, tmp_path, capsys):
    """A copy by `cp -rL` replaces the links by folders, which do not follow further training."""
    run_dir = shutil.copytree(finished.folder, tmp_path / finished.folder.name)
    for folder in ("best", "checkpoints/best/model"):
        save_file({"old": torch.zeros(3)}, run_dir / folder / WEIGHTS)
    status = json.loads((run_dir / "status.json").read_text())
    # A crash after the validation of a better model and before its checkpoint.
    later = {**status["best"], "step": 999, "validation/psnr": 99.0}
    (run_dir / "status.json").write_text(json.dumps({**status, "best": later, "model_dir": None}))
    for source in (run_dir, run_dir / "best"):
        assert publish.main([str(source), "--repo-id", "org/tiny"]) == 0
        files = hub.models["org/tiny"].files
        assert files[WEIGHTS] == best_weights(finished.folder)
        card = files["README.md"].decode()
        assert f"| PSNR | {status['best']['validation/psnr']:.2f} dB |" in card and "99.00 dB" not in card
        assert f"step {status['best']['step']};" in card
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    assert publish.main([str(run_dir), "--repo-id", "org/tiny"]) == 2
    assert "the best model of" in (error := capsys.readouterr().err) and "step_00000999: manifest.json is miss" in error


def test_repositories_are_private_unless_public_is_asked_for(hub, model, capsys):
    for name, options in (("org/private", []), ("org/public", ["--public"])):
        assert publish.main([str(model), "--repo-id", name, "--dry-run", *options]) == 0
        assert f"to {name} ({name[4:]}, if it has to be created)" in capsys.readouterr().out
        assert publish.main([str(model), "--repo-id", name, *options]) == 0
        assert hub.models[name].private == (name == "org/private")


@pytest.mark.parametrize("private", [True, False])
def test_the_retry_command_publishes_to_the_same_kind_of_repository(hub, model, private):
    config = HubConfig(push=True, repo_id="org/faces-vae", private=private)
    folder = model.rename(model.with_name("my model"))
    words = shlex.split(publish.publish_command(folder, config))
    assert words[:3] == ["python", "-m", "training.publish"]
    assert publish.main(words[3:]) == 0
    assert hub.models["org/faces-vae"].private == private


# ---------------------------------------------------------------------- only models that can be loaded


def edit_config(folder: Path, **changes) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: edit_config(folder, auto_map=None), "config.json has no auto_map for AutoModel"),
        (lambda folder: edit_config(folder, auto_map={"AutoModel": "autoencoder_kl_ultra.Other"}), "define 'Other'"),
        (lambda folder: (folder / "autoencoder_kl_ultra.py").unlink(), "autoencoder_kl_ultra.py"),
        (lambda folder: (folder / "autoencoder_kl_ultra.py").write_text("class"), "invalid syntax"),
        (without_a_weight, "1 missing weights, such as "),
        (lambda folder: edit_config(folder, pca_size=10), "cannot be loaded"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"half"), "cannot be loaded"),
    ],
    ids=[
        "no auto_map",
        "another class",
        "no source",
        "broken source",
        "a weight missing",
        "another shape",
        "truncated",
    ],
)
def test_a_model_that_cannot_be_loaded_back_is_refused(hub, model, capsys, damage, reason):
    damage(model)
    assert publish.main([str(model), "--repo-id", "org/faces-vae"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the model cannot be loaded from its files (") and error.count("\n") == 1
    assert reason in error and "save it again with save_pretrained" in error and hub.requests == []


@pytest.mark.parametrize("form", ["sharded", "variant", "sharded variant"])
def test_sharded_models_and_variants_are_published_and_load_back(hub, model, tmp_path, capsys, form):
    vae = AutoencoderKLUltra.from_pretrained(model)
    (model / WEIGHTS).unlink()
    variant = "fp16" if "variant" in form else None
    options = {"variant": variant} | ({"max_shard_size": "200KB"} if "sharded" in form else {})
    vae.save_pretrained(tmp_path / "saved", **options)
    for path in (tmp_path / "saved").glob("diffusion_pytorch_model*"):
        shutil.copy(path, model)
    assert publish.main([str(model), "--repo-id", "org/faces-vae"]) == 0
    files = hub.models["org/faces-vae"].files
    assert len([name for name in files if name.endswith(".safetensors")]) == (1 if form == "variant" else 3)
    for name, data in files.items():
        (tmp_path / "downloaded").mkdir(exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(data)
    loaded = AutoencoderKLUltra.from_pretrained(tmp_path / "downloaded", variant=variant).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in vae.state_dict().items())
    (model / "README.md").unlink()
    publish.stage(model, tmp_path / "downloaded", "org/faces-vae")
    card = (tmp_path / "downloaded" / "README.md").read_text()
    assert ('variant="fp16"' in card) == (variant is not None)
    millions = sum(value.numel() for value in loaded.values()) / 1e6
    assert f"{millions:.1f} million parameters" in card
    next(model.glob("*.safetensors")).unlink()  # one of the shards, or the only weights
    assert publish.main([str(model), "--repo-id", "org/faces-vae"]) == 2
    assert "Traceback" not in capsys.readouterr().err


# ---------------------------------------------------------------------- no traces of this machine


def test_paths_of_this_machine_are_removed_from_the_training_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "acme").mkdir(parents=True)
    files = {"train": ["/data/me/faces-*.parquet", "acme/train.parquet"], "validation": "~/x/valid.parquet"}
    files["test"] = "https://example.com/a/test.parquet"
    values = {"data_files": files, "data_dir": "clients/acme/faces", "dataset": "flwrlabs/celeba", "n": 3}
    values |= {"dir": "C:\\Users\\me\\faces", "init_from": "models/acme", "run_name": "faces"}
    shortened = {"train": ["faces-*.parquet", "train.parquet"], "validation": "valid.parquet", "test": files["test"]}
    assert publish.without_paths(values) == values | {
        "data_files": shortened,
        "data_dir": "faces",
        "dir": "faces",
        "init_from": "acme",
    }
    assert publish.without_paths({"init_from": "org/model"}) == {"init_from": "org/model"}


def test_help_needs_no_torch():
    code = "import sys; from training.publish import stage\ntry: stage.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--create-pr" in done.stdout and done.stdout.endswith("False\n"), done


def test_a_space_is_listed_and_uploaded_beside_the_model(hub, model, capsys):
    command = [str(model), "--repo-id", "org/faces-vae", "--space"]
    assert publish.main([*command, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "to the Space org/faces-vae-demo (private" in listed and not hub.models
    assert publish.main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{hub.endpoint}/org/faces-vae",
        f"{hub.endpoint}/org/faces-vae-demo",
    ]
    space = hub.models["org/faces-vae-demo"]
    assert space.private and {"app.py", "demo.py", "README.md", "modeling/pipeline.py"} <= set(space.files)
    assert all(name in listed for name in space.files)
    assert "FaceVAEPipeline.from_pretrained('org/faces-vae')" in space.files["app.py"].decode()
    assert ("POST", "/api/spaces/org/faces-vae-demo/commit/main") in hub.requests
