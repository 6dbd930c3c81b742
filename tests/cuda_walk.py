"""Walks a training step, validation, grids and a checkpoint's copies of tiny models on a pretended CUDA device.

`test_cuda_walk.py` runs it in a process of its own (`pretended_cuda.environment`). It prints one JSON object: layout and
precision -> results and counts, with those of the CPU in float32 for comparison.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pretended_cuda
import tiny
import torch

from benchmarks.step import Bench
from training.checkpoint.state import TrainingState
from training.config import config_from_dict
from training.evaluate.grids import image_grids
from training.evaluate.validation import validate

BATCH = 4
SPATIAL = {"sample_size": 64, "latent_layout": "spatial", "latent_channels": 4, "latent_size": 8, "latent_dim": 256}
LAYOUTS = {"vector": {}, "spatial": SPATIAL | {"pca_size": 32, "pca_decode_size": 32}}


def walk(layout: str, precision: str) -> dict[str, Any]:
    """Runs one model; every mixing of devices raises."""
    sections = {
        "model": tiny.SETTINGS["model"] | LAYOUTS[layout],
        "training_presets": tiny.SETTINGS["training_presets"] | {"mixed_precision": precision},
    }
    with tiny.process_state():
        torch.manual_seed(0)
        bench = Bench(config_from_dict(tiny.SETTINGS | sections), BATCH, None)
        images = bench.pixels
        found: dict[str, Any] = {}

        @contextlib.contextmanager
        def counted(name: str):
            pretended_cuda.OPERATIONS.clear(), pretended_cuda.WAITS.clear()
            yield
            found[name] = {
                "operations": sum(pretended_cuda.OPERATIONS.values()),
                "waits": dict(pretended_cuda.WAITS),
                "waits_total": sum(pretended_cuda.WAITS.values()),
            }

        bench.step(images, step=0, beta=1e-3)  # creates the optimizer state
        with counted("step"):
            bench.step(images, step=1, beta=1e-3)
        result = bench.step.finish()
        found["grad_norm"], found["terms"] = result.grad_norm, result.terms
        found["device"] = str(bench.step.parameters[0].device)
        arguments = {"batch": BATCH, "loss": bench.loss}
        with counted("validation"):
            validation = validate(bench.accelerator, bench.model, images, list(range(len(images))), **arguments)
        found["validation_loss"] = validation.values["reconstruction_loss"]
        with counted("grids"):
            image_grids(bench.accelerator, bench.model, images, num_samples=2, seed=0, batch=BATCH)
        state = TrainingState(bench.accelerator, bench.model, bench.optimizer, bench.ema, {})
        with counted("checkpoint"):
            tensors = state.host_tensors()
        assert all(tensor.device.type == "cpu" for file in tensors.values() for tensor in file.values())
        live = state.live_tensors()
        assert all(torch.equal(tensors[file][name], live[file][name].cpu()) for file in live for name in live[file])
    return found


def main() -> None:
    """Prints the results."""
    torch.set_num_threads(1)
    results = {f"{layout} cpu": walk(layout, "no") for layout in LAYOUTS}
    with pretended_cuda.install():
        for layout in LAYOUTS:
            for precision in ("no", "bf16", "fp16"):
                results[f"{layout} {precision}"] = walk(layout, precision)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
