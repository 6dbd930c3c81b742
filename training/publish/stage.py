"""Publishes a run's best model, or an exported model, on the Hub, with a model card written from the run.

    python -m training.publish runs/quickstart_20250101_120000 --repo-id org/name --dry-run  # list the files; no network
    python -m training.publish runs/quickstart_20250101_120000 --repo-id org/name [--public] [--create-pr]
    python -m training.publish model_weights/vae_quickstart --repo-id org/name  # finds its run in runs/
    python -m training.publish MODEL --repo-id org/name --space    # and a Space org/name-demo, the demo in the browser

The files of the repository (weights, `config.json`, source, priors, card, grids, plots, training configuration) are
gathered in a temporary folder, loaded once as a user would, and uploaded in one commit. A failed upload leaves nothing
behind and can be repeated.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import filecmp
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.cli import run
from training.config import HubConfig
from training.run_files import WEIGHTS, best_checkpoint, find_model, is_run

logger = logging.getLogger(__name__)


def stage(source: Path, folder: Path, repo_id: str, with_photographs: bool = False) -> list[str]:
    """Gather the files of the repository.

    A README.md in the model's folder is the user's own card and replaces the generated one.

    Args:
        source: A run's folder, a checkpoint's, or an exported model's.
        folder: Empty; receives the files.
        repo_id: "organization/name", for the card.
        with_photographs: Include the grid that shows images of the data set beside their reconstructions. Images of
            `synthetic_faces` are always included.

    Returns:
        Names of the files in the model's folder that are not published.

    Raises:
        ValueError: There is no model, or it cannot be loaded from these files.
    """
    from training.publish.card import write_card
    from training.publish.hub import files_to_publish
    from training.publish.run_record import read_run

    if not (found := find_model(source)) and not source.is_dir():
        raise ValueError(f"{source} does not exist: give the folder of a run, or of an exported model.")
    model, run_dir = found or (source, None)
    record, problem = None, "its run was not found, or has a better model"
    try:
        if run_dir := run_dir or find_run_of(model):
            record = read_run(run_dir)
    except ValueError as error:
        if found is not None and found[1] is not None:  # the run is what the user named
            raise
        problem = str(error)
    files = files_to_publish(model)
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    check_loadable(folder)
    if record is not None:
        settings = without_paths(record.config.to_dict())
        (folder / "training_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    else:
        logger.warning(
            "%s: the card has no metrics, training, data and license (%s): publish the run's folder if its best model is meant.",
            source,
            problem,
        )
    write_card(folder, repo_id, record, with_photographs)
    if "README.md" in files:
        shutil.copyfile(files["README.md"], folder / "README.md")
    present = (path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
    return sorted(set(present) - set(files))


def find_run_of(model: Path) -> Path | None:
    """The run whose best model an exported one is, by the name in its header, in `runs/` here or beside its parent."""
    from training.publish.hub import safetensors_header

    try:
        header = json.loads(safetensors_header(model / WEIGHTS))
    except (OSError, ValueError):
        return None
    name = Path(header.get("__metadata__", {}).get("run", "")).name
    for runs in (Path("runs"), model.absolute().parent.parent / "runs"):
        if name and is_run(runs / name):
            with contextlib.suppress(ValueError):  # it has no valid model any more
                checkpoint, _ = best_checkpoint(runs / name)
                if filecmp.cmp(checkpoint / "model" / WEIGHTS, model / WEIGHTS, shallow=False):
                    return runs / name
    return None


def check_loadable(folder: Path) -> None:
    """Check that a user can load a model and its priors: the source is there and the weights are complete.

    Args:
        folder: Holds `config.json`, weights of any number of variants and shards, and `priors/`.

    Raises:
        ValueError: Source or weights are missing or do not match.
    """
    from safetensors import SafetensorError

    from modeling import latent_prior
    from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
    from training.publish.card import weight_files

    for part in [folder, *(path.parent for path in sorted(folder.glob("priors/*/config.json")))]:
        name = part.relative_to(folder).as_posix()
        label = "the model" if name == "." else name
        try:
            module, _, class_name = _auto_class(part / "config.json").partition(".")
            tree = ast.parse((part / f"{module}.py").read_bytes())
            if class_name not in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}:
                raise ValueError(f"{module}.py does not define {class_name!r}")
            model_class = AutoencoderKLUltra if part == folder else getattr(latent_prior, class_name)
            for variant in weight_files(part):
                _, info = model_class.from_pretrained(
                    str(part), variant=variant, use_safetensors=True, output_loading_info=True
                )
                for problem in ("missing", "unexpected", "mismatched"):
                    if keys := info[f"{problem}_keys"]:
                        raise ValueError(f"{len(keys)} {problem} weights, such as {keys[0]}")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SyntaxError, SafetensorError) as error:
            raise ValueError(
                f"{label} cannot be loaded from its files ({error}): save it again with save_pretrained."
            ) from error


def _auto_class(config: Path) -> str:
    """The entry `file.Class` of `auto_map` in a model's `config.json`: the class that `AutoModel` loads."""
    auto_map = json.loads(config.read_text(encoding="utf-8")).get("auto_map") or {}
    if "AutoModel" not in auto_map:
        raise ValueError("config.json has no auto_map for AutoModel")
    return auto_map["AutoModel"]


# Keys whose values are paths, and not identifiers on the Hub, whatever they look like.
_PATHS = {"cache_dir", "data_dir", "data_files", "model_dir", "runs_dir", "trunk_weights"}


