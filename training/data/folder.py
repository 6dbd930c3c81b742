"""Image folders: which files belong to a split, which are left out, and why.

A split is a subfolder of `data.data_dir`, or "." for the whole folder. Without a subfolder for the default
`train_split`, the full folder is trained on, unless it also holds a folder that looks like a split.
"""

import collections
import difflib
import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from mimetypes import MimeTypes
from pathlib import Path

from PIL import Image

from training.data.images import FORMATS
from training.data.shards import Example, corrupt_reason
from training.io import printable

logger = logging.getLogger(__name__)

_SYSTEM_NAMES = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_SPLIT_NAMES = ("train", "training", "val", "valid", "validate", "validation", "dev", "eval", "test", "testing")
_MEDIA_TYPES = MimeTypes()  # Python's own table; the machine's differ
_READ_THREADS, _READ_AHEAD = 8, 256


@dataclass
class _Listing:
    """The files of one folder: `images` maps the path of each image to the real path behind its links."""

    images: dict[str, str] = field(default_factory=dict)
    left_out: collections.Counter = field(default_factory=collections.Counter)  # reason -> files


def list_split(data_dir: str, split: str, train_split: str, validation_split: str | None) -> tuple[Path, list[str]]:
    """Lists the images of a split and logs how many files are taken and left out.

    Args:
        data_dir: The root.
        split: `train_split` or `validation_split`.
        train_split: Name of the training split.
        validation_split: Its name, or None where a fraction of the training images is held out.

    Returns:
        The folder of the split and the sorted paths of its images.

    Raises:
        ValueError: The folder, the split or its images do not exist, or the training split holds validation images.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.data_dir={data_dir!r} is not a folder of images (from {os.getcwd()}).")
    folder = _split_folder(root, data_dir, split, train_split, validation_split)
    listing = _list(folder)
    paths = sorted(listing.images)
    if not paths:
        suffixes = ", ".join(sorted(_image_suffixes()))
        raise ValueError(f"data.data_dir: {str(folder)!r} holds no image ({suffixes}){_left_out(listing)}.")
    if split == train_split != validation_split and validation_split and (root / validation_split).is_dir():
        shared = set(listing.images.values()) & set(_list(root / validation_split).images.values())
        if shared:
            raise ValueError(
                f"data.data_dir={data_dir!r}: data.train_split={train_split!r} and data.validation_split="
                f"{validation_split!r} share {len(shared)} images, such as {printable(min(shared))!r}; give each split "
                "a folder of its own, or set data.validation_split to null to hold out a fraction."
            )
    outside = _count_files(root, skip=folder)
    _log_once(
        f"data.data_dir {printable(data_dir)}: {len(paths)} images in split {split!r}{_left_out(listing)}"
        + (f"; {outside} files outside of the split" if outside else "")
    )
    return folder, paths


@functools.cache
def _log_once(message: str) -> None:
    """Training, validation and PCA initialization list the same folder."""
    logger.info("%s", message)


def readable_paths(paths: list[str], limit: int) -> list[str]:
    """The first `limit` paths whose images can be decoded."""
    found: list[str] = []
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(paths), _READ_AHEAD):
            part = paths[start : start + _READ_AHEAD]
            for path, reason in zip(
                part, pool.map(lambda path: corrupt_reason(Example(None, path)), part), strict=True
            ):
                if reason is None:
                    found.append(path)
                else:
                    logger.warning("corrupt validation image skipped: %s (%s)", printable(path), reason)
                if len(found) == limit:
                    return found
    return found


def _split_folder(root: Path, data_dir: str, split: str, train_split: str, validation_split: str | None) -> Path:
    names = sorted(path.name for path in root.iterdir() if os.path.isdir(path))
    # A file system that ignores case finds "Train" as "train", another does not: names are compared exactly.
    if (root / split).is_dir() and (split in names or len(Path(split).parts) != 1):
        return root / split
    names = [name for name in names if not _is_hidden(name)]
    shown = printable(", ".join(names[:20])) or "none"
    nearest = [name for name in names if name.lower() == split.lower()] or difflib.get_close_matches(split, names, n=1)
    split_like = [name for name in names if name.lower() in _SPLIT_NAMES or name == validation_split]
    if split == train_split == "train" and not split_like:
        return root
    key = "data.train_split" if split == train_split else "data.validation_split"
    remedy = f"set {key} to {printable(nearest[0])!r}" if nearest else f"set {key} to one of them"
    if split != train_split:
        remedy += ", or to null to hold out a fraction of the training images"
    elif split == "train":
        shown += f", and {printable(', '.join(split_like))} may hold images that are not for training"
        remedy += ', move the training images into "train"'
    remedy += '; "." takes all images below data.data_dir'
    raise ValueError(f"data.data_dir={data_dir!r} has no subfolder {split!r}, only {shown}; {remedy}.")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_NAMES


def _count_files(folder: str | Path, skip: Path | None = None) -> int:
    """Files and links below a folder, without those below `skip`."""
    count = 0
    for place, folders, files in os.walk(folder):
        if Path(place) == skip:
            folders.clear()
        else:
            count += len(files)
    return count


@functools.cache
def _image_suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def _list(root: Path) -> _Listing:
    """Lists the images below a folder; each real folder is read once, real ones before links to folders."""
    listing, seen, real_root = _Listing(), set(), os.path.realpath(root)
    unknown: list[str] = []  # decided by content
    folders, links = collections.deque([str(root)]), collections.deque()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(folder)
        is_loop = real != real_root and real_root.startswith(os.path.join(real, ""))
        if real in seen or is_loop:
            listing.left_out["link to a folder already read"] += 1
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"data.data_dir: {folder!r} cannot be read ({error.strerror}).") from error
        for entry in entries:
            if _is_hidden(entry.name):
                is_folder = entry.is_dir(follow_symlinks=False)
                files = _count_files(entry.path) if is_folder else 1
                listing.left_out["hidden or system file"] += files
            elif not _can_follow(entry):
                listing.left_out["link that cannot be followed"] += 1
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif not entry.is_file():
                listing.left_out["broken link" if entry.is_symlink() else "special file"] += 1
            elif os.path.splitext(entry.name)[1].lower() in _image_suffixes():
                listing.images[entry.path] = _real_path(entry, real)
            elif (_MEDIA_TYPES.guess_type(entry.name)[0] or "image/").startswith("image/"):
                unknown.append(entry.path)
                listing.images[entry.path] = _real_path(entry, real)
            else:
                listing.left_out[f"not a supported image ({os.path.splitext(entry.name)[1].lower()})"] += 1
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for path, is_image in zip(unknown, pool.map(_is_image, unknown), strict=True):
            if not is_image:
                del listing.images[path]
                suffix = os.path.splitext(path)[1].lower() or "no suffix"
                listing.left_out[f"not a supported image ({suffix})"] += 1
    return listing


def _can_follow(entry: os.DirEntry) -> bool:
    """False for a link to itself, to a place without permission or to a stale mount; a broken link is no error here."""
    try:
        entry.is_dir()
    except OSError:
        return False
    return True


def _real_path(entry: os.DirEntry, real_folder: str) -> str:
    return os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real_folder, entry.name)


def _is_image(path: str) -> bool:
    """By content: whether Pillow recognizes the header."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # Pillow raises OSError, SyntaxError, struct.error, ...
        return False


def _left_out(listing: _Listing) -> str:
    counts = [f"{count} {printable(reason)}" for reason, count in sorted(listing.left_out.items())]
    return f"; left out: {', '.join(counts)}" if counts else ""
