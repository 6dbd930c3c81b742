"""Common behavior of the commands: error lines, exit codes, and the search for MODEL."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import cli
from training.__main__ import COMMANDS, main
from training.data.images import DataError
from training.run_files import list_checkpoints

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("data.crop_px must be at least 16, got 8."), "error: data.crop_px must be at least 16, got 8.\n"),
        (DataError("no answer\n  from the server"), "error: no answer from the server\n"),
        (FileNotFoundError(2, "No such file", "faces"), "error: [Errno 2] No such file: 'faces'\n"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_2(capsys, error, line):
    def command(arguments):
        raise error

    assert cli.run(command, argparse.Namespace()) == 2
    assert capsys.readouterr() == ("", line)


def test_a_fault_of_the_program_keeps_its_traceback():
    def command(arguments):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        cli.run(command, argparse.Namespace())


def test_a_commands_exit_code_is_returned():
    assert cli.run(lambda arguments: None, argparse.Namespace()) == 0
    assert cli.run(lambda arguments: 75, argparse.Namespace()) == 75


def test_counts_must_be_positive(capsys):
    parser = argparse.ArgumentParser()
    cli.add_option(parser, "--batch-size", default=8)
    assert parser.parse_args([]).batch_size == 8
    assert "(default: 8)" in parser.format_help()
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--batch-size", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert cli.select_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device gpu is not a device of PyTorch"):
        cli.select_device("gpu")
    with pytest.raises(ValueError, match="--device cuda:1: this machine has 0 cuda devices"):
        cli.select_device("cuda:1")


# ---- MODEL ----


def test_a_run_means_its_best_model(finished):
    best = finished.status["best"]["step"]
    source = cli.resolve_model(str(finished.folder))
    assert source.path in (finished.status["model_dir"], str(finished.folder / f"checkpoints/step_{best:08d}/model"))
    assert source.config["_class_name"] == "AutoencoderKLUltra" and source.subfolder is None


def test_a_checkpoint_an_exported_folder_and_a_pipeline_are_found(finished, tmp_path):
    checkpoint = list_checkpoints(finished.folder)[-1]
    assert cli.resolve_model(str(checkpoint)).path == str(checkpoint / "model")
    assert cli.resolve_model(str(checkpoint / "model")).path == str(checkpoint / "model")
    shutil.copytree(checkpoint / "model", tmp_path / "pipeline" / "vae")
    assert cli.resolve_model(str(tmp_path / "pipeline")).path == str(tmp_path / "pipeline" / "vae")
    shutil.copytree(checkpoint / "model", tmp_path / "pipeline" / "other")
    assert cli.resolve_model(str(tmp_path / "pipeline"), "other").path == str(tmp_path / "pipeline" / "other")


def test_what_is_no_model(tmp_path):
    def message(model: str, subfolder: str | None = None) -> str:
        with pytest.raises(ValueError) as caught:
            cli.resolve_model(model, subfolder)
        return str(caught.value)

    assert "there is no folder nowhere, and it is not a Hub id" in message("nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no model: looked for config.json (an exported model)" in message(str(tmp_path / "empty"))
    (tmp_path / "pipe" / "autoencoder").mkdir(parents=True)
    (tmp_path / "pipe" / "autoencoder" / "config.json").write_text("[]")
    assert "holds no model; there is one in autoencoder, so give --subfolder" in message(str(tmp_path / "pipe"))
    assert "must be a JSON object, got list" in message(str(tmp_path / "pipe"), "autoencoder")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "has no best model yet" in message(str(tmp_path / "run"))


# ---- every command ----

# Importing the module of these commands imports torch.
NEED_TORCH = ("compare_priors", "fit_prior", "sample")
HELP = """
import contextlib, io, runpy, sys
def run(module, *arguments):
    sys.argv = [module, *arguments, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            assert stop.code in (0, None), stop.code
    assert "usage: " in out.getvalue()
    return out.getvalue()
for name in sys.argv[1:]:
    assert run("training", name) == run("train_vae" if name == "train" else f"training.{name}")
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("needs_torch", [False, True])
def test_help_is_the_same_both_ways_and_does_not_wait_for_torch(needs_torch):
    names = [name for name in COMMANDS if (name in NEED_TORCH) == needs_torch]
    command = [sys.executable, "-c", HELP, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{needs_torch}\n"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train", ["--config", "nowhere.json"], "nowhere.json"),
        ("budget", ["--config", "nowhere.json"], "nowhere.json"),
        ("monitor", ["nowhere", "--runs-dir", "nowhere"], "nowhere"),
        ("evaluate", ["nowhere", "--data", "synthetic_faces"], "there is no folder nowhere"),
        ("compare", ["nowhere", "elsewhere", "--data", "synthetic_faces"], "there is no folder nowhere"),
        ("reconstruct", ["nowhere", "nothing.jpg"], "nothing.jpg does not exist"),
        ("encode", ["nowhere", "--data", "synthetic_faces", "--output", "x"], "there is no folder nowhere"),
        ("align", ["nowhere", "faces"], "nowhere is not a folder"),
        ("synthetic_faces", ["--output", "x", "--num-images", "2", "--first-seed", "-1"], "--first-seed must be"),
        ("fit_prior", ["nowhere", "--data", "synthetic_faces"], "nowhere"),
        ("compare_priors", ["nowhere", "--data", "synthetic_faces"], "nowhere"),
        ("sample", ["nowhere"], "nowhere"),
        ("demo", ["nowhere"], "there is no folder nowhere"),
        ("export_formats", ["nowhere", "--variant", "fp16"], "there is no folder nowhere"),
        ("publish", ["nowhere", "--repo-id", "some-one/faces", "--dry-run"], "nowhere"),
        ("kl", ["--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_every_command_prints_an_error_as_one_line(tmp_path, monkeypatch, capsys, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([name, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_commands_are_listed_with_a_line_each(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert main(["evalute"]) == 2
    assert "unknown command evalute: use one of train, budget" in capsys.readouterr().err


def test_a_reader_that_stops_reading_ends_a_command_quietly():
    code = "import argparse; from training.cli import run; run(lambda _: print('x' * 1_000_000), argparse.Namespace())"
    command = f'{sys.executable} -c "{code}" | head -c 1'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "x" and done.stderr == ""
