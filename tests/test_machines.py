"""Two machines that share nothing but a network: one run, read and written by the first of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from training.run_files import list_checkpoints

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.multiprocess


def launch(folders: list[Path], *arguments: str) -> list[subprocess.CompletedProcess]:
    """Start the run on each `machine`, a folder of its own, with the configuration that the project ships."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, folder in enumerate(folders):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "configs" / "accelerate_two_machines.yaml"), "--mixed_precision", "no"]
        command += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command += [str(ROOT / "train_vae.py"), "--config", "run.json", *arguments]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "HF_"))}
        own |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HOME": str(folder / "hf")}
        own |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        started.append(
            subprocess.Popen(command, cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    done = []
    for process in started:
        out, err = process.communicate(timeout=240)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def test_two_machines_without_a_shared_disk_train_and_resume(tmp_path, faces):
    folders = [tmp_path / "first", tmp_path / "second"]
    presets = {"num_epochs": 1, "max_images_per_epoch": 8, "micro_batch_size": 1}
    for folder in folders:
        folder.mkdir()
        values = tiny.tiny_settings(folder, faces, training_presets=presets)
        values["output"] |= {"runs_dir": "runs", "model_dir": "models"}
        (folder / "run.json").write_text(json.dumps(values))
    for done in launch(folders):
        assert done.returncode == 0, done.stderr
    (run,) = (folders[0] / "runs").iterdir()
    assert "4 = 2 x 2 processes" in (run / "training.log").read_text()
    assert not (folders[1] / "runs").exists() and not (folders[1] / "models").exists()
    for done in launch(folders, "--resume", "auto", "--set", "training_presets.num_epochs=2"):
        assert done.returncode == 0, done.stderr
    assert [path.name for path in list_checkpoints(run)] == ["step_00000002", "step_00000004"]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert not (folders[1] / "runs").exists()
