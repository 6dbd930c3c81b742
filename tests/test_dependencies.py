"""The page of dependencies has every requirement of pyproject.toml, and a plain installation no unclear license."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "reference" / "dependencies.md").read_text(encoding="utf-8")


def test_the_page_lists_the_direct_requirements():
    table = PAGE.partition("Required directly:")[2].partition("Required by these:")[0]
    required = {Requirement(text).name.replace("_", "-") for text in PROJECT["dependencies"]}
    assert set(re.findall(r"^\| `([\w.-]+)`", table, flags=re.MULTILINE)) == required


def test_the_package_with_two_licenses_comes_with_extras_only():
    assert not [text for text in PROJECT["dependencies"] if text.startswith("stlpips")]
    extras = PROJECT["optional-dependencies"]
    assert {name for name, texts in extras.items() if any(text.startswith("stlpips") for text in texts)} == {
        "quickstart",
        "test",
    }
    assert "**CC BY-NC-SA 4.0**" in PAGE
