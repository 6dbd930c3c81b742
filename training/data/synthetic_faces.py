"""The embedded default dataset: portraits drawn by numpy from a seed, so that training needs no download.

A head surface (a rounded solid with a relief of brows, nose, lips and chin) is turned by a small pose, lit by
a key light and a sky, and combined with hair, beard, glasses, clothes and a background, all drawn at random
from the seed. Frame and alignment are those of CelebA's aligned images (178 x 218, eyes near (70, 111) and
(108, 111)), so that configurations for CelebA apply unchanged.

This is not a model of people and no substitute for photographs: it exercises the training path with skin,
edges, texture, colour and light; figures reached on it say nothing about real faces. Contact sheet:

    python -m training.synthetic_faces --out grid.png --rows 4 --columns 8 --first-seed 0
"""

import argparse
import hashlib
import io
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import datasets

WIDTH, HEIGHT = 178, 218
_EYE_X, _EYE_Y, _EYE_HALF = 89.0, 111.0, 19.0  # CelebA's alignment: eyes at (89 -+ 19, 111)
# Drawn on a grid of about 1.5 pixels and enlarged, which is faster and no softer than photographs that were
# resized on their way. All lengths below are pixels of the frame; only slices count cells of the grid.
_COLUMNS, _ROWS = 119, 146
_STEP = WIDTH / _COLUMNS

# Albedo in sRGB; light is added on squared values (gamma 2), an inexpensive stand-in for linear light.
_SKIN = ((0.97, 0.84, 0.77), (0.94, 0.78, 0.68), (0.89, 0.70, 0.57), (0.82, 0.62, 0.47), (0.70, 0.50, 0.37),
         (0.57, 0.39, 0.28), (0.44, 0.29, 0.21), (0.33, 0.21, 0.16))  # fmt: skip
_HAIR = ((0.07, 0.06, 0.06), (0.16, 0.10, 0.07), (0.27, 0.17, 0.11), (0.40, 0.25, 0.15), (0.56, 0.38, 0.20),
         (0.80, 0.64, 0.40), (0.46, 0.19, 0.09), (0.45, 0.14, 0.24), (0.58, 0.57, 0.57),
         (0.84, 0.83, 0.82))  # fmt: skip
_IRIS = ((0.22, 0.12, 0.06), (0.33, 0.20, 0.10), (0.40, 0.33, 0.16), (0.30, 0.42, 0.28), (0.33, 0.48, 0.60),
         (0.45, 0.52, 0.56))  # fmt: skip


class _HairStyle(NamedTuple):
    """Hair in pixels of the face, whose origin lies between the eyes, y down."""

    top: float  # thickness above the skull
    side: float  # thickness beside it
    end: float  # where the sides stop
    line: float  # the hairline in the middle
    arch: float  # how far the hairline falls (negative: recedes) towards the temples
    slope: float  # slant of the hairline, and how far the parting lies aside
    gap: float  # half-width of the opening for a face of half-width 50
    flare: float  # widening per pixel below the eyes
    curl: float  # 0 straight .. 1 curls
    feminine: float  # weight in feminine faces; what is missing to 1 is that in masculine ones


_HAIR_STYLES = (
    _HairStyle(2, 1, 4, -47, 4, 0.0, 47, 0.0, 0.0, 0.05),  # cropped
    _HairStyle(8, 4, 6, -43, 6, 0.1, 47, 0.0, 0.1, 0.08),  # short
    _HairStyle(13, 4, 8, -47, 5, 0.3, 47, 0.0, 0.1, 0.1),  # swept to a side
    _HairStyle(4, 4, 6, -58, -8, 0.0, 47, 0.0, 0.1, 0.0),  # receding
    _HairStyle(10, 7, 12, -43, 8, 0.1, 47, 0.0, 1.0, 0.3),  # short curls
    _HairStyle(18, 18, 26, -45, 9, 0.0, 47, 0.1, 1.0, 0.5),  # afro
    _HairStyle(8, 6, 12, -25, 2, 0.15, 46, 0.0, 0.1, 0.3),  # short with a fringe
    _HairStyle(4, 2, 4, -49, 7, 0.1, 47, 0.0, 0.0, 0.8),  # tied back
    _HairStyle(7, 8, 62, -20, 0, 0.05, 41, 0.05, 0.1, 0.95),  # bob with a fringe
    _HairStyle(7, 7, 150, -51, 19, 0.0, 42, 0.10, 0.1, 0.97),  # long, parted in the middle
    _HairStyle(9, 8, 150, -47, 12, 0.45, 43, 0.14, 0.4, 0.95),  # long, parted at a side
    _HairStyle(7, 9, 150, -20, 0, 0.0, 41, 0.12, 0.1, 0.97),  # long with a fringe
    _HairStyle(12, 13, 105, -45, 15, 0.2, 43, 0.20, 1.0, 0.9),  # long curls
)


def _smooth_noise(noise: np.ndarray, rows: float, columns: float) -> np.ndarray:
    """Periodic Gaussian noise of unit variance, blurred with these standard deviations in pixels."""
    fy, fx = np.fft.fftfreq(noise.shape[0])[:, None], np.fft.rfftfreq(noise.shape[1])[None, :]
    blur = np.exp(-2 * math.pi**2 * (np.square(fy * rows) + np.square(fx * columns)))
    smooth = np.fft.irfft2(np.fft.rfft2(noise) * blur, noise.shape)
    return (smooth / smooth.std()).astype(np.float32)


# Fixed textures, read at random offsets: fresh ones for every face would take a quarter of its time.
_NOISE = np.random.default_rng(1).standard_normal((512, 512), dtype=np.float32)
_CLOUDS, _PATCHES = _smooth_noise(_NOISE, 2.7, 2.7), _smooth_noise(_NOISE, 12, 12)
_STRANDS = _smooth_noise(_NOISE[:128].reshape(64, 1024), 2, 1).ravel()  # small enough for a core's cache
_COLUMN = ((np.arange(_COLUMNS, dtype=np.float32) + 0.5) * _STEP - 0.5)[None, :]
_ROW = ((np.arange(_ROWS, dtype=np.float32) + 0.5) * (HEIGHT / _ROWS) - 0.5)[:, None]