def without_paths(value: Any, is_path: bool = False) -> Any:
    """A configuration with each path shortened to its last part, so that no folder of this machine is published.

    Args:
        value: The configuration, or a part of it.
        is_path: Strings in it are paths or URLs; otherwise those that look like a path of this machine.
    """
    if isinstance(value, dict):
        local = {"init_from"} if os.path.exists(value.get("init_from") or "") else set()  # or an identifier
        return {key: without_paths(entry, is_path or key in _PATHS | local) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(entry, is_path) for entry in value]
    if not isinstance(value, str):
        return value
    # Absolute, home, Windows drive or UNC, `./` or `../`, or a file: URL.
    if re.match(r"[/~\\]|[A-Za-z]:[/\\]|\.\.?[/\\]|file:", value) or (is_path and "://" not in value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def publish(source: Path, hub: HubConfig, create_pr: bool = False, with_photographs: bool = False) -> str:
    """Upload a model with its card; may be repeated.

    Args:
        source: A run's folder, a checkpoint's, or an exported model's.
        hub: Repository and visibility.
        create_pr: Open a pull request instead of writing to the main branch.
        with_photographs: See `stage`.

    Returns:
        The URL of the repository, or of the pull request.

    Raises:
        ValueError: There is no complete model, or a file holds a secret; nothing was sent.
        PushError: The upload failed; nothing of it is visible.
    """
    from training.publish.hub import push

    with tempfile.TemporaryDirectory(prefix="publish_") as folder:
        stage(source, Path(folder), str(hub.repo_id), with_photographs)
        return push(Path(folder), hub, create_pr)


def publish_space(hub: HubConfig, create_pr: bool = False) -> str:
    """Upload the Space that shows a published model; see `publish`.

    Args:
        hub: Of the model, whose visibility the Space gets.
        create_pr: Open a pull request instead of writing to the main branch.

    Returns:
        The URL of the Space, or of the pull request.
    """
    from training.publish.hub import upload
    from training.publish.space import space_name, stage_space

    space = dataclasses.replace(hub, repo_id=space_name(str(hub.repo_id)))
    with tempfile.TemporaryDirectory(prefix="space_") as folder:
        files = stage_space(Path(folder), str(hub.repo_id))
        message = f"Show {hub.repo_id}"
        return upload(files, space, create_pr, message=message, is_owned=lambda name: False, space_sdk="gradio")


def publish_command(source: Path, hub: HubConfig) -> str:
    """The command line that does what `publish(source, hub)` does."""
    arguments = ["python", "-m", "training.publish", str(source), "--repo-id", str(hub.repo_id)]
    return shlex.join(arguments + ([] if hub.private else ["--public"]))


def _dry_run(source: Path, hub: HubConfig, with_space: bool, with_photographs: bool, output: Path | None) -> None:
    """List the files that would be uploaded, and keep them in `output`; needs no network and no token."""
    from training.publish.hub import files_to_publish, refuse_secrets
    from training.publish.space import space_name, stage_space

    def show(repository: str, files: dict[str, Path]) -> None:
        refuse_secrets(files)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        print(f"to {repository} ({'private' if hub.private else 'public'}, if it has to be created):")
        for name, size in sizes.items():
            print(f"  {size:>14,}  {name}")
        print(f"  {sum(sizes.values()):>14,}  bytes in {len(sizes)} files, no secrets found")

    if output is not None and output.exists():
        raise ValueError(f"--output {output} exists: give a new folder.")
    with tempfile.TemporaryDirectory(prefix="publish_") as folder:
        left_out = stage(source, Path(folder), str(hub.repo_id), with_photographs)
        show(str(hub.repo_id), files_to_publish(Path(folder)))
        if output is not None:
            shutil.copytree(folder, output)
            output.chmod(0o755)  # that of a temporary folder is 0700
    for name in left_out:
        print(f"  not published: {name}")
    if with_space:
        with tempfile.TemporaryDirectory(prefix="space_") as folder:
            show(f"the Space {space_name(str(hub.repo_id))}", stage_space(Path(folder), str(hub.repo_id)))
    print("dry run: nothing was sent")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.publish", description="Publish a model on the Hugging Face Hub, with a model card."
    )
    parser.add_argument(
        "source", metavar="MODEL", type=Path, help="folder of a run (its best model), a checkpoint or an exported model"
    )
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="the repository, created if it is missing")
    parser.add_argument(
        "--public", action="store_true", help="create the repository as a public one (default: private)"
    )
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of writing to main")
    parser.add_argument(
        "--space", action="store_true", help="also upload the Space ORG/NAME-demo, which shows the model"
    )
    parser.add_argument(
        "--with-photographs",
        action="store_true",
        help="include the grid of validation images and their reconstructions; you need the right to publish them",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the files; needs no network and no token")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="with --dry-run: keep the files, such as the card, there"
    )
    return parser


def _publish(arguments: argparse.Namespace) -> None:
    if arguments.repo_id.count("/") != 1 or not all(arguments.repo_id.split("/")):
        raise ValueError(f"--repo-id must be organization/name, got {arguments.repo_id}.")
    hub = HubConfig(push=True, repo_id=arguments.repo_id, private=not arguments.public)
    if arguments.output is not None and not arguments.dry_run:
        raise ValueError("--output needs --dry-run.")
    if arguments.dry_run:
        _dry_run(arguments.source, hub, arguments.space, arguments.with_photographs, arguments.output)
        return
    print(publish(arguments.source, hub, arguments.create_pr, arguments.with_photographs))
    if arguments.space:
        print(publish_space(hub, arguments.create_pr))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(_publish, build_parser().parse_args(argv))
