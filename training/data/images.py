"""Encoded bytes to pixels: decodes, crops and resizes one image; `normalize`, the one way to [-1, 1]; `random_affine`.

Not here: where the bytes come from (`sources`), the flip and the batches (`data`).
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from training.cli import UserError

# What sets of photographs hold. Pillow knows more formats; some of them start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_MAX_PIXELS = 64_000_000  # 192 MB decoded; Pillow itself only warns up to 179 Mpx
_SHIFT, _TURN, _SCALE = 1 / 16, 0.1, 0.1  # of the side, in radians, of the size
_MIN_SIDE_PX = 16  # smaller images are spacers and tracking pixels


class DataError(UserError):
    """The data cannot be had: a source that does not answer, a faulty disk, too many unreadable images."""


class CorruptImage(ValueError):
    """A row that cannot become pixels; the message is the reason."""


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


def random_affine(pixels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Shifts, turns and scales images a little, each on its own: a face stays a face.

    By at most 1/16 of the side, 6 degrees and a tenth of the size; slight moves come as often as wide ones. What comes
    in from outside is reflected; bicubic, because averaging neighbours would blur what is to be learned.

    Args:
        pixels: (N, 3, S, S) in [-1, 1]; the result is clamped to that.
        numbers: (N, 5), uniform in [0, 1): angle, scale, right, down, and the share of the four that is used.
    """
    share = numbers[:, 4]
    angle, scale, right, down = (share * (2 * numbers[:, place] - 1) for place in range(4))
    angle, scale = _TURN * angle, 1 + _SCALE * scale
    right, down = 2 * _SHIFT * right, 2 * _SHIFT * down  # affine_grid's image is 2 wide
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3).to(pixels)
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    sampled = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    if pixels.is_contiguous(memory_format=torch.channels_last):
        sampled = sampled.contiguous(memory_format=torch.channels_last)
    return sampled.clamp(-1.0, 1.0)


def decode_image(data: bytes, crop_px: int | None, resolution: int) -> np.ndarray:
    """Decodes an encoded image to a square of RGB.

    The first frame, turned upright by its EXIF orientation, is cropped to a centred square of `crop_px` (the
    largest one where that is None or more than the image has), converted to 8-bit RGB (transparency over
    white, no colour management), and resized with the antialiased bicubic filter.

    Returns:
        (resolution, resolution, 3), uint8.

    Raises:
        CorruptImage: No image of a known format, cut short, a side below 16 pixels, or more than 64 megapixels by
            the header (refused before anything is decoded).
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS or min(width, height) < _MIN_SIDE_PX:
                raise CorruptImage(f"{width}x{height}: below {_MIN_SIDE_PX} a side or above {_MAX_PIXELS} pixels")
            ImageOps.exif_transpose(image, in_place=True)
            width, height = image.size
            side = min(crop_px or width, width, height)
            left, top = (width - side) // 2, (height - side) // 2
            square = np.array(_to_rgb(image.crop((left, top, left + side, top + side))))
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:
        raise CorruptImage("not an image of a known format") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, ...
        raise CorruptImage(f"{type(error).__name__}: {error}") from error
    # For uint8 in channels_last this is Pillow's bicubic filter within 2 levels, in a quarter of its time.
    pixels = torch.from_numpy(square)[None].permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, (resolution,) * 2, mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise CorruptImage("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
