"""Encoded bytes to pixels: `decode_image`; `normalize` to [-1, 1] and back; the augmentation `random_affine`."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from training.cli import UserError

Image.init()  # registers all formats
# Formats of photographs. Pillow knows more; some of them start other programs (EPS).
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000") if name in Image.OPEN
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_PIXELS = 64_000_000  # 192 MB decoded; Pillow itself only warns up to 179 Mpx
_MIN_SIZE_PX = 16  # smaller images are spacers and tracking pixels
_MAX_SHIFT, _MAX_ANGLE, _MAX_SCALE = 1 / 16, 0.1, 0.1  # of the resolution, in radians, relative


class DataError(UserError):
    """The data cannot be read: a source that does not answer, a faulty disk, too many corrupt images."""


class CorruptImage(ValueError):
    """An example that cannot be decoded; the message is the reason."""


def normalize(pixels_uint8: torch.Tensor) -> torch.Tensor:
    """Maps uint8 [0, 255] to float32 [-1, 1] on the tensor's device: x / 127.5 - 1; any shape.

    Raises:
        TypeError: The input is not uint8, so it has been normalized before.
    """
    if pixels_uint8.dtype != torch.uint8:
        raise TypeError(f"normalize takes uint8, got {pixels_uint8.dtype}: pixels are normalized exactly once.")
    return pixels_uint8.to(torch.float32).div_(127.5).sub_(1.0)


def denormalize(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `normalize`: clamps to [-1, 1], rounds to uint8 [0, 255]."""
    return x.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)


def random_affine(pixels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Rotates, scales and shifts each image by a small random amount: up to 0.1 radian, 10 % and 1/16 of its size.

    Pixels from outside of the image are reflected; bicubic, because bilinear interpolation would blur the target.

    Args:
        pixels: (N, 3, S, S) in [-1, 1]; the result is clamped to that.
        uniform: (N, 5) random numbers in [0, 1): angle, scale, right, down, and a strength that multiplies the four,
            so that small changes are as frequent as large ones.
    """
    strength = uniform[:, 4]
    angle, scale, right, down = (strength * (2 * uniform[:, i] - 1) for i in range(4))
    angle, scale = _MAX_ANGLE * angle, 1 + _MAX_SCALE * scale
    right, down = 2 * _MAX_SHIFT * right, 2 * _MAX_SHIFT * down  # the coordinates of affine_grid span 2
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3).to(pixels)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    sampled = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    if pixels.is_contiguous(memory_format=torch.channels_last):
        sampled = sampled.contiguous(memory_format=torch.channels_last)
    return sampled.clamp(-1.0, 1.0)


def decode_image(data: bytes, crop_px: int | None, resolution: int) -> np.ndarray:
    """Decodes an encoded image to a square of RGB.

    The first frame is rotated upright by its EXIF orientation (ignored where the EXIF data is broken), center-cropped
    to `crop_px` (the largest square where that is None or more than the image has), converted to 8-bit RGB
    (transparency over white, no color management), and resized with an antialiased bicubic filter.

    Returns:
        (resolution, resolution, 3), uint8.

    Raises:
        CorruptImage: No image of a known format, truncated, width or height below 16 pixels, more than 64 megapixels
            by the header (refused before anything is decoded), or pixels without a known range.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS or min(width, height) < _MIN_SIZE_PX:
                raise CorruptImage(
                    f"{width}x{height}: at least {_MIN_SIZE_PX}x{_MIN_SIZE_PX} and at most {_MAX_PIXELS} pixels are supported"
                )
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF raises SyntaxError, struct.error, KeyError, ...
                ImageOps.exif_transpose(image, in_place=True)
            width, height = image.size
            size = min(crop_px or width, width, height)
            left, top = (width - size) // 2, (height - size) // 2
            square = image.crop((left, top, left + size, top + size))
            square = np.array(to_rgb(square, image.getextrema() if image.mode == "I" else None))
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:
        raise CorruptImage(_unidentified(data)) from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, ...
        raise CorruptImage(f"{type(error).__name__}: {error}") from error
    # For uint8 in channels_last this is Pillow's bicubic filter within 2 levels, in a quarter of its time.
    pixels = torch.from_numpy(square)[None].permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, (resolution,) * 2, mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def decode_images(encoded: Sequence[bytes], crop_px: int | None, resolution: int) -> list["np.ndarray | CorruptImage"]:
    """Decodes several images; in place of a corrupt one, the error of `decode_image`."""
    results: list[np.ndarray | CorruptImage] = []
    for data in encoded:
        try:
            results.append(decode_image(data, crop_px, resolution))
        except CorruptImage as error:
            results.append(error)
    return results


def _unidentified(data: bytes) -> str:
    if not data:
        return "not an image: the file is empty"
    if data.startswith(LFS_POINTER):
        return "not an image but a Git LFS pointer: run `git lfs pull`"
    return "not an image of a known format"


def to_rgb(image: Image.Image, extrema: tuple[int, int] | None) -> Image.Image:
    """Converts to 8-bit RGB; `extrema` are the lowest and the highest level of the full image where it has 32 bits.

    Raises:
        CorruptImage: Pixels without a known range.
    """
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        lowest, highest = extrema or (0, 65535)
        if lowest < 0 or highest > 65535:
            raise CorruptImage(f"32-bit pixels from {lowest} to {highest} have no known range; use 8 or 16 bits")
        gray = np.asarray(image).astype(np.float32) / (1.0 if highest <= 255 else 257.0)
        return Image.fromarray(gray.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise CorruptImage("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
