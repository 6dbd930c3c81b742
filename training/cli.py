"""Common parts of the commands: shared options, `error:` lines, exit codes, and the search for the model.

    def main(argv: Sequence[str] | None = None) -> int:
        parser = argparse.ArgumentParser(prog="python -m training.evaluate", description="...")
        add_option(parser, "model")
        add_option(parser, "--batch-size", default=8)
        return run(_evaluate, parser.parse_args(argv))

Imports the standard library only, so that `--help` and a misspelled option do not wait for torch.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.run_files import find_model

if TYPE_CHECKING:
    import torch

_MODEL_HELP = "folder of an exported model, a run (its best model) or a checkpoint; or a Hub id"


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of image files that commands write


class UserError(RuntimeError):
    """An error that the user can correct, although no argument is wrong; commands print it as they print ValueErrors."""


def positive_int(text: str) -> int:
    """An integer of at least 1; the `type` of an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "MODEL", "help": _MODEL_HELP},
    "models": {"metavar": "MODEL", "nargs": "+", "help": _MODEL_HELP},
    "--config": {"metavar": "FILE", "help": "JSON configuration"},
    "--set": {
        "action": "append",
        "default": [],
        "dest": "overrides",
        "metavar": "SECTION.KEY=VALUE",
        "help": "change one key of --config (repeatable); VALUE is JSON, or else a string",
    },
    "--data": {"metavar": "SOURCE", "help": "synthetic_faces, imagefolder:DIR, parquet:GLOB or a Hub data set"},
    "--crop-px": {
        "type": positive_int,
        "metavar": "N",
        "help": "size of the center crop, pixels (default: all, squared)",
    },
    "--resolution": {
        "type": positive_int,
        "metavar": "N",
        "help": "image size, pixels (default: the model's sample_size)",
    },
    "--lpips": {"metavar": "NETWORKS", "help": "feature networks of LPIPS, separated by commas, or none"},
    "--batch-size": {"type": positive_int, "metavar": "N", "help": "images per forward pass"},
    "--device": {"metavar": "NAME", "help": "cpu, cuda, cuda:1, ... (default: the accelerator if there is one)"},
    "--json": {"action": "store_true", "help": "print one JSON object instead of text"},
    "--num-samples": {"type": positive_int, "metavar": "N", "help": "images to generate"},
    "--output": {"type": Path, "metavar": "PATH", "help": "file or folder to write"},
    "--seed": {"type": int, "metavar": "N", "help": "seed of the random number generator"},
    "--trunk-weights": {
        "metavar": "DIR",
        "help": "folder of feature network (trunk) weights for LPIPS and the Frechet distance, as loss.trunk_weights",
    },
}


def add_option(parser: argparse._ActionsContainer, name: str, **changes: Any) -> None:
    """Add a shared option to a parser, or to a group of one.

    Args:
        parser: The parser or group.
        name: A key of `_OPTIONS`, such as "--batch-size".
        changes: Arguments of `add_argument` that differ here, such as `default`, which the help text then names.
    """
    settings = _OPTIONS[name] | changes
    if changes.get("default") is not None:
        settings["help"] += " (default: %(default)s)"
    parser.add_argument(name, **settings)


def data_source(source: str, split: str) -> dict[str, Any]:
    """The keys of the section `data` that `--data SOURCE` sets.

    Args:
        source: `synthetic_faces`, `imagefolder:DIR`, `parquet:GLOB` or a Hub data set.
        split: The split that the files of `parquet:GLOB` are.

    Raises:
        ValueError: No place after `imagefolder:` or `parquet:`.
    """
    kind, _, place = source.partition(":")
    keys = {"dataset": source, "revision": None, "data_files": None, "data_dir": None}
    if kind == "imagefolder":
        keys |= {"dataset": kind, "data_dir": place}
    elif kind == "parquet":
        keys |= {"dataset": kind, "data_files": {split: place}}
    if kind in ("imagefolder", "parquet") and not place:
        raise ValueError(f"--data {source}: write {kind}:{'DIR' if kind == 'imagefolder' else 'GLOB'}.")
    return keys


def lpips_trunks(names: str) -> tuple[str, ...]:
    """The feature networks that `--lpips NAMES` lists."""
    return () if names == "none" else tuple(names.split(","))


def check_output(path: Path, suffixes: Sequence[str] = (), what: str = "--output") -> None:
    """Check before the work that its result can be written, and create the folder.

    Args:
        path: The file if there are `suffixes`, else the folder.
        suffixes: In lower case, ".png" and so on.
        what: Names the path in errors.

    Raises:
        ValueError: Another suffix, a folder where a file must be or the reverse, or no permission.
    """
    if suffixes and (path.suffix.lower() not in suffixes or path.is_dir()):
        raise ValueError(f"{what} {path} must be a file that ends in {', '.join(suffixes)}.")
    try:
        folder = path.parent if suffixes else path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.is_file():
            path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be written ({error}): use another place.") from None


