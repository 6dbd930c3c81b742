"""Train a face VAE from a JSON configuration.

accelerate launch train_vae.py --config configs/ultra.json
python train_vae.py --config configs/quickstart.json --set training_presets.num_epochs=2
python train_vae.py --config configs/ultra.json --resume auto
python train_vae.py --config configs/quickstart.json --init-from model_weights/vae_quickstart
python train_vae.py --config configs/ultra.json --dry-run
python train_vae.py --explain training_presets.kl_gain
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from training.cli import UserError, run
from training.config import Config, load_config
from training.launch import check_launch_environment

_EXIT_CODES = """\
exit codes: 0 finished; 2 the configuration, the data or the machine must be changed (one line beginning with `error:`
names it); 75 stopped by a signal, with a checkpoint (resume with --resume auto); 130 interrupted before the first step, or
by a second Ctrl-C; 1 any other error, or the finished model could not be uploaded (hub.push)
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_vae.py", description="Train a face VAE from a JSON configuration.", epilog=_EXIT_CODES
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--config", metavar="FILE", help="JSON configuration, such as configs/ultra.json")
    task.add_argument("--explain", metavar="SECTION.KEY", help="print what a configuration key means, and exit")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="change one key (repeatable); VALUE is JSON, anything else is a string; SECTION={...} replaces a section",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH|hub://ORG/NAME",
        help="resume from the newest checkpoint of this run name, from the run or checkpoint at PATH, or from what "
        "hub.push_checkpoints has uploaded",
    )
    parser.add_argument(
        "--init-from",
        metavar="MODEL",
        help="start a new run from a model's weights, sets training_presets.init_from: folder of an exported model, a run "
        "(its best model) or a checkpoint; or a Hub id",
    )
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        nargs="+",
        metavar="KEY",
        help="resume although this key has changed (section.key, processes or data)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the cost estimate on this machine, check --init-from, and exit"
    )
    return parser


def _load_config(arguments: argparse.Namespace) -> Config:
    overrides = list(arguments.overrides)
    if arguments.init_from is not None:
        overrides.append(f"training_presets.init_from={json.dumps(arguments.init_from)}")
    return load_config(arguments.config, overrides)


def _explain(arguments: argparse.Namespace) -> None:
    from training.config_reference import explain

    print(explain(arguments.explain))


def _dry_run(arguments: argparse.Namespace) -> None:
    num_processes = check_launch_environment()
    config = _load_config(arguments)

    from training.budget.estimate import describe_estimate, known_train_images
    from training.builders import build_model, micro_batch_size
    from training.initial_weights import load_initial_weights

    model = build_model(config)
    micro_batch_size(config, num_processes)
    print(describe_estimate(config, num_processes, known_train_images(config), search=True))
    if config.training_presets.init_from is not None and arguments.resume is None:
        load_initial_weights(model, config.training_presets.init_from)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.explain or arguments.dry_run:
        return run(_explain if arguments.explain else _dry_run, arguments)
    try:
        return _train(arguments)
    except KeyboardInterrupt:  # before the first step, or the second one
        print("interrupted", file=sys.stderr)
        return 130


def _train(arguments: argparse.Namespace) -> int:
    try:
        check_launch_environment()
        config = _load_config(arguments)

        # Imported late: --help and a misspelled key do not wait for torch.
        from training.checkpoint.resume import FinishedRun
        from training.trainer import Trainer

        allowed = [key for keys in arguments.allow_changed for key in keys]
        try:
            trainer = Trainer(config, arguments.resume, allowed)
        except FinishedRun as finished:
            if os.environ.get("RANK", "0") == "0":
                print(finished, file=sys.stderr)
            return 0
    except (ValueError, UserError) as error:
        return _print_error(error)
    try:
        return trainer.run()
    except UserError as error:  # a ValueError is a bug there, and needs its traceback
        return _print_error(error)


def _print_error(error: Exception) -> int:
    """Prints an error that the user can correct; returns the exit code."""
    # Only errors of the main process are known to be printed by another process.
    if not getattr(error, "from_main_process", False):
        rank = os.environ.get("RANK", "0")
        message = " ".join(line.strip() for line in str(error).splitlines())
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
