"""Whether a reconstruction still shows the same person: distances between embeddings of faces.

The embeddings are dlib's (King 2009, Dlib-ml; the network of 2017 is right for 99.38 % of the pairs of LFW, as its author
reports). Its weights are in the public domain (CC0) and come with the package `face_recognition_models`, without a download.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.images import denormalize

SAME_PERSON = 0.6  # largest distance of two images of one person, as dlib's author recommends
_SIZE = 256  # pixels: smaller faces are not detected
_MARGIN = 0.15  # of the image on each side of the face, where none is detected
_MODELS = "dlib_face_recognition_resnet_model_v1.dat", "shape_predictor_5_face_landmarks.dat"


class IdentityNetwork:
    """Embeds faces on the CPU.

    Raises:
        ValueError: A package is missing.
    """

    def __init__(self) -> None:
        found = [importlib.util.find_spec(name) for name in ("dlib", "face_recognition_models")]
        if None in found:
            raise ValueError(
                "--identity needs dlib and its weights: pip install dlib-bin face_recognition_models, or this project with "
                "its extra `identity`."
            )
        import dlib  # not its models' package, which needs an old setuptools to be imported

        self._dlib = dlib
        folder = Path(next(iter(found[1].submodule_search_locations))) / "models"
        network, landmarks = (str(folder / name) for name in _MODELS)
        self._network, self._landmarks = dlib.face_recognition_model_v1(network), dlib.shape_predictor(landmarks)
        self._detector = dlib.get_frontal_face_detector()
        self.undetected = 0  # images in which no face was detected

    def faces(self, pixels: Tensor) -> list[Any]:
        """Landmarks of the largest face of each image (N, 3, H, W) in [-1, 1]; of its middle where none is detected."""
        found = []
        for image in _to_uint8(pixels):
            boxes = list(self._detector(image, 0))
            if not boxes:
                self.undetected += 1
                low, high = round(_MARGIN * _SIZE), round((1 - _MARGIN) * _SIZE)
                boxes = [self._dlib.rectangle(low, low, high, high)]
            found.append(self._landmarks(image, max(boxes, key=lambda box: box.area())))
        return found

    def embeddings(self, pixels: Tensor, faces: list[Any]) -> Tensor:
        """Embeddings of images (N, 3, H, W) in [-1, 1] at the landmarks of `faces`, (N, 128), float32, on the CPU."""
        vectors = [
            np.array(self._network.compute_face_descriptor(image, face))
            for image, face in zip(_to_uint8(pixels), faces, strict=True)
        ]
        return torch.from_numpy(np.stack(vectors)).float()


def _to_uint8(pixels: Tensor) -> list[np.ndarray]:
    """(N, 3, H, W) in [-1, 1] to N images (256, 256, 3)."""
    resized = F.interpolate(pixels.float(), size=(_SIZE, _SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
    return [np.ascontiguousarray(image) for image in denormalize(resized).permute(0, 2, 3, 1).cpu().numpy()]
