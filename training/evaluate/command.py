"""Compares autoencoders on images: ours, diffusers' `AutoencoderKL`, `AutoencoderDC`, `AutoencoderTiny`, and PCA.

    python -m training.evaluate model_weights/vae_ultra_high_quality --config configs/ultra.json
    python -m training.evaluate MODEL OTHER --data parquet:'faces/validation-*.parquet' --resolution 256 --output results
    python -m training.evaluate MODEL --data imagefolder:photographs --lpips st_alexnet --frechet none   # no downloads

The results go to standard output; `--output` writes them, a page and grids into a folder. Exit codes: 0; 2 an argument
must be changed.
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
from typing import TYPE_CHECKING, Any

from training.cli import add_option, check_output, data_source, lpips_trunks, positive_int, run, select_device
from training.config import Config, DataConfig, load_config

if TYPE_CHECKING:
    from torch import Tensor

    from training.evaluate.measure import MetricNetworks, ModelResult


def add_measurement_options(parser: argparse.ArgumentParser, lpips: str, frechet: str) -> argparse._ArgumentGroup:
    """Add the options that `measure_models` reads, except those of PCA; returns the group of metrics.

    Args:
        parser: The parser.
        lpips, frechet: Defaults; `output.eval_lpips_trunk` of --config replaces them if it is not among those of LPIPS.
    """
    parser.add_argument("--subfolder", metavar="NAME", help="folder inside MODEL to look into first, such as vae")
    data = parser.add_argument_group("images")
    held_out = "training images are measured, too: give --config RUN/config.json for the held-out ones"
    add_option(data, "--data", help=f"synthetic_faces, imagefolder:DIR, parquet:GLOB or a Hub data set; {held_out}")
    add_option(
        data,
        "--config",
        help="configuration whose validation images are measured; --data replaces the source and its crop",
    )
    add_option(data, "--set")
    data.add_argument("--split", metavar="NAME", help="default: the one that training validates on")
    data.add_argument("--max-images", type=positive_int, metavar="N", help="first N images of the split (2,048)")
    add_option(data, "--crop-px")
    add_option(data, "--resolution")
    metrics = parser.add_argument_group("metrics")
    names_another = "unless output.eval_lpips_trunk of --config is another"
    add_option(
        metrics,
        "--lpips",
        help=f"feature networks of LPIPS, separated by commas, or none (default: {lpips}, {names_another})",
    )
    metrics.add_argument(
        "--frechet",
        metavar="NETWORK",
        help="features of the Frechet distance: a feature network of LPIPS, dinov2, dinov2:MODEL, inception, or none "
        f"(default: {frechet}{'' if frechet == 'none' else ', ' + names_another})",
    )
    metrics.add_argument(
        "--identity",
        action="store_true",
        help="whether reconstructions show the same person, by dlib's face embeddings (needs the extra `identity`)",
    )
    parser.set_defaults(default_lpips=lpips, default_frechet=frechet)
    add_option(metrics, "--trunk-weights")
    add_option(metrics, "--batch-size", default=8)
    add_option(metrics, "--device")
    return metrics


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description="Compare autoencoders on images.")
    add_option(parser, "models")
    metrics = add_measurement_options(parser, lpips="alexnet,vgg16", frechet="vgg16")
    metrics.add_argument("--pca", type=positive_int, metavar="N", help="add a PCA baseline of N components")
    metrics.add_argument(
        "--pca-images", type=positive_int, default=4096, metavar="N", help="training images of the PCA (%(default)s)"
    )
    output = parser.add_argument_group("output")
    add_option(output, "--json")
    add_option(
        output,
        "--output",
        metavar="DIR",
        help="folder for evaluation.json, evaluation.html, per_image.csv and grids of the worst, median and best images",
    )
    return parser


def data_config(arguments: argparse.Namespace, config: Config) -> DataConfig:
    """The section `data` that the command line asks for.

    Raises:
        ValueError: No source, or one that does not have what is asked for.
    """
    if arguments.data is None and arguments.config is None:
        raise ValueError("no images are named: give --data or --config.")
    changes: dict[str, Any] = {}
    split = arguments.split
    if arguments.data is not None:
        changes = data_source(arguments.data, split or "validation")
        if not any(change.startswith("data.crop_px=") for change in arguments.overrides):
            changes["crop_px"] = None  # that of the configuration belongs to its images
        if changes["dataset"] in ("imagefolder", "parquet"):
            split = split or "validation"
        if changes["dataset"] == "imagefolder" and arguments.split is None:
            if not (Path(changes["data_dir"]).expanduser() / split).is_dir():
                changes["train_split"] = split = "."  # a folder without splits: all images in it
    if split is not None:
        if changes.get("dataset", config.data.dataset) == "synthetic_faces" and split != "validation":
            raise ValueError(f"--split {split}: synthetic_faces have the split validation only.")
        changes["validation_split"] = split
    if arguments.max_images is not None:
        changes |= {"max_validation_images": arguments.max_images, "synthetic_validation_images": arguments.max_images}
    if arguments.crop_px is not None:
        changes["crop_px"] = arguments.crop_px
    data = dataclasses.replace(config.data, **changes)
    has_training_images = data.dataset != "parquet" or data.train_split in data.data_files
    if arguments.pca is not None and (data.validation_split == data.train_split or not has_training_images):
        raise ValueError(
            f"--pca {arguments.pca}: {data.dataset} has no training images besides those to evaluate; name both splits "
            "in the section data of a --config, or give another --split."
        )
    return data


def measure_models(
    arguments: argparse.Namespace,
) -> tuple[DataConfig, MetricNetworks, dict[int, Tensor], list[ModelResult]]:
    """Measure the models that the command line names on the images that it names.

    Returns:
        The section `data`; the networks; the images of each size, (n, 3, size, size), uint8; the result of each model.

    Raises:
        ValueError: An argument must be changed.
    """
    if arguments.overrides and arguments.config is None:
        raise ValueError("--set changes a configuration: give --config.")
    config = load_config(arguments.config, arguments.overrides) if arguments.config else Config()
    data = data_config(arguments, config)

    # Imported late, so that --help and argument errors do not wait for torch.
    from training.data.stream import load_validation
    from training.evaluate.frechet import FrechetFeatures, load_trunks
    from training.evaluate.identity import IdentityNetwork
    from training.evaluate.measure import MetricNetworks, measure
    from training.evaluate.models import fit_pca_baseline, load_autoencoder

    device = select_device(arguments.device)
    models = [load_autoencoder(name, arguments.subfolder, arguments.resolution, device) for name in arguments.models]
    smallest = min(model.resolution for model in models)
    if smallest < 11:
        raise ValueError(f"SSIM needs images of at least 11 pixels, these have {smallest}: raise --resolution.")
    default_lpips, default_frechet = arguments.default_lpips, arguments.default_frechet
    if arguments.config is not None and config.output.eval_lpips_trunk not in lpips_trunks(default_lpips):
        default_lpips = config.output.eval_lpips_trunk
        default_frechet = "none" if default_frechet == "none" else default_lpips
    lpips = lpips_trunks(arguments.lpips or default_lpips)
    frechet_name = arguments.frechet or default_frechet
    frechet = None if frechet_name == "none" else FrechetFeatures(frechet_name, device)
    trunk_names = [*lpips, *([frechet.trunk_name] if frechet is not None and frechet.trunk_name else [])]
    weights = arguments.trunk_weights or config.loss.trunk_weights
    identity = IdentityNetwork() if arguments.identity else None
    networks = MetricNetworks(lpips, load_trunks(trunk_names, weights, device, smallest), frechet, identity)
    if arguments.pca is not None:
        largest = max(model.resolution for model in models)
        models.append(fit_pca_baseline(data, arguments.pca, arguments.pca_images, largest, device))

    images, results = {}, []
    for model in models:
        size = model.resolution
        if size not in images:
            images[size] = load_validation(data, resolution=size, rank=0, world_size=1)
        pixels, indices = images[size]
        if frechet is not None and len(pixels) < 2:
            raise ValueError(
                "a Frechet distance needs at least two images: raise --max-images, or give --frechet none."
            )
        logging.info("%s: %d images of %d pixels", model.name, len(pixels), size)
        batch_size = arguments.batch_size
        results.append(measure(model, pixels, indices, networks=networks, batch_size=batch_size, device=device))
    return data, networks, {size: pixels for size, (pixels, _) in images.items()}, results


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.output is not None:
        check_output(arguments.output)
    data, networks, images, results = measure_models(arguments)
    from training.evaluate.measure import summarize
    from training.evaluate.report import extremes_grid, page, reading_notes, table_rows

    summaries = [summarize(result, networks) for result in results]
    notes = reading_notes(summaries, networks)
    text = json.dumps(
        {
            "data": {"dataset": data.dataset, "split": data.validation_split, "crop_px": data.crop_px},
            "models": summaries,
            "notes": notes,
        },
        indent=2,
        allow_nan=False,
    )
    heads, rows = table_rows(summaries, networks)
    if arguments.json:
        print(text)
    else:
        _print_table(heads, rows, notes)
    if arguments.output is not None:
        folder = arguments.output
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        _write_per_image(folder / "per_image.csv", results)
        device = select_device(arguments.device)
        grids = [extremes_grid(result, images[result.model.resolution], device) for result in results]
        for i, (result, grid) in enumerate(zip(results, grids)):
            name = re.sub(r"[^\w.-]+", "_", result.model.name).strip("_")[-60:]
            grid.save(folder / f"extremes_{i}_{name}.png")
        title = f"Reconstructions of {data.dataset}"
        html = page(title, heads, rows, notes, results, grids, networks)
        (folder / "evaluation.html").write_text(html, encoding="utf-8")


def _print_table(heads: list[str], rows: list[list[str]], notes: list[str]) -> None:
    from rich.console import Console

    from training.evaluate.report import terminal_table

    # Lines are not wrapped in a file or a pipe.
    console = Console() if sys.stdout.isatty() else Console(width=60 + 40 * len(heads))
    console.print(terminal_table(heads, rows))
    for note in notes:
        console.print(note, markup=False, highlight=False)


def _write_per_image(path: Path, results: Sequence[ModelResult]) -> None:
    """One line for each model, set of reconstructions and image."""
    with path.open("w", newline="", encoding="utf-8") as file:
        names = list(results[0].reconstruction.per_image)
        writer = csv.writer(file)
        writer.writerow(["model", "set", "image", *names])
        for result in results:
            for kind in ("reconstruction", "posterior_sample"):
                metrics = getattr(result, kind)
                if metrics is not None:
                    columns = [metrics.per_image[name].tolist() for name in names]
                    writer.writerows([result.model.name, kind, *line] for line in zip(result.indices, *columns))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    # Standard output is for the results.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return run(_evaluate, arguments)


if __name__ == "__main__":
    sys.exit(main())
