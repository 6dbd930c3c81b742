"""Image folders: which files are images of a split, which are left out, and the errors for misspelt splits."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from encoded_images import coded_image, image_bytes
from test_stream import (
    flat_numbers,
    open_stream,
    parquet_config,
    read_epoch,
    validation_images,
)

from training.data.sources import open_source


def write_images(folder: Path, numbers, pattern: str = "{}.png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / pattern.format(number)).write_bytes(image_bytes(coded_image(number)))


def folder_config(root: Path, **changes):
    return parquet_config(None, **{"dataset": "imagefolder", "data_dir": str(root), **changes})


def opened(root: Path, role: str = "train", **changes) -> list[str]:
    """Paths of a split relative to its root."""
    return [os.path.relpath(path, root) for path in open_source(folder_config(root, **changes), role).paths]


@pytest.mark.parametrize(
    ("folders", "changes", "message"),
    [
        (["Train", "validation"], {}, r"no subfolder 'train', only Train, validation.*set data.train_split to 'Train'"),
        (["training", "validation"], {}, r"validation may hold images that are not.*train_split to 'training'"),
        ([".", "validation"], {}, r"no subfolder 'train'.*move the training images into \"train\""),
        (["Train", "test"], {"validation_split": None}, r"set data.train_split to 'Train'"),
        ([".", "holdout"], {"validation_split": "holdout"}, r"holdout may hold images that are not for training"),
        (["train", "validation"], {"train_split": "trian"}, r"no subfolder 'trian', only train.*to 'train'"),
        (
            ["anna", "bert"],
            {"train_split": "trian", "validation_split": None},
            r"no subfolder 'trian', only anna, bert",
        ),
        (["train", "validation"], {"train_split": ""}, r"data.train_split must be a non-empty string, got"),
        (
            ["train", "validation"],
            {"validation_split": ""},
            r"data.validation_split must be a non-empty string or null",
        ),
        (["train", "validation"], {"validation_split": "train"}, r"are both 'train'.*would be trained on"),
        (
            ["train", "validation"],
            {"train_split": "."},
            r"share 3 images, such as .*validation.*or set data.valid.* null",
        ),
        (["train/a", "train"], {"validation_split": "train/a"}, r"train_split='train' and .*share 3 images"),
    ],
)
def test_splits_that_would_leak_are_refused(tmp_path, folders, changes, message):
    for i, folder in enumerate(folders):
        write_images(tmp_path / folder, range(10 * i, 10 * i + 3))
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_links_between_splits_are_overlap(tmp_path):
    write_images(tmp_path / "train", range(3))
    (tmp_path / "validation").symlink_to("train")
    with pytest.raises(ValueError, match="share 3 images"):
        opened(tmp_path)
    (tmp_path / "validation").unlink()
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "copy.png").symlink_to("../train/1.png")
    with pytest.raises(ValueError, match=r"share 1 images, such as .*train/1.png"):
        opened(tmp_path)


@pytest.mark.parametrize(("validation_split", "message"), [("Validation", "validation"), ("val", "validation")])
def test_a_misspelt_validation_split_is_named(tmp_path, validation_split, message):
    write_images(tmp_path / "train", range(3))
    write_images(tmp_path / "validation", range(3, 6))
    with pytest.raises(
        ValueError, match=f"no subfolder '{validation_split}', only train, {message}; set data.validation"
    ):
        opened(tmp_path, "validation", validation_split=validation_split)


def test_a_folder_without_splits_is_trained_on_as_a_whole(tmp_path):
    write_images(tmp_path / "brian", range(3))
    write_images(tmp_path, [7])
    expected = ["7.png", *(f"brian/{i}.png" for i in range(3))]
    for changes in ({}, {"validation_split": None, "holdout_fraction": 1e-9}, {"train_split": "."}):
        assert opened(tmp_path, **changes) == expected


def test_logged_counts_add_up_to_the_files_that_exist(tmp_path, caplog):
    """Hidden files, links, formats and other folders beside 100 faces."""
    root, elsewhere = tmp_path / "faces", tmp_path / "elsewhere"
    write_images(root / "train", range(60))
    write_images(root / "train" / "album.jpg", range(60, 70))  # a folder
    write_images(elsewhere, range(70, 80))
    (root / "train" / "linked").symlink_to(elsewhere)
    (root / "train" / "loop").symlink_to("..")
    formats = ["a.jpg", "b.JPG", "c.jfif", "d.jpe", "e.jpeg", "f.avif", "g.jp2", "no_suffix", "h.jpg_large", "i.webp"]
    for i, name in enumerate(formats):
        kind = {"avif": "AVIF", "jp2": "JPEG2000", "webp": "WEBP"}.get(name[2:], "JPEG")
        (root / "train" / name).write_bytes(image_bytes(coded_image(200 + i), kind))
    write_images(root / "validation", range(80, 90))
    for number in range(20):  # before the images in the order of names
        (root / "train" / f"._{number}.jpg").write_bytes(b"AppleDouble")
        (root / "validation" / f"._{number}.jpg").write_bytes(b"AppleDouble")
    for place in (".Trash-1000/files", "@eaDir/x", "__MACOSX", ".ipynb_checkpoints"):
        write_images(root / "train" / place, range(2))
    (root / "train" / "notes.txt").write_text("not an image")
    (root / "train" / "labels").write_text("not an image")
    (root / "train" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (root / "train" / "broken.png").symlink_to("nowhere.png")
    write_images(root / "test", range(90, 100))
    (root / "readme.md").write_text("faces")

    caplog.set_level("INFO")
    config = folder_config(root, max_validation_images=10)
    source = open_source(config, "train")
    lines = [record.getMessage() for record in caplog.records if "images in split 'train'" in record.getMessage()]
    assert lines == [
        f"data.data_dir {root}: 90 images in split 'train'; left out: 1 broken link, 28 hidden or system file, "
        "1 link to a folder already read, 1 not a supported image (.heic), 1 not a supported image (.txt), "
        "1 not a supported image (no suffix); 41 files outside of the split"
    ]
    numbers = [int(number) for number in re.findall(r"(?<= )(\d+) (?!link)", lines[0])]
    there = sum(len(files) for _, _, files in os.walk(root)) + len(os.listdir(elsewhere))
    assert sum(numbers) == there == 90 + 1 + 28 + 3 + 41
    assert len(source.paths) == 90 and not any("/." in path[len(str(root)) :] for path in source.paths)
    seen = flat_numbers(read_epoch(config, global_batch=1))
    assert len(seen) == 90 and set(range(80)) <= set(seen)
    pixels, indices = validation_images(config)
    assert indices == list(range(10))  # the limit counts images, and not the hidden files before them


def test_a_folder_is_logged_once_without_empty_parts(tmp_path, caplog):
    write_images(tmp_path, range(10))
    caplog.set_level("INFO")
    config = folder_config(tmp_path, validation_split=None, holdout_fraction=0.4)
    for role in ("train", "validation", "train"):
        open_source(config, role)
    assert caplog.messages == [f"data.data_dir {tmp_path}: 10 images in split 'train'"]


def test_the_limit_counts_readable_images(tmp_path, caplog):
    write_images(tmp_path / "train", range(3))
    write_images(tmp_path / "validation", range(10, 14), "z{}.png")
    for number in range(4):
        (tmp_path / "validation" / f"a{number}.png").write_bytes(
            b"" if number else b"version https://git-lfs.github.com/spec/v1\n"
        )
    pixels, indices = validation_images(folder_config(tmp_path, max_validation_images=3))
    assert indices == [0, 1, 2]
    assert "a0.png (not an image but a Git LFS pointer: run `git lfs pull`)" in caplog.text
    assert "a1.png (not an image: the file is empty)" in caplog.text


def test_each_of_two_processes_has_a_readable_validation_image(tmp_path):
    """A corrupt one is left out before the processes share the images."""
    write_images(tmp_path / "train", range(3))
    write_images(tmp_path / "validation", range(10, 12), "b{}.png")
    (tmp_path / "validation" / "a.png").write_bytes(b"")
    for rank in (0, 1):
        _, indices = validation_images(folder_config(tmp_path), rank=rank, world_size=2)
        assert indices == [rank]


def test_a_link_to_itself_is_left_out(tmp_path, caplog):
    write_images(tmp_path, range(3))
    (tmp_path / "self.png").symlink_to("self.png")
    caplog.set_level("INFO")
    assert len(opened(tmp_path, validation_split=None, holdout_fraction=1e-9)) == 3
    assert "left out: 1 link that cannot be followed" in caplog.text


def test_a_folder_that_two_links_reach_is_read_once(tmp_path):
    write_images(tmp_path / "root" / "b", range(3))
    (tmp_path / "root" / "a").symlink_to("b")
    write_images(tmp_path / "other", range(3, 6))
    (tmp_path / "root" / "c").symlink_to(tmp_path / "other")
    (tmp_path / "root" / "d").symlink_to(tmp_path / "other")
    assert opened(tmp_path / "root") == [f"{folder}/{i}.png" for folder, i in zip("bbbccc", range(6), strict=True)]


@pytest.mark.parametrize("role", ["train", "validation"])
def test_a_held_out_fraction_of_few_images_names_the_remedy(tmp_path, role):
    images = [image_bytes(coded_image(i % 2)) for i in range(40)]
    tmp_path.joinpath("images").mkdir()
    for i, data in enumerate(images):
        (tmp_path / "images" / f"{i}.png").write_bytes(data)
    config = folder_config(tmp_path / "images", validation_split=None)
    if role == "validation":
        with pytest.raises(
            ValueError, match=r"none falls into data.holdout_fraction=0.02.*raise it, add images, or name"
        ):
            validation_images(config)
    else:
        assert len(open_source(config, "train").paths) == 40


def test_file_names_that_are_not_utf8_can_be_logged(tmp_path, caplog, capfd):
    folder = tmp_path / "train"
    write_images(folder, range(5))
    name = os.fsencode(folder) + b"/caf\xe9.png"
    try:
        shutil.copy(folder / "0.png", name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    config = folder_config(tmp_path, max_corrupt_fraction=1.0)
    ids = [example_id for batch in read_epoch(config, global_batch=1) for example_id in batch.example_ids]
    assert sum(example_id.endswith("caf\\udce9.png") for example_id in ids) == 1
    with open(name, "wb") as file:
        file.write(b"corrupt")
    list(open_stream(config, global_batch=1).epoch_batches(0))
    (message,) = [record.getMessage() for record in caplog.records if "corrupt image replaced" in record.getMessage()]
    assert message.encode("utf-8") and "caf\\udce9.png" in message
