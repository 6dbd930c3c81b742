"""Imports go downward only: train_vae -> trainer -> its parts -> what computes -> modeling."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([ROOT / "train_vae.py", *(ROOT / "modeling").rglob("*.py"), *(ROOT / "training").rglob("*.py")])
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES}

# From top to bottom, by module or package. A module may import from lower layers and from its own.
LAYERS = [
    ("train_vae", "training.__main__", "training.command_reference"),
    ("training.trainer",),
    ("training.setup",),
    (
        "training.budget",
        "training.checkpoint",
        "training.demo",
        "training.evaluate",
        "training.initial_weights",
        "training.monitor",
        "training.priors",
        "training.publish",
        "training.tracking",
        # Commands.
        "training.align",
        "training.compare",
        "training.compare_priors",
        "training.config_reference",
        "training.encode",
        "training.export_formats",
        "training.fit_prior",
        "training.kl",
        "training.reconstruct",
        "training.sample",
        "training.synthetic_faces",
    ),
    (
        "training.builders",
        "training.cast_weights",
        "training.distributed",
        "training.learning_rate",
        "training.pca_init",
        "training.signals",
        "training.step",
    ),
    ("training.ema", "training.muon", "training.randomness"),
    ("training.data", "training.losses"),
    ("training.cli", "training.config", "training.io", "training.launch", "training.run_files"),
    ("modeling",),
]
STDLIB_ONLY = (
    "training.cli",
    "training.config",
    "training.config_reference",
    "training.io",
    "training.launch",
    "training.losses.kl_control",
    "training.losses.kl_simulation",
    "training.run_files",
    "training.tracking.alerts",
)
COMPUTES = (
    "training.losses.adversarial",
    "training.losses.objective",
    "training.losses.perceptual",
    "training.losses.perceptual_weights",
    "training.evaluate.metrics",
    "training.losses.kl_control",
    "training.config",
    "training.io",
)


def imports(path: Path, only_top: bool = False) -> set[str]:
    """Modules that a file imports, anywhere in it or only when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(tree.body) if only_top else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    # `from training import hub` and `from training.publish.hub import push` are the same module.
    modules = set(NAMES.values())
    return {name if name in modules else name.rpartition(".")[0] or name for name in found}


def level(name: str) -> int:
    """The layer of a module, counted from the top."""
    for index, layer in enumerate(LAYERS):
        if any(name == each or name.startswith(f"{each}.") for each in layer):
            return index
    assert name == "training", f"{name} has no layer"
    return len(LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=NAMES.get)
def test_modeling_and_what_computes_import_nothing_above_them(path):
    name, used = NAMES[path], imports(path)
    own = {module for module in used if module.startswith(("training", "modeling", "train_vae"))}
    if name.startswith("modeling"):
        assert all(module.startswith("modeling") for module in own)
    if name in COMPUTES:
        assert own <= {*COMPUTES, "training.data.images", "training.io", "modeling.autoencoder_kl_ultra"}
    assert "train_vae" not in used
    if name != "train_vae":
        assert "training.trainer" not in used or name == "training.trainer"


def own_imports(path: Path) -> set[str]:
    return {used for used in imports(path) if used in NAMES.values()}


def test_every_layer_imports_downward():
    for path, name in NAMES.items():
        for used in own_imports(path):
            assert level(used) >= level(name), f"{name} imports {used}, which is above it"


def test_no_imports_form_a_circle():
    graph = {name: own_imports(path) - {name} for path, name in NAMES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_every_package_starts_without_torch():
    for path in (ROOT / "training").rglob("__init__.py"):
        assert not imports(path), path


@pytest.mark.parametrize("module", STDLIB_ONLY)
def test_configuration_and_control_need_the_standard_library_only(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    for used in imports(path, only_top=True):
        assert used.partition(".")[0] in sys.stdlib_module_names or used in STDLIB_ONLY, used


def test_the_entry_point_needs_no_torch_to_start():
    top = imports(ROOT / "train_vae.py", only_top=True)
    own = {used for used in top if used.partition(".")[0] not in sys.stdlib_module_names}
    assert own == {"training.cli", "training.config", "training.launch"}


def test_only_training_that_ends_and_one_command_publish():
    uploaders = {name for path, name in NAMES.items() if "training.publish.hub" in imports(path)}
    assert uploaders <= {"training.setup", *(f"training.publish.{name}" for name in ("card", "checkpoints", "stage"))}


def test_the_monitor_stands_apart():
    """It only reads files, so it imports nothing that trains."""
    for path, name in NAMES.items():
        if name.startswith("training.monitor"):
            own = {used for used in imports(path) if used.startswith(("training.", "modeling"))}
            shared = ("training.cli", "training.run_files")
            assert all(used.startswith("training.monitor") or used in shared for used in own)
            assert "torch" not in {used.partition(".")[0] for used in imports(path)}


def test_no_folder_hides_a_library():
    """A script's own folder comes first on sys.path."""
    taken = {"datasets", "accelerate", "lpips", "diffusers", "torch", "transformers"}
    assert not taken & {path.stem for path in ROOT.iterdir()}
