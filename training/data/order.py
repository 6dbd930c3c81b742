"""Which examples an epoch holds and in which order: a pure function of the source, the seed and the epoch.

`open_examples` returns one of three. All yield references in the order of training, which cost nothing to skip, and
read an example by its reference, so that a process reads only what it trains on. (A shuffled stream of `datasets` 5
cannot do this: skipping reads every example, and its `state_dict` loses the shuffle buffer.)

- `CachedExamples`, the default: epoch 0 reads shard after shard in a random order through a shuffle buffer, while the
  dataset cache is downloaded; from epoch 1 on, a permutation of all examples. Epoch 0 keeps its order where the cache
  is complete, so that a resume does not depend on what is cached.
- `FolderExamples`: image files of this machine; a permutation of all in every epoch.
- `StreamedExamples` (`data.cache="off"`): the order of epoch 0 in every epoch, read from the source by every process.
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
from training.data.sources import Source, open_source, requested_identity

_RANDOM_BLOCK = 1024  # random numbers generated at once


def open_examples(config, split_role: str) -> "CachedExamples | FolderExamples | StreamedExamples":
    """Opens the examples of a split.

    Args:
        config: The `data` section.
        split_role: "train" or "validation".

    Raises:
        ValueError: The source cannot be opened, the disk is too small for the cache, or `data.cache="only"` finds
            no complete cache.
        DataError: The Hub does not answer.
    """
    is_cached = config.cache != "off" and config.dataset != "imagefolder"
    is_commit = re.fullmatch(r"[0-9a-f]{40}", config.revision or "") is not None
    if is_cached and (config.cache == "only" or is_commit):  # a complete cache needs no request to the Hub
        folder = find_complete(config, requested_identity(config, split_role))
        try:
            if folder is not None:
                return CachedExamples(DatasetCache(folder, config.timeout_s, None), config.shuffle_buffer)
        except ValueError:  # corrupt
            if config.cache == "only":
                raise
        if config.cache == "only":
            raise ValueError(
                f'data.cache="only": {cache_root(config)} holds no complete cache of the {split_role} examples of '
                f'{config.dataset!r} with this revision, split and column; run once with data.cache="on" and the '
                "same data.cache_dir."
            )
    source = open_source(config, split_role)
    if source.paths is not None:
        return FolderExamples(source)
    if not is_cached:
        return StreamedExamples(source, config.timeout_s, config.shuffle_buffer)
    cache = DatasetCache(cache_folder(config, source), config.timeout_s, source)
    return CachedExamples(cache, config.shuffle_buffer, source)


def buffer_shuffled(examples: Iterator, size: int, rng: np.random.Generator) -> Iterator:
    """Shuffles through a buffer: each example replaces a random one of `size`, which is yielded."""
    buffer = list(itertools.islice(examples, size))
    places: list[int] = []
    for example in examples:
        if not places:
            places = rng.integers(len(buffer), size=_RANDOM_BLOCK).tolist()
        place = places.pop()
        yield buffer[place]
        buffer[place] = example
    for place in rng.permutation(len(buffer)).tolist():
        yield buffer[place]


class FolderExamples:
    """Image files of this machine; the base class of the other two."""

    waiting_for = ""

    def __init__(self, source: Source):
        self.identity, self.num_examples, self._paths = source.identity, source.num_examples, source.paths

    def order(self, seed: int, epoch: int) -> Iterator[str]:
        """References to all examples of an epoch."""
        for i in np.random.default_rng((seed, epoch)).permutation(len(self._paths)).tolist():
            yield self._paths[i]

    def first(self) -> Iterator[str]:
        """References in the order of the source."""
        return iter(self._paths)

    def read(self, reference: str) -> Example:
        return Example(None, reference)

    def idle_seconds(self) -> float:
        """Seconds since the network last delivered something, where examples come from a network."""
        return 0.0

    def interrupt(self) -> None:
        """Ends a wait in another thread."""


class StreamedExamples(FolderExamples):
    """A source without a cache: references are the examples themselves."""

    def __init__(self, source: Source, timeout_s: float, shuffle_buffer: int):
        self.identity, self.num_examples = source.identity, source.num_examples
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
            for part in patience.examples(self._source.shards[shard], 0):
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


class CachedExamples(FolderExamples):
    """Examples of a `DatasetCache`, complete or growing."""

    def __init__(self, cache: DatasetCache, shuffle_buffer: int, source: Source | None = None):
        self._cache, self._buffer, self._source = cache, shuffle_buffer, source
        self.identity = source.identity if source is not None else read_manifest(cache.folder)["identity"]

    @property
    def num_examples(self) -> int | None:
        return self._cache.num_examples or (None if self._source is None else self._source.num_examples)

    def order(self, seed: int, epoch: int) -> Iterator[Any]:
        rng = np.random.default_rng((seed, epoch))
        if epoch == 0:
            shards = rng.permutation(self._cache.num_shards).tolist()
            return buffer_shuffled(self._follow(shards), self._buffer, rng)
        return self._permuted(seed, rng)

    def _permuted(self, seed: int, rng: np.random.Generator) -> Iterator[Any]:
        # What is not cached yet is downloaded in the order of epoch 0.
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
