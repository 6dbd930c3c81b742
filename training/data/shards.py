"""Encoded examples from one file or shard, and retries of what a network interrupts.

Parquet is read by row group with pyarrow: an iterator of `datasets` 5 is dead after an error and would read its shard,
often 0.5 GB, again from the start; here a broken connection costs one row group. Other formats are read by `datasets`.
"""

import contextlib
import functools
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen
from huggingface_hub import errors as hub_errors

from training.data.images import LFS_POINTER, CorruptImage, DataError, decode_image
from training.io import http_response, printable, retry_after

logger = logging.getLogger(__name__)

_READ_ROWS = 256  # rows converted from Arrow at once
_READ_BYTES = 8_000_000  # asked for in one request
_BAD_SHARD_ATTEMPTS = 3  # for errors that retries seldom repair: a missing or corrupt file
_FIRST_DELAY_S, _MAX_DELAY_S = 1.0, 60.0


class Example(NamedTuple):
    """An encoded image, where it comes from, and its attributes; `data` and `path` are None for a null value.

    Attributes:
        attributes: One int8 for each of `data.attribute_columns`: 1 present, -1 absent, 0 unknown; None without them.
    """

    data: bytes | None
    path: str | None
    attributes: bytes | None = None


@dataclass(frozen=True)
class Shard:
    """A part of a source. `read(start)` yields its examples from number `start` on, in lists; it may be called again."""

    name: str
    read: Callable[[int], Iterator[list[Example]]]


def is_held_out(example: Example, fraction: float) -> bool:
    """Whether an example belongs to the validation images, by a hash of its bytes.

    The same in every epoch and on every machine, and for every copy of an image. An example that cannot be read belongs to
    the training images, where it is counted as corrupt.
    """
    try:
        data, _ = encoded_bytes(example)
    except CorruptImage:
        return False
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < fraction * 2**64


def encoded_bytes(example: Example) -> tuple[bytes, str]:
    """Returns the bytes and the id of an example.

    Raises:
        CorruptImage: A null value, or a file on this machine that cannot be read.
    """
    data, path, _ = example
    if data is not None:  # the path alone may be the same in two shards
        return data, printable(":".join(filter(None, (path, hashlib.blake2b(data, digest_size=6).hexdigest()))))
    if path is None:
        raise CorruptImage("no bytes and no path")
    try:
        return Path(path).read_bytes(), printable(path)
    except OSError as error:
        raise CorruptImage(f"cannot be read: {error.strerror}") from error


def corrupt_reason(example: Example) -> str | None:
    """Why an example cannot be decoded, or None where it can."""
    try:
        decode_image(encoded_bytes(example)[0], None, 16)
    except CorruptImage as error:
        return str(error)
    return None


# ---- retries ----


class Patience:
    """Retries with exponential backoff until nothing has arrived for `timeout_s`.

    Args:
        timeout_s: `data.timeout_s`.
        stop: Ends a delay early.

    Attributes:
        waiting_for: What it waits for now, for log lines; empty otherwise.
        last_progress: `time.monotonic()` when something last arrived.
    """

    def __init__(self, timeout_s: float, stop: threading.Event | None = None):
        self._timeout_s, self._stop = timeout_s, stop or threading.Event()
        self.waiting_for = ""
        self.progress()

    def progress(self) -> None:
        self._attempts, self.last_progress, self.waiting_for = 0, time.monotonic(), ""

    def idle_seconds(self) -> float:
        return time.monotonic() - self.last_progress

    def wait(self, what: str, error: Exception) -> None:
        """Waits before the next attempt.

        Raises:
            DataError: The time is up, or the error will not go away.
        """
        self._attempts += 1
        reason = in_one_line(error)
        waited = self.idle_seconds()
        is_permanent = _is_permanent(error) or "://" not in what  # a disk, unlike a network, seldom comes back
        if is_permanent and self._attempts >= _BAD_SHARD_ATTEMPTS:
            raise DataError(f"data: {what} cannot be read ({self._attempts} attempts): {reason}") from error
        delay = retry_after(error) or min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** min(self._attempts - 1, 10))
        delay *= random.uniform(1.0, 1.25)  # jitter: many machines lose the network at once
        if waited + delay > self._timeout_s:
            raise DataError(
                f"data: nothing arrived from {what} for {waited:.0f} s ({self._attempts} attempts, data.timeout_s="
                f"{self._timeout_s:g}): {reason}. Checkpoints are intact; use --resume auto when the source answers."
            ) from error
        self.waiting_for = f"{what}: {reason}; attempt {self._attempts + 1} in {delay:.0f} s"
        logger.warning("waiting for %s", self.waiting_for)
        self._stop.wait(delay)

    def examples(self, shard: Shard, start: int) -> Iterator[list[Example]]:
        """Yields the examples of a shard from number `start` on, through failures; ends early when `stop` is set."""
        while not self._stop.is_set():
            try:
                with contextlib.closing(shard.read(start)) as parts:
                    for part in parts:
                        self.progress()
                        start += len(part)
                        yield part
                        self.progress()  # the time of the consumer does not count
                return
            except DataError:
                raise
            except Exception as error:
                self.wait(shard.name, error)


def _is_permanent(error: Exception) -> bool:
    """Whether the file or the request is wrong, not the network."""
    if isinstance(error, hub_errors.HfHubHTTPError) and (status := http_status(error)):
        return status < 500 and status not in (408, 425, 429)
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return True
    return isinstance(error, (ValueError, KeyError, TypeError))  # pa.ArrowInvalid is a ValueError


