"""The dataset cache: written once by one process, resumed after an interruption, one folder per identity."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from encoded_images import coded_image, image_bytes
from filelock import FileLock
from test_stream import open_stream, parquet_config, write_shards

from training.config import DataConfig, config_from_dict
from training.data import cache as dataset_cache
from training.data import chunks, shards
from training.data.cache import DatasetCache, cache_folder
from training.data.order import CachedExamples, buffer_shuffled
from training.data.shards import Example, Shard
from training.data.sources import Source

NUM_SHARDS, SHARD_EXAMPLES = 5, 23


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(chunks, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(shards, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(dataset_cache.datasets.config, "HF_DATASETS_CACHE", tmp_path / "default")


class CountedSource:
    """Shards of numbered examples that record what is read; `fails` maps (shard, number) to errors to raise there."""

    def __init__(self, **facts):
        self.reads: list[tuple[int, int]] = []
        self.fails: dict[tuple[int, int], list[Exception]] = {}
        self.slow_s = 0.0
        parts = [Shard(f"mem://shard{i}", lambda start, i=i: self._read(i, start)) for i in range(NUM_SHARDS)]
        self.source = Source(name="numbers", identity={"role": "train"}, shards=parts, **facts)

    def _read(self, shard: int, start: int):
        for number in range(start, SHARD_EXAMPLES):
            if errors := self.fails.get((shard, number)):
                raise errors.pop(0)
            time.sleep(self.slow_s)
            self.reads.append((shard, number))
            yield [example_of(shard, number)]


def example_of(shard: int, number: int) -> Example:
    return Example(None, None) if number == 7 else Example(b"%d-%d" % (shard, number), f"{number}.png")


ALL_EXAMPLES = [(shard, number) for shard in range(NUM_SHARDS) for number in range(SHARD_EXAMPLES)]


def examples_in_order(cache: DatasetCache, source: Source, epoch: int = 0, seed: int = 0) -> list:
    examples = CachedExamples(cache, 16, source)
    return [examples.read(reference) for reference in examples.order(seed, epoch)]


def test_examples_are_downloaded_once_and_read_in_both_kinds_of_epoch(tmp_path):
    counted = CountedSource()
    cache = DatasetCache(tmp_path, 5.0, counted.source)
    expected = sorted(map(str, itertools.starmap(example_of, ALL_EXAMPLES)))
    for epoch in range(3):
        assert sorted(map(str, examples_in_order(cache, counted.source, epoch))) == expected
    assert sorted(counted.reads) == ALL_EXAMPLES
    again = DatasetCache(tmp_path, 5.0, None)
    assert again.is_complete and again.num_examples == len(ALL_EXAMPLES)
    assert examples_in_order(again, counted.source, 2) == examples_in_order(cache, counted.source, 2)
    assert not list(tmp_path.glob("*.tmp"))


def test_later_epochs_are_permutations_of_the_data_set(tmp_path):
    counted = CountedSource()
    cache = DatasetCache(tmp_path, 5.0, counted.source)
    examples_in_order(cache, counted.source)
    examples = CachedExamples(cache, 16, counted.source)
    starts = []
    for epoch in range(1, 200):
        order = list(examples.order(0, epoch))
        assert len(set(order)) == len(ALL_EXAMPLES)
        starts.append(order[0][0])
    # The first number comes from any shard: 5 equal chances, 199 samples, 40 +- 5.7 each.
    assert all(15 < count < 65 for count in np.bincount(starts, minlength=NUM_SHARDS))


def test_buffer_shuffle_is_a_permutation_that_moves_examples_by_about_the_buffer():
    order = list(buffer_shuffled(iter(range(5000)), 100, np.random.default_rng(0)))
    assert sorted(order) == list(range(5000))
    moved = np.abs(np.array(order) - np.arange(5000))
    assert 60 < moved.mean() < 160


def test_an_interrupted_download_resumes_at_the_last_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_cache, "_WORKERS", 1)
    counted = CountedSource()
    order = np.random.default_rng((0, 0)).permutation(NUM_SHARDS).tolist()
    counted.fails[order[2], 14] = [ValueError("cut")] * 3
    with pytest.raises(RuntimeError, match=r"data: mem://shard\d cannot be read \(3 attempts\): ValueError: cut"):
        examples_in_order(DatasetCache(tmp_path, 5.0, counted.source), counted.source)
    (tmp_path / "shard-00000-chunk-00001.tmp").write_bytes(b"half")
    before = len(counted.reads)
    assert before == 2 * SHARD_EXAMPLES + 14
    examples = examples_in_order(DatasetCache(tmp_path, 5.0, counted.source), counted.source)
    assert len(set(examples)) == NUM_SHARDS * (SHARD_EXAMPLES - 1) + 1  # the nulls are alike
    assert len(counted.reads) - before == 3 * SHARD_EXAMPLES - 12  # 12 examples of the third shard were in chunks
    fresh = CountedSource()
    assert examples == examples_in_order(DatasetCache(tmp_path / "fresh", 5.0, fresh.source), fresh.source)


@pytest.mark.parametrize(
    ("trouble", "complete"),
    # Contents are compared when a cache is completed, not at every start.
    [("flipped bit", False), ("cut short", False), ("missing", False), ("cut short", True), ("missing", True)],
)
def test_corrupt_chunks_are_found_and_downloaded_again(tmp_path, trouble, complete):
    counted = CountedSource()
    expected = examples_in_order(DatasetCache(tmp_path, 5.0, counted.source), counted.source, 1)
    chunk = tmp_path / "shard-00002-chunk-00003.arrow"
    good = chunk.read_bytes()
    if not complete:
        (tmp_path / "manifest.json").unlink()
    if trouble == "missing":
        chunk.unlink()
    else:
        place = good.index(b"2-13") + 1
        chunk.write_bytes(good[:-9] if trouble == "cut short" else good[:place] + b"/" + good[place + 1 :])
    if complete:
        with pytest.raises(ValueError, match=r"chunk-00003.arrow is corrupt; delete .* and download it again"):
            DatasetCache(tmp_path, 5.0, None)
    counted.reads.clear()
    assert examples_in_order(DatasetCache(tmp_path, 5.0, counted.source), counted.source, 1) == expected
    assert counted.reads == [(2, number) for number in range(12, SHARD_EXAMPLES)]
    assert chunk.read_bytes() == good


def test_one_process_downloads_and_the_others_follow(tmp_path):
    counted = CountedSource()
    counted.slow_s = 0.002
    caches = [DatasetCache(tmp_path, 5.0, counted.source) for _ in range(3)]
    found: list = [None] * 3

    def follow(i: int) -> None:
        found[i] = examples_in_order(caches[i], counted.source, i % 2)

    threads = [threading.Thread(target=follow, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert found[0] == found[2] and sorted(map(str, found[0])) == sorted(map(str, found[1]))
    assert sorted(counted.reads) == ALL_EXAMPLES


def test_a_waiting_process_takes_over_the_download(tmp_path):
    counted = CountedSource()
    lock = FileLock(tmp_path / "lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.3, lock.release).start()
    assert len(examples_in_order(DatasetCache(tmp_path, 5.0, counted.source), counted.source)) == len(ALL_EXAMPLES)


def test_waiting_ends_with_an_error_or_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")  # another process should download, and there is none
    counted = CountedSource()
    with pytest.raises(
        RuntimeError, match=r"waited 0 s for the examples in shard.*timeout_s=0.2\): the process that downloads"
    ):
        examples_in_order(DatasetCache(tmp_path, 0.2, counted.source), counted.source)
    cache = DatasetCache(tmp_path, 60.0, counted.source)
    threading.Timer(0.2, cache.interrupt).start()
    with pytest.raises(RuntimeError, match="interrupted"):
        examples_in_order(cache, counted.source)
    assert counted.reads == []


def test_progress_elsewhere_and_slow_examples_are_no_stall(tmp_path):
    counted = CountedSource()
    counted.slow_s = 0.02  # 23 examples of 5 shards in 4 threads: twice the timeout in all
    assert len(examples_in_order(DatasetCache(tmp_path, 0.4, counted.source), counted.source, 1)) == len(ALL_EXAMPLES)


def test_a_full_disk_is_one_error_before_or_during_the_download(tmp_path, monkeypatch, caplog):
    counted = CountedSource(num_bytes=5_000_000_000)
    caplog.set_level("INFO")
    usage = dataset_cache.shutil.disk_usage(tmp_path)._replace(free=5_900_000_000)
    monkeypatch.setattr(dataset_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"needs up to 5.00 GB in .* 1 GB in reserve, but 5.90 GB are free: set data.cache"
    ):
        DatasetCache(tmp_path / "new", 5.0, counted.source)
    assert "at most 5.00 GB, of which 0.00 GB are cached; 5.9 GB free" in caplog.text
    assert not (tmp_path / "new").exists()
    counted = CountedSource()

    def no_space(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RuntimeError, match=r"data.cache: cannot write to .*No space left.*data.cache_dir"):
        examples_in_order(DatasetCache(tmp_path, 5.0, counted.source), counted.source)


def test_mapped_chunks_hold_no_file_open(tmp_path):
    counted = CountedSource()
    cache = DatasetCache(tmp_path, 5.0, counted.source)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    examples_in_order(cache, counted.source, 1)
    assert len(list(tmp_path.glob("*.arrow"))) == NUM_SHARDS * 6
    if before:
        assert len(os.listdir("/proc/self/fd")) - before < 6


def test_another_identity_is_another_folder():
    def folder(**changes) -> Path:
        identity = {"role": "train", "commit": "a", "split": "train", "column": "image", **changes}
        return cache_folder(DataConfig(), Source(name="org/faces", identity=identity))

    others = [{"commit": "b"}, {"split": "all"}, {"column": "photo"}, {"role": "validation"}]
    assert len({folder(), *(folder(**change) for change in others)}) == 5
    assert folder() == folder()


def test_files_that_are_replaced_in_place_have_another_cache(tmp_path):
    images = [image_bytes(coded_image(i)) for i in range(24)]
    config = parquet_config({"train": write_shards(tmp_path, images, 2)})
    assert len(list(open_stream(config).epoch_batches(0))) == 4
    write_shards(tmp_path, images[::-1], 2)
    seen = [example_id for batch in open_stream(config).epoch_batches(1) for example_id in batch.example_ids]
    fresh = parquet_config(config.data_files, cache_dir=str(tmp_path / "fresh"))
    assert seen == [example_id for batch in open_stream(fresh).epoch_batches(1) for example_id in batch.example_ids]


def test_two_caches_that_fit_are_an_error_without_the_source(tmp_path, monkeypatch):
    """Two projects with data in the same relative place."""
    files, cache = {"train": "train-*.parquet"}, {"cache_dir": str(tmp_path / "cache")}
    for count in (6, 12):
        (tmp_path / str(count)).mkdir()
        monkeypatch.chdir(tmp_path / str(count))
        write_shards(Path("."), [image_bytes(coded_image(i)) for i in range(count)], 1)
        stream = open_stream(parquet_config(files, **cache))
        assert [len(list(stream.epoch_batches(epoch))) for epoch in (0, 1)] == [count // 6] * 2
        if count == 6:
            assert len(list(open_stream(parquet_config(files, cache="only", **cache)).epoch_batches(0))) == 1
    with pytest.raises(ValueError, match='data.cache is "only", and 2 caches of different files fit'):
        open_stream(parquet_config(files, cache="only", **cache))


def test_a_resume_with_other_examples_is_refused(tmp_path):
    images = [image_bytes(coded_image(i)) for i in range(24)]
    stream = open_stream(parquet_config({"train": write_shards(tmp_path, images, 2)}))
    stream.check_resume(json.loads(json.dumps(stream.identity)))
    stream.check_resume({**stream.identity, "files_at": "elsewhere", "revision": "v2"})
    with pytest.raises(ValueError, match=r"commit \(abc -> None\).*set data.revision"):
        stream.check_resume({**stream.identity, "commit": "abc"})
    (tmp_path / "more").mkdir()
    other = open_stream(parquet_config({"train": write_shards(tmp_path / "more", images[:20], 2)}))
    with pytest.raises(ValueError, match=r"fingerprint \(\w+ -> \w+\)"):
        other.check_resume(stream.identity)


def test_the_timeout_is_below_that_of_the_collectives():
    with pytest.raises(ValueError, match="data.timeout_s must be greater than 0 and at most 3000, got 3500.0"):
        config_from_dict({"data": {"timeout_s": 3500}})
    with pytest.raises(ValueError, match='data.cache must be "on", "only" or "off", got "auto"'):
        config_from_dict({"data": {"cache": "auto"}})


RANKS = """
import json, os, sys
from training.config import DataConfig
from training.data.stream import TrainStream

