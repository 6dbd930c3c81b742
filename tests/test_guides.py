"""The guides and explanations: every command and Python block runs here on a tiny model, or has a reason why not."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torchvision
from PIL import Image

import train_vae
from training.__main__ import COMMANDS
from training.data.synthetic_faces.render import render_face
from training.losses.perceptual import PerceptualTrunk

ROOT = Path(__file__).parent.parent
PAGES = {
    f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8")
    for folder in ("guides", "explanation")
    for path in sorted((ROOT / "docs" / folder).glob("*.md"))
}
# Beginning of a command -> why it does not run here.
NOT_RUN = {
    "pip install": "needs a network",
    "python -m training.align": "needs a detector; tests/test_align.py",
    "python train_vae.py --config configs/ultra.json --set 'output.trackers=[": "needs Trackio; tests/tracking runs it",
    "python train_vae.py --config configs/ultra.json --set hub.push_checkpoints": "needs a network; see tests/publish",
    "python train_vae.py --config configs/ultra.json --resume hub://": "needs a network; tests/publish uses a fake Hub",
    "python -m training.demo $MODEL": "runs until it is stopped; tests/demo starts it",
    "python -m training.publish $MODEL --repo-id org/name --space #": "needs a network; tests/publish uploads a Space",
    "hf jobs uv run": "needs an account; tests/test_examples.py reads the script's metadata and runs its command line",
    "docker": "needs Docker; tests/test_examples.py reads the Dockerfile",
    "accelerate launch": "tests/test_launchers.py and tests/test_machines.py launch tiny trainings",
    "torchrun": "tests/test_launchers.py starts two processes",
    "ACCELERATE_USE_CPU=true": "tests/test_launchers.py starts two processes",
    "cat >": "writes a job script",
    "sbatch": "needs Slurm",
    "hf auth login": "needs a network and an account",
    "mkdir": "a folder for the next command",
    "python - <<": "downloads weights; see test_weights_for_a_machine_without_a_network",
    "until python": "tests/test_launchers.py checks the exit codes",
    "CUDA_VISIBLE_DEVICES": "needs several GPUs",
    "test $?": "part of the loop before",
    "done": "part of the loop before",
    "python -m training.evaluate $MODEL stabilityai/": "needs a network; tests/evaluate compares models of diffusers",
    "python -m training.publish $RUN --repo-id org/name #": "needs a network; tests/publish uploads to a fake Hub",
    "python -m training.export_formats $MODEL --onnx": "needs ONNX packages; see tests/publish/test_export_formats.py",
    "python -m benchmarks": "minutes; see tests/test_benchmarks.py",
}
# Part of a command -> arguments that make it short and independent of downloaded weights.
EXTRA_ARGUMENTS = {
    "data=$DATA": "--set training_presets.max_images_per_epoch=4 --set training_presets.pca_init_images=18 "
    "--set output.run_name=own --set data.holdout_fraction=0.3",
    "micro_batch_size=auto": "--set output.run_name=auto",
    "--num-processes 8": "--set training_presets.batch_size=8",
    "training.evaluate": "--lpips st_alexnet --frechet st_alexnet --max-images 6",
    "training.compare": "--max-images 6",
    "training.compare_priors": "--frechet none --num-samples 4",
    "latent_diffusion.py": "--steps 3 --num-samples 4 --width 32 --sample-steps 2",
    "training.kl": "--epochs 9",
}
SPATIAL = {"latent_dim": 100, "latent_layout": "spatial", "latent_channels": 4, "latent_size": 5}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def bash_lines(text: str) -> list[str]:
    """Lines of the bash blocks; continued and quoted lines are joined, contents of here-documents are removed."""
    script = "".join(blocks(text, "bash")).replace("\\\n", " ")
    script = re.sub(r"(<<'(\w+)'\n).*?\n\2\n", r"\1", script, flags=re.DOTALL)
    script = re.sub(r"'[^']*'", lambda quoted: quoted[0].replace("\n", " "), script)
    return [re.sub(r" +", " ", line).strip() for line in script.splitlines()]


def is_assignment(line: str) -> bool:
    return re.match(r"[A-Z]+=", line) is not None


def commands(page: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(page, command, assignments of the variables before it) of each command on a page."""
    found, variables = [], {}
    for line in bash_lines(PAGES[page]):
        if is_assignment(line):
            variables[line.partition("=")[0]] = line
        else:
            found.append((page, line, tuple(variables.values())))
    return found


COMMAND_LINES = [command for page in PAGES for command in commands(page)]
RUNNABLE = [command for command in COMMAND_LINES if not command[1].startswith(tuple(NOT_RUN))]


def test_every_command_runs_here_or_has_a_reason():
    assert len(RUNNABLE) > 25
    for page, line, _ in RUNNABLE:
        assert line.startswith(("python train_vae.py", "python -m training.", "python examples/")), (page, line)
    for start in NOT_RUN:
        assert any(line.startswith(start) for _, line, _ in COMMAND_LINES), f"{start} is in no guide"


@pytest.mark.parametrize("page", PAGES)
def test_every_fenced_block_has_a_language(page):
    fences = re.findall(r"^ *```(.*)$", PAGES[page], flags=re.MULTILINE)
    assert set(fences[::2]) <= {"bash", "python", "text"} and not any(fences[1::2])


