"""A Space on the Hub that shows a published model with the pages of `training.demo`."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import shutil
from pathlib import Path

import modeling
from training.synthetic_faces import FIRST_SEED, write_faces

# The rest is left to the resolver, because Gradio limits the versions of some.
_PINNED, _PACKAGES = ("diffusers", "torch"), ("accelerate", "pillow", "safetensors", "transformers")
_NUM_EXAMPLES = 16
_DEMO = Path(__file__).parents[1] / "demo" / "app.py"
_APP = """\
from pathlib import Path

from demo import LAUNCH, build_demo
from modeling.pipeline import FaceVAEPipeline

examples = sorted(str(path) for path in Path("examples").glob("*.jpg"))
pipeline = FaceVAEPipeline.from_pretrained({repo_id!r})  # of a private model: add the secret HF_TOKEN to the Space
demo = build_demo(pipeline, examples, {title!r})

if __name__ == "__main__":
    demo.launch(**LAUNCH)
"""
_CARD = """\
---
title: {title}
sdk: gradio
{sdk_version}python_version: "{python_version}"
app_file: app.py
license: apache-2.0
models:
  - {repo_id}
---

Reconstructions, samples, interpolations and latent dimensions of [{repo_id}](https://huggingface.co/{repo_id}), a
variational autoencoder of faces. The examples are synthetic faces. Uploads are deleted after an hour.
"""


def space_name(repo_id: str) -> str:
    """The Space of a model: "organization/name-demo"."""
    return f"{repo_id}-demo"


def stage_space(folder: Path, repo_id: str) -> dict[str, Path]:
    """Write the files of the Space.

    Args:
        folder: Empty; receives the files.
        repo_id: The model, "organization/name".

    Returns:
        Name in the Space -> file.
    """
    title = repo_id.rpartition("/")[2]
    (folder / "app.py").write_text(_APP.format(repo_id=repo_id, title=title), encoding="utf-8")
    shutil.copyfile(_DEMO, folder / "demo.py")
    (folder / "modeling").mkdir()
    for source in Path(inspect.getfile(modeling)).parent.glob("*.py"):
        shutil.copyfile(source, folder / "modeling" / source.name)
    write_faces(folder / "examples", range(FIRST_SEED, FIRST_SEED + _NUM_EXAMPLES))
    # The versions that this model has been saved and loaded with; "+cpu" and the like are builds for one machine.
    pins = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _PINNED]
    (folder / "requirements.txt").write_text("\n".join([*pins, *_PACKAGES]) + "\n", encoding="utf-8")
    try:
        sdk_version = f"sdk_version: {importlib.metadata.version('gradio')}\n"
    except importlib.metadata.PackageNotFoundError:
        sdk_version = ""  # the Hub takes the newest
    python_version = ".".join(platform.python_version_tuple()[:2])
    card = _CARD.format(title=title, repo_id=repo_id, sdk_version=sdk_version, python_version=python_version)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
