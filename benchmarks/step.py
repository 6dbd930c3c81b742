"""Time of each part of a training step, and the fraction of the machine's measured peak that it reaches.

    python -m benchmarks.step --config configs/ultra.json --batch 4 --json
    python -m benchmarks.step --config configs/ultra.json --trunk-weights weights --loop-steps 8

The measured peak is the best throughput of a large matrix product, a large convolution and its two gradients in the same
precision and threads, before and after the parts. The parts run one by one on the same data: forward and backward of encoder,
decoder and feature networks, optimizer, EMA weights; the rest of the step is losses, crops, noise and dispatch.
`--loop-steps` runs the real training loop on synthetic faces and measures the time between its steps, and how much of it waits
for data. Without --trunk-weights the feature networks have random weights, which cost the same. benchmarks/data.py measures
the speed of data.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.profiler import ProfilerActivity, profile

from training.budget.estimate import count_flops
from training.builders import build_model, build_optimizer, freeze_parameters
from training.config import Config, config_from_dict, load_config
from training.data.images import normalize
from training.data.stream import TrainStream
from training.distributed import AUTOCAST_DTYPES, resolve_precision, set_backend_options
from training.ema import EMAWeights
from training.losses.objective import ReconstructionLoss
from training.losses.perceptual import PerceptualTrunk
from training.step import StepResult, TrainStep

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Bench:
    """The objects of a training step, built as the trainer builds them, on random pixels.

    Args:
        config: The configuration; its precision, memory format and optimizer are used.
        batch: Images of a step, in one forward pass.
        trunk_weights: Folder of feature network weights, or None for random ones.
        cpu: Use the CPU even if there is an accelerator.
    """

    def __init__(self, config: Config, batch: int, trunk_weights: str | None, cpu: bool = False) -> None:
        presets = config.training_presets
        cpu = cpu or not torch.accelerator.is_available()
        device = torch.device("cpu") if cpu else torch.accelerator.current_accelerator()
        self.config, self.batch, self.trunk_weights = config, batch, trunk_weights
        self.precision, _ = resolve_precision(presets.mixed_precision, device)
        set_backend_options(presets.allow_tf32, presets.deterministic)
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=self.precision)
        self.device = self.accelerator.device
        self.format = torch.channels_last if presets.channels_last else torch.contiguous_format
        self.model = build_model(config)
        freeze_parameters(self.model, presets)
        if presets.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.to(self.device, memory_format=self.format)
        loss = dataclasses.replace(config.loss, trunk_weights=trunk_weights)
        self.loss = ReconstructionLoss.from_config(
            loss,
            self.device,
            memory_format=self.format,
            dtype=AUTOCAST_DTYPES[self.precision],
            load_weights=trunk_weights is not None,
        )
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(config.training_presets, self.model, self.parameters, self.device)
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.ema = EMAWeights(self.parameters, decay=presets.ema_decay) if presets.ema_decay > 0 else None
        self.resolution = self.model.config.sample_size
        self.step = TrainStep(
            self.accelerator,
            self.prepared,
            self.optimizer,
            self.parameters,
            ema=self.ema,
            loss=self.loss,
            seed=presets.seed,
            latent_shape=self.model.latent_shape,
            micro_batch=batch,
            compile=presets.compile,
            max_grad_norm=presets.max_grad_norm,
        )
        self.pixels = random_pixels(batch, self.resolution)
        self.num_steps = 0

    def build_network(self, name: str) -> PerceptualTrunk:
        """A feature network on the device, in the configuration's memory format."""
        network = PerceptualTrunk(name, self.trunk_weights, load_weights=self.trunk_weights is not None)
        return network.to(self.device, memory_format=self.format)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def seconds(self, function: Callable[[], Any]) -> float:
        """Wall-clock seconds of one call, including the device's work."""
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the run."""
        return self.accelerator.autocast()

    def full_step(self) -> None:
        """One full training step."""
        self.step(self.pixels, step=self.num_steps, beta=1e-4)
        self.num_steps += 1


def random_pixels(count: int, resolution: int) -> Tensor:
    """(count, 3, resolution, resolution), uint8: the speed of a step does not depend on the content of the images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, resolution, resolution), dtype=torch.uint8, generator=generator)


