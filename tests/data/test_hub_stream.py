"""Streams through the real Hub client from a fake server, with and without network failures."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from encoded_images import SIZE, coded_image, image_bytes
from fake_hub import COMMIT, FakeHub
from test_stream import assert_same, flat_numbers, open_stream, write_shards

from training.config import DataConfig
from training.data import cache as dataset_cache
from training.data import shards
from training.data.stream import load_validation

NUM_EXAMPLES = 143


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """5 shards of coded images to train on, 2 to validate on."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "data").mkdir()
    images = [image_bytes(coded_image(i)) for i in range(NUM_EXAMPLES)]
    write_shards(folder / "data", images, 5)
    write_shards(folder / "data", images[:12], 2, "validation")
    return folder


def talk_to(hub: FakeHub, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(shards, "_FIRST_DELAY_S", 0.01)
    quick = functools.partial(huggingface_hub.hf_file_system.http_backoff, base_wait_time=0.01)
    monkeypatch.setattr(huggingface_hub.hf_file_system, "http_backoff", quick)


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    with FakeHub(repository) as hub:
        talk_to(hub, tmp_path / "cache", monkeypatch)
        yield hub


def hub_config(**changes) -> DataConfig:
    return DataConfig(**{"dataset": "org/faces", "shuffle_buffer": 16, "decode_threads": 2, **changes})


def test_the_first_epoch_requests_each_byte_range_once_and_later_ones_nothing(hub, repository):
    stream = open_stream(hub_config())
    orders = [flat_numbers(list(stream.epoch_batches(0)))]
    list(stream.epoch_batches(1, max_batches=1))  # waits for the last examples of epoch 0
    fetched, asked = sorted(hub.ranges), len(hub.requests)
    assert len(fetched) == len(set(fetched)) == hub.file_requests == 10  # for each shard its footer and its rows
    shards_read = [name for name, first, _ in fetched if first > 0]  # a footer of so small a file begins at 0
    assert shards_read == [f"data/{path.name}" for path in sorted((repository / "data").glob("train-*"))]
    for epoch in (1, 2):
        orders.append(flat_numbers(list(stream.epoch_batches(epoch))))
    assert len(hub.requests) == asked
    assert all(len(set(order)) == NUM_EXAMPLES - NUM_EXAMPLES % 6 for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert stream.num_examples == NUM_EXAMPLES


def test_a_cached_commit_needs_no_network_and_a_branch_needs_cache_only(hub, tmp_path):
    full = {epoch: list(open_stream(hub_config()).epoch_batches(epoch)) for epoch in (0, 1)}
    validation = load_validation(hub_config(), resolution=SIZE, rank=0, world_size=1)
    asked = len(hub.requests)
    for changes in ({"revision": COMMIT}, {"cache": "only"}, {"cache": "only", "revision": COMMIT}):
        for epoch, batches in full.items():
            assert_same(list(open_stream(hub_config(**changes)).epoch_batches(epoch)), batches)
        again = load_validation(hub_config(**changes), resolution=SIZE, rank=0, world_size=1)
        assert again[1] == validation[1] == list(range(12)) and again[0].equal(validation[0])
    assert len(hub.requests) == asked
    for other in (
        {"revision": "v1"}, {"train_split": "all"}, {"image_column": "label"}, {"dataset": "org/others"},
        {"cache_dir": str(tmp_path / "elsewhere")},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"holds no complete cache of the train examples of .*data.cache=\"on\""):
            open_stream(hub_config(cache="only", **other))
    assert len(hub.requests) == asked


def test_without_a_cache_every_epoch_is_a_stream_in_the_order_of_the_first(hub):
    off = open_stream(hub_config(cache="off"))
    first = list(off.epoch_batches(0))
    assert_same(first, list(open_stream(hub_config()).epoch_batches(0)))
    asked = len(hub.ranges)
    second = flat_numbers(list(off.epoch_batches(1)))
    assert len(set(second)) == NUM_EXAMPLES - NUM_EXAMPLES % 6 and second != flat_numbers(first)
    assert len(hub.ranges) - asked == 5  # again, but not the footers
    assert_same(list(off.epoch_batches(0, start_batch=9)), first[9:])


@pytest.mark.parametrize(
    "trouble", [["429"], ["503"], ["cut"], ["stall"], ["cut", "ok", "503", "ok", "cut"]], ids="-".join
)
def test_network_failures_are_retried(hub, trouble, monkeypatch, request):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
    calm = open_stream(hub_config(cache_dir=str(request.getfixturevalue("tmp_path") / "calm")))
    expected = list(calm.epoch_batches(0))
    stream = open_stream(hub_config())
    hub.faults[:] = ["ok", *trouble]
    before = len(hub.ranges)
    assert_same(list(stream.epoch_batches(0)), expected)
    assert hub.faults == []
    assert len(hub.ranges) - before == 9  # nothing that has come is asked for again (a footer was read before)


def impatient_client(monkeypatch) -> None:
    """The Hub's client gives up at once, so that ours is what retries."""
    at_once = functools.partial(huggingface_hub.hf_file_system.http_backoff, max_retries=0)
    monkeypatch.setattr(huggingface_hub.hf_file_system, "http_backoff", at_once)


@pytest.mark.parametrize("trouble", ["503*", "429*", "cut*", "stall*"])
def test_a_lasting_failure_is_one_error_and_keeps_what_was_downloaded(hub, trouble, monkeypatch, caplog):
    impatient_client(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(dataset_cache, "_WORKERS", 1)
    stream = open_stream(hub_config(timeout_s=1.0))
    hub.faults[:] = ["ok"] * 5 + [trouble]
    with pytest.raises(
        RuntimeError, match=r"^data: nothing arrived from hf://.*data.timeout_s=1\): \w+.*--resume auto"
    ) as error:
        list(stream.epoch_batches(0))
    assert "\n" not in str(error.value)
    assert any(record.getMessage().startswith("waiting for hf://") for record in caplog.records)
    hub.faults.clear()
    had = len(hub.ranges)
    batches = list(open_stream(hub_config()).epoch_batches(0))
    assert len(set(flat_numbers(batches))) == NUM_EXAMPLES - NUM_EXAMPLES % 6
    fetched = hub.ranges[had:]
    assert not {name for name, first, _ in fetched if first > 0} & {n for n, first, _ in hub.ranges[:had] if first > 0}


def test_a_stalled_stream_without_a_cache_is_an_error(hub, monkeypatch):
    impatient_client(monkeypatch)
    stream = open_stream(hub_config(cache="off", timeout_s=0.5))
    hub.faults[:] = ["503*"]
    with pytest.raises(RuntimeError, match=r"nothing arrived from hf://.*HTTP|503"):
        list(stream.epoch_batches(0))


def test_a_cache_folder_that_cannot_be_written_names_the_remedy(hub, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        ValueError, match=r"'org/faces' cannot be opened: .*file/cache.*; set data.cache_dir or HF_HOME"
    ):
        open_stream(hub_config(cache="off", cache_dir=str(tmp_path / "file" / "cache")))


def test_a_missing_file_is_named_after_few_attempts(hub, repository):
    stream = open_stream(hub_config())
    gone = repository / "data" / "train-00003-of-00005.parquet"
    away = gone.rename(repository / "gone")
    try:
        with pytest.raises(
            RuntimeError, match=r"train-00003-of-00005.parquet cannot be read \(3 attempts\): \w*NotFound"
        ):
            list(stream.epoch_batches(0))
    finally:
        away.rename(gone)


def test_a_busy_hub_at_the_start_is_waited_for(hub, monkeypatch, caplog):
    real, answers = huggingface_hub.HfApi.dataset_info, iter([429, 503])

    def busy(*args, **kwargs):
        status = next(answers, None)
        if status is None:
            return real(*args, **kwargs)
        hub.info_status = status
        try:
            return real(*args, **kwargs)
        finally:
            hub.info_status = None

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", busy)
    stream = open_stream(hub_config())
    assert stream.identity["commit"] == COMMIT
    assert [next(answers, None), sum("waiting for" in r.getMessage() for r in caplog.records)] == [None, 2]


def test_the_environment_variable_is_enough(repository, tmp_path):
    """A process of its own: the plain `load_dataset` and ours read the same examples from HF_ENDPOINT."""
    code = """
import json, sys, datasets
from training.config import DataConfig
from training.data.stream import TrainStream
plain = datasets.load_dataset("org/faces", revision=sys.argv[1], split="train", streaming=True).decode(False)
names = [row["image"]["path"] for row in plain]
config = DataConfig(dataset="org/faces", revision=sys.argv[1], shuffle_buffer=16)
stream = TrainStream(config, resolution=24, seed=0, global_batch=11, rank=0, world_size=1)
ours = [example_id.partition(":")[0] for batch in stream.epoch_batches(0) for example_id in batch.example_ids]
print(json.dumps([names, ours]))
"""
    with FakeHub(repository) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", code, COMMIT]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    names, ours = json.loads(done.stdout)
    assert len(names) == NUM_EXAMPLES and sorted(names) == sorted(ours)  # 143 = 13 batches of 11
    assert (tmp_path / "datasets" / "dataset_cache").is_dir()
