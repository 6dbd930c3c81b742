"""Samples of a trained model as an image grid: priors, temperatures, interpolations.

python -m training.sample model_weights/vae_quickstart --prior gaussian --num-samples 64
python -m training.sample MODEL --prior gaussian --temperature 0.6 0.8 1.0   # one row each, of the same noise
python -m training.sample MODEL --prior gaussian --interpolate           # rows from one sample to another
python -m training.sample MODEL --interpolate one.jpg other.jpg          # from one photograph to another
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from modeling.latent_prior import DiffusionPrior, GaussianPrior
from modeling.pipeline import FITTED_PRIORS, FaceVAEPipeline, slerp
from training.cli import IMAGE_SUFFIXES, add_option, check_output, resolve_model, run, select_device
from training.data.images import CorruptImage, decode_image, normalize
from training.run_files import priors_of

_INTERPOLATION_STEPS = 9  # both ends included
_NUM_SAMPLES, _NUM_ROWS = 64, 8  # of a plain grid; of a comparison


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.sample", description="Generate images.")
    add_option(parser, "model")
    parser.add_argument("--prior", choices=["standard", *FITTED_PRIORS], help="default: the best that was fitted")
    parser.add_argument(
        "--attributes",
        nargs="+",
        metavar="NAME=VALUE",
        help="attributes that the diffusion prior was trained on: Smiling=1 present, Smiling=0 absent",
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="of the diffusion prior: above 1 more plausible faces, 1 no guidance (default: the prior's)",
    )
    parser.add_argument(
        "--attribute-scale", type=float, metavar="W", help="above 1 clearer attributes (default: the prior's)"
    )
    add_option(
        parser,
        "--num-samples",
        help=f"images ({_NUM_SAMPLES}), or with several temperatures images per row, or interpolations ({_NUM_ROWS})",
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0], metavar="T", help="several: a row each")
    parser.add_argument(
        "--interpolate", nargs="*", metavar="IMAGE", help="interpolate between samples, or from image to image"
    )
    parser.add_argument("--linear", action="store_true", help="interpolate linearly, not spherically")
    add_option(parser, "--crop-px", help="size of the center crop of --interpolate's images")
    add_option(parser, "--seed", default=0)
    add_option(parser, "--batch-size", default=8)
    add_option(parser, "--output", default=Path("samples.png"), help="image file to write")
    add_option(parser, "--device")
    return parser


def load_pipeline(model: str, device: str | None) -> FaceVAEPipeline:
    """Loads the pipeline of MODEL in evaluation mode, with the priors that were fitted.

    Raises:
        ValueError: There is no such model, of this class, or its weights are incomplete.
    """
    source = resolve_model(model)
    class_name = source.config.get("_class_name")
    if class_name != "AutoencoderKLUltra":
        raise ValueError(f"{model} is of class {class_name}: give a model of class AutoencoderKLUltra.")
    is_pipeline = (Path(model).expanduser() / FaceVAEPipeline.config_name).is_file()
    pipeline = FaceVAEPipeline.from_pretrained(Path(model).expanduser() if is_pipeline else source.path)
    for name, prior in {"gaussian": GaussianPrior, "diffusion": DiffusionPrior}.items():
        folder = priors_of(Path(source.path)) / name
        if getattr(pipeline, name) is None and folder.is_dir():  # the run has not exported its model
            pipeline.register_modules(**{name: prior.from_pretrained(folder)})
    return pipeline.to(select_device(device))


def seeded_generator(seed: int) -> torch.Generator:
    """A generator on the CPU.

    Raises:
        ValueError: The seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"--seed must be from 0 to {2**64 - 1}, got {seed}.")
    return torch.Generator().manual_seed(seed)


def _attributes(pairs: list[str] | None) -> dict[str, float]:
    """NAME=1 (present) or NAME=0 (absent) to name -> value."""
    values = {}
    for pair in pairs or ():
        name, _, value = pair.partition("=")
        if value not in ("0", "1"):
            raise ValueError(f"--attributes {pair}: write NAME=1 for present, NAME=0 for absent.")
        values[name] = float(value)
    return values


