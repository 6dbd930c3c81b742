"""The pixel grid of a portrait, fixed noise textures, and the soft-edged shapes that everything is drawn with."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

WIDTH, HEIGHT = 178, 218
EYE_X, EYE_Y, EYE_HALF = 89.0, 111.0, 19.0  # CelebA's alignment: eyes at (89 -+ 19, 111)
# Faces are rendered on a grid with cells of about 1.5 pixels and enlarged: faster, and as sharp as resized photographs.
# All lengths are pixels of the final image; only slices count cells of the grid.
COLUMNS, ROWS = 119, 146
CELL = WIDTH / COLUMNS


def _smooth_noise(noise: np.ndarray, rows: float, columns: float) -> np.ndarray:
    """Periodic Gaussian noise of unit variance, blurred with these standard deviations in pixels."""
    fy, fx = np.fft.fftfreq(noise.shape[0])[:, None], np.fft.rfftfreq(noise.shape[1])[None, :]
    blur = np.exp(-2 * math.pi**2 * (np.square(fy * rows) + np.square(fx * columns)))
    smooth = np.fft.irfft2(np.fft.rfft2(noise) * blur, noise.shape)
    return (smooth / smooth.std()).astype(np.float32)


# Computed once and read at random offsets; computing new ones for each face would take a quarter of its time.
NOISE = np.random.default_rng(1).standard_normal((512, 512), dtype=np.float32)
CLOUDS, PATCHES = _smooth_noise(NOISE, 2.7, 2.7), _smooth_noise(NOISE, 12, 12)
_STRANDS = _smooth_noise(NOISE[:128].reshape(64, 1024), 2, 1).ravel()  # small enough for a core's cache
COLUMN = ((np.arange(COLUMNS, dtype=np.float32) + 0.5) * CELL - 0.5)[None, :]
ROW = ((np.arange(ROWS, dtype=np.float32) + 0.5) * (HEIGHT / ROWS) - 0.5)[:, None]


def coverage(distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """Coverage in [0, 1] of a shape from its signed distance in pixels (negative inside), soft-edged."""
    t = distance * (-0.5 / softness)
    t += 0.5
    t.clip(0, 1, out=t)
    return t * t * (3 - 2 * t) if softness > 2 else t  # smoothstep for wide edges; invisible on narrow ones


def ridge(d: np.ndarray) -> np.ndarray:
    """About exp(-d^2), with compact support and a third of its cost."""
    return np.square(np.square((1 - np.square(d * 0.5)).clip(0, 1)))


def bump(x: np.ndarray, y: np.ndarray, x0: float, y0: float, rx: float, ry: float) -> np.ndarray:
    """Hill of height 1 with radii (rx, ry), about exp(-dx^2 - dy^2)."""
    q = np.square((x - x0) * (0.5 / rx))
    q += np.square((y - y0) * (0.5 / ry))
    np.subtract(1, q, out=q)
    q.clip(0, 1, out=q)
    q *= q
    q *= q
    return q


def hills(x: np.ndarray, y: np.ndarray, parameters: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Sum of hills like `bump`, each given by x0, y0, rx, ry and its height."""
    x0, y0, rx, ry, height = np.array(parameters, np.float32).T[:, :, None, None]
    return (bump(x, y, x0, y0, rx, ry) * height).sum(axis=0)


def rounded_radius(x2: np.ndarray, y2: np.ndarray, square: float) -> np.ndarray:
    """Radius, 1 on the outline, from squared coordinates: circle for square = 0, |x|^4 + |y|^4 = 1 for 1."""
    return np.sqrt(np.sqrt(np.square(x2 + y2) - x2 * y2 * (2 * square)))


def rgb(color: Iterable[float]) -> np.ndarray:
    """sRGB triple in [0, 1] to linear light, (3, 1, 1) float32, with gamma 2 as an approximation."""
    return np.array([[[min(max(level, 0.01), 1.0) ** 2]] for level in color], np.float32)


def blend(image: np.ndarray, color: np.ndarray, mask: np.ndarray) -> None:
    """Blends a color (3, 1, 1) or a field (3, h, w) into the planar image (3, h, w) in place."""
    change = color - image
    change *= mask
    image += change


def strand_noise(across: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Oriented noise of about unit variance: varies over 2 pixels of `across`, over 12 of `along`."""
    # `_STRANDS` has 64 x 1024 values; the masks repeat it periodically.
    row, column = (along * 0.5).astype(np.int32) & 63, (across * 1.4).astype(np.int32) & 1023
    return _STRANDS.take((row << 10) + column)