def run(rank, cases):
    os.environ["LOCAL_RANK"] = str(rank)
    found = {}
    for case, (folder, world_size, threads, cache) in cases.items():
        if rank < world_size:
            config = DataConfig(
                dataset="parquet", data_files={"train": folder + "/*.parquet"}, shuffle_buffer=16, timeout_s=60,
                decode_threads=threads, cache=cache, cache_dir=folder + "/cache",
            )
            stream = TrainStream(config, resolution=24, seed=5, global_batch=6, rank=rank, world_size=world_size)
            found[case] = [[batch.example_ids for batch in stream.epoch_batches(epoch)] for epoch in range(3)]
    open(f"{sys.argv[1]}/rank{rank}.json", "w").write(json.dumps(found))

children = []
for rank in range(3):  # forked before there are threads, because importing torch takes seconds
    children.append(os.fork())
    if children[-1] == 0:
        run(rank, json.loads(sys.argv[2]))
        sys.exit()
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.multiprocess
def test_rank_processes_see_every_example_once_in_equal_numbers_of_batches(tmp_path):
    images = [image_bytes(coded_image(i)) for i in range(101)]
    cases = {}
    for layout in ((5, 2, 2, "on"), (7, 3, 1, "off"), (7, 3, 2, "on"), (19, 2, 1, "on"), (19, 2, 2, "on")):
        folder = tmp_path / "-".join(map(str, layout))
        folder.mkdir()
        write_shards(folder, images, layout[0])
        cases[folder.name] = (str(folder), *layout[1:])
    command = [sys.executable, "-c", RANKS, str(tmp_path), json.dumps(cases)]
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, timeout=60, check=True)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    for case, (_, world_size, _, _) in cases.items():
        for epoch in range(3):
            ranks = [found[rank][case][epoch] for rank in range(world_size)]
            assert [len(batches) for batches in ranks] == [101 // 6] * world_size
            ids = [example_id for batches in ranks for batch in batches for example_id in batch]
            assert len(ids) == len(set(ids)) == 101 - 101 % 6
    assert found[0]["19-2-1-on"] == found[0]["19-2-2-on"]