def run(command: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace) -> int:
    """Run a command; errors that the user can correct become one `error:` line on standard error.

    Args:
        command: Does the work; returns an exit code, or None for 0.
        arguments: Its parsed arguments.

    Returns:
        The exit code: the command's, 2 for ValueError, OSError and UserError, 130 after Ctrl-C, 1 if nobody reads
        standard output any more. Other exceptions are faults of the program and keep their traceback.
    """
    try:
        code = command(arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its exit
        return 1
    except (ValueError, OSError, UserError) as error:
        print("error: " + " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def select_device(name: str | None) -> torch.device:
    """The device that `--device` names; None is the accelerator of this machine if there is one, else the CPU.

    Raises:
        ValueError: No such device here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device of PyTorch: use cpu, cuda or cuda:1.") from None
    if device.type not in ("cpu", "meta"):
        count = torch.accelerator.device_count() if accelerator and accelerator.type == device.type else 0
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: this machine has {count} {device.type} devices; use another, or cpu.")
    return device


# ---------------------------------------------------------------------- MODEL


@dataclass(frozen=True)
class ModelSource:
    """Where `from_pretrained(source.path, subfolder=source.subfolder)` finds a model.

    Attributes:
        path: Folder that holds the model's `config.json`, or a Hub id.
        subfolder: Folder inside a Hub repository; None for a local folder.
        config: Content of the model's `config.json`; `_class_name` names the class.
    """

    path: str
    subfolder: str | None
    config: dict[str, Any]


def resolve_model(model: str, subfolder: str | None = None) -> ModelSource:
    """Find the model that MODEL on a command line means.

    Args:
        model: One of: the folder of an exported model; a run's folder (its best model, by the state that the newest
            checkpoint recorded); a checkpoint's folder; a pipeline's folder (its `vae`); a Hub id.
        subfolder: Folder inside it to look into first.

    Raises:
        ValueError: There is no such model; the message lists what was looked for.
    """
    folder = Path(model).expanduser()
    if in_run := find_model(folder):
        folder, subfolder = in_run[0], None
    elif not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
            raise ValueError(
                f"there is no folder {model}{_similar_folders(folder)}, and it is not a Hub id (organization/model): "
                "give the folder of an exported model, a run or a checkpoint, or a Hub id."
            )
        return _find_on_hub(model, subfolder)
    for place in (folder / name for name in ([subfolder] if subfolder else []) + [".", "vae"]):
        if (place / "config.json").is_file():
            return ModelSource(str(place), None, _read_object(place / "config.json"))
    found = ", ".join(sorted(path.parent.name for path in folder.glob("*/config.json")))
    hint = f"; there is one in {found}, so give --subfolder" if found else ""
    raise ValueError(
        f"{model} holds no model{hint}: looked for config.json (an exported model), vae/config.json (a pipeline) and "
        "checkpoints/step_* (a run)."
    )


def _similar_folders(missing: Path) -> str:
    """Folders whose names are like that of one that does not exist, as a part of a message."""
    names = [path.name for path in missing.parent.glob("*") if path.is_dir()]
    # A low cutoff: the name of a run without its time is like that of the run.
    found = difflib.get_close_matches(missing.name, names, cutoff=0.5)
    return f" (similar: {', '.join(str(missing.parent / name) for name in found)})" if found else ""


def _find_on_hub(model: str, subfolder: str | None) -> ModelSource:
    import huggingface_hub
    from huggingface_hub import errors

    similar = _similar_folders(Path(model))
    for place in ([subfolder] if subfolder else []) + [None, "vae"]:
        try:
            path = huggingface_hub.hf_hub_download(model, "config.json", subfolder=place)
            return ModelSource(model, place, _read_object(Path(path)))
        except errors.LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but caused by the network
            raise ValueError(f"there is no folder {model}{similar}, and the Hub does not answer ({error}).") from error
        except errors.EntryNotFoundError:
            continue
        except errors.HfHubHTTPError as error:
            raise ValueError(
                f"there is no folder {model}{similar}, and the Hub denies access to the model of that name ({error}): check the name, or "
                "log in (`hf auth login`)."
            ) from error
    raise ValueError(f"{model} on the Hub holds no model: looked for config.json and vae/config.json.")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(value).__name__}.")
    return value
