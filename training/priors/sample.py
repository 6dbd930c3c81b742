"""Looks at what a trained model makes up: grids of samples, temperatures, ways from one face to another.

    python -m training.sample model_weights/vae_ultra --prior gaussian --num 64
    python -m training.sample MODEL --prior flow --temperature 0.6 0.8 1.0   # one row for each, the same draws
    python -m training.sample MODEL --prior gaussian --interpolate           # rows from one sample to another
    python -m training.sample MODEL --interpolate one.jpg other.jpg          # from one photograph to another

MODEL is a folder or a Hub id. Also here: encoded faces, and how far samples are from them, for training/priors/fit.py. Not
for fitting priors. Exit codes: 0; 2 something that was given must be changed (one line says what).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid, save_image

from modeling.autoencoder_kl_ultra import FITTED_PRIORS, AutoencoderKLUltra
from training.data.images import CorruptImage, decode_image, normalize
from training.evaluate.frechet import frechet_distance

_THUMBNAIL = 32  # pixels a side, at which images are compared: no texture, but who it is and what is behind
_FRAMES = 9  # of an interpolation, both ends included


@dataclass
class Faces:
    """Encoded faces.

    Attributes:
        mean, std: Of the posteriors, flat, (n, numbers), float32.
        thumbnails: The images, averaged down to at most 32 pixels a side, (n, 3, s, s) in [-1, 1].
        features: Of the first images, for the Frechet distance, (k, dimensions).
    """

    mean: Tensor
    std: Tensor
    thumbnails: Tensor
    features: np.ndarray | None = None

    def draw(self, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
        """One draw from each posterior (of `rows`), (n, numbers); the generator is on the host."""
        mean, std = (self.mean, self.std) if rows is None else (self.mean[rows], self.std[rows])
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean)


@torch.no_grad()
def encode_faces(
    model: AutoencoderKLUltra,
    batches: Iterable[Tensor],
    mirrored: bool,
    features: Callable[[Tensor], Tensor] | None = None,
    num_features: int = 0,
) -> Faces:
    """Encode images once.

    Args:
        model: In evaluation mode.
        batches: (n, 3, S, S), uint8.
        mirrored: Encode the mirror images too; they follow in the same order after all others.
        features: Of images (n, 3, S, S) in [-1, 1]; computed for the first `num_features`, unmirrored.
        num_features: See there.
    """
    sides: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], []]
    found: list[Tensor] = []
    for batch in batches:
        pixels = normalize(batch.to(model.device))
        for side in range(1 + mirrored):
            posterior = model.encode(pixels.flip(-1) if side else pixels).latent_dist
            parts = (posterior.mean.flatten(1).float(), posterior.std.flatten(1).float())
            sides[side].append((*parts, thumbnails(pixels.flip(-1) if side else pixels).cpu()))
        missing = num_features - sum(map(len, found))
        if features is not None and missing > 0:
            found.append(features(pixels[:missing]).cpu())
    mean, std, small = (torch.cat(parts) for parts in zip(*sides[0], *sides[1]))
    return Faces(mean, std, small, torch.cat(found).numpy() if found else None)


@torch.no_grad()
def decode_latents(model: AutoencoderKLUltra, latents: Tensor, batch_size: int) -> Tensor:
    """(N, C, h, w) to images (N, 3, S, S), clamped to [-1, 1], on the host in float32."""
    parts = [model.decode(part.to(model.device, model.dtype)).sample for part in latents.split(batch_size)]
    return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts])


def thumbnails(pixels: Tensor) -> Tensor:
    """(n, 3, H, W) to at most 32 pixels a side, by area averages."""
    return F.adaptive_avg_pool2d(pixels, min(_THUMBNAIL, pixels.shape[-1]))


def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Distance of each query to the nearest reference, root of the mean squared difference of their numbers.

    Args:
        queries: (n, d).
        references: (m, d).

    Returns:
        (n,).
    """
    # By differences, not by products: near copies, a difference of two large products is all rounding.
    found = [
        torch.cdist(part, references, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
        for part in queries.split(64)
    ]
    return torch.cat(found) / queries.shape[1] ** 0.5


@torch.no_grad()
def compare(
    model: AutoencoderKLUltra,
    drawn: dict[str, Tensor],
    faces: Faces,
    features: Callable[[Tensor], Tensor] | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """How near latents, and what they decode to, come to training faces.

    Args:
        model: In evaluation mode.
        drawn: Name -> latents (n, C, h, w). "copies" are draws from posteriors of training faces: what comes as near
            as the farthest of them is counted as a copy.
        faces: The training faces, with mirror images if these were trained on.
        features: Of images in [-1, 1], for the Frechet distance to `faces.features`; None leaves it out.
        batch_size: Images decoded at once.

    Returns:
        For each name: `images`, `latent_min`, `latent_median` (distance to the nearest training face, in standard
        deviations of a latent number), `pixel_min`, `pixel_median` (the same of thumbnails in [-1, 1]), `copies` (how
        many are as near as copies, in either) and `frechet`.
    """
    scale = (faces.mean.var(dim=0) + faces.std.square().mean(dim=0)).sqrt().clamp_min(1e-6)
    report: dict[str, dict[str, float]] = {}
    limits: dict[str, float] = {}
    for name in ["copies", *(name for name in drawn if name != "copies")]:
        images = decode_latents(model, drawn[name], batch_size)
        distances = {
            "latent": nearest_distances(drawn[name].flatten(1).float() / scale, faces.mean / scale).cpu(),
            "pixel": nearest_distances(thumbnails(images).flatten(1), faces.thumbnails.flatten(1)),
        }
        limits = limits or {kind: found.max().item() for kind, found in distances.items()}
        near = torch.stack([distances[kind] <= limits[kind] for kind in distances]).any(dim=0)
        report[name] = {"images": len(images), "copies": int(near.sum())}
        for kind, found in distances.items():
            report[name] |= {f"{kind}_min": found.min().item(), f"{kind}_median": found.median().item()}
        if features is not None:
            parts = [features(part.to(model.device)).cpu() for part in images.split(batch_size)]
            report[name]["frechet"] = frechet_distance(torch.cat(parts).numpy(), faces.features)
    return report


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Between two latents along the sphere: direction and length turn evenly (Shoemake 1985, section 3.3).

    A straight line between two draws of a Gaussian in many dimensions passes points that are shorter than any draw, by
    a factor of 0.71 in the middle.

    Args:
        start, end: Of one shape.
        fraction: 0 for the start, 1 for the end.
    """
    one, other = start.flatten().double().cpu(), end.flatten().double().cpu()
    lengths = one.norm(), other.norm()
    if min(lengths) == 0:
        return torch.lerp(start, end, fraction)
    cosine = torch.clamp(one @ other / (lengths[0] * lengths[1]), -1, 1)
    angle = torch.arccos(cosine)
    if torch.sin(angle) < 1e-6:  # one direction, or opposite ones, between which no way is shortest
        return torch.lerp(start, end, fraction)
    weights = torch.sin((1 - fraction) * angle) / torch.sin(angle), torch.sin(fraction * angle) / torch.sin(angle)
    length = (1 - fraction) * lengths[0] + fraction * lengths[1]
    direction = weights[0] * one / lengths[0] + weights[1] * other / lengths[1]
    return (length * direction).to(start).view_as(start)


def interpolate(start: Tensor, end: Tensor, center: Tensor, frames: int, linear: bool) -> Tensor:
    """Latents from one to another.

    Args:
        start, end: (C, h, w).
        center: Of the sphere along which the way leads, (C, h, w); the mean of the prior.
        frames: How many, both ends included.
        linear: A straight line instead.

    Returns:
        (frames, C, h, w).
    """
    fractions = [index / (frames - 1) for index in range(frames)]
    if linear:
        return torch.stack([torch.lerp(start, end, fraction) for fraction in fractions])
    return torch.stack([center + slerp(start - center, end - center, fraction) for fraction in fractions])


def _center(model: AutoencoderKLUltra, prior: str) -> Tensor:
    """The prior's mean, (C, h, w)."""
    shape = (model.config.latent_channels, model.config.latent_size, model.config.latent_size)
    if prior == "standard":
        return torch.zeros(shape, device=model.device, dtype=model.dtype)
    return model.get_prior(prior).mean.view(shape).to(model.device, model.dtype)


@torch.no_grad()
def _encode_files(model: AutoencoderKLUltra, paths: Sequence[str], crop_px: int | None) -> Tensor:
    """The posterior means of photographs, (n, C, h, w)."""
    latents = []
    for path in paths:
        try:
            pixels = decode_image(Path(path).read_bytes(), crop_px, model.config.sample_size)
        except (CorruptImage, OSError) as error:
            raise ValueError(f"{path} is no image that can be read ({error}): give another.") from None
        pixels = normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(model.device)).to(model.dtype)
        latents.append(model.encode(pixels).latent_dist.mode())
    return torch.cat(latents)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.sample", description="Draw faces from a trained model.")
    parser.add_argument("model", metavar="MODEL", help="folder of a saved model, or Hub id")
    parser.add_argument("--prior", choices=["standard", *FITTED_PRIORS], default="standard", help="default standard")
    parser.add_argument("--num", type=int, metavar="N", help="images (64), or images or ways in a comparison (8)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0], metavar="T", help="several: a row each")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--interpolate",
        nargs="*",
        metavar="IMAGE",
        help="ways between samples, or between two photographs and on",
    )
    parser.add_argument("--linear", action="store_true", help="interpolate along straight lines, not the sphere")
    parser.add_argument("--crop-px", type=int, metavar="N", help="side of the photographs' centre crop (all, squared)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images decoded at once (8)")
    parser.add_argument("--output", default="samples.png", metavar="FILE", help="the grid (samples.png)")
    return parser


def load_model(place: str) -> AutoencoderKLUltra:
    """A saved model, in evaluation mode, on the GPU where there is one.

    Raises:
        ValueError: There is none.
    """
    if not Path(place).is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", place):
        raise ValueError(f"there is no folder {place}, and it is no Hub id (name/model): give one of them.")
    try:
        model = AutoencoderKLUltra.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{place} cannot be loaded as an AutoencoderKLUltra ({reason}): give its folder.") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(accelerator or "cpu").eval()


def _rows(model: AutoencoderKLUltra, arguments: argparse.Namespace) -> tuple[Tensor, int]:
    """Latents of the grid, and how many make a row."""

    def draw(count: int, temperature: float) -> Tensor:
        generator = torch.Generator().manual_seed(arguments.seed)
        return model.sample_latents(count, arguments.prior, generator, temperature)

    temperatures = arguments.temperature
    if arguments.interpolate is None:
        if len(temperatures) == 1:
            count = 64 if arguments.num is None else arguments.num
            return draw(count, temperatures[0]), max(1, round(count**0.5))
        count = 8 if arguments.num is None else arguments.num
        return torch.cat([draw(count, temperature) for temperature in temperatures]), count
    if len(temperatures) > 1:
        raise ValueError(f"--interpolate with {len(temperatures)} temperatures: give one.")
    if arguments.interpolate:
        if len(arguments.interpolate) < 2:
            raise ValueError(f"--interpolate {arguments.interpolate[0]}: give two photographs, or none for samples.")
        if arguments.num is not None or temperatures != [1.0]:
            raise ValueError("--interpolate between photographs draws no samples: leave out --num and --temperature.")
        ends = _encode_files(model, arguments.interpolate, arguments.crop_px)
        ways = list(zip(ends[:-1], ends[1:]))
    else:
        count = 8 if arguments.num is None else arguments.num
        ends = draw(2 * count, temperatures[0])
        ways = list(zip(ends[::2], ends[1::2]))
    center = _center(model, arguments.prior)
    return torch.cat([interpolate(*way, center, _FRAMES, arguments.linear) for way in ways]), _FRAMES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        for name in ("num", "batch_size"):
            if (value := getattr(arguments, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: give at least 1.")
        output = Path(arguments.output)
        if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--output {output}: the grid is an image; end its name in .png, .jpg or .webp.")
        model = load_model(arguments.model)
        latents, columns = _rows(model, arguments)
        images = decode_latents(model, latents, arguments.batch_size)
        output.parent.mkdir(parents=True, exist_ok=True)
        save_image(make_grid((images + 1) / 2, nrow=columns, padding=2), output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {len(images)} images, {columns} in a row")
    return 0


if __name__ == "__main__":
    sys.exit(main())
