"""How long a checkpoint blocks training: written in the background, and written synchronously.

    python -m benchmarks.checkpoint [--config configs/ultra.json] [--folder DIR] [--rounds 5]

The model of the configuration with EMA weights and optimizer state, as after a training step, on this machine's disk. In the
background, training waits for the copy to host memory; synchronously, for the fsynced files too. The load of the writer thread
on the training's cores is not measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from training.builders import build_model, build_optimizer, freeze_parameters
from training.checkpoint.format import Snapshot, write_checkpoint
from training.checkpoint.state import TrainingState
from training.config import load_config
from training.ema import EMAWeights
from training.publish.export import model_files
from training.run_files import verify


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description="cost of a checkpoint")
    parser.add_argument("--config", default="configs/ultra.json", metavar="FILE")
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = build_model(config).to(accelerator.device)
    freeze_parameters(model, config.training_presets)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.training_presets, model, parameters, accelerator.device)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = TrainingState(accelerator, model, optimizer, EMAWeights(parameters), {})
    copied, written, verified, size = [], [], [], 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for step in range(arguments.rounds):
            began = time.perf_counter()
            snapshot = Snapshot(step, model_files(model), state.host_tensors(), state.values(), None)
            copied.append(time.perf_counter() - began)
            began = time.perf_counter()
            checkpoint = write_checkpoint(Path(folder), snapshot, keep=2)
            written.append(time.perf_counter() - began)
            began = time.perf_counter()
            verify(checkpoint)
            verified.append(time.perf_counter() - began)
            size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    trained = sum(parameter.numel() for parameter in parameters)
    print(f"{trained / 1e6:.1f} M trained parameters, {size / 2**20:.0f} MiB a checkpoint, {arguments.rounds} rounds")
    for what, seconds in (
        ("training waits, in the background", copied),
        ("training waits, written at once", [a + b for a, b in zip(copied, written)]),
        ("verified before a resume", verified),
    ):
        low, high = min(seconds), max(seconds)
        print(f"{what:36s}{statistics.median(seconds):7.2f} s ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
