"""Train a face VAE from a JSON configuration.

    accelerate launch train_vae.py --config configs/ultra.json
    python train_vae.py --config configs/quickstart.json --set training_presets.num_epochs=2
    python train_vae.py --config configs/ultra.json --resume auto
    python train_vae.py --config configs/ultra.json --dry-run

Exit codes: 0 finished; 2 something in the configuration, the data or the machine must be changed (one line says what);
75 stopped by a signal with a checkpoint (`--resume auto` goes on); 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from training.config import Config, load_config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a face VAE from a JSON configuration.")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="JSON configuration, such as configs/ultra.json"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="change one key (repeatable); VALUE is JSON, or else a string",
    )
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the newest checkpoint of this run name, or from PATH"
    )
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        nargs="+",
        metavar="KEY",
        help="let a resume go on although this key has changed, where it would refuse (section.key, processes or data)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and exit")
    return parser


def _dry_run(config: Config) -> None:
    from training.budget.plan import describe_plan, known_train_images
    from training.builders import build_model, micro_batch_size

    build_model(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch_size(config, processes)
    print(describe_plan(config, processes, known_train_images(config), search=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            _dry_run(config)
            return 0
    except ValueError as error:
        return _refuse(error)

    # Imported late: --help and a misspelt key need not wait for torch.
    from training.data.images import DataError
    from training.trainer import Trainer

    try:
        trainer = Trainer(config, arguments.resume, [key for keys in arguments.allow_changed for key in keys])
    except (ValueError, DataError) as error:
        return _refuse(error)
    try:
        return trainer.run()
    except (ValueError, DataError) as error:  # in mid-run; a checkpoint is intact, and the log says the same
        return _refuse(error)


def _refuse(error: Exception) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the others found the same
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
