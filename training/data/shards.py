"""Rows of encoded images from one file or shard, and patience with the network that they come through.

Parquet is read by row group with pyarrow, because an iterator of `datasets` is dead after an error and would
begin its shard, often 0.5 GB, anew; here a cut connection costs one row group. What is not parquet is read by
`datasets`. Not here: which files make a split (`sources`), decoding (`images`).
"""

import contextlib
import functools
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen
from huggingface_hub import errors as hub_errors

from training.data.images import CorruptImage, DataError
from training.io import http_response, retry_after

logger = logging.getLogger(__name__)

Example = tuple[bytes | None, str | None]  # encoded image, path; both None for a null

_READ_ROWS = 256  # rows converted from Arrow at once
_READ_BYTES = 8_000_000  # asked for in one request
_BAD_SHARD_ATTEMPTS = 3  # for what a repetition seldom mends: a missing or damaged file
_FIRST_DELAY_S, _LONGEST_DELAY_S = 1.0, 60.0


@dataclass(frozen=True)
class Shard:
    """A part of a source. `read(start)` yields its rows from row `start` on, in lists; it may be called again."""

    name: str
    read: Callable[[int], Iterator[list[Example]]]


def is_held_out(data: bytes | None, fraction: float) -> bool:
    """Which side an image is on, by a hash of its bytes: the same in every epoch, on every machine, for every copy.

    What cannot be read is on the training side, which counts it.
    """
    if data is None:
        return False
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < fraction * 2**64


def encoded_bytes(row: Example) -> tuple[bytes, str]:
    """Returns the bytes and the id of a row.

    Raises:
        CorruptImage: A null, or a file on this machine that cannot be read.
    """
    data, path = row
    if data is not None:  # the path alone may be the same in two shards
        return data, ":".join(filter(None, (path, hashlib.blake2b(data, digest_size=6).hexdigest())))
    if path is None:
        raise CorruptImage("no bytes and no path")
    try:
        return Path(path).read_bytes(), path
    except OSError as error:
        raise CorruptImage(f"cannot be read: {error.strerror}") from error


# ---- patience with a network ----


class Patience:
    """Repeats what failed, with growing pauses, as long as `timeout_s` has not passed since something last came.

    Args:
        timeout_s: Of the `data` section.
        stop: Ends a pause early.

    Attributes:
        waiting_for: What it is waiting for at this moment, in words; empty otherwise.
        last_progress: `time.monotonic()` when something last came.
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
        """Pauses before the next attempt.

        Raises:
            DataError: There should be no next one.
        """
        self._attempts += 1
        reason = in_one_line(error)
        waited = self.idle_seconds()
        is_lasting = _is_lasting(error) or "://" not in what  # a disk, unlike a network, seldom comes back
        if is_lasting and self._attempts >= _BAD_SHARD_ATTEMPTS:
            raise DataError(f"data: {what} cannot be read ({self._attempts} attempts): {reason}") from error
        delay = retry_after(error) or min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** min(self._attempts - 1, 10))
        delay *= random.uniform(1.0, 1.25)  # many machines that were cut off at once come back one by one
        if waited + delay > self._timeout_s:
            raise DataError(
                f"data: nothing came from {what} for {waited:.0f} s ({self._attempts} attempts, data.timeout_s="
                f"{self._timeout_s:g}): {reason}. Checkpoints are intact; use --resume auto when the source answers."
            ) from error
        self.waiting_for = f"{what}: {reason}; attempt {self._attempts + 1} in {delay:.0f} s"
        logger.warning("waiting for %s", self.waiting_for)
        self._stop.wait(delay)

    def rows(self, shard: Shard, start: int) -> Iterator[list[Example]]:
        """The rows of a shard from row `start` on, through failures; ends early when `stop` is set."""
        while not self._stop.is_set():
            try:
                with contextlib.closing(shard.read(start)) as parts:
                    for part in parts:
                        self.progress()
                        start += len(part)
                        yield part
                        self.progress()  # what the consumer did in between was no waiting for the network
                return
            except Exception as error:
                self.wait(shard.name, error)


def _is_lasting(error: Exception) -> bool:
    """Whether the error is the file's or the request's, not the network's."""
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
            return system.open(self.url, "rb", cache_type="none")  # pyarrow coalesces; a cache would read on
        system, path = fsspec.url_to_fs(self.url)
        return system.open(path, "rb", cache_type="none")

    @functools.cached_property
    def footer(self) -> pq.FileMetaData:
        with self.open() as file:
            return pq.read_metadata(file)


def parquet_examples(files: list[ParquetFile], column: str, start: int) -> Iterator[list[Example]]:
    for file in files:
        if start >= file.footer.num_rows:
            start -= file.footer.num_rows
            continue
        with file.open() as handle:
            parquet = pq.ParquetFile(handle, metadata=file.footer, pre_buffer=True)
            for groups, num_rows in _group_runs(file.footer, column):
                if start >= num_rows:  # neither fetched nor parsed
                    start -= num_rows
                    continue
                for batch in parquet.iter_batches(_READ_ROWS, row_groups=groups, columns=[column], use_threads=False):
                    values = batch.column(0).slice(start).to_pylist()
                    start = max(0, start - batch.num_rows)
                    if values:
                        yield [as_example(value) for value in values]


def _group_runs(footer: pq.FileMetaData, column: str) -> Iterator[tuple[list[int], int]]:
    """Row groups to read at once, and their rows: enough bytes to be worth a request, few enough to lose one."""
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


def as_example(value: dict | bytes | None) -> Example:
    if isinstance(value, dict):
        return value["bytes"], value.get("path")
    return value, None


def dataset_examples(dataset: datasets.IterableDataset, column: str, start: int) -> Iterator[list[Example]]:
    for part in dataset.iter(batch_size=64):
        rows = [as_example(value) for value in part[column][start:]]
        start = max(0, start - len(part[column]))
        if rows:
            yield [_fetched(row) for row in rows]


def _fetched(row: Example) -> Example:
    data, path = row
    if data is None and path is not None and "://" in path:  # an image that is a file of the repository
        with xopen(path, "rb") as file:
            data = file.read()
    return data, path
