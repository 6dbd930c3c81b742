"""The generated reference of configuration keys, and the messages that the documents quote: both are up to date."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from training.config import Config
from training.config_reference import docstring_arguments, explain, field_comments, reference, tables

ROOT = Path(__file__).parent.parent
CONFIGURATION = ROOT / "docs" / "reference" / "configuration.md"
TROUBLESHOOTING = ROOT / "docs" / "guides" / "troubleshooting.md"


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
    assert field_comments(Example) == {
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
    assert docstring_arguments(docstring) == {"first": "One line.", "second": both, "third": both}
    assert docstring_arguments("No arguments.") == {}


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
        ("data.crop_px", "integer or null, at least 16"),
        ("data.data_files", "object or null"),
        ("data.timeout_s", "number, greater than 0 and at most 3000"),
        ("model.encoder_block_out_channels", "array of integers"),
        ("model.latents_std", "array of numbers or null"),
        ("training_presets.kl_cycle_enabled", "boolean"),
        ("output.run_name", "string"),
        ("training_presets.optimizer", "string, one of adam, adamw, muon"),
        ("training_presets.micro_batch_size", 'integer or string or null, at least 1, or "auto"'),
    ],
)
def test_types_are_those_of_json_with_limits(key, kind):
    (found,) = [item for table in tables() for item in table.keys if item.name == key]
    assert found.type == kind


def test_the_page_is_up_to_date():
    assert CONFIGURATION.read_text(encoding="utf-8") == reference(), "run python -m training.config_reference"


def test_the_page_names_the_files_that_set_a_key():
    files = {row.split("`")[1]: row.split("|")[-2].strip() for row in reference().splitlines() if row.startswith("| `")}
    assert files["kl_target_low"] == "celebahq, ffhq, own_faces, ultra"
    assert files["synthetic_train_images"] == "quickstart"
    assert files["shuffle_buffer"] == ""


def test_every_row_of_the_page_has_five_cells_and_escaped_markup():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(table.keys) for table in tables()) > 90
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)
        assert len(cells) == 7, row
        assert not re.search(r"(?<!\\)[<*]", re.sub(r"`[^`]*`", "", row)), row


def test_explain():
    assert explain("training_presets.kl_target_low").splitlines() == [
        "training_presets.kl_target_low  (number, greater than 0 and less than 1; default 0.01)",
        "lower end of the target range of the smoothed KL fraction",
        "configs/celebahq.json: 0.03",
        "configs/ffhq.json: 0.03",
        "configs/own_faces.json: 0.01",
        "configs/ultra.json: 0.1",
    ]
    assert explain("model.latent_size").startswith("model.latent_size  (integer; default 1)\n")
    with pytest.raises(ValueError, match="kl_gian: did you mean training_presets.kl_gain?"):
        explain("training_presets.kl_gian")


# ---------------------------------------------------------------------- docs/guides/troubleshooting.md


def messages_of(paths: list[Path]) -> str:
    """All string literals of source files, without formatted values, for which documents write "..."."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return re.sub(r"%[-.\d]*[a-z]|\{\d[^}]*\}", "\0", "\n".join(found)).replace("%%", "%")


def test_quoted_messages_exist_in_the_sources():
    messages = messages_of([*(ROOT / "training").rglob("*.py"), ROOT / "train_vae.py"])
    quoted = re.findall(r"```text\n(.*?)```", TROUBLESHOOTING.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in quoted for line in block.splitlines()]
    assert len(lines) > 20
    for line in lines:
        parts = [part.strip() for part in line.split("...")]
        assert max(map(len, parts)) >= len("failed:"), f"too little text in: {line}"
        for part in parts:
            assert part in messages, f"no message of the program has: {part}"


def test_keys_named_in_the_troubleshooting_page_exist():
    known = {key.name for table in tables() for key in table.keys}
    sections = "|".join(sorted({name.partition(".")[0] for name in known}))
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    named = set(re.findall(rf"`(?:--set )?((?:{sections})\.\w+)", text))
    assert len(named) > 20 and named <= known, named - known
