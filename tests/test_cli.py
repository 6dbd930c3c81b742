"""The command line: an error is one line that names the value and the remedy, before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from PIL import Image

import train_vae
from training import builders as build
from training import distributed
from training.budget.estimate import count_flops
from training.builders import micro_batch_size
from training.cli import UserError
from training.config import load_config
from training.data import sources
from training.distributed import resolve_precision

CPU = torch.device("cpu")
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID")


class CommandLine:
    """Runs `train_vae.main` on a tiny configuration in a folder of its own."""

    def __init__(self, folder: Path, faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.file = folder / "tiny.json"
        self.file.write_text(json.dumps(tiny.tiny_settings(folder, faces)))

    def __call__(self, *arguments: str, **settings: str) -> tuple[int, str, str]:
        """Exit code, standard output and error; `data__dataset="x"` is `--set data.dataset="x"`."""
        overrides = [("--set", f"{key.replace('__', '.')}={value}") for key, value in settings.items()]
        code = train_vae.main(["--config", str(self.file), *(part for pair in overrides for part in pair), *arguments])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def error(self, *arguments: str, **settings: str) -> str:
        """The one line of an error of the user."""
        code, _, err = self(*arguments, **settings)
        assert code == 2, err
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert err.endswith(line + "\n")  # and nothing after it
        assert not (self.folder / "runs").exists() and not (self.folder / "models").exists()
        return line


@pytest.fixture
def cli(tmp_path, faces, capsys, session, monkeypatch) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "HF_TOKEN", *LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    return CommandLine(tmp_path, faces, capsys)


def test_unknown_keys(cli):
    assert "training_presets.learning_rat: did you mean training_presets.learning_rate?" in cli.error(
        training_presets__learning_rat="1"
    )
    assert "model.latent_chanels: did you mean model.latent_channels?" in cli.error(model__latent_chanels="16")


def test_wrong_types_and_impossible_shapes(cli):
    assert 'training_presets.batch_size must be an integer, got "many"' in cli.error(
        training_presets__batch_size="many"
    )
    assert 'model.sample_size must be an integer, got "40px"' in cli.error(model__sample_size="40px")
    error = cli.error(model__encoder_block_out_channels="64")
    assert "model.encoder_block_out_channels must be an array, each element an integer, got 64" in error
    assert 'model.pca_size must be an integer or null, got "x"' in cli.error(model__pca_size="x")
    assert 'model.logvar_init must be a number, got "x"' in cli.error(model__logvar_init="x")
    error = cli.error(model__latent_dim="1024")
    assert "latent_dim must be latent_channels x latent_size^2 = 16 x 1^2 = 16, got 1024" in error


def test_a_missing_configuration(cli, capsys):
    assert train_vae.main(["--config", "nowhere.json"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot read configuration file nowhere.json (No such file") and err.count("\n") == 1


def test_missing_parquet_files(cli):
    files = json.dumps({"train": "parts/*.parquet", "validation": "v.parquet"})
    error = cli.error(data__dataset="parquet", data__data_files=files)
    assert "data.data_files['train']: 'parts/*.parquet' matches no file" in error
    files = json.dumps({"training": "parts/*.parquet"})
    error = cli.error(data__dataset="parquet", data__data_files=files)
    assert "no split 'train', only training" in error


def test_missing_and_empty_folders(cli, tmp_path):
    assert "data.data_dir='nowhere' is not a folder" in cli.error(data__dataset="imagefolder", data__data_dir="nowhere")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "holds no image" in cli.error(data__dataset="imagefolder", data__data_dir="empty")


def test_unreadable_images(cli, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(tmp_path / "images" / split / f"{number}.png")
    for path in (tmp_path / "images" / "validation").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    error = cli.error(data__dataset="imagefolder", data__data_dir="images")
    assert "no readable image to validate on" in error


def test_a_batch_larger_than_the_data_set(cli):
    error = cli.error(training_presets__batch_size="21")
    assert "training_presets.batch_size 21 is more than the 20 training images of synthetic_faces" in error


@pytest.mark.parametrize("dataset", ["some-one/faces", "no such thing"])
def test_an_unreachable_hub(cli, monkeypatch, dataset):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(sources, "_HUB_ATTEMPTS", 1)
    error = cli.error(data__dataset=dataset)
    assert f"data.dataset='{dataset}'" in error
    assert ("cannot reach the Hub at http://127.0.0.1:9" in error) == ("/" in dataset)


def test_fp16_on_a_cpu(cli, monkeypatch):
    error = cli.error(training_presets__mixed_precision="fp16")
    assert "fp16 (from the configuration) does nothing on a CPU: use bf16 or no" in error
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "fp16 (from the launcher) does nothing on a CPU" in cli.error()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "mixed precision 'fp8' (from the launcher): use no, bf16 or fp16" in cli.error()


def test_accumulation_by_the_launcher(cli, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    error = cli.error()
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4" in error and "micro_batch_size" in error


def test_missing_trunk_weights(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):  # refused at once
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    error = cli.error(loss__trunk="vgg16")
    for place in (
        "loss.trunk_weights",
        "torch/hub",
        "downloaded from https://",
        "vgg16_features.safetensors",
        "st_vgg16",
    ):
        assert place in error
    error = cli.error(loss__trunk="vgg16", loss__trunk_weights=str(tmp_path / "nowhere"))
    assert "loss.trunk_weights is" in error and "nowhere" in error


def test_a_trunk_that_needs_larger_images(cli):
    sizes = {"model__sample_size": "16", "model__pca_size": "8", "model__pca_decode_size": "8"}
    error = cli.error(**sizes)
    assert "loss.trunk st_alexnet needs images or crops of at least 21 pixels, got 16" in error


def test_a_batch_that_cannot_be_divided(cli, monkeypatch):
    config = load_config(cli.file)
    assert [micro_batch_size(config, processes) for processes in (1, 2, 4)] == [3, 2, 1]
    with pytest.raises(
        ValueError, match="batch_size 4 cannot be divided over 3 processes: use 3 or another multiple of 3"
    ):
        micro_batch_size(config, 3)
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launch.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)
    assert "training_presets.batch_size 4 cannot be divided over 3 processes" in cli.error("--dry-run")


def test_resume_without_a_checkpoint(cli, tmp_path):
    error = cli.error("--resume", "elsewhere")
    assert "--resume elsewhere: no checkpoint there" in error and "or auto" in error
    (tmp_path / "run" / "checkpoints" / "step_00000004.tmp").mkdir(parents=True)  # interrupted while it was written
    (tmp_path / "run" / "checkpoints" / "step_00000008").mkdir()
    error = cli.error("--resume", str(tmp_path / "run"))
    assert "no checkpoint can be used" in error and "step_00000008: manifest.json is missing" in error


def test_push_without_a_token(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    error = cli.error(hub__push="true", hub__repo_id="some-one/faces")
    assert "hub.push to some-one/faces needs a token and there is none" in error
    for remedy in ("hf auth login", "HF_TOKEN", "hub.push to false"):
        assert remedy in error
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    error = cli.error(hub__push="true", hub__repo_id="some-one/faces")
    assert "the Hub refused or did not answer" in error and "hf_secret" not in error


def test_intermediate_uploads_need_an_upload(cli):
    assert "hub.push_every_epochs is 5, but hub.push is false: set it to true" in cli.error(hub__push_every_epochs="5")


def test_an_error_of_the_program_keeps_its_traceback(cli, monkeypatch):
    def broken(config):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(build, "build_model", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        cli("--dry-run")


def test_only_errors_that_the_user_can_correct_are_one_line_during_training(cli, monkeypatch):
    class Failing:
        def __init__(self, *_):
            pass

        def run(self):
            raise error

    monkeypatch.setattr("training.trainer.Trainer", Failing)
    error = UserError("no answer")
    assert cli.error() == "error: no answer"
    error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        cli()
    error = KeyboardInterrupt()
    assert cli()[::2] == (130, "interrupted\n")


def test_every_process_prints_its_own_errors(cli, monkeypatch):
    launch = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    code, _, err = cli(training_presets__batch_size="many")
    assert code == 2
    assert err == 'error (rank 1): training_presets.batch_size must be an integer, got "many".\n'


# ---- valid commands ----


def test_explain(capsys):
    assert train_vae.main(["--explain", "training_presets.kl_gain"]) == 0
    assert capsys.readouterr().out.startswith(
        "training_presets.kl_gain  (number, greater than 0 and at most 2; default 0.5)"
    )
    assert train_vae.main(["--explain", "training_presets.kl_gian"]) == 2
    assert "did you mean training_presets.kl_gain?" in capsys.readouterr().err


def test_a_dry_run_prints_the_cost_estimate_and_writes_nothing(cli):
    code, out, err = cli("--dry-run", training_presets__num_epochs="7")
    assert (code, err) == (0, "")
    cost = count_flops(load_config(cli.file))
    assert "latent    16 x 1 x 1 = 16 dimensions (vector)" in out
    assert f"= {cost['gflop_forward']:.2f} GFLOPs per image" in out
    assert "batch     4 = 4 x 1 processes; 2 x 3 images per forward pass" in out
    assert re.search(r"20 images / 4 = 5 steps; x 7 epochs = 35 steps, [\d.e+-]+ PFLOPs", out)
    assert [path.name for path in cli.folder.iterdir()] == ["tiny.json"]


def test_a_run(cli):
    settings = {"training_presets__max_images_per_epoch": "4", "training_presets__num_epochs": "1"}
    code, _, err = cli(loss__perceptual_weight="0", loss__lpips_weight="0", **settings)
    assert code == 0, err
    (run,) = (cli.folder / "runs").iterdir()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (cli.folder / "models" / "vae_tiny" / "config.json").is_file()


@pytest.mark.parametrize(
    ("launcher", "wanted", "computes", "result"),
    [
        # `accelerate launch` exports "no" by default: the configuration decides.
        ("no", "bf16", False, ("bf16", "the configuration")),
        (None, "bf16", False, ("bf16", "the configuration")),
        ("bf16", "no", False, ("bf16", "the launcher")),
        ("no", "auto", False, ("no", "auto on cpu")),
        ("no", "auto", True, ("bf16", "auto on cpu")),
    ],
)
def test_the_launcher_takes_precedence_for_precision(monkeypatch, launcher, wanted, computes, result):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(distributed, "cpu_computes_bf16", lambda: computes)
    assert resolve_precision(wanted, CPU) == result
