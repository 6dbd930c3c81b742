"""Throughput of our training step beside the `AutoencoderKL` baselines that users would train instead.

    python -m benchmarks.compare_baseline --trunk-weights weights --batch 1 --rounds 3 --seconds 20 --json
    python -m benchmarks.compare_baseline --models ours baseline_1024 --batch 4

Models: `ours`, the real `TrainStep` of --config with all its terms and EMA weights; `baseline_sd`, diffusers' `AutoencoderKL`
in Stable Diffusion's widths; `baseline_1024`, the smallest `AutoencoderKL` of usual widths with 1,024 latent dimensions. The
baselines are trained as published trainers do it: L1, KL, and two separate passes of VGG16 over full images, one for LPIPS
and one for a feature loss; with our optimizer, clipping and memory format, and without EMA weights, which they often have.
All models see the same pixels at the same batch size, precision and threads, in interleaved trials (A B C A B C). Where a
baseline does not fit into memory, `--micro-batch` splits its batch. Without --trunk-weights the feature networks have random
weights, which cost the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step import Bench, add_common_arguments, environment, measure_peak, read_config
from training.budget.estimate import count_flops
from training.config import Config, TrainingPresets
from training.data.images import normalize
from training.losses.perceptual import PerceptualTrunk

BASELINES: dict[str, dict[str, Any]] = {
    "baseline_sd": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4},
    "baseline_1024": {"block_out_channels": (64, 128, 128, 256, 256), "layers_per_block": 2, "latent_channels": 4},
}
TRUNK = "vgg16"  # of LPIPS as autoencoders are trained with it
KL_WEIGHT = 1e-6  # times the sum over latents, the convention of latent diffusion; costs the same at any value


def build_baseline(name: str) -> AutoencoderKL:
    """A baseline with fresh weights."""
    shape = BASELINES[name]
    stages = len(shape["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages, **shape
    )


def baseline_loss(model: nn.Module, lpips_trunk: PerceptualTrunk, feature_trunk: PerceptualTrunk, pixels):
    """The usual loss of an autoencoder; two networks, because the terms come from separate packages.

    Args:
        model: A baseline.
        lpips_trunk: Of LPIPS.
        feature_trunk: Of the feature loss.
        pixels: (N, 3, H, W) in [-1, 1].

    Returns:
        A scalar with gradient.
    """
    posterior = model.encode(pixels).latent_dist
    reconstruction = model.decode(posterior.sample()).sample
    with torch.no_grad():
        lpips_target, feature_target = lpips_trunk.features(pixels), feature_trunk.features(pixels)
    lpips = lpips_trunk.lpips(lpips_trunk.features(reconstruction), lpips_target).mean()
    perceptual, _ = feature_trunk.distances(feature_trunk.features(reconstruction), feature_target)
    return (
        (reconstruction.float() - pixels).abs().mean() + lpips + perceptual.mean() + KL_WEIGHT * posterior.kl().mean()
    )


def optimizer_class(presets: TrainingPresets) -> type[torch.optim.Optimizer]:
    """The optimizer of a baseline.

    Raises:
        ValueError: Muon, which the baselines do not have.
    """
    if presets.optimizer == "muon":
        raise ValueError('the baselines have no Muon: add --set training_presets.optimizer="adam" (or "adamw").')
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[presets.optimizer]


class BaselineStep:
    """Optimizer steps of a baseline on the pixels of a `Bench`, `micro_batch` of them in one forward pass."""

    def __init__(self, name: str, bench: Bench, micro_batch: int) -> None:
        self.bench, self.micro_batch = bench, micro_batch
        self.model = build_baseline(name).to(bench.device, memory_format=bench.format).train()
        self.parameters = list(self.model.parameters())
        presets = bench.config.training_presets
        kind = optimizer_class(presets)
        fused = bench.device.type in ("cpu", "cuda")
        optimizer = kind(self.parameters, lr=presets.learning_rate, weight_decay=presets.weight_decay, fused=fused)
        self.optimizer = bench.accelerator.prepare(optimizer)
        self.networks = [bench.build_network(TRUNK) for _ in range(2)]

    def step(self) -> None:
        """One full training step."""
        bench = self.bench
        for micro_batch in bench.pixels.split(self.micro_batch):
            pixels = normalize(micro_batch.to(bench.device))
            with bench.autocast():
                loss = baseline_loss(self.model, *self.networks, pixels)
            bench.accelerator.backward(loss * (len(micro_batch) / bench.batch))
        bench.accelerator.clip_grad_norm_(self.parameters, bench.config.training_presets.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def count_baseline(name: str, resolution: int) -> dict[str, float]:
    """Count parameters, latent dimensions and GFLOPs per image of a baseline, on the meta device.

    Args:
        name: Key of `BASELINES`.
        resolution: Of the image, in pixels.
    """
    with torch.device("meta"):
        model = build_baseline(name)
        network = PerceptualTrunk(TRUNK, load_weights=False).to("meta")
        pixels = torch.zeros(1, 3, resolution, resolution)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            latents = model.encode(pixels).latent_dist.mean
            model.decode(latents)
        with FlopCounterMode(display=False) as training:
            baseline_loss(model, network, network, pixels).backward()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latent_dim": latents.numel(),
        "gflop_forward": forward.get_total_flops() / 1e9,
        "gflop_training": training.get_total_flops() / 1e9,
    }


def count_ours(config: Config) -> dict[str, float]:
    """The same of a configuration."""
    cost = count_flops(config)
    channels, height, width = cost["latent_shape"]
    return {
        "parameters": cost["parameters"],
        "latent_dim": channels * height * width,
        "gflop_forward": cost["gflop_forward"],
        "gflop_training": cost["gflop_training"],
    }


def images_per_second(step: Callable[[], None], bench: Bench, seconds: float, min_steps: int) -> tuple[float, int]:
    """Throughput over at least `seconds` and at least `min_steps` steps; and the number of steps."""
    steps, spent = 0, 0.0
    while spent < seconds or steps < min_steps:
        spent += bench.seconds(step)
        steps += 1
    return steps * bench.batch / spent, steps


def compare(
    config: Config, names: Sequence[str], *, batch: int, micro_batch: int | None, rounds: int, seconds: float,
    min_steps: int, peak_seconds: float, trunk_weights: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the models in interleaved trials.

    Args:
        config: Of our step; its precision, memory format, optimizer and image size hold for all.
        names: Models; "ours" must be among them.
        batch: Images of a step.
        micro_batch: Most images in one forward pass of a baseline; None for the full batch.
        rounds: Trials of each model.
        seconds, min_steps: Minimum length of a trial.
        peak_seconds: Length of each measurement of the machine's peak.
        trunk_weights: Folder of feature network weights, or None for random ones.

    Returns:
        Environment, measured peak, and for each model its cost, its throughput and the speedup of ours over it.
    """
    bench = Bench(config, batch, trunk_weights)
    steps: dict[str, Callable[[], None]] = {}
    for name in names:
        steps[name] = bench.full_step if name == "ours" else BaselineStep(name, bench, micro_batch or batch).step
    before = measure_peak(bench, peak_seconds)
    for name, step in steps.items():
        began = time.perf_counter()
        step()  # allocates memory, selects kernels
        print(f"{name}: first step {time.perf_counter() - began:.1f} s", file=sys.stderr)
    rates: dict[str, list[float]] = {name: [] for name in names}
    step_counts = dict.fromkeys(names, 0)
    for _ in range(rounds):
        for name, step in steps.items():
            rate, count = images_per_second(step, bench, seconds, min_steps)
            rates[name].append(rate)
            step_counts[name] += count
            print(f"{name}: {rate:.3g} images/s", file=sys.stderr)
    after = measure_peak(bench, peak_seconds)
    peak = max(*before.values(), *after.values())
    models = {}
    for name in names:
        cost = count_ours(config) if name == "ours" else count_baseline(name, bench.resolution)
        median = statistics.median(rates[name])
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[name])]
        models[name] = {
            **cost,
            "images_per_second": median,
            "slowest": min(rates[name]),
            "fastest": max(rates[name]),
            "steps": step_counts[name],
            "gflop_per_second": median * cost["gflop_training"],
            "fraction_of_peak": median * cost["gflop_training"] / peak,
            "speedup": statistics.median(ratios),
            "speedup_range": [min(ratios), max(ratios)],
        }
    return {
        "environment": {**environment(bench), "baseline_micro_batch": micro_batch or batch, "rounds": rounds},
        "peak_gflop_per_second": {"best": peak, "before": before, "after": after},
        "models": models,
    }


