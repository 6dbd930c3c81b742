"""Hair styles and their rendering."""

from typing import NamedTuple

import numpy as np

from training.data.synthetic_faces.drawing import CELL, EYE_Y, ROWS, coverage, ridge, rounded_radius, strand_noise
from training.data.synthetic_faces.scene import Scene


class HairStyle(NamedTuple):
    """Hair in pixels of the face, whose origin lies between the eyes, y down."""

    top: float  # thickness above the skull
    side: float  # thickness beside it
    end: float  # lower end of the hair at the sides
    line: float  # the hairline in the middle
    arch: float  # how far the hairline falls (negative: recedes) towards the temples
    slope: float  # slant of the hairline, and distance of the parting from the middle
    gap: float  # half-width of the opening for a face of half-width 50
    flare: float  # widening per pixel below the eyes
    curl: float  # 0 straight .. 1 curls
    feminine: float  # weight in feminine faces; 1 minus it in masculine faces


_HAIR_STYLES = (
    HairStyle(2, 1, 4, -47, 4, 0.0, 47, 0.0, 0.0, 0.05),  # cropped
    HairStyle(8, 4, 6, -43, 6, 0.1, 47, 0.0, 0.1, 0.08),  # short
    HairStyle(13, 4, 8, -47, 5, 0.3, 47, 0.0, 0.1, 0.1),  # swept sideways
    HairStyle(4, 4, 6, -58, -8, 0.0, 47, 0.0, 0.1, 0.0),  # receding (_RECEDING)
    HairStyle(10, 7, 12, -43, 8, 0.1, 47, 0.0, 1.0, 0.3),  # short curls
    HairStyle(18, 18, 26, -45, 9, 0.0, 47, 0.1, 1.0, 0.5),  # afro
    HairStyle(8, 6, 12, -25, 2, 0.15, 46, 0.0, 0.1, 0.3),  # short with a fringe
    HairStyle(4, 2, 4, -49, 7, 0.1, 47, 0.0, 0.0, 0.8),  # tied back
    HairStyle(7, 8, 62, -20, 0, 0.05, 41, 0.05, 0.1, 0.95),  # bob with a fringe
    HairStyle(7, 7, 150, -51, 19, 0.0, 42, 0.10, 0.1, 0.97),  # long, parted in the middle
    HairStyle(9, 8, 150, -47, 12, 0.45, 43, 0.14, 0.4, 0.95),  # long, parted at a side
    HairStyle(7, 9, 150, -20, 0, 0.0, 41, 0.12, 0.1, 0.97),  # long with a fringe
    HairStyle(12, 13, 105, -45, 15, 0.2, 43, 0.20, 1.0, 0.9),  # long curls
)
_RECEDING = 3  # index in _HAIR_STYLES


class Hair(NamedTuple):
    region: tuple[slice, slice]  # the part of the grid that the other fields fill
    front: np.ndarray  # coverage in front of the face
    back: np.ndarray | None  # coverage behind the neck
    shade: np.ndarray  # shade cast on the face, on the full grid
    image: np.ndarray  # lit color, (3, h, w)


def render_hair(s: Scene) -> Hair | None:
    """Render hair of a random style; None for a bald head."""
    rng = s.rng
    weights = [h.feminine if s.feminine > 0.5 else 1 - h.feminine for h in _HAIR_STYLES]
    weights[_RECEDING] *= 3 * s.age
    (style,) = rng.choices(_HAIR_STYLES, weights)
    is_bald = rng.random() < 0.22 * (s.feminine < 0.5) * (0.5 + s.age)
    s.attributes |= {"Bald": is_bald, "Bangs": style.line > -30 and not is_bald}
    if is_bald:
        s.attributes |= dict.fromkeys(("Black_Hair", "Blond_Hair", "Gray_Hair"), False)
        return None
    side, top, end = (value * rng.gauss(1, 0.15) for value in (style.side, style.top, style.end))
    slope, curl = style.slope * (1 if rng.random() < 0.5 else -1), style.curl
    spread = s.half_width + side + style.flare * min(max(end, 0), 70)
    left, right = np.searchsorted(s.column[0], [s.axis - spread - 8, s.axis + spread + 8]).tolist()
    w = slice(0, min(int((EYE_Y + 1.15 * end + 16) / CELL), ROWS)), slice(left, right)
    x, y, u, v = s.column[:, w[1]] - s.axis, s.row[w[0]], s.u[w], s.v[w]
    clouds, clouds2 = s.clouds[w], s.clouds[::-1, ::-1][w]

    # Strands leave the parting sideways and bend downwards; `across` is constant along a strand.
    drop = 1 - np.exp(-(y + 88 + top).clip(1) / 45)
    swing = (0.5 + 4 * curl) * np.sin(y * (0.12 + 0.1 * curl))
    across = (x - 40 * slope) / drop + swing + (0.7 + 3.5 * curl) * clouds
    along = y + 8 * curl * clouds2
    fine, locks = strand_noise(across * 1.3 + 400, along), strand_noise(across * 0.3 + 800, along * 0.6)
    apart = (drop * 1.3).clip(0, 1)  # at the parting strands are too dense to tell apart
    texture = (0.5 * fine + (0.6 + 0.2 * curl) * locks) * apart
    fringe = (1 - 0.8 * curl) * fine + 1.2 * curl * clouds
    rough = (0.6 * fringe + (0.7 + 0.5 * curl) * clouds) * apart

    width = s.half_width + side + style.flare * y.clip(0, 70)
    nx = x / width
    outer = (rounded_radius(np.square(nx), np.square((y + 16).clip(None, 0) / (58 + top)), 0.4) - 1) * 45 + rough
    line = style.line + slope * u + style.arch * np.square(u * (1 / 30))
    level = ((12 - v) / (12 - line.clip(None, -5))).clip(0, 3)
    gap = style.gap + s.half_width - 50 - 0.12 * (y - 20).clip(0, 60)
    opening = (rounded_radius(np.square(u / gap), np.square(level), 1) - 1) * 38 - 0.8 * rough
    front = coverage(outer, 1.5) * coverage(-opening, 1.3) * coverage(v - end + 4 * fringe, 4)
    back = coverage(outer + 3, 2) * coverage(y - end + 3 * fringe, 5) if end > 30 else None
    shade = np.zeros_like(s.u)
    shade[w] = coverage(-2 - opening, 7) * coverage(y - end - 4, 8)
    if style.top < 3:  # cropped hair lets skin through
        front *= (0.72 + 0.15 * s.grain[w]).clip(0, 1)

    gloss = rng.uniform(0.05, 0.35) * (1 - 0.6 * curl)
    highlights = ridge((y + 46 + 6 * locks) * (1 / 12)) + 0.5 * ridge((y - 40 + 8 * locks) * (1 / 24))
    roots = 0.5 * ridge(opening * (1 / 9)) * (y * (1 / 30)).clip(0, 1)
    depth = (1 + 0.38 * texture).clip(0.15, 2.2) * (1 - roots)
    diffuse = s.diffuse(nx.clip(-1, 1), (y * (1 / 75)).clip(-1, 0.2))
    image = (s.hair * s.ambient) * depth + (s.hair * s.key) * (depth * diffuse)
    image += ((0.15 + s.hair) * s.key) * (gloss * highlights * diffuse * (texture + 0.4).clip(0, 2))
    return Hair(w, front, back, shade, image)
