"""Writes files so that a reader, a crash or a power cut never leaves half a file; standard library only.

Every byte of a checkpoint goes through this module, so that tests can make any of its calls fail.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_BLOCK = 16 << 20  # bytes written, or read, at a time


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file and fsync it.

    Args:
        path: The file; its folder exists.
        data: Its content.

    Returns:
        SHA-256 of `data`, in hexadecimal.

    Raises:
        OSError: The disk is full, read-only or broken.
    """
    digest = hashlib.sha256()
    view = memoryview(data)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
    try:
        start = 0
        while start < len(view):
            written = os.write(descriptor, view[start : start + _BLOCK])
            digest.update(view[start : start + written])
            start += written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder and its subfolders, fsynced; permissions are not copied.

    Raises:
        OSError: The disk is full, read-only or broken, or `source` cannot be read.
    """
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(copy, path.read_bytes())


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, fsync it and rename it: a reader sees the old content or the new.

    Raises:
        OSError: The disk is full, read-only or broken; an older file is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_bytes(temporary, data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, without fsync: after a power cut the older file may be back."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def restore_fields(defaults: Mapping[str, Any], state: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Saved state with the fields that this version has.

    Args:
        defaults: Every field of this version and its default.
        state: The saved fields, perhaps of an older or a newer version.
        what: Name of the state in the log.

    Returns:
        A value for each field of `defaults`; unknown fields are logged and ignored, missing ones take their defaults.
    """
    if unknown := sorted(state.keys() - defaults.keys()):
        logger.warning("%s: ignored unknown fields: %s", what, ", ".join(unknown))
    if missing := sorted(defaults.keys() - state.keys()):
        logger.warning("%s: fields missing, defaults used: %s", what, ", ".join(missing))
    return {name: state.get(name, default) for name, default in defaults.items()}


def fsync_folder(folder: Path) -> None:
    """Fsync the names in a folder; without effect where a file system does not offer it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as some network disks answer for folders
            raise
    finally:
        os.close(descriptor)


def point_to(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, given relative to it, in one step.

    A folder in place of the link is a copy that `cp -rL`, a zip file or a cloud drive has made of an older link: it is
    replaced. Where links cannot be made (Windows without the right to, many FUSE mounts), nothing happens.
    """
    temporary = link.with_name(f".{link.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.symlink(target, temporary)
    except (NotImplementedError, OSError) as error:
        if link.exists() and not link.is_symlink():
            logger.warning("%s is not a link and may be outdated: ignored, links cannot be made (%s)", link, error)
        return
    try:
        if link.is_dir() and not link.is_symlink():
            logger.warning("%s is a folder, the copy of an older link: replaced by a link to %s", link, target)
            remove_folder(link)
        os.replace(temporary, link)
    finally:
        with contextlib.suppress(OSError):  # where it could not be renamed
            temporary.unlink()


def rename_folder(folder: Path, name: Path) -> None:
    """Rename a folder in one step."""
    os.replace(folder, name)


def remove_folder(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that its name never stands for a part of it."""
    removed = folder.with_name(f".removed_{folder.name}")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def http_response(error: BaseException) -> Any | None:
    """The HTTP response that an error or one of its causes carries, or None."""
    cause: BaseException | None = error
    while cause is not None:
        if (response := getattr(cause, "response", None)) is not None:
            return response
        cause = cause.__cause__
    return None


def retry_after(error: BaseException) -> float | None:
    """Seconds that a server asks to wait (`Retry-After`), or None where it names none or a date."""
    try:
        return float(http_response(error).headers["Retry-After"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def printable(text: str) -> str:
    """Escapes what UTF-8 cannot encode, such as bytes of a Latin-1 file name, so that any stream can write the text."""
    return text.encode("utf-8", "backslashreplace").decode()
