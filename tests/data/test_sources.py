"""Parquet files and read-only folders: what is refused, in one line that names the file and the remedy."""

from __future__ import annotations

import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoded_images import coded_image, image_bytes
from test_stream import (
    flat_numbers,
    open_stream,
    parquet_config,
    read_epoch,
    validation_images,
    write_shards,
)

from training.config import DataConfig
from training.data.cache import DatasetCache
from training.data.sources import open_source

IMAGES = [image_bytes(coded_image(i)) for i in range(24)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_brackets_in_the_name_of_an_existing_file_are_no_pattern(tmp_path):
    folder = tmp_path / "set [v2]"
    folder.mkdir()
    write_shards(folder, IMAGES, 1)
    (path,) = folder.glob("*.parquet")
    assert sorted(flat_numbers(read_epoch(parquet_config({"train": str(path)})))) == list(range(24))


@pytest.mark.parametrize("value", [5, None, [], "", ["a.parquet", 5], {"a": "b"}])
def test_data_files_that_name_no_files_are_refused(value):
    with pytest.raises(ValueError, match=r"data.data_files must be .*paths \(or lists of paths\), got \{\"train\": "):
        parquet_config({"train": value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"train-00001-of-00003.parquet'.*the file is empty; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r"train-00001.*is a Git LFS pointer; run `git lfs pull`"),
        (b"PAR1 no parquet", r"train-00001-of-00003.parquet'.*cannot be opened: ArrowInvalid"),
    ],
)
def test_a_file_that_is_no_parquet_is_named(tmp_path, content, message):
    files = {"train": write_shards(tmp_path, IMAGES, 3)}
    (tmp_path / "train-00001-of-00003.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_source(parquet_config(files), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"photo": [b"x"]}, r"image_column='image' is not in .*train-00001-of-00003.parquet', only photo"),
        ({"image": ["a.jpg"]}, r"image_column='image' holds string in .*train-00001.*, not encoded images"),
    ],
)
@pytest.mark.parametrize("place", ["here", "file://"])
def test_every_file_needs_the_column(tmp_path, table, message, place):
    files = {"train": write_shards(tmp_path, IMAGES, 3)}
    pq.write_table(pa.table(table), tmp_path / "train-00001-of-00003.parquet")
    if place == "here":
        with pytest.raises(ValueError, match=message):
            open_source(parquet_config(files), "train")
    else:  # the footers of remote files are read with their rows
        urls = [f"file://{path}" for path in sorted(tmp_path.glob("*.parquet"))]
        with pytest.raises(RuntimeError, match=message.replace("'", "'?")):
            read_epoch(parquet_config({"train": urls}, timeout_s=2.0))


def test_splits_that_share_files_are_refused(tmp_path):
    write_shards(tmp_path, IMAGES, 3)
    write_shards(tmp_path, IMAGES[:6], 1, "validation")
    files = {"train": str(tmp_path / "*.parquet"), "validation": str(tmp_path / "validation-*")}
    with pytest.raises(
        ValueError, match=r"'train' and 'validation' of 'parquet' share 1 files, such as .*validation-0"
    ):
        open_source(parquet_config(files), "train")
    with pytest.raises(ValueError, match="are both 'train'"):
        open_source(parquet_config(files, validation_split="train"), "train")
    assert open_source(parquet_config(files), "validation").limit  # validation alone may read any split


def test_a_file_that_is_named_twice_is_refused(tmp_path):
    pattern = write_shards(tmp_path, IMAGES, 3)
    with pytest.raises(ValueError, match=r"names '.*train-00001-of-00003.parquet' twice; name each file once"):
        open_source(parquet_config({"train": [pattern, str(tmp_path / "train-00001-of-00003.parquet")]}), "train")


def test_images_that_a_parquet_file_only_names_are_held_out_too(tmp_path):
    paths = []
    for i in range(200):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(image_bytes(coded_image(i)))
    column = pa.array(
        [{"bytes": None, "path": str(path)} for path in paths], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    config = parquet_config(
        {"train": str(tmp_path / "a.parquet")}, validation_split=None, holdout_fraction=0.25, cache="off"
    )
    train = flat_numbers(read_epoch(config, global_batch=1))
    held_out = [int(number) for number in validation_images(config)[0][:, 0, 9, 9]]
    assert 20 < len(held_out) < 80 and sorted(train + held_out) == list(range(200))


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, cache):
    (tmp_path / "file").write_text("not a folder")
    config = DataConfig(
        dataset="synthetic_faces", synthetic_train_images=6, cache=cache, cache_dir=str(tmp_path / "file" / "cache")
    )
    with pytest.raises(ValueError, match=r"synthetic faces cannot be written to .*set data.cache_dir or .*HF_HOME"):
        open_stream(config)
    parquet = parquet_config(
        {"train": write_shards(tmp_path, IMAGES, 2)}, cache=cache, cache_dir=str(tmp_path / "file" / "cache")
    )
    if cache == "off":
        assert len(read_epoch(parquet)) == 4
    else:
        with pytest.raises(RuntimeError, match=r'data.cache: .*file/cache.* set data.cache_dir .*data.cache="off"'):
            read_epoch(parquet)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_cache_that_is_deleted_during_training_is_an_error(tmp_path, epoch, monkeypatch):
    config = parquet_config({"train": write_shards(tmp_path, IMAGES, 3)}, cache_dir=str(tmp_path / "cache"))
    assert len(read_epoch(config)) == 4
    stream = open_stream(config, global_batch=2)
    real, calls = DatasetCache.read, []

    def read(self, *place):
        calls.append(place)
        if len(calls) == 3:
            shutil.rmtree(tmp_path / "cache")
            self._tables.clear()
        return real(self, *place)

    monkeypatch.setattr(DatasetCache, "read", read)
    with pytest.raises(RuntimeError, match=r"data.cache: .* was deleted during training; use --resume auto") as error:
        list(stream.epoch_batches(epoch))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(DatasetCache, "read", real)
    assert sorted(flat_numbers(read_epoch(config, epoch))) == list(range(24))
