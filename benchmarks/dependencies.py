"""Writes docs/reference/dependencies.md: what the package and each of its extras install, with sizes and licenses.

    python -m benchmarks.dependencies

Reads pyproject.toml and the metadata of the packages of this environment, in which all extras must be installed (Python 3.11 or later).
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "dependencies.md"
# Where the metadata of a package names no license, or a text instead of a name: what its license file says.
_LICENSES = {
    "lpips": "BSD-2-Clause",
    "torch": "BSD-3-Clause",
    "stlpips-pytorch": "BSD-2-Clause; two files CC BY-NC-SA 4.0, see above",
}


def closure(requirements: Iterable[str]) -> set[str]:
    """Canonical names of the packages that requirements install, those of the requirements themselves included."""
    found: set[tuple[str, str]] = set()
    queue = [Requirement(text) for text in requirements]
    while queue:
        requirement = queue.pop()
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            found.add(key)
            for text in importlib.metadata.requires(requirement.name) or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    needed.marker = None
                    queue.append(needed)
    return {name for name, _ in found}


def megabytes(names: Iterable[str]) -> float:
    """Installed size of packages, in units of 10^6 bytes."""
    files = (file.locate() for name in names for file in importlib.metadata.files(name) or ())
    return sum(Path(path).stat().st_size for path in files if Path(path).is_file()) / 1e6


def license_of(name: str) -> str:
    """The license that the metadata of a package names, in a few words."""
    metadata = importlib.metadata.metadata(name)
    classifiers = [each.rpartition(" :: ")[2] for each in metadata.get_all("Classifier") or () if "License ::" in each]
    text = metadata.get("License-Expression") or metadata.get("License") or "; ".join(classifiers)
    if "\n" in text or len(text) > 60 or text in ("", "UNKNOWN"):
        text = "; ".join(classifiers)
    return _LICENSES.get(name, text or "not stated")


def _table(names: Iterable[str]) -> list[str]:
    rows = [
        f"| `{name}` | {importlib.metadata.version(name)} | {license_of(name)} | {megabytes([name]):,.1f} |"
        for name in sorted(names)
    ]
    return ["| package | version | license | MB |", "| --- | --- | --- | --- |", *rows]


def page() -> str:
    """The text of the page."""
    import tomllib  # needs Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    plain, direct = closure(project["dependencies"]), closure_names(project["dependencies"])
    added = {extra: closure(requirements) - plain for extra, requirements in sorted(extras.items())}
    gpu = sorted(name for name in plain if name.startswith(("nvidia-", "cuda-")) or name == "triton")
    lines = [
        "# Dependencies",
        "",
        f"What `pip install` brings, and each extra besides; written by `python -m benchmarks.dependencies` in an "
        f"environment with all extras (Python {platform.python_version()}, {sys.platform} {platform.machine()}). Sizes "
        "are those of the installed files, in units of 10^6 bytes. Licenses are what the packages' metadata state.",
        "",
        "| install | packages | MB |",
        "| --- | --- | --- |",
        f"| `.` (plain) | {len(plain)} | {megabytes(plain):,.0f} |",
        f"| of these, for NVIDIA GPUs only | {len(gpu)} | {megabytes(gpu):,.0f} |",
    ]
    for extra, names in added.items():
        lines.append(f"| `.[{extra}]` adds | {len(names)} | {megabytes(names):,.1f} |")
    lines += [
        "",
        "Feature networks that are downloaded on first use (`vgg16`, `alexnet`, `squeezenet`) have weights of torchvision: "
        "BSD-3-Clause, trained on ImageNet, whose images are for non-commercial research.",
        "",
        "## stlpips-pytorch",
        "",
        "The extra `quickstart` installs it for the weights of `st_alexnet` and `st_vgg16` (Ghildyal and Liu 2022), which "
        "need no download. Its license is BSD 2-Clause, its metadata also name MIT, and the two files of "
        "`stlpips_pytorch/models_lpf` that are derived from Adobe's antialiased-cnns are **CC BY-NC-SA 4.0**. This project "
        "reads the weight files and imports none of its code. Without the extra, set `loss.trunk` and "
        "`output.eval_lpips_trunk` to `vgg16`, `alexnet` or `squeezenet`.",
        "",
        "## Plain installation",
        "",
        "Required directly:",
        "",
        *_table(direct),
        "",
        "Required by these:",
        "",
        *_table(plain - direct),
    ]
    for extra, names in added.items():
        lines += ["", f"## Extra {extra}", "", f"Requires {', '.join(f'`{each}`' for each in extras[extra])}. It adds:"]
        lines += ["", *(_table(names) if names else ["nothing."])]
    # Prose of at most 120 columns, as in the other pages; rows of tables stay on one line.
    return "".join((line if line.startswith("|") else textwrap.fill(line, 120)) + "\n" for line in lines)


def closure_names(requirements: Iterable[str]) -> set[str]:
    """Canonical names of requirements."""
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
