"""Aligns photographs of faces like CelebA: rotates, scales and crops each so that the eyes are at fixed places.

    pip install facenet-pytorch==2.5.3  # or this project with its extra `align`
    python -m training.align photographs faces         # writes faces/*.png and faces/align_report.csv
    python -m training.align photographs --check       # writes nothing: is this folder aligned already?

The detector is MTCNN (Zhang et al. 2016), whose weights (2 MB, MIT license) come with the package. A square of `--size`
pixels is the center square of a CelebA image (178 of 178x218 pixels), so `data.crop_px` can stay null.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.cli import UserError, add_option, positive_int, run, select_device
from training.io import printable
from training.reconstruct import list_images

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

REPORT = "align_report.csv"
# CelebA's eyes in its 178x218 images, relative to the center square.
LEFT_EYE, RIGHT_EYE = ((89 - 19) / 178, (111 - 20) / 178), ((89 + 19) / 178, (111 - 20) / 178)
_ALIGNED = 0.03  # eyes of an aligned folder are this close to their places, fraction of the size (CelebA's own: 0.01)
_MAX_DETECTION_PX = 1024  # larger photographs are searched at this size
_MIN_DETECTION_PX = 20  # the detector's smallest face; it fails where the photograph is smaller
_MIN_PROBABILITY = 0.95
_MAX_OUTSIDE = 0.1  # fraction of the square that may lie outside of the photograph, which is continued by reflection
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Face:
    """The largest face of a photograph.

    Attributes:
        left_eye, right_eye: (x, y) in pixels; left in the image.
        probability: Of being a face.
        others: Other faces that were found.
    """

    left_eye: tuple[float, float]
    right_eye: tuple[float, float]
    probability: float
    others: int

    @property
    def eye_distance(self) -> float:
        """In pixels."""
        (x0, y0), (x1, y1) = self.left_eye, self.right_eye
        return ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.align", description="Align photographs of faces like CelebA."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="photographs; subfolders are searched, too")
    parser.add_argument("output", metavar="OUT", type=Path, nargs="?", help="folder for the aligned faces")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; report whether the folder is aligned (exit code 0) or not (1)",
    )
    parser.add_argument(
        "--size", type=positive_int, default=256, metavar="N", help="size of the faces, pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--min-eye-distance",
        type=positive_int,
        metavar="N",
        help="drop faces whose eyes are closer, pixels (default: half of the distance in the output)",
    )
    parser.add_argument("--max-images", type=positive_int, metavar="N", help="first N photographs only")
    add_option(parser, "--device")
    return parser


def align_face(image: Image.Image, face: Face, size: int) -> tuple[Image.Image, float]:
    """Rotate, scale and crop a photograph so that the eyes are at `LEFT_EYE` and `RIGHT_EYE`.

    Args:
        image: RGB.
        face: In it.
        size: Of the result, pixels.

    Returns:
        The square; the fraction of it that lies outside of the photograph and is reflected.
    """
    import numpy as np
    from PIL import Image

    # As complex numbers, source = a * target + b rotates, scales and shifts the target's pixels into the photograph.
    targets, eyes = (
        [complex(*point) for point in points] for points in ((LEFT_EYE, RIGHT_EYE), (face.left_eye, face.right_eye))
    )
    a = (eyes[1] - eyes[0]) / ((targets[1] - targets[0]) * size)
    if abs(a) > 1:  # reduced first, with a filter; the rotation below has none
        image = image.resize([max(1, round(side / abs(a))) for side in image.size], Image.Resampling.LANCZOS)
        eyes = [eye / abs(a) for eye in eyes]
        a /= abs(a)
    b = eyes[0] - a * targets[0] * size
    corners = [a * corner + b for corner in (0, size, size * 1j, size * (1 + 1j))]
    left, top = (int(min(values)) - 2 for values in ([c.real for c in corners], [c.imag for c in corners]))
    right, bottom = (int(max(values)) + 3 for values in ([c.real for c in corners], [c.imag for c in corners]))
    width, height = image.size
    rows, columns = np.arange(top, bottom), np.arange(left, right)
    pixels = np.asarray(image)[_reflected(rows, height)[:, None], _reflected(columns, width)[None]]
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
    b -= complex(left, top)
    coefficients = (a.real, -a.imag, b.real, a.imag, a.real, b.imag)
    transform = (size, size), Image.Transform.AFFINE, coefficients
    square = Image.fromarray(pixels).transform(*transform, Image.Resampling.BICUBIC)
    mask = Image.fromarray(inside.astype(np.uint8) * 255).transform(*transform, Image.Resampling.NEAREST)
    return square, 1 - float(np.asarray(mask).mean()) / 255


def _reflected(indices: np.ndarray, length: int) -> np.ndarray:
    """Indices outside of 0 ... length - 1, reflected into that range."""
    indices = indices % (2 * length)
    return indices + (indices >= length) * (2 * length - 1 - 2 * indices)


class Detector:
    """Finds the largest face of a photograph."""

    def __init__(self, device: str | None) -> None:
        if importlib.util.find_spec("facenet_pytorch") is None:
            raise UserError("the detector is missing: pip install facenet-pytorch==2.5.3, or use the extra `align`.")
        from facenet_pytorch import MTCNN

        self._network = MTCNN(keep_all=True, device=select_device(device))

    def __call__(self, image: Image.Image) -> Face | None:
        """The largest face, or None."""
        scale = min(1.0, _MAX_DETECTION_PX / max(image.size))
        small = image.resize([max(1, round(side * scale)) for side in image.size]) if scale < 1 else image
        if min(small.size) < _MIN_DETECTION_PX:
            return None
        boxes, probabilities, points = self._network.detect(small, landmarks=True)
        if boxes is None:
            return None
        certain = [i for i, probability in enumerate(probabilities) if probability >= _MIN_PROBABILITY]
        if not certain:
            return None
        largest = max(certain, key=lambda i: (boxes[i][2] - boxes[i][0]) * (boxes[i][3] - boxes[i][1]))
        left, right = ((float(x) / scale, float(y) / scale) for x, y in points[largest][:2])
        return Face(left, right, float(probabilities[largest]), len(certain) - 1)


def _load(path: Path) -> Image.Image:
    """A photograph, upright, RGB.

    Raises:
        ValueError: It cannot be read.
    """
    from PIL import Image, ImageOps

    from training.data.images import FORMATS, to_rgb

    try:
        with Image.open(path, formats=FORMATS) as image:
            extrema = image.getextrema() if image.mode == "I" else None
            with contextlib.suppress(Exception):  # broken EXIF data: as in training, the photograph is not rotated
                image = ImageOps.exif_transpose(image)
            return to_rgb(image, extrema)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise ValueError(f"not readable ({error})") from error


def _align(arguments: argparse.Namespace) -> int:
    if (arguments.output is None) != arguments.check:
        raise ValueError("give the folder OUT for the aligned faces, or --check.")
    if not arguments.folder.is_dir():
        raise ValueError(f"{arguments.folder} is not a folder: give the folder of the photographs.")
    files = list_images([arguments.folder])[: arguments.max_images]
    if arguments.output is not None and arguments.output.resolve().is_relative_to(arguments.folder.resolve()):
        raise ValueError(f"{arguments.output} lies in {arguments.folder}, whose images are read: give another OUT.")
    detect, size = Detector(arguments.device), arguments.size
    min_distance = arguments.min_eye_distance or (RIGHT_EYE[0] - LEFT_EYE[0]) * size / 2
    rows, deviations, written = [], [], set()
    for path in files:
        name = path.relative_to(arguments.folder)
        row = {"file": printable(str(name)), "result": "", "probability": "", "eye_distance": "", "other_faces": ""}
        rows.append(row)
        try:
            image = _load(path)
        except ValueError as error:
            row["result"] = str(error)
            continue
        face = detect(image)
        if face is None:
            row["result"] = "no face"
            continue
        row |= {"probability": f"{face.probability:.3f}", "eye_distance": f"{face.eye_distance:.1f}"}
        row["other_faces"] = str(face.others)
        deviations.append(_deviation(image, face))
        if arguments.check:
            continue
        if face.eye_distance < min_distance:
            row["result"] = "too small"
            continue
        square, outside = align_face(image, face, size)
        if outside > _MAX_OUTSIDE:
            row["result"] = "cut off"
            continue
        row["result"] = "aligned"
        target = arguments.output / name.with_suffix(".png")
        if target in written:  # a.jpg and a.png
            target = arguments.output / f"{name}.png"
        written.add(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        square.save(target)
    is_aligned = False
    if deviations:
        median = sorted(deviations)[len(deviations) // 2]
        is_aligned = median <= _ALIGNED
        state = "aligned" if is_aligned else "not aligned"
        print(
            f"{arguments.folder}: {state} like CelebA, eyes {median:.1%} of the size from their places "
            f"(median of {len(deviations)} faces)"
        )
    if not arguments.check:
        counts = Counter(row["result"].partition(" (")[0] for row in rows)
        print(f"{len(rows)} photographs: " + ", ".join(f"{count} {result}" for result, count in counts.most_common()))
        arguments.output.mkdir(parents=True, exist_ok=True)
        with (arguments.output / REPORT).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif not deviations:
        raise ValueError(f"{arguments.folder}: no face was found in {len(files)} photographs.")
    return 0 if is_aligned or not arguments.check else 1


def _deviation(image: Image.Image, face: Face) -> float:
    """How far the eyes are from CelebA's in the center square of a photograph, as a fraction of its size."""
    size = min(image.size)
    left, top = ((length - size) / 2 for length in image.size)
    pairs = ((face.left_eye, LEFT_EYE), (face.right_eye, RIGHT_EYE))
    return max(abs(complex((x - left) / size - u, (y - top) / size - v)) for (x, y), (u, v) in pairs)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return run(_align, arguments)


if __name__ == "__main__":
    sys.exit(main())
