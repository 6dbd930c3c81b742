"""The embedded data set: synthetic faces as a `datasets` stream with the columns of CelebA on the Hub."""

import io
import os
from collections.abc import Iterable, Iterator

import datasets
from PIL import Image

from training.data.synthetic_faces.render import render_portrait

# Part of the key of caches and of what a resume compares. Raise it when a seed renders other pixels or JPEG bytes.
VERSION = 1

ATTRIBUTES = (
    "Bald", "Bangs", "Black_Hair", "Blond_Hair", "Eyeglasses", "Gray_Hair", "Male", "Mouth_Slightly_Open", "No_Beard",
    "Smiling", "Young",
)  # fmt: skip


def generate_examples(seeds: Iterable[int]) -> Iterator[dict]:
    """Yields one example per seed: `image` (bytes of a JPEG of quality 95, path), `celeb_id` (seed) and `ATTRIBUTES`."""
    for seed in seeds:
        buffer = io.BytesIO()
        pixels, attributes = render_portrait(seed)
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        image = {"bytes": buffer.getvalue(), "path": f"synthetic_{seed:08d}.jpg"}
        yield {"image": image, "celeb_id": int(seed), **{name: bool(attributes[name]) for name in ATTRIBUTES}}


def synthetic_dataset(
    num_images: int, first_seed: int, cache_dir: str | None = None, num_shards: int = 8
) -> datasets.IterableDataset:
    """Streams the faces of the seeds ``first_seed .. first_seed + num_images - 1``.

    They are rendered once, on all cores, and kept as Arrow files in the cache of `datasets`. A face takes about 10 ms
    of a core and 14 kB on disk.

    Args:
        num_images: Number of faces, at least 1.
        first_seed: The first seed; ranges that do not overlap share no face.
        cache_dir: Where the Arrow files go; None is the library's default cache.
        num_shards: Shards of the stream, at most `num_images`.

    Returns:
        The examples of `generate_examples`, images left encoded.

    Raises:
        ValueError: An argument is out of range, or the cache cannot be written.
    """
    if num_images < 1 or first_seed < 0:
        raise ValueError(f"num_images={num_images} must be 1 or more, first_seed={first_seed} 0 or more.")
    if not 1 <= num_shards <= num_images:
        raise ValueError(f"num_shards={num_shards} must lie between 1 and num_images={num_images}.")
    features = datasets.Features(
        image=datasets.Image(decode=False),
        celeb_id=datasets.Value("int64"),
        **dict.fromkeys(ATTRIBUTES, datasets.Value("bool")),
    )
    # A list is what `datasets` divides among processes; below some hundred faces starting them costs more.
    processes = min(os.cpu_count() or 1, num_images // 256)
    seeds = range(first_seed, first_seed + num_images)
    try:
        faces = datasets.Dataset.from_generator(
            generate_examples,
            gen_kwargs={"seeds": list(seeds) if processes > 1 else seeds},
            features=features,
            cache_dir=cache_dir,
            num_proc=processes if processes > 1 else None,
            fingerprint=f"synthetic-faces-v{VERSION}-attributes-{first_seed}-{num_images}",
        )
    except OSError as error:
        folder = cache_dir or datasets.config.HF_DATASETS_CACHE
        raise ValueError(
            f"data.cache_dir: synthetic faces cannot be written to {str(folder)!r} ({error.strerror or error}); set "
            "data.cache_dir or the environment variable HF_HOME to a folder that can be written."
        ) from error
    return faces.to_iterable_dataset(num_shards=num_shards)
