"""The wheel: every module of the tree is inside, and the commands run from it.

`configs/` is not in it: recipes are files of the repository, to be copied and edited.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel's content and nothing else, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "training", source / "training", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "modeling", source / "modeling", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "train_vae.py"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def test_every_module_is_in_the_wheel(installed):
    tree = {path.relative_to(ROOT) for name in ("training", "modeling") for path in (ROOT / name).rglob("*.py")}
    (wheel,) = installed.parent.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {Path(name) for name in archive.namelist() if name.endswith(".py")}
    assert packed == tree | {Path("train_vae.py")}


IMPORT_PACKAGES = """
import importlib, pkgutil, modeling, training
for package in (modeling, training):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.ispkg:
            importlib.import_module(module.name)
print(training.__file__)
"""


def test_packages_and_commands_run_from_the_wheel(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    script = installed / "bin" / ("face-vae.exe" if os.name == "nt" else "face-vae")
    for command, start in (
        ([script, "--help"], "usage: face-vae COMMAND"),
        ([sys.executable, "-m", "training", "--help"], "usage: face-vae COMMAND"),
        ([sys.executable, "-c", IMPORT_PACKAGES], str(installed)),
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(start)
