"""Encoded images for the tests of the data: coded ones, unusual ones, corrupt ones."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

SIZE = 24  # pixels; decode_image takes 16 or more


def image_bytes(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def coded_image(number: int) -> Image.Image:
    """Red and green hold the number; blue is 255 in the left half, so that a flip shows."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = number % 256, number // 256
    pixels[:, : SIZE // 2, 2] = 255
    return Image.fromarray(pixels)


def numbers_and_flips(pixels: torch.Tensor) -> list[tuple[int, bool]]:
    """Reads `coded_image` back from (n, 3, SIZE, SIZE)."""
    return [(int(p[0, 9, 9]) + 256 * int(p[1, 9, 9]), int(p[2, 9, 2]) < 128) for p in pixels]


def halves(left, right, mode: str = "RGB", height: int = SIZE) -> Image.Image:
    image = Image.new(mode, (SIZE, height), left)
    image.paste(right, (SIZE // 2, 0, SIZE, height))
    return image


def palette_with_alpha() -> bytes:
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([0, 0, 255, 200, 0, 0])
    image.paste(1, (SIZE // 2, 0, SIZE, SIZE))
    return image_bytes(image, transparency=0)  # color 0, the left half, is transparent


def animation(file_format: str) -> bytes:
    frames = [halves((255, 0, 0), (0, 255, 0)), Image.new("RGB", (SIZE, SIZE), "blue")]
    return image_bytes(frames[0], file_format, save_all=True, append_images=frames[1:], duration=50)


def rotated_by_exif() -> bytes:
    """Stored on its side; orientation 6 asks for a quarter turn clockwise, which moves the bottom left."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = halves((250, 0, 0), (0, 0, 250), height=2 * SIZE)
    return image_bytes(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def cmyk_jpeg() -> bytes:
    return image_bytes(halves((255, 0, 0, 0), (0, 255, 0, 0), "CMYK"), "JPEG")


def gray_16_bit() -> bytes:
    levels = np.full((SIZE, SIZE), 100 * 257, np.uint16)
    levels[:, SIZE // 2 :] = 200 * 257
    return image_bytes(Image.fromarray(levels))


def broken_exif(file_format: str) -> bytes:
    return image_bytes(halves((250, 0, 0), (0, 0, 250)), file_format, exif=b"Exif\0\0no TIFF header", lossless=True)


def gray_32_bit(levels: tuple[int, int]) -> bytes:
    pixels = np.full((SIZE, SIZE), levels[0], np.int32)
    pixels[:, SIZE // 2 :] = levels[1]
    return image_bytes(Image.fromarray(pixels), "TIFF")


def png_header(width: int, height: int) -> bytes:
    """A PNG that states its size and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64))


JPEG = image_bytes(noise(64, 64), "JPEG")


WHITE = (255, 255, 255)


# Bytes, the left and right colors they must decode to, and the tolerance (JPEG, and CMYK's conversion).
READABLE = {
    "gray jpeg": (image_bytes(halves(60, 220, "L"), "JPEG"), (60,) * 3, (220,) * 3, 4),
    "cmyk jpeg": (cmyk_jpeg(), (0, 255, 255), (255, 0, 255), 8),
    "one bit": (image_bytes(halves(0, 1, "1")), (0, 0, 0), WHITE, 0),
    "16-bit gray png": (gray_16_bit(), (100,) * 3, (200,) * 3, 1),
    "alpha": (image_bytes(halves((9, 9, 9, 0), (9, 90, 200, 255), "RGBA")), WHITE, (9, 90, 200), 0),
    "gray alpha": (image_bytes(halves((0, 0), (50, 255), "LA")), WHITE, (50, 50, 50), 0),
    "palette with alpha": (palette_with_alpha(), WHITE, (200, 0, 0), 0),
    "animated gif": (animation("GIF"), (255, 0, 0), (0, 255, 0), 0),
    "animated webp": (animation("WEBP"), (255, 0, 0), (0, 255, 0), 40),
    "rotated by exif": (rotated_by_exif(), (250, 0, 0), (0, 0, 250), 8),
    "png with broken exif": (broken_exif("PNG"), (250, 0, 0), (0, 0, 250), 0),
    "webp with broken exif": (broken_exif("WEBP"), (250, 0, 0), (0, 0, 250), 2),
    "32-bit tiff with 8-bit levels": (gray_32_bit((60, 220)), (60,) * 3, (220,) * 3, 0),
    "32-bit tiff with 16-bit levels": (gray_32_bit((100 * 257, 200 * 257)), (100,) * 3, (200,) * 3, 0),
    "avif": (image_bytes(halves((250, 0, 0), (0, 0, 250)), "AVIF", quality=95), (250, 0, 0), (0, 0, 250), 12),
    "jpeg 2000": (image_bytes(halves((250, 0, 0), (0, 0, 250)), "JPEG2000"), (250, 0, 0), (0, 0, 250), 2),
}


UNREADABLE = {
    "null": None,
    "empty": b"",
    "text": b"<html><body>404 Not Found</body></html>",
    "truncated jpeg": JPEG[: len(JPEG) // 2],
    "cut header": JPEG[:10],
    "truncated png": image_bytes(noise(64, 64))[:900],
    "1x1": image_bytes(Image.new("RGB", (1, 1))),
    "narrow": image_bytes(Image.new("RGB", (500, 3))),
    "81 megapixels": png_header(9000, 9000),
    "196 megapixels": png_header(14000, 14000),
    "floating point": image_bytes(Image.new("F", (SIZE, SIZE), 0.5), "TIFF"),
    "not a photograph": image_bytes(Image.new("RGB", (SIZE, SIZE)), "EPS"),
    "random bytes": np.random.default_rng(0).bytes(500),
    "32-bit levels": gray_32_bit((0, 70_000)),
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9",
    "truncated webp": image_bytes(noise(64, 64), "WEBP")[:300],
    "truncated tiff": image_bytes(noise(64, 64), "TIFF")[:500],
    "flipped bits": bytes(255 - byte for byte in JPEG),
}
