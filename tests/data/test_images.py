"""Decoding, normalization and augmentation of images."""

import math

import numpy as np
import pytest
import torch
from encoded_images import READABLE, SIZE, UNREADABLE, image_bytes, noise
from PIL import Image

from training.data.images import CorruptImage, decode_image, denormalize, normalize, random_affine


def test_normalize_maps_bytes_to_one_range_exactly_once():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    levels = levels.contiguous(memory_format=torch.channels_last)
    pixels = normalize(levels)
    assert (pixels.min(), pixels.max(), pixels.dtype) == (-1.0, 1.0, torch.float32)
    assert torch.allclose(pixels, torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16), atol=1e-6)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(denormalize(pixels), levels)
    assert torch.equal(denormalize(torch.tensor([-7.0, 7.0])), torch.tensor([0, 255], dtype=torch.uint8))
    with pytest.raises(TypeError, match="exactly once"):
        normalize(pixels)


@pytest.mark.parametrize(
    ("size", "crop_px", "resolution", "box"),
    [
        ((178, 218), 178, 256, (0, 20, 178, 198)),
        ((178, 218), None, 64, (0, 20, 178, 198)),
        ((178, 218), 120, 120, (29, 49, 149, 169)),
        ((101, 78), None, 64, (11, 0, 89, 78)),
        ((100, 150), 178, 256, (0, 25, 100, 125)),
    ],
)
def test_geometry_is_a_center_crop_and_pillows_resize(size, crop_px, resolution, box):
    image = noise(*size)
    expected = image.crop(box).resize((resolution, resolution), Image.Resampling.BICUBIC)
    got = decode_image(image_bytes(image), crop_px, resolution)
    assert (got.shape, got.dtype) == ((resolution, resolution, 3), np.uint8)
    difference = np.abs(got.astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 2  # on noise; torch and Pillow round the filter's weights differently
    assert difference.mean() < 0.02


@pytest.mark.parametrize("name", READABLE)
def test_unusual_images_are_decoded(name):
    encoded, left, right, tolerance = READABLE[name]
    pixels = decode_image(encoded, None, SIZE).astype(int)
    for column, color in ((3, left), (SIZE - 4, right)):
        assert np.abs(pixels[SIZE // 2, column] - color).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty", "not an image"),
        ("text", "not an image"),
        ("truncated jpeg", "truncated"),
        ("cut header", r"not an image|truncated|Truncated"),
        ("truncated png", r"truncated|Truncated"),
        ("1x1", "1x1: at least 16x16"),
        ("narrow", "500x3: at least 16x16"),
        (
            "81 megapixels",
            "9000x9000: .* at most 64000000",
        ),  # by its header: the data would be too short as well
        ("196 megapixels", "196000000 pixels"),
        ("floating point", "no known range"),
        ("random bytes", "not an image"),
        ("32-bit levels", "32-bit pixels from 0 to 70000 have no known range"),
        ("lfs pointer", "run `git lfs pull`"),
        ("truncated webp", "."),
        ("truncated tiff", "."),
        ("flipped bits", "not an image"),
        ("not a photograph", "not an image"),
    ],
)
def test_corrupt_images_are_refused_with_a_reason(name, reason):
    with pytest.raises(CorruptImage, match=reason):
        decode_image(UNREADABLE[name], None, SIZE)


def test_random_affine_samples_the_image_at_transformed_coordinates():
    size = 64
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    image = torch.stack([rows, columns, rows * columns])[None] * 0.5
    halves = torch.full((1, 5), 0.5)  # no change
    torch.testing.assert_close(random_affine(image, halves), image, atol=1e-5, rtol=0)
    rotated, scaled, right = (halves.clone() for _ in range(3))
    for uniform, place in ((rotated, 0), (scaled, 1), (right, 2)):
        uniform[0, place], uniform[0, 4] = 1.0, 1.0
    inside = slice(12, -12)  # away from what is reflected
    expected = {
        "rotated": (rotated, math.cos(0.1) * columns - math.sin(0.1) * rows),
        "scaled": (scaled, 1.1 * columns),
        "right": (right, columns + (size / 16) * 2 / (size - 1)),
    }
    for name, (uniform, where) in expected.items():
        found = random_affine(image, uniform)[0, 1, inside, inside]
        torch.testing.assert_close(found, 0.5 * where[inside, inside], atol=2e-3, rtol=0, msg=name)
    pixels = torch.rand(3, 3, size, size).contiguous(memory_format=torch.channels_last) * 4 - 2
    transformed = random_affine(pixels, torch.rand(3, 5))
    assert transformed.is_contiguous(memory_format=torch.channels_last) and transformed.abs().max() <= 1
