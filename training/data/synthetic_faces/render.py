"""Renders one portrait from a seed.

A head surface (a rounded solid with a relief of brows, nose, lips and chin) is rotated to a random pose, lit by a key
light and a sky, and combined with hair, beard, glasses, clothes and a background. Size and alignment are those of
CelebA's aligned images, so configurations for CelebA apply unchanged. This is not a model of people: metrics measured
on synthetic faces do not carry over to photographs.
"""

import numpy as np
from PIL import Image

from training.data.synthetic_faces.drawing import HEIGHT, WIDTH, blend, coverage
from training.data.synthetic_faces.hair import render_hair
from training.data.synthetic_faces.head import Head
from training.data.synthetic_faces.parts import add_body, add_ears, add_glasses, render_background
from training.data.synthetic_faces.scene import Scene


def render_face(seed: int) -> np.ndarray:
    """The image of `render_portrait`."""
    return render_portrait(seed)[0]


def render_portrait(seed: int) -> tuple[np.ndarray, dict[str, bool]]:
    """Renders the portrait of a seed.

    Args:
        seed: Any non-negative integer. Equal seeds give equal images (to the rounding of the platform).

    Returns:
        RGB image, (218, 178, 3) uint8, eyes near (70, 111) and (108, 111); and CelebA's attributes of it, by name.
    """
    s = Scene(int(seed))
    rng = s.rng
    image = render_background(s)
    hair = render_hair(s)
    if hair and hair.back is not None:
        blend(image[:, hair.region[0], hair.region[1]], hair.image * 0.45, hair.back)
    add_body(s, image)
    add_ears(s, image)
    head, (rows, columns) = Head(s), Head.region
    head.nostrils()
    head.mouth()
    head.beard()
    head.eyes()
    face = head.lit(hair.shade[rows, columns] if hair else 0.0)
    blend(image[:, rows, columns], face, coverage(head.edge, 1.2))
    if hair:
        blend(image[:, hair.region[0], hair.region[1]], hair.image, hair.front)
    add_glasses(s, image)

    # The camera: vignette, rarely grayscale, focus, contrast, sensor noise.
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
    return np.array(pixels.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)), s.attributes
