"""Measures a device in one command, for whoever has a GPU that nobody has measured: please send us the file that it writes.

    python -m benchmarks.gpu                                    # five minutes, most of them for torch.compile
    python -m benchmarks.gpu --no-compile --batch 16 --output my_gpu.json

Steps of a configuration, eager and compiled, in bf16 and fp16 (on a CPU: bf16 and float32): time, images/s, fraction of the
roofline, peak memory, each beside the estimate of `python -m training.budget`. Images/s of the data path. A small run on
synthetic faces that is stopped and resumed must equal one that is not, bit for bit, and the loss of its first steps must
follow that of the CPU. The feature networks of the timed steps have random weights, which cost the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from benchmarks.data import images_per_second, our_batches, our_stream, write_corpus
from benchmarks.step import Bench, measure_loop
from training.budget.devices import local_device, measure_device
from training.budget.estimate import estimate_cost
from training.budget.memory import CONTEXT_BYTES
from training.cli import select_device
from training.config import Config, config_from_dict, load_config
from training.data.stream import first_training_images
from training.publish.run_record import describe_hardware
from training.run_files import list_checkpoints
from training.trainer import EXIT_STOPPED, Trainer

ROOT = Path(__file__).parent.parent
# Largest relative difference of the loss from the CPU's over all compared steps. Rounding grows from step to step.
TOLERANCE = {"no": 0.01, "bf16": 0.05}


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """A configuration with other values, by section."""
    values = config.to_dict()
    for name, changes in sections.items():
        values[name] = values[name] | changes
    return config_from_dict(values)


def isolated(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs one measurement with a new accelerator; an error becomes its result, so that the others still run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
            return function()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def measure_step(config: Config, batch: int, steps: int) -> dict[str, Any]:
    """Time and memory of a training step, with what was estimated.

    Args:
        config: Its precision and `compile` are used.
        batch: Images of a step, in one forward pass.
        steps: In each of three measurements.
    """
    estimate = estimate_cost(changed(config, training_presets={"batch_size": batch, "micro_batch_size": None}), 1, None)
    bench = Bench(config, batch, None)
    first = bench.seconds(bench.full_step)
    bench.full_step()

    def run() -> None:
        for _ in range(steps):
            bench.full_step()

    seconds = statistics.median(bench.seconds(run) / steps for _ in range(3))
    peak = torch.cuda.max_memory_reserved() / 2**30 if bench.device.type == "cuda" else None
    return {
        "first_step_seconds": first,
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "estimated_seconds": estimate["time"]["seconds"]["step"],
        "fraction_of_roofline": estimate["time"]["roofline_step_seconds"] / seconds,
        "peak_memory_gib": peak,
        # Without the context of CUDA, which the allocator does not see.
        "estimated_memory_gib": (estimate["memory"]["total_bytes"] - CONTEXT_BYTES) / 2**30,
    }


def measure_loader(resolution: int, seconds: float) -> dict[str, Any]:
    """Images/s of the data path by decode threads and processes, from JPEGs of CelebA's size in a local cache."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = [count for count in (1, 2, 4, 8, 16) if count == 1 or count <= cores]
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name), None, 4096)
        next(our_batches(our_stream(Path(name), resolution, workers[-1]), 0))
        next(our_batches(our_stream(Path(name), resolution, workers[-1]), 1))  # completes the cache
        rates = {}
        for count in workers:
            stream = our_stream(Path(name), resolution, count)
            rates[f"{count} threads"] = images_per_second(our_batches(stream, 2), seconds)
        for count in (each for each in workers if each > 2):
            stream = our_stream(Path(name), resolution, 1, processes=count)
            rates[f"{count} processes"] = images_per_second(our_batches(stream, 2), seconds)
    return {"cores": cores, "images_per_second": rates}


