"""The shell blocks of the recipe and the benchmarks run in bash; every command parses and every configuration loads.

The commands themselves are recorded, not run: they train for minutes to hours, or measure this machine.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from training.__main__ import COMMANDS
from training.config import load_config

ROOT = Path(__file__).parent.parent
# `python` and `accelerate launch` print their arguments, one a line, and a separator.
RECORD = """
python() { printf '%s\\n' "$@" ---; }
accelerate() { shift; python "$@"; }
"""


def recorded_commands(page: str) -> list[list[str]]:
    """The arguments of every Python command in the bash blocks of a page, as bash passes them."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-euc", RECORD + "\n".join(blocks)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [part.splitlines() for part in done.stdout.split("---\n") if part]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("page", "number"), [("recipe.md", 7), ("benchmarks.md", 15)])
def test_every_command_parses_and_its_configuration_loads(page, number):
    commands = recorded_commands(page)
    assert len(commands) >= number
    for arguments in commands:
        if arguments[0] == "tests/pretended_cuda.py":  # it takes a script or a module
            arguments = arguments[1:] if arguments[1].endswith(".py") else ["-m", *arguments[1:]]
        if arguments[0] == "train_vae.py":
            module, options = "train_vae", arguments[1:]
        else:
            assert arguments[0] == "-m", arguments
            if arguments[1].startswith("benchmarks."):
                assert (ROOT / (arguments[1].replace(".", "/") + ".py")).is_file()
                continue
            module, options = COMMANDS[arguments[1].removeprefix("training.")][0], arguments[2:]
        parsed = importlib.import_module(module).build_parser().parse_args(options)
        if hasattr(parsed, "config"):  # the command `sample` has none
            load_config(ROOT / parsed.config, parsed.overrides)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_table_of_the_recipe_has_the_values_that_its_commands_set():
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    trainings = [command for command in recorded_commands("recipe.md") if command[0] == "train_vae.py"]
    parser = importlib.import_module("train_vae").build_parser()
    first, medium, large = (
        load_config(ROOT / parsed.config, parsed.overrides).training_presets
        for parsed in (parser.parse_args(trainings[index][1:]) for index in (0, 3, 4))
    )

    def row(name: str) -> list[str]:
        (line,) = re.findall(rf"^\| {name} \| (.*) \|$", text, flags=re.MULTILINE)
        return line.split(" | ")

    for cell, presets in zip(row("`batch_size`, `learning_rate`"), (first, medium, large), strict=True):
        assert cell.startswith(f"{presets.batch_size}, {presets.learning_rate:.0e}".replace("e-0", "e-"))
    assert row("`ema_decay`") == [str(presets.ema_decay) for presets in (first, medium, large)]
    copies = [str(presets.pca_init_augmented_copies) for presets in (first, medium, large)]
    assert row("`pca_init_augmented_copies`") == copies
    ranges = [f"{presets.kl_target_low:.2f} to {presets.kl_target_high:.2f}" for presets in (first, medium, large)]
    assert row("KL target range") == ranges
    assert medium.num_epochs == 100 and large.num_epochs == 200
