"""Epochs, their order and resume; corrupt images; splits; error messages."""

import dataclasses
import hashlib
import http.server
import itertools
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoded_images import SIZE, UNREADABLE, coded_image, image_bytes, numbers_and_flips

from training.config import DataConfig
from training.data import images as data_images
from training.data import shards, sources
from training.data import stream as data
from training.data.images import DataError, decode_image
from training.data.shards import as_example
from training.data.sources import open_source
from training.data.stream import TrainStream, load_validation, validation_attributes
from training.data.synthetic_faces.render import render_portrait


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(shards, "_FIRST_DELAY_S", 0.01)


def write_shards(folder: Path, images: list[bytes | None], shards: int, split: str = "train") -> str:
    """Writes parquet shards of unequal length and small row groups; returns their glob."""
    cuts = [round(len(images) * (i / shards) ** 1.3) for i in range(shards + 1)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        cells = [{"bytes": images[row], "path": f"{row:05d}.png"} for row in range(start, stop)]
        cells = [cell if cell["bytes"] is not None else None for cell in cells]
        rows = {"image": cells, "label": list(range(start, stop))}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / f"{split}-{i:05d}-of-{shards:05d}.parquet", batch_size=10)
    return str(folder / f"{split}-*.parquet")


def coded_config(folder: Path, count: int = 143, shards: int = 5, **changes) -> DataConfig:
    """A data section over `count` coded images, whose shuffle buffer is filled many times in an epoch."""
    pattern = write_shards(folder, [image_bytes(coded_image(i)) for i in range(count)], shards)
    return parquet_config({"train": pattern}, **changes)


def parquet_config(data_files: dict, **changes) -> DataConfig:
    small = {"shuffle_buffer": 16, "decode_threads": 2, "prefetch_batches": 2}
    return DataConfig(**{"dataset": "parquet", "data_files": data_files, **small, **changes})


def open_stream(config, world_size=1, rank=0, global_batch=6, seed=0) -> TrainStream:
    ranks = {"rank": rank, "world_size": world_size}
    return TrainStream(config, resolution=SIZE, seed=seed, global_batch=global_batch, **ranks)


def read_epoch(config, epoch=0, world_size=1, rank=0, global_batch=6, seed=0, **limits) -> list[data.Batch]:
    return list(open_stream(config, world_size, rank, global_batch, seed).epoch_batches(epoch, **limits))


def validation_images(config, rank=0, world_size=1) -> tuple[torch.Tensor, list[int]]:
    return load_validation(config, resolution=SIZE, rank=rank, world_size=world_size)


def flat_numbers(batches: list[data.Batch]) -> list[int]:
    return [number for batch in batches for number, _ in numbers_and_flips(batch.pixels)]


def assert_same(batches: list[data.Batch], others: list[data.Batch]) -> None:
    assert [b.example_ids for b in batches] == [b.example_ids for b in others]
    assert all(torch.equal(b.pixels, o.pixels) for b, o in zip(batches, others, strict=True))


