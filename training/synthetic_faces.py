"""Writes synthetic faces as image files, so that every command can be tried without a data set.

python -m training.synthetic_faces --output faces --num-images 200
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from training.cli import add_option, positive_int, run

FIRST_SEED = 2_000_000_000  # configurations train on the faces from seed 0 and validate on those from 1,000,000,000


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.synthetic_faces", description="Write synthetic faces as JPEG files of 178x218 pixels."
    )
    add_option(parser, "--output", required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--num-images", type=positive_int, required=True, metavar="N", help="number of faces")
    parser.add_argument(
        "--first-seed",
        type=int,
        default=FIRST_SEED,
        metavar="N",
        help="seed of the first face (default: %(default)s, beyond those that configurations train and validate on)",
    )
    return parser


def write_faces(folder: Path, seeds: Iterable[int]) -> None:
    """Write the faces of `seeds` as `synthetic_<seed>.jpg`; the folder is created."""
    from PIL import Image

    from training.data.synthetic_faces.render import render_face

    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        Image.fromarray(render_face(seed)).save(folder / f"synthetic_{seed:08d}.jpg", quality=95)


def _write(arguments: argparse.Namespace) -> None:
    if arguments.first_seed < 0:
        raise ValueError(f"--first-seed must be at least 0, got {arguments.first_seed}.")
    write_faces(arguments.output, range(arguments.first_seed, arguments.first_seed + arguments.num_images))
    print(f"{arguments.output}: {arguments.num_images} images")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_write, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
