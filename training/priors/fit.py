"""Fits priors to the latents of a trained model's training faces and saves them beside the weights.

    python -m training.fit_prior model_weights/vae_quickstart --config configs/quickstart.json
    python -m training.fit_prior MODEL --data parquet:'faces/train-*.parquet' --validation 'faces/validation-*.parquet'
    python -m training.fit_prior MODEL --priors gaussian diffusion --config configs/priors/diffusion.json

Writes MODEL/priors/<name>/, which `FaceVAEPipeline.from_pretrained` loads. The priors are defined in
modeling/latent_prior.py; the Gaussian is fitted here, the diffusion prior trained by training/priors/diffusion.py.
`python -m training.compare_priors` compares their samples.

Every prior is fitted to samples from the posteriors of training faces and their horizontal flips, since the decoder was
trained on these.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from modeling.latent_prior import GaussianPrior, LatentPrior, fit_gaussian
from modeling.pipeline import FITTED_PRIORS, FaceVAEPipeline
from training.cli import UserError, add_option, check_output, data_source, positive_int, run
from training.config import Config, config_from_dict, load_config
from training.priors.diffusion import DiffusionTraining
from training.priors.latents import encode_faces, training_faces, validation_faces
from training.priors.sample import load_pipeline, seeded_generator
from training.run_files import check_exported

_RIDGE = 1e-3  # added to the variances of the attributes, which are at most 1/4


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.fit_prior", description="Fit priors to training latents.")
    add_option(parser, "model", help="folder of an exported model; priors are written into it")
    add_data_options(parser)
    parser.add_argument("--priors", nargs="+", choices=FITTED_PRIORS, default=["gaussian"], help="default: gaussian")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="diffusion: resume from the newest checkpoint of this run name, or from the run or checkpoint at PATH",
    )
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        nargs="+",
        metavar="KEY",
        help="resume although this key has changed (section.key or processes)",
    )
    add_option(parser, "--batch-size", default=16)
    add_option(parser, "--seed", default=0)
    add_option(parser, "--device")
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options that `data_config` reads."""
    parser.add_argument("--data", metavar="SOURCE", help="synthetic_faces, imagefolder:DIR, parquet:GLOB or a Hub id")
    add_option(parser, "--config", help="JSON configuration whose section `data` names the images")
    add_option(parser, "--set")
    parser.add_argument(
        "--validation", metavar="GLOB", help="validation files of --data parquet (default: part of the training files)"
    )
    add_option(parser, "--crop-px", help="size of the center crop, as in training")
    parser.add_argument(
        "--max-images", type=positive_int, default=200_000, metavar="N", help="training images (default: %(default)s)"
    )
    parser.add_argument("--no-flip", action="store_true", help="leave out horizontally flipped images")


def read_config(arguments: argparse.Namespace) -> Config:
    """The configuration that the command line describes; its section `data` has training and validation images.

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
        config = load_config(arguments.config, arguments.overrides)
    else:
        keys = data_source(arguments.data, "train")
        if arguments.validation:
            keys["data_files"]["validation"] = arguments.validation
        elif keys["dataset"] == "imagefolder":
            if not (Path(keys["data_dir"]).expanduser() / "validation").is_dir():
                keys["validation_split"] = None
        elif keys["dataset"] != "synthetic_faces":
            keys["validation_split"] = None  # a fraction of the training images is held out
        config = config_from_dict({"data": keys})
    changes = {} if arguments.crop_px is None else {"crop_px": arguments.crop_px}
    data = dataclasses.replace(config.data, horizontal_flip=False, **changes)
    return dataclasses.replace(config, data=data)


def attribute_directions(latents: Tensor, attributes: Tensor) -> Tensor:
    """What is added to a latent to make an absent attribute present.

    Args:
        latents: (n, latent_dim).
        attributes: (n, attributes): 1 present, -1 absent, 0 unknown.

    Returns:
        (2, attributes, latent_dim): differences of means, and the coefficients of a ridge regression of latents on all
        attributes, which leaves out what an attribute shares with the others. Zero for an attribute that no face or
        every face has.
    """
    values = attributes.to(latents)
    means = [latents[column > 0].mean(dim=0) - latents[column < 0].mean(dim=0) for column in values.T]
    centered = (values - values.mean(dim=0)) / 2  # 1 between absent and present
    covariance = centered.T @ centered / len(values) + _RIDGE * torch.eye(values.shape[1]).to(latents)
    ridge = torch.linalg.solve(covariance, centered.T @ (latents - latents.mean(dim=0)) / len(values))
    return torch.stack([torch.stack(means), ridge]).nan_to_num(0.0)


def _save(prior: LatentPrior, folder: Path) -> None:
    """Writes a prior so that a reader finds the old one, none, or the new one, never half of one."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        prior.save_pretrained(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error}): make room, and run the command again.") from None
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def fit_gaussian_prior(
    latents: dict[str, Tensor], attributes: tuple[str, ...], seed: int
) -> tuple[GaussianPrior, float]:
    """The Gaussian prior with attribute directions, and the weight of the identity in its correlation.

    Args:
        latents: Of `encode_faces`.
        attributes: Names of the columns of `latents["train_attributes"]`.
        seed: Of the posterior noise.
    """
    mean, std = latents["train_mean"], latents["train_std"]
    samples = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    prior, shrinkage = fit_gaussian(samples)
    if attributes:
        prior.register_to_config(attributes=attributes)
        directions = attribute_directions(samples, latents["train_attributes"])
        prior.directions = nn.Parameter(directions, requires_grad=False)
    return prior, shrinkage


