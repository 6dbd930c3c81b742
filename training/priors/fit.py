"""Fits priors to the latents of a trained model's training faces and saves them beside the weights.

    python -m training.fit_prior model_weights/vae_quickstart --config configs/quickstart.json
    python -m training.fit_prior MODEL --data parquet:'faces/train-*.parquet' --validation 'faces/validation-*.parquet'
    python -m training.fit_prior MODEL --data imagefolder:DIR --priors gaussian

Writes MODEL/priors/<name>/, which `FaceVAEPipeline.from_pretrained` loads, and MODEL/prior_report.json, which compares
samples of each prior with faces. The kinds of priors are defined in modeling/latent_prior.py.

Every prior is fitted to samples from the posteriors of training faces and their horizontal flips, since the decoder was
trained on these. The flow gets new posterior noise in every step, against memorization.
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

from modeling.latent_prior import LatentPrior, fit_gaussian
from modeling.pipeline import FITTED_PRIORS, FaceVAEPipeline
from training.cli import add_option, data_source, positive_int, run
from training.config import DataConfig, config_from_dict, load_config
from training.data.stream import TrainStream, load_validation
from training.evaluate.frechet import FrechetFeatures, load_trunks
from training.io import write_json
from training.priors.latents import FaceLatents, compare_samples, encode_faces
from training.priors.sample import load_pipeline, seeded_generator

_NEAR_DUPLICATE_FACES = 64  # training faces whose reconstructions define how close a near-duplicate is
_MIXTURE_SIZES = [(dims, components) for dims in (16, 64) for components in (2, 4, 8, 16)]
_MIXTURE_MIN_VARIANCE = 1e-3  # added to each component's variances; 1 is the variance of all faces
_EMA_DECAY = 0.995
_VALIDATE_EVERY = 50  # flow steps


# ---- the fits ----


def _whitening(prior: LatentPrior) -> Callable[[Tensor], Tensor]:
    """The inverse of the prior's affine map."""
    inverse = torch.linalg.inv(prior.factor.cpu().double()).to(prior.factor)
    return lambda latents: (latents - prior.mean) @ inverse.T


def _copy_affine_map(source: LatentPrior, target: LatentPrior) -> None:
    target.to(source.factor.device)
    target.mean.data.copy_(source.mean)
    target.factor.data.copy_(source.factor)


