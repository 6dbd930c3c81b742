"""Opens a split as shards of encoded images: a Hub repository, parquet files, an image folder, or synthetic faces.

`datasets` resolves what a Hub repository holds; its own streams cannot resume a shuffle exactly (their `state_dict` loses
the shuffle buffer), so reading and order are ours (`shards`, `order`).
"""

import collections
import contextlib
import errno
import functools
import glob
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet as pq
from huggingface_hub import errors as hub_errors

from training.data.folder import list_split, readable_paths
from training.data.images import DataError
from training.data.shards import (
    Example,
    ParquetFile,
    Patience,
    Shard,
    check_column,
    check_parquet_file,
    corrupt_reason,
    dataset_examples,
    http_status,
    in_one_line,
    is_held_out,
    parquet_examples,
)
from training.data.synthetic_faces.dataset import ATTRIBUTES, VERSION, synthetic_dataset
from training.io import printable

logger = logging.getLogger(__name__)

_HUB_ATTEMPTS, _HUB_TIMEOUT_S = 3, 8.0
_FIRST_VALIDATION_SEED = 1_000_000_000  # the training faces have the seeds from 0
_LOGGED_CORRUPT_IMAGES = 10

if datasets.config.PYARROW_VERSION.major > 24:
    # `datasets` sleeps 5 s whenever an iterator over shuffled parquet ends or is closed, against a crash in
    # pyarrow's threads (apache/arrow#45214), even with the versions for which it drops its other guard.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened split.

    Attributes:
        name: For messages.
        identity: What the examples depend on, for JSON: equal identities have equal examples in equal order.
        shards: Empty where `paths` are given.
        paths: The images, where each is a file on this machine.
        num_examples: Where known; estimated where a fraction is held out.
        num_bytes: Size of the files that the examples are read from, where known.
        is_wanted: Which examples belong to this part of the split; None: all.
        limit: Maximum number of examples to take; None: all.
    """

    name: str
    identity: dict
    shards: list[Shard] = field(default_factory=list)
    paths: list[str] | None = None
    num_examples: int | None = None
    num_bytes: int | None = None
    is_wanted: Callable[[Example], bool] | None = None
    limit: int | None = None


def requested_identity(config, split_role: str) -> dict:
    """What the configuration requests of a split, without looking at any file, for JSON.

    Args:
        config: The `data` section.
        split_role: "train" or "validation".

    Raises:
        ValueError: Training would read the validation split.
    """
    is_validation = {"train": False, "validation": True}[split_role]
    attributes = {"attributes": config.attribute_columns} if config.attribute_columns else {}
    if config.dataset == "synthetic_faces":
        return attributes | {
            "dataset": config.dataset,
            "role": split_role,
            "count": config.synthetic_validation_images if is_validation else config.synthetic_train_images,
            "version": VERSION,
            "revision": config.revision,
            "limit": config.max_validation_images if is_validation else None,
        }
    if not is_validation and config.train_split == config.validation_split:
        raise ValueError(
            f"data.train_split and data.validation_split are both {config.train_split!r}: the validation images would "
            "be trained on; name another split, or set data.validation_split to null to hold out a fraction."
        )
    is_held_out = config.validation_split is None
    split = config.validation_split if is_validation and not is_held_out else config.train_split
    requested = attributes | {
        "dataset": config.dataset,
        "role": split_role,
        "revision": config.revision,
        "split": split,
        "column": config.image_column,
        "holdout_fraction": config.holdout_fraction if is_held_out else None,
        "limit": config.max_validation_images if is_validation else None,
    }
    if config.dataset == "parquet":
        requested["files"] = (config.data_files or {}).get(split)
    elif config.dataset == "imagefolder":
        requested["folder"] = config.data_dir
    return requested


def open_source(config, split_role: str) -> Source:
    """Opens a split.

    Args:
        config: The `data` section.
        split_role: "train", or "validation", of which only the first `max_validation_images` readable images are taken.

    Raises:
        ValueError: A folder, file, split, column, repository or revision does not exist or cannot be opened, or the
            splits overlap.
        DataError: The Hub does not answer.
    """
    requested = requested_identity(config, split_role)
    openers = {"synthetic_faces": _open_synthetic, "parquet": _open_parquet, "imagefolder": _open_folder}
    return openers.get(config.dataset, _open_hub)(config, requested)


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Names what failed and why in one line; the project's own errors pass."""
    try:
        yield
    except Exception as error:
        if str(error).startswith("data"):
            raise
        is_unwritable = isinstance(error, OSError) and error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
        )
        remedy = "; set data.cache_dir or HF_HOME to a folder that can be written" if is_unwritable else ""
        raise ValueError(f"{what} cannot be opened: {in_one_line(error)}{remedy}") from error


