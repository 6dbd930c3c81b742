"""Compares samples of a model's priors with each other and with photographs.

    python -m training.compare_priors MODEL --config configs/ultra.json
    python -m training.compare_priors MODEL --config configs/ultra.json --temperature 0.8 1 --frechet vgg16 dinov2

Prints a table and writes it to MODEL/prior_report.json. Its rows are reconstructions of training faces, validation
photographs, reconstructions of these, and for each prior, temperature and guidance scale as many samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.cli import add_option, run
from training.evaluate.frechet import FrechetFeatures, frechet_distance, load_trunks
from training.io import write_json
from training.priors.fit import add_data_options, read_config
from training.priors.latents import FaceLatents, encode_faces, thumbnails, training_faces, validation_faces
from training.priors.sample import load_pipeline, seeded_generator

_NEAR_DUPLICATE_FACES = 64  # training faces whose reconstructions define how close a near-duplicate is
_NEIGHBORS = 5  # of a training face, for the coverage (Naeem et al. 2020)

Features = dict[str, Callable[[Tensor], Tensor]]  # name of the metric -> images in [-1, 1] to features


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.compare_priors", description="Compare samples of priors with photographs."
    )
    add_option(parser, "model", help="folder of an exported model with its priors")
    add_data_options(parser)
    add_option(
        parser, "--num-samples", default=256, help="samples of each prior, and faces that they are compared with"
    )
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[1.0], metavar="T", help="of the samples (default: 1)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        nargs="+",
        metavar="W",
        help="of the diffusion prior (default: that of its configuration)",
    )
    parser.add_argument(
        "--frechet",
        nargs="+",
        metavar="NETWORK",
        help="feature networks, or none (default: output.eval_lpips_trunk of --config, else vgg16)",
    )
    add_option(parser, "--trunk-weights")
    add_option(parser, "--batch-size", default=16)
    add_option(parser, "--seed", default=0)
    add_option(parser, "--device")
    return parser


def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Root mean squared difference of each query (n, d) to the nearest reference (m, d); (n,)."""
    # Not by matrix products: the difference of two large products is rounding error for near-duplicates.
    distances = [
        torch.cdist(part, references, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
        for part in queries.split(64)
    ]
    return torch.cat(distances) / queries.shape[1] ** 0.5


def coverage(features: Tensor, references: Tensor) -> float:
    """Fraction of references (m, d) that have a sample (n, d) within the distance of their fifth nearest reference.

    Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models" (https://arxiv.org/abs/2002.09797),
    equation 6; near 1 for samples of the same distribution in the same number.
    """
    among = torch.cdist(references, references).kthvalue(min(_NEIGHBORS + 1, len(references)), dim=1).values
    return float((torch.cdist(references, features).amin(dim=1) <= among).float().mean())


@torch.no_grad()
def compare(
    images: dict[str, tuple[Tensor, Tensor]], faces: FaceLatents, features: Features, batch_size: int = 16
) -> dict[str, dict[str, float]]:
    """Compares sets of images with training faces.

    Args:
        images: Name -> images (n, 3, H, W) in [-1, 1] and their latents (n, latent_dim). The first are reconstructions
            of training faces: images as close to one as the farthest of them are counted as near-duplicates.
        faces: The training faces, with flipped ones if the model was trained on them.
        features: Networks of the Frechet distance; `faces.features` are those of the first training faces.
        batch_size: Images in one forward pass.

    Returns:
        For each name: `images`; `latent_median` and `pixel_median`, distance to the nearest training face in standard
        deviations of a latent dimension and of thumbnails in [-1, 1]; `near_duplicates`; `variety`, standard deviation
        of the thumbnails over the images; and for each network its Frechet distance and `coverage`.
    """
    scale = (faces.mean.var(dim=0) + faces.std.square().mean(dim=0)).sqrt().clamp_min(1e-6)
    report: dict[str, dict[str, float]] = {}
    limits: dict[str, float] = {}
    for name, (pixels, latents) in images.items():
        small = thumbnails(pixels).flatten(1)
        distances = {
            "latent": nearest_distances(latents.to(scale) / scale, faces.mean / scale).cpu(),
            "pixel": nearest_distances(small, faces.thumbnails.flatten(1)),
        }
        limits = limits or {kind: values.max().item() for kind, values in distances.items()}
        near = torch.stack([distances[kind] <= limits[kind] for kind in distances]).any(dim=0)
        report[name] = {"images": len(pixels), "near_duplicates": int(near.sum())}
        report[name] |= {f"{kind}_median": values.median().item() for kind, values in distances.items()}
        report[name]["variety"] = small.var(dim=0).mean().sqrt().item()
        for metric, network in features.items():
            found = torch.cat([network(part.to(faces.mean.device)).cpu() for part in pixels.split(batch_size)])
            report[name][metric] = frechet_distance(found.numpy(), faces.features[metric])
            report[name]["coverage_" + metric.partition("_")[2]] = coverage(
                found, torch.from_numpy(faces.features[metric])
            )
    return report


def _load_features(arguments: argparse.Namespace, device: torch.device, resolution: int) -> Features:
    networks = [FrechetFeatures(name, device) for name in arguments.frechet if name != "none"]
    names = [network.trunk_name for network in networks if network.trunk_name]
    trunks = load_trunks(names, arguments.trunk_weights, device, resolution)

    def features(network: FrechetFeatures) -> Callable[[Tensor], Tensor]:
        trunk = trunks.get(network.trunk_name)
        return lambda pixels: network(pixels, None if trunk is None else trunk.features(pixels))

    return {network.key: features(network) for network in networks}


def _compare(arguments: argparse.Namespace) -> None:
    count, batch_size, seed = arguments.num_samples, arguments.batch_size, arguments.seed
    seeded_generator(seed)  # errors before the model is loaded
    if count < 2:
        raise ValueError(f"--num-samples must be at least 2, got {count}.")
    for option, values in (("temperature", arguments.temperature), ("guidance-scale", arguments.guidance_scale or [])):
        if not all(0 <= value < float("inf") for value in values):
            raise ValueError(f"--{option} must be numbers of at least 0, got {values}.")
    config = read_config(arguments)
    data = config.data
    if arguments.frechet is None:
        arguments.frechet = ["vgg16"] if arguments.config is None else [config.output.eval_lpips_trunk]
    pipeline = load_pipeline(arguments.model, arguments.device)
    if arguments.guidance_scale and pipeline.diffusion is None:
        raise ValueError("--guidance-scale needs the diffusion prior, which this model has not: leave it out.")
    vae, size = pipeline.vae, pipeline.vae.config.sample_size
    features = _load_features(arguments, vae.device, size)
    validation = list(validation_faces(data, size, batch_size))
    photographs = [pixels / 127.5 - 1 for pixels, _ in validation]
    training = training_faces(data, size, arguments.max_images, batch_size)
    faces = encode_faces(vae, training, not arguments.no_flip, features, count)
    held_out = encode_faces(vae, validation, with_flips=False)
    print(
        f"{len(faces.mean)} training latents, flipped images included; {len(held_out.mean)} validation faces",
        flush=True,
    )

    def decoded(latents: Tensor) -> tuple[Tensor, Tensor]:
        images = pipeline.decode(latents.view(-1, *vae.latent_shape), "pt", batch_size)
        return 2 * images.float().cpu() - 1, latents.flatten(1)

    generator = torch.Generator().manual_seed(seed)
    first = torch.arange(min(_NEAR_DUPLICATE_FACES, len(faces.mean)), device=faces.mean.device)
    images = {
        "training through the VAE": decoded(faces.sample(generator, first)),
        "validation": (torch.cat(photographs)[:count], held_out.mean[:count]),
        "validation through the VAE": decoded(held_out.sample(generator)[:count]),
    }
    for name in ["standard", *pipeline.fitted_priors]:
        for temperature in arguments.temperature:
            for scale in (arguments.guidance_scale or [None]) if name == "diffusion" else [None]:
                latents = pipeline.sample_latents(
                    count,
                    name,
                    temperature,
                    torch.Generator().manual_seed(seed),
                    guidance_scale=scale,
                    batch_size=batch_size,
                )
                title = name if temperature == 1 else f"{name} at {temperature:g}"
                images[title if scale is None else f"{title}, guided {scale:g}"] = decoded(latents)
    report = compare(images, faces, features, batch_size)
    print(_table(report), flush=True)
    folder = Path(pipeline.name_or_path)
    if folder.is_dir():
        write_json(folder / "prior_report.json", report)


def _table(report: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(report.values())))
    lines = [f"{'':30}" + "".join(f"{name:>18}" for name in columns)]
    for name, values in report.items():
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values.values())
        lines.append(f"{name:30}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_compare, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
