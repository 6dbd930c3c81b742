"""Compares two models on the same images, by the difference of each metric image by image.

    python -m training.compare MODEL OTHER --config configs/ultra.json
    python -m training.compare MODEL OTHER --data imagefolder:faces --lpips st_alexnet --json

Intervals of paired differences are narrower than those of the two means (`training.evaluate`), because most of the
variance between images is common to both models.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from training.cli import add_option, run
from training.evaluate.command import add_measurement_options, measure_models

_HIGHER_IS_BETTER = ("psnr", "ssim")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.compare", description="Compare two models image by image, with confidence intervals."
    )
    add_option(parser, "models", nargs=2)
    add_measurement_options(parser, lpips="alexnet", frechet="none")
    parser.set_defaults(pca=None)
    add_option(parser, "--json")
    return parser


def _compare(arguments: argparse.Namespace) -> None:
    _, networks, _, (first, second) = measure_models(arguments)
    from training.evaluate.measure import bootstrap_means
    from training.evaluate.report import label_and_format

    sizes = [result.model.resolution for result in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models have images of {sizes[0]} and {sizes[1]} pixels: give --resolution.")
    values = [result.reconstruction.per_image for result in (first, second)]
    differences = {name: values[1][name] - values[0][name] for name in values[0]}
    metrics: dict[str, dict[str, Any]] = {}
    for name, interval in bootstrap_means(differences).items():
        sign = 1 if name in _HIGHER_IS_BETTER else -1
        is_certain = interval["low"] * interval["high"] > 0
        metrics[name] = {
            "first": float(values[0][name].mean()),
            "second": float(values[1][name].mean()),
            "difference": interval,
            "second_better_fraction": float((sign * differences[name] > 0).mean()),
            "better": ("second" if sign * interval["mean"] > 0 else "first") if is_certain else None,
        }
    summary = {
        "first": first.model.name,
        "second": second.model.name,
        "images": len(first.indices),
        "metrics": metrics,
        "frechet": [first.reconstruction.frechet, second.reconstruction.frechet],
    }
    if arguments.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
        return
    print(f"first  {summary['first']}\nsecond {summary['second']}\n{summary['images']} images")
    for name, entry in metrics.items():
        label, form = label_and_format(name, networks)
        low, mean, high = (form.format(entry["difference"][key]) for key in ("low", "mean", "high"))
        print(
            f"{label:24} {form.format(entry['first'])} and {form.format(entry['second'])}, difference {mean} "
            f"[{low}, {high}], second better on {entry['second_better_fraction']:.0%}: "
            f"{'undecided' if entry['better'] is None else entry['better'] + ' is better'}"
        )
    if networks.frechet is not None:
        print(f"{networks.frechet.label}: {summary['frechet'][0]:.4g} and {summary['frechet'][1]:.4g}")
    print(
        "differences are second minus first; [95 % percentile-bootstrap interval over images], posterior means decoded"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return run(_compare, arguments)


if __name__ == "__main__":
    sys.exit(main())
