"""Estimates what a configuration costs before it runs: parameters, FLOPs, memory, hours.

python -m training.budget --config configs/ultra.json                       # on the device at hand
python -m training.budget --config configs/ultra.json --device a100 --num-processes 8 --efficiency 0.4 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from training.budget.devices import DEVICES, find_device, local_device
from training.cli import add_option, positive_int, run
from training.config import load_config


def _budget(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    device = None if arguments.device is None else find_device(arguments.device)

    # Imported late, so that --help and argument errors do not wait for torch.
    import torch

    from training.budget.estimate import estimate_cost, format_estimate, known_train_images
    from training.builders import build_model

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        build_model(config)  # raises what is wrong with the section `model`
    device = device or local_device()
    if arguments.efficiency is not None:
        if not 0 < arguments.efficiency <= 1:
            raise ValueError(f"--efficiency must be above 0 and at most 1, got {arguments.efficiency:g}.")
        device = replace(device, efficiency=arguments.efficiency)
    if arguments.link_gbps is not None:
        device = replace(device, link="--link-gbps", link_gbps=arguments.link_gbps)
    estimate = estimate_cost(
        config,
        arguments.num_processes,
        known_train_images(config),
        device=device,
        search=True,
    )
    if arguments.json:
        print(json.dumps(estimate, indent=2))
    else:
        print(format_estimate(estimate, config.model.get("latent_layout", "vector")))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.budget", description=__doc__.splitlines()[0])
    add_option(parser, "--config", required=True)
    add_option(parser, "--set")
    add_option(parser, "--device", help=f"{', '.join(DEVICES)} (default: the device at hand)")
    parser.add_argument("--num-processes", type=positive_int, default=1, metavar="N", help="devices of the run (1)")
    parser.add_argument(
        "--efficiency",
        type=float,
        metavar="FRACTION",
        help="of the device's peak that convolutions reach (0.6 for a device of the table, an assumption)",
    )
    parser.add_argument(
        "--link-gbps", type=float, metavar="GB/S", help="rate of the gradient exchange, such as 25 between nodes"
    )
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(_budget, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
