"""Shows a trained model in the browser: reconstructions, samples, interpolations and latent dimensions.

    pip install --editable '.[demo]'
    python -m training.demo model_weights/vae_quickstart

Listens on this machine only; the address is printed. `python -m training.publish --space` puts the same pages on the Hub.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

from training.cli import UserError, add_option, positive_int, resolve_model, run
from training.synthetic_faces import FIRST_SEED, write_faces

NUM_EXAMPLES = 16  # synthetic faces to try the demo with


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.demo", description="Show a trained model in the browser.")
    add_option(parser, "model")
    parser.add_argument("--port", type=positive_int, metavar="N", help="default: the first free one from 7860")
    add_option(parser, "--device")
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    resolve_model(arguments.model)  # an error before the imports
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo needs Gradio: pip install gradio, or this project with its extra `demo`.")
    from training.priors.sample import load_pipeline

    pipeline = load_pipeline(arguments.model, arguments.device)
    from training.demo.app import LAUNCH, build_demo

    with tempfile.TemporaryDirectory(prefix="demo_") as folder:
        write_faces(Path(folder), range(FIRST_SEED, FIRST_SEED + NUM_EXAMPLES))
        examples = [str(path) for path in sorted(Path(folder).iterdir())]
        demo = build_demo(pipeline, examples, Path(arguments.model).name)
        try:
            demo.launch(server_name="127.0.0.1", server_port=arguments.port, share=False, **LAUNCH)
        finally:
            demo.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_demo, build_parser().parse_args(argv))
