"""The generated reference of commands is up to date and complete."""

from __future__ import annotations

import re
from pathlib import Path

from training.__main__ import COMMANDS
from training.command_reference import reference

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "commands.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run python -m training.command_reference"


def test_every_command_and_option_is_described():
    text = reference()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == list(COMMANDS)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)
        assert len(cells) == 4 and len(cells[2].strip()) > 5, f"write a help text for {row}"
        assert "%(" not in row


def test_values_and_exclusive_options():
    text = reference()
    assert "| `--resume auto` or `--resume PATH` |" in text
    assert (
        "| `--variant {fp16,bf16}` | half-precision weights, beside the float32 ones (required, unless `--onnx` or `--pth`) |"
        in text
    )
