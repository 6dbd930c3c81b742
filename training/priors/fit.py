"""Fits the priors that a trained decoder needs to the latents of its training faces, beside the weights.

    python -m training.fit_prior model_weights/vae_ultra --config runs/ultra_20260101_000000/config.json
    python -m training.fit_prior MODEL --data parquet:'faces/train-*.parquet' --held-out 'faces/validation-*.parquet'
    python -m training.fit_prior MODEL --data imagefolder:DIR --priors gaussian

Writes MODEL/priors/<name>/, which `from_pretrained` finds, and prior_report.json: how samples of each prior compare with
faces. Not for the shape of the priors (modeling/latent_prior.py) or for looking at samples (training/priors/sample.py).

Every prior is fitted to draws from the posteriors of training faces and their mirror images: these are what the decoder
was trained on. The posterior's noise is drawn anew in every step of the flow, which keeps it from learning faces by
heart.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from modeling.autoencoder_kl_ultra import FITTED_PRIORS
from modeling.latent_prior import LatentPrior, fit_gaussian
from training.config import DataConfig, config_from_dict, load_config
from training.data.images import DataError
from training.data.stream import TrainStream, load_validation
from training.evaluate.frechet import FrechetFeatures, load_trunks
from training.io import write_json
from training.priors.sample import Faces, compare, encode_faces, load_model

_COPY_TRIALS = 64  # training faces whose reconstructions say how near a copy would be
_MIXTURES = [(numbers, components) for numbers in (16, 64) for components in (2, 4, 8, 16)]
_MIXTURE_FLOOR = 1e-3  # added to each component's variances, in units of the whole distribution's
_EMA_DECAY = 0.995
_VALIDATE_EVERY = 50  # flow steps


# ---- the fits ----


def _whiten(prior: LatentPrior) -> Callable[[Tensor], Tensor]:
    inverse = torch.linalg.inv(prior.factor.cpu().double()).to(prior.factor)
    return lambda latents: (latents - prior.mean) @ inverse.T


def fit_mixture(
    gaussian: LatentPrior, faces: Faces, held_out: Faces, seed: int = 0
) -> tuple[LatentPrior, dict[str, Any]]:
    """A Gaussian mixture over the first white numbers of the Gaussian; the others stay standard normal.

    A full covariance of 1,024 numbers has 524,800 entries, for which even CelebA has too few faces in each of several
    components. One of 16 numbers has 136, one of 64 has 2,080. How many numbers and components, the held-out faces decide:
    all choices are densities of the same latents, so their likelihoods compare.

    Args:
        gaussian: Of `fit_gaussian`.
        faces: Training faces.
        held_out: Faces of other people.
        seed: Of draws and initial components.

    Returns:
        The prior, and `components`, `component_dims`, and the gain in log-likelihood over the Gaussian, in nats a
        held-out face (`held_out_gain_nats`) and a training face (`train_gain_nats`).

    Raises:
        ValueError: Too few faces for two components.
    """
    from sklearn.exceptions import ConvergenceWarning  # the trainer fits the Gaussian only, and need not wait for it
    from sklearn.mixture import GaussianMixture

    generator, whiten = torch.Generator().manual_seed(seed), _whiten(gaussian)
    train, held = (whiten(part.draw(generator)).cpu().double().numpy() for part in (faces, held_out))
    numbers = gaussian.config.numbers
    sizes = dict.fromkeys((min(count, numbers), components) for count, components in _MIXTURES)
    sizes = [(count, components) for count, components in sizes if len(train) >= 4 * components * count]
    if not sizes:
        raise ValueError(f"{len(train)} faces are too few for a mixture: give more, or leave it out of --priors.")
    best = None
    for count, components in sizes:
        found = GaussianMixture(components, reg_covar=_MIXTURE_FLOOR, max_iter=100, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the held-out faces judge where it stopped
            found.fit(train[:, :count])
        gains = []
        for rows in (held[:, :count], train[:, :count]):
            standard = -0.5 * ((rows**2).sum(axis=1) + count * np.log(2 * np.pi))
            gains.append(float((found.score_samples(rows) - standard).mean()))
        if best is None or gains[0] > best[0]:
            best = (*gains, found)
    gain, train_gain, found = best
    components, count = found.means_.shape
    prior = LatentPrior("mixture", numbers=numbers, components=components, component_dims=count)
    _copy_affine(gaussian, prior)
    prior.component_weights.data.copy_(torch.from_numpy(found.weights_))
    prior.component_means.data.copy_(torch.from_numpy(found.means_))
    prior.component_factors.data.copy_(torch.from_numpy(np.linalg.cholesky(found.covariances_)))
    facts = {"components": components, "component_dims": count}
    return prior, facts | {"held_out_gain_nats": gain, "train_gain_nats": train_gain}


def _copy_affine(source: LatentPrior, target: LatentPrior) -> None:
    target.to(source.factor.device)
    target.mean.data.copy_(source.mean)
    target.factor.data.copy_(source.factor)


def flow_loss(field: Callable[[Tensor, Tensor], Tensor], noise: Tensor, white: Tensor, t: Tensor) -> Tensor:
    """Conditional flow matching with the linear path (Lipman et al. 2022, equation 23, sigma_min = 0), a number's mean.

    Args:
        field: Positions (n, d) and times (n,) to velocities (n, d).
        noise: x_0, standard normal, (n, d).
        white: x_1, white latents, (n, d).
        t: Times in [0, 1], (n,).
    """
    positions = torch.lerp(noise, white, t[:, None])
    return (field(positions, t) - (white - noise)).square().mean()


def _average(average: Tensor, new: Tensor, count: Tensor) -> Tensor:
    """Exponential average that looks back over at most a tenth of the updates so far, so that it forgets the start."""
    return torch.lerp(average, new, 1 - min(_EMA_DECAY, (1 + int(count)) / (10 + int(count))))


def fit_flow(
    gaussian: LatentPrior,
    faces: Faces,
    held_out: Faces,
    seed: int = 0,
    *,
    steps: int = 1500,
    batch_size: int = 256,
    width: int = 384,
    blocks: int = 3,
    learning_rate: float = 5e-4,
) -> tuple[LatentPrior, dict[str, Any]]:
    """A flow from N(0, I) to the white latents, starting as the Gaussian and stopped where held-out faces are best.

    Args:
        gaussian: Of `fit_gaussian`.
        faces: Training faces.
        held_out: Faces of other people.
        seed: Of weights, draws and times.
        steps: Updates; the averaged weights with the lowest held-out loss are kept, those of step 0 included.
        batch_size: Latents in an update.
        width, blocks: Of the velocity field.
        learning_rate: At its highest; rises over the first 100 steps and falls to 0 along a cosine.

    Returns:
        The prior, and `held_out_loss` with the loss before training (the Gaussian's), `gaussian_loss`, `best_step`
        and `train_loss` there, means of squared velocity errors.
    """
    device, numbers = faces.mean.device, gaussian.config.numbers
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = LatentPrior("flow", numbers=numbers, width=width, blocks=blocks)
    _copy_affine(gaussian, prior)
    whiten, generator = _whiten(gaussian), torch.Generator().manual_seed(seed)
    field = prior.velocity
    averaged = AveragedModel(field, avg_fn=_average)
    optimizer = torch.optim.AdamW(field.parameters(), lr=learning_rate, weight_decay=0.01)
    rise = min(100, max(1, steps // 10))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / rise) * (0.5 + 0.5 * np.cos(np.pi * min(1.0, step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def times(count: int, random: torch.Generator) -> Tensor:
        # One in each of `count` equal intervals: the loss depends on time far more than on the face.
        return ((torch.arange(count) + torch.rand(count, generator=random)) / count).to(device)

    def batch(source: Faces, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(source.mean), (count,), generator=random).to(device)
        noise = torch.randn(count, numbers, generator=random).to(device)
        return noise, whiten(source.draw(random, rows)), times(count, random)

    fixed = [batch(held_out, 512, torch.Generator().manual_seed(seed + 1 + index)) for index in range(4)]

    def held_out_loss(candidate: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(np.mean([flow_loss(candidate, *part).item() for part in fixed]))

    start = held_out_loss(field)
    best = {"held_out_loss": start, "best_step": 0, "train_loss": None}
    weights, losses = copy.deepcopy(field.state_dict()), []
    for step in tqdm(range(1, steps + 1), desc="flow", unit="step", disable=not sys.stderr.isatty()):
        loss = flow_loss(field, *batch(faces, batch_size, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(field.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(field)
        losses.append(loss.item())
        if step % _VALIDATE_EVERY == 0 or step == steps:
            value = held_out_loss(averaged)
            if value < best["held_out_loss"]:
                recent = float(np.mean(losses[-_VALIDATE_EVERY:]))
                best = {"held_out_loss": value, "best_step": step, "train_loss": recent}
                weights = copy.deepcopy(averaged.module.state_dict())
    field.load_state_dict(weights)
    return prior.requires_grad_(False).eval(), best | {"gaussian_loss": start}


FITS = {"mixture": fit_mixture, "flow": fit_flow}


# ---- the command ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.fit_prior", description="Fit priors to training latents.")
    parser.add_argument("model", metavar="MODEL", help="folder of a saved model; priors are written into it")
    parser.add_argument("--data", metavar="SOURCE", help="synthetic_faces, imagefolder:DIR, parquet:GLOB or a Hub id")
    parser.add_argument("--config", metavar="FILE", help="configuration whose section data names the images")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="see --config"
    )
    parser.add_argument("--held-out", metavar="GLOB", help="with parquet:GLOB; default: a share of the training rows")
    parser.add_argument("--crop-px", type=int, metavar="N", help="side of the centre crop, as in training")
    parser.add_argument(
        "--max-images", type=int, default=20_000, metavar="N", help="training images to encode (20,000)"
    )
    parser.add_argument("--no-mirror", action="store_true", help="do not encode mirror images")
    parser.add_argument("--priors", nargs="+", choices=FITTED_PRIORS, default=list(FITTED_PRIORS), help="default: all")
    parser.add_argument("--flow-steps", type=int, default=1500, metavar="N", help="updates of the flow (1,500)")
    parser.add_argument("--num-samples", type=int, default=128, metavar="N", help="of each prior, to compare (128)")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[1.0], metavar="T", help="at which to compare (1)"
    )
    parser.add_argument("--frechet", default="st_vgg16", metavar="NETWORK", help="features (st_vgg16), or none")
    parser.add_argument("--trunk-weights", metavar="DIR", help="folder of weights, as loss.trunk_weights")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images in a forward pass (16)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    return parser


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The section `data` that the command line asks for, with training and held-out images.

    Raises:
        ValueError: No source, or one that cannot be.
    """
    if (arguments.data is None) == (arguments.config is None):
        raise ValueError("training images are named by --data or by --config: give one of them.")
    if arguments.overrides and arguments.config is None:
        raise ValueError("--set changes a configuration: give --config.")
    if arguments.held_out and (arguments.data or "").partition(":")[0] != "parquet":
        raise ValueError(f"--held-out {arguments.held_out} goes with --data parquet:GLOB only: leave it out.")
    if arguments.config is not None:
        data = load_config(arguments.config, arguments.overrides).data
    else:
        kind, _, place = arguments.data.partition(":")
        values: dict[str, Any] = {"dataset": kind if place else arguments.data, "validation_split": "validation"}
        if kind == "parquet":
            files = {"train": place} | ({"validation": arguments.held_out} if arguments.held_out else {})
            values |= {
                "data_files": files if place else None,
                "validation_split": "validation" if arguments.held_out else None,
            }
        elif kind == "imagefolder":
            split = (Path(place) / "validation").is_dir()
            values |= {"data_dir": place or None, "validation_split": "validation" if split else None}
        data = config_from_dict({"data": values}).data
    changes = {} if arguments.crop_px is None else {"crop_px": arguments.crop_px}
    return dataclasses.replace(data, horizontal_flip=False, **changes)


def _training_batches(data: DataConfig, side: int, count: int, batch_size: int) -> Iterator[Tensor]:
    stream = TrainStream(data, resolution=side, seed=0, global_batch=1, rank=0, world_size=1)
    total = count if stream.num_rows is None else min(count, stream.num_rows)
    held: list[Tensor] = []
    rows = stream.epoch_batches(0, max_batches=total)
    for row in tqdm(rows, desc="encoding", total=total, unit="image", disable=not sys.stderr.isatty()):
        held.append(row.pixels)
        if len(held) == batch_size:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _save(prior: LatentPrior, folder: Path) -> None:
    """Write a prior so that a reader meets the old one, none, or the new one."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    prior.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def fit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode, fit, write and compare; returns the report.

    Raises:
        ValueError: Something that was given must be changed.
    """
    for name in ("max_images", "flow_steps", "num_samples", "batch_size"):
        if getattr(arguments, name) < 2:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give at least 2.")
    if not all(0 <= temperature < float("inf") for temperature in arguments.temperature):
        raise ValueError(f"--temperature {arguments.temperature}: use numbers of 0 or more.")
    folder = Path(arguments.model)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json: give the folder of a saved model (`hf download` fetches one)."
        )
    data, model = data_config(arguments), load_model(str(folder))
    side, batch, seed = model.config.sample_size, arguments.batch_size, arguments.seed
    features = None
    if arguments.frechet != "none":
        network = FrechetFeatures(arguments.frechet, model.device)
        names = [network.trunk_name] if network.trunk_name else []
        trunk = load_trunks(names, arguments.trunk_weights, model.device, side).get(network.trunk_name)
        features = lambda pixels: network(pixels, None if trunk is None else trunk.features(pixels))  # noqa: E731
    mirrored, count = not arguments.no_mirror, arguments.num_samples
    batches = _training_batches(data, side, arguments.max_images, batch)
    faces = encode_faces(model, batches, mirrored, features, count)
    held_pixels, _ = load_validation(data, resolution=side, rank=0, world_size=1)
    held_out = encode_faces(model, held_pixels.split(batch), mirrored)
    note = ", half of mirror images" * mirrored
    print(f"{len(faces.mean)} training latents and {len(held_out.mean)} held-out ones{note}", flush=True)

    gaussian, shrinkage = fit_gaussian(faces.draw(torch.Generator().manual_seed(seed)), faces.thumbnails)
    fits: dict[str, dict[str, Any]] = {}
    for name in arguments.priors:
        if name == "gaussian":
            prior, fits[name] = gaussian, {"shrinkage": shrinkage}
        else:
            extra = {"steps": arguments.flow_steps} if name == "flow" else {}
            prior, fits[name] = FITS[name](gaussian, faces, held_out, seed, **extra)
        _save(prior, folder / "priors" / name)
        model.set_prior(name, prior)
        found = ", ".join(f"{key} {_short(value)}" for key, value in fits[name].items())
        print(f"{folder / 'priors' / name}: {found}", flush=True)

    generator = torch.Generator().manual_seed(seed)
    shape = (-1, model.config.latent_channels, model.config.latent_size, model.config.latent_size)
    rows = torch.arange(min(_COPY_TRIALS, len(faces.mean)), device=faces.mean.device)
    drawn = {
        "copies": faces.draw(generator, rows).view(shape),
        "held-out": held_out.draw(generator)[: len(held_pixels)].view(shape),
    }
    for name in ["standard", *arguments.priors]:
        for temperature in arguments.temperature:
            title = name if temperature == 1 else f"{name} at {temperature:g}"
            drawn[title] = model.sample_latents(count, name, torch.Generator().manual_seed(seed), temperature)
    near = compare(model, drawn, faces, features, batch)
    report = {"fits": fits, "features": arguments.frechet, "nearest": near}
    write_json(folder / "prior_report.json", report)
    return report


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(report: dict[str, Any]) -> str:
    columns = ["images", "latent_min", "latent_median", "pixel_min", "pixel_median", "copies", "frechet"]
    lines = [f"{'':16}" + "".join(f"{name:>15}" for name in columns)]
    for name, values in report["nearest"].items():
        lines.append(f"{name:16}" + "".join(f"{_short(values.get(column, '-')):>15}" for column in columns))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        report = fit(_parser().parse_args(argv))
    except (ValueError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("Distance to the nearest training face (or mirror image); Frechet distance to training faces.")
    print(_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