def check_resume(config: Config, folder: Path) -> dict[str, Any]:
    """Whether a run that is stopped in its second epoch and resumed ends as one that is not, bit for bit.

    With deterministic kernels and without feature networks, whose pooling has none on CUDA.
    """
    config = changed(
        config,
        loss={"perceptual_weight": 0.0, "lpips_weight": 0.0},
        training_presets={"deterministic": True},
    )

    def train(name: str, stop_at: int | None = None, resume: str | None = None) -> Path:
        trainer = Trainer(changed(config, output={"runs_dir": str(folder / name), "model_dir": str(folder)}), resume)
        step = trainer.train_step.gradients

        def gradients(*arguments: Any, **keywords: Any) -> Any:
            if keywords["step"] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments, **keywords)

        trainer.train_step.gradients = gradients
        code = trainer.run()
        assert code == (EXIT_STOPPED if stop_at is not None else 0), f"the run ended with code {code}"
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return trainer.run_dir

    steps = config.data.synthetic_train_images // config.training_presets.batch_size
    wanted = list_checkpoints(train("uninterrupted"))[-1]
    train("resumed", stop_at=steps + steps // 2)
    found = list_checkpoints(train("resumed", resume="auto"))[-1]
    files = sorted(path.relative_to(wanted) for path in wanted.rglob("*.safetensors"))
    different = [str(name) for name in files if not _equal_tensors(found / name, wanted / name)]
    return {"bitwise_equal": not different and found.name == wanted.name, "files": len(files), "different": different}


def _equal_tensors(file: Path, other: Path) -> bool:
    """Whether two files hold the same tensors; their headers name different runs."""
    tensors, others = load_file(file), load_file(other)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def compare_losses(config: Config, device: torch.device, steps: int) -> dict[str, Any]:
    """The reconstruction loss of the first steps on the device, in float32 and bf16, beside that of the CPU."""
    batch = config.training_presets.batch_size
    images = first_training_images(config.data, config.model["sample_size"], 0, 8 * batch).split(batch)

    def losses(precision: str, on_cpu: bool) -> list[float]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        bench = Bench(changed(config, training_presets={"mixed_precision": precision}), batch, None, cpu=on_cpu)
        results = [bench.step(images[step % len(images)], step=step, beta=1e-3) for step in range(steps)]
        return [result.terms["reconstruction"] for result in (*results[1:], bench.step.finish())]

    wanted = losses("no", on_cpu=True)
    found: dict[str, Any] = {"steps": steps, "cpu": wanted, "largest_relative_difference": {}, "tolerance": TOLERANCE}
    for precision in TOLERANCE if device.type != "cpu" else ("bf16",):
        found[precision] = losses(precision, on_cpu=device.type == "cpu")
        largest = max(abs(a / b - 1) for a, b in zip(found[precision], wanted, strict=True))
        found["largest_relative_difference"][precision] = largest
    largest = found["largest_relative_difference"]
    found["within_tolerance"] = all(value <= TOLERANCE[name] for name, value in largest.items())
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """What the results depend on."""
    found = {
        **describe_hardware(device, 1, "all"),
        "cpu": describe_hardware(torch.device("cpu"), 1, "all")["device"],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **{module.__name__: module.__version__ for module in (torch, accelerate, diffusers)},
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
            "devices": torch.cuda.device_count(),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All results of the command, as plain values."""
    config, small = load_config(arguments.config, arguments.overrides), load_config(arguments.small_config)
    device, batch, began = select_device(None), arguments.batch, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        presets = {"num_epochs": 2, "micro_batch_size": None, "max_train_minutes": None, "pca_init_images": 64}
        small = changed(
            small,
            data={
                "synthetic_train_images": 8 * small.training_presets.batch_size,
                "synthetic_validation_images": 16,
                "cache_dir": name,
            },
            training_presets=presets,
        )
        result: dict[str, Any] = {"environment": environment(device), "config": arguments.config, "batch": batch}
        rates = measure_device(device, "measured", 0)
        result["device"] = {"table": asdict(local_device(device)), "measured": asdict(rates)}
        result["steps"] = {}
        for compiled in (False, True) if arguments.compile else (False,):
            for precision in ("bf16", "fp16") if device.type == "cuda" else ("bf16", "no"):
                key = f"{precision} {'compiled' if compiled else 'eager'}"
                presets = {"mixed_precision": precision, "compile": compiled}
                one = changed(config, training_presets=presets)
                result["steps"][key] = isolated(lambda one=one: measure_step(one, batch, arguments.steps))
                print(f"{key}: {result['steps'][key]}", file=sys.stderr)
        resolution = config.model["sample_size"]
        result["loader"] = isolated(lambda: measure_loader(resolution, arguments.loader_seconds))
        result["loop"] = isolated(lambda: measure_loop(config, batch, arguments.loop_steps))
        result["resume"] = isolated(lambda: check_resume(small, Path(name)))
        result["losses"] = isolated(lambda: compare_losses(small, device, arguments.loss_steps))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    result["seconds"] = time.monotonic() - began
    return result


def print_table(result: dict[str, Any]) -> None:
    """Prints the results of `measure`."""
    where = result["environment"]
    print(f"{where['device']}, {where['cpu']}, torch {where['torch']}, CUDA {where['cuda']}, {result['seconds']:.0f} s")
    table, rates = result["device"]["table"], result["device"]["measured"]
    print(
        f"measured rates: convolutions {rates['half_tflops']:.3g} TFLOP/s in bf16 and {rates['float32_tflops']:.3g} in "
        f"float32, memory {rates['bandwidth_gbps']:.4g} GB/s; estimates use {table['half_tflops']:.3g} x "
        f"{table['efficiency']:g}, {table['float32_tflops']:.3g} x {table['efficiency']:g}, {table['bandwidth_gbps']:.4g} x "
        f"{table['bandwidth_efficiency']:g}"
    )
    print(f"{result['config']}, batch {result['batch']}")
    print("| step | first, s | ms | estimated | images/s | of roofline | memory, GiB | estimated |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, row in result["steps"].items():
        if "error" in row:
            print(f"| {name} | {row['error']} | | | | | | |")
            continue
        memory = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f}"
        print(
            f"| {name} | {row['first_step_seconds']:.1f} | {1e3 * row['seconds']:.1f} | "
            f"{1e3 * row['estimated_seconds']:.1f} | {row['images_per_second']:.4g} | {row['fraction_of_roofline']:.2f} | "
            f"{memory} | {row['estimated_memory_gib']:.2f} |"
        )
    for name in ("loader", "loop", "resume", "losses"):
        print(f"{name:8s} {_line(name, result[name])}")


def _line(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    if name == "loader":
        rates = ", ".join(f"{count}: {rate:.0f}" for count, rate in found["images_per_second"].items())
        return f"images/s with {rates} ({found['cores']} cores)"
    if name == "loop":
        return (
            f"{1e3 * found['seconds_between_steps']:.1f} ms between steps, {1e3 * found['seconds_waiting']:.1f} of them "
            "waiting for data"
        )
    if name == "resume":
        return "bitwise equal" if found["bitwise_equal"] else f"NOT equal: {', '.join(found['different'])}"
    differences = ", ".join(f"{key} {value:.2%}" for key, value in found["largest_relative_difference"].items())
    verdict = "within tolerance" if found["within_tolerance"] else "NOT within tolerance"
    return f"{verdict}: over {found['steps']} steps at most {differences} from the CPU's"


def is_ok(result: dict[str, Any]) -> bool:
    """Whether everything was measured, resume is exact and losses follow the CPU's."""
    parts = [*result["steps"].values(), *(result[name] for name in ("loader", "loop", "resume", "losses"))]
    finite = all(math.isfinite(row.get("seconds", 0.0)) for row in result["steps"].values())
    return finite and not any(
        "error" in part or not part.get("bitwise_equal", True) or not part.get("within_tolerance", True)
        for part in parts
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "ultra.json"), help="whose steps are timed")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--small-config", default=str(ROOT / "configs" / "quickstart.json"), help="that is trained")
    parser.add_argument("--batch", type=int, default=64, help="images of a timed step (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="in each of three measurements (%(default)s)")
    parser.add_argument("--loop-steps", type=int, default=20, help="of the training loop (%(default)s)")
    parser.add_argument("--loss-steps", type=int, default=50, help="beside the CPU's (%(default)s)")
    parser.add_argument("--loader-seconds", type=float, default=5, help="for each number of threads (%(default)s)")
    parser.add_argument("--no-compile", action="store_false", dest="compile", help="leave torch.compile out")
    parser.add_argument("--output", default="gpu_benchmark.json", metavar="FILE", help="(%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 1 where something failed or differs, 2 for a user error."""
    arguments = build_parser().parse_args(argv)
    try:
        for name in ("batch", "steps", "loop_steps", "loss_steps"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: use at least 1.")
        result = measure(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)
    print(f"written to {arguments.output}: please attach it to an issue")
    return 0 if is_ok(result) else 1


if __name__ == "__main__":
    sys.exit(main())
