"""Opens a split as a stream of encoded images: a Hub repository, parquet files, a folder, or synthetic faces.

Everything goes through `datasets` in streaming mode. What a user got wrong is one line that names the remedy.
Not here: decoding (`images`); shuffling, batches and the order of an epoch (`data`).
"""

import contextlib
import glob
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet
from datasets.utils.file_utils import xopen
from huggingface_hub import errors as hub_errors

from training.images import BadImage
from training.synthetic_faces import synthetic_dataset

logger = logging.getLogger(__name__)

READ_ROWS = 64  # rows converted from Arrow at once: 3 times the rows/s of one by one
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_FOLDER_SHARDS = 64  # contiguous parts of a folder; the shuffle permutes them and reads ten at a time
_HUB_ATTEMPTS, _HUB_TIMEOUT_S = 3, 8.0
_FIRST_VALIDATION_SEED = 1_000_000_000  # synthetic faces to train on count from 0

if datasets.config.PYARROW_VERSION.major > 24:
    # `datasets` sleeps 5 s whenever an iterator over shuffled parquet ends or is closed, against a crash in
    # pyarrow's threads (apache/arrow#45214), even with the versions for which it drops its other guard.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


def open_split(config, split_role: str) -> datasets.IterableDataset:
    """Opens a split as a stream of encoded images, in the order of its files.

    Args:
        config: The `data` section.
        split_role: "train" or "validation".

    Returns:
        Rows of {"bytes", "path"} (or plain bytes) in the one column that is left, `config.image_column`.

    Raises:
        ValueError: A folder, file, split, column, repository or revision does not exist, or cannot be opened.
        RuntimeError: The Hub does not answer within half a minute.
    """
    return open_counted_split(config, split_role)[0]


def open_counted_split(config, split_role: str) -> tuple[datasets.IterableDataset, int | None]:
    """`open_split`, and the number of rows where that is known without reading them."""
    is_validation = {"train": False, "validation": True}[split_role]
    if config.dataset == "synthetic_faces":
        num_rows = config.synthetic_validation_images if is_validation else config.synthetic_train_images
        first_seed = _FIRST_VALIDATION_SEED if is_validation else 0
        dataset = synthetic_dataset(num_rows, first_seed, config.cache_dir, num_shards=min(8, num_rows))
        return _select_images(dataset, config), num_rows
    is_held_out = config.validation_split is None
    split = config.validation_split if is_validation and not is_held_out else config.train_split
    open_source = {"parquet": _open_parquet, "imagefolder": _open_folder}.get(config.dataset, _open_hub)
    dataset, num_rows = open_source(config, split)
    if not is_held_out:
        return dataset, num_rows

    # By a hash of the bytes: a picture is on the same side in every epoch, on every machine, and where it
    # comes twice. For it, validation reads max_validation_images / holdout_fraction rows; over a network, a
    # split of its own is cheaper.
    def is_wanted(values: list) -> list[bool]:
        return [_is_held_out(value, config.holdout_fraction) == is_validation for value in values]

    columns = [config.image_column]
    dataset = dataset.filter(is_wanted, input_columns=columns, batched=True, batch_size=READ_ROWS)
    share = config.holdout_fraction if is_validation else 1.0 - config.holdout_fraction
    return dataset, None if num_rows is None else round(num_rows * share)


def _is_held_out(value: dict | bytes | None, fraction: float) -> bool:
    try:
        data, _ = encoded_bytes(value)
    except BadImage:
        return False  # the training side counts what cannot be read
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < fraction * 2**64


def _open_parquet(config, split: str) -> tuple[datasets.IterableDataset, int | None]:
    if split not in config.data_files:
        names = ", ".join(config.data_files)
        raise ValueError(
            f'data.data_files has no split {split!r}, only {names}; add "{split}": "*.parquet" to it.'
        )
    patterns, files = config.data_files[split], []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if "://" in pattern:
            matches = [pattern]
        elif not matches:
            raise ValueError(f"data.data_files[{split!r}]: {pattern!r} matches no file (from {os.getcwd()}).")
        files += matches
    with _one_line_errors(f"data.data_files[{split!r}]={patterns!r}"):
        data_files = {split: files}
        builder = datasets.load_dataset_builder("parquet", data_files=data_files, cache_dir=config.cache_dir)
        is_local = not any("://" in file for file in files)
        num_rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files) if is_local else None
        return _stream(builder, split, config), num_rows


