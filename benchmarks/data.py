"""Measures the speed of the data path and of plain `datasets` streaming with Pillow and torchvision transforms.

    python -m benchmarks.data --data-files "faces/train-*.parquet" --rows 162770
    python -m benchmarks.data                       # noise JPEGs of CelebA's size instead of faces

Prints what one core delivers (images per second of CPU time, which other processes on the machine disturb little),
images/s with one worker and two (threads or `data.decode_processes` here, processes of a DataLoader there; with processes
the CPU second is one of the training process alone, which hands over what they decode), decoding alone with two threads of
one interpreter against two interpreters (which shows how long an image holds the interpreter's lock), seconds to the first
batch with nothing cached, seconds to resume at row 100,000, and the size of the cache. The rows of the given files are repeated
to `--rows`. Not measured here: the network; the fraction of training time that waits for data, which every run logs as
speed/data_wait_fraction.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import itertools
import logging
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision import transforms

from training.config import DataConfig
from training.data.images import decode_image
from training.data.stream import TrainStream

BATCH = 64
RESUME_ROW = 100_000
SHARDS = 19  # as many as the published CelebA has to train on


def noise_faces(count: int) -> list[bytes]:
    """JPEGs of CelebA's size and about its bytes: smooth noise."""
    rng, images = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (55, 45, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((178, 218), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


def write_corpus(folder: Path, data_files: str | None, rows: int) -> None:
    """Repeats the images to `rows` rows in `SHARDS` parquet files, each row with its number as its path."""
    if data_files:
        names = sorted(glob.glob(data_files))
        if not names:
            raise SystemExit(f"--data-files {data_files!r} matches no file.")
        images = [row["bytes"] for name in names for row in pq.read_table(name, columns=["image"])["image"].to_pylist()]
    else:
        images = noise_faces(512)
    features = datasets.Features(image=datasets.Image())
    indices = iter(range(rows))
    for shard in range(SHARDS):
        mine = list(itertools.islice(indices, rows // SHARDS + (shard < rows % SHARDS)))
        cells = [{"bytes": images[index % len(images)], "path": f"{index:06d}.jpg"} for index in mine]
        table = pa.table({"image": pa.array(cells, features.arrow_schema.field("image").type)})
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
        pq.write_table(table, folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet", row_group_size=1000)


def our_stream(
    folder: Path, resolution: int, workers: int, cache_dir: Path | None = None, processes: int = 0
) -> TrainStream:
    config = DataConfig(
        dataset="parquet",
        data_files={"train": str(folder / "*.parquet")},
        crop_px=178,
        decode_threads=workers,
        decode_processes=processes,
        cache_dir=str(cache_dir or folder / "cache"),
    )
    return TrainStream(config, resolution=resolution, seed=0, global_batch=BATCH, rank=0, world_size=1)


def our_batches(stream: TrainStream, epoch: int, start_batch: int = 0) -> Iterator[torch.Tensor]:
    return (batch.pixels for batch in stream.epoch_batches(epoch, start_batch=start_batch))


class _Plain:
    """The transform that examples show: Pillow decodes and flips, torchvision crops, resizes and normalizes."""

    def __init__(self, resolution: int):
        steps = [
            transforms.CenterCrop(178),
            transforms.Resize(resolution, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.5),
        ]
        self.transform = transforms.Compose(steps)

    def __call__(self, row: dict) -> dict:
        return {"image": self.transform(row["image"].convert("RGB"))}


def plain_batches(folder: Path, resolution: int, workers: int) -> Iterator[torch.Tensor]:
    """`load_dataset(..., streaming=True)`, shuffled, mapped, in a DataLoader."""
    files = {"train": str(folder / "*.parquet")}
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = rows.shuffle(seed=0, buffer_size=2048).map(_Plain(resolution))
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, num_workers=workers)
    return (batch["image"] for batch in loader)


def images_per_second(batches: Iterator[torch.Tensor], seconds: float, clock=time.perf_counter) -> float:
    """For `seconds`, after the first 16 batches: a prefetch that is full must not count."""
    with contextlib.closing(batches):
        for _ in itertools.islice(batches, 16):
            pass
        began, clock_began, count = time.perf_counter(), clock(), 0
        for batch in batches:
            count += len(batch)
            if time.perf_counter() - began > seconds:
                break
        return count / (clock() - clock_began)


def decode_rate(encoded: list[bytes], resolution: int, seconds: float, threads: int) -> float:
    """Images/s that threads of this interpreter decode."""
    torch.get_num_threads()

    def decode(_: int) -> int:
        torch.set_num_threads(1)
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            decode_image(encoded[count % len(encoded)], 178, resolution)
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(decode, range(threads))) / seconds


def two_threads_and_two_interpreters(
    encoded: list[bytes], resolution: int, seconds: float, repeats: int
) -> tuple[list[float], list[float]]:
    """Images/s of two decoding threads in one interpreter, and of two interpreters with one each, interleaved."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(decode_rate, encoded, resolution, 1.0, 1) for _ in range(2)]  # imports
        [task.result() for task in tasks]
        together, apart = [], []
        for _ in range(repeats):
            together.append(pool.submit(decode_rate, encoded, resolution, seconds, 2).result())
            tasks = [pool.submit(decode_rate, encoded, resolution, seconds, 1) for _ in range(2)]
            apart.append(sum(task.result() for task in tasks))
    return together, apart


def seconds_to_first(batches: Iterator[torch.Tensor]) -> float:
    began = time.perf_counter()
    with contextlib.closing(batches):
        next(batches)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-files", help="glob of parquet files with an `image` column; default: noise")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the corpus that is measured")
    parser.add_argument("--resolution", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved trials of each kind; the median is printed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    datasets.disable_progress_bars()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{platform.processor() or platform.machine()}, {cores} cores, torch {torch.__version__}, "
          f"datasets {datasets.__version__}, pyarrow {pa.__version__}")  # fmt: skip

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, arguments.data_files, arguments.rows)
        size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
        print(f"{arguments.rows} rows, {size / 1e9:.2f} GB of parquet, {size / arguments.rows / 1e3:.1f} kB per row")

        first = min(arguments.resolution)
        stream = our_stream(folder, first, cores)
        print(f"first batch, nothing cached        {seconds_to_first(our_batches(stream, 0)):8.2f} s")
        print(f"first batch, plain datasets        {seconds_to_first(plain_batches(folder, first, 1)):8.2f} s")
        began = time.perf_counter()
        next(our_batches(stream, 1))  # the permutation needs all rows
        cached = sum(path.stat().st_size for path in (folder / "cache").rglob("*.arrow"))
        print(f"rest of the cache, {cached / 1e9:5.2f} GB         {time.perf_counter() - began:8.2f} s")
        for epoch in (0, 1):
            start = min(RESUME_ROW, arguments.rows * 2 // 3) // BATCH
            began = time.perf_counter()
            seconds_to_first(our_batches(our_stream(folder, first, cores), epoch, start))
            kind = "streamed" if epoch == 0 else "permuted"
            print(f"resume at row {start * BATCH:6d}, {kind:8s}   {time.perf_counter() - began:8.2f} s")

        print(f"images/s, median of {arguments.repeats} x {arguments.seconds:g} s, interleaved")
        print("                    a core's CPU second    1 worker   2 workers")
        threads = torch.get_num_threads()
        for resolution in arguments.resolution:
            rates: dict[tuple[str, int], list[float]] = {}
            for _, workers in itertools.product(range(arguments.repeats), (0, 1, 2)):
                # 0 workers: all in one process whose CPU time is taken; ours then decodes in one thread.
                clock = time.perf_counter if workers else time.process_time
                torch.set_num_threads(threads if workers else 1)  # as in a worker: others would spin and be counted
                ours = our_batches(our_stream(folder, resolution, workers or 1), 1)
                split = our_batches(our_stream(folder, resolution, 1, processes=workers or 1), 1)
                plain = plain_batches(folder, resolution, workers)
                for kind, batches in (("ours", ours), ("ours, processes", split), ("plain datasets", plain)):
                    rates.setdefault((kind, workers), []).append(images_per_second(batches, arguments.seconds, clock))
            medians = {key: float(np.median(values)) for key, values in rates.items()}
            for kind in ("ours", "ours, processes", "plain datasets"):
                cells = [f"{medians[kind, workers]:12.0f}" for workers in (0, 1, 2)]
                print(f"{resolution:4d} px {kind:15s}      {''.join(cells)}")
            together, apart = two_threads_and_two_interpreters(
                noise_faces(64), resolution, arguments.seconds, arguments.repeats
            )
            shares = sorted(a / b for a, b in zip(together, apart, strict=True))
            print(
                f"{resolution:4d} px decoding alone: two threads {np.median(together):.0f}, two interpreters "
                f"{np.median(apart):.0f} images/s; ratio {np.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})"
            )
            ratios = [medians["ours", workers] / medians["plain datasets", workers] for workers in (0, 1, 2)]
            print(f"{resolution:4d} px ratio                {''.join(f'{ratio:12.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