@torch.no_grad()
def _encode_files(pipeline: FaceVAEPipeline, paths: Sequence[str], crop_px: int | None) -> Tensor:
    """The posterior means of image files, cropped and resized as in training, (n, C, h, w)."""
    vae, images = pipeline.vae, []
    for path in paths:
        try:
            images.append(torch.from_numpy(decode_image(Path(path).read_bytes(), crop_px, vae.config.sample_size)))
        except (CorruptImage, OSError) as error:
            raise ValueError(f"{path} is not a readable image ({error}): give another.") from None
    pixels = normalize(torch.stack(images).permute(0, 3, 1, 2).to(vae.device))
    return torch.cat([vae.encode(image).latent_dist.mode() for image in pixels.split(1)])


def _between_samples(pipeline: FaceVAEPipeline, arguments: argparse.Namespace) -> Tensor:
    """Latents of `--interpolate` without images, whose noise is known."""
    noise = pipeline.sample_noise(
        2 * (arguments.num_samples or _NUM_ROWS),
        arguments.prior,
        arguments.temperature[0],
        seeded_generator(arguments.seed),
    )
    fractions = torch.linspace(0, 1, _INTERPOLATION_STEPS).tolist()
    frames = [slerp(*pair, fraction) for pair in noise.unflatten(0, (-1, 2)) for fraction in fractions]
    options = _attributes(arguments.attributes), arguments.guidance_scale, arguments.attribute_scale
    parts = torch.stack(frames).split(arguments.batch_size)
    return torch.cat([pipeline.noise_to_latents(part, arguments.prior, *options) for part in parts])


def _grid_latents(pipeline: FaceVAEPipeline, arguments: argparse.Namespace) -> tuple[Tensor, int]:
    """Latents of the grid, and the number of images in a row."""
    temperatures, count = arguments.temperature, arguments.num_samples

    def sample(num_images: int, temperature: float) -> Tensor:
        return pipeline.sample_latents(
            num_images,
            arguments.prior,
            temperature,
            seeded_generator(arguments.seed),
            _attributes(arguments.attributes),
            arguments.guidance_scale,
            arguments.attribute_scale,
            arguments.batch_size,
        )

    if arguments.crop_px is not None and not arguments.interpolate:
        raise ValueError("--crop-px crops the images of --interpolate: leave it out.")
    if arguments.interpolate is None:
        if arguments.linear:
            raise ValueError("--linear interpolates: give --interpolate, or leave it out.")
        if len(temperatures) == 1:
            count = count or _NUM_SAMPLES
            return sample(count, temperatures[0]), max(1, round(count**0.5))
        count = count or _NUM_ROWS
        return torch.cat([sample(count, temperature) for temperature in temperatures]), count
    if len(temperatures) > 1:
        raise ValueError(f"--interpolate takes one --temperature, got {len(temperatures)}.")
    if arguments.interpolate:
        if len(arguments.interpolate) < 2:
            raise ValueError(f"--interpolate needs at least two images, or none for samples: {arguments.interpolate}.")
        if count is not None or temperatures != [1.0]:
            raise ValueError("--interpolate between images samples nothing: leave out --num-samples and --temperature.")
        if arguments.attributes or (arguments.guidance_scale, arguments.attribute_scale) != (None, None):
            raise ValueError("--interpolate between images has no attributes and no guidance: leave them out.")
        if arguments.linear and arguments.prior:
            raise ValueError("--linear between images uses no prior: leave out --prior.")
        latents = _encode_files(pipeline, arguments.interpolate, arguments.crop_px).split(1)
        pairs = list(zip(latents[:-1], latents[1:]))
    elif not arguments.linear:
        return _between_samples(pipeline, arguments), _INTERPOLATION_STEPS
    else:
        latents = sample(2 * (count or _NUM_ROWS), temperatures[0]).split(1)
        pairs = list(zip(latents[::2], latents[1::2]))
    frames = [
        pipeline.interpolate_latents(*pair, _INTERPOLATION_STEPS, arguments.prior, arguments.linear) for pair in pairs
    ]
    return torch.cat(frames), _INTERPOLATION_STEPS


def _sample(arguments: argparse.Namespace) -> None:
    output = arguments.output
    check_output(output, IMAGE_SUFFIXES)
    seeded_generator(arguments.seed)  # an error before the model is loaded
    pipeline = load_pipeline(arguments.model, arguments.device)
    latents, columns = _grid_latents(pipeline, arguments)
    images = pipeline.decode(latents, "pt", arguments.batch_size)
    save_image(make_grid(images.float().cpu(), nrow=columns, padding=2), output)
    prior = arguments.prior or pipeline.default_prior
    print(f"{output}: {len(images)} images of the prior {prior}, {columns} per row")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_sample, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
