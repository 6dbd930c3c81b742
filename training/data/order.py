"""Which rows an epoch holds and in which order: a pure function of the source, the seed and the epoch.

`open_examples` gives one of three, by where the rows are; all yield references in the order of training, which cost
nothing to skip, and turn a reference into a row on demand, so that a process reads only the rows it trains on:

- `CachedRows`, the rule: epoch 0 follows the network, shard after shard in a random order through a shuffle
  buffer, out of the chunks that `DatasetCache` keeps as they arrive; from epoch 1 on a permutation of all rows.
  Epoch 0 has its own order even where the cache is complete, so that a resume cannot depend on what is cached.
- `FolderRows`: image files of this machine; a permutation of all in every epoch.
- `StreamedRows` (`data.cache="off"`): epoch 0's order in every epoch, from the network, on every process.

Not here: the cache itself (`dataset_cache`), batches and decoding (`data`).
"""

import bisect
import itertools
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from training.data.cache import DatasetCache, cache_folder, cache_root, find_complete
from training.data.chunks import read_manifest
from training.data.shards import Example, Patience
from training.data.sources import Source, asked_for, open_source

_DRAWS = 1024  # random numbers drawn at once


def open_examples(config, split_role: str) -> "CachedRows | FolderRows | StreamedRows":
    """Opens the rows of a split.

    Args:
        config: The `data` section.
        split_role: "train" or "validation".

    Raises:
        ValueError: The source cannot be opened, the disk is too small for the cache, or `data.cache="only"` finds
            no complete cache.
        DataError: The Hub does not answer.
    """
    is_kept = config.cache != "off" and config.dataset != "imagefolder"
    is_commit = re.fullmatch(r"[0-9a-f]{40}", config.revision or "") is not None
    if is_kept and (config.cache == "only" or is_commit):  # nothing to ask the Hub, if all rows are here
        folder = find_complete(config, asked_for(config, split_role))
        try:
            if folder is not None:
                return CachedRows(DatasetCache(folder, config.timeout_s, None), config.shuffle_buffer)
        except ValueError:  # damaged
            if config.cache == "only":
                raise
        if config.cache == "only":
            raise ValueError(
                f'data.cache="only": {cache_root(config)} holds no complete cache of the {split_role} rows of '
                f'{config.dataset!r} with this revision, split and column; run once with data.cache="on" and the '
                "same data.cache_dir."
            )
    source = open_source(config, split_role)
    if source.paths is not None:
        return FolderRows(source)
    if not is_kept:
        return StreamedRows(source, config.timeout_s, config.shuffle_buffer)
    cache = DatasetCache(cache_folder(config, source), config.timeout_s, source)
    return CachedRows(cache, config.shuffle_buffer, source)


def buffer_shuffled(rows: Iterator, size: int, rng: np.random.Generator) -> Iterator:
    """Each row takes a random place in a buffer of `size`, and the row that was there comes out."""
    buffer = list(itertools.islice(rows, size))
    draws: list[int] = []
    for row in rows:
        if not draws:
            draws = rng.integers(len(buffer), size=_DRAWS).tolist()
        place = draws.pop()
        yield buffer[place]
        buffer[place] = row
    for place in rng.permutation(len(buffer)).tolist():
        yield buffer[place]


class FolderRows:
    """Files of this machine. See the module for what the three have in common."""

    waiting_for = ""

    def __init__(self, source: Source):
        self.identity, self.num_rows, self._paths = source.identity, source.num_rows, source.paths

    def order(self, seed: int, epoch: int) -> Iterator[str]:
        """References to all rows of an epoch."""
        for i in np.random.default_rng((seed, epoch)).permutation(len(self._paths)).tolist():
            yield self._paths[i]

    def first(self) -> Iterator[str]:
        """References in the order of the source."""
        return iter(self._paths)

    def read(self, reference: str) -> Example:
        return None, reference

    def idle_seconds(self) -> float:
        """How long the network has given nothing, where that is what holds up the rows."""
        return 0.0

    def interrupt(self) -> None:
        """Ends a wait in another thread."""


class StreamedRows(FolderRows):
    """A network without a cache: references are the rows themselves."""

    def __init__(self, source: Source, timeout_s: float, shuffle_buffer: int):
        self.identity, self.num_rows = source.identity, source.num_rows
        self._source, self._timeout_s, self._buffer = source, timeout_s, shuffle_buffer
        self._new_patience()

    def _new_patience(self) -> Patience:
        self._stop = threading.Event()
        self._patience = Patience(self._timeout_s, self._stop)
        return self._patience

    def order(self, seed: int, epoch: int) -> Iterator[Example]:
        rng = np.random.default_rng((seed, epoch))
        shards = rng.permutation(len(self._source.shards)).tolist()
        return buffer_shuffled(self._read(shards), self._buffer, rng)

    def first(self) -> Iterator[Example]:
        return itertools.islice(self._read(range(len(self._source.shards))), self._source.limit)

    def _read(self, shards) -> Iterator[Example]:
        patience, is_wanted = self._new_patience(), self._source.is_wanted
        for shard in shards:
            for part in patience.rows(self._source.shards[shard], 0):
                yield from part if is_wanted is None else filter(is_wanted, part)

    def read(self, reference: Example) -> Example:
        return reference

    @property
    def waiting_for(self) -> str:
        return self._patience.waiting_for

    def idle_seconds(self) -> float:
        return self._patience.idle_seconds()

    def interrupt(self) -> None:
        self._stop.set()


class CachedRows(FolderRows):
    """Rows of a `DatasetCache`, complete or growing."""

    def __init__(self, cache: DatasetCache, shuffle_buffer: int, source: Source | None = None):
        self._cache, self._buffer, self._source = cache, shuffle_buffer, source
        self.identity = source.identity if source is not None else read_manifest(cache.folder)["identity"]

    @property
    def num_rows(self) -> int | None:
        return self._cache.num_rows or (None if self._source is None else self._source.num_rows)

    def order(self, seed: int, epoch: int) -> Iterator[Any]:
        rng = np.random.default_rng((seed, epoch))
        if epoch == 0:
            shards = rng.permutation(self._cache.num_shards).tolist()
            return buffer_shuffled(self._follow(shards), self._buffer, rng)
        return self._permuted(seed, rng)

    def _permuted(self, seed: int, rng: np.random.Generator) -> Iterator[Any]:
        # The same shards first as in epoch 0, if they are not all there yet.
        self._cache.start(np.random.default_rng((seed, 0)).permutation(self._cache.num_shards).tolist())
        self._cache.wait_until_complete()
        keys, counts = self._cache.chunk_keys(), self._cache.chunk_examples()
        starts = list(itertools.accumulate(counts, initial=0))
        for i in rng.permutation(starts[-1]).tolist():
            chunk = bisect.bisect_right(starts, i) - 1
            yield *keys[chunk], i - starts[chunk]

    def first(self) -> Iterator[Any]:
        return self._follow(list(range(self._cache.num_shards)))

    def _follow(self, shards: list[int]) -> Iterator[Any]:
        self._cache.start(shards)
        for shard in shards:
            for chunk, count in enumerate(self._cache.shard_examples(shard)):
                for row in range(count):
                    yield shard, chunk, row

    def read(self, reference: tuple[int, int, int]) -> Example:
        return self._cache.read(*reference)

    @property
    def waiting_for(self) -> str:
        return self._cache.waiting_for

    def interrupt(self) -> None:
        self._cache.interrupt()