def _cover(distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """Coverage in [0, 1] of a shape from its signed distance in pixels (negative inside), soft-edged."""
    t = distance * (-0.5 / softness)
    t += 0.5
    t.clip(0, 1, out=t)
    return t * t * (3 - 2 * t) if softness > 2 else t  # a narrow edge shows no difference, and there are many


def _ridge(d: np.ndarray) -> np.ndarray:
    """About exp(-d^2), with compact support and a third of its cost."""
    return np.square(np.square((1 - np.square(d * 0.5)).clip(0, 1)))


def _bump(x: np.ndarray, y: np.ndarray, x0: float, y0: float, rx: float, ry: float) -> np.ndarray:
    """Hill of height 1 with radii (rx, ry), about exp(-dx^2 - dy^2)."""
    q = np.square((x - x0) * (0.5 / rx))
    q += np.square((y - y0) * (0.5 / ry))
    np.subtract(1, q, out=q)
    q.clip(0, 1, out=q)
    q *= q
    q *= q
    return q


def _hills(x: np.ndarray, y: np.ndarray, hills: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Sum of hills like `_bump`, each given by x0, y0, rx, ry and its height."""
    x0, y0, rx, ry, height = np.array(hills, np.float32).T[:, :, None, None]
    return (_bump(x, y, x0, y0, rx, ry) * height).sum(axis=0)


def _round(x2: np.ndarray, y2: np.ndarray, square: float) -> np.ndarray:
    """Radius, 1 on the outline, from squared coordinates: circle for square = 0, |x|^4 + |y|^4 = 1 for 1."""
    return np.sqrt(np.sqrt(np.square(x2 + y2) - x2 * y2 * (2 * square)))


def _rgb(colour: Iterable[float]) -> np.ndarray:
    """sRGB triple to the scale in which light is added, (3, 1, 1) float32."""
    return np.array([[[min(max(level, 0.01), 1.0) ** 2]] for level in colour], np.float32)


def _paint(image: np.ndarray, colour: np.ndarray, mask: np.ndarray) -> None:
    """Blends a colour (3, 1, 1) or a field (3, h, w) into the planar image (3, h, w) in place."""
    change = colour - image
    change *= mask
    image += change


def _strands(across: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Oriented noise of about unit variance: varies over 2 pixels of `across`, over 12 of `along`."""
    row, column = (along * 0.5).astype(np.int32) & 63, (across * 1.4).astype(np.int32) & 1023
    return _STRANDS.take((row << 10) + column)


class _Scene:
    """What all parts of a portrait share: pose, colours, light. Lengths are pixels of the frame."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)  # numpy's takes ten times longer for a single number
        self.feminine = min(max(rng.gauss(rng.choice((0.2, 0.8)), 0.12), 0.0), 1.0)
        self.age = rng.betavariate(1.3, 2.2)
        self.clouds, self.grain = self.texture(_CLOUDS), self.texture(_NOISE)

        # The eyes' places on the turned head are found on the line y = 0; scale, roll and shift align them.
        self.yaw, self.pitch = (s * min(max(rng.gauss(0, 1), -2.1), 2.1) for s in (0.2, 0.12))  # sines
        self.half_width = rng.gauss(50, 1.8) - 1.5 * self.feminine
        self.axis = -25 * self.yaw  # the middle of the skull, seen from between the eyes
        line = np.linspace(-45, 45, 181, dtype=np.float32)
        turned = self._turn(line, self._depth(line, 0.0))
        left, right = np.interp([-_EYE_HALF, _EYE_HALF], turned, line).tolist()
        scale = (2 * _EYE_HALF / (right - left)) ** 0.7 * rng.gauss(1, 0.03)
        middle, roll = (left + right) / 2, rng.gauss(0, 0.035)
        x0, y0 = rng.gauss(_EYE_X, 0.8), rng.gauss(_EYE_Y, 0.8)
        cos, sin = math.cos(roll) / scale, math.sin(roll) / scale
        dx, dy = _COLUMN - x0, _ROW - y0
        self.x, self.y = (dx * cos + middle) + dy * sin, dy * cos - dx * sin
        self.column, self.row = dx / scale + middle, dy / scale  # x and y but for the roll: mere lines
        depth = self._depth(self.column, self.row)
        self.u, self.v = self._turn(self.x, depth), self.y - (depth - 25) * (self.pitch * 1.5)
        reach = (right - middle) * scale
        self.eyes = [(x0 + e, y0 + e * math.sin(roll)) for e in (-reach, reach)]  # in the frame

        tone = rng.betavariate(0.9, 1.3) * 6.99
        between = zip(_SKIN[int(tone)], _SKIN[int(tone) + 1], strict=True)
        self.skin = _rgb(rng.gauss(a + (b - a) * (tone % 1), 0.018) for a, b in between)
        dark = tone > 3.5
        hair = [6, 4, 1, 0.3, 0.1, 0.2, 0.2, 0.1, 0, 0] if dark else [3, 4, 4, 3, 3, 3, 1, 0.2, 0, 0]
        hair[8:] = (sum(hair) * max(self.age - 0.45, 0) * share for share in (2.2, 1.3))  # grey, white
        tone = rng.gauss(1, 0.12)
        self.hair = _rgb(c * tone for c in rng.choices(_HAIR, hair)[0])
        iris = [0.7, 0.25, 0.05, 0, 0, 0] if dark else [0.2, 0.2, 0.15, 0.13, 0.2, 0.12]
        self.iris = _rgb(rng.choices(_IRIS, iris)[0])

        azimuth, elevation = rng.gauss(0, 0.7), rng.uniform(0.1, 0.8)
        flat = math.cos(elevation)
        # Towards the light: x, y, z (z is towards the camera).
        self.light = math.sin(azimuth) * flat, -math.sin(elevation), max(math.cos(azimuth), 0.2) * flat
        tint = 1 + rng.gauss(0, 0.1) * np.array([1, 0, -1])
        contrast, exposure = rng.uniform(0.4, 0.85), rng.uniform(1.0, 1.35)
        self.key = (tint * exposure * contrast * 1.4).astype(np.float32).reshape(3, 1, 1)
        self.ambient = ((2 - tint) * exposure * (1 - contrast)).astype(np.float32).reshape(3, 1, 1)

    def _depth(self, x: np.ndarray, y: np.ndarray | float) -> np.ndarray:
        """How far the face's surface stands before the axis about which the head turns."""
        return 27 * np.sqrt((1 - np.square((x - self.axis) * (1 / 54)) - np.square(y * (1 / 90))).clip(0.02))

    def _turn(self, x: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Place across the turned face: 0 on its axis of symmetry."""
        return (x - self.axis) * math.sqrt(1 - self.yaw**2) - depth * self.yaw

    def texture(self, tile: np.ndarray) -> np.ndarray:
        """A piece of a fixed texture, as large as the grid."""
        top, left = self.rng.randrange(512 - _ROWS), self.rng.randrange(512 - _COLUMNS)
        return tile[top : top + _ROWS, left : left + _COLUMNS]

    def colour(self, darkest: float, lightest: float, chroma: float) -> np.ndarray:
        """A random colour; `chroma` bounds how far it departs from grey."""
        rng = self.rng
        grey, chroma = rng.uniform(darkest, lightest), chroma * rng.random()
        return _rgb(grey * (1 - chroma * rng.random()) for _ in range(3))

    def diffuse(self, nx: np.ndarray, ny: np.ndarray | float) -> np.ndarray:
        """The key light's share on a rounded matt surface whose unit normal has these x and y components."""
        nz = np.sqrt((1 - np.square(nx) - np.square(ny)).clip(0.05))
        return (nx * self.light[0] + ny * self.light[1] + nz * self.light[2]).clip(0, 1)


def _background(s: _Scene) -> np.ndarray:
    """Planar image (3, rows, columns) of something out of focus."""
    rng, x, y = s.rng, _COLUMN, _ROW
    studio = rng.random() < 0.2
    first, second = (s.colour(0.8, 1, 0.05) if studio else s.colour(0.1, 1, 0.6) for _ in range(2))
    angle = rng.uniform(0, math.pi)
    ramp = (x - 89) * (math.sin(angle) / 240) + (y - 109) * (math.cos(angle) / 240) + 0.5
    image = first + (second - first) * ramp.clip(0, 1)
    kind = 0 if studio else rng.randrange(5)  # 0: the gradient alone
    if kind == 1 or kind == 4:  # large patches, or foliage
        for _ in range(3):
            patch = (0.7 * s.texture(_PATCHES)).clip(0, 1)
            _paint(image, s.colour(0.1, 1, 0.8), patch * rng.uniform(0.3, 0.9))
    if kind == 4:
        image *= (1 + rng.uniform(0.08, 0.25) * s.clouds).clip(0.1, 2)
    elif kind == 2:  # walls, windows, shelves
        for _ in range(rng.randrange(4, 9)):
            along, span = (x, WIDTH) if rng.random() < 0.6 else (y, HEIGHT)
            band = _cover(np.abs(along - rng.uniform(0, span)) - rng.uniform(4, 35), rng.uniform(2, 8))
            _paint(image, s.colour(0.05, 0.95, 0.5), band * rng.uniform(0.3, 0.9))
    elif kind == 3:  # lights
        for _ in range(rng.randrange(6, 18)):
            top, left, strength = rng.randrange(-8, 120), rng.randrange(-8, 110), rng.uniform(0.2, 0.7)
            rows, columns = slice(max(top, 0), top + 28), slice(max(left, 0), left + 28)
            dx, dy = x[:, columns] - _STEP * (left + 14), y[rows] - _STEP * (top + 14)
            disc = _cover(np.sqrt(np.square(dx) + np.square(dy)) - rng.uniform(4, 18), 3)
            _paint(image[:, rows, columns], s.colour(0.5, 1, 0.7), disc * strength)
    return image


class _Hair(NamedTuple):
    window: tuple[slice, slice]  # the part of the grid that the other fields fill
    front: np.ndarray  # coverage before the face
    back: np.ndarray | None  # coverage behind the neck
    shade: np.ndarray  # shade cast on the face, on the whole grid
    image: np.ndarray  # lit colour, (3, h, w)


def _hair(s: _Scene) -> _Hair | None:
    """Hair of a random style; None for the bald."""
    rng = s.rng
    weights = [h.feminine if s.feminine > 0.5 else 1 - h.feminine for h in _HAIR_STYLES]
    weights[3] *= 3 * s.age
    (style,) = rng.choices(_HAIR_STYLES, weights)
    if rng.random() < 0.22 * (s.feminine < 0.5) * (0.5 + s.age):
        return None
    side, top, end = (value * rng.gauss(1, 0.15) for value in (style.side, style.top, style.end))
    slope, curl = style.slope * (1 if rng.random() < 0.5 else -1), style.curl
    spread = s.half_width + side + style.flare * min(max(end, 0), 70)
    left, right = np.searchsorted(s.column[0], [s.axis - spread - 8, s.axis + spread + 8]).tolist()
    w = slice(0, min(int((_EYE_Y + 1.15 * end + 16) / _STEP), _ROWS)), slice(left, right)
    x, y, u, v = s.column[:, w[1]] - s.axis, s.row[w[0]], s.u[w], s.v[w]
    clouds, clouds2 = s.clouds[w], s.clouds[::-1, ::-1][w]

    # Strands leave the parting and turn downwards; `across` is constant along a strand.
    drop = 1 - np.exp(-(y + 88 + top).clip(1) / 45)
    swing = (0.5 + 4 * curl) * np.sin(y * (0.12 + 0.1 * curl))
    across = (x - 40 * slope) / drop + swing + (0.7 + 3.5 * curl) * clouds
    along = y + 8 * curl * clouds2
    fine, locks = _strands(across * 1.3 + 400, along), _strands(across * 0.3 + 800, along * 0.6)
    apart = (drop * 1.3).clip(0, 1)  # at the parting strands are too dense to tell apart
    texture = (0.5 * fine + (0.6 + 0.2 * curl) * locks) * apart
    fringe = (1 - 0.8 * curl) * fine + 1.2 * curl * clouds
    rough = (0.6 * fringe + (0.7 + 0.5 * curl) * clouds) * apart

    width = s.half_width + side + style.flare * y.clip(0, 70)
    nx = x / width
    outer = (_round(np.square(nx), np.square((y + 16).clip(None, 0) / (58 + top)), 0.4) - 1) * 45 + rough
    line = style.line + slope * u + style.arch * np.square(u * (1 / 30))
    level = ((12 - v) / (12 - line.clip(None, -5))).clip(0, 3)
    gap = style.gap + s.half_width - 50 - 0.12 * (y - 20).clip(0, 60)
    opening = (_round(np.square(u / gap), np.square(level), 1) - 1) * 38 - 0.8 * rough
    front = _cover(outer, 1.5) * _cover(-opening, 1.3) * _cover(v - end + 4 * fringe, 4)
    back = _cover(outer + 3, 2) * _cover(y - end + 3 * fringe, 5) if end > 30 else None
    shade = np.zeros_like(s.u)
    shade[w] = _cover(-2 - opening, 7) * _cover(y - end - 4, 8)
    if style.top < 3:  # cropped hair lets skin through
        front *= (0.72 + 0.15 * s.grain[w]).clip(0, 1)

    gloss = rng.uniform(0.05, 0.35) * (1 - 0.6 * curl)
    band = _ridge((y + 46 + 6 * locks) * (1 / 12)) + 0.5 * _ridge((y - 40 + 8 * locks) * (1 / 24))
    roots = 0.5 * _ridge(opening * (1 / 9)) * (y * (1 / 30)).clip(0, 1)
    depth = (1 + 0.38 * texture).clip(0.15, 2.2) * (1 - roots)
    diffuse = s.diffuse(nx.clip(-1, 1), (y * (1 / 75)).clip(-1, 0.2))
    image = (s.hair * s.ambient) * depth + (s.hair * s.key) * (depth * diffuse)
    image += ((0.15 + s.hair) * s.key) * (gloss * band * diffuse * (texture + 0.4).clip(0, 2))
    return _Hair(w, front, back, shade, image)


def _body(s: _Scene, image: np.ndarray) -> None:
    """Neck and clothes."""
    rng, image, y, folds = s.rng, image[:, 100:], s.row[100:], s.clouds[100:, ::-1]
    x = s.column - rng.gauss(0.7 * s.axis, 3)
    offset = np.abs(x)
    neck = rng.gauss(31 - 6 * s.feminine, 1.5) + 0.012 * np.square((y - 72).clip(0, 30))
    chin = 1 - 0.75 * _cover(y - 84 + 6 * s.pitch + 0.012 * np.square(x), 16)
    diffuse = chin * s.diffuse((x / neck).clip(-0.95, 0.95), 0.1)
    skin = (s.skin * s.ambient) * chin + (s.skin * s.key) * diffuse
    _paint(image, skin, _cover(offset - neck, 1.2))

    kind = rng.randrange(4)  # 0 round neck, 1 deep neck, 2 shirt, 3 jacket over a shirt
    shoulder = rng.gauss(84, 3) + rng.uniform(0.12, 0.35) * offset + rng.gauss(0, 0.08) * x
    if kind == 1:
        hole = (110 - y - 0.95 * offset) * 0.7
    else:
        depth = rng.gauss(19, 4)
        hole = (1 - np.sqrt(np.square(offset / (neck + 2)) + np.square((y - 76) / depth))) * depth
    edge = np.maximum(shoulder - y, hole)
    shape = 1 + 0.2 * folds * ((y - 80) * (1 / 30)).clip(0, 1)
    pattern = rng.randrange(6) if kind < 3 else 5
    if pattern < 2:  # stripes, checks
        level, upright = (np.sign(np.sin(line * rng.uniform(0.3, 0.8))) for line in (y, x))
        shape = shape * (1 + 0.22 * level + 0.22 * pattern * upright)
    light = (s.ambient + s.key * s.diffuse((x * (1 / 110)).clip(-1, 1), -0.4)) * shape
    image *= 1 - 0.4 * _cover(edge - 3, 4)  # the cloth's shadow on the neck
    cloth = _cover(edge)
    _paint(image, s.colour(0.05, 0.95, 0.8) * light, cloth)
    if kind == 3:  # the shirt in the jacket's opening, perhaps with a tie
        shirt = _cover(offset - 30 + 0.55 * (y - 84)) * cloth
        _paint(image, s.colour(0.7, 1, 0.3) * light, shirt)
        if rng.random() < 0.6:
            _paint(image, s.colour(0.05, 0.6, 0.9) * light, _cover(offset - 4 - 0.05 * (y - 96)) * shirt)


def _ears(s: _Scene, image: np.ndarray) -> None:
    size, out = s.rng.gauss(1, 0.08), s.rng.gauss(1, 1)
    for side in (-1, 1):
        # The far ear of a turned head goes behind the cheek.
        x0 = s.axis + side * (s.half_width + out - 25 * max(0.0, side * s.yaw))
        left = min(max(int(np.searchsorted(s.column[0], x0)) - 9, 0), _COLUMNS - 19)
        rows, columns = slice(60, 98), slice(left, left + 19)
        dy = s.y[rows, columns] - 9
        dx = (s.x[rows, columns] - x0) * side + 0.2 * dy
        away = np.sqrt(np.square(dx * (1 / (6.5 * size))) + np.square(dy * (1 / (15 * size)))) - 1
        light = s.ambient * 0.8 + s.key * max(0.1, 0.55 * s.light[2] + 0.5 * side * s.light[0])
        tint = s.skin * _rgb([0.97, 0.86, 0.86]) * light
        hollow = 1 - 0.45 * _bump(dx, dy, 1, -1, 3.2, 8)
        _paint(image[:, rows, columns], tint * hollow, _cover(away * 8, 1.2))


class _Head:
    """The face's surface in a window of the frame: albedo, height, gloss; edited part by part, then lit."""

    window = slice(16, 136), slice(10, 108)

    def __init__(self, s: _Scene):
        rng, self.s = s.rng, s
        x, y, self.u, self.v = (np.ascontiguousarray(a[self.window]) for a in (s.x, s.y, s.u, s.v))
        taper, square = rng.uniform(0.04, 0.12) + 0.08 * s.feminine, rng.uniform(0.3, 0.7) - 0.2 * s.feminine
        chin = rng.gauss(71, 2.5) - 2 * s.feminine - 8 * s.pitch
        t = ((s.row[self.window[0]] + 5) * (1 / 70)).clip(0, 1)
        t = t * t * (3 - 2 * t)
        middle, width = s.axis * (1 - 0.85 * t), s.half_width * (1 - taper * t)
        y2 = np.square(y.clip(None, -16) * (1 / 58) + (16 / 58) + y.clip(0) * (1 / chin))
        radius = _round(np.square((x - middle) * (1 / width)), y2, square)
        self.edge = (radius - 1) * 45
        self.smile = min(max(rng.gauss(0.35, 0.45), -0.5), 1.0)
        self.height = 46 * np.sqrt((1 - np.square(radius)).clip(0.004))
        self.height -= 150 * (radius - 1).clip(0)  # the edge turns away, so that it does not shine
        self._relief(self.height)

        au, v, clouds, grain = np.abs(self.u), self.v, s.clouds[::-1][self.window], s.grain[self.window]
        red = 1 + 0.035 * clouds + 0.03 * grain
        red -= rng.uniform(0.05, 0.2 + 0.2 * s.age) * _bump(au, v, 18, 5, 12, 8)  # around the eyes
        other = red - rng.uniform(0, 0.2) * (_bump(au, v, 25, 25, 15, 14) + 0.8 * _bump(au, v, 0, 22, 9, 9))
        if rng.random() < 0.15 and s.skin[0, 0, 0] > 0.5:  # freckles
            spots = (s.texture(_NOISE)[self.window] - 1.5).clip(0, 1) * _bump(au, v, 12, 20, 30, 16)
            red, other = red * (1 - 0.45 * spots), other * (1 - 0.6 * spots)
        self.albedo = np.stack([s.skin[0] * red, s.skin[1] * other, s.skin[2] * other])
        self.gloss = np.full_like(self.u, rng.uniform(0.03, 0.2))

    def _relief(self, h: np.ndarray) -> None:
        """Adds the features to the height of the plain head."""
        s, rng, u, v, au = self.s, self.s.rng, self.u, self.v, np.abs(self.u)
        happy = max(self.smile, 0)
        h += _hills(au, v, (
            (15, -14, 16, 6, 3.5 - 1.5 * s.feminine), (19, -1, 12, 8, -rng.uniform(3, 6)),  # brows, sockets
            (25, 23, 13, 13, rng.uniform(2, 4) + 2 * happy), (0, 42, 18, 12, 3),  # cheeks, jaws
            (0, 63, 11, 9, 4), (0, 54, 9, 4, -2), (0, 34, 2.5, 5, -1),  # chin, below the lip, above it
        ))  # fmt: skip
        fold = _ridge((au - 12 - 0.55 * (v - 27).clip(0, 40)) * (1 / 2.5))  # from the nostrils past the mouth
        h -= (0.2 + 0.8 * happy + 1.0 * s.age) * fold * _cover(np.abs(v - 36) - 9, 6)
        if s.age > 0.45:  # lines on the forehead, bags under the eyes
            h += (s.age - 0.35) * 0.7 * np.sin(v + 0.006 * np.square(u)) * _bump(u, v, 0, -31, 22, 10)
            h += (s.age - 0.3) * 1.3 * _bump(au, v, 18, 10, 9, 3)

        # The nose stands out, so that a turned head shows it aside.
        self.nose = length, wide = rng.gauss(24, 1.5), rng.gauss(1, 0.13)
        near = slice(46, 94), slice(20, 78)
        u, v = u[near], v[near]
        rise = ((v + 8) * (1 / (length + 8))).clip(0, 1)
        n, v = u - 12 * s.yaw * rise * _cover(v - length - 12, 8), v - 8 * s.pitch * rise
        ramp = rise * (0.3 + 0.7 * rise) * _cover(v - length - 2, 8)
        nose = ramp * (5 * _ridge(n * (1 / (9 * wide))) + 4.5 * _ridge(n / ((3.5 + 2 * rise) * wide)))
        nose += 2.8 * _bump(n, v, 0, length - 2, 6.5 * wide, 6)
        h[near] += rng.uniform(0.8, 1.25) * nose + 2.6 * _bump(np.abs(n), v, 8 * wide, length + 0.5, 4, 4.5)

    def nostrils(self) -> None:
        (length, wide), s, w = self.nose, self.s, (slice(64, 92), slice(27, 72))
        n, v = np.abs(self.u[w] - 11 * s.yaw), self.v[w] - 8 * s.pitch
        holes, under = _bump(n, v, 4.8 * wide, length + 4.4, 2.4, 1.4), _bump(n, v, 0, length + 6, 9, 3)
        wings = _bump(n, v, 11 * wide, length + 1, 1.8, 4.5)
        self.albedo[:, w[0], w[1]] *= (1 - 0.7 * holes - 0.12 * under) * (1 - 0.18 * wings)
        self.gloss[w] *= 1 + 1.2 * _bump(n, v, 0, length - 3, 4, 4)

    def mouth(self) -> None:
        """Lips, and teeth or the dark between them."""
        s, rng, smile, w = self.s, self.s.rng, self.smile, (slice(72, 108), slice(19, 79))
        u, v, albedo = self.u[w] - 4 * s.yaw, self.v[w] - 3 * s.pitch, self.albedo[:, w[0], w[1]]
        half, full = rng.gauss(15.5, 1) + 3 * max(smile, 0), rng.gauss(1, 0.2) + 0.15 * s.feminine
        agape = rng.uniform(2, 7) * (rng.random() < (0.6 if smile > 0.2 else 0.15))
        t = u * (1 / half)
        at, t2 = np.abs(t), np.square(t)
        belly, wide = (1 - t2).clip(0, 1), _cover((at - 1) * half, 1.5)
        line = 41.5 + smile * (2 - 5 * t2) + rng.gauss(0, 0.3) * t
        top, bottom = line - 0.25 * agape * belly, line + 0.9 * agape * belly
        bow = (1 - 0.25 * _ridge(t * 6)) * (0.35 + 0.65 * (1 - at).clip(0)) * (1 - 0.25 * max(smile, 0))
        lip_top, lip_bottom = top - 6 * full * bow * belly, bottom + (7 - 1.5 * max(smile, 0)) * full * belly
        lips = _cover(np.maximum(lip_top - v, v - lip_bottom), 1.2) * wide
        tint = s.skin * _rgb([0.88, 0.71, 0.72])
        if s.feminine > 0.5 and rng.random() < 0.6:
            lipstick = _rgb(rng.gauss(level, 0.13) for level in (0.75, 0.2, 0.25))
            tint = tint + (lipstick - tint) * rng.uniform(0.2, 0.8)
        _paint(albedo, tint, 0.85 * lips)
        self.gloss[w] += 0.1 * lips
        self.height[w] += 1.2 * lips + 1.6 * _ridge((v - (bottom + lip_bottom) * 0.5) * 0.35) * belly
        albedo *= 1 - 0.4 * _ridge((at - 1.02) * 9) * _ridge((v - line) * 0.5)
        if agape:
            hole = _cover(np.maximum(top - v, v - bottom)) * wide
            _paint(albedo, _rgb([0.28, 0.1, 0.1]), hole)
            teeth = _cover(v - np.minimum(top + 5.5 * belly, bottom - 0.3)) * _cover((at - 0.86) * half, 2)
            gaps = (1 - 0.18 * _ridge(np.sin(u * 0.62) * 4)) * (1 - 0.5 * t2)
            shown = rng.uniform(0.8, 1) * min(max(2 * smile + 0.3, 0), 1)
            _paint(albedo, _rgb([0.93, 0.9, 0.84]) * gaps, shown * hole * teeth)
            self.gloss[w] *= 1 - hole
        else:
            albedo *= 1 - 0.7 * _ridge((v - line) * 1.1) * wide
        self.lips = np.zeros_like(self.u)
        self.lips[w] = lips

    def beard(self) -> None:
        """Stubble, full beard, goatee or moustache."""
        s, rng, w = self.s, self.s.rng, (slice(50, 120), slice(None))
        kind, density = rng.randrange(5), rng.uniform(0.15, 0.5)
        if s.feminine > 0.5 or rng.random() < 0.4:
            return
        u, v, rough = self.u[w], self.v[w], 0.7 * s.clouds[self.window][w]
        au = np.abs(u)
        moustache = np.maximum(np.abs(v - 33.5 - 0.018 * np.square(u)) - 3.2, au - 17)
        area = _cover(moustache + rough, 2)
        if kind < 3:  # 0, 1 stubble, 2 full
            line = 42 - 42 * np.square((au - 14).clip(0, 40) * (1 / 32)) + 10 * _ridge(u * (1 / 8))
            area = np.maximum(_cover(line - v + 2 * rough, 5), area)
        elif kind == 3:  # goatee
            chin = np.sqrt(np.square(u) + np.square(v - 59)) - 13
            frame = np.maximum(np.abs(au - 17.5) - 2, np.abs(v - 46) - 9)
            area = np.maximum(_cover(np.minimum(chin, frame) + rough, 3), area)
        area = area * (1 - self.lips[w])
        hairs = _strands(u * 1.4 + 1000 + 4 * rough, v * 1.5)
        dense = density if kind < 2 else 0.5 + density
        _paint(self.albedo[:, w[0]], s.hair * 0.8, (area * dense * (1 + 0.3 * hairs)).clip(0, 0.95))
        self.gloss[w] *= 1 - 0.8 * area
        if kind > 1:
            self.height[w] += area * (1.5 + 0.35 * hairs)

    def eyes(self) -> None:
        """Lids, irises with a gaze, lashes, make-up and brows; both eyes side by side in one array."""
        s, rng = self.s, self.s.rng
        opened = min(max(rng.gauss(5.2, 0.6), 3.4), 6.4) - 0.9 * max(self.smile, 0) - 0.6 * s.age
        tilt, half, iris = rng.gauss(0.04, 0.07), rng.gauss(10, 0.5), rng.gauss(4.2, 0.15)
        gaze_x, gaze_y = min(max(rng.gauss(0, 1.3), -3.1), 3.1), rng.gauss(-0.6, 0.5)
        makeup = rng.uniform(0.3, 1) if s.feminine > 0.5 and rng.random() < 0.6 else 0.0
        liner, lid = 0.8 + 0.4 * s.feminine + 0.7 * makeup, s.colour(0.1, 0.7, 0.7)
        brow_y, arch, knit = rng.gauss(12, 1.2), rng.uniform(0, 3), rng.gauss(0, 0.06)
        thick, ink = rng.uniform(1.8, 3) - 0.7 * s.feminine, rng.uniform(0.55, 0.95)

        cells = [(int(y / _STEP) - 16, int(x / _STEP) - 10) for x, y in s.eyes]
        crops = [(slice(row - 17, row + 10), slice(column - 12, column + 13)) for row, column in cells]
        u, v, height, gloss, albedo = (
            np.concatenate([field[..., rows, columns] for rows, columns in crops], axis=-1)
            for field in (self.u, self.v, self.height, self.gloss, self.albedo)
        )
        side = np.repeat(np.float32([[-1, 1]]), 25, axis=1)
        ex = u * side - _EYE_HALF  # outwards from the eye's middle
        ey, t = v + tilt * ex, ex * (1 / half)
        at, t2 = np.abs(t), np.square(t)
        upper, lower = -opened * (1 - np.square(t + 0.1)).clip(-0.2), 0.62 * opened * (1 - t2).clip(-1)
        inside = _cover(np.maximum(np.maximum(upper - ey, ey - lower), (at - 1) * half), 0.9)
        height += 1.6 * _bump(ex, ey, 0, -1, 10, 6)
        if makeup:
            _paint(albedo, lid, makeup * 0.5 * _bump(ex, ey, 1, -4.5, 10, 4))
        fold = 0.35 * _ridge((ey - 1.25 * upper + 2.6) * 0.9) * _cover(at - 1, 0.15)
        albedo *= 1 - fold - 0.2 * _ridge((ey - lower - 2.4) * 0.8) * _cover(at - 0.9, 0.2)

        shadow = 1 - 0.5 * _cover(ey - upper - 1.5, 2.2)  # the lid's
        _paint(albedo, _rgb([0.88, 0.84, 0.82]) * (shadow * (1 - 0.35 * t2)), inside)
        _paint(albedo, s.skin * _rgb([0.95, 0.75, 0.75]), inside * _cover(ex + half - 2, 1.5) * 0.8)
        gx, gy = ex - gaze_x * side, ey - gaze_y
        r = np.sqrt(np.square(gx) + np.square(gy))
        rays = 1 + 0.2 * np.sin(gx * 2.3) * np.sin(gy * 2.3) + (0.5 / iris) * gy
        rays -= 0.55 * _cover(iris - 1.1 - r, 0.6)  # the dark rim
        _paint(albedo, s.iris * (rays.clip(0.25, 2) * shadow), inside * _cover(r - iris))
        _paint(albedo, _rgb([0.05, 0.05, 0.05]), inside * _cover(r - 1.8))
        lashes = _cover(np.abs(ey - upper + 0.3) - liner * (1 + 0.35 * t), 0.9)
        _paint(albedo, s.hair * 0.25 + 0.003, 0.85 * lashes * _cover((at - 1.06) * half, 1.2))
        albedo *= 1 - (0.2 + 0.3 * makeup) * _ridge((ey - lower) * 1.25) * _cover((at - 1) * half, 1)

        b = (ex - 1) * (1 / 12.5)  # -1 at the brow's inner end, 1 at the outer
        peak = b - 0.3
        centre = -brow_y - knit * ex - 0.7 * arch * (1 - np.square(peak)) + 3.5 * np.square(peak.clip(0))
        hairs = _strands(ex * 0.9 + v * 0.8 + 600, v)
        away = np.abs(v - centre) - thick * (1 - 0.5 * b).clip(0.2, 1.2) + 0.5 * hairs
        brow = _cover(np.maximum(away, (np.abs(b) - 1) * 12), 1.4)
        _paint(albedo, s.hair * 0.7, (ink * brow * (1 + 0.2 * hairs)).clip(0, 0.95))
        gloss *= (1 - inside) * (1 - 0.7 * brow)
        glint = 0.9 * inside * _bump(gx * side, gy, 1.8 * s.light[0], 1.5 * s.light[1] - 0.5, 1.2, 1.2)
        self.glints = []
        for w, part in zip(crops, (slice(None, 25), slice(25, None)), strict=True):
            self.height[w], self.gloss[w] = height[:, part], gloss[:, part]
            self.albedo[:, w[0], w[1]] = albedo[..., part]
            self.glints.append((w, glint[:, part]))

    def lit(self, shade: np.ndarray | float) -> np.ndarray:
        """The surface under the scene's light less the hair's shade: planar image (3, h, w) of the window."""
        s, (lx, ly, lz) = self.s, self.s.light
        gx, gy = np.zeros_like(self.u), np.zeros_like(self.u)
        gx[:, 1:-1] = (0.5 / _STEP) * (self.height[:, 2:] - self.height[:, :-2])
        gy[1:-1] = (0.5 / _STEP) * (self.height[2:] - self.height[:-2])
        norm = 1 / np.sqrt(np.square(gx) + np.square(gy) + 1)
        towards = lz - lx * gx - ly * gy
        # Blinn's highlight with power 16, the viewer being far in front.
        glint = ((towards + 1) * norm * (1 / math.sqrt(lx**2 + ly**2 + (lz + 1) ** 2))).clip(0, 1)
        for _ in range(4):
            glint = np.square(glint)
        sun = 1 - 0.55 * shade
        glint *= self.gloss * sun
        facing = towards * norm
        sky = (0.8 + 0.2 * gy * norm) * (0.55 + 0.45 * norm)
        image = self.albedo
        # Light that wanders through skin passes the shadow's edge, red furthest: so a wider wrap for red.
        for i, wrap in enumerate((0.35, 0.22, 0.18)):
            key, ambient = float(s.key[i, 0, 0]), float(s.ambient[i, 0, 0])
            wrapped = np.square(((facing + wrap) * (1 / (1 + wrap))).clip(0))
            image[i] *= wrapped * sun * key + ambient * sky
            image[i] += key * glint
        for w, spot in self.glints:
            _paint(image[:, w[0], w[1]], (s.key * 1.2).clip(0, 1), spot)
        return image


def _glasses(s: _Scene, image: np.ndarray) -> None:
    rng, w = s.rng, (slice(50, 100), slice(10, 108))
    kind = rng.random()
    if kind > 0.22:
        return
    u, v, image = s.u[w], s.v[w], image[:, w[0], w[1]]
    half, tall, thick = rng.uniform(14, 17), rng.uniform(10, 14), rng.choice([0.6, 0.9, 1.7])
    au = np.abs(u)
    rim = (_round(np.square((au - 20) / half), np.square((v - 2) / tall), rng.uniform(0, 1)) - 1) * tall
    lens = _cover(rim)
    bridge = _cover(np.maximum(np.abs(v + 2 - 0.02 * np.square(u)) - thick, au - 20.5 + half)) * (1 - lens)
    temple = _cover(np.maximum(np.abs(v + 3) - thick, 19.5 + half - au)) * _cover(au - 49, 2)
    image *= 1 - 0.3 * _ridge((rim - 2.5) * 0.4) * _cover(2 - v, 4)  # shadow on the cheek
    if kind < 0.07:  # sunglasses mirror the sky
        sky = 0.1 * s.key * ((v + 2 + 0.25 * u) * (-1 / 14)).clip(0, 1)
        _paint(image, s.colour(0.08, 0.25, 0.5) * (1.6 - 0.06 * v) + sky, lens * rng.uniform(0.85, 0.97))
    else:
        image += 0.05 * s.key * lens * _cover(np.abs(u * 0.7 + v - rng.uniform(-8, 8)) - 3, 4)
    frame = np.maximum(np.maximum(_cover(np.abs(rim) - thick), bridge), temple)
    metal = s.colour(0.05, 0.75, 0.7) * (0.6 + 1.5 * _ridge((rim + 0.4) * 1.4) * (v * -0.1).clip(0, 1))
    _paint(image, metal * (s.ambient + s.key * 0.6), frame)


def render_face(seed: int) -> np.ndarray:
    """Draws the portrait of a seed.

    Args:
        seed: Any non-negative integer. Equal seeds give equal images (to the rounding of the platform).

    Returns:
        RGB image, (218, 178, 3) uint8, eyes near (70, 111) and (108, 111).
    """
    s = _Scene(int(seed))
    rng = s.rng
    image = _background(s)
    hair = _hair(s)
    if hair and hair.back is not None:
        _paint(image[:, hair.window[0], hair.window[1]], hair.image * 0.45, hair.back)
    _body(s, image)
    _ears(s, image)
    head, (rows, columns) = _Head(s), _Head.window
    head.nostrils()
    head.mouth()
    head.beard()
    head.eyes()
    face = head.lit(hair.shade[rows, columns] if hair else 0.0)
    _paint(image[:, rows, columns], face, _cover(head.edge, 1.2))
    if hair:
        _paint(image[:, hair.window[0], hair.window[1]], hair.image, hair.front)
    _glasses(s, image)

    # The camera: vignette, a grey picture now and then, focus, contrast, sensor noise.
    image *= 1 - rng.uniform(0, 0.35) * (np.square((s.column - s.axis) / 160) + np.square(s.row / 180))
    if rng.random() < 0.03:
        image[:] = image.mean(axis=0)
    if rng.random() < 0.4:
        blur = rng.uniform(0.02, 0.15)
        image[:, 1:-1] += blur * (image[:, 2:] + image[:, :-2] - 2 * image[:, 1:-1])
        image[:, :, 1:-1] += blur * (image[:, :, 2:] + image[:, :, :-2] - 2 * image[:, :, 1:-1])
    gain = rng.gauss(1, 0.1)
    np.sqrt(image.clip(0, 1, out=image), out=image)
    image *= gain * 255
    image += rng.gauss(0.45 * (1 - gain) * 255, 5) + rng.uniform(0.5, 3) * s.grain
    pixels = Image.fromarray(np.stack(list(image.clip(0, 255, out=image).astype(np.uint8)), axis=-1))
    return np.array(pixels.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def generate_examples(seeds: Iterable[int]) -> Iterator[dict]:
    """Rows as the Hub's CelebA has them.

    Args:
        seeds: One face is drawn for each.

    Yields:
        ``{"image": {"bytes": JPEG of quality 95, "path": file name}, "celeb_id": seed}``
    """
    for seed in seeds:
        buffer = io.BytesIO()
        Image.fromarray(render_face(seed)).save(buffer, format="JPEG", quality=95)
        image = {"bytes": buffer.getvalue(), "path": f"synthetic_{seed:08d}.jpg"}
        yield {"image": image, "celeb_id": int(seed)}


def synthetic_dataset(
    num_images: int, first_seed: int, cache_dir: str | None = None, num_shards: int = 8
) -> "datasets.IterableDataset":
    """Streams the faces of the seeds ``first_seed .. first_seed + num_images - 1`` through `datasets`.

    They are drawn once, on all cores, and kept as Arrow files in the library's cache, from which later calls
    read them. A face takes about 10 ms of a core and 14 kB on disk.

    Args:
        num_images: Number of faces, at least 1.
        first_seed: The first seed; ranges that do not overlap share no face.
        cache_dir: Where the Arrow files go; None is the library's default cache.
        num_shards: Shards of the stream (what ranks and workers divide), at most `num_images`.

    Returns:
        The rows of `generate_examples`, images left encoded.

    Raises:
        ValueError: `num_images`, `first_seed` or `num_shards` is out of range.
    """
    if num_images < 1 or first_seed < 0:
        raise ValueError(f"num_images={num_images} must be 1 or more, first_seed={first_seed} 0 or more.")
    if not 1 <= num_shards <= num_images:
        raise ValueError(f"num_shards={num_shards} must lie between 1 and num_images={num_images}.")
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features(image=ImageFeature(decode=False), celeb_id=Value("int64"))
    # The cache's key holds this file's hash, lest faces drawn by an earlier version be taken for today's.
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    # A list is what `datasets` divides among processes; below some hundred faces starting them costs more.
    processes = min(os.cpu_count() or 1, num_images // 256)
    seeds = range(first_seed, first_seed + num_images)
    rows = Dataset.from_generator(
        generate_examples,
        gen_kwargs={"seeds": list(seeds) if processes > 1 else seeds},
        features=features,
        cache_dir=cache_dir,
        num_proc=processes if processes > 1 else None,
        fingerprint=f"synthetic-faces-{version}-{first_seed}-{num_images}",
    )
    return rows.to_iterable_dataset(num_shards=num_shards)


def main(argv: list[str] | None = None) -> None:
    """Writes a contact sheet of faces with consecutive seeds, row by row."""
    parser = argparse.ArgumentParser(description="Draw a contact sheet of synthetic faces.")
    parser.add_argument("--out", required=True, help="image file to write, for example grid.png")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args(argv)
    sheet = Image.new("RGB", (args.columns * WIDTH, args.rows * HEIGHT))
    for i in range(args.rows * args.columns):
        face = Image.fromarray(render_face(args.first_seed + i))
        sheet.paste(face, (i % args.columns * WIDTH, i // args.columns * HEIGHT))
    sheet.save(args.out)
    print(f"{args.rows * args.columns} faces from seed {args.first_seed} -> {args.out}")


if __name__ == "__main__":
    main()
