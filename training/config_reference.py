"""The reference of all configuration keys, written from the code that defines them: docs/configuration.md.

What it is for: one table for each section (key, type, default, meaning), so that a key is documented where it is
defined and nowhere else. The meaning of a key is the comment above or beside its field in training/config.py and
training/losses/kl_control.py; that of a key of `model` is its argument in the docstring of `AutoencoderKLUltra`. What it is not for:
checking values (config.py). Stdlib only: sources are parsed, nothing imports torch.

    python -m training.describe                              prints the reference
    python -m training.describe training_presets.kl_gain     prints one key
    python -m training.describe --write docs/configuration.md
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import json
import os
import re
import sys
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import Config, unknown_key

MODEL_FILE = Path(__file__).parent.parent / "modeling" / "autoencoder_kl_ultra.py"
MODEL_CLASS = "AutoencoderKLUltra"
_JSON_TYPES = {
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "str": "string",
    "dict": "object",
    "None": "null",
}
_INTRODUCTION = """\
# Configuration

Every key of the JSON file that `--config` names, and of `--set SECTION.KEY=VALUE` on the command line. What a file does
not name has its default. An unknown key, a wrong type or a value out of range is an error that names the remedy, before
anything is written. `python -m training.describe SECTION.KEY` prints one key.

This file is written by `python -m training.describe --write docs/configuration.md` from the code that defines the keys.
"""


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        name: Dotted, as `--set` spells it.
        type: JSON type, such as "integer or null".
        default: As it would stand in JSON.
        meaning: One paragraph of plain text.
    """

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """Keys that are documented together.

    Attributes:
        title: The section, and what of it.
        text: Of the class that defines the keys.
        keys: In the order of their definition.
    """

    title: str
    text: str
    keys: tuple[Key, ...]


def comments_of_fields(cls: type) -> dict[str, str]:
    """Meanings of the fields that a dataclass defines itself.

    Args:
        cls: A class with readable source; inherited fields belong to the class that defines them.

    Returns:
        Field -> comment lines directly above it, then the comment beside it, as one paragraph; "" without a comment.
    """
    source = inspect.getsource(cls)
    comments = {
        token.start[0]: (token.string.lstrip("#").strip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    meanings = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        lines, above = [], node.lineno - 1
        while above in comments and comments[above][1]:
            lines.insert(0, comments[above][0])
            above -= 1
        beside, _ = comments.get(node.end_lineno, ("", False))
        meanings[node.target.id] = " ".join([*lines, beside]).strip()
    return meanings


def arguments_of_docstring(docstring: str) -> dict[str, str]:
    """Meanings in the section Args of a Google docstring; "a, b: text" gives both the same."""
    section = re.search(r"^Args:.*\n((?:(?:[ ]+.*)?\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc("\n" + section.group(1) if section else "").splitlines():
        head = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if head:
            names = head.group(1).split(", ")
            meanings.update(dict.fromkeys(names, head.group(2).strip()))
        else:
            meanings.update({name: f"{meanings[name]} {line.strip()}".strip() for name in names})
    return meanings


def tables() -> list[Table]:
    """All keys, in the order of the sections; inherited ones after them, in a table of their own."""
    hints = typing.get_type_hints(Config)
    found = []
    for section in dataclasses.fields(Config):
        if section.name == "model":
            found.append(_model_table())
            continue
        cls = hints[section.name]
        for owner in (base for base in cls.__mro__ if "__dataclass_fields__" in vars(base)):
            keys = tuple(_field_keys(section.name, cls, owner))
            prefix = os.path.commonprefix([key.name for key in keys])
            title = f"`{section.name}`" if owner is cls else f"`{prefix}*`"
            found.append(Table(title, _first_paragraph(owner.__doc__), keys))
    return found


def _field_keys(section: str, cls: type, owner: type) -> Iterator[Key]:
    meanings, annotations = comments_of_fields(owner), typing.get_type_hints(owner)
    for item in dataclasses.fields(cls):
        if item.name in meanings:
            default = item.default_factory() if item.default is dataclasses.MISSING else item.default
            kind = _json_type(ast.parse(_annotation_text(annotations[item.name]), mode="eval").body)
            yield Key(f"{section}.{item.name}", kind, json.dumps(default), meanings[item.name])


def _annotation_text(annotation: Any) -> str:
    return str(annotation) if isinstance(annotation, types.UnionType) else annotation.__name__


def _model_table() -> Table:
    tree = ast.parse(MODEL_FILE.read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == MODEL_CLASS)
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    docstring = ast.get_docstring(cls) or ""
    meanings = arguments_of_docstring(docstring)
    arguments = init.args.args[1:]  # without self
    keys = tuple(
        Key(
            f"model.{argument.arg}",
            _json_type(argument.annotation),
            json.dumps(ast.literal_eval(default)),
            meanings.get(argument.arg, ""),
        )
        for argument, default in zip(arguments, init.args.defaults, strict=True)
    )
    return Table("`model`", _first_paragraph(docstring), keys)


def _json_type(annotation: ast.expr) -> str:
    """The JSON type that an annotation such as `int | None` or `tuple[int, ...]` stands for."""
    if isinstance(annotation, ast.BinOp):
        return f"{_json_type(annotation.left)} or {_json_type(annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        return f"array of {_json_type(annotation.slice.elts[0])}s"
    return _JSON_TYPES[ast.unparse(annotation)]


def _first_paragraph(docstring: str | None) -> str:
    return " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())


def _escaped(text: str) -> str:
    """Plain text for a cell of a Markdown table: what it would take for markup, outside of `code`, is escaped."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", r"\|"))
    return "".join(part if index % 2 else re.sub(r"([<*])", r"\\\1", part) for index, part in enumerate(parts))


def reference() -> str:
    """The whole reference, in Markdown."""
    lines = [_INTRODUCTION]
    for table in tables():
        lines += [f"## {table.title}", "", _escaped(table.text), ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for key in table.keys:
            name = key.name.partition(".")[2]
            lines.append(f"| `{name}` | {key.type} | `{key.default}` | {_escaped(key.meaning)} |")
        lines.append("")
    return "\n".join(lines)


def describe_key(name: str) -> str:
    """One key in a few lines.

    Raises:
        ValueError: There is no such key; the error names the nearest.
    """
    known = {key.name: key for table in tables() for key in table.keys}
    if name not in known:
        raise unknown_key(name, list(known))
    key = known[name]
    return f"{key.name}  ({key.type}, default {key.default})\n{key.meaning}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.describe", description="What configuration keys mean.")
    parser.add_argument("key", nargs="?", metavar="SECTION.KEY", help="print this key (default: the whole reference)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the whole reference to FILE")
    arguments = parser.parse_args(argv)
    try:
        if arguments.key and arguments.write:
            raise ValueError(f"--write writes the whole reference: leave {arguments.key} out, or --write.")
        if arguments.write:
            arguments.write.write_text(reference(), encoding="utf-8")
        else:
            print(describe_key(arguments.key) if arguments.key else reference(), end="\n" if arguments.key else "")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
