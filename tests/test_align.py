"""The command align: geometry against faces whose eyes are known, what is dropped, and the real detector where it is."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import align
from training.align import LEFT_EYE, RIGHT_EYE, Face, align_face
from training.data.synthetic_faces.render import render_face
from training.data.synthetic_faces.scene import Scene
from training.synthetic_faces import write_faces

SIZE = 178


def photograph(seed: int, angle: float, scale: float, shift: complex) -> tuple[Image.Image, Face]:
    """A synthetic face, rotated, scaled and shifted into a larger picture, and where its eyes are there."""
    rotation = scale * complex(math.cos(angle), math.sin(angle))
    inverse = 1 / rotation
    origin = -shift * inverse
    coefficients = (inverse.real, -inverse.imag, origin.real, inverse.imag, inverse.real, origin.imag)
    image = Image.fromarray(render_face(seed))
    moved = image.transform((1400, 1200), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    eyes = [rotation * complex(*eye) + shift for eye in Scene(seed).eyes]
    return moved, Face(*((eye.real, eye.imag) for eye in eyes), probability=1.0, others=0)


@pytest.mark.parametrize(("angle", "scale"), [(0.0, 1.0), (0.3, 1.3), (-0.5, 2.5)])
def test_eyes_are_brought_to_their_places(angle, scale):
    seed = 7
    image, face = photograph(seed, angle, scale, 450 + 350j)
    square, outside = align_face(image, face, SIZE)
    # The same without the detour: a photograph whose eyes are where they were rendered.
    direct, _ = align_face(*photograph(seed, 0.0, 1.0, 450 + 350j), SIZE)
    middle = np.s_[30:-20, 30:-30]  # the edges differ: the face's own picture ends there
    difference = np.asarray(square).astype(int)[middle] - np.asarray(direct).astype(int)[middle]
    assert np.abs(difference).mean() < 4
    assert outside < 0.01


def test_the_eyes_of_a_rendered_face_are_already_in_place():
    image = Image.fromarray(render_face(7))
    eyes = Face(*Scene(7).eyes, probability=1.0, others=0)
    square, _ = align_face(image, eyes, SIZE)
    center = np.asarray(image.crop((0, 20, 178, 198))).astype(int)
    assert np.abs(np.asarray(square) - center)[40:-40, 40:-40].mean() < 15  # synthetic eyes vary by some pixels
    assert align._deviation(image, eyes) < align._ALIGNED


def test_what_lies_outside_of_the_photograph_is_reflected_and_counted():
    gradient = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2))
    # The square is as large as the photograph and begins 64 pixels left of it.
    face = Face((LEFT_EYE[0] * 256 - 64, LEFT_EYE[1] * 256), (RIGHT_EYE[0] * 256 - 64, RIGHT_EYE[1] * 256), 1.0, 0)
    square, outside = align_face(gradient, face, 256)
    assert outside == pytest.approx(0.25, abs=0.01)
    row = np.asarray(square)[128, :, 0].astype(int)
    assert np.abs(row[:64][::-1] - row[64:128]).max() <= 2


@pytest.fixture
def detector(monkeypatch):
    """Finds `face` in every picture of the width of `photograph`."""

    class Fake:
        def __init__(self, device: str | None) -> None: ...

        def __call__(self, image: Image.Image) -> Face | None:
            return self.face if image.width == 1400 else None

    monkeypatch.setattr(align, "Detector", Fake)
    return Fake


def test_faces_are_written_and_what_is_dropped_is_reported(detector, tmp_path, capsys):
    image, detector.face = photograph(3, 0.2, 2.0, 450 + 350j)
    source, output = tmp_path / "photographs", tmp_path / "faces"
    (source / "album").mkdir(parents=True)
    image.save(source / "album" / "one.jpg")
    image.save(source / "album" / "one.png")
    Image.new("RGB", (901, 700)).save(source / "nobody.png")
    (source / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    image.save(source / "rotated.png", exif=b"Exif\0\0no TIFF header")
    Image.new("RGB", (900, 700)).save(os.fsencode(source) + b"/na\xefve.png")
    assert align.main([str(source), str(output)]) == 0
    for name in ("one.png", "one.png.png"):  # neither replaces the other
        with Image.open(output / "album" / name) as face:
            assert face.size == (256, 256)
    with (output / align.REPORT).open(newline="") as file:
        results = {row["file"]: row["result"] for row in csv.DictReader(file)}
    assert results["album/one.jpg"] == "aligned" and results["nobody.png"] == "no face"
    assert results["broken.jpg"].startswith("not readable") and results["rotated.png"] == "aligned"
    assert results["na\\udcefve.png"] == "no face"
    out = capsys.readouterr().out
    assert "not aligned like CelebA" in out and "6 photographs: 3 aligned" in out
    assert align.main([str(source), "--check"]) == 1
    assert ": not aligned like CelebA, eyes " in capsys.readouterr().out
    assert align.main([str(source), str(output), "--min-eye-distance", "200"]) == 0
    assert "3 too small" in capsys.readouterr().out
    left, right = detector.face.left_eye, detector.face.right_eye
    detector.face = Face((left[0] - 500, left[1]), (right[0] - 500, right[1]), 1.0, 0)
    assert align.main([str(source), str(output)]) == 0
    assert "3 cut off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photographs"], "give the folder OUT"),
        (["photographs", "faces", "--check"], "give the folder OUT"),
        (["photographs", "photographs/faces"], "lies in photographs"),
        (["nowhere", "faces"], "nowhere is not a folder"),
        (["photographs/nobody.png", "faces"], "nobody.png is not a folder"),
        (["photographs", "--check"], "no face was found in 1 photographs"),
    ],
)
def test_user_errors_are_one_line(detector, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("photographs").mkdir()
    Image.new("RGB", (901, 700)).save("photographs/nobody.png")
    assert align.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_missing_detector_is_one_line(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "face.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert align.main([str(tmp_path), "--check"]) == 2
    assert "pip install facenet-pytorch==2.5.3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("facenet_pytorch") is None, reason="needs facenet-pytorch==2.5.3")
def test_the_detector_finds_synthetic_faces(tmp_path, capsys):
    write_faces(tmp_path, range(12))
    assert align.main([str(tmp_path), "--check"]) == 0
    assert "aligned like CelebA" in capsys.readouterr().out