def _digest(facts: list) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _parquet_source(config, requested: dict, urls: list[str], **facts) -> Source:
    """A shard for each file to train on; one shard over all files, of which few are read, to validate on."""
    files = [ParquetFile(url) for url in urls]
    columns = config.image_column, config.attribute_columns
    check_column(files[0].footer.schema.to_arrow_schema(), columns[0], files[0].url, columns[1])

    def shard(name: str, members: list[ParquetFile]) -> Shard:
        return Shard(name, functools.partial(parquet_examples, members, *columns))

    if requested["limit"] is not None:
        shards = [shard(files[0].url, files)]
    else:
        shards = [shard(file.url, [file]) for file in files]
    return _source(config, requested, shards, **facts)


def _source(config, requested: dict, shards: list[Shard], *, num_examples, num_bytes=None, **identity) -> Source:
    fraction, is_validation = requested["holdout_fraction"], requested["role"] == "validation"
    corrupt_examples = itertools.count(1)

    def is_wanted(example: Example) -> bool:
        if fraction is not None and is_held_out(example, fraction) != is_validation:
            return False
        reason = corrupt_reason(example) if is_validation else None  # the limit counts readable images
        if reason is not None and next(corrupt_examples) <= _LOGGED_CORRUPT_IMAGES:
            logger.warning("corrupt validation image skipped: %s (%s)", printable(example[1] or "null"), reason)
        return reason is None

    if fraction is not None and num_examples is not None:
        num_examples = round(num_examples * (fraction if is_validation else 1.0 - fraction))
    return Source(
        name=config.dataset,
        identity=requested | {"shards": len(shards)} | identity,
        shards=shards,
        num_examples=num_examples,
        num_bytes=None if is_validation else num_bytes,  # how much of the files the limit reads is not known
        is_wanted=is_wanted if is_validation or fraction is not None else None,
        limit=requested["limit"],
    )


def _check_disjoint(config, train_files: Iterable[str], validation_files: Iterable[str]) -> None:
    if shared := set(train_files) & set(validation_files):
        raise ValueError(
            f"data: the splits {config.train_split!r} and {config.validation_split!r} of {config.dataset!r} share "
            f"{len(shared)} files, such as {printable(min(shared))!r}, whose validation images would be trained on; name "
            "disjoint files, or set data.validation_split to null to hold out a fraction."
        )


# ---- parquet files ----


def _open_parquet(config, requested: dict) -> Source:
    split = requested["split"]
    files = _parquet_files(config, split)
    if requested["role"] == "train" and config.validation_split in config.data_files:
        validation_files = _parquet_files(config, config.validation_split)
        _check_disjoint(config, map(os.path.realpath, files), map(os.path.realpath, validation_files))
    name = f"data.data_files[{split!r}]"
    if any("://" in file for file in files):
        with _one_line_errors(f"{name}={config.data_files[split]!r}"):
            return _parquet_source(config, requested, files, num_examples=None)
    stats, known = [], []
    for file in files:
        with _one_line_errors(f"{name}: {file!r}"):
            check_parquet_file(file)
            stat, footer = os.stat(file), pq.read_metadata(file)
            check_column(footer.schema.to_arrow_schema(), config.image_column, repr(file), config.attribute_columns)
        stats.append((os.path.abspath(file), stat.st_size, stat.st_mtime_ns))
        known.append((Path(file).name, stat.st_size, footer.num_rows))
    return _parquet_source(
        config,
        requested,
        files,
        num_examples=sum(rows for _, _, rows in known),
        num_bytes=sum(size for _, size, _ in known),
        files_at=_digest(stats),  # files that are written again in place may keep their sizes
        fingerprint=_digest(known),
    )