def measure_peak(bench: Bench, seconds: float) -> dict[str, float]:
    """Best GFLOP/s of a large matrix product, a large 3x3 convolution and its two gradients, in the run's precision.

    Args:
        bench: Its device, precision and memory format are used.
        seconds: Spent on each of the four.
    """
    on_cpu = bench.device.type == "cpu"
    dtype = HALF.get(bench.precision, torch.float32)
    count, images = (1024, 1) if on_cpu else (8192, 64)
    left, right = (torch.rand(count, count, device=bench.device, dtype=dtype) for _ in range(2))
    maps = torch.rand(images, 256, 64, 64, device=bench.device, dtype=dtype).to(memory_format=bench.format)
    kernel = torch.rand(256, 256, 3, 3, device=bench.device, dtype=dtype).to(memory_format=bench.format)
    flop = 2 * 256**2 * 9 * images * 64**2
    work = {
        "matrix product": (lambda: left @ right, 2 * count**3),
        "convolution": (lambda: torch.nn.functional.conv2d(maps, kernel, padding=1), flop),
        "its input's gradient": (lambda: conv2d_input(maps.shape, kernel, maps, padding=1), flop),
        "its weight's gradient": (lambda: conv2d_weight(maps, kernel.shape, maps, padding=1), flop),
    }
    rates = {}
    with torch.no_grad():
        for name, (function, flop) in work.items():
            bench.seconds(function)  # selects the kernel
            ended, best = time.perf_counter() + seconds, float("inf")
            while True:
                best = min(best, bench.seconds(function))
                if time.perf_counter() > ended:
                    break
            rates[name] = flop / best / 1e9
    return rates


