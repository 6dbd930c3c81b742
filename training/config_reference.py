"""Writes docs/reference/configuration.md from the code that defines the configuration keys, and explains one key.

The meaning of a key is the comment above or beside its field in training/config.py; for keys of section `model`, it is
the argument in the docstring of `AutoencoderKLUltra`. Sources are parsed, so that nothing imports torch.

    python -m training.config_reference                     writes docs/reference/configuration.md
    python train_vae.py --explain training_presets.kl_gain  prints one key
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import re
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import Config, describe_limits, unknown_key

ROOT = Path(__file__).parent.parent
_MODEL_FILE = ROOT / "modeling" / "autoencoder_kl_ultra.py"
_MODEL_CLASS = "AutoencoderKLUltra"
_JSON_TYPES = {
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "str": "string",
    "dict": "object",
    "list": "list",
    "None": "null",
}
_INTRODUCTION = """\
# Configuration

All keys of the JSON file of `--config`, and of `--set SECTION.KEY=VALUE` on the command line. Keys that are not set have
their defaults. The last column names the files in `configs/` that set a key. An unknown key, a wrong type or a value out
of range is an error before anything is written. `python train_vae.py --explain SECTION.KEY` prints one key.

This file is generated: run `python -m training.config_reference` after changing a key.
"""


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        name: Dotted, as for `--set`.
        type: JSON type and limits, such as "integer or null, at least 16".
        default: As JSON.
        meaning: One paragraph of plain text.
    """

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """The keys that one class defines.

    Attributes:
        title: The section, or the common prefix of the keys.
        text: First paragraph of the docstring of the class.
        keys: In the order of their definition.
    """

    title: str
    text: str
    keys: tuple[Key, ...]


def field_comments(cls: type) -> dict[str, str]:
    """Comments of the fields that a dataclass defines itself.

    Args:
        cls: A class whose source can be read; inherited fields belong to the class that defines them.

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


def docstring_arguments(docstring: str) -> dict[str, str]:
    """Meanings in the section Args of a Google docstring; "a, b: text" documents both."""
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


@functools.cache
def tables() -> tuple[Table, ...]:
    """All keys, in the order of the sections; the kl_* keys, which are inherited, in a table of their own."""
    found = [_model_table()]
    for section, cls in list(typing.get_type_hints(Config).items())[1:]:  # after `model`
        for base in filter(dataclasses.is_dataclass, cls.__mro__):
            title = f"`{section}`" if base is cls else f"`{section}.kl_*`"
            found.append(Table(title, _first_paragraph(base.__doc__), tuple(_field_keys(section, base))))
    return tuple(found)


def _field_keys(section: str, cls: type) -> Iterator[Key]:
    """The keys that a dataclass defines itself."""
    meanings = field_comments(cls)
    for item in dataclasses.fields(cls):
        if item.name in meanings:  # the others are inherited
            default = item.default_factory() if item.default is dataclasses.MISSING else item.default
            type_words = [_json_type(ast.parse(item.type, mode="eval").body), describe_limits(item.metadata)]
            if choices := item.metadata.get("choices"):
                type_words.append("one of " + ", ".join(choices) if len(choices) > 1 else f'or "{choices[0]}"')
            yield Key(
                f"{section}.{item.name}", ", ".join(filter(None, type_words)), json.dumps(default), meanings[item.name]
            )


def _model_table() -> Table:
    tree = ast.parse(_MODEL_FILE.read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == _MODEL_CLASS)
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    docstring = ast.get_docstring(cls) or ""
    meanings = docstring_arguments(docstring)
    keys = tuple(
        Key(
            f"model.{argument.arg}",
            _json_type(argument.annotation),
            json.dumps(ast.literal_eval(default)),
            meanings.get(argument.arg, ""),
        )
        for argument, default in zip(init.args.args[1:], init.args.defaults, strict=True)  # without self
    )
    return Table("`model`", _first_paragraph(docstring), keys)


def _json_type(annotation: ast.expr) -> str:
    """The JSON type of an annotation such as `int | None` or `tuple[int, ...]`."""
    if isinstance(annotation, ast.BinOp):
        return f"{_json_type(annotation.left)} or {_json_type(annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        return f"array of {_json_type(annotation.slice.elts[0])}s"
    return _JSON_TYPES[ast.unparse(annotation)]


def _first_paragraph(docstring: str | None) -> str:
    return " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())


def _values_in_configs(name: str) -> dict[str, Any]:
    """Name of a file in configs/ -> the value that it sets for a key, where it does."""
    section, _, key = name.partition(".")
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("configs/*.json"))}
    return {stem: values[section][key] for stem, values in files.items() if key in values.get(section, {})}


def escape_cell(text: str) -> str:
    """Plain text for a cell of a Markdown table: markup outside of `code` is escaped."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", r"\|"))
    return "".join(part if index % 2 else re.sub(r"([<*])", r"\\\1", part) for index, part in enumerate(parts))


def reference() -> str:
    """The page docs/reference/configuration.md."""
    lines = [_INTRODUCTION]
    for table in tables():
        lines += [f"## {table.title}", "", escape_cell(table.text), ""]
        lines += ["| key | type | default | meaning | set in |", "| --- | --- | --- | --- | --- |"]
        for key in table.keys:
            name, files = key.name.partition(".")[2], list(_values_in_configs(key.name))
            files = "all" if len(files) == len(list(ROOT.glob("configs/*.json"))) else ", ".join(files)
            lines.append(f"| `{name}` | {key.type} | `{key.default}` | {escape_cell(key.meaning)} | {files} |")
        lines.append("")
    return "\n".join(lines)


def explain(name: str) -> str:
    """One key in a few lines.

    Raises:
        ValueError: There is no such key; the error names the nearest.
    """
    known = {key.name: key for table in tables() for key in table.keys}
    if name not in known:
        raise unknown_key(name, list(known))
    key = known[name]
    lines = [f"{key.name}  ({key.type}; default {key.default})", key.meaning]
    lines += [f"configs/{stem}.json: {json.dumps(value)}" for stem, value in _values_in_configs(name).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "docs" / "reference" / "configuration.md").write_text(reference(), encoding="utf-8")
