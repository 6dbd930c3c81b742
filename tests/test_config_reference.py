"""The generated reference of configuration keys, and the messages that the documents quote: neither can go stale."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from training import config_reference as describe
from training.config import Config
from training.config_reference import arguments_of_docstring, comments_of_fields, describe_key, main, reference, tables

ROOT = Path(__file__).parent.parent
CONFIGURATION = ROOT / "docs" / "configuration.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


@dataclass
class Example:
    """Fields with every kind of comment."""

    plain: int = 1
    beside: int = 2  # beside it
    # above it,
    # in two lines
    above: str = "# not a comment"
    # first above,
    both: int = 3  # then beside

    # apart from what follows

    lonely: int = 4
    long: tuple = (
        1,  # one of its elements
        2,
    )  # at its end


def test_comments_above_and_beside_a_field():
    assert comments_of_fields(Example) == {
        "plain": "",
        "beside": "beside it",
        "above": "above it, in two lines",
        "both": "first above, then beside",
        "lonely": "",
        "long": "at its end",
    }


def test_arguments_of_a_docstring():
    docstring = """What it is.

    More: not an argument.

    Args:
        first: One line.
        second, third: Two of them, in
            two lines: with a colon.

    Raises:
        ValueError: no argument either.
    """
    both = "Two of them, in two lines: with a colon."
    assert arguments_of_docstring(docstring) == {"first": "One line.", "second": both, "third": both}
    assert arguments_of_docstring("No arguments.") == {}


def test_every_key_has_a_meaning():
    without = [key.name for table in tables() for key in table.keys if len(key.meaning) < 5]
    assert without == [], "write a comment beside these fields, or an argument into the model's docstring"


def test_every_key_is_described_once_with_its_default():
    pytest.importorskip("diffusers")
    import inspect

    from modeling.autoencoder_kl_ultra import AutoencoderKLUltra

    arguments = list(inspect.signature(AutoencoderKLUltra.__init__).parameters.values())[1:]
    expected = {f"model.{argument.name}": argument.default for argument in arguments}
    expected |= {key: value for key, value in Config().flat().items() if not key.startswith("model.")}
    described = [key for table in tables() for key in table.keys]
    assert len(described) == len({key.name for key in described})
    assert {key.name: json.loads(key.default) for key in described} == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("data.crop_px", "integer or null"),
        ("data.data_files", "object or null"),
        ("data.timeout_s", "number"),
        ("model.encoder_block_out_channels", "array of integers"),
        ("model.latents_std", "array of numbers or null"),
        ("training_presets.kl_cycle_enabled", "boolean"),
        ("output.run_name", "string"),
    ],
)
def test_types_are_those_of_json(key, kind):
    (found,) = [item for table in tables() for item in table.keys if item.name == key]
    assert found.type == kind


def test_the_document_is_what_the_command_prints():
    printed = subprocess.run(
        [sys.executable, "-m", "training.config_reference"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed == reference()
    assert CONFIGURATION.read_text(encoding="utf-8") == printed, (
        "docs/configuration.md is stale: run python -m training.describe --write docs/configuration.md"
    )


def test_every_row_of_the_document_has_four_cells_and_no_markup_by_accident():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(table.keys) for table in tables()) > 90
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)
        assert len(cells) == 6, row
        assert not re.search(r"(?<!\\)[<*]", re.sub(r"`[^`]*`", "", row)), row


def test_the_command_needs_the_standard_library_only():
    code = "import sys, training.config_reference as d; d.reference(); print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"


def test_one_key(capsys):
    assert main(["training_presets.kl_gain"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("training_presets.kl_gain  (number, default 0.5)\n") and "half-life" in out
    assert describe_key("model.latent_size").splitlines()[0] == "model.latent_size  (integer, default 1)"


def test_an_unknown_key_names_the_nearest(capsys):
    assert main(["training_presets.kl_gian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: unknown configuration key training_presets.kl_gian: did you mean training_presets.kl_gain?\n"
    )


def test_write(tmp_path, capsys):
    assert main(["--write", str(tmp_path / "keys.md")]) == 0
    assert (tmp_path / "keys.md").read_text(encoding="utf-8") == reference()
    assert main(["--write", str(tmp_path / "missing" / "keys.md")]) == 2
    assert main(["hub.push", "--write", str(tmp_path / "keys.md")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


# ---------------------------------------------------------------------- docs/troubleshooting.md


def messages_of(paths: list[Path]) -> str:
    """All strings of some sources; what they fill in is cut out, "..." in a document stands for it."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return re.sub(r"%[-.\d]*[a-z]|\{\d[^}]*\}", "\0", "\n".join(found)).replace("%%", "%")


def test_the_messages_that_are_quoted_are_those_of_the_program():
    said = messages_of([*(ROOT / "training").rglob("*.py"), ROOT / "train_vae.py"])
    quoted = re.findall(r"```text\n(.*?)```", TROUBLESHOOTING.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in quoted for line in block.splitlines()]
    assert len(lines) > 20
    for line in lines:
        parts = [part.strip() for part in line.split("...")]
        assert max(map(len, parts)) >= len("failed:"), f"nothing can be recognised of: {line}"
        for part in parts:
            assert part in said, f"no message of the program has: {part}"


def test_keys_that_the_document_names_exist():
    known = {key.name for table in describe.tables() for key in table.keys}
    sections = "|".join(sorted({name.partition(".")[0] for name in known}))
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    named = set(re.findall(rf"`(?:--set )?((?:{sections})\.\w+)", text))
    assert len(named) > 20 and named <= known, named - known
