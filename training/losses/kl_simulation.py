"""Simulates the KL control of a configuration on a model of the training, and plots it.

python -m training.kl --config FILE [--output PNG] [--epochs N] [--images-per-epoch N]
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training import cli
from training.config import load_config
from training.losses.kl_control import KLController


@dataclass(kw_only=True)
class SimulatedPlant:
    """How KL and reconstruction loss respond to beta: a model of the training, for tuning and tests.

    KL tends to `scale * log(1 + knee / beta)` nats per dimension (for small beta the rate of a Gaussian of variance
    `knee` coded at distortion beta), with a first-order lag in images. The reconstruction loss decays from `start` to
    `end`. Both are observed under multiplicative noise.
    """

    scale: float = 0.4  # nats per dimension
    knee: float = 0.1  # in the unit of beta
    lag_images: float = 4096.0
    start: float = 0.15  # weighted reconstruction loss
    end: float = 0.04
    decay_images: float = 500_000.0
    noise: float = 0.1  # standard deviation of the log of an observation over 640 images
    kl: float = 3.0  # nats per dimension
    images: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def advance(self, beta: float, num_images: int) -> tuple[float, float]:
        """Train on `num_images` images with one beta; returns the observed KL and reconstruction loss."""
        self.images += num_images
        settled = self.scale * math.log1p(self.knee / beta)
        self.kl += (settled - self.kl) * -math.expm1(-num_images / self.lag_images)
        reconstruction = self.end + (self.start - self.end) * math.exp(-self.images / self.decay_images)
        sigma = self.noise * math.sqrt(640 / num_images)
        return self.kl * self.rng.lognormvariate(0, sigma), reconstruction * self.rng.lognormvariate(0, sigma)


def simulate(
    controller: KLController, plant: SimulatedPlant, epochs: int, images_per_epoch: int, interval: int = 640
) -> Iterator[dict[str, Any]]:
    """Run the controller on the plant, with one observation per `interval` images.

    Yields:
        `epoch`, `images` (so far), `beta` (that they were trained with), `kl` (observed), `fraction` (smoothed), `low`
        and `high` (its target range), `minimum_beta`, `low_beta_phase`.
    """
    images = 0
    for epoch in range(epochs):
        low, high = controller.target_range(epoch)
        of_epoch = {
            "epoch": epoch,
            "low": low,
            "high": high,
            "minimum_beta": controller.minimum_beta(epoch),
            "low_beta_phase": controller.in_low_beta_phase(epoch),
        }
        while images < (epoch + 1) * images_per_epoch:
            count = min(interval, (epoch + 1) * images_per_epoch - images)
            beta = controller.beta(epoch, images)
            kl, loss = plant.advance(beta, count)
            images += count
            controller.observe(kl=kl, reconstruction=loss, num_images=count, epoch=epoch, images_seen=images)
            yield of_epoch | {"images": images, "beta": beta, "kl": kl, "fraction": controller.smoothed_fraction}


def _plot(records: list[dict[str, Any]], images_per_epoch: int, path: Path) -> None:
    """Write a PNG: beta with its minimum, the KL fraction with its target range, and KL; low-beta phases shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = [record["images"] / images_per_epoch for record in records]
    _, axes = pyplot.subplots(3, 1, sharex=True, figsize=(13, 9), layout="constrained")
    panels = {
        "beta": {"beta": "C0", "minimum_beta": "C3"},
        "KL fraction of the loss": {"fraction": "C0", "low": "C2", "high": "C2"},
        "KL, nats per dimension": {"kl": "C0"},
    }
    low_beta_epochs = {record["epoch"] for record in records if record["low_beta_phase"]}
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for key, color in curves.items():
            values = [record[key] for record in records]
            axis.plot(epochs, values, color=color, linewidth=1.0, drawstyle="steps-pre", label=key)
        for epoch in low_beta_epochs:
            axis.axvspan(epoch, epoch + 1, color="0.88", linewidth=0, zorder=0)
        axis.set(ylabel=label, yscale="log")
        axis.legend(loc="upper right", fontsize="small")
    axes[-1].set(xlabel="epoch", xlim=(0, records[-1]["epoch"] + 1))
    axes[0].set_title("KL control of a simulated training; low-beta phases shaded")
    pyplot.savefig(path, dpi=110)


def _run(arguments: argparse.Namespace) -> None:
    presets = load_config(arguments.config, arguments.overrides).training_presets
    cli.check_output(arguments.output, (".png",))
    controller = KLController(presets, presets.kl_control_enabled)
    records = list(simulate(controller, SimulatedPlant(), arguments.epochs, arguments.images_per_epoch))
    _plot(records, arguments.images_per_epoch, arguments.output)
    judged = [r for r in records if r["images"] >= presets.kl_warmup_images and not r["low_beta_phase"]]
    inside = sum(record["low"] <= record["fraction"] <= record["high"] for record in judged)
    at_minimum = [record for record in records if record["beta"] <= record["minimum_beta"] * (1 + 1e-9)]
    low_beta = sum(record["low_beta_phase"] for record in at_minimum)
    print(f"{len(judged)} of {len(records)} observations outside warm-up and low-beta phases: {inside} with the KL")
    print(
        f"fraction in its target range. Beta at its minimum in {len(at_minimum)} of all observations, {low_beta} of them"
    )
    print(f"in low-beta phases. Plotted to {arguments.output}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.kl", description="Simulate the KL control of a configuration without training."
    )
    cli.add_option(parser, "--config", required=True)
    cli.add_option(parser, "--set")
    cli.add_option(parser, "--output", default=Path("kl_simulation.png"), help="PNG to write")
    parser.add_argument(
        "--epochs", type=cli.positive_int, default=200, metavar="N", help="epochs to simulate (default: %(default)s)"
    )
    parser.add_argument(
        "--images-per-epoch",
        type=cli.positive_int,
        default=162_770,
        metavar="N",
        help="images of an epoch (default: %(default)s, as CelebA)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return cli.run(_run, build_parser().parse_args(argv))
