"""Encoded bytes to pixels: decodes, crops and resizes one image; `normalize`, the one way to [-1, 1].

Not here: where the bytes come from (`sources`), the flip and the batches (`data`).
"""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# What sets of photographs hold. Pillow knows more formats; some of them start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_MAX_PIXELS = 64_000_000  # 192 MB decoded; Pillow itself only warns up to 179 Mpx
_MIN_SIDE_PX = 16  # smaller images are spacers and tracking pixels


class DataError(RuntimeError):
    """The data cannot be had: a source that does not answer, a faulty disk, too many unreadable images."""


class BadImage(ValueError):
    """A row that cannot become pixels; the message is the reason."""


def normalize(pixels_uint8: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Maps uint8 [0, 255] to [-1, 1] on the tensor's device: x / 127.5 - 1, computed in float32; any shape.

    Raises:
        TypeError: The input is not uint8, so it has been normalized before.
    """
    if pixels_uint8.dtype != torch.uint8:
        raise TypeError(f"normalize takes uint8, got {pixels_uint8.dtype}: pixels are normalized exactly once.")
    return pixels_uint8.to(torch.float32).div_(127.5).sub_(1.0).to(dtype)


def denormalize(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `normalize`: clamps to [-1, 1], rounds to uint8 [0, 255]."""
    return x.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)


def decode_image(data: bytes, crop_px: int | None, resolution: int) -> np.ndarray:
    """Decodes an encoded image to a square of RGB.

    The first frame, turned upright by its EXIF orientation, is cropped to a centred square of `crop_px` (the
    largest one where that is None or more than the image has), converted to 8-bit RGB (transparency over
    white, no colour management), and resized with the antialiased bicubic filter.

    Returns:
        (resolution, resolution, 3), uint8.

    Raises:
        BadImage: No image of a known format, cut short, a side below 16 pixels, or more than 64 megapixels by
            the header (refused before anything is decoded).
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS or min(width, height) < _MIN_SIDE_PX:
                raise BadImage(f"{width}x{height}: below {_MIN_SIDE_PX} a side or above {_MAX_PIXELS} pixels")
            ImageOps.exif_transpose(image, in_place=True)
            width, height = image.size
            side = min(crop_px or width, width, height)
            left, top = (width - side) // 2, (height - side) // 2
            square = np.array(_to_rgb(image.crop((left, top, left + side, top + side))))
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, ...
        raise BadImage(f"{type(error).__name__}: {error}") from error
    # For uint8 in channels_last this is Pillow's bicubic filter within 2 levels, in a quarter of its time.
    pixels = torch.from_numpy(square)[None].permute(0, 3, 1, 2)
    pixels = torch.nn.functional.interpolate(pixels, (resolution,) * 2, mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
