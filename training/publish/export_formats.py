"""A trained model in other formats: half-precision weights, ONNX, one `.pth` file.

    python -m training.export_formats model_weights/vae_ultra --variant fp16       # beside the float32 weights
    python -m training.export_formats model_weights/vae_ultra --onnx model_weights/vae_ultra/onnx
    python -m training.export_formats model_weights/vae_ultra --pth vae_ultra.pth

What each is for: a variant halves download and memory (`from_pretrained(..., variant="fp16", torch_dtype=torch.float16)`);
ONNX runs without torch, in any of its runtimes; a `.pth` is what older code expects. What it is not for: the format
that training writes (export.py), which all of them are made from, and fitted priors, which stay as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help need not wait for torch
    from modeling.autoencoder_kl_ultra import AutoencoderKLUltra

VARIANTS = {"fp16": "float16", "bf16": "bfloat16"}


def load_model(folder: Path) -> AutoencoderKLUltra:
    """The model of a folder, in float32 and complete.

    Raises:
        ValueError: There is no model, or weights are missing from it.
    """
    from modeling.autoencoder_kl_ultra import AutoencoderKLUltra

    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no model in {folder}: give a folder that a training exported.")
    try:
        model, info = AutoencoderKLUltra.from_pretrained(folder, output_loading_info=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from None
    lacking = info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]
    if lacking:
        raise ValueError(f"the weights in {folder} do not fit its config.json (such as {lacking[0]}): export it again.")
    return model.eval().requires_grad_(False)


def write_variant(folder: Path, variant: str) -> Path:
    """Write half-precision weights beside the float32 ones; `config.json` stays as it is.

    Args:
        folder: An exported model.
        variant: "fp16" or "bf16".

    Returns:
        The file.

    Raises:
        ValueError: No model, or weights that are not finite in this precision.
    """
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, VARIANTS[variant])
    weights = {name: value.to(dtype).contiguous() for name, value in load_model(folder).state_dict().items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} has weights that {variant} cannot hold: use another variant.")
    file = folder / f"diffusion_pytorch_model.{variant}.safetensors"  # the name that from_pretrained looks for
    temporary = file.with_name(file.name + ".tmp")
    save_file(weights, temporary, metadata={"format": "pt"})
    os.replace(temporary, file)
    return file


def write_pth(folder: Path, file: Path) -> None:
    """Write configuration and weights as one file that `torch.load(file, weights_only=True)` opens.

    It holds `{"config": {...}, "state_dict": {...}}`, for
    `AutoencoderKLUltra.from_config(saved["config"]).load_state_dict(saved["state_dict"])`.

    Args:
        folder: An exported model.
        file: Destination; replaced when the new one is complete.

    Raises:
        ValueError: No model, or no folder to write into.
    """
    import torch

    if not file.parent.is_dir():
        raise ValueError(f"--pth {file}: there is no folder {file.parent}; make it first.")
    model = load_model(folder)
    config = {key: list(v) if isinstance(v, tuple) else v for key, v in model.config.items() if not key.startswith("_")}
    temporary = file.with_name(file.name + ".tmp")
    torch.save({"config": config, "state_dict": model.state_dict()}, temporary)
    os.replace(temporary, file)


def write_onnx(folder: Path, destination: Path) -> dict[str, float]:
    """Write `encoder.onnx` (pixels -> latent_mean, latent_logvar) and `decoder.onnx` (latents -> image).

    Float32; the batch may have any size, images have the model's. Both are run in onnxruntime and compared.

    Args:
        folder: An exported model.
        destination: Folder for the two files; made if it is missing.

    Returns:
        The largest difference from torch of each output, on noise.

    Raises:
        ValueError: No model, or a package is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, what torch.onnx writes with
    except ImportError as error:
        raise ValueError(
            f"ONNX needs {error.name}, which is not installed: pip install onnx onnxscript onnxruntime."
        ) from None
    import torch

    model = load_model(folder)
    config = model.config

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            posterior = self.model.encode(pixels).latent_dist
            return posterior.mean, posterior.logvar

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return self.model.decode(latents).sample

    noise = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, config.sample_size, config.sample_size, generator=noise) * 2 - 1
    latents = torch.randn(2, config.latent_channels, config.latent_size, config.latent_size, generator=noise)
    destination.mkdir(parents=True, exist_ok=True)
    differences = {}
    for name, module, given, outputs in (
        ("encoder", Encoder(), {"pixels": pixels}, ["latent_mean", "latent_logvar"]),
        ("decoder", Decoder(), {"latents": latents}, ["image"]),
    ):
        file = destination / f"{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, of its own deprecations
            torch.onnx.export(
                module.eval(),
                tuple(given.values()),
                str(file),
                input_names=list(given),
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,  # one file each; ONNX allows 2 GB
                verbose=False,
            )
            wanted = module(*given.values())
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        got = session.run(outputs, {key: value.numpy() for key, value in given.items()})
        for output, one, other in zip(outputs, got, wanted if isinstance(wanted, tuple) else (wanted,)):
            differences[output] = float((torch.from_numpy(one) - other).abs().max())
    return differences


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.export_formats", description="Write a trained model in another format."
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of an exported model")
    formats = parser.add_mutually_exclusive_group(required=True)
    formats.add_argument("--variant", choices=VARIANTS, help="half-precision weights, beside the float32 ones")
    formats.add_argument("--onnx", metavar="DIR", type=Path, help="encoder.onnx and decoder.onnx")
    formats.add_argument("--pth", metavar="FILE", type=Path, help="configuration and weights in one file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with one line that says what to change."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.variant:
            print(write_variant(arguments.model, arguments.variant))
        elif arguments.onnx:
            for output, difference in write_onnx(arguments.model, arguments.onnx).items():
                print(f"{output}: at most {difference:.1e} from torch")
            print(arguments.onnx)
        else:
            write_pth(arguments.model, arguments.pth)
            print(arguments.pth)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
