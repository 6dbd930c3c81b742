"""Encoded images kept on this machine's disk: fetched once, while training reads them, and complete afterwards.

A cache is a folder of Arrow files ("chunks" of at most 512 rows or 16 MB) below `data.cache_dir`. One process per
node, the fetcher, writes them, a few shards at a time in the order in which the first epoch wants them, each chunk
under a temporary name that is renamed when its bytes are on the disk. Whoever trains maps finished chunks into
memory and waits for those that are missing. Chunks are that small, and not one file per shard, so that training
begins with the first rows, so that other processes need no protocol to follow but "does the file exist", and so
that what was cut off goes on at the last chunk.

    <cache_dir>/encoded_rows/<dataset>-<role>-<hash of identity>/
        shard-00003-chunk-00000.arrow   columns bytes, path; how far into the shard it reaches in the metadata
        shard-00003.json                written when the shard is whole: rows, sizes and hashes of its chunks
        manifest.json                   written when all is whole and has been read back and compared

Not here: what is fetched (`sources`), in which order rows are trained on (`example_order`), decoding (`images`).
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

from training.data.chunks import Chunk, describe_chunk, in_chunks, open_chunk, read_manifest, write_chunk, write_file
from training.data.images import DataError
from training.data.shards import Example, Patience
from training.data.sources import Source

logger = logging.getLogger(__name__)

_WORKERS = 4  # shards fetched at once; one connection alone seldom fills a network
_POLL_S = 0.05
_SPARE_BYTES = 1_000_000_000  # left free on the disk for checkpoints and the like
_GRACE_S = 30.0  # others wait so much longer than the fetcher, whose error is the clearer one


def cache_root(config) -> Path:
    """The folder of all caches: `data.cache_dir`, or the one of `datasets` (below HF_HOME)."""
    return Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "encoded_rows"


class DatasetCache:
    """The rows of one split.

    Args:
        folder: Of this cache.
        timeout_s: How long nothing may come before it is an error.
        source: What to fetch from; None where the cache is complete and nothing will be fetched.

    Raises:
        ValueError: The disk has not enough room for it.
    """

    def __init__(self, folder: Path, timeout_s: float, source: Source | None):
        self.folder, self._timeout_s, self._source = folder, timeout_s, source
        self._shards: dict[int, list[Chunk]] = {}  # those known to be whole
        self._tables: dict[tuple[int, int], pa.RecordBatch] = {}
        self._fetcher: threading.Thread | None = None
        self._stop, self._error = threading.Event(), None
        self._interrupted = threading.Event()
        self._awaited = ""
        self._patiences: list[Patience] = []  # of the shards that are being fetched
        self.is_complete = False
        self._look_for_manifest()
        if not self.is_complete and source is None:
            raise ValueError(f"data.cache: {folder} is not complete.")
        if not self.is_complete:
            self._check_disk()

    # ---- reading ----

    @property
    def num_shards(self) -> int:
        return len(self._shards) if self._source is None else len(self._source.shards)

    @property
    def num_rows(self) -> int | None:
        """Rows, where they are all there."""
        return sum(self.chunk_examples()) if self.is_complete else None

    @property
    def waiting_for(self) -> str:
        """What holds up the rows at this moment, in words."""
        troubles = "; ".join(patience.waiting_for for patience in [*self._patiences] if patience.waiting_for)
        return troubles or self._awaited

    def chunk_examples(self) -> list[int]:
        """Rows of each chunk, in the order of the source."""
        assert self.is_complete
        return [chunk["rows"] for shard in range(self.num_shards) for chunk in self._shards[shard]]

    def chunk_keys(self) -> list[tuple[int, int]]:
        """(shard, chunk) of each, in the same order."""
        assert self.is_complete
        return [(s, c) for s in range(self.num_shards) for c in range(len(self._shards[s]))]

    def shard_examples(self, shard: int) -> Iterator[int]:
        """Rows of each chunk of a shard, waiting for those that are not there yet."""
        for chunk in itertools.count():
            path = self._chunk_path(shard, chunk)
            if shard not in self._shards:
                self._wait(lambda path=path: path.exists() or self._is_whole(shard), f"the rows in {path.name}")
            if self._is_whole(shard):  # asked again: the end may have come with the last chunk
                chunks = self._shards[shard]
                if chunk >= len(chunks):
                    return
                yield chunks[chunk]["rows"]
            else:
                yield self._table(shard, chunk).num_rows

    def wait_until_complete(self) -> None:
        self._wait(self._look_for_manifest, "the last rows, without which there is no shuffle of all")

    def read(self, shard: int, chunk: int, row: int) -> Example:
        """One row; may be called from any thread."""
        table = self._table(shard, chunk)
        return table.column(0)[row].as_py(), table.column(1)[row].as_py()

    def _table(self, shard: int, chunk: int) -> pa.RecordBatch:
        table = self._tables.get((shard, chunk))
        if table is None:
            table = self._tables[shard, chunk] = open_chunk(self._chunk_path(shard, chunk))
        return table

    def interrupt(self) -> None:
        """Ends a wait for rows in another thread; the fetcher goes on."""
        self._interrupted.set()

    def _wait(self, is_there: Callable[[], bool], what: str) -> None:
        if is_there():
            return
        self._awaited = what
        last_signs, last_change, pause = None, time.monotonic(), 0.002
        while not is_there():
            if self._error is not None:
                raise self._error
            with contextlib.suppress(FileNotFoundError):  # the fetcher, here or elsewhere, is getting on
                signs = (self.folder / "progress").stat().st_mtime_ns
                if signs != last_signs:
                    last_signs, last_change = signs, time.monotonic()
            last_change = max([last_change, *(patience.last_progress for patience in [*self._patiences])])
            waited = time.monotonic() - last_change
            if waited > self._timeout_s + _GRACE_S * min(1.0, self._timeout_s / 60):
                reason = "the process that fetches them has not moved on"
                if self._fetcher is not None:
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

    def _is_whole(self, shard: int) -> bool:
        if shard not in self._shards:
            with contextlib.suppress(OSError, ValueError):
                chunks = json.loads(self._shard_path(shard).read_text())["chunks"]
                if self._first_damaged(shard, chunks) is None:
                    self._shards[shard] = chunks
        return shard in self._shards

    def _first_damaged(self, shard: int, chunks: list[Chunk]) -> int | None:
        """By size; the contents are compared when all are there."""
        for i, chunk in enumerate(chunks):
            path = self._chunk_path(shard, i)
            if not path.exists() or path.stat().st_size != chunk["bytes"]:
                return i
        return None

    def _look_for_manifest(self) -> bool:
        """Whether everything is there; sizes are compared, the contents were when the manifest was written."""
        if self.is_complete:
            return True
        manifest = read_manifest(self.folder)
        if manifest is None:
            return False
        for shard, chunks in enumerate(manifest["shards"]):
            if (damaged := self._first_damaged(shard, chunks)) is not None:
                path = self._chunk_path(shard, damaged)
                if self._source is None:
                    raise ValueError(f"data.cache: {path} is damaged; delete {self.folder} and fetch it again.")
                if self._fetches_here:
                    logger.warning("data.cache: %s is damaged and will be fetched again", path)
                    (self.folder / "manifest.json").unlink(missing_ok=True)
                return False
        self._shards = dict(enumerate(manifest["shards"]))
        self.is_complete = True
        return True

    # ---- fetching ----

    @property
    def _fetches_here(self) -> bool:
        return os.environ.get("LOCAL_RANK", "0") == "0"  # set by torchrun and accelerate launch

    def start(self, order: list[int]) -> None:
        """Starts to fetch what is missing, in the given order of shards, if this process is the one to do it."""
        self._interrupted.clear()
        if self.is_complete or self._fetcher is not None or not self._fetches_here:
            return
        self._fetcher = threading.Thread(target=self._run, args=(order,), name="fetch", daemon=True)
        self._fetcher.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends the fetcher after the rows in hand; what is on the disk stays."""
        self._stop.set()
        if self._fetcher is not None:
            self._fetcher.join(timeout=5.0)  # a read from the network may take longer, and ends with the process

    def _run(self, order: list[int]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock")
            while not self._stop.is_set() and read_manifest(self.folder) is None:
                try:
                    with lock.acquire(timeout=0):
                        self._fetch(order)
                except Timeout:  # another run, or another node on the same disk, is at it; it may end half-way
                    self._stop.wait(0.5)
        except OSError as error:
            self._error = DataError(
                f"data.cache: cannot write to {self.folder}: {error}. Free some space or set data.cache_dir "
                'to another disk; data.cache="off" keeps nothing.'
            )
        except Exception as error:  # raised where rows are waited for
            self._error = error

    def _fetch(self, order: list[int]) -> None:
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        for attempt in range(2):
            todo, errors = queue.SimpleQueue(), []
            for shard in order:
                todo.put(shard)
            # Not an executor: Python waits for its threads at exit, with which a download would have to end.
            workers = [threading.Thread(target=self._work, args=(todo, errors), daemon=True) for _ in range(_WORKERS)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            if errors:
                raise errors[0]
            if self._stop.is_set():
                return
            damaged = self._verify()
            if not damaged:
                break
            if attempt:
                raise DataError(f"data.cache: {damaged[0]} differs from what was written: the disk is faulty.")
        shards = [self._shards[shard] for shard in range(self.num_shards)]
        manifest = {"identity": self._source.identity, "shards": shards}
        write_file(self.folder / "manifest.json", json.dumps(manifest).encode())
        size = sum(chunk["bytes"] for chunks in shards for chunk in chunks)
        rows = sum(chunk["rows"] for chunks in shards for chunk in chunks)
        logger.info("data.cache: %d rows, %.2f GB, complete and verified in %s", rows, size / 1e9, self.folder)

    def _work(self, todo: queue.SimpleQueue, errors: list[BaseException]) -> None:
        with contextlib.suppress(queue.Empty):
            while not self._stop.is_set():
                shard = todo.get_nowait()
                try:
                    if not self._is_whole(shard):
                        self._fetch_shard(shard)
                except BaseException as error:  # noqa: BLE001 (it is raised where rows are waited for)
                    errors.append(error)
                    self._stop.set()

    def _fetch_shard(self, shard: int) -> None:
        """Writes the chunks of a shard that are not there, and its list when all are."""
        patience = Patience(self._timeout_s, self._stop)
        self._patiences.append(patience)
        try:
            chunks = list(self._chunks_on_disk(shard))
            start = chunks[-1]["source_examples"] if chunks else 0
            with contextlib.closing(patience.rows(self._source.shards[shard], start)) as parts:
                rows = self._wanted(itertools.chain.from_iterable(parts), start, sum(c["rows"] for c in chunks))
                for pending, source_examples in in_chunks(rows):
                    chunks.append(write_chunk(self._chunk_path(shard, len(chunks)), pending, source_examples))
            if not self._stop.is_set():  # else the rows ended early
                write_file(self._shard_path(shard), json.dumps({"chunks": chunks}).encode())
                self._is_whole(shard)
        finally:
            self._patiences.remove(patience)

    def _wanted(self, rows: Iterator[Example], source_examples: int, kept: int) -> Iterator[tuple[Example, int]]:
        """Rows on this side of the split, each with the number of the shard's rows up to it, to the limit."""
        limit, is_wanted, touched = self._source.limit, self._source.is_wanted, 0.0
        for row in rows:
            if (limit is not None and kept >= limit) or self._stop.is_set():
                return
            if time.monotonic() - touched > 0.5:
                (self.folder / "progress").touch()
                touched = time.monotonic()
            source_examples += 1
            if is_wanted is None or is_wanted(row):
                kept += 1
                yield row, source_examples

    def _chunks_on_disk(self, shard: int) -> Iterator[Chunk]:
        """Those that an earlier fetcher left, up to the first that is missing or damaged."""
        for i in itertools.count():
            path = self._chunk_path(shard, i)
            try:
                table = open_chunk(path)
            except (FileNotFoundError, pa.ArrowInvalid):
                self._drop_from(shard, i)
                return
            yield describe_chunk(path.read_bytes(), table)

    def _drop_from(self, shard: int, chunk: int) -> None:
        """Deletes a chunk and those after it: each begins where the one before ends."""
        self._shard_path(shard).unlink(missing_ok=True)
        self._shards.pop(shard, None)
        for path in self.folder.glob(f"shard-{shard:05d}-chunk-*.arrow"):
            if path >= self._chunk_path(shard, chunk):
                path.unlink()

    def _verify(self) -> list[Path]:
        """Reads everything back; deletes what is damaged and returns its paths."""
        damaged = []
        for shard in range(self.num_shards):
            for i, chunk in enumerate(self._shards[shard]):
                path = self._chunk_path(shard, i)
                (self.folder / "progress").touch()
                if self._stop.is_set():
                    return damaged
                if not path.exists() or hashlib.blake2b(path.read_bytes()).hexdigest() != chunk["blake2b"]:
                    logger.warning("data.cache: %s is damaged and will be fetched again", path)
                    damaged.append(path)
                    self._drop_from(shard, i)
                    break
        return damaged

    def _check_disk(self) -> None:
        """Says how much room the cache will take, before it takes it."""
        expected, root = self._source.num_bytes, self.folder
        while not root.exists():
            root = root.parent
        free = shutil.disk_usage(root).free
        there = sum(path.stat().st_size for path in self.folder.glob("*.arrow")) if root == self.folder else 0
        if expected is None:
            logger.info("data.cache: rows of %r will be kept in %s, %.1f GB free", self._source.name, root, free / 1e9)
            return
        missing = max(0, expected - there)
        logger.info(
            "data.cache: rows of %r will be kept in %s: at most %.2f GB, of which %.2f GB are there; %.1f GB free",
            self._source.name, self.folder, expected / 1e9, there / 1e9, free / 1e9,
        )  # fmt: skip
        if missing + _SPARE_BYTES > free:
            raise ValueError(
                f"data.cache needs up to {missing / 1e9:.2f} GB in {self.folder}, and {_SPARE_BYTES / 1e9:g} GB to "
                f"spare, but {free / 1e9:.2f} GB are free: set data.cache_dir to a larger disk, or data.cache to "
                '"off" to read the network in every epoch.'
            )


# ---- which cache ----


def cache_folder(config, source: Source) -> Path:
    """Where the cache of a source belongs: another dataset, revision, split or column is another folder."""
    key = hashlib.sha256(json.dumps(source.identity, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9.-]+", "--", source.name)
    return cache_root(config) / f"{name}-{source.identity['role']}-{key}"


def find_complete(config, asked: dict) -> Path | None:
    """The newest complete cache of what the configuration asks for, found without the source.

    A revision that is asked for matches the name under which the rows were fetched, or their commit.
    """
    found = []
    for path in cache_root(config).glob("*/manifest.json"):
        identity = (read_manifest(path.parent) or {}).get("identity", {})
        same = all(identity.get(key) == value for key, value in asked.items() if key != "revision")
        if same and asked["revision"] in (identity["revision"], identity.get("commit")):
            found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None