def fit_mixture(
    gaussian: LatentPrior, faces: FaceLatents, validation: FaceLatents, seed: int = 0
) -> tuple[LatentPrior, dict[str, Any]]:
    """Fits a Gaussian mixture over the first whitened dimensions of the Gaussian; the others stay standard normal.

    A full covariance of 1,024 dimensions has 524,800 entries: even CelebA has too few faces for several components.
    One of 16 dimensions has 136, one of 64 has 2,080. The validation faces choose the number of dimensions and
    components; all choices are densities of the same latents, so their likelihoods are comparable.

    Args:
        gaussian: Of `fit_gaussian`.
        faces: Training faces.
        validation: Faces of people not in the training set.
        seed: Of posterior noise and initial components.

    Returns:
        The prior, and `components`, `component_dims`, and the gain in log-likelihood over the Gaussian, in nats per
        validation face (`validation_gain_nats`) and per training face (`train_gain_nats`).

    Raises:
        ValueError: Too few faces for two components.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import, and only the mixture needs it
    from sklearn.mixture import GaussianMixture

    generator, whiten = torch.Generator().manual_seed(seed), _whitening(gaussian)
    whitened, validation_whitened = (
        whiten(part.sample(generator)).cpu().double().numpy() for part in (faces, validation)
    )
    latent_dim = gaussian.config.latent_dim
    sizes = dict.fromkeys((min(dims, latent_dim), components) for dims, components in _MIXTURE_SIZES)
    sizes = [(dims, components) for dims, components in sizes if len(whitened) >= 4 * components * dims]
    if not sizes:
        raise ValueError(f"{len(whitened)} faces are too few for a mixture: give more, or leave it out of --priors.")
    best = None
    for dims, components in sizes:
        mixture = GaussianMixture(components, reg_covar=_MIXTURE_MIN_VARIANCE, max_iter=100, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the validation faces judge the result
            mixture.fit(whitened[:, :dims])
        gains = []
        for points in (validation_whitened[:, :dims], whitened[:, :dims]):
            standard = -0.5 * ((points**2).sum(axis=1) + dims * np.log(2 * np.pi))
            gains.append(float((mixture.score_samples(points) - standard).mean()))
        if best is None or gains[0] > best[0]:
            best = (*gains, mixture)
    validation_gain, train_gain, mixture = best
    components, dims = mixture.means_.shape
    prior = LatentPrior("mixture", latent_dim=latent_dim, components=components, component_dims=dims)
    _copy_affine_map(gaussian, prior)
    prior.component_weights.data.copy_(torch.from_numpy(mixture.weights_))
    prior.component_means.data.copy_(torch.from_numpy(mixture.means_))
    prior.component_factors.data.copy_(torch.from_numpy(np.linalg.cholesky(mixture.covariances_)))
    return prior, {
        "components": components,
        "component_dims": dims,
        "validation_gain_nats": validation_gain,
        "train_gain_nats": train_gain,
    }


def flow_loss(field: Callable[[Tensor, Tensor], Tensor], noise: Tensor, whitened: Tensor, t: Tensor) -> Tensor:
    """Conditional flow matching (Lipman et al. 2022, equation 23, sigma_min = 0), mean over dimensions.

    Args:
        field: Positions (n, d) and times (n,) to velocities (n, d).
        noise: x_0, standard normal, (n, d).
        whitened: x_1, whitened latents, (n, d).
        t: Times in [0, 1], (n,).
    """
    positions = torch.lerp(noise, whitened, t[:, None])
    return (field(positions, t) - (whitened - noise)).square().mean()


def _ema_update(ema: Tensor, new: Tensor, count: Tensor) -> Tensor:
    """EMA whose horizon is at most a tenth of the steps so far, so that it forgets the initialization."""
    return torch.lerp(ema, new, 1 - min(_EMA_DECAY, (1 + int(count)) / (10 + int(count))))


def fit_flow(
    gaussian: LatentPrior,
    faces: FaceLatents,
    validation: FaceLatents,
    seed: int = 0,
    *,
    steps: int = 1500,
    batch_size: int = 256,
    width: int = 384,
    blocks: int = 3,
    learning_rate: float = 5e-4,
) -> tuple[LatentPrior, dict[str, Any]]:
    """Trains a flow from N(0, I) to whitened latents; it starts as the Gaussian.

    Args:
        gaussian: Of `fit_gaussian`.
        faces: Training faces.
        validation: Faces of people not in the training set.
        seed: Of weights, noise and times.
        steps: Optimizer steps. The EMA weights with the lowest validation loss are kept, those of step 0 included.
        batch_size: Latents per step.
        width, blocks: Of the velocity field.
        learning_rate: Maximum; warms up over the first 100 steps and decays to 0 along a cosine.

    Returns:
        The prior, and `validation_loss`, the loss of the Gaussian (`gaussian_loss`), `best_step` and the `train_loss`
        there; mean squared errors of the velocity.
    """
    device, latent_dim = faces.mean.device, gaussian.config.latent_dim
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = LatentPrior("flow", latent_dim=latent_dim, width=width, blocks=blocks)
    _copy_affine_map(gaussian, prior)
    whiten, generator = _whitening(gaussian), torch.Generator().manual_seed(seed)
    field = prior.velocity
    ema = AveragedModel(field, avg_fn=_ema_update)
    optimizer = torch.optim.AdamW(field.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = min(100, max(1, steps // 10))

    def lr_factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * np.cos(np.pi * min(1.0, step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)

    def sample_batch(source: FaceLatents, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        indices = torch.randint(len(source.mean), (size,), generator=generator).to(device)
        noise = torch.randn(size, latent_dim, generator=generator).to(device)
        whitened = whiten(source.sample(generator, indices))
        # Stratified times: the loss depends on the time far more than on the face.
        return noise, whitened, ((torch.arange(size) + torch.rand(size, generator=generator)) / size).to(device)

    validation_batches = [
        sample_batch(validation, 512, torch.Generator().manual_seed(seed + 1 + index)) for index in range(4)
    ]

    def validation_loss(field: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(np.mean([flow_loss(field, *batch).item() for batch in validation_batches]))

    gaussian_loss = validation_loss(field)
    best = {"validation_loss": gaussian_loss, "best_step": 0, "train_loss": None}
    best_weights, losses = copy.deepcopy(field.state_dict()), []
    for step in tqdm(range(1, steps + 1), desc="flow", unit="step", disable=not sys.stderr.isatty()):
        loss = flow_loss(field, *sample_batch(faces, batch_size, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(field.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(field)
        losses.append(loss.item())
        if step % _VALIDATE_EVERY == 0 or step == steps:
            value = validation_loss(ema)
            if value < best["validation_loss"]:
                recent = float(np.mean(losses[-_VALIDATE_EVERY:]))
                best = {"validation_loss": value, "best_step": step, "train_loss": recent}
                best_weights = copy.deepcopy(ema.module.state_dict())
    field.load_state_dict(best_weights)
    return prior.requires_grad_(False).eval(), best | {"gaussian_loss": gaussian_loss}


# ---- the command ----


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.fit_prior", description="Fit priors to training latents.")
    add_option(parser, "model", help="folder of an exported model; priors are written into it")
    parser.add_argument("--data", metavar="SOURCE", help="synthetic_faces, imagefolder:DIR, parquet:GLOB or a Hub id")
    add_option(parser, "--config", help="JSON configuration whose section `data` names the images")
    add_option(parser, "--set")
    parser.add_argument(
        "--validation", metavar="GLOB", help="validation files of --data parquet (default: part of the training files)"
    )
    parser.add_argument("--crop-px", type=int, metavar="N", help="size of the center crop, as in training")
    parser.add_argument(
        "--max-images", type=positive_int, default=20_000, metavar="N", help="training images (default: %(default)s)"
    )
    parser.add_argument("--no-flip", action="store_true", help="leave out horizontally flipped images")
    parser.add_argument("--priors", nargs="+", choices=FITTED_PRIORS, default=list(FITTED_PRIORS), help="default: all")
    parser.add_argument(
        "--flow-steps", type=positive_int, default=1500, metavar="N", help="steps of the flow (default: %(default)s)"
    )
    add_option(parser, "--num-samples", default=128, help="samples of each prior to compare with training faces")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[1.0], metavar="T", help="of these samples (default: 1)"
    )
    parser.add_argument(
        "--frechet",
        metavar="NETWORK",
        help="feature network, or none (default: output.eval_lpips_trunk of --config, else vgg16)",
    )
    add_option(parser, "--trunk-weights")
    add_option(parser, "--batch-size", default=16)
    add_option(parser, "--seed", default=0)
    add_option(parser, "--device")
    return parser


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The section `data` that the command line describes, with training and validation images.

    Raises:
        ValueError: No source, or an impossible one.
    """
    if (arguments.data is None) == (arguments.config is None):
        raise ValueError("give either --data or --config, which name the training images.")
    if arguments.overrides and arguments.config is None:
        raise ValueError("--set changes a configuration: give --config.")
    if arguments.validation and (arguments.data or "").partition(":")[0] != "parquet":
        raise ValueError(f"--validation {arguments.validation} goes with --data parquet:GLOB only: leave it out.")
    if arguments.config is not None:
        data = load_config(arguments.config, arguments.overrides).data
    else:
        keys = data_source(arguments.data, "train")
        if arguments.validation:
            keys["data_files"]["validation"] = arguments.validation
        elif keys["dataset"] == "parquet":
            keys["validation_split"] = None
        elif keys["dataset"] == "imagefolder" and not (Path(keys["data_dir"]).expanduser() / "validation").is_dir():
            keys["validation_split"] = None
        data = config_from_dict({"data": keys}).data
    changes = {} if arguments.crop_px is None else {"crop_px": arguments.crop_px}
    return dataclasses.replace(data, horizontal_flip=False, **changes)


