"""Examples to batches: global batches, decoding in threads or processes, horizontal flips, corrupt images, and resume.

The order of an epoch (`order`) is a pure function of (seed, epoch): it is cut into global batches, and every rank reads
and decodes its own slice of each. So no example is lost or repeated whatever the number of shards, processes and decode
threads, every rank has the same number of batches, and a resume skips references without reading them. The
`state_dict` of `datasets` 5 resumes none of this exactly once a shuffle buffer is involved.

Pixels stay uint8 until they are on the device.
"""

import contextlib
import hashlib
import itertools
import logging
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from training.data.images import CorruptImage, DataError, decode_image, decode_images
from training.data.order import open_examples
from training.data.shards import encoded_bytes
from training.data.sources import open_source
from training.io import printable

logger = logging.getLogger(__name__)

_SPARE_EXAMPLES = 32  # first examples of an epoch, which replace a global batch that is corrupt altogether
_MIN_EXAMPLES_TO_JUDGE = 200  # with fewer, one corrupt image alone would be more than 0.5 %
_REMINDER_S = 30.0  # between log lines while no examples arrive
_MAX_DECODE_THREADS = 16
_MIN_HELD_OUT = 8  # the metrics of fewer validation images say little
_EXAMPLES_PER_JOB = 8  # one hand-over to a thread or a process for each image would cost a third of its decoding
_FREE_ON_RESUME = {"revision", "files", "folder", "files_at"}  # names and places; contents are compared


@dataclass
class Batch:
    """One rank's part of a global batch.

    Attributes:
        pixels: (local batch, 3, resolution, resolution), uint8 in [0, 255], contiguous in channels_last.
        example_ids: Path and content hash of each image, or its path where the data set is a folder.
        attributes: (local batch, attributes), int8: 1 present, -1 absent, 0 unknown; no columns without
            `data.attribute_columns`.
    """

    pixels: torch.Tensor
    example_ids: list[str]
    attributes: torch.Tensor


@dataclass
class _Slot:
    """One image of a batch: where its pixels go, references of what may be there, its place in the epoch."""

    pixels: torch.Tensor
    candidates: Iterator[Any]
    position: int


def decode_pool(config) -> ThreadPoolExecutor:
    """Threads that decode, or that wait for the processes that do."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and accelerate launch
    default = max(1, min(_MAX_DECODE_THREADS, cores // ranks_here))
    # One intra-op thread each: with torch's default two decode threads are no faster than one (975 and 960 images/s,
    # against 1,350 with one). The setting belongs to its thread and is the default of later threads: the first line
    # fixes this thread's own.
    torch.get_num_threads()
    threads = 2 * config.decode_processes or config.decode_threads or default
    return ThreadPoolExecutor(threads, "decode", initializer=torch.set_num_threads, initargs=(1,))


def _start_worker() -> None:
    """Sets up a decoding process: one thread, and an end when its parent ends, however that ends."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal or a scheduler sends to all; the parent decides
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _decode_processes(config) -> ProcessPoolExecutor | None:
    """Processes that decode, if configured. They are not forked from this process, which has threads and CUDA."""
    if not config.decode_processes:
        return None
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(config.decode_processes, context, initializer=_start_worker)


def load_validation(config, *, resolution: int, rank: int, world_size: int) -> tuple[torch.Tensor, list[int]]:
    """Loads this rank's part of the fixed validation images: indices rank, rank + world_size, ... of the split.

    Args:
        config: The `data` section.
        resolution: Height and width of the images in pixels, the model's `sample_size`.
        rank: Of this process.
        world_size: Number of processes.

    Returns:
        Pixels (n, 3, resolution, resolution), uint8, channels_last, never flipped, and the indices of the images
        among the first `max_validation_images`. Corrupt images are skipped with a warning.

    Raises:
        ValueError: The split holds no image, or this rank can read none of its own.
    """

    examples = open_examples(config, "validation")

    def decode(numbered_example: tuple) -> np.ndarray | None:
        try:
            return decode_image(encoded_bytes(examples.read(numbered_example[1]))[0], config.crop_px, resolution)
        except CorruptImage as error:
            logger.warning("corrupt validation image %d skipped: %s", numbered_example[0], error)
            return None

    mine, count = [], 0
    for count, example in enumerate(examples.first(), start=1):
        if (count - 1) % world_size == rank:
            mine.append((count - 1, example))
    with decode_pool(config) as pool:
        decoded = zip(mine, pool.map(decode, mine), strict=True)
        readable = {index: pixels for (index, _), pixels in decoded if pixels is not None}
    if not readable and (mine or rank == 0):  # a small split may have none for the last ranks
        remedy = "give a split that holds readable images"
        if config.validation_split is None:
            remedy = (
                f"none falls into data.holdout_fraction={config.holdout_fraction:g}, in which copies of an image stay "
                "together; raise it, add images, or name a data.validation_split"
            )
        raise ValueError(f"data: {config.dataset!r} has no readable image to validate on: {remedy}.")
    if rank == 0 and config.validation_split is None and count < min(_MIN_HELD_OUT, config.max_validation_images):
        _warn_of_few(config, count)
    shape = (len(readable), resolution, resolution, 3)
    pixels = np.array(list(readable.values()), np.uint8).reshape(shape)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), list(readable)