def http_status(error: Exception) -> int | None:
    return getattr(http_response(error), "status_code", None)


def in_one_line(error: Exception) -> str:
    """The type and the first 300 characters of the message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---- formats ----


class ParquetFile:
    """A parquet file, here or behind a URL, whose footer is read once."""

    def __init__(self, url: str):
        self.url = url

    def open(self):
        if "://" not in self.url:
            return open(self.url, "rb")
        if self.url.startswith("hf://"):
            system = huggingface_hub.HfFileSystem(endpoint=huggingface_hub.constants.ENDPOINT)
            return system.open(self.url, "rb", cache_type="none")  # pyarrow coalesces reads; a cache would read ahead
        system, path = fsspec.url_to_fs(self.url)
        return system.open(path, "rb", cache_type="none")

    @functools.cached_property
    def footer(self) -> pq.FileMetaData:
        with self.open() as file:
            return pq.read_metadata(file)


def check_parquet_file(path: str) -> None:
    """Names what often stands in place of a parquet file.

    Raises:
        ValueError: The file is empty or a Git LFS pointer.
    """
    with open(path, "rb") as file:
        head = file.read(len(LFS_POINTER))
    if not head:
        raise ValueError("the file is empty; download it again")
    if head == LFS_POINTER:
        raise ValueError("the file is a Git LFS pointer; run `git lfs pull`")


def check_column(schema: pa.Schema, column: str, where: str, attributes: Sequence[str] = ()) -> None:
    """Checks that a table holds images, and their attributes.

    Raises:
        ValueError: A column does not exist, or holds something else than encoded images or booleans (or numbers).
    """
    for name in attributes:
        kind = schema.field(name).type if name in schema.names else "nothing"
        if kind == "nothing" or not (
            pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        ):
            raise ValueError(
                f"data.attribute_columns: {name!r} holds {kind} in {where}: name columns of booleans or numbers."
            )
    if column not in schema.names:
        names = ", ".join(schema.names) or "none"
        raise ValueError(f"data.image_column={column!r} is not in {where}, only {names}.")
    kind = schema.field(column).type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise ValueError(f"data.image_column={column!r} holds {kind} in {where}, not encoded images.")


def parquet_examples(
    files: list[ParquetFile], column: str, attributes: Sequence[str], start: int
) -> Iterator[list[Example]]:
    """Yields the examples of the files, one after the other, from number `start` on.

    Raises:
        DataError: A file does not hold the column, or not as images.
    """
    for file in files:
        try:
            check_column(file.footer.schema.to_arrow_schema(), column, file.url, attributes)
        except ValueError as error:
            raise DataError(f"{error} All files of a split need the same column.") from error
        if start >= file.footer.num_rows:
            start -= file.footer.num_rows
            continue
        with file.open() as handle:
            parquet = pq.ParquetFile(handle, metadata=file.footer, pre_buffer=True)
            for groups, num_rows in _row_group_runs(file.footer, column):
                if start >= num_rows:  # neither downloaded nor parsed
                    start -= num_rows
                    continue
                columns = [column, *attributes]
                for batch in parquet.iter_batches(_READ_ROWS, row_groups=groups, columns=columns, use_threads=False):
                    rows = batch.slice(start).to_pylist()
                    start = max(0, start - batch.num_rows)
                    if rows:
                        yield [as_example(row, column, attributes) for row in rows]


def _row_group_runs(footer: pq.FileMetaData, column: str) -> Iterator[tuple[list[int], int]]:
    """Yields row groups to read at once, and their rows: about 8 MB, so that a failed request loses little."""
    groups, size, num_rows = [], 0, 0
    for i in range(footer.num_row_groups):
        group = footer.row_group(i)
        chunks = [group.column(c) for c in range(group.num_columns)]
        size += sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
        groups.append(i)
        num_rows += group.num_rows
        if size >= _READ_BYTES or i == footer.num_row_groups - 1:
            yield groups, num_rows
            groups, size, num_rows = [], 0, 0


def as_example(row: dict[str, Any], column: str, attributes: Sequence[str]) -> Example:
    """Converts a row with an image or binary column."""
    value, present = row[column], [row[name] for name in attributes]
    signs = bytes(map(_sign, present)) if attributes else None
    return Example(*(value["bytes"], value.get("path")) if isinstance(value, dict) else (value, None), signs)


def _sign(value: Any) -> int:
    """An attribute as a byte: 1 present, 0 unknown (None or NaN), 0xFF (-1 as int8) absent."""
    if value is None or value != value:
        return 0
    return 1 if value > 0 else 0xFF


def dataset_examples(
    dataset: datasets.IterableDataset, column: str, attributes: Sequence[str], start: int
) -> Iterator[list[Example]]:
    """Yields the examples of a stream of `datasets` from number `start` on."""
    for part in dataset.iter(batch_size=64):
        rows = [dict(zip(part, values)) for values in zip(*part.values())][start:]
        start = max(0, start - len(part[column]))
        if rows:
            yield [_downloaded(as_example(row, column, attributes)) for row in rows]


def _downloaded(example: Example) -> Example:
    data, path, _ = example
    if data is None and path is not None and "://" in path:  # an image that is a file of the repository
        with xopen(path, "rb") as file:
            return example._replace(data=file.read())
    return example
