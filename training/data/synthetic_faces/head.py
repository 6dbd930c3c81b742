"""The face: a height map with albedo and gloss, to which features are added one by one and which is then lit."""

import math

import numpy as np

from training.data.synthetic_faces.drawing import (
    CELL,
    EYE_HALF,
    NOISE,
    blend,
    bump,
    coverage,
    hills,
    rgb,
    ridge,
    rounded_radius,
    strand_noise,
)
from training.data.synthetic_faces.scene import Scene


class Head:
    """The face's surface in a region of the frame: albedo, height, gloss; edited part by part, then lit."""

    region = slice(16, 136), slice(10, 108)

    def __init__(self, s: Scene):
        rng, self.s = s.rng, s
        x, y, self.u, self.v = (np.ascontiguousarray(a[self.region]) for a in (s.x, s.y, s.u, s.v))
        taper, square = rng.uniform(0.04, 0.12) + 0.08 * s.feminine, rng.uniform(0.3, 0.7) - 0.2 * s.feminine
        chin = rng.gauss(71, 2.5) - 2 * s.feminine - 8 * s.pitch
        t = ((s.row[self.region[0]] + 5) * (1 / 70)).clip(0, 1)
        t = t * t * (3 - 2 * t)
        middle, width = s.axis * (1 - 0.85 * t), s.half_width * (1 - taper * t)
        y2 = np.square(y.clip(None, -16) * (1 / 58) + (16 / 58) + y.clip(0) * (1 / chin))
        radius = rounded_radius(np.square((x - middle) * (1 / width)), y2, square)
        self.edge = (radius - 1) * 45
        self.smile = min(max(rng.gauss(0.35, 0.45), -0.5), 1.0)
        self.height = 46 * np.sqrt((1 - np.square(radius)).clip(0.004))
        self.height -= 150 * (radius - 1).clip(0)  # the edge turns away, so that it does not shine
        self._relief(self.height)

        au, v, clouds, grain = np.abs(self.u), self.v, s.clouds[::-1][self.region], s.grain[self.region]
        red = 1 + 0.035 * clouds + 0.03 * grain
        red -= rng.uniform(0.05, 0.2 + 0.2 * s.age) * bump(au, v, 18, 5, 12, 8)  # around the eyes
        other = red - rng.uniform(0, 0.2) * (bump(au, v, 25, 25, 15, 14) + 0.8 * bump(au, v, 0, 22, 9, 9))
        if rng.random() < 0.15 and s.skin[0, 0, 0] > 0.5:  # freckles
            spots = (s.texture(NOISE)[self.region] - 1.5).clip(0, 1) * bump(au, v, 12, 20, 30, 16)
            red, other = red * (1 - 0.45 * spots), other * (1 - 0.6 * spots)
        self.albedo = np.stack([s.skin[0] * red, s.skin[1] * other, s.skin[2] * other])
        self.gloss = np.full_like(self.u, rng.uniform(0.03, 0.2))

    def _relief(self, h: np.ndarray) -> None:
        """Adds the features to the height of the plain head."""
        s, rng, u, v, au = self.s, self.s.rng, self.u, self.v, np.abs(self.u)
        happy = max(self.smile, 0)
        h += hills(au, v, (
            (15, -14, 16, 6, 3.5 - 1.5 * s.feminine), (19, -1, 12, 8, -rng.uniform(3, 6)),  # brows, sockets
            (25, 23, 13, 13, rng.uniform(2, 4) + 2 * happy), (0, 42, 18, 12, 3),  # cheeks, jaws
            (0, 63, 11, 9, 4), (0, 54, 9, 4, -2), (0, 34, 2.5, 5, -1),  # chin, below the lip, above it
        ))  # fmt: skip
        fold = ridge((au - 12 - 0.55 * (v - 27).clip(0, 40)) * (1 / 2.5))  # from the nostrils past the mouth
        h -= (0.2 + 0.8 * happy + 1.0 * s.age) * fold * coverage(np.abs(v - 36) - 9, 6)
        if s.age > 0.45:  # lines on the forehead, bags under the eyes
            h += (s.age - 0.35) * 0.7 * np.sin(v + 0.006 * np.square(u)) * bump(u, v, 0, -31, 22, 10)
            h += (s.age - 0.3) * 1.3 * bump(au, v, 18, 10, 9, 3)

        # The nose stands out, so that a rotated head shows it aside.
        self.nose = length, wide = rng.gauss(24, 1.5), rng.gauss(1, 0.13)
        near = slice(46, 94), slice(20, 78)
        u, v = u[near], v[near]
        rise = ((v + 8) * (1 / (length + 8))).clip(0, 1)
        n, v = u - 12 * s.yaw * rise * coverage(v - length - 12, 8), v - 8 * s.pitch * rise
        ramp = rise * (0.3 + 0.7 * rise) * coverage(v - length - 2, 8)
        nose = ramp * (5 * ridge(n * (1 / (9 * wide))) + 4.5 * ridge(n / ((3.5 + 2 * rise) * wide)))
        nose += 2.8 * bump(n, v, 0, length - 2, 6.5 * wide, 6)
        h[near] += rng.uniform(0.8, 1.25) * nose + 2.6 * bump(np.abs(n), v, 8 * wide, length + 0.5, 4, 4.5)

    def nostrils(self) -> None:
        (length, wide), s, w = self.nose, self.s, (slice(64, 92), slice(27, 72))
        n, v = np.abs(self.u[w] - 11 * s.yaw), self.v[w] - 8 * s.pitch
        holes, under = bump(n, v, 4.8 * wide, length + 4.4, 2.4, 1.4), bump(n, v, 0, length + 6, 9, 3)
        wings = bump(n, v, 11 * wide, length + 1, 1.8, 4.5)
        self.albedo[:, w[0], w[1]] *= (1 - 0.7 * holes - 0.12 * under) * (1 - 0.18 * wings)
        self.gloss[w] *= 1 + 1.2 * bump(n, v, 0, length - 3, 4, 4)

    def mouth(self) -> None:
        """Lips, and teeth or the dark between them."""
        s, rng, smile, w = self.s, self.s.rng, self.smile, (slice(72, 108), slice(19, 79))
        u, v, albedo = self.u[w] - 4 * s.yaw, self.v[w] - 3 * s.pitch, self.albedo[:, w[0], w[1]]
        half, full = rng.gauss(15.5, 1) + 3 * max(smile, 0), rng.gauss(1, 0.2) + 0.15 * s.feminine
        agape = rng.uniform(2, 7) * (rng.random() < (0.6 if smile > 0.2 else 0.15))
        s.attributes |= {"Smiling": smile > 0.4, "Mouth_Slightly_Open": agape > 0}
        t = u * (1 / half)
        at, t2 = np.abs(t), np.square(t)
        belly, wide = (1 - t2).clip(0, 1), coverage((at - 1) * half, 1.5)
        line = 41.5 + smile * (2 - 5 * t2) + rng.gauss(0, 0.3) * t
        top, bottom = line - 0.25 * agape * belly, line + 0.9 * agape * belly
        bow = (1 - 0.25 * ridge(t * 6)) * (0.35 + 0.65 * (1 - at).clip(0)) * (1 - 0.25 * max(smile, 0))
        lip_top, lip_bottom = top - 6 * full * bow * belly, bottom + (7 - 1.5 * max(smile, 0)) * full * belly
        lips = coverage(np.maximum(lip_top - v, v - lip_bottom), 1.2) * wide
        tint = s.skin * rgb([0.88, 0.71, 0.72])
        if s.feminine > 0.5 and rng.random() < 0.6:
            lipstick = rgb(rng.gauss(level, 0.13) for level in (0.75, 0.2, 0.25))
            tint = tint + (lipstick - tint) * rng.uniform(0.2, 0.8)
        blend(albedo, tint, 0.85 * lips)
        self.gloss[w] += 0.1 * lips
        self.height[w] += 1.2 * lips + 1.6 * ridge((v - (bottom + lip_bottom) * 0.5) * 0.35) * belly
        albedo *= 1 - 0.4 * ridge((at - 1.02) * 9) * ridge((v - line) * 0.5)
        if agape:
            hole = coverage(np.maximum(top - v, v - bottom)) * wide
            blend(albedo, rgb([0.28, 0.1, 0.1]), hole)
            teeth = coverage(v - np.minimum(top + 5.5 * belly, bottom - 0.3)) * coverage((at - 0.86) * half, 2)
            gaps = (1 - 0.18 * ridge(np.sin(u * 0.62) * 4)) * (1 - 0.5 * t2)
            shown = rng.uniform(0.8, 1) * min(max(2 * smile + 0.3, 0), 1)
            blend(albedo, rgb([0.93, 0.9, 0.84]) * gaps, shown * hole * teeth)
            self.gloss[w] *= 1 - hole
        else:
            albedo *= 1 - 0.7 * ridge((v - line) * 1.1) * wide
        self.lips = np.zeros_like(self.u)
        self.lips[w] = lips

    def beard(self) -> None:
        """Stubble, full beard, goatee or moustache."""
        s, rng, w = self.s, self.s.rng, (slice(50, 120), slice(None))
        kind, density = rng.randrange(5), rng.uniform(0.15, 0.5)
        s.attributes["No_Beard"] = s.feminine > 0.5 or rng.random() < 0.4
        if s.attributes["No_Beard"]:
            return
        u, v, rough = self.u[w], self.v[w], 0.7 * s.clouds[self.region][w]
        au = np.abs(u)
        moustache = np.maximum(np.abs(v - 33.5 - 0.018 * np.square(u)) - 3.2, au - 17)
        area = coverage(moustache + rough, 2)
        if kind < 3:  # 0, 1 stubble, 2 full
            line = 42 - 42 * np.square((au - 14).clip(0, 40) * (1 / 32)) + 10 * ridge(u * (1 / 8))
            area = np.maximum(coverage(line - v + 2 * rough, 5), area)
        elif kind == 3:  # goatee
            chin = np.sqrt(np.square(u) + np.square(v - 59)) - 13
            frame = np.maximum(np.abs(au - 17.5) - 2, np.abs(v - 46) - 9)
            area = np.maximum(coverage(np.minimum(chin, frame) + rough, 3), area)
        area = area * (1 - self.lips[w])
        hairs = strand_noise(u * 1.4 + 1000 + 4 * rough, v * 1.5)
        dense = density if kind < 2 else 0.5 + density
        blend(self.albedo[:, w[0]], s.hair * 0.8, (area * dense * (1 + 0.3 * hairs)).clip(0, 0.95))
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
        liner, lid = 0.8 + 0.4 * s.feminine + 0.7 * makeup, s.color(0.1, 0.7, 0.7)
        brow_y, arch, knit = rng.gauss(12, 1.2), rng.uniform(0, 3), rng.gauss(0, 0.06)
        thick, ink = rng.uniform(1.8, 3) - 0.7 * s.feminine, rng.uniform(0.55, 0.95)

        cells = [(int(y / CELL) - 16, int(x / CELL) - 10) for x, y in s.eyes]
        crops = [(slice(row - 17, row + 10), slice(column - 12, column + 13)) for row, column in cells]
        u, v, height, gloss, albedo = (
            np.concatenate([field[..., rows, columns] for rows, columns in crops], axis=-1)
            for field in (self.u, self.v, self.height, self.gloss, self.albedo)
        )
        side = np.repeat(np.float32([[-1, 1]]), 25, axis=1)
        ex = u * side - EYE_HALF  # outwards from the eye's middle
        ey, t = v + tilt * ex, ex * (1 / half)
        at, t2 = np.abs(t), np.square(t)
        upper, lower = -opened * (1 - np.square(t + 0.1)).clip(-0.2), 0.62 * opened * (1 - t2).clip(-1)
        inside = coverage(np.maximum(np.maximum(upper - ey, ey - lower), (at - 1) * half), 0.9)
        height += 1.6 * bump(ex, ey, 0, -1, 10, 6)
        if makeup:
            blend(albedo, lid, makeup * 0.5 * bump(ex, ey, 1, -4.5, 10, 4))
        fold = 0.35 * ridge((ey - 1.25 * upper + 2.6) * 0.9) * coverage(at - 1, 0.15)
        albedo *= 1 - fold - 0.2 * ridge((ey - lower - 2.4) * 0.8) * coverage(at - 0.9, 0.2)

        shadow = 1 - 0.5 * coverage(ey - upper - 1.5, 2.2)  # the lid's
        blend(albedo, rgb([0.88, 0.84, 0.82]) * (shadow * (1 - 0.35 * t2)), inside)
        blend(albedo, s.skin * rgb([0.95, 0.75, 0.75]), inside * coverage(ex + half - 2, 1.5) * 0.8)
        gx, gy = ex - gaze_x * side, ey - gaze_y
        r = np.sqrt(np.square(gx) + np.square(gy))
        rays = 1 + 0.2 * np.sin(gx * 2.3) * np.sin(gy * 2.3) + (0.5 / iris) * gy
        rays -= 0.55 * coverage(iris - 1.1 - r, 0.6)  # the dark rim
        blend(albedo, s.iris * (rays.clip(0.25, 2) * shadow), inside * coverage(r - iris))
        blend(albedo, rgb([0.05, 0.05, 0.05]), inside * coverage(r - 1.8))
        lashes = coverage(np.abs(ey - upper + 0.3) - liner * (1 + 0.35 * t), 0.9)
        blend(albedo, s.hair * 0.25 + 0.003, 0.85 * lashes * coverage((at - 1.06) * half, 1.2))
        albedo *= 1 - (0.2 + 0.3 * makeup) * ridge((ey - lower) * 1.25) * coverage((at - 1) * half, 1)

        b = (ex - 1) * (1 / 12.5)  # -1 at the brow's inner end, 1 at the outer
        peak = b - 0.3
        center = -brow_y - knit * ex - 0.7 * arch * (1 - np.square(peak)) + 3.5 * np.square(peak.clip(0))
        hairs = strand_noise(ex * 0.9 + v * 0.8 + 600, v)
        away = np.abs(v - center) - thick * (1 - 0.5 * b).clip(0.2, 1.2) + 0.5 * hairs
        brow = coverage(np.maximum(away, (np.abs(b) - 1) * 12), 1.4)
        blend(albedo, s.hair * 0.7, (ink * brow * (1 + 0.2 * hairs)).clip(0, 0.95))
        gloss *= (1 - inside) * (1 - 0.7 * brow)
        glint = 0.9 * inside * bump(gx * side, gy, 1.8 * s.light[0], 1.5 * s.light[1] - 0.5, 1.2, 1.2)
        self.glints = []
        for w, part in zip(crops, (slice(None, 25), slice(25, None)), strict=True):
            self.height[w], self.gloss[w] = height[:, part], gloss[:, part]
            self.albedo[:, w[0], w[1]] = albedo[..., part]
            self.glints.append((w, glint[:, part]))

    def lit(self, shade: np.ndarray | float) -> np.ndarray:
        """The surface under the scene's light less the hair's shade: planar image (3, h, w) of the region."""
        s, (lx, ly, lz) = self.s, self.s.light
        gx, gy = np.zeros_like(self.u), np.zeros_like(self.u)
        gx[:, 1:-1] = (0.5 / CELL) * (self.height[:, 2:] - self.height[:, :-2])
        gy[1:-1] = (0.5 / CELL) * (self.height[2:] - self.height[:-2])
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
            blend(image[:, w[0], w[1]], (s.key * 1.2).clip(0, 1), spot)
        return image
