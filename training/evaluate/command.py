"""Compare autoencoders on images: ours, any of diffusers' `AutoencoderKL`, `AutoencoderDC`, `AutoencoderTiny`, and PCA.

    python -m training.evaluate model_weights/vae_ultra_high_quality --config configs/ultra.json
    python -m training.evaluate MODEL OTHER --data parquet:'faces/validation-*.parquet' --resolution 256 --html page.html
    python -m training.evaluate MODEL --data imagefolder:photographs --lpips st_alexnet --frechet none   # no downloads

MODEL is a folder that `save_pretrained` wrote, or a Hub id; `config.json` says which class it is. Images come in the
ways that training takes them. Exit codes: 0; 2 something that was given must be changed (one line says what).
What it is not for: measuring during training (validation.py).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import Config, DataConfig, load_config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description="Compare autoencoders on images.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a saved model, or Hub id")
    parser.add_argument(
        "--subfolder", metavar="NAME", help="where a MODEL that is a whole pipeline has it, such as vae"
    )
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data",
        metavar="SOURCE",
        help="synthetic_faces, imagefolder:DIR, parquet:GLOB or a Hub data set; instead of --config's",
    )
    data.add_argument("--config", metavar="FILE", help="configuration whose section data names the images")
    data.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="change --config"
    )
    data.add_argument("--split", metavar="NAME", help="default: the one that training validates on")
    data.add_argument("--max-images", type=_positive, metavar="N", help="the first N rows of the split (default 2,048)")
    data.add_argument("--crop-px", type=_positive, metavar="N", help="side of the centre crop (default: all, squared)")
    data.add_argument("--resolution", type=_positive, metavar="N", help="image side (default: the model's sample_size)")
    figures = parser.add_argument_group("figures")
    figures.add_argument("--lpips", default="alexnet,vgg16", metavar="TRUNKS", help="default alexnet,vgg16; or none")
    figures.add_argument(
        "--frechet",
        default="vgg16",
        metavar="NETWORK",
        help="features: a trunk (default vgg16), dinov2, dinov2:MODEL, inception, or none",
    )
    figures.add_argument("--trunk-weights", metavar="DIR", help="folder of weights, as loss.trunk_weights")
    figures.add_argument("--pca", type=_positive, metavar="N", help="add N principal components of training images")
    figures.add_argument("--pca-images", type=_positive, default=4096, metavar="N", help="at most so many (4,096)")
    figures.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images in a forward pass (8)")
    figures.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON instead of the table")
    output.add_argument("--html", metavar="FILE", help="write a page with table, histograms and grids")
    output.add_argument("--output-dir", metavar="DIR", help="write evaluation.json, per_image.csv and grids as PNG")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def data_config(arguments: argparse.Namespace, config: Config) -> DataConfig:
    """The section `data` that the command line asks for.

    Raises:
        ValueError: No source, or one that cannot be.
    """
    if arguments.data is None and arguments.config is None:
        raise ValueError("no images are named: give --data or --config.")
    changes: dict[str, Any] = {}
    split = arguments.split
    if arguments.data is not None:
        kind, _, place = arguments.data.partition(":")
        changes = {"dataset": arguments.data, "revision": None, "data_files": None, "data_dir": None}
        if kind in ("imagefolder", "parquet") and not place:
            raise ValueError(f"--data {arguments.data}: write {kind}:{'DIR' if kind == 'imagefolder' else 'GLOB'}.")
        if kind == "parquet":
            split = split or "validation"
            changes |= {"dataset": kind, "data_files": {split: place}}
        elif kind == "imagefolder":
            changes |= {"dataset": kind, "data_dir": place}
            if split is None:
                split = "validation"
                if not (Path(place).expanduser() / split).is_dir():
                    changes["train_split"] = split  # which means: all images below the folder
    dataset = changes.get("dataset", config.data.dataset)
    if split is not None:
        if dataset == "synthetic_faces" and split != "validation":
            raise ValueError(f"--split {split}: synthetic_faces are drawn for validation only.")
        changes["validation_split"] = split
    if arguments.max_images is not None:
        changes |= {"max_validation_images": arguments.max_images, "synthetic_validation_images": arguments.max_images}
    if arguments.crop_px is not None:
        changes["crop_px"] = arguments.crop_px
    data = dataclasses.replace(config.data, **changes)
    has_training_examples = data.dataset != "parquet" or data.train_split in data.data_files
    if arguments.pca is not None and (data.validation_split == data.train_split or not has_training_examples):
        raise ValueError(
            f"--pca {arguments.pca}: {data.dataset} has no training images besides those to evaluate; name both splits "
            "in the section data of a --config, or give another --split."
        )
    return data


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.overrides and arguments.config is None:
        raise ValueError("--set changes a configuration: give --config.")
    config = load_config(arguments.config, arguments.overrides) if arguments.config else Config()
    data = data_config(arguments, config)

    # Imported late: --help and a misspelt option need not wait for torch.
    import torch

    from training.data.stream import load_validation
    from training.evaluate.frechet import FrechetFeatures, load_trunks
    from training.evaluate.measure import Instruments, measure, summarize
    from training.evaluate.models import fit_pca_baseline, load_autoencoder

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = [load_autoencoder(m, arguments.subfolder, arguments.resolution, device) for m in arguments.models]
    lpips = () if arguments.lpips == "none" else tuple(arguments.lpips.split(","))
    frechet = None if arguments.frechet == "none" else FrechetFeatures(arguments.frechet, device)
    names = [*lpips, *([frechet.trunk_name] if frechet is not None and frechet.trunk_name else [])]
    weights = arguments.trunk_weights or config.loss.trunk_weights
    smallest = min(model.resolution for model in models)
    if smallest < 11:
        raise ValueError(
            f"images of {smallest} pixels a side are too small for SSIM, whose window has 11: raise --resolution."
        )
    instruments = Instruments(lpips, load_trunks(names, weights, device, smallest), frechet)
    if arguments.pca is not None:
        largest = max(model.resolution for model in models)
        models.append(fit_pca_baseline(data, arguments.pca, arguments.pca_images, largest, device))

    images = {}
    measurements = []
    for model in models:
        side = model.resolution
        if side not in images:
            images[side] = load_validation(data, resolution=side, rank=0, world_size=1)
        pixels, indices = images[side]
        if frechet is not None and len(pixels) < 2:
            raise ValueError(
                "a Frechet distance needs two images at least: raise --max-images, or give --frechet none."
            )
        logging.info("%s: %d images of %d pixels", model.name, len(pixels), side)
        batch = arguments.batch_size
        measurements.append(measure(model, pixels, indices, instruments=instruments, batch=batch, device=device))
    result = {
        "data": {"dataset": data.dataset, "split": data.validation_split, "crop_px": data.crop_px},
        "models": [summarize(measurement, instruments) for measurement in measurements],
    }
    _present(arguments, result, measurements, images, instruments, device)


def _present(arguments: argparse.Namespace, result: dict, measurements, images: dict, instruments, device) -> None:
    from training.evaluate.report import extremes_grid, page, remarks, table_rows, terminal_table

    heads, rows = table_rows(result["models"], instruments)
    notes = remarks(result["models"], instruments)
    result["remarks"] = notes
    text = json.dumps(result, indent=2, allow_nan=False)
    if arguments.json:
        print(text)
    else:
        from rich.console import Console

        # Where nobody looks at the width, as in a file, lines are not broken.
        console = Console() if sys.stdout.isatty() else Console(width=60 + 40 * len(heads))
        console.print(terminal_table(heads, rows))
        for note in notes:
            console.print(note, markup=False, highlight=False)
    if arguments.html is None and arguments.output_dir is None:
        return
    grids = [extremes_grid(m, images[m.model.resolution][0], device) for m in measurements]
    if arguments.html is not None:
        path = Path(arguments.html)
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"Reconstructions of {result['data']['dataset']}"
        path.write_text(page(title, heads, rows, notes, measurements, grids, instruments), encoding="utf-8")
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        _write_images(folder / "per_image.csv", measurements)
        for number, (measurement, grid) in enumerate(zip(measurements, grids)):
            name = re.sub(r"[^\w.-]+", "_", measurement.model.name).strip("_")[-60:]
            grid.save(folder / f"extremes_{number}_{name}.png")


def _write_images(path: Path, measurements) -> None:
    """One line for each model, set and image."""
    with path.open("w", newline="", encoding="utf-8") as file:
        names = list(measurements[0].reconstruction.of_image)
        writer = csv.writer(file)
        writer.writerow(["model", "set", "row", *names])
        for measurement in measurements:
            for kind in ("reconstruction", "draw"):
                part = getattr(measurement, kind)
                if part is not None:
                    columns = [part.of_image[name].tolist() for name in names]
                    for row, *values in zip(measurement.indices, *columns):
                        writer.writerow([measurement.model.name, kind, row, *values])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    # Standard output is for the figures.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _evaluate(arguments)
    except ValueError as error:
        return _refuse(error)
    except RuntimeError as error:
        from training.data.images import DataError

        if not isinstance(error, DataError):
            raise
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