def _training_batches(data: DataConfig, resolution: int, max_images: int, batch_size: int) -> Iterator[Tensor]:
    # One image at a time, so that no image of the last batch is left out.
    stream = TrainStream(data, resolution=resolution, seed=0, global_batch=1, rank=0, world_size=1)
    total = max_images if stream.num_examples is None else min(max_images, stream.num_examples)
    images: list[Tensor] = []
    batches = stream.epoch_batches(0, max_batches=total)
    for single in tqdm(batches, desc="encoding", total=total, unit="image", disable=not sys.stderr.isatty()):
        images.append(single.pixels)
        if len(images) == batch_size:
            yield torch.cat(images)
            images = []
    if images:
        yield torch.cat(images)


def _save(prior: LatentPrior, folder: Path) -> None:
    """Writes a prior so that a reader finds the old one, none, or the new one, never half of one."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    prior.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def _fit(arguments: argparse.Namespace) -> None:
    count, batch_size, seed = arguments.num_samples, arguments.batch_size, arguments.seed
    seeded_generator(seed)  # errors before the model is loaded
    if count < 2:
        raise ValueError(f"--num-samples must be at least 2, got {count}.")
    if not all(0 <= temperature < float("inf") for temperature in arguments.temperature):
        raise ValueError(f"--temperature must be numbers of at least 0, got {arguments.temperature}.")
    data = data_config(arguments)
    if arguments.frechet is None:
        trained = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
        arguments.frechet = "vgg16" if trained is None else trained.output.eval_lpips_trunk
    pipeline = load_pipeline(arguments.model, arguments.device)
    folder, vae = Path(pipeline.name_or_path), pipeline.vae
    if not folder.is_dir():
        raise ValueError(f"{folder} is on the Hub: download it (`hf download`) and give its folder.")
    if (folder / FaceVAEPipeline.config_name).is_file():
        raise ValueError(
            f"{folder} is a saved pipeline: give the exported model's folder, and save the pipeline again."
        )
    resolution, with_flips = vae.config.sample_size, not arguments.no_flip
    features = _frechet_features(arguments, vae.device, resolution)

    batches = _training_batches(data, resolution, arguments.max_images, batch_size)
    faces = encode_faces(vae, batches, with_flips, features, count)
    validation_pixels, _ = load_validation(data, resolution=resolution, rank=0, world_size=1)
    validation = encode_faces(vae, validation_pixels.split(batch_size), with_flips)
    note = " (half of them of flipped images)" if with_flips else ""
    print(f"{len(faces.mean)} training and {len(validation.mean)} validation latents{note}", flush=True)

    gaussian, shrinkage = fit_gaussian(faces.sample(torch.Generator().manual_seed(seed)), faces.thumbnails)
    fits: dict[str, dict[str, Any]] = {}
    for name in arguments.priors:
        if name == "gaussian":
            prior, fits[name] = gaussian, {"shrinkage": shrinkage}
        elif name == "mixture":
            prior, fits[name] = fit_mixture(gaussian, faces, validation, seed)
        else:
            prior, fits[name] = fit_flow(gaussian, faces, validation, seed, steps=arguments.flow_steps)
        _save(prior, folder / "priors" / name)
        pipeline.register_modules(**{name: prior})
        values = ", ".join(f"{key} {_short(value)}" for key, value in fits[name].items())
        print(f"{folder / 'priors' / name}: {values}", flush=True)

    generator = torch.Generator().manual_seed(seed)
    indices = torch.arange(min(_NEAR_DUPLICATE_FACES, len(faces.mean)), device=faces.mean.device)
    samples = {
        "training": faces.sample(generator, indices).view(-1, *vae.latent_shape),
        "validation": validation.sample(generator)[: len(validation_pixels)].view(-1, *vae.latent_shape),
    }
    for name in ["standard", *arguments.priors]:
        for temperature in arguments.temperature:
            title = name if temperature == 1 else f"{name} at {temperature:g}"
            samples[title] = pipeline.sample_latents(count, name, temperature, torch.Generator().manual_seed(seed))
    nearest = compare_samples(pipeline, samples, faces, features, batch_size)
    write_json(folder / "prior_report.json", {"fits": fits, "features": arguments.frechet, "nearest": nearest})
    print("Distance to the nearest training face (or its horizontal flip); Frechet distance to training faces.")
    print(_table(nearest))


def _frechet_features(
    arguments: argparse.Namespace, device: torch.device, resolution: int
) -> Callable[[Tensor], Tensor] | None:
    if arguments.frechet == "none":
        return None
    network = FrechetFeatures(arguments.frechet, device)
    names = [network.trunk_name] if network.trunk_name else []
    trunk = load_trunks(names, arguments.trunk_weights, device, resolution).get(network.trunk_name)
    return lambda pixels: network(pixels, None if trunk is None else trunk.features(pixels))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(nearest: dict[str, dict[str, float]]) -> str:
    columns = ["images", "latent_min", "latent_median", "pixel_min", "pixel_median", "near_duplicates", "frechet"]
    lines = [f"{'':16}" + "".join(f"{name:>16}" for name in columns)]
    for name, values in nearest.items():
        lines.append(f"{name:16}" + "".join(f"{_short(values.get(column, '-')):>16}" for column in columns))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_fit, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
