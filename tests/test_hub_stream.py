"""Training rows over the real Hub client from a stand-in on the loopback interface, in fair weather and foul."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hub_stand_in import COMMIT, HubStandIn
from test_data import SIDE, assert_same, coded_image, flat_numbers, image_bytes, noise, open_stream, write_shards

from training import row_cache, shards
from training.config import DataConfig
from training.data import load_validation

NUM_ROWS = 143


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """5 shards of coded images to train on, 2 to validate on."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "data").mkdir()
    images = [image_bytes(coded_image(i)) for i in range(NUM_ROWS)]
    write_shards(folder / "data", images, 5)
    write_shards(folder / "data", images[:12], 2, "validation")
    return folder


def talk_to(hub: HubStandIn, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_file_system.HfFileSystem, "cachable", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(shards, "_FIRST_DELAY_S", 0.01)


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    with HubStandIn(repository) as hub:
        talk_to(hub, tmp_path / "cache", monkeypatch)
        yield hub


def hub_config(**changes) -> DataConfig:
    return DataConfig(**{"dataset": "org/faces", "shuffle_buffer": 16, "decode_threads": 2, **changes})


def test_the_first_epoch_fetches_each_byte_range_once_and_later_ones_nothing(hub, repository):
    stream = open_stream(hub_config())
    orders = [flat_numbers(list(stream.epoch_batches(0)))]
    list(stream.epoch_batches(1, max_batches=1))  # the last rows of epoch 0 are behind us
    fetched, asked = sorted(hub.ranges), len(hub.requests)
    assert len(fetched) == len(set(fetched)) == hub.open_requests == 10  # for each shard its footer and its rows
    rows = [(first, last) for _, first, last in fetched if first > 0]
    assert len(rows) == 5 and {name for name, first, _ in fetched if first > 0} == {f.name for f in []} | {
        f"data/{path.name}" for path in (repository / "data").glob("train-*")
    }
    for epoch in (1, 2):
        orders.append(flat_numbers(list(stream.epoch_batches(epoch))))
    assert len(hub.requests) == asked
    assert all(len(set(order)) == NUM_ROWS - NUM_ROWS % 6 for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert stream.num_rows == NUM_ROWS


def test_a_pinned_commit_that_is_cached_needs_no_network_and_a_branch_needs_only(hub, tmp_path):
    whole = {epoch: list(open_stream(hub_config()).epoch_batches(epoch)) for epoch in (0, 1)}
    validation = load_validation(hub_config(), resolution=SIDE, rank=0, world_size=1)
    asked = len(hub.requests)
    for changes in ({"revision": COMMIT}, {"cache": "only"}, {"cache": "only", "revision": COMMIT}):
        for epoch, batches in whole.items():
            assert_same(list(open_stream(hub_config(**changes)).epoch_batches(epoch)), batches)
        again = load_validation(hub_config(**changes), resolution=SIDE, rank=0, world_size=1)
        assert again[1] == validation[1] == list(range(12)) and again[0].equal(validation[0])
    assert len(hub.requests) == asked
    for other in (
        {"revision": "v1"}, {"train_split": "validation"}, {"image_column": "label"}, {"dataset": "org/others"},
        {"cache_dir": str(tmp_path / "elsewhere")},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"holds no complete cache of the train rows of .*data.cache=\"on\""):
            open_stream(hub_config(cache="only", **other))
    assert len(hub.requests) == asked


def test_without_a_cache_every_epoch_is_a_stream_in_the_order_of_the_first(hub):
    off = open_stream(hub_config(cache="off"))
    first = list(off.epoch_batches(0))
    assert_same(first, list(open_stream(hub_config()).epoch_batches(0)))
    asked = len(hub.ranges)
    second = flat_numbers(list(off.epoch_batches(1)))
    assert len(set(second)) == NUM_ROWS - NUM_ROWS % 6 and second != flat_numbers(first)
    assert len(hub.ranges) - asked == 5  # again, but not the footers
    assert_same(list(off.epoch_batches(0, start_batch=9)), first[9:])


@pytest.mark.parametrize(
    "trouble", [["429"], ["503"], ["cut"], ["stall"], ["cut", "ok", "503", "ok", "429", "cut"]], ids="-".join
)
def test_trouble_is_outlasted(hub, trouble, monkeypatch, request):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
    calm = open_stream(hub_config(cache_dir=str(request.getfixturevalue("tmp_path") / "calm")))
    expected = list(calm.epoch_batches(0))
    stream = open_stream(hub_config())
    hub.trouble[:] = ["ok", *trouble]
    before = len(hub.ranges)
    assert_same(list(stream.epoch_batches(0)), expected)
    assert hub.trouble == []
    assert len(hub.ranges) - before == 9  # nothing that has come is asked for again (a footer was read before)


def impatient_client(monkeypatch) -> None:
    """The Hub's client gives up at once, so that ours is what retries."""
    real = huggingface_hub.hf_file_system.http_backoff
    monkeypatch.setattr(huggingface_hub.hf_file_system, "http_backoff", lambda *a, **k: real(*a, max_retries=0, **k))


@pytest.mark.parametrize("trouble", ["503*", "429*", "cut*", "stall*"])
def test_at_last_there_is_one_clear_error(hub, trouble, monkeypatch, caplog):
    impatient_client(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    stream = open_stream(hub_config(timeout_s=1.0))
    list(stream.epoch_batches(0, max_batches=1))
    hub.trouble[:] = [trouble]
    stream = open_stream(hub_config(timeout_s=1.0, cache_dir="/nonexistent" if os.geteuid() else None, seed=1) if 0 else
                         hub_config(timeout_s=1.0, image_column="image", train_split="validation"))
    with pytest.raises(RuntimeError, match=r"^data: nothing came from hf://.*data.timeout_s=1\): \w+.*--resume auto") as error:
        list(stream.epoch_batches(0))
    assert "\n" not in str(error.value)
    assert any(record.getMessage().startswith("waiting for hf://") for record in caplog.records)
