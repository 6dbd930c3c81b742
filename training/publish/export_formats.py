"""Writes a trained model in other formats: half-precision weights, ONNX, one `.pth` file.

    python -m training.export_formats model_weights/vae_quickstart --variant fp16  # beside the float32 weights
    python -m training.export_formats model_weights/vae_quickstart --onnx model_weights/vae_quickstart/onnx
    python -m training.export_formats model_weights/vae_quickstart --pth vae.pth

A variant halves download and memory (`from_pretrained(..., variant="fp16", torch_dtype=torch.float16)`); ONNX runs
without torch; a `.pth` is what older code expects. Fitted priors stay as they are.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from training.cli import add_option, resolve_model, run
from training.io import write_file
from training.run_files import check_exported

VARIANTS = {"fp16": "float16", "bf16": "bfloat16"}


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
    from safetensors.torch import save

    from training.evaluate.models import load_model, weights_metadata

    dtype = getattr(torch, VARIANTS[variant])
    weights = {name: value.to(dtype).contiguous() for name, value in load_model(str(folder)).state_dict().items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} has weights that {variant} cannot hold: use another variant.")
    file = folder / f"diffusion_pytorch_model.{variant}.safetensors"  # the name that from_pretrained looks for
    write_file(file, save(weights, metadata={"format": "pt", **weights_metadata(str(folder))}))
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

    from training.evaluate.models import load_model

    if not file.parent.is_dir():
        raise ValueError(f"--pth {file}: there is no folder {file.parent}; make it first.")
    model = load_model(str(folder))
    config = {key: list(v) if isinstance(v, tuple) else v for key, v in model.config.items() if not key.startswith("_")}
    buffer = io.BytesIO()
    torch.save({"config": config, "state_dict": model.state_dict()}, buffer)
    write_file(file, buffer.getvalue())


def write_onnx(folder: Path, destination: Path) -> dict[str, float]:
    """Write `encoder.onnx` (pixels -> latent_mean, latent_logvar) and `decoder.onnx` (latents -> image).

    Float32; the batch may have any size, images have the model's. Both are run in onnxruntime and compared.

    Args:
        folder: An exported model.
        destination: Folder for the two files; created if it is missing.

    Returns:
        Output -> its largest absolute difference from torch, on noise.

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

    from training.evaluate.models import load_model

    model = load_model(str(folder)).requires_grad_(False)
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

    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, config.sample_size, config.sample_size, generator=generator) * 2 - 1
    latents = torch.randn(2, *model.latent_shape, generator=generator)
    destination.mkdir(parents=True, exist_ok=True)
    differences = {}
    for name, module, inputs, outputs in (
        ("encoder", Encoder(), {"pixels": pixels}, ["latent_mean", "latent_logvar"]),
        ("decoder", Decoder(), {"latents": latents}, ["image"]),
    ):
        file = destination / f"{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter
            torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                str(file),
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,  # one file each; ONNX allows 2 GB
                verbose=False,
            )
            expected = module(*inputs.values())
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        results = session.run(outputs, {key: value.numpy() for key, value in inputs.items()})
        expected = expected if isinstance(expected, tuple) else (expected,)
        for output, result, tensor in zip(outputs, results, expected):
            differences[output] = float((torch.from_numpy(result) - tensor).abs().max())
    return differences


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.export_formats", description="Write a trained model in another format."
    )
    add_option(parser, "model")
    formats = parser.add_mutually_exclusive_group(required=True)
    formats.add_argument("--variant", choices=VARIANTS, help="half-precision weights, beside the float32 ones")
    formats.add_argument("--onnx", metavar="DIR", type=Path, help="encoder.onnx and decoder.onnx")
    formats.add_argument("--pth", metavar="FILE", type=Path, help="configuration and weights in one file")
    return parser


def _export(arguments: argparse.Namespace) -> None:
    source = resolve_model(arguments.model)
    folder = Path(source.path)
    if not folder.is_dir():
        raise ValueError(f"{arguments.model} is on the Hub: download it first (`hf download`), and give its folder.")
    if arguments.variant:
        check_exported(folder)
        print(write_variant(folder, arguments.variant))
    elif arguments.onnx:
        for output, difference in write_onnx(folder, arguments.onnx).items():
            print(f"{output}: at most {difference:.1e} from torch")
        print(arguments.onnx)
    else:
        write_pth(folder, arguments.pth)
        print(arguments.pth)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(_export, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
