"""Writing to disk so that a reader, a crash or a power cut never meets half a file.

Every byte that a checkpoint consists of goes through this module, so that tests can make any of its calls fail.
What it is not for: what is written (checkpoint.py, tracking.py).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

_BLOCK = 16 << 20  # bytes written, or read, at a time


def write_bytes(path: Path, data: bytes) -> str:
    """Write a new file and force it to disk.

    Args:
        path: The file; its folder exists.
        data: Its content.

    Returns:
        SHA-256 of what was meant to be written, so that a check of the file finds what a disk got wrong.

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


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half.

    Args:
        path: The file.
        value: What json takes.
        durable: Force it to disk; without, a power cut may leave the older file.
    """
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(value, indent=2) + "\n"
    if durable:
        write_bytes(temporary, text.encode())
    else:
        temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    if durable:
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Force the names in a folder to disk; without effect where a file system does not offer it."""
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
    """Make `link` a symbolic link to its neighbour `target`, in one step; without effect where there are no links."""
    temporary = link.with_name(f".{link.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.symlink(target, temporary)
        os.replace(temporary, link)
    except (NotImplementedError, PermissionError):  # Windows without the right to make links, some network disks
        return
    finally:
        with contextlib.suppress(OSError):  # where it could not be renamed
            temporary.unlink()


def rename_folder(folder: Path, name: Path) -> None:
    """Give a folder another name beside it, in one step."""
    os.replace(folder, name)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that its name never stands for a part of it: first renamed out of sight, then removed."""
    hidden = folder.with_name(f".removed_{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
