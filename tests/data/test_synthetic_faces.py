"""Synthetic faces: a pure function of the seed, aligned like CelebA, varied, and read through `datasets`."""

import io

import numpy as np
import pytest
from PIL import Image

from training.data.synthetic_faces import dataset as synthetic_faces
from training.data.synthetic_faces.dataset import generate_examples, synthetic_dataset
from training.data.synthetic_faces.drawing import HEIGHT, WIDTH
from training.data.synthetic_faces.render import render_face, render_portrait

SEEDS = range(500, 548)


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """(48, 218, 178, 3) uint8."""
    return np.stack([render_face(seed) for seed in SEEDS])


def test_a_face_is_a_pure_function_of_its_seed(faces):
    again = [render_face(seed) for seed in reversed(SEEDS)][::-1]
    np.testing.assert_array_equal(faces, again)
    assert faces.shape == (len(SEEDS), HEIGHT, WIDTH, 3)
    assert faces.dtype == np.uint8
    assert faces.flags.c_contiguous


def test_a_face_does_not_depend_on_numpys_global_state():
    np.random.seed(0)
    first = render_face(3)
    np.random.seed(1)
    np.testing.assert_array_equal(first, render_face(3))


def test_faces_are_varied(faces):
    small = faces[:, ::4, ::4].astype(np.float32).reshape(len(faces), -1) / 255
    gram = small @ small.T
    norms = np.diag(gram)
    mean_square = (norms[:, None] + norms[None, :] - 2 * gram) / small.shape[1]
    between = np.sqrt(mean_square[np.triu_indices(len(faces), 1)])
    # Root mean square on [0, 1]: photographs of different people in this frame differ by 0.37 on average.
    assert between.min() > 0.08
    assert 0.2 < between.mean() < 0.45
    # No single look: brightness of the cheek (skin), of the crown (hair) and of the corner (background).
    for top, left in ((130, 60), (46, 84), (4, 2)):
        assert faces[:, top : top + 10, left : left + 10].mean(axis=(1, 2, 3)).std() > 25


def test_faces_are_pictures_not_flat_or_clipped(faces):
    levels = faces.reshape(len(faces), -1)
    assert (levels.std(axis=1) > 20).all()
    assert ((levels == 0).mean(axis=1) < 0.5).all()
    assert ((levels == 255).mean(axis=1) < 0.6).all()


def _iris_offset(gray: np.ndarray, x: int, y: int) -> tuple[float, float]:
    """Where the darkest spot of the eye's opening lies, relative to (x, y)."""
    region = gray[y - 6 : y + 7, x - 8 : x + 9].astype(np.float64)
    dark = np.clip(np.percentile(region, 12) - region, 0, None)  # pupil and iris; lids and white are lighter
    rows, columns = np.mgrid[-6:7, -8:9]
    return float((dark * columns).sum() / dark.sum()), float((dark * rows).sum() / dark.sum())


def test_eyes_lie_where_celeba_has_them(faces):
    # The mean alone would pass on a flat image, so the irises must also be dark against the cheeks.
    gray = faces.mean(axis=3)
    for x in (70, 108):
        offsets = np.array([_iris_offset(face, x, 111) for face in gray])
        assert np.abs(offsets.mean(axis=0)).max() < 2.0
        assert np.median(np.abs(offsets), axis=0).max() < 3.0
        iris = gray[:, 108:115, x - 3 : x + 4].min(axis=(1, 2))
        cheek = gray[:, 126:134, x - 3 : x + 4].mean(axis=(1, 2))
        assert (iris < 0.6 * cheek).mean() > 0.9


def test_the_mean_face_is_symmetric_and_centered(faces):
    eyes = faces[:, 105:118].mean(axis=(0, 1, 3))
    # Two dark dips at the irises, a bright bridge of the nose between them.
    left, right = 55 + int(np.argmin(eyes[55:85])), 93 + int(np.argmin(eyes[93:123]))
    assert abs(left - 70) <= 3 and abs(right - 108) <= 3
    assert eyes[86:93].mean() > max(eyes[left], eyes[right]) + 8


def test_an_example_holds_a_jpeg_of_the_face():
    (example,) = generate_examples([42])
    assert example["celeb_id"] == 42
    assert example["image"]["path"] == "synthetic_00000042.jpg"
    image = Image.open(io.BytesIO(example["image"]["bytes"]))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (178, 218))
    difference = np.asarray(image).astype(np.float32) - render_face(42)
    assert np.sqrt(np.square(difference).mean()) < 8  # quality 95


def test_dataset_yields_every_seed_once_and_the_same_again(tmp_path):
    dataset = synthetic_dataset(10, first_seed=7, cache_dir=str(tmp_path), num_shards=3)
    assert dataset.num_shards == 3
    examples = list(dataset)
    assert [example["celeb_id"] for example in examples] == list(range(7, 17))
    assert examples == list(generate_examples(range(7, 17)))
    again = synthetic_dataset(10, first_seed=7, cache_dir=str(tmp_path), num_shards=3)
    assert list(again) == examples


def test_dataset_is_rendered_once_and_then_read_from_the_cache(tmp_path, monkeypatch):
    examples = list(synthetic_dataset(4, first_seed=0, cache_dir=str(tmp_path), num_shards=2))

    def fail(seed):
        raise AssertionError(f"seed {seed} is rendered again")

    monkeypatch.setattr(synthetic_faces, "render_portrait", fail)
    assert list(synthetic_dataset(4, first_seed=0, cache_dir=str(tmp_path), num_shards=1)) == examples


def test_disjoint_seeds_share_no_face(tmp_path):
    train = synthetic_dataset(4, first_seed=0, cache_dir=str(tmp_path), num_shards=1)
    validation = synthetic_dataset(4, first_seed=4, cache_dir=str(tmp_path), num_shards=1)
    images = [example["image"]["bytes"] for example in (*train, *validation)]
    assert len(set(images)) == 8


@pytest.mark.parametrize(
    ("num_images", "first_seed", "num_shards", "named"),
    [(0, 0, 1, "num_images=0"), (4, -1, 1, "first_seed=-1"), (4, 0, 5, "num_shards=5"), (4, 0, 0, "=0")],
)
def test_bad_arguments_are_named(num_images, first_seed, num_shards, named):
    with pytest.raises(ValueError, match=named):
        synthetic_dataset(num_images, first_seed, num_shards=num_shards)


def test_the_version_names_these_pixels(faces):
    """Fails when other pixels are rendered: raise VERSION then, so that no cache of the old ones is read."""
    # Means of blocks, rounded: floating-point results differ in the last bit between processors.
    blocks = faces[:, :216, :176].reshape(len(faces), 27, 8, 22, 8, 3).mean(axis=(2, 4, 5))
    assert (synthetic_faces.VERSION, round(float(blocks.mean()), 1), round(float(blocks.std()), 1)) == (1, 120.6, 61.1)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        ValueError, match=r"cannot be written to '.*file/cache' \(Not a directory\); set data.cache_dir"
    ):
        synthetic_dataset(2, first_seed=0, cache_dir=str(tmp_path / "file" / "cache"), num_shards=1)


def test_every_attribute_is_known_and_neither_rare_nor_common():
    known = [render_portrait(seed)[1] for seed in range(200)]
    assert all(set(attributes) == set(synthetic_faces.ATTRIBUTES) for attributes in known)
    for name in synthetic_faces.ATTRIBUTES:
        assert 0.01 < np.mean([attributes[name] for attributes in known]) < 0.95, name