def _parquet_files(config, split: str) -> list[str]:
    """The paths and URLs of a split in `data.data_files`."""
    if split not in config.data_files:
        names = ", ".join(config.data_files)
        raise ValueError(f'data.data_files has no split {split!r}, only {names}; add "{split}": "*.parquet" to it.')
    patterns = config.data_files[split]
    files = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = os.path.expanduser(pattern)
        if "://" in pattern or os.path.exists(path):  # brackets in the name of an existing file are no pattern
            matches = [path]
        else:
            matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise ValueError(f"data.data_files[{split!r}]: {pattern!r} matches no file (from {os.getcwd()}).")
        files += matches
    twice = [file for file, count in collections.Counter(map(os.path.realpath, files)).items() if count > 1]
    if twice:
        raise ValueError(f"data.data_files[{split!r}]={patterns!r} names {twice[0]!r} twice; name each file once.")
    return files


# ---- the Hub ----


def _open_hub(config, requested: dict) -> Source:
    info = _find_revision(config)
    logger.info("data.dataset=%r at commit %s", config.dataset, info.sha)
    split = requested["split"]
    with _one_line_errors(f"data.dataset={config.dataset!r}"):
        builder, patience = None, Patience(config.timeout_s)
        while builder is None:
            try:
                builder = datasets.load_dataset_builder(config.dataset, revision=info.sha, cache_dir=config.cache_dir)
            except (ConnectionError, TimeoutError, hub_errors.HfHubHTTPError) as error:
                patience.wait(f"hf://datasets/{config.dataset}", error)
        splits = builder.info.splits or {}
        num_examples = (splits[split].num_examples or None) if split in splits else None
        if builder.name != "parquet":
            shards = _dataset_shards(builder, split, config, as_one=requested["limit"] is not None)
            return _source(config, requested, shards, num_examples=num_examples, commit=info.sha)
        if split not in builder.config.data_files:
            names = ", ".join(builder.config.data_files)
            raise ValueError(f"data: {config.dataset!r} has no split {split!r}, only {names}.")
        urls = list(builder.config.data_files[split])
        if requested["role"] == "train":
            _check_disjoint(config, urls, builder.config.data_files.get(config.validation_split, ()))
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
        split_sizes = [sizes.get(url.partition("@")[2].partition("/")[2]) for url in urls]
        num_bytes = None if None in split_sizes else sum(split_sizes)
        facts = {"num_examples": num_examples, "num_bytes": num_bytes, "commit": info.sha}
        return _parquet_source(config, requested, urls, **facts)


def _find_revision(config) -> huggingface_hub.DatasetInfo:
    """Asks the Hub for the commit of `config.revision`, so that all epochs read the same files.

    `datasets` would retry for minutes before it reports an unreachable Hub, and does not distinguish a missing revision
    from a missing repository.
    """
    name, patience = f"data.dataset={config.dataset!r}", Patience(config.timeout_s)
    attempt = 0
    while True:
        attempt += 1
        try:
            return huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT).dataset_info(
                config.dataset, revision=config.revision, timeout=_HUB_TIMEOUT_S, files_metadata=True
            )
        except hub_errors.HFValidationError as error:
            raise ValueError(f"{name}: neither parquet, imagefolder, synthetic_faces nor a Hub id.") from error
        except hub_errors.RevisionNotFoundError as error:
            known = "a commit, tag or branch"
            raise ValueError(f"{name} has no data.revision={config.revision!r}; name {known}.") from error
        except hub_errors.RepositoryNotFoundError as error:
            raise ValueError(f"{name} is not on the Hub, or needs access and `hf auth login`.") from error
        except Exception as error:  # refused, timed out, 429, 5xx, offline mode
            if http_status(error) == 429 or (http_status(error) or 0) >= 500:  # the Hub is busy
                patience.wait(f"hf://datasets/{config.dataset}", error)
            elif attempt >= _HUB_ATTEMPTS or isinstance(error, hub_errors.OfflineModeIsEnabled):
                raise DataError(
                    f"{name}: cannot reach the Hub at {huggingface_hub.constants.ENDPOINT} "
                    f"({in_one_line(error)}). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; "
                    'data.cache="only" trains from the dataset cache of an earlier run, data.dataset="parquet" or '
                    '"imagefolder" from local files.'
                ) from error
            else:
                time.sleep(1.0)


