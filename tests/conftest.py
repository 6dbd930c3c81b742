"""Shared fixtures: the rendered faces, and restored process state after every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny

os.environ["ACCELERATE_USE_CPU"] = "true"  # the same results on a machine with a GPU
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and threads of several processes wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """Where the few synthetic faces of the tiny configuration are rendered, once a session."""
    return tmp_path_factory.mktemp("faces")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, faces):
    """An uninterrupted run of the tiny configuration (`runs.Run`); to be looked at, not changed."""
    from runs import EPOCHS, run  # brings torch and diffusers, which not every test needs

    presets = {"num_epochs": EPOCHS}
    return run(tiny.tiny_config(tmp_path_factory.mktemp("finished"), faces, training_presets=presets))


@pytest.fixture
def session():
    """For tests that build an accelerator or a run: see `tiny.process_state`."""
    with tiny.process_state():
        yield
