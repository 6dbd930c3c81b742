"""The dataset cache: encoded images on this machine's disk, downloaded once while the first epoch trains on them.

A cache is a folder of Arrow files ("chunks" of at most 512 examples or 16 MB) below `data.cache_dir`. One process per
node downloads, a few shards at a time in the order of the first epoch; each chunk is written under a temporary name and
renamed after fsync. All processes memory-map finished chunks and wait for missing ones. Small chunks, instead of a file
per shard, let training start with the first examples and an interrupted download resume at the last chunk; `datasets` 5
caches only complete splits, and downloads all of them first.

    <cache_dir>/dataset_cache/<dataset>-<role>-<hash of identity>/
        shard-00003-chunk-00000.arrow   columns bytes, path; metadata: number of the shard's examples read so far
        shard-00003.json                written when the shard is complete: rows, sizes and hashes of its chunks
        manifest.json                   written when all shards are complete and verified
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import logging
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
from filelock import FileLock, Timeout

from training.data.chunks import Chunk, describe_chunk, in_chunks, open_chunk, read_manifest, write_chunk
from training.data.images import DataError
from training.data.shards import Example, Patience
from training.data.sources import Source
from training.io import write_file

logger = logging.getLogger(__name__)

_WORKERS = 4  # shards downloaded at once; one connection seldom saturates a network
_POLL_S = 0.05
_RESERVED_BYTES = 1_000_000_000  # left free on the disk for checkpoints
_GRACE_S = 30.0  # other processes wait longer than the downloading one, whose error names the cause


def cache_root(config) -> Path:
    """The folder of all dataset caches: below `data.cache_dir`, or below the folder of `datasets` (in HF_HOME)."""
    return Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "dataset_cache"


class DatasetCache:
    """The cached examples of one split.

    Args:
        folder: Of this cache.
        timeout_s: Seconds without a new example before an error.
        source: What to download; None where the cache is complete.

    Raises:
        ValueError: The disk has not enough space.
    """

    def __init__(self, folder: Path, timeout_s: float, source: Source | None):
        self.folder, self._timeout_s, self._source = folder, timeout_s, source
        self._shards: dict[int, list[Chunk]] = {}  # complete ones
        self._tables: dict[tuple[int, int], pa.RecordBatch] = {}
        self._downloader: threading.Thread | None = None
        self._stop, self._error = threading.Event(), None
        self._interrupted = threading.Event()
        self._awaited = ""
        self._patiences: list[Patience] = []  # of the shards that are being downloaded
        self.is_complete = False
        self._look_for_manifest()
        if not self.is_complete and source is None:
            raise ValueError(f'data.cache: {folder} is not complete: fill it with data.cache="on" first.')
        if not self.is_complete:
            self._check_disk()

    # ---- reading ----

    @property
    def num_shards(self) -> int:
        return len(self._shards) if self._source is None else len(self._source.shards)

    @property
    def num_examples(self) -> int | None:
        """Examples, once all are cached."""
        return sum(self.chunk_examples()) if self.is_complete else None

    @property
    def waiting_for(self) -> str:
        """What delays the next example, for log lines."""
        delays = "; ".join(patience.waiting_for for patience in [*self._patiences] if patience.waiting_for)
        return delays or self._awaited

    def chunk_examples(self) -> list[int]:
        """Examples of each chunk, in the order of the source."""
        assert self.is_complete
        return [chunk["rows"] for shard in range(self.num_shards) for chunk in self._shards[shard]]

    def chunk_keys(self) -> list[tuple[int, int]]:
        """(shard, chunk) of each chunk, in the same order."""
        assert self.is_complete
        return [(s, c) for s in range(self.num_shards) for c in range(len(self._shards[s]))]

    def shard_examples(self, shard: int) -> Iterator[int]:
        """Examples of each chunk of a shard, waiting for missing chunks."""
        for chunk in itertools.count():
            path = self._chunk_path(shard, chunk)
            if shard not in self._shards:
                self._wait(
                    lambda path=path: path.exists() or self._is_complete_shard(shard), f"the examples in {path.name}"
                )
            if self._is_complete_shard(shard):  # checked again: the shard may have ended with this chunk
                chunks = self._shards[shard]
                if chunk >= len(chunks):
                    return
                yield chunks[chunk]["rows"]
            else:
                yield self._table(shard, chunk).num_rows

    def wait_until_complete(self) -> None:
        self._wait(self._look_for_manifest, "the last examples, which a shuffle of all needs")

    def read(self, shard: int, chunk: int, row: int) -> Example:
        """Reads one example; thread-safe."""
        table = self._table(shard, chunk)
        return Example(*(column[row].as_py() for column in table.columns))

    def _table(self, shard: int, chunk: int) -> pa.RecordBatch:
        table = self._tables.get((shard, chunk))
        if table is None:
            path = self._chunk_path(shard, chunk)
            try:
                table = self._tables[shard, chunk] = open_chunk(path)
            except FileNotFoundError as error:
                raise DataError(self._deleted(path)) from error
            except OSError as error:
                raise DataError(f"data.cache: {path} cannot be read ({error}); check the disk.") from error
        return table

    @staticmethod
    def _deleted(path: Path) -> str:
        return f"data.cache: {path} was deleted during training; use --resume auto, which downloads it again."

    def interrupt(self) -> None:
        """Ends a wait in another thread; the download continues."""
        self._interrupted.set()

    def _wait(self, is_there: Callable[[], bool], what: str) -> None:
        if is_there():
            return
        self._awaited = what
        last_touch, last_change, pause = None, time.monotonic(), 0.002
        while not is_there():
            if self._error is not None:
                raise self._error
            with contextlib.suppress(OSError):  # touched by the downloading process
                touch = (self.folder / "progress").stat().st_mtime_ns
                if touch != last_touch:
                    last_touch, last_change = touch, time.monotonic()
            if last_touch is not None and not self.folder.exists():
                raise DataError(self._deleted(self.folder))
            last_change = max([last_change, *(patience.last_progress for patience in [*self._patiences])])
            waited = time.monotonic() - last_change
            if waited > self._timeout_s + _GRACE_S * min(1.0, self._timeout_s / 60):
                reason = "the process that downloads them makes no progress"
                if self._downloader is not None:
                    reason = self.waiting_for if self.waiting_for != what else "the source has not answered"
                raise DataError(
                    f"data: waited {waited:.0f} s for {what} (data.timeout_s={self._timeout_s:g}): {reason}. "
                    "Checkpoints are intact; use --resume auto when the source answers."
                )
            if self._interrupted.wait(pause):
                raise DataError(f"data: interrupted while waiting for {what}.")
            pause = min(_POLL_S, 2 * pause)
        self._awaited = ""

    def _chunk_path(self, shard: int, chunk: int) -> Path:
        return self.folder / f"shard-{shard:05d}-chunk-{chunk:05d}.arrow"

    def _shard_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.json"

    def _is_complete_shard(self, shard: int) -> bool:
        if shard not in self._shards:
            with contextlib.suppress(OSError, ValueError):
                chunks = json.loads(self._shard_path(shard).read_text())["chunks"]
                if self._first_corrupt(shard, chunks) is None:
                    self._shards[shard] = chunks
        return shard in self._shards

    def _first_corrupt(self, shard: int, chunks: list[Chunk]) -> int | None:
        """The first chunk of the wrong size; hashes are compared when all shards are complete."""
        for i, chunk in enumerate(chunks):
            path = self._chunk_path(shard, i)
            if not path.exists() or path.stat().st_size != chunk["bytes"]:
                return i
        return None

    def _look_for_manifest(self) -> bool:
        """Whether the cache is complete; compares sizes (hashes were compared when the manifest was written)."""
        if self.is_complete:
            return True
        manifest = read_manifest(self.folder)
        if manifest is None:
            return False
        for shard, chunks in enumerate(manifest["shards"]):
            if (corrupt := self._first_corrupt(shard, chunks)) is not None:
                path = self._chunk_path(shard, corrupt)
                if self._source is None:
                    raise ValueError(f"data.cache: {path} is corrupt; delete {self.folder} and download it again.")
                if self._is_downloader:
                    logger.warning("data.cache: %s is corrupt and will be downloaded again", path)
                    (self.folder / "manifest.json").unlink(missing_ok=True)
                return False
        self._shards = dict(enumerate(manifest["shards"]))
        self.is_complete = True
        return True

    # ---- download ----

    @property
    def _is_downloader(self) -> bool:
        return os.environ.get("LOCAL_RANK", "0") == "0"  # set by torchrun and accelerate launch

    def start(self, order: list[int]) -> None:
        """Starts to download missing shards in this order, in one process per node."""
        self._interrupted.clear()
        if self.is_complete or self._downloader is not None or not self._is_downloader:
            return
        self._downloader = threading.Thread(target=self._run, args=(order,), name="download", daemon=True)
        self._downloader.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends the download after the current examples; finished chunks stay on the disk."""
        self._stop.set()
        if self._downloader is not None:
            self._downloader.join(timeout=5.0)  # a network read may take longer; it ends with the process

    def _run(self, order: list[int]) -> None:
        is_created = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_created = True
            lock = FileLock(self.folder / "lock")
            while not self._stop.is_set() and read_manifest(self.folder) is None:
                try:
                    with lock.acquire(timeout=0):
                        self._download(order)
                except Timeout:  # another run, or a node on the same disk, is downloading
                    self._stop.wait(0.5)
        except OSError as error:
            reason = (
                f"data.cache: cannot write to {self.folder}: {error}. Free some space, or set data.cache_dir to a folder "
                'that can be written; data.cache="off" writes nothing.'
            )
            if is_created and not self.folder.exists():
                reason = self._deleted(self.folder)
            self._error = DataError(reason)
        except Exception as error:  # raised in the thread that waits for examples
            self._error = error

    def _download(self, order: list[int]) -> None:
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        for attempt in range(2):
            todo, errors = queue.SimpleQueue(), []
            for shard in order:
                todo.put(shard)
            # Not an executor: Python would wait at exit until its threads have downloaded their shards.
            workers = [threading.Thread(target=self._work, args=(todo, errors), daemon=True) for _ in range(_WORKERS)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            if errors:
                raise errors[0]
            if self._stop.is_set():
                return
            corrupt = self._verify()
            if not corrupt:
                break
            if attempt:
                raise DataError(f"data.cache: {corrupt[0]} differs from what was written: the disk is faulty.")
        shards = [self._shards[shard] for shard in range(self.num_shards)]
        manifest = {"identity": self._source.identity, "shards": shards}
        write_file(self.folder / "manifest.json", json.dumps(manifest).encode())
        size = sum(chunk["bytes"] for chunks in shards for chunk in chunks)
        count = sum(chunk["rows"] for chunks in shards for chunk in chunks)
        logger.info("data.cache: %d examples, %.2f GB, complete and verified in %s", count, size / 1e9, self.folder)

    def _work(self, todo: queue.SimpleQueue, errors: list[BaseException]) -> None:
        with contextlib.suppress(queue.Empty):
            while not self._stop.is_set():
                shard = todo.get_nowait()
                try:
                    if not self._is_complete_shard(shard):
                        self._download_shard(shard)
                except BaseException as error:  # noqa: BLE001 (it is raised in the thread that waits for examples)
                    errors.append(error)
                    self._stop.set()

    def _download_shard(self, shard: int) -> None:
        """Writes the missing chunks of a shard, then its list."""
        patience = Patience(self._timeout_s, self._stop)
        self._patiences.append(patience)
        try:
            chunks = list(self._chunks_on_disk(shard))
            start = chunks[-1]["source_examples"] if chunks else 0
            with contextlib.closing(patience.examples(self._source.shards[shard], start)) as parts:
                examples = self._wanted(itertools.chain.from_iterable(parts), start, sum(c["rows"] for c in chunks))
                for pending, source_examples in in_chunks(examples):
                    chunks.append(write_chunk(self._chunk_path(shard, len(chunks)), pending, source_examples))
            if not self._stop.is_set():  # otherwise the examples ended early
                write_file(self._shard_path(shard), json.dumps({"chunks": chunks}).encode())
                self._is_complete_shard(shard)
        finally:
            self._patiences.remove(patience)

    def _wanted(self, examples: Iterator[Example], source_examples: int, kept: int) -> Iterator[tuple[Example, int]]:
        """Yields wanted examples up to the limit, each with the number of the shard's examples read so far."""
        limit, is_wanted, touched = self._source.limit, self._source.is_wanted, 0.0
        for example in examples:
            if (limit is not None and kept >= limit) or self._stop.is_set():
                return
            if time.monotonic() - touched > 0.5:
                (self.folder / "progress").touch()
                touched = time.monotonic()
            source_examples += 1
            if is_wanted is None or is_wanted(example):
                kept += 1
                yield example, source_examples

    def _chunks_on_disk(self, shard: int) -> Iterator[Chunk]:
        """Chunks of an interrupted download, up to the first that is missing or corrupt."""
        for i in itertools.count():
            path = self._chunk_path(shard, i)
            try:
                table = open_chunk(path)
            except (FileNotFoundError, pa.ArrowInvalid):
                self._drop_from(shard, i)
                return
            yield describe_chunk(path.read_bytes(), table)

    def _drop_from(self, shard: int, chunk: int) -> None:
        """Deletes a chunk and those after it, because each starts where the previous one ends."""
        self._shard_path(shard).unlink(missing_ok=True)
        self._shards.pop(shard, None)
        for path in self.folder.glob(f"shard-{shard:05d}-chunk-*.arrow"):
            if path >= self._chunk_path(shard, chunk):
                path.unlink()

    def _verify(self) -> list[Path]:
        """Compares the hashes of all chunks; deletes corrupt ones and returns their paths."""
        corrupt = []
        for shard in range(self.num_shards):
            for i, chunk in enumerate(self._shards[shard]):
                path = self._chunk_path(shard, i)
                (self.folder / "progress").touch()
                if self._stop.is_set():
                    return corrupt
                if not path.exists() or hashlib.blake2b(path.read_bytes()).hexdigest() != chunk["blake2b"]:
                    logger.warning("data.cache: %s is corrupt and will be downloaded again", path)
                    corrupt.append(path)
                    self._drop_from(shard, i)
                    break
        return corrupt

    def _check_disk(self) -> None:
        """Logs how much space the cache needs, and checks that the disk has it."""
        expected, root = self._source.num_bytes, self.folder
        while not root.exists():
            root = root.parent
        free = shutil.disk_usage(root).free
        cached = sum(path.stat().st_size for path in self.folder.glob("*.arrow")) if root == self.folder else 0
        if expected is None:
            logger.info("data.cache: %r will be cached in %s, %.1f GB free", self._source.name, root, free / 1e9)
            return
        missing = max(0, expected - cached)
        logger.info(
            "data.cache: %r will be cached in %s: at most %.2f GB, of which %.2f GB are cached; %.1f GB free",
            self._source.name, self.folder, expected / 1e9, cached / 1e9, free / 1e9,
        )  # fmt: skip
        if missing + _RESERVED_BYTES > free:
            raise ValueError(
                f"data.cache needs up to {missing / 1e9:.2f} GB in {self.folder}, and {_RESERVED_BYTES / 1e9:g} GB in "
                f"reserve, but {free / 1e9:.2f} GB are free: set data.cache_dir to a larger disk, or data.cache to "
                '"off" to read the network in every epoch.'
            )


# ---- location ----


def cache_folder(config, source: Source) -> Path:
    """The folder of a source's cache: another dataset, revision, split or column has another folder."""
    key = hashlib.sha256(json.dumps(source.identity, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9.-]+", "--", source.name)
    return cache_root(config) / f"{name}-{source.identity['role']}-{key}"


def find_complete(config, requested: dict) -> Path | None:
    """The newest complete cache of a requested identity, found without the source.

    A requested revision matches the revision that was downloaded, or its commit.

    Raises:
        ValueError: Caches of different files fit.
    """
    found, contents = [], set()
    for path in cache_root(config).glob("*/manifest.json"):
        identity = (read_manifest(path.parent) or {}).get("identity", {})
        keys = (requested.keys() | {"attributes"}) - {"revision"}  # a request without attributes leaves their key out
        same = all(identity.get(key) == requested.get(key) for key in keys)
        if same and requested["revision"] in (identity["revision"], identity.get("commit")):
            found.append(path)
            contents.add(json.dumps(identity.get("fingerprint")))
    if len(contents) > 1:
        raise ValueError(
            f'data.cache is "only", and {len(found)} caches of different files fit this configuration: '
            f"{', '.join(sorted(str(path.parent) for path in found))}: set data.cache_dir to a folder that holds one of them."
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None
