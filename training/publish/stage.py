"""Publish a run's model on the Hub, with a card written from the run.

    python -m training.publish runs/ultra_20250101_120000 --repo-id org/name --dry-run   # what would go; no network
    python -m training.publish runs/ultra_20250101_120000 --repo-id org/name [--private] [--create-pr]
    python -m training.publish model_weights/vae_ultra --repo-id org/name                # a card without the run's figures

What it is for: gathering exactly what belongs (weights, `config.json`, source, priors, card, grids, plots, resolved
training configuration) in a folder of its own, and sending that. What it is not for: the upload itself (hub.py) and what
the card says (model_card.py). It may be repeated: an upload that failed left nothing behind.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import HubConfig

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def find_model(source: Path) -> tuple[Path, Path | None]:
    """The model's folder and the run's, from either.

    A run's finished model lies outside of it, where a later run of the same name replaces it: it is taken only while
    its weights are those that the run kept in `best/`, which is taken otherwise.

    Returns:
        The model's folder; the run's folder, None if `source` is a model.

    Raises:
        ValueError: `source` is neither.
    """
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}: give a run's folder, or that of an exported model.")
    if (source / _WEIGHTS).is_file() and (source / "config.json").is_file():
        run = source.parent if source.name == "best" and (source.parent / "metrics.jsonl").is_file() else None
        return source, run
    if not (source / "status.json").is_file():
        raise ValueError(
            f"{source} holds neither a run (status.json) nor a model ({_WEIGHTS}): give the folder of one."
        )
    named = json.loads((source / "status.json").read_text(encoding="utf-8")).get("model_dir")
    best, finished = source / "best", Path(named) if named else None
    if finished is not None and (finished / _WEIGHTS).is_file():
        kept = best / _WEIGHTS
        if not kept.is_file() or filecmp.cmp(kept, finished / _WEIGHTS, shallow=False):
            return finished, source
    if not (best / _WEIGHTS).is_file():
        raise ValueError(f"{source} has no model yet (best/ is written after the first epoch): let it train on.")
    return best, source


def stage(source: Path, folder: Path, repo_id: str) -> list[str]:
    """Gather what belongs to the published model.

    A README.md in the model's folder is the user's own card and replaces the written one.

    Args:
        source: A run's folder or a model's.
        folder: Empty; becomes what the repository will be.
        repo_id: For the card.

    Returns:
        Names in the model's folder that do not belong and stay here.
    """
    from training.publish.card import write_card
    from training.publish.hub import files_to_publish
    from training.publish.run_record import read_run

    model, run = find_model(source)
    record = None if run is None else read_run(run)
    files = files_to_publish(model)
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    if record is not None:
        settings = without_paths(record.config.to_dict())
        (folder / "training_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_card(folder, repo_id, record)
    if "README.md" in files:
        shutil.copyfile(files["README.md"], folder / "README.md")
    others = (path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
    return sorted(set(others) - set(files))


def without_paths(value: Any) -> Any:
    """A configuration without places on this machine: of absolute paths, only the last part remains."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]|\.\.?[/\\]|file:", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def publish(source: Path, hub: HubConfig, create_pr: bool = False) -> str:
    """Write the card, gather the files and upload them; may be repeated.

    Args:
        source: A run's folder or a model's.
        hub: Repository and visibility.
        create_pr: Open a pull request instead of writing to the main branch.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        ValueError: There is no model, or a file holds a secret; nothing was sent.
        PushError: The upload failed; nothing of it is visible.
    """
    from training.publish.hub import push

    with tempfile.TemporaryDirectory(prefix="publish_") as folder:
        stage(source, Path(folder), str(hub.repo_id))
        return push(Path(folder), hub, create_pr)


def _dry_run(source: Path, hub: HubConfig) -> None:
    """List what would go. Needs no network and no token."""
    from training.publish.hub import files_to_publish, refuse_secrets

    with tempfile.TemporaryDirectory(prefix="publish_") as folder:
        left_out = stage(source, Path(folder), str(hub.repo_id))
        files = files_to_publish(Path(folder))
        refuse_secrets(files)
        sizes = {name: path.stat().st_size for name, path in files.items()}
    print(f"to {hub.repo_id} ({'private' if hub.private else 'public'}, if it has to be created):")
    for name, size in sizes.items():
        print(f"  {size:>14,}  {name}")
    print(f"  {sum(sizes.values()):>14,}  bytes in {len(sizes)} files; no secrets found in them")
    for name in left_out:
        print(f"  stays here: {name}")
    print("dry run: nothing was sent")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.publish", description="Publish a run's model on the Hub, with a card."
    )
    parser.add_argument("source", metavar="RUN_OR_MODEL", type=Path, help="a run's folder, or an exported model's")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="the repository, created if it is missing")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of writing to main")
    parser.add_argument("--dry-run", action="store_true", help="list what would go; needs no network and no token")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with one line that says what to change."""
    arguments = _parser().parse_args(argv)
    if arguments.repo_id.count("/") != 1 or not all(arguments.repo_id.split("/")):
        print(f"error: --repo-id {arguments.repo_id}: give organisation/name.", file=sys.stderr)
        return 2
    hub = HubConfig(push=True, repo_id=arguments.repo_id, private=arguments.private)
    from training.publish.hub import PushError  # after the arguments: --help need not wait for torch

    try:
        if arguments.dry_run:
            _dry_run(arguments.source, hub)
            return 0
        print(publish(arguments.source, hub, arguments.create_pr))
    except (ValueError, PushError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
