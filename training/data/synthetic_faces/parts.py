"""Background, neck and clothes, ears, and glasses."""

import math

import numpy as np

from training.data.synthetic_faces.drawing import (
    CELL,
    COLUMN,
    COLUMNS,
    HEIGHT,
    PATCHES,
    ROW,
    WIDTH,
    blend,
    bump,
    coverage,
    rgb,
    ridge,
    rounded_radius,
)
from training.data.synthetic_faces.scene import Scene


def render_background(s: Scene) -> np.ndarray:
    """Planar image (3, rows, columns) of something out of focus."""
    rng, x, y = s.rng, COLUMN, ROW
    studio = rng.random() < 0.2
    first, second = (s.color(0.8, 1, 0.05) if studio else s.color(0.1, 1, 0.6) for _ in range(2))
    angle = rng.uniform(0, math.pi)
    ramp = (x - 89) * (math.sin(angle) / 240) + (y - 109) * (math.cos(angle) / 240) + 0.5
    image = first + (second - first) * ramp.clip(0, 1)
    kind = 0 if studio else rng.randrange(5)  # 0: the gradient alone
    if kind == 1 or kind == 4:  # large patches, or foliage
        for _ in range(3):
            patch = (0.7 * s.texture(PATCHES)).clip(0, 1)
            blend(image, s.color(0.1, 1, 0.8), patch * rng.uniform(0.3, 0.9))
    if kind == 4:
        image *= (1 + rng.uniform(0.08, 0.25) * s.clouds).clip(0.1, 2)
    elif kind == 2:  # walls, windows, shelves
        for _ in range(rng.randrange(4, 9)):
            along, span = (x, WIDTH) if rng.random() < 0.6 else (y, HEIGHT)
            band = coverage(np.abs(along - rng.uniform(0, span)) - rng.uniform(4, 35), rng.uniform(2, 8))
            blend(image, s.color(0.05, 0.95, 0.5), band * rng.uniform(0.3, 0.9))
    elif kind == 3:  # lights
        for _ in range(rng.randrange(6, 18)):
            top, left, strength = rng.randrange(-8, 120), rng.randrange(-8, 110), rng.uniform(0.2, 0.7)
            rows, columns = slice(max(top, 0), top + 28), slice(max(left, 0), left + 28)
            dx, dy = x[:, columns] - CELL * (left + 14), y[rows] - CELL * (top + 14)
            disk = coverage(np.sqrt(np.square(dx) + np.square(dy)) - rng.uniform(4, 18), 3)
            blend(image[:, rows, columns], s.color(0.5, 1, 0.7), disk * strength)
    return image


def add_body(s: Scene, image: np.ndarray) -> None:
    """Neck and clothes."""
    rng, image, y, folds = s.rng, image[:, 100:], s.row[100:], s.clouds[100:, ::-1]
    x = s.column - rng.gauss(0.7 * s.axis, 3)
    offset = np.abs(x)
    neck = rng.gauss(31 - 6 * s.feminine, 1.5) + 0.012 * np.square((y - 72).clip(0, 30))
    chin = 1 - 0.75 * coverage(y - 84 + 6 * s.pitch + 0.012 * np.square(x), 16)
    diffuse = chin * s.diffuse((x / neck).clip(-0.95, 0.95), 0.1)
    skin = (s.skin * s.ambient) * chin + (s.skin * s.key) * diffuse
    blend(image, skin, coverage(offset - neck, 1.2))

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
    image *= 1 - 0.4 * coverage(edge - 3, 4)  # the cloth's shadow on the neck
    cloth = coverage(edge)
    blend(image, s.color(0.05, 0.95, 0.8) * light, cloth)
    if kind == 3:  # the shirt in the jacket's opening, perhaps with a tie
        shirt = coverage(offset - 30 + 0.55 * (y - 84)) * cloth
        blend(image, s.color(0.7, 1, 0.3) * light, shirt)
        if rng.random() < 0.6:
            blend(image, s.color(0.05, 0.6, 0.9) * light, coverage(offset - 4 - 0.05 * (y - 96)) * shirt)


def add_ears(s: Scene, image: np.ndarray) -> None:
    size, out = s.rng.gauss(1, 0.08), s.rng.gauss(1, 1)
    for side in (-1, 1):
        # The far ear of a rotated head goes behind the cheek.
        x0 = s.axis + side * (s.half_width + out - 25 * max(0.0, side * s.yaw))
        left = min(max(int(np.searchsorted(s.column[0], x0)) - 9, 0), COLUMNS - 19)
        rows, columns = slice(60, 98), slice(left, left + 19)
        dy = s.y[rows, columns] - 9
        dx = (s.x[rows, columns] - x0) * side + 0.2 * dy
        away = np.sqrt(np.square(dx * (1 / (6.5 * size))) + np.square(dy * (1 / (15 * size)))) - 1
        light = s.ambient * 0.8 + s.key * max(0.1, 0.55 * s.light[2] + 0.5 * side * s.light[0])
        tint = s.skin * rgb([0.97, 0.86, 0.86]) * light
        hollow = 1 - 0.45 * bump(dx, dy, 1, -1, 3.2, 8)
        blend(image[:, rows, columns], tint * hollow, coverage(away * 8, 1.2))


def add_glasses(s: Scene, image: np.ndarray) -> None:
    rng, w = s.rng, (slice(50, 100), slice(10, 108))
    kind = rng.random()
    s.attributes["Eyeglasses"] = kind <= 0.22
    if not s.attributes["Eyeglasses"]:
        return
    u, v, image = s.u[w], s.v[w], image[:, w[0], w[1]]
    half, tall, thick = rng.uniform(14, 17), rng.uniform(10, 14), rng.choice([0.6, 0.9, 1.7])
    au = np.abs(u)
    rim = (rounded_radius(np.square((au - 20) / half), np.square((v - 2) / tall), rng.uniform(0, 1)) - 1) * tall
    lens = coverage(rim)
    bridge = coverage(np.maximum(np.abs(v + 2 - 0.02 * np.square(u)) - thick, au - 20.5 + half)) * (1 - lens)
    temple = coverage(np.maximum(np.abs(v + 3) - thick, 19.5 + half - au)) * coverage(au - 49, 2)
    image *= 1 - 0.3 * ridge((rim - 2.5) * 0.4) * coverage(2 - v, 4)  # shadow on the cheek
    if kind < 0.07:  # sunglasses mirror the sky
        sky = 0.1 * s.key * ((v + 2 + 0.25 * u) * (-1 / 14)).clip(0, 1)
        blend(image, s.color(0.08, 0.25, 0.5) * (1.6 - 0.06 * v) + sky, lens * rng.uniform(0.85, 0.97))
    else:
        image += 0.05 * s.key * lens * coverage(np.abs(u * 0.7 + v - rng.uniform(-8, 8)) - 3, 4)
    frame = np.maximum(np.maximum(coverage(np.abs(rim) - thick), bridge), temple)
    metal = s.color(0.05, 0.75, 0.7) * (0.6 + 1.5 * ridge((rim + 0.4) * 1.4) * (v * -0.1).clip(0, 1))
    blend(image, metal * (s.ambient + s.key * 0.6), frame)