@pytest.mark.parametrize(("page", "script"), [(page, code) for page in PAGES for code in blocks(PAGES[page], "bash")])
def test_bash_blocks_and_job_scripts_parse(page, script):
    for part in (script, *(body for _, body in re.findall(r"<<'(\w+)'\n(.*?)\n\1\n", script, flags=re.DOTALL))):
        if "import" not in part or part is script:  # the other here-document is Python
            done = subprocess.run(["bash", "-n"], input=part, capture_output=True, text=True)
            assert done.returncode == 0, f"{page}: {done.stderr}"


def expand(page: str, line: str, assignments: Sequence[str]) -> list[str]:
    """The words of a command after the shell's expansion, with the assignments that stand before it on its page."""
    script = "\n".join(["set -uf", *assignments, f"printf '%s\\0' {line}"])
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True)
    assert done.returncode == 0, f"{page}: {line}\n{done.stderr}"
    return done.stdout.split("\0")[:-1]


def call(words: list[str]) -> str:
    """Run a command in this process; returns its standard output."""
    assert words[0] == "python"
    if words[1] == "-m":
        main, arguments = importlib.import_module(COMMANDS[words[2].removeprefix("training.")][0]).main, words[3:]
    elif words[1] == "train_vae.py":
        main, arguments = train_vae.main, words[2:]
    else:
        main, arguments = runpy.run_path(str(ROOT / words[1]))["main"], words[2:]
    errors, printed = io.StringIO(), io.BytesIO()
    output = io.TextIOWrapper(printed, encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(arguments)
    text = printed.getvalue().decode()
    assert not code, f"{' '.join(words)}\n{text}\n{errors.getvalue()}"
    return text


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, faces) -> Iterator[Path]:
    """A folder in which the shipped configurations are tiny ones, with a finished run, its model and its priors."""
    folder = tmp_path_factory.mktemp("guides")
    (folder / "configs").mkdir()
    own = {"dataset": "imagefolder", "data_dir": "faces", "validation_split": None, "holdout_fraction": 0.3}
    sharp = {"loss": {"adversarial_weight": 0.5, "adversarial_start_images": 8}}
    for name, run_name, sections in (
        ("ultra", "ultra_high_quality", {}),
        ("ultra_sharp", "ultra_sharp", sharp),
        ("ultra_spatial", "ultra_spatial", {"model": SPATIAL}),
        ("own_faces", "own_faces", {"data": own}),
        ("quickstart", "quickstart", {}),
    ):
        values = tiny.tiny_settings(folder, faces, **sections, training_presets={"num_epochs": 1})
        values["output"] |= {"run_name": run_name, "runs_dir": "runs", "model_dir": "model_weights"}
        (folder / "configs" / f"{name}.json").write_text(json.dumps(values))
    for name in ("faces", "parquet", "weights"):
        (folder / name).mkdir()
    for number in range(24):
        Image.fromarray(render_face(number)).save(folder / "faces" / f"{number}.png")
    images = [path.read_bytes() for path in sorted((folder / "faces").iterdir())]
    for name, part in (("train-0", images[:18]), ("validation-0", images[18:])):
        pq.write_table(pa.table({"image": part}), folder / "parquet" / f"{name}.parquet")
    with pytest.MonkeyPatch.context() as patch, tiny.process_state():
        patch.chdir(folder)
        call(["python", "train_vae.py", "--config", "configs/ultra.json"])
        model = "model_weights/vae_ultra_high_quality"
        shutil.copytree(model, "model_weights/vae_quickstart")
        values["model"] = {"patch_size": 2, "block_out_channels": [8, 16], "layers_per_block": [1, 1, 1]}
        values["data"]["attribute_columns"] = ["Eyeglasses", "Smiling"]
        values["output"]["run_name"] = "diffusion_prior"
        (folder / "configs" / "priors").mkdir()
        (folder / "configs" / "priors" / "diffusion.json").write_text(json.dumps(values))
        fit = ["python", "-m", "training.fit_prior", model, "--config", "configs/priors/diffusion.json"]
        call([*fit, "--priors", "gaussian", "diffusion"])
    yield folder


@pytest.fixture
def in_workplace(workplace, monkeypatch, session) -> Path:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace / "cache")
    return workplace


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line", "assignments"), RUNNABLE, ids=lambda value: str(value)[:70])
def test_a_command_runs(in_workplace, page, line, assignments):
    if "data=$DATA" in line and any('"dataset": "org/name"' in each for each in assignments):
        pytest.skip("needs a network; tests/data/test_hub_stream.py reads from a fake Hub")
    (run_dir,) = Path("runs").glob("ultra_high_quality_2*")
    assignments = [re.sub(r"runs/ultra_high_quality_\d+_\d+", str(run_dir), each) for each in assignments]
    extra = [arguments for part, arguments in EXTRA_ARGUMENTS.items() if part in line]
    words = expand(page, " ".join([re.sub(r" # .*$", "", line), *extra]), assignments)
    assert call(words) or words[1] == "train_vae.py"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), [(page, code) for page in PAGES for code in blocks(PAGES[page], "python")])
def test_a_python_block_runs(in_workplace, page, code):
    exec(compile(code, page, "exec"), {})


@pytest.mark.slow
def test_weights_for_a_machine_without_a_network(in_workplace, monkeypatch):
    """The code of the guide, with random weights in place of downloaded ones."""
    network = torchvision.models.alexnet(weights=None)
    for name in ("alexnet", "vgg16"):
        monkeypatch.setattr(torchvision.models, name, lambda weights: network)
    (code,) = re.findall(r"<<'PYTHON'\n(.*?)^PYTHON$", PAGES["guides/own-data"], flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "own-data", "exec"), {})
    assert PerceptualTrunk("alexnet", "weights")
