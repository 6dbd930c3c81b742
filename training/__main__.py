"""Lists the commands and runs one: `python -m training COMMAND ...`, or `face-vae COMMAND ...` once installed.

`python -m training.COMMAND` runs the same command directly.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Command: (module with `main(argv) -> int`, one-line summary).
COMMANDS = {
    "train": ("train_vae", "train a face VAE from a JSON configuration"),
    "budget": ("training.budget.command", "estimate memory and hours of a configuration before the run"),
    "monitor": ("training.monitor.terminal", "show a run in the terminal or as an HTML page"),
    "evaluate": ("training.evaluate.command", "measure and compare autoencoders on images"),
    "compare": ("training.compare", "compare two models image by image"),
    "reconstruct": ("training.reconstruct", "reconstruct and measure photographs"),
    "encode": ("training.encode", "encode a data set to latents"),
    "fit_prior": ("training.priors.fit", "fit priors to the latents of training images"),
    "compare_priors": ("training.priors.compare", "compare priors with photographs"),
    "sample": ("training.priors.sample", "generate and interpolate images"),
    "demo": ("training.demo.command", "show a trained model in the browser"),
    "export_formats": ("training.publish.export_formats", "write a trained model as fp16 safetensors, ONNX or .pth"),
    "publish": ("training.publish.stage", "upload a model and its card to the Hub"),
    "align": ("training.align", "align photographs like CelebA"),
    "synthetic_faces": ("training.synthetic_faces", "write synthetic faces to files"),
    "kl": ("training.losses.kl_simulation", "simulate the KL control of a configuration without training"),
}


def usage() -> str:
    """The list of commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: face-vae COMMAND [OPTIONS]", "", "commands:", *lines, "", "face-vae COMMAND --help"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 for an unknown command."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    command = name.replace("-", "_")
    if command not in COMMANDS:
        print(f"error: unknown command {name}: use one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[command][0]).main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