# ---- an epoch ----


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize(("shards", "epoch"), [(5, 0), (7, 1), (19, 0), (19, 2)])
def test_an_epoch_holds_every_example_once_for_every_world_size(tmp_path, shards, epoch, cache):
    config = coded_config(tmp_path, shards=shards, cache=cache)
    one = read_epoch(config, epoch)
    assert len(one) == 143 // 6
    assert len(flat_numbers(one)) == len(set(flat_numbers(one))) == 143 - 143 % 6
    for world_size in (2, 3):
        ranks = [read_epoch(config, epoch, world_size=world_size, rank=rank) for rank in range(world_size)]
        assert [len(batches) for batches in ranks] == [len(one)] * world_size
        seen = [number for batches in ranks for number in flat_numbers(batches)]
        assert len(seen) == len(set(seen)) == 143 - 143 % 6
        for full, *parts in zip(one, *ranks, strict=True):
            assert full.example_ids == [example_id for part in parts for example_id in part.example_ids]
            assert torch.equal(full.pixels, torch.cat([part.pixels for part in parts]))
            assert all(part.pixels.shape == (6 // world_size, 3, SIZE, SIZE) for part in parts)


def test_batches_carry_pixels_and_example_ids(tmp_path):
    stream = open_stream(coded_config(tmp_path))
    assert stream.num_examples == 143
    for batch in stream.epoch_batches(0):
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
        for example_id, (number, _) in zip(batch.example_ids, numbers_and_flips(batch.pixels), strict=True):
            assert example_id.startswith(f"{number:05d}.png:")
    assert (stream.num_examples, stream.corrupt_examples) == (143, 0)
    assert stream.wait_seconds > 0


def test_epochs_are_different_permutations_and_the_seed_decides(tmp_path):
    config = coded_config(tmp_path)
    orders = [flat_numbers(read_epoch(config, epoch, seed=seed)) for epoch, seed in ((0, 1), (1, 1), (2, 1), (0, 2))]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != sorted(orders[0])
    assert flat_numbers(read_epoch(config, 1, seed=1)) == orders[1]


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resume_is_the_tail_of_an_uninterrupted_epoch(tmp_path, epoch, cache, monkeypatch):
    config = coded_config(tmp_path, cache=cache)
    full = read_epoch(config, epoch, seed=3)
    decoded = []
    monkeypatch.setattr(data_images, "decode_image", lambda *args: decoded.append(1) or decode_image(*args))
    first, second = sorted(random.Random(epoch).sample(range(1, len(full)), 2))
    for start in {first, 7, len(full) - 1, len(full)}:  # batch 7 is two refills of the buffer away
        decoded.clear()
        fresh = parquet_config(config.data_files, cache=cache, cache_dir=str(tmp_path / f"cache{start}"))
        for resumed in (config, fresh):  # out of a complete cache, and into one that is empty
            assert_same(read_epoch(resumed, epoch, seed=3, start_batch=start), full[start:])
        assert len(decoded) == 2 * 6 * (len(full) - start)  # nothing that is skipped is decoded
    twice = read_epoch(config, epoch, seed=3, max_batches=first)
    twice += read_epoch(config, epoch, seed=3, start_batch=first, max_batches=second - first)
    twice += read_epoch(config, epoch, seed=3, start_batch=second)
    assert_same(twice, full)


def test_threads_and_prefetch_do_not_change_the_order(tmp_path, monkeypatch):
    config = coded_config(tmp_path)
    calls = iter(range(10**6))

    def uneven(*args):  # some decodes finish after later ones
        time.sleep(0.002 if next(calls) % 5 == 0 else 0)
        return decode_image(*args)

    monkeypatch.setattr(data_images, "decode_image", uneven)
    slow = read_epoch(config)
    assert next(calls) > 100
    assert_same(read_epoch(parquet_config(config.data_files, decode_threads=7, prefetch_batches=1)), slow)
    assert_same(read_epoch(parquet_config(config.data_files, decode_threads=1, prefetch_batches=9)), slow)


def test_half_of_the_images_are_flipped_and_others_with_each_epoch_and_seed(tmp_path):
    config = coded_config(tmp_path)
    patterns = []
    for epoch, seed in ((0, 0), (1, 0), (0, 1)):
        batches = read_epoch(config, epoch, seed=seed)
        patterns.append([flipped for batch in batches for _, flipped in numbers_and_flips(batch.pixels)])
        assert 45 < sum(patterns[-1]) < 95  # 138 fair coins: mean 69, standard deviation 5.9
    for other in patterns[1:]:  # place by place, so that the flip is new and not only the order
        assert 40 < sum(np.not_equal(patterns[0], other)) < 98
    unflipped = read_epoch(parquet_config(config.data_files, horizontal_flip=False))
    assert not any(flipped for batch in unflipped for _, flipped in numbers_and_flips(batch.pixels))


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "reader" or t.name.startswith("decode")]


def test_decode_threads_use_one_core_each(tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    monkeypatch.setattr(
        data_images, "decode_image", lambda *args: seen.append(torch.get_num_threads()) or decode_image(*args)
    )
    try:
        read_epoch(coded_config(tmp_path), max_batches=2)
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_end_with_the_iterator(tmp_path):
    stream = open_stream(coded_config(tmp_path), global_batch=2)
    batches = stream.epoch_batches(0)
    next(batches)
    assert "reader" in reading_threads()
    began = time.perf_counter()
    batches.close()
    assert reading_threads() == []
    list(stream.epoch_batches(0))
    assert reading_threads() == []
    assert time.perf_counter() - began < 3  # `datasets` would sleep 5 s at the end of each iterator


def test_an_unreadable_shard_reaches_the_consumer(tmp_path):
    config = coded_config(tmp_path)
    stream = open_stream(config)
    shard = sorted(tmp_path.glob("*.parquet"))[3]
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(Exception, match=r"(?i)parquet"):
        list(stream.epoch_batches(0))
    assert reading_threads() == []


def test_too_little_data_is_an_error(tmp_path):
    config = coded_config(tmp_path, count=10, shards=2)
    with pytest.raises(DataError, match=r"holds 10 images to train on, 0 batches of 12"):
        read_epoch(config, global_batch=12)
    with pytest.raises(DataError, match=r"2 batches of 5, and batch 3 was asked for"):
        read_epoch(config, global_batch=5, start_batch=3)
    with pytest.raises(ValueError, match=r"batch_size 5 cannot be divided over 2"):
        open_stream(config, world_size=2, global_batch=5)


def test_processes_decode_the_same_batches_and_replace_the_same_images(tmp_path):
    images = images_with_corrupt_ones(60, every=10)
    config = parquet_config({"train": write_shards(tmp_path, images, 3)}, max_corrupt_fraction=0.5)
    wanted = read_epoch(config, max_batches=7)
    stream = open_stream(dataclasses.replace(config, decode_processes=2))
    assert_same(list(stream.epoch_batches(0, max_batches=7)), wanted)
    assert stream.corrupt_examples > 0
    assert_same(list(stream.epoch_batches(0, start_batch=3, max_batches=4)), wanted[3:])


# ---- corrupt images ----


def images_with_corrupt_ones(count: int, every: int) -> list[bytes | None]:
    images = [image_bytes(coded_image(i)) for i in range(count)]
    bad = list(UNREADABLE.values())
    for i, row in enumerate(range(5, count, every)):
        images[row] = bad[i % len(bad)]
    return images


def test_corrupt_images_are_replaced_counted_and_logged(tmp_path, caplog):
    images = images_with_corrupt_ones(360, every=20)  # each kind once
    assert len(UNREADABLE) == 18
    config = parquet_config({"train": write_shards(tmp_path, images, 5)}, max_corrupt_fraction=0.1)
    stream = open_stream(config, global_batch=8)
    logged = []
    for epoch in (0, 1):
        caplog.clear()
        batches = list(stream.epoch_batches(epoch))
        logged += [record.getMessage() for record in caplog.records if "corrupt image replaced" in record.getMessage()]
        assert len(batches) == 45
        assert stream.corrupt_examples == 18 * (epoch + 1)
        numbers = flat_numbers(batches)
        good = set(range(360)) - set(range(5, 360, 20))
        assert set(numbers) == good  # all of them, and only they
        repeated = 8 * 45 - sum(len(set(flat_numbers([batch]))) for batch in batches)
        assert repeated == 18  # the replacement comes from the same batch
        ranks = [read_epoch(config, epoch, 4, rank, global_batch=8) for rank in range(4)]
        for full, *parts in zip(batches, *ranks, strict=True):
            assert torch.equal(full.pixels, torch.cat([part.pixels for part in parts]))
        assert_same(read_epoch(config, epoch, global_batch=8, start_batch=9), batches[9:])
    assert len(logged) == len(set(logged)) == 18  # once each, in two epochs
    for line in logged:
        assert re.search(r": (null|00\d\d5\.png:\w{12}) \(.+; number \d+ of epoch 0\)$", line)


def test_a_corrupt_image_alone_in_its_batch_is_replaced(tmp_path):
    images = images_with_corrupt_ones(60, every=100)
    config = parquet_config({"train": write_shards(tmp_path, images, 2)}, max_corrupt_fraction=0.1)
    numbers = flat_numbers(read_epoch(config, global_batch=1))
    assert len(numbers) == 60 and set(numbers) == set(range(60)) - {5}


@pytest.mark.parametrize(("count", "read"), [(400, "199|20[0-9]"), (60, "60")])
def test_too_many_corrupt_images_stop_the_run(tmp_path, count, read):
    config = parquet_config(
        {"train": write_shards(tmp_path, images_with_corrupt_ones(count, 10), 3)}, max_corrupt_fraction=0.02
    )
    pattern = (
        rf"\d+ of ({read}) images .* are corrupt, more than data.max_corrupt_fraction=0.02: .*\.png:[0-9a-f]+ \(.*; "
    )
    with pytest.raises(RuntimeError, match=pattern) as error:
        read_epoch(config, global_batch=4)
    assert "\n" not in str(error.value) and error.value.args[0].count(".png") <= 10
    assert reading_threads() == []


def test_nothing_readable_is_an_error(tmp_path):
    files = {"train": write_shards(tmp_path, [b"text"] * 50, 2)}
    with pytest.raises(RuntimeError, match="no image of 'parquet' is readable near 000"):
        read_epoch(parquet_config(files), global_batch=4)
    with pytest.raises(ValueError, match="no readable image to validate on: give a split"):
        validation_images(parquet_config({"validation": files["train"]}))


# ---- sources and splits ----


def test_validation_is_fixed_and_divided_over_the_ranks(tmp_path, caplog):
    images = [image_bytes(coded_image(i)) for i in range(20)]
    images[4] = b"no image"  # the limit counts readable images
    config = parquet_config({"validation": write_shards(tmp_path, images, 3, "validation")}, max_validation_images=11)
    parts = [validation_images(config, rank=rank, world_size=3) for rank in range(3)]
    assert [indices for _, indices in parts] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    assert "corrupt validation image skipped: 00004.png (not an image of a known format)" in caplog.text
    for pixels, indices in parts:
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous(memory_format=torch.channels_last)
        assert numbers_and_flips(pixels) == [(index + (index >= 4), False) for index in indices]
    pixels, indices = validation_images(config, rank=12, world_size=16)  # more ranks than rows
    assert pixels.shape == (0, 3, SIZE, SIZE) and indices == []


def test_few_held_out_images_are_a_warning(tmp_path, caplog):
    write_folder(tmp_path, range(30))
    config = parquet_config(None, dataset="imagefolder", data_dir=str(tmp_path), validation_split=None)
    _, indices = validation_images(dataclasses.replace(config, holdout_fraction=0.1))
    (line,) = caplog.messages
    assert line.startswith(f"data.holdout_fraction=0.1 holds out {len(indices)} of about 30 images")
    assert line.endswith("; set it to 0.27")
    caplog.clear()
    validation_images(dataclasses.replace(config, holdout_fraction=0.45))
    assert not caplog.messages


@pytest.mark.parametrize(("count", "words"), [(33, "image of each epoch does"), (35, "3 images of each epoch do")])
def test_an_incomplete_batch_is_logged_once(tmp_path, caplog, count, words):
    caplog.set_level("INFO")
    write_folder(tmp_path, range(count))
    stream = open_stream(parquet_config(None, dataset="imagefolder", data_dir=str(tmp_path)), global_batch=8)
    for epoch in (0, 1):
        assert len(list(stream.epoch_batches(epoch))) == 4
    assert [message for message in caplog.messages if "fill" in message] == [
        f"the last {words} not fill a batch: dropped"
    ]


def write_folder(folder: Path, numbers) -> None:
    for number in numbers:
        path = folder / f"person{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(coded_image(number)))
    (folder / "notes.txt").write_text("not an image")


def test_folder_with_splits(tmp_path):
    write_folder(tmp_path / "train", range(30))
    write_folder(tmp_path / "val", range(100, 105))
    config = parquet_config(None, dataset="imagefolder", data_dir=str(tmp_path), validation_split="val")
    assert sorted(flat_numbers(read_epoch(config))) == list(range(30))
    pixels, indices = validation_images(config)
    assert indices == [0, 1, 2, 3, 4]
    assert {number for number, _ in numbers_and_flips(pixels)} == set(range(100, 105))


@pytest.mark.parametrize("source", ["parquet", "imagefolder"])
def test_held_out_images_are_disjoint_and_duplicates_stay_together(tmp_path, source):
    numbers = [*range(200), *range(150)]  # 150 of the pictures come twice
    changes = {"validation_split": None, "holdout_fraction": 0.25}
    if source == "parquet":
        files = {"train": write_shards(tmp_path, [image_bytes(coded_image(i)) for i in numbers], 5)}
        config = parquet_config(files, **changes)
    else:
        write_folder(tmp_path / "a", range(200))
        write_folder(tmp_path / "b", range(150))
        config = parquet_config(None, dataset="imagefolder", data_dir=str(tmp_path), **changes)
    stream = open_stream(config, global_batch=1)
    assert source == "imagefolder" or stream.num_examples == round(350 * 0.75)  # a folder is counted exactly
    train = flat_numbers(list(stream.epoch_batches(0)))
    held_out = [number for number, _ in numbers_and_flips(validation_images(config)[0])]
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(numbers)
    assert stream.num_examples == len(train)
    expected = [
        number
        for number in set(numbers)
        if int(hashlib.blake2b(image_bytes(coded_image(number)), digest_size=8).hexdigest(), 16) / 2**64 < 0.25
    ]
    assert set(held_out) == set(expected)


def test_synthetic_faces_come_through_the_same_path(tmp_path):
    config = DataConfig(
        dataset="synthetic_faces",
        synthetic_train_images=6,
        synthetic_validation_images=3,
        cache_dir=str(tmp_path),
    )
    stream = open_stream(config, global_batch=3)
    assert stream.num_examples == 6
    batches = list(stream.epoch_batches(0))
    validation, indices = validation_images(config)
    assert indices == [0, 1, 2]
    images = torch.cat([*(batch.pixels for batch in batches), validation])
    assert images.shape == (9, 3, SIZE, SIZE)
    assert len({image.numpy().tobytes() for image in images}) == 9  # no face on both sides


def test_plain_binary_columns_are_read(tmp_path):
    rows = {"jpg": [image_bytes(coded_image(i)) for i in range(12)], "id": list(range(12))}
    features = datasets.Features(jpg=datasets.Value("binary"), id=datasets.Value("int64"))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    config = parquet_config({"train": str(tmp_path / "a.parquet")}, image_column="jpg")
    assert sorted(flat_numbers(read_epoch(config))) == list(range(12))


# ---- errors ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "trian"}, r"no split 'trian', only train"),
        ({"data_files": {"train": "nowhere/*.parquet"}}, r"'nowhere/\*\.parquet' matches no file"),
        ({"data_files": {"train": __file__}}, r"cannot be opened: \w+: .*[Pp]arquet"),
        (
            {"image_column": "picture"},
            r"image_column='picture' is not in .*train-00000-of-00001.parquet', only image, label",
        ),
        ({"image_column": "label"}, r"image_column='label' holds int64 in .*parquet', not encoded images"),
        ({"dataset": "imagefolder", "data_dir": "nowhere"}, r"data_dir='nowhere' is not a folder"),
        ({"dataset": "imagefolder", "data_dir": "EMPTY"}, r"holds no image \(.*\.jpg.*\)\.$"),
        (
            {"dataset": "no/such/name"},
            r"'no/such/name': neither parquet, imagefolder, synthetic_faces nor a Hub id",
        ),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    files = {"train": write_shards(tmp_path, [image_bytes(coded_image(0))] * 4, 1)}
    (tmp_path / "empty").mkdir()
    if changes.get("data_dir") == "EMPTY":
        changes = {**changes, "data_dir": str(tmp_path / "empty")}
    config = parquet_config(**{"data_files": None if "dataset" in changes else files, **changes})
    with pytest.raises(ValueError, match=message) as error:
        open_source(config, "train")
    assert "\n" not in str(error.value)


def test_missing_validation_folder_names_the_remedy(tmp_path):
    write_folder(tmp_path / "train", range(3))
    config = parquet_config(None, dataset="imagefolder", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"no subfolder 'validation', only train; set data.validation_split .* null"):
        open_source(config, "validation")


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for what does not exist, and not at all for `org/stalled`."""

    def do_GET(self):
        if "stalled" in self.path:
            time.sleep(1.0)
            return
        self.send_response(404)
        missing = "RevisionNotFound" if "/revision/" in self.path else "RepoNotFound"
        self.send_header("X-Error-Code", missing)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def fake_hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


def test_missing_repositories_and_revisions_are_named(fake_hub, monkeypatch):
    with pytest.raises(ValueError, match=r"'org/none' is not on the Hub"):
        open_source(DataConfig(dataset="org/none"), "train")
    with pytest.raises(ValueError, match=r"'org/faces' has no data.revision='v9'"):
        open_source(DataConfig(dataset="org/faces", revision="v9"), "train")
    monkeypatch.setattr(sources, "_HUB_TIMEOUT_S", 0.2)
    monkeypatch.setattr(sources, "_HUB_ATTEMPTS", 1)
    with pytest.raises(RuntimeError, match=r"cannot reach the Hub at http://127.0.0.1:\d+ \(\w*Timeout"):
        open_source(DataConfig(dataset="org/stalled"), "train")


def test_an_unreachable_hub_is_an_error_within_seconds():
    code = (
        "from training.config import DataConfig; from training.data.sources import open_source\n"
        "try: open_source(DataConfig(dataset='org/faces', revision='0' * 40), 'train')\n"
        "except RuntimeError as error: print(error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("data.dataset='org/faces': cannot reach the Hub at http://127.0.0.1:9 (")


# ---- attributes ----


@pytest.mark.parametrize("cache", ["on", "off"])
def test_attributes_come_with_their_images(tmp_path, cache):
    glob = write_shards(tmp_path, [image_bytes(coded_image(i)) for i in range(30)], 2)
    for path in sorted(tmp_path.glob("*.parquet")):  # 0, 1, 2, ... and whether a number is odd; null for multiples of 5
        table = pq.read_table(path)
        odd = [None if number % 5 == 0 else number % 2 == 1 for number in table["label"].to_pylist()]
        pq.write_table(table.append_column("odd", pa.array(odd, pa.bool_())), path, row_group_size=10)
    config = parquet_config({"train": glob}, attribute_columns=["odd", "label"], cache=cache, validation_split=None)
    for epoch in (0, 1):
        batches = read_epoch(config, epoch)
        for number, attributes in zip(flat_numbers(batches), torch.cat([each.attributes for each in batches]).tolist()):
            expected = 0 if number % 5 == 0 else 1 if number % 2 else -1
            assert attributes == [expected, 1 if number else -1]
    pixels, indices = validation_images(parquet_config({"train": glob}, holdout_fraction=0.4, validation_split=None))
    held_out = parquet_config(
        {"train": glob}, attribute_columns=["label"], holdout_fraction=0.4, validation_split=None, cache=cache
    )
    numbers = [number for number, _ in numbers_and_flips(pixels)]
    found = validation_attributes(held_out, indices).flatten().tolist()
    assert found == [1 if number else -1 for number in numbers] and len(found) > 5


def test_a_cache_with_attributes_does_not_replace_one_without(tmp_path):
    plain = coded_config(tmp_path, 12, 1, cache="on")
    read_epoch(plain)
    with_labels = dataclasses.replace(plain, attribute_columns=["label"])
    read_epoch(with_labels)  # complete, and newer
    for config, attributes in ((plain, None), (with_labels, ["label"])):
        stream = open_stream(dataclasses.replace(config, cache="only"))
        assert stream.identity.get("attributes") == attributes


def test_an_attribute_that_is_nan_is_unknown():
    row = {"image": b"", "a": 1.0, "b": 0.0, "c": -1.0, "d": float("nan"), "e": None}
    assert list(as_example(row, "image", "abcde").attributes) == [1, 0xFF, 0xFF, 0, 0]


def test_without_attribute_columns_batches_have_none(tmp_path):
    assert read_epoch(coded_config(tmp_path, 12, 1))[0].attributes.shape == (6, 0)


@pytest.mark.parametrize(("name", "content"), [("hat", "holds nothing"), ("image", "holds struct")])
def test_an_attribute_column_that_holds_no_numbers_raises(tmp_path, name, content):
    with pytest.raises(ValueError, match=f"data.attribute_columns: '{name}' {content}.*name columns of booleans"):
        open_source(coded_config(tmp_path, 12, 1, attribute_columns=[name]), "train")


def test_attributes_of_synthetic_faces_are_those_of_the_rendering():
    names = ["Eyeglasses", "Smiling"]
    config = DataConfig(synthetic_train_images=12, attribute_columns=names, horizontal_flip=False)
    for batch in read_epoch(config):
        for example_id, attributes in zip(batch.example_ids, batch.attributes.tolist()):
            _, expected = render_portrait(int(re.search(r"_(\d+).jpg", example_id)[1]))
            assert attributes == [1 if expected[name] else -1 for name in names]
    with pytest.raises(ValueError, match="synthetic faces have no 'Hat', only Bald"):
        open_source(DataConfig(attribute_columns=["Hat"]), "train")