def print_table(result: dict[str, Any]) -> None:
    """Print the results of `compare`."""
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items()))
    print(f"measured peak {result['peak_gflop_per_second']['best']:.1f} GFLOP/s")
    print(
        f"{'':12s}{'M params':>9s}{'latent':>9s}{'GFLOPs':>8s}{'images/s':>10s}{'min .. max':>20s}{'of peak':>12s}{'speedup':>9s}"
    )
    for name, row in result["models"].items():
        spread = f"{row['slowest']:.3g} .. {row['fastest']:.3g}"
        print(
            f"{name:12s}{row['parameters'] / 1e6:9.1f}{row['latent_dim']:9d}{row['gflop_training']:8.0f}"
            f"{row['images_per_second']:10.3g}{spread:>20s}{row['fraction_of_peak']:12.1%}{row['speedup']:8.1f}x"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_baseline", description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=("ours", *BASELINES), default=["ours", *BASELINES])
    parser.add_argument("--batch", type=int, default=1, help="images of a step, for all models")
    parser.add_argument("--micro-batch", type=int, help="most images in one forward pass of a baseline")
    parser.add_argument("--rounds", type=int, default=3, help="trials of each model; medians and spread are shown")
    parser.add_argument("--seconds", type=float, default=10.0, help="minimum length of a trial")
    parser.add_argument("--min-steps", type=int, default=2, help="minimum number of steps of a trial")
    parser.add_argument("--peak-seconds", type=float, default=3.0, help="length of each measurement of the peak")
    arguments = parser.parse_args(argv)
    try:
        config = read_config(arguments)
        if "ours" not in arguments.models:
            raise ValueError("--models lacks ours, which the others are compared with: add it.")
        for name in ("min_steps", "micro_batch"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: use at least 1.")
        result = compare(
            config,
            arguments.models,
            batch=arguments.batch,
            micro_batch=arguments.micro_batch,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            min_steps=arguments.min_steps,
            peak_seconds=arguments.peak_seconds,
            trunk_weights=arguments.trunk_weights,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
