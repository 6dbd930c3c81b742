"""Reconstructs photographs with a trained model: a strip of originals and reconstructions, and metrics of each image.

python -m training.reconstruct model_weights/vae_quickstart faces --lpips st_alexnet --output strip.png
python -m training.reconstruct MODEL one.jpg other.jpg --lpips none --json
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from training.cli import IMAGE_SUFFIXES, add_option, check_output, lpips_trunks, positive_int, run, select_device
from training.config import Config, load_config
from training.io import printable

_STRIP_IMAGES, _STRIP_PAIRS = 64, 4  # at most in the strip; in one row of it


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.reconstruct", description="Reconstruct photographs and measure each of them."
    )
    add_option(parser, "model")
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files, or folders of images")
    parser.add_argument(
        "--max-images", type=positive_int, default=2048, metavar="N", help="first N images only (default: %(default)s)"
    )
    add_option(parser, "--crop-px")
    add_option(parser, "--resolution")
    add_option(parser, "--config", help="configuration of the training, for the default of --lpips")
    add_option(
        parser,
        "--lpips",
        help="feature networks of LPIPS, separated by commas, or none (default: output.eval_lpips_trunk of --config, "
        "else alexnet)",
    )
    add_option(parser, "--trunk-weights")
    add_option(parser, "--batch-size", default=8)
    add_option(parser, "--device")
    add_option(parser, "--json")
    add_option(
        parser,
        "--output",
        default=Path("reconstructions.png"),
        metavar="FILE",
        help=f"image file for the first {_STRIP_IMAGES} pairs of original and reconstruction",
    )
    return parser


def list_images(places: Sequence[Path]) -> list[Path]:
    """The image files in `places`, which are files and folders, with subfolders.

    Raises:
        ValueError: A place does not exist, or a folder has no image.
    """
    from training.data.folder import list_split

    files: list[Path] = []
    for place in places:
        if place.is_dir():
            files += map(Path, list_split(str(place), ".", ".", None)[1])
        elif place.is_file():
            files.append(place)
        else:
            raise ValueError(f"{place} does not exist: give image files, or folders of images.")
    return files


def _reconstruct(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config) if arguments.config else Config()
    files = list_images(arguments.images)
    if len(files) > arguments.max_images:
        logging.warning("the first %d of %d images; --max-images takes more", arguments.max_images, len(files))
        files = files[: arguments.max_images]
    check_output(arguments.output, IMAGE_SUFFIXES)
    import torch
    from torchvision.utils import make_grid, save_image

    from training.data.images import CorruptImage, decode_image, normalize
    from training.evaluate.frechet import load_trunks
    from training.evaluate.measure import MetricNetworks, measure
    from training.evaluate.models import load_autoencoder
    from training.evaluate.report import label_and_format

    device = select_device(arguments.device)
    model = load_autoencoder(arguments.model, None, arguments.resolution, device)
    lpips = lpips_trunks(arguments.lpips or config.output.eval_lpips_trunk)
    weights = arguments.trunk_weights or config.loss.trunk_weights
    networks = MetricNetworks(lpips, load_trunks(lpips, weights, device, model.resolution), None)
    decoded, skipped = {}, {}
    for file in files:
        try:
            decoded[file] = torch.from_numpy(decode_image(file.read_bytes(), arguments.crop_px, model.resolution))
        except (CorruptImage, OSError) as error:
            skipped[str(file)] = str(error)
            logging.warning("%s skipped: %s", file, error)
    if not decoded:
        raise ValueError("no file is a readable image: give JPEG, PNG or WebP files, or folders of them.")
    images, indices = torch.stack([*decoded.values()]).permute(0, 3, 1, 2), list(range(len(decoded)))
    result = measure(model, images, indices, networks=networks, batch_size=arguments.batch_size, device=device)

    strip = []
    with torch.no_grad():
        for part in images[:_STRIP_IMAGES].split(arguments.batch_size):
            pixels = normalize(part.to(device))
            strip += torch.stack([pixels, model.decode(model.encode(pixels)[0])], dim=1).flatten(0, 1).cpu()
    columns = 2 * min(_STRIP_PAIRS, len(strip) // 2)
    save_image(make_grid([(image.clamp(-1, 1) + 1) / 2 for image in strip], nrow=columns), arguments.output)

    names = ["psnr", "ssim", *(f"lpips_{name}" for name in lpips)]
    metrics = {name: result.reconstruction.per_image[name] for name in names}
    if arguments.json:
        rows = [
            {"file": str(file)} | {name: values[i] for name, values in metrics.items()}
            for i, file in enumerate(decoded)
        ]
        means = {name: values.mean() for name, values in metrics.items()}
        print(json.dumps({"model": arguments.model, "images": rows, "mean": means, "skipped": skipped}, indent=2))
        return
    labels = [label_and_format(name, networks) for name in names]
    for file, *values in [*zip(decoded, *metrics.values()), ("mean", *(value.mean() for value in metrics.values()))]:
        texts = []
        for (label, form), value in zip(labels, values):
            unit = " dB" if label.endswith(", dB") else ""
            texts.append(f"{label.removesuffix(', dB')} {form.format(value)}{unit}")
        print(*texts, printable(str(file)), sep="  ")
    print(f"{arguments.output}: {len(strip) // 2} originals (left) and reconstructions (right)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return run(_reconstruct, arguments)


if __name__ == "__main__":
    sys.exit(main())