def _dataset_shards(builder: datasets.DatasetBuilder, split: str, config, as_one: bool) -> list[Shard]:
    """Shards of other formats than parquet, read by `datasets`, which starts a shard again after an error."""
    streams = builder.as_streaming_dataset()  # reads schemas only
    if split not in streams:
        raise ValueError(f"data: {config.dataset!r} has no split {split!r}, only {', '.join(streams)}.")
    column, attributes, stream = config.image_column, config.attribute_columns, streams[split]
    check_column((stream.features or datasets.Features()).arrow_schema, column, repr(config.dataset), attributes)
    if isinstance(stream.features[column], datasets.Image):
        stream = stream.decode(False)  # before the columns are selected, or a decoder stays inside
    count = 1 if as_one else stream.num_shards
    stream = stream.select_columns([column, *attributes])
    parts = [stream.shard(num_shards=count, index=i) for i in range(count)]
    names = [f"hf://datasets/{config.dataset}, shard {i} of {count}" for i in range(count)]
    return [
        Shard(name, functools.partial(dataset_examples, part, column, attributes))
        for name, part in zip(names, parts, strict=True)
    ]


# ---- this machine ----


def _open_synthetic(config, requested: dict) -> Source:
    if unknown := sorted({*config.attribute_columns} - {*ATTRIBUTES}):
        raise ValueError(
            f"data.attribute_columns: synthetic faces have no {unknown[0]!r}, only {', '.join(ATTRIBUTES)}."
        )
    first_seed = _FIRST_VALIDATION_SEED if requested["role"] == "validation" else 0
    count = min(requested["count"], requested["limit"] or requested["count"])
    dataset = synthetic_dataset(count, first_seed, config.cache_dir, min(8, count))
    parts = [dataset.shard(num_shards=dataset.num_shards, index=i) for i in range(dataset.num_shards)]
    shards = [
        Shard(f"synthetic faces {i}", functools.partial(dataset_examples, part, "image", config.attribute_columns))
        for i, part in enumerate(parts)
    ]
    identity = requested | {"shards": len(shards)}
    return Source(name=config.dataset, identity=identity, shards=shards, num_examples=count, limit=count)


def _open_folder(config, requested: dict) -> Source:
    """The `imagefolder` builder of `datasets` takes 1.4 ms a file on every rank, and guesses splits."""
    if config.attribute_columns:
        raise ValueError(
            'data.attribute_columns needs a table: an "imagefolder" has none, use "parquet" or a Hub data set.'
        )
    folder, paths = list_split(config.data_dir, requested["split"], config.train_split, config.validation_split)
    if requested["holdout_fraction"] is not None:
        held_out = _held_out_paths(tuple(paths), requested["holdout_fraction"])
        paths = [path for path in paths if (path in held_out) == (requested["role"] == "validation")]
    if requested["limit"] is not None:
        paths = readable_paths(paths, requested["limit"])
    identity = requested | {"fingerprint": _digest([os.path.relpath(path, folder) for path in paths])}
    return Source(name=config.dataset, identity=identity, paths=paths, num_examples=len(paths))


@functools.lru_cache(maxsize=2)  # for training and for validation
def _held_out_paths(paths: tuple[str, ...], fraction: float) -> frozenset[str]:
    with ThreadPoolExecutor(8) as pool:
        held_out = pool.map(lambda path: is_held_out(Example(None, path), fraction), paths)
        return frozenset(path for path, is_validation in zip(paths, held_out, strict=True) if is_validation)
