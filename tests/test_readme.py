"""The README: its length, its claims, and every command and Python block that it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
from PIL import Image
from test_guides import call, expand

from training.__main__ import COMMANDS
from training.config import Config
from training.data.synthetic_faces.render import render_face

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Beginning of a command -> why no test runs it.
NOT_RUN = {
    "git clone": "needs a network",
    "python3 -m venv": "tests/test_wheel.py installs the project",
    "pip install": "tests/test_wheel.py installs the project",
    "accelerate launch train_vae.py": "tests/test_launchers.py launches tiny trainings",
    "torchrun --standalone": "needs eight GPUs; tests/test_launchers.py starts two processes on the CPU",
    "accelerate launch --config_file configs/accelerate_two_machines.yaml": "two machines; see tests/test_machines.py",
}
GETTING_STARTED = [f"docs/getting-started/{name}.md" for name in ("installation", "quickstart", "run-folder")]
# The same for the commands that only CONTRIBUTING.md and the pages of "Getting started" show.
NOT_RUN_ELSEWHERE = {
    "make ": "the targets are what CI runs",
    "cd ": "changes the folder",
    "source ": "activates an environment",
    "uv run": "needs a network",
    "tensorboard ": "a server of another project",
    "python -m training.monitor --html": "tests/monitor/test_monitor.py writes pages",
}
# Part of a command -> arguments that make it short and independent of downloaded weights.
EXTRA_ARGUMENTS = {
    "training.monitor": "--once",
    "training.evaluate": "--max-images 6",
    "training.fit_prior": "--batch-size 8",
    '"dataset": "imagefolder"': "--set data.holdout_fraction=0.2 --set output.run_name=folder "
    "--set training_presets.max_images_per_epoch=4",
}


def blocks(language: str, text: str = README) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def bash_lines(text: str = README) -> list[str]:
    """Lines of the bash blocks; continued ones are joined, comments removed."""
    lines = "".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", re.sub(r"\s+# .*$", "", line)).strip() for line in lines if line[:1] not in ("", "#")]


def is_assignment(line: str) -> bool:
    return all(re.match(r"[A-Z_]+=", word) for word in line.split())


COMMAND_LINES = [line for line in bash_lines() if not is_assignment(line)]
RUNNABLE = [line for line in COMMAND_LINES if not line.startswith(tuple(NOT_RUN))]


def test_length():
    assert 900 <= len(README.split()) <= 1100


def test_every_fenced_block_has_a_language():
    fences = re.findall(r"^```(.*)$", README, flags=re.MULTILINE)
    assert all(fences[::2]) and not any(fences[1::2])
    assert set(fences[::2]) == {"bash", "python", "text"}


def test_every_command_runs_here_or_has_a_reason():
    assert len(RUNNABLE) >= 8
    assert all(line.startswith("python ") for line in RUNNABLE), RUNNABLE
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in COMMAND_LINES), f"{start} is no longer in the README"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *GETTING_STARTED])
def test_other_pages_show_commands_of_the_readme_or_have_a_reason(page):
    reasons = NOT_RUN | NOT_RUN_ELSEWHERE
    lines = bash_lines((ROOT / page).read_text(encoding="utf-8"))
    for line in lines:
        assert is_assignment(line) or line in COMMAND_LINES or line.startswith(tuple(reasons)), line
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in lines:
        assert not line.startswith("make ") or line.split()[1] in targets, line


@pytest.mark.parametrize("page", GETTING_STARTED)
def test_python_blocks_of_other_pages_are_those_of_the_readme(page):
    assert set(blocks("python", (ROOT / page).read_text(encoding="utf-8"))) <= set(blocks("python"))


def test_variables_are_assigned_before_they_are_used():
    assigned = {"HOME"}
    for line in bash_lines():
        assert set(re.findall(r"\$\{?(\w+)", line)) <= assigned, line
        if is_assignment(line):
            assigned |= set(re.findall(r"(\w+)=", line))


def test_the_table_of_commands_is_complete():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, flags=re.MULTILINE))
    assert list(rows) == list(COMMANDS)
    for name, (_, summary) in COMMANDS.items():
        assert rows[name].startswith(summary)


def test_the_settings_in_brackets_are_those_of_the_shipped_configuration():
    shipped = Config().to_dict()["training_presets"]
    shipped |= json.loads((ROOT / "configs" / "ultra.json").read_text())["training_presets"]
    (note,) = re.findall(r"^\\\* (.*?)\n\n", README, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`(\w+)` \S+(?: lowered to \S+)? \(([^)]+)\)", " ".join(note.split()))
    assert len(found) >= 7
    for key, value in found:
        assert json.loads(value) == shipped[key], key
    assert f"({shipped['kl_target_low']:.2f} to {shipped['kl_target_high']:.2f})" in note


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, faces) -> Path:
    """A folder in which the configurations of the README are tiny ones, after its quickstart."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").mkdir()
    for name, run_name in (("quickstart", "quickstart"), ("ultra", "ultra_high_quality")):
        values = tiny.tiny_settings(folder, faces, training_presets={"num_epochs": 1})
        values["output"] |= {"run_name": run_name, "runs_dir": "runs", "model_dir": "model_weights"}
        (folder / "configs" / f"{name}.json").write_text(json.dumps(values))
    (folder / "faces").mkdir()
    for number in range(24):
        Image.fromarray(render_face(number)).save(folder / "faces" / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch, tiny.process_state():
        patch.chdir(folder)
        call(["python", "train_vae.py", "--config", "configs/quickstart.json"])
    return folder


@pytest.fixture
def in_workplace(workplace, monkeypatch, session) -> Path:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HOME", str(workplace))
    return workplace


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in RUNNABLE if "quickstart.json" not in line or "-m" in line])
def test_a_command_runs(in_workplace, line):
    assignments = [other for other in bash_lines() if is_assignment(other)]
    extra = [arguments for part, arguments in EXTRA_ARGUMENTS.items() if part in line]
    if "training.sample" in line and not Path("model_weights/vae_quickstart/priors/gaussian").exists():
        fit = "python -m training.fit_prior model_weights/vae_quickstart --config configs/quickstart.json"
        call([*fit.split(), *EXTRA_ARGUMENTS["training.fit_prior"].split()])
    words = expand("README", " ".join([line, *extra]), assignments)
    assert call(words) or words[1] == "train_vae.py"


@pytest.mark.slow
def test_the_python_blocks_run(in_workplace):
    size = tiny.SETTINGS["model"]["sample_size"]
    for code in blocks("python"):
        exec(compile(code.replace("64, 64", f"{size}, {size}"), "README", "exec"), {})
    with Image.open("face.png") as face:
        assert face.size == (size, size)
