"""All documents: links, files, commands, options and configuration keys exist. tests/test_readme.py runs commands."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
from pathlib import Path

import pytest
import yaml

from training.__main__ import COMMANDS
from training.config_reference import tables

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
# Pages that describe the past: their commands and keys may be gone.
HISTORY = ("docs/lab-notes.md",)
SECTIONS = ("model", "data", "loss", "training_presets", "output", "hub")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Lines of the bash blocks that start this project's Python; continued ones are joined, comments removed."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+# .*$", "", line).strip() for line in lines]
    return [line for line in lines if re.search(r"\btrain_vae\.py|\b-m training\.|^face-vae ", line)]


@functools.cache
def options(command: str) -> set[str]:
    """The options of a command, from its --help."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        importlib.import_module(COMMANDS[command][0]).main(["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", output.getvalue()))


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_to_files_and_headings(path):
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, where GitHub and the documentation site agree on them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [path for path, name in zip(DOCUMENTS, IDS) if name not in HISTORY], ids=lambda path: path.name
)
def test_commands_options_files_and_keys_exist(path):
    text = path.read_text(encoding="utf-8")
    for line in commands(text):
        module = re.search(r"-m training\.(\w+)|^face-vae (\w+)", line)
        name = (module[1] or module[2]) if module else "train"
        if name not in COMMANDS:
            assert list((ROOT / "training").glob(f"{name}*")), line
            continue
        arguments = line[line.index("train_vae.py") :] if name == "train" and "train_vae.py" in line else line
        assert set(re.findall(r"(?<=\s)--[a-z][\w-]*", arguments)) <= options(name), line
    for name in re.findall(
        r"\b(?:training|modeling|configs|tests|examples|benchmarks)/[\w/]+\.(?:py|json|yaml)\b", text
    ):
        assert (ROOT / name).is_file(), name
    keys = {key.name for table in tables() for key in table.keys}
    for key in re.findall(rf"--set ['\"]?((?:{'|'.join(SECTIONS)})\.\w+)=", text):
        assert key in keys, key


def test_the_site_lists_every_page():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for item in (entry.values() if isinstance(entry, dict) else entry) for page in pages(item)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))


def test_answers_in_contributing_name_at_most_three_files_and_what_is_in_them():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## How it works\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)
    answers = section.strip().split("\n\n")
    assert len(answers) >= 3
    for answer in answers:
        files = set(re.findall(r"`(\w+/[\w/]+\.py)`", answer))
        assert 1 <= len(files) <= 3, files
        sources = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        names = re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)(?:\(.*?\))?`", answer)
        for name in names:
            section, _, key = name.rpartition(".")
            assert re.search(rf"\b{key}\b", sources) or section in SECTIONS, name
