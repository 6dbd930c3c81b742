"""The properties common to all parts of a portrait: head pose, skin, hair and iris colors, and light."""

import math
import random

import numpy as np

from training.data.synthetic_faces.drawing import (
    CLOUDS,
    COLUMN,
    COLUMNS,
    EYE_HALF,
    EYE_X,
    EYE_Y,
    NOISE,
    ROW,
    ROWS,
    rgb,
)

# Albedo in sRGB; light is added on squared values (gamma 2), a cheap approximation of linear light.
# fmt: off
_SKIN_COLORS = (
    (0.97, 0.84, 0.77), (0.94, 0.78, 0.68), (0.89, 0.70, 0.57), (0.82, 0.62, 0.47),
    (0.70, 0.50, 0.37), (0.57, 0.39, 0.28), (0.44, 0.29, 0.21), (0.33, 0.21, 0.16),
)
_HAIR_COLORS = (
    (0.07, 0.06, 0.06), (0.16, 0.10, 0.07), (0.27, 0.17, 0.11), (0.40, 0.25, 0.15),
    (0.56, 0.38, 0.20), (0.80, 0.64, 0.40), (0.46, 0.19, 0.09), (0.45, 0.14, 0.24),
    (0.58, 0.57, 0.57), (0.84, 0.83, 0.82),
)
_IRIS_COLORS = (
    (0.22, 0.12, 0.06), (0.33, 0.20, 0.10), (0.40, 0.33, 0.16), (0.30, 0.42, 0.28),
    (0.33, 0.48, 0.60), (0.45, 0.52, 0.56),
)
# fmt: on


class Scene:
    """Properties common to all parts of a portrait: pose, colors, light. Lengths are pixels of the final image.

    Attributes:
        attributes: Name in CelebA -> whether the face has it; completed by the parts.
    """

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)  # numpy's generator takes ten times longer for one number
        self.feminine = min(max(rng.gauss(rng.choice((0.2, 0.8)), 0.12), 0.0), 1.0)
        self.age = rng.betavariate(1.3, 2.2)
        self.clouds, self.grain = self.texture(CLOUDS), self.texture(NOISE)

        # Find the eyes of the rotated head on the line y = 0; scale, roll and shift then align them.
        self.yaw, self.pitch = (s * min(max(rng.gauss(0, 1), -2.1), 2.1) for s in (0.2, 0.12))  # sines
        self.half_width = rng.gauss(50, 1.8) - 1.5 * self.feminine
        self.axis = -25 * self.yaw  # the middle of the skull, seen from between the eyes
        line = np.linspace(-45, 45, 181, dtype=np.float32)
        rotated = self._rotate(line, self._depth(line, 0.0))
        left, right = np.interp([-EYE_HALF, EYE_HALF], rotated, line).tolist()
        scale = (2 * EYE_HALF / (right - left)) ** 0.7 * rng.gauss(1, 0.03)
        middle, roll = (left + right) / 2, rng.gauss(0, 0.035)
        x0, y0 = rng.gauss(EYE_X, 0.8), rng.gauss(EYE_Y, 0.8)
        cos, sin = math.cos(roll) / scale, math.sin(roll) / scale
        dx, dy = COLUMN - x0, ROW - y0
        self.x, self.y = (dx * cos + middle) + dy * sin, dy * cos - dx * sin
        self.column, self.row = dx / scale + middle, dy / scale  # x and y without the roll: a row and a column
        depth = self._depth(self.column, self.row)
        self.u, self.v = self._rotate(self.x, depth), self.y - (depth - 25) * (self.pitch * 1.5)
        reach = (right - middle) * scale
        self.eyes = [(x0 + e, y0 + e * math.sin(roll)) for e in (-reach, reach)]  # in the final image

        tone = rng.betavariate(0.9, 1.3) * 6.99
        between = zip(_SKIN_COLORS[int(tone)], _SKIN_COLORS[int(tone) + 1], strict=True)
        self.skin = rgb(rng.gauss(a + (b - a) * (tone % 1), 0.018) for a, b in between)
        dark = tone > 3.5
        hair = [6, 4, 1, 0.3, 0.1, 0.2, 0.2, 0.1, 0, 0] if dark else [3, 4, 4, 3, 3, 3, 1, 0.2, 0, 0]
        hair[8:] = (sum(hair) * max(self.age - 0.45, 0) * weight for weight in (2.2, 1.3))  # gray, white
        tone = rng.gauss(1, 0.12)
        (color,) = rng.choices(range(len(_HAIR_COLORS)), hair)
        self.hair = rgb(c * tone for c in _HAIR_COLORS[color])
        self.attributes = {
            "Black_Hair": color < 2,
            "Blond_Hair": color == 5,
            "Gray_Hair": color > 7,
            "Male": self.feminine < 0.5,
            "Young": self.age < 0.5,
        }
        iris = [0.7, 0.25, 0.05, 0, 0, 0] if dark else [0.2, 0.2, 0.15, 0.13, 0.2, 0.12]
        self.iris = rgb(rng.choices(_IRIS_COLORS, iris)[0])

        azimuth, elevation = rng.gauss(0, 0.7), rng.uniform(0.1, 0.8)
        flat = math.cos(elevation)
        # Towards the light: x, y, z (z is towards the camera).
        self.light = math.sin(azimuth) * flat, -math.sin(elevation), max(math.cos(azimuth), 0.2) * flat
        tint = 1 + rng.gauss(0, 0.1) * np.array([1, 0, -1])
        contrast, exposure = rng.uniform(0.4, 0.85), rng.uniform(1.0, 1.35)
        self.key = (tint * exposure * contrast * 1.4).astype(np.float32).reshape(3, 1, 1)
        self.ambient = ((2 - tint) * exposure * (1 - contrast)).astype(np.float32).reshape(3, 1, 1)

    def _depth(self, x: np.ndarray, y: np.ndarray | float) -> np.ndarray:
        """Distance of the face's surface from the axis of the head's rotation."""
        return 27 * np.sqrt((1 - np.square((x - self.axis) * (1 / 54)) - np.square(y * (1 / 90))).clip(0.02))

    def _rotate(self, x: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Horizontal position on the rotated face: 0 on its axis of symmetry."""
        return (x - self.axis) * math.sqrt(1 - self.yaw**2) - depth * self.yaw

    def texture(self, tile: np.ndarray) -> np.ndarray:
        """A random crop of a fixed texture, as large as the grid."""
        top, left = self.rng.randrange(512 - ROWS), self.rng.randrange(512 - COLUMNS)
        return tile[top : top + ROWS, left : left + COLUMNS]

    def color(self, darkest: float, lightest: float, chroma: float) -> np.ndarray:
        """A random color; `chroma` bounds how far it departs from gray."""
        rng = self.rng
        gray, chroma = rng.uniform(darkest, lightest), chroma * rng.random()
        return rgb(gray * (1 - chroma * rng.random()) for _ in range(3))

    def diffuse(self, nx: np.ndarray, ny: np.ndarray | float) -> np.ndarray:
        """Lambertian term of the key light in [0, 1], for unit normals with these x and y components."""
        nz = np.sqrt((1 - np.square(nx) - np.square(ny)).clip(0.05))
        return (nx * self.light[0] + ny * self.light[1] + nz * self.light[2]).clip(0, 1)
