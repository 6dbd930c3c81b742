"""Opens a split as shards of encoded images: a Hub repository, parquet files, a folder, or synthetic faces.

`datasets` resolves what a Hub repository holds. What a user got wrong is one line that names the remedy.
Not here: reading the shards (`shards`), keeping rows on disk (`dataset_cache`), the order of an epoch (`example_order`),
decoding (`images`).
"""

import contextlib
import functools
import glob
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import errors as hub_errors

from training.data import synthetic_faces
from training.data.images import DataError
from training.data.shards import (
    Example,
    ParquetFile,
    Patience,
    Shard,
    dataset_examples,
    http_status,
    in_one_line,
    is_held_out,
    parquet_examples,
)

logger = logging.getLogger(__name__)

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_HUB_ATTEMPTS, _HUB_TIMEOUT_S = 3, 8.0
_FIRST_VALIDATION_SEED = 1_000_000_000  # synthetic faces to train on count from 0

if datasets.config.PYARROW_VERSION.major > 24:
    # `datasets` sleeps 5 s whenever an iterator over shuffled parquet ends or is closed, against a crash in
    # pyarrow's threads (apache/arrow#45214), even with the versions for which it drops its other guard.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened split.

    Attributes:
        name: For messages.
        identity: What the rows depend on, JSON-able: equal identities have equal rows in equal order.
        shards: Empty where `paths` are given.
        paths: The images, where each is a file on this machine.
        num_rows: Rows, where known; estimated with a held-out part.
        num_bytes: Size of the files that the rows are read from, where known.
        is_wanted: Which rows belong to this side of the split; None: all.
        limit: Most rows to take; None: all.
    """

    name: str
    identity: dict
    shards: list[Shard] = field(default_factory=list)
    paths: list[str] | None = None
    num_rows: int | None = None
    num_bytes: int | None = None
    is_wanted: Callable[[Example], bool] | None = None
    limit: int | None = None


def asked_for(config, split_role: str) -> dict:
    """What the configuration says about the rows of a split, without looking at any file: JSON-able.

    Args:
        config: The `data` section.
        split_role: "train" or "validation".
    """
    is_validation = {"train": False, "validation": True}[split_role]
    is_held_out = config.validation_split is None
    asked = {
        "dataset": config.dataset,
        "role": split_role,
        "revision": config.revision,
        "split": config.validation_split if is_validation and not is_held_out else config.train_split,
        "column": config.image_column,
        "holdout_fraction": config.holdout_fraction if is_held_out else None,
        "limit": config.max_validation_images if is_validation else None,
    }
    if config.dataset == "parquet":
        asked["files"] = (config.data_files or {}).get(asked["split"])
    elif config.dataset == "imagefolder":
        asked["folder"] = config.data_dir
    elif config.dataset == "synthetic_faces":
        count = config.synthetic_validation_images if is_validation else config.synthetic_train_images
        # The drawing program's hash, lest faces drawn by an earlier version be taken for today's.
        rendered_by = hashlib.sha256(Path(synthetic_faces.__file__).read_bytes()).hexdigest()[:16]
        return {"dataset": config.dataset, "role": split_role, "count": count, "rendered_by": rendered_by} | {
            key: asked[key] for key in ("revision", "limit")
        }
    return asked


def open_source(config, split_role: str) -> Source:
    """Opens a split.

    Args:
        config: The `data` section.
        split_role: "train", or "validation", of which only the first `max_validation_images` rows are taken.

    Raises:
        ValueError: A folder, file, split, column, repository or revision does not exist, or cannot be opened.
        DataError: The Hub does not answer.
    """
    asked = asked_for(config, split_role)
    if config.dataset == "synthetic_faces":
        return _open_synthetic(config, asked)
    opened = {"parquet": _open_parquet, "imagefolder": _open_folder}.get(config.dataset, _open_hub)
    return opened(config, asked)


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if str(error).startswith("data"):  # our own
            raise
        raise ValueError(f"{what} cannot be opened: {in_one_line(error)}") from error


def _digest(facts: list) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _check_column(schema: pa.Schema, config) -> None:
    column = config.image_column
    if column not in schema.names:
        names = ", ".join(schema.names) or "none"
        raise ValueError(f"data.image_column={column!r} is not in {config.dataset!r}, only {names}.")
    kind = schema.field(column).type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise ValueError(f"data.image_column={column!r} holds no images but {kind}.")


def _parquet_source(config, asked: dict, urls: list[str], **facts) -> Source:
    """A shard for each file to train on; one shard over all files, of which few are read, to validate on."""
    files = [ParquetFile(url) for url in urls]
    _check_column(files[0].footer.schema.to_arrow_schema(), config)

    def shard(name: str, members: list[ParquetFile]) -> Shard:
        return Shard(name, functools.partial(parquet_examples, members, config.image_column))

    if asked["limit"] is not None:
        shards = [shard(files[0].url, files)]
    else:
        shards = [shard(file.url, [file]) for file in files]
    return _source(config, asked, shards, **facts)


def _source(config, asked: dict, shards: list[Shard], *, num_rows, num_bytes=None, **identity) -> Source:
    is_wanted, fraction = None, asked["holdout_fraction"]
    wants_held_out = asked["role"] == "validation"
    if fraction is not None:

        def is_wanted(row: Example) -> bool:
            return is_held_out(row[0], fraction) == wants_held_out

        if num_rows is not None:
            num_rows = round(num_rows * (fraction if wants_held_out else 1.0 - fraction))
    if asked["limit"] is not None:
        num_bytes = None  # of all files; how much of them is not known
    return Source(
        name=config.dataset,
        identity=asked | {"shards": len(shards)} | identity,
        shards=shards,
        num_rows=num_rows,
        num_bytes=num_bytes,
        is_wanted=is_wanted,
        limit=asked["limit"],
    )


def _open_parquet(config, asked: dict) -> Source:
    split = asked["split"]
    if split not in config.data_files:
        names = ", ".join(config.data_files)
        raise ValueError(f'data.data_files has no split {split!r}, only {names}; add "{split}": "*.parquet" to it.')
    patterns, files = config.data_files[split], []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if "://" in pattern:
            matches = [pattern]
        elif not matches:
            raise ValueError(f"data.data_files[{split!r}]: {pattern!r} matches no file (from {os.getcwd()}).")
        files += matches
    with _one_line_errors(f"data.data_files[{split!r}]={patterns!r}"):
        if any("://" in file for file in files):
            return _parquet_source(config, asked, files, num_rows=None)
        stats = [(os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
        footers = [pq.read_metadata(file) for file in files]
        known = [
            (Path(path).name, size, footer.num_rows) for (path, size, _), footer in zip(stats, footers, strict=True)
        ]
        return _parquet_source(
            config,
            asked,
            files,
            num_rows=sum(footer.num_rows for footer in footers),
            num_bytes=sum(size for _, size, _ in stats),
            files_at=_digest(stats),  # written anew in place, files may keep their sizes
            fingerprint=_digest(known),
        )


# ---- the Hub ----


def _open_hub(config, asked: dict) -> Source:
    info = _find_revision(config)
    logger.info("data.dataset=%r at commit %s", config.dataset, info.sha)
    split = asked["split"]
    with _one_line_errors(f"data.dataset={config.dataset!r}"):
        builder, patience = None, Patience(config.timeout_s)
        while builder is None:
            try:
                builder = datasets.load_dataset_builder(config.dataset, revision=info.sha, cache_dir=config.cache_dir)
            except (ConnectionError, TimeoutError, hub_errors.HfHubHTTPError) as error:
                patience.wait(f"hf://datasets/{config.dataset}", error)
        splits = builder.info.splits or {}
        num_rows = (splits[split].num_rows or None) if split in splits else None
        if builder.name != "parquet":
            shards = _dataset_shards(builder, split, config, whole=asked["limit"] is not None)
            return _source(config, asked, shards, num_rows=num_rows, commit=info.sha)
        if split not in builder.config.data_files:
            names = ", ".join(builder.config.data_files)
            raise ValueError(f"data: {config.dataset!r} has no split {split!r}, only {names}.")
        urls = list(builder.config.data_files[split])
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
        of_split = [sizes.get(url.partition("@")[2].partition("/")[2]) for url in urls]
        num_bytes = None if None in of_split else sum(of_split)
        return _parquet_source(config, asked, urls, num_rows=num_rows, num_bytes=num_bytes, commit=info.sha)


def _find_revision(config) -> huggingface_hub.DatasetInfo:
    """Asks the Hub for the commit behind `config.revision`, so that all epochs read the same files.

    A request of our own, because `datasets` would retry for minutes before it reports an unreachable Hub, and
    does not tell a missing revision from a missing repository.
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
            if http_status(error) == 429 or (http_status(error) or 0) >= 500:  # it is there, and busy
                patience.wait(f"hf://datasets/{config.dataset}", error)
            elif attempt >= _HUB_ATTEMPTS or isinstance(error, hub_errors.OfflineModeIsEnabled):
                raise DataError(
                    f"{name}: cannot reach the Hub at {huggingface_hub.constants.ENDPOINT} "
                    f"({in_one_line(error)}). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; "
                    'data.cache="only" trains from rows that an earlier run has kept, data.dataset="parquet" or '
                    '"imagefolder" from local files.'
                ) from error
            else:
                time.sleep(1.0)


