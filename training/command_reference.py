"""Writes docs/reference/commands.md from the argument parsers of all commands.

python -m training.command_reference
"""

from __future__ import annotations

import argparse
import importlib

from training.__main__ import COMMANDS
from training.config_reference import ROOT, escape_cell

_INTRODUCTION = """\
# Commands

Run the commands from the folder of the repository. After an installation, `face-vae COMMAND` runs them from any folder,
for example `face-vae train` or `face-vae evaluate`; `python -m training COMMAND` does the same.

Every command prints `error: ...` and exits with 2 if an argument, a file or the configuration must be changed. MODEL is
the folder of an exported model, a run (its best model) or a checkpoint, or a Hub id.

This file is generated: run `python -m training.command_reference` after changing an option.
"""


def reference() -> str:
    """The page docs/reference/commands.md."""
    lines = [_INTRODUCTION, "| command | what it does |", "| --- | --- |"]
    lines += [f"| [{name}](#{name}) | {summary} |" for name, (_, summary) in COMMANDS.items()]
    for name, (module, _) in COMMANDS.items():
        parser = importlib.import_module(module).build_parser()
        program = parser.prog if parser.prog.startswith("python") else f"python {parser.prog}"
        lines += ["", f"## {name}", "", f"`{program}`: {parser.description}", ""]
        lines += ["| argument | meaning |", "| --- | --- |"]
        lines += [_row(parser, action) for action in parser._actions if action.dest != "help"]
        if parser.epilog:
            text = " ".join(parser.epilog.split())
            lines += ["", text[0].upper() + text[1:].removesuffix(".") + "."]
    return "\n".join(lines) + "\n"


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    names = action.option_strings or [""]
    values = [""]
    if action.nargs != 0:
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
        values = (action.metavar or value).split("|")
        values = [f"{value} ..." if action.nargs in ("+", "*") else value for value in values]
    cell = " or ".join(f"`{name} {value}`".replace("` ", "`").replace(" `", "`") for name in names for value in values)
    notes = ["required"] if action.required and action.option_strings else []
    for group in parser._mutually_exclusive_groups:
        others = [f"`{other.option_strings[0]}`" for other in group._group_actions if other is not action]
        if action in group._group_actions:
            notes.append(("required, unless " if group.required else "not with ") + " or ".join(others))
    meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
    if notes:
        meaning += f" ({'; '.join(notes)})"
    return f"| {cell} | {escape_cell(meaning)} |"


if __name__ == "__main__":
    (ROOT / "docs" / "reference" / "commands.md").write_text(reference(), encoding="utf-8")