def _open_folder(config, split: str) -> tuple[datasets.IterableDataset, int]:
    """A folder with a sub-folder per split; without one for `train_split`, the whole folder is that split."""
    root = Path(config.data_dir).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.data_dir={config.data_dir!r} is not a folder of images (from {os.getcwd()}).")
    folder = root / split
    if not folder.is_dir() and split == config.train_split:
        folder = root
    elif not folder.is_dir():
        names = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
        raise ValueError(
            f"data.data_dir={config.data_dir!r} has no sub-folder {split!r}, only {names}; set "
            "data.validation_split to one of them, or to null to hold out a part of the training images."
        )
    # Not the imagefolder builder: it walks the tree 66 times to guess splits, 1.4 ms a file on every rank.
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise ValueError(f"data.data_dir: {str(folder)!r} holds no image file ({', '.join(_SUFFIXES)}).")
    features = datasets.Features({config.image_column: datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({config.image_column: paths}, features=features)
    return rows.to_iterable_dataset(num_shards=min(_FOLDER_SHARDS, len(paths))), len(paths)


def _open_hub(config, split: str) -> tuple[datasets.IterableDataset, int | None]:
    revision = _find_revision(config)
    logger.info("data.dataset=%r at commit %s", config.dataset, revision)
    with _one_line_errors(f"data.dataset={config.dataset!r}"):
        cache_dir = config.cache_dir
        builder = datasets.load_dataset_builder(config.dataset, revision=revision, cache_dir=cache_dir)
        dataset = _stream(builder, split, config)
        info = (builder.info.splits or {}).get(split)
        return dataset, (info.num_examples or None) if info else None


def _find_revision(config) -> str:
    """Asks the Hub for the commit behind `config.revision`, so that all epochs read the same files.

    A request of our own, because `datasets` would retry for minutes before it reports an unreachable Hub, and
    does not tell a missing revision from a missing repository.
    """
    name = f"data.dataset={config.dataset!r}"
    for attempt in range(1, _HUB_ATTEMPTS + 1):
        try:
            api = huggingface_hub.HfApi()
            return api.dataset_info(config.dataset, revision=config.revision, timeout=_HUB_TIMEOUT_S).sha
        except hub_errors.HFValidationError as error:
            raise ValueError(
                f"{name}: neither parquet, imagefolder, synthetic_faces nor a Hub id."
            ) from error
        except hub_errors.RevisionNotFoundError as error:
            known = "a commit, tag or branch"
            raise ValueError(f"{name} has no data.revision={config.revision!r}; name {known}.") from error
        except hub_errors.RepositoryNotFoundError as error:
            raise ValueError(f"{name} is not on the Hub, or needs access and `hf auth login`.") from error
        except Exception as error:  # refused, timed out, 429, 5xx, offline mode
            if attempt == _HUB_ATTEMPTS or isinstance(error, hub_errors.OfflineModeIsEnabled):
                raise RuntimeError(
                    f"{name}: cannot reach the Hub at {huggingface_hub.constants.ENDPOINT} "
                    f"({_in_one_line(error)}). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
                    'or use local files with data.dataset="parquet" or "imagefolder".'
                ) from error
            time.sleep(1.0)


def _stream(builder: datasets.DatasetBuilder, split: str, config) -> datasets.IterableDataset:
    streams = builder.as_streaming_dataset()  # reads schemas, no rows
    if split not in streams:
        raise ValueError(f"data: {config.dataset!r} has no split {split!r}, only {', '.join(streams)}.")
    dataset = _select_images(streams[split], config)
    if hasattr(builder.config, "columns"):  # parquet; the other columns are then neither fetched nor parsed
        builder.config.columns = [config.image_column]
        dataset = _select_images(builder.as_streaming_dataset()[split], config)
    return dataset


def _select_images(dataset: datasets.IterableDataset, config) -> datasets.IterableDataset:
    """Keeps the image column, undecoded: one unreadable image would end an iterator of `datasets`."""
    column, features = config.image_column, dataset.features or {}
    if column not in features:
        names = ", ".join(features) or "none"
        raise ValueError(f"data.image_column={column!r} is not in {config.dataset!r}, only {names}.")
    if isinstance(features[column], datasets.Image):
        return dataset.decode(False).select_columns([column])  # the other way round leaves a decoder inside
    if features[column] not in (datasets.Value("binary"), datasets.Value("large_binary")):
        raise ValueError(f"data.image_column={column!r} holds no images but {features[column]}.")
    return dataset.select_columns([column])


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if str(error).startswith("data"):  # our own
            raise
        raise ValueError(f"{what} cannot be opened: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def encoded_bytes(value: dict | bytes | None) -> tuple[bytes, str]:
    """Returns the bytes and the id of a row, given as `Image(decode=False)` yields it or as plain bytes."""
    data, path = (value["bytes"], value["path"]) if isinstance(value, dict) else (value, None)
    if data is not None:  # the path alone may be the same in two shards
        return data, ":".join(filter(None, (path, hashlib.blake2b(data, digest_size=6).hexdigest())))
    if path is None:
        raise BadImage("no bytes and no path")
    if "://" in path:  # in a Hub repository; an error here is the network's and not the row's
        with xopen(path, "rb") as file:
            return file.read(), path
    try:
        return Path(path).read_bytes(), path
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error
