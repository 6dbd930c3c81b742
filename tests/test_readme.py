"""The README's commands do what it says: every one is run here, or is listed with the reason why it is not."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent
# Beginning of a command -> why no test runs it.
NOT_RUN = {
    "make quickstart": "minutes of training; its configuration and its run are what the other commands are run with",
    "make test": "this is what runs",
    "accelerate launch train_vae.py --config configs/ultra.json": "downloads CelebA; tests/test_cli.py launches",
    "accelerate launch --config_file accelerate_config.yaml": "needs several GPUs; see tests/test_multiprocess.py",
    "python train_vae.py --config configs/ultra.json --set data.dataset=parquet": "the run behind the figures, with faces",
    "torchrun --standalone": "needs eight GPUs; see tests/test_launchers.py",
    "accelerate launch --config_file configs/accelerate_two_machines.yaml": "see tests/test_machines.py",
}


def commands() -> list[str]:
    """Lines of the README's blocks without a language, continued ones joined, comments removed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(content for language, content in blocks if not language).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*$", "", re.sub(r"\s+", " ", line)).strip() for line in lines if line.strip()]


def test_every_command_is_run_or_its_absence_explained():
    assert len(commands()) > 12
    known = ("python train_vae.py", "python -m training.", "python examples/")
    for command in commands():
        assert command.startswith((*NOT_RUN, *known)), command
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in commands()), f"{start} is no longer in the README"


def test_every_file_and_key_that_is_named_exists():
    from training.config import Config

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:training|modeling|configs|docs|tests|examples)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path
    keys = set(Config().flat())
    for key in re.findall(r"\b((?:data|loss|training_presets|output|hub)\.[a-z_]+)\b", text):
        assert key in keys or key.endswith((".py", ".md")), key


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, faces) -> Path:
    """A folder with a finished tiny run of the README's name, its model, and a folder of faces."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("readme")
    values = tiny.tiny_settings(folder, faces, training_presets={"num_epochs": 1})
    values["output"] |= {"run_name": "ultra_high_quality", "runs_dir": "runs", "model_dir": "model_weights"}
    (folder / "tiny.json").write_text(json.dumps(values))
    run(folder, "python train_vae.py --config tiny.json")
    generator = __import__("numpy").random.default_rng(0)
    (folder / "FOLDER").mkdir()
    for index in range(24):
        noise = generator.integers(0, 255, (5, 5, 3), dtype="uint8")
        Image.fromarray(noise).resize((48, 48)).save(folder / "FOLDER" / f"{index}.png")
    return folder


def run(folder: Path, command: str) -> str:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    words = [str(ROOT / word) if word.endswith(".py") and (ROOT / word).is_file() else word for word in words]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "HF_"))}
    own |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=own, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


# What a command gets besides, so that it takes seconds and needs no downloaded weights.
SMALLER = {
    "training.evaluate": "--lpips st_alexnet --frechet st_alexnet --max-images 6",
    "training.fit_prior": "--priors gaussian --frechet none --num-samples 4",
    "examples/latent_diffusion.py": "--steps 3 --num-samples 4 --width 32 --sample-steps 2",
    "data.dataset=imagefolder": "--set training_presets.num_epochs=1 --set output.run_name=folder "
    "--set data.holdout_fraction=0.2 --set training_presets.max_images_per_epoch=4",
}
RUNNABLE = [command for command in commands() if not command.startswith(tuple(NOT_RUN))]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNNABLE, ids=lambda text: text[:60])
def test_a_command_of_the_readme_runs(workplace, command):
    real = command if "--dry-run" in command and "publish" not in command or "training.budget" in command else None
    if real is None:
        name = next((workplace / "runs").glob("ultra_high_quality_*")).name
        real = command.replace("configs/ultra.json", "tiny.json").replace("runs/NAME", f"runs/{name}")
        real = real.replace("training_presets.kl_gain ", "training_presets.kl_gain")
        real += " " + " ".join(extra for part, extra in SMALLER.items() if part in command)
        real += " --once" if real.strip() == "python -m training.monitor" else ""
    else:
        real = real.replace("configs/ultra.json", str(ROOT / "configs" / "ultra.json"))
    assert run(workplace, real)