def time_parts(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part of a step and of the full step, `rounds` times after a warm-up."""
    bench.full_step()  # first, because a gradient scaler cannot unscale before it has scaled a loss
    _one_round(bench)
    found = [_one_round(bench) for _ in range(rounds)]
    return {name: [values[name] for values in found] for name in found[0]}


def _one_round(bench: Bench) -> dict[str, float]:
    found: dict[str, float] = {}
    kept: dict[str, Any] = {}

    def timed(name: str, function: Callable[[], Any]) -> None:
        def call() -> None:
            kept[name] = function()

        found[name] = bench.seconds(call)

    pixels = normalize(bench.pixels.to(bench.device))
    model, config = bench.model, bench.config
    with bench.autocast():
        timed("encoder", lambda: model.encode(pixels).latent_dist.parameters)
    latents = kept["encoder"].detach().chunk(2, dim=1)[0].clone().requires_grad_()
    with bench.autocast():
        timed("decoder", lambda: model.decode(latents).sample)
    for name in ("encoder", "decoder"):
        if not kept[name].requires_grad:  # frozen
            continue
        gradient = torch.full_like(kept[name], 1e-6)
        timed(f"{name} backward", lambda name=name, gradient=gradient: kept[name].backward(gradient))
    if bench.loss.networks:
        sizes = [min(size or bench.resolution, bench.resolution) for size in bench.loss.crop_sizes]
        crops = [pixels[..., :size, :size].clone(memory_format=torch.contiguous_format) for size in sizes]

        def features() -> list[torch.Tensor]:
            return [each for network, crop in zip(bench.loss.networks, crops) for each in network.features(crop)]

        with bench.autocast():
            with torch.no_grad():
                timed("target features", features)
            for crop in crops:
                crop.requires_grad_()
            timed("reconstruction features", features)
        outputs = kept["reconstruction features"]
        gradients = [torch.full_like(output, 1e-6) for output in outputs]
        timed("features backward", lambda: torch.autograd.backward(outputs, gradients))

    def optimize() -> None:
        bench.accelerator.clip_grad_norm_(bench.parameters, config.training_presets.max_grad_norm)
        bench.optimizer.step()
        bench.optimizer.zero_grad(set_to_none=True)

    timed("optimizer", optimize)
    if bench.ema is not None:
        timed("EMA weights", lambda: bench.ema.step(bench.parameters))
    kept.clear()
    timed("step", bench.full_step)
    return found


def top_operations(bench: Bench, count: int) -> list[dict[str, Any]]:
    """The operations that take most of one full step, by their own time, from torch's profiler."""
    activities, key = [ProfilerActivity.CPU], "self_cpu_time_total"
    if bench.device.type == "cuda":
        activities, key = [*activities, ProfilerActivity.CUDA], "self_device_time_total"
    bench.full_step()
    with profile(activities=activities) as profiler:
        bench.full_step()
        bench.synchronize()
    averages = profiler.key_averages()
    total = sum(getattr(event, key) for event in averages)
    largest = sorted(averages, key=lambda event: getattr(event, key), reverse=True)[:count]
    rows = [(event.key, event.count, getattr(event, key)) for event in largest]
    return [{"operation": o, "calls": n, "milliseconds": us / 1e3, "fraction": us / total} for o, n, us in rows]


class _TimedStep:
    """Calls a step and records when it began and ended, and how long the loop had waited for data until then."""

    def __init__(self, step: TrainStep, stream: TrainStream) -> None:
        self._step, self._stream = step, stream
        self.began, self.ended, self.waited = [], [], []

    def __call__(self, *arguments: Any, **keywords: Any) -> StepResult:
        self.began.append(time.perf_counter())
        self.waited.append(self._stream.wait_seconds)
        result = self._step(*arguments, **keywords)
        self.ended.append(time.perf_counter())
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def measure_loop(config: Config, batch: int, steps: int) -> dict[str, float]:
    """Time between the steps of the real training loop, on synthetic faces with a pip-installed feature network.

    Returns:
        Medians over the steps: `seconds_between_steps`, everything that the loop does between two steps, and
        `seconds_waiting`, the part of it that waits for data.
    """
    from training.trainer import Trainer  # imports everything

    with tempfile.TemporaryDirectory() as folder:
        values = config.to_dict()
        # The steps themselves are not measured, so a network without a download will do.
        values["loss"] |= {"trunk": "st_alexnet", "trunk_weights": None, "lpips_trunk": None, "lpips_crop_px": None}
        values["model"] = values["model"] | {"pca_size": None}  # saves its initialization
        values["data"] = {
            "dataset": "synthetic_faces",
            "synthetic_train_images": batch * (steps + 1),
            "synthetic_validation_images": 1,
            "cache_dir": folder,
        }
        presets = {"num_epochs": 1, "batch_size": batch, "micro_batch_size": None, "max_images_per_epoch": None}
        presets |= {"resolution_schedule": {}, "init_from": None, "train_only": "all"}
        values["training_presets"] |= presets
        values["output"] |= {
            "runs_dir": folder,
            "model_dir": folder,
            "eval_lpips_trunk": "st_alexnet",
            "num_samples": 1,
        }
        values["hub"] = {}
        trainer = Trainer(config_from_dict(values))
        trainer.train_step = step = _TimedStep(trainer.train_step, trainer.stream)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
            trainer.run()
    between = [start - end for start, end in zip(step.began[1:], step.ended[:-1])]
    waiting = [after - before for before, after in zip(step.waited[:-1], step.waited[1:])]
    return {"seconds_between_steps": statistics.median(between), "seconds_waiting": statistics.median(waiting)}


def environment(bench: Bench) -> dict[str, Any]:
    """What the results depend on."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "precision": bench.precision,
        "channels_last": bench.config.training_presets.channels_last,
        "batch": bench.batch,
        "resolution": bench.resolution,
        "trunk_weights": "random" if bench.trunk_weights is None else "trained",
        "torch": torch.__version__,
    }


def report(bench: Bench, seconds: float, rounds: int, operations: int, loop_steps: int) -> dict[str, Any]:
    """All results of the command, as plain values."""
    before = measure_peak(bench, seconds)
    measured = time_parts(bench, rounds)
    after = measure_peak(bench, seconds)
    peak = max(*before.values(), *after.values())
    cost = count_flops(bench.config)
    gflop = {**cost["gflop"], "step": cost["gflop_training"]}
    rows = {}
    step_seconds = statistics.median(measured["step"])
    medians = {name: statistics.median(values) for name, values in measured.items()}
    medians["rest of the step"] = step_seconds - sum(value for name, value in medians.items() if name != "step")
    for name, value in medians.items():
        row = {"seconds": value, "fraction_of_step": value / step_seconds}
        if name in measured:
            row |= {"fastest_seconds": min(measured[name]), "slowest_seconds": max(measured[name])}
        if name in gflop:
            rate = gflop[name] * bench.batch / value
            row |= {"gflop_per_image": gflop[name], "gflop_per_second": rate, "fraction_of_peak": rate / peak}
        rows[name] = row
    result = {
        "environment": environment(bench),
        "peak_gflop_per_second": {"best": peak, "before": before, "after": after},
        "parts": rows,
        "images_per_second": bench.batch / step_seconds,
        "top_operations": top_operations(bench, operations),
    }
    if loop_steps:
        loop = measure_loop(bench.config, bench.batch, loop_steps)
        # A longer step would hide the waiting, so it is not counted as a cost of the loop.
        loop["fraction_of_step"] = (loop["seconds_between_steps"] - loop["seconds_waiting"]) / step_seconds
        result["loop"] = loop
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the results of `report`."""
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items()))
    peak = result["peak_gflop_per_second"]
    for when in ("before", "after"):
        print(f"measured peak {when:7s}", ", ".join(f"{name} {rate:.1f} GFLOP/s" for name, rate in peak[when].items()))
    print(f"{'part':26s}{'ms':>10s}{'fastest':>10s}{'of step':>9s}{'GFLOPs':>9s}{'GFLOP/s':>10s}{'of peak':>12s}")
    for name, row in result["parts"].items():
        fastest = f"{1e3 * row['fastest_seconds']:.1f}" if "fastest_seconds" in row else ""
        line = f"{name:26s}{1e3 * row['seconds']:10.1f}{fastest:>10s}{row['fraction_of_step']:9.1%}"
        if "gflop_per_image" in row:
            line += f"{row['gflop_per_image']:9.2f}{row['gflop_per_second']:10.1f}{row['fraction_of_peak']:12.1%}"
        print(line)
    print(f"{result['images_per_second']:.3g} images/s")
    if "loop" in result:
        loop = result["loop"]
        print(
            f"loop: {1e3 * loop['seconds_between_steps']:.1f} ms between steps, {1e3 * loop['seconds_waiting']:.1f} of "
            f"them waiting for data; the rest is {loop['fraction_of_step']:.2%} of the step"
        )
    for row in result["top_operations"]:
        print(f"{row['fraction']:7.1%} {row['milliseconds']:10.1f} ms {row['calls']:6d} x {row['operation']}")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that the benchmarks of the step share."""
    parser.add_argument("--config", default="configs/ultra.json", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--trunk-weights", metavar="DIR", help="folder of feature network weights; default: random weights"
    )
    parser.add_argument("--threads", type=int, help="of torch; default: torch's default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def read_config(arguments: argparse.Namespace) -> Config:
    """The configuration of a benchmark; sets the number of threads.

    Raises:
        ValueError: A number below 1, or what `load_config` refuses.
    """
    for name in ("batch", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}: use at least 1.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return load_config(arguments.config, arguments.overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--batch", type=int, default=4, help="images of a step")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each part; the median is reported")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement of the peak")
    parser.add_argument("--operations", type=int, default=12, help="operations of the profile to show")
    parser.add_argument("--loop-steps", type=int, default=0, help="steps of the real loop to measure; 0: none")
    arguments = parser.parse_args(argv)
    try:
        config = read_config(arguments)
        bench = Bench(config, arguments.batch, arguments.trunk_weights)
        result = report(bench, arguments.seconds, arguments.rounds, arguments.operations, arguments.loop_steps)
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