def _dataset_shards(builder: datasets.DatasetBuilder, split: str, config, whole: bool) -> list[Shard]:
    """What is not parquet, by `datasets`; after an error it reads a shard from its beginning again."""
    streams = builder.as_streaming_dataset()  # reads schemas, no rows
    if split not in streams:
        raise ValueError(f"data: {config.dataset!r} has no split {split!r}, only {', '.join(streams)}.")
    column, stream = config.image_column, streams[split]
    _check_column((stream.features or datasets.Features()).arrow_schema, config)
    if isinstance(stream.features[column], datasets.Image):
        stream = stream.decode(False)  # before the columns are selected, or a decoder stays inside
    count = 1 if whole else stream.num_shards
    parts = [stream.select_columns([column]).shard(num_shards=count, index=i) for i in range(count)]
    names = [f"hf://datasets/{config.dataset}, shard {i} of {count}" for i in range(count)]
    return [
        Shard(name, functools.partial(dataset_examples, part, column)) for name, part in zip(names, parts, strict=True)
    ]


# ---- this machine ----


def _open_synthetic(config, asked: dict) -> Source:
    first_seed = _FIRST_VALIDATION_SEED if asked["role"] == "validation" else 0
    count = min(asked["count"], asked["limit"] or asked["count"])
    dataset = synthetic_faces.synthetic_dataset(count, first_seed, config.cache_dir, min(8, count))
    parts = [dataset.shard(num_shards=dataset.num_shards, index=i) for i in range(dataset.num_shards)]
    shards = [
        Shard(f"synthetic faces {i}", functools.partial(dataset_examples, part, "image"))
        for i, part in enumerate(parts)
    ]
    return Source(
        name=config.dataset, identity=asked | {"shards": len(shards)}, shards=shards, num_rows=count, limit=count
    )


def _open_folder(config, asked: dict) -> Source:
    """A folder with a sub-folder per split; without one for `train_split`, the whole folder is that split."""
    root, split = Path(config.data_dir).expanduser(), asked["split"]
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
    if asked["holdout_fraction"] is not None:
        held_out = _held_out_paths(tuple(paths), asked["holdout_fraction"])
        paths = [path for path in paths if (path in held_out) == (asked["role"] == "validation")]
    paths = paths[: asked["limit"]]
    names = [os.path.relpath(path, folder) for path in paths]
    identity = asked | {"fingerprint": _digest(names)}
    return Source(name=config.dataset, identity=identity, paths=paths, num_rows=len(paths))


@functools.lru_cache(maxsize=2)  # for training and for validation
def _held_out_paths(paths: tuple[str, ...], fraction: float) -> frozenset[str]:
    def wanted(path: str) -> bool:
        try:
            return is_held_out(Path(path).read_bytes(), fraction)
        except OSError:
            return False

    with ThreadPoolExecutor(8) as pool:
        return frozenset(path for path, held_out in zip(paths, pool.map(wanted, paths), strict=True) if held_out)