def _fit(arguments: argparse.Namespace) -> int:
    seeded_generator(arguments.seed)  # errors before the model is loaded
    config = read_config(arguments)
    if "diffusion" in arguments.priors and arguments.config is None:
        raise ValueError(
            "the diffusion prior is trained by a configuration: give --config configs/priors/diffusion.json."
        )
    if arguments.resume and "diffusion" not in arguments.priors:
        raise ValueError("--resume continues the training of the diffusion prior: give --priors diffusion.")
    if arguments.allow_changed and not arguments.resume:
        raise ValueError(f"--allow-changed {arguments.allow_changed[0][0]} goes with --resume only: leave it out.")
    if arguments.device and "diffusion" in arguments.priors:
        raise ValueError("--device does not choose the device of a training: set CUDA_VISIBLE_DEVICES instead.")
    pipeline = load_pipeline(arguments.model, "cpu" if "diffusion" in arguments.priors else arguments.device)
    folder, vae = Path(pipeline.name_or_path), pipeline.vae
    if not folder.is_dir():
        raise ValueError(f"{folder} is on the Hub: download it (`hf download`) and give its folder.")
    if (folder / FaceVAEPipeline.config_name).is_file():
        raise ValueError(
            f"{folder} is a saved pipeline: give the exported model's folder, and save the pipeline again."
        )
    check_exported(folder)
    attributes = tuple(config.data.attribute_columns)

    def encode(vae: nn.Module) -> dict[str, Tensor]:
        size, batch_size = vae.config.sample_size, arguments.batch_size
        faces = {"train": training_faces(config.data, size, arguments.max_images, batch_size)}
        if "diffusion" in arguments.priors:  # the Gaussian needs no validation
            faces["validation"] = validation_faces(config.data, size, batch_size)
        latents = {}
        for split, images in faces.items():
            found = encode_faces(vae, images, with_flips=not arguments.no_flip, with_thumbnails=False)
            latents |= {f"{split}_mean": found.mean.cpu(), f"{split}_std": found.std.cpu()}
            if attributes:
                latents[f"{split}_attributes"] = found.attributes
            print(f"{len(found.mean)} {split} latents, flipped images included", flush=True)
        latents["num_faces"] = torch.tensor(len(latents["train_mean"]) // (1 if arguments.no_flip else 2))
        return latents

    check_output(folder / "priors", what="the folder of priors")
    training = None
    if "diffusion" in arguments.priors:
        training = DiffusionTraining(
            vae,
            encode,
            config,
            folder,
            attributes,
            resume=arguments.resume,
            allow_changed=[key for keys in arguments.allow_changed for key in keys],
            encoding={"max_images": arguments.max_images, "flips": not arguments.no_flip},
        )
    if "gaussian" in arguments.priors and (training is None or training.accelerator.is_main_process):
        latents = encode(vae) if training is None else training.latents
        prior, shrinkage = fit_gaussian_prior(latents, attributes, arguments.seed)
        _save(prior, folder / "priors" / "gaussian")
        print(f"{folder / 'priors' / 'gaussian'}: shrinkage {shrinkage:.4g}", flush=True)
    return 0 if training is None else training.run()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_fit, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