def _warn_of_few(config, count: int) -> None:
    fraction, num_train = config.holdout_fraction, None
    if config.dataset == "imagefolder":
        num_train = open_source(config, "train").num_examples
    num_images = count / fraction if num_train is None else num_train + count
    better = math.ceil(100 * max(fraction * _MIN_HELD_OUT / count, _MIN_HELD_OUT / num_images)) / 100
    remedy = f"set it to {better:g}" if better < 0.5 else "add images, or name a data.validation_split"
    logger.warning(
        "data.holdout_fraction=%g holds out %d of about %d images: the validation metrics say little; %s",
        fraction, count, num_images, remedy,
    )  # fmt: skip


def validation_attributes(config, indices: list[int]) -> torch.Tensor:
    """The attributes of validation images, (n, attributes), int8, as in `Batch`.

    Args:
        config: The `data` section.
        indices: Of the images, as `load_validation` returns them.
    """
    examples, wanted = open_examples(config, "validation"), set(indices)
    rows = [examples.read(each).attributes for index, each in enumerate(examples.first()) if index in wanted]
    return torch.tensor([list(np.frombuffer(row or b"", np.int8)) for row in rows], dtype=torch.int8)


class TrainStream:
    """The training images of one rank, epoch by epoch.

    Args:
        config: The `data` section.
        resolution: Height and width of the images in pixels, the model's `sample_size`.
        seed: Seed of the shuffle and the flips.
        global_batch: Images in a batch over all ranks, a multiple of `world_size`.
        rank: Of this process.
        world_size: Number of processes.
        pin_memory: Whether batches are in page-locked memory, for asynchronous copies to a GPU.

    Attributes:
        num_examples: Images of an epoch. None where unknown, estimated where a fraction is held out, exact after an epoch.
        identity: What the examples depend on (the commit of a branch, ...), which a resume compares.
        corrupt_examples: Corrupt images of this rank that were replaced, so far.
        wait_seconds: Time that the consumer has waited for batches, so far.
    """

    def __init__(
        self,
        config,
        *,
        resolution: int,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        pin_memory: bool = False,
    ):
        if global_batch % world_size:
            raise ValueError(
                f"training_presets.batch_size {global_batch} cannot be divided over {world_size} processes: use a multiple."
            )
        self.config, self._resolution, self._pin_memory = config, resolution, pin_memory
        self._seed, self._global_batch = seed, global_batch
        self._local = range(rank * global_batch // world_size, (rank + 1) * global_batch // world_size)
        self._examples = open_examples(config, "train")
        self.num_examples = self._examples.num_examples
        self.corrupt_examples = self._decoded_examples = 0
        self.wait_seconds = 0.0
        self._corrupt_examples: dict[str, str] = {}  # id: reason, in order of appearance
        self._processes = _decode_processes(config)
        self._has_logged_dropped = False

    def epoch_batches(self, epoch: int, start_batch: int = 0, max_batches: int | None = None) -> Iterator[Batch]:
        """Yields this rank's batches of an epoch. Its threads end with the iterator, however that ends.

        A corrupt image is replaced by the next readable one of its global batch: the same one for every number of
        processes and after every resume.

        Args:
            epoch: Chooses the permutation and the flips.
            start_batch: Number of global batches to skip, undecoded.
            max_batches: Ends after so many batches.

        Raises:
            DataError: The split holds fewer images than one global batch, or fewer batches than `start_batch`; or more
                than `max_corrupt_fraction` of the images are corrupt.
        """
        handover: queue.Queue = queue.Queue(max(1, self.config.prefetch_batches))
        closing = threading.Event()
        pool = decode_pool(self.config)
        stop_batch = None if max_batches is None else start_batch + max_batches

        def read() -> None:
            end = None
            try:
                submitted = self._submit_batches(epoch, start_batch, stop_batch, pool)
                with contextlib.closing(submitted):
                    for batch in submitted:
                        if closing.is_set():
                            return
                        handover.put(batch)
            except BaseException as error:  # noqa: BLE001 (it is raised in the consumer)
                end = error
            if not closing.is_set():
                handover.put(end)

        reader = threading.Thread(target=read, name="reader", daemon=True)
        reader.start()
        try:
            while (item := self._wait_for(handover)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._finish(*item)
            if max_batches is None:  # the epoch is complete
                self._check_corrupt_fraction(min_examples=1)
        finally:
            closing.set()
            self._examples.interrupt()
            with contextlib.suppress(queue.Empty):  # a reader that waits for space continues, and sees `closing`
                while True:
                    handover.get_nowait()
            reader.join(timeout=10.0)  # only a stalled network read takes longer; it ends with the process
            pool.shutdown(wait=not reader.is_alive(), cancel_futures=True)

    def reseed(self, seed: int) -> None:
        """Changes the order and the flips of epochs that start from now on."""
        self._seed = seed

    @property
    def identity(self) -> dict:
        return self._examples.identity

    def check_resume(self, saved: dict) -> None:
        """Compares the examples with those of the run that is resumed.

        Args:
            saved: Its `identity`.

        Raises:
            ValueError: They differ; names what and how.
        """
        now = self.identity
        keys = sorted((saved.keys() | now.keys()) - _FREE_ON_RESUME)
        changed = [f"{key} ({saved.get(key)} -> {now.get(key)})" for key in keys if saved.get(key) != now.get(key)]
        if changed:
            raise ValueError(
                f"--resume: the training images of {self.config.dataset!r} have changed: "
                f"{', '.join(changed)}. Restore the data (for a commit, set data.revision to it), or start a new run."
            )

    def _submit_batches(self, epoch: int, start_batch: int, stop_batch: int | None, pool) -> Iterator[tuple]:
        """Yields (pixels (local, resolution, resolution, 3), the jobs that fill them)."""
        shape = (len(self._local), self._resolution, self._resolution, 3)
        with contextlib.closing(self._examples.order(self._seed, epoch)) as stream:
            spares = list(itertools.islice(stream, _SPARE_EXAMPLES))
            references = itertools.chain(spares, stream)
            for index in itertools.count():
                if index == stop_batch:
                    return
                batch = list(itertools.islice(references, self._global_batch))
                if len(batch) < self._global_batch:
                    break
                if index < start_batch:
                    continue
                pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
                slots = [
                    # Itself first.
                    _Slot(place, itertools.chain(batch[i:], batch[:i], spares), index * self._global_batch + i)
                    for place, i in zip(pixels, self._local, strict=True)
                ]
                jobs = [
                    pool.submit(self._fill, slots[start : start + _EXAMPLES_PER_JOB], epoch)
                    for start in range(0, len(slots), _EXAMPLES_PER_JOB)
                ]
                yield pixels, jobs
        self.num_examples = index * self._global_batch + len(batch)
        if index == 0 or index < start_batch:
            raise DataError(
                f"data: {self.config.dataset!r} holds {self.num_examples} images to train on, {index} batches of "
                f"{self._global_batch}, and batch {start_batch} was asked for. Use a smaller batch or more "
                "data; a resume needs the data that the run was started with."
            )
        if batch and not self._has_logged_dropped:
            self._has_logged_dropped = True
            dropped = "image of each epoch does" if len(batch) == 1 else f"{len(batch)} images of each epoch do"
            logger.info("the last %s not fill a batch: dropped", dropped)

    def _fill(self, slots: list[_Slot], epoch: int) -> list[tuple[str, tuple | None, bytes]]:
        """Decodes the first readable candidate into each slot.

        Returns:
            For each slot its id, (id, reason) of the example that belongs there if that one is corrupt, and its attributes.
        """
        firsts = self._decode([next(slot.candidates) for slot in slots])
        return [self._fill_slot(slot, *first, epoch) for slot, first in zip(slots, firsts, strict=True)]

    def _fill_slot(
        self, slot: _Slot, example_id: str, pixels: np.ndarray | CorruptImage, attributes: bytes, epoch: int
    ) -> tuple[str, tuple | None, bytes]:
        corrupt = None
        while isinstance(pixels, CorruptImage):
            corrupt = corrupt or (example_id, f"{pixels}; number {slot.position} of epoch {epoch}")
            reference = next(slot.candidates, None)
            if reference is None:
                raise DataError(
                    f"data: no image of {self.config.dataset!r} is readable near {corrupt[0]} ({corrupt[1]})."
                )
            ((example_id, pixels, attributes),) = self._decode([reference])
        image = torch.from_numpy(pixels)
        if self.config.horizontal_flip:
            # A hash and no generator: the flip depends on nothing but the example's position.
            place = f"{self._seed}:{epoch}:{slot.position}".encode()
            is_flipped = hashlib.blake2b(place, digest_size=1).digest()[0] & 1
            image = image.flip(1) if is_flipped else image
        slot.pixels.copy_(image)
        return example_id, corrupt, attributes

    def _decode(self, references: list[Any]) -> list[tuple[str, np.ndarray | CorruptImage, bytes]]:
        """Id, pixels (or why they are corrupt) and attributes of each reference; in this thread or in a process."""
        examples: list[tuple[str, bytes | CorruptImage, bytes]] = []
        for reference in references:
            example = self._examples.read(reference)
            attributes = example.attributes or b""
            try:
                data, example_id = encoded_bytes(example)
                examples.append((example_id, data, attributes))
            except CorruptImage as error:
                examples.append((printable(example.path or "null"), error, attributes))
        arguments = [data for _, data, _ in examples if isinstance(data, bytes)], self.config.crop_px, self._resolution
        if self._processes is None:
            decoded = iter(decode_images(*arguments))
        else:
            decoded = iter(self._processes.submit(decode_images, *arguments).result())
        return [
            (name, data if isinstance(data, CorruptImage) else next(decoded), attributes)
            for name, data, attributes in examples
        ]

    def _wait_for(self, handover: queue.Queue):
        began = time.perf_counter()
        try:
            while True:
                try:
                    return handover.get(timeout=_REMINDER_S)
                except queue.Empty:
                    waited = time.perf_counter() - began
                    reason = self._examples.waiting_for or "none has arrived"
                    logger.warning("waiting for images of %r for %.0f s: %s", self.config.dataset, waited, reason)
                    idle = self._examples.idle_seconds()
                    if min(waited, idle) > self.config.timeout_s + _REMINDER_S:
                        raise DataError(
                            f"data: no image of {self.config.dataset!r} arrived for {idle:.0f} s (data.timeout_s="
                            f"{self.config.timeout_s:g}): {reason}. Checkpoints are intact; use --resume auto."
                        ) from None
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _finish(self, pixels: torch.Tensor, jobs: list) -> Batch:
        began = time.perf_counter()
        results = [result for job in jobs for result in job.result()]
        self.wait_seconds += time.perf_counter() - began
        self._decoded_examples += len(results)
        for corrupt_id, reason in (corrupt for _, corrupt, _ in results if corrupt):
            self.corrupt_examples += 1
            if corrupt_id not in self._corrupt_examples:  # logged once, not in every epoch
                self._corrupt_examples[corrupt_id] = reason
                logger.warning("corrupt image replaced: %s (%s)", corrupt_id, reason)
        self._check_corrupt_fraction(min_examples=_MIN_EXAMPLES_TO_JUDGE)
        attributes = np.frombuffer(b"".join(each for _, _, each in results), np.int8).reshape(len(results), -1)
        ids = [example_id for example_id, _, _ in results]
        return Batch(pixels.permute(0, 3, 1, 2), ids, torch.from_numpy(attributes.copy()))

    def _check_corrupt_fraction(self, min_examples: int) -> None:
        total, limit = self._decoded_examples, self.config.max_corrupt_fraction
        if total >= min_examples and self.corrupt_examples > limit * total:
            some = "; ".join(
                f"{example_id} ({reason})" for example_id, reason in [*self._corrupt_examples.items()][:10]
            )
            raise DataError(
                f"{self.corrupt_examples} of {total} images of {self.config.dataset!r} are corrupt, more than "
                f"data.max_corrupt_fraction={limit}: {some}. Restore these images, or raise data.max_corrupt_fraction."
            )


def first_training_images(config, resolution: int, seed: int, count: int) -> torch.Tensor:
    """The first training images of epoch 0, (n, 3, resolution, resolution) uint8; all where there are fewer than `count`.

    Args:
        config: The `data` section.
        resolution: Height and width in pixels.
        seed: Seed of the shuffle and the flips.
        count: Number of images.
    """
    # A batch size of 1 leaves no incomplete batch to drop.
    stream = TrainStream(config, resolution=resolution, seed=seed, global_batch=1, rank=0, world_size=1)
    return torch.cat([batch.pixels for batch in stream.epoch_batches(0, max_batches=count)])
