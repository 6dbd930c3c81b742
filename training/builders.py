"""Model and optimizer from a configuration, with the checks that need both."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

import torch
from torch import nn

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra, Downsample, ResBlock, Upsample
from modeling.latent_prior import ModulatedBlock
from training.config import Config, TrainingPresets, unknown_key
from training.muon import Muon

_BLOCKS = (ResBlock, Downsample, Upsample, ModulatedBlock)  # from feature maps to feature maps


def _is_of_type(value: Any, annotation: Any) -> bool:
    """Whether a JSON value suits an annotation such as `tuple[int, ...] | None`."""
    if isinstance(annotation, types.UnionType):
        return any(_is_of_type(value, each) for each in annotation.__args__)
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, (list, tuple)) and all(_is_of_type(each, annotation.__args__[0]) for each in value)
    return type(value) is annotation or (annotation is float and type(value) is int)


def _describe_type(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        return " or ".join(map(_describe_type, annotation.__args__))
    if typing.get_origin(annotation) is tuple:
        return f"an array, each element {_describe_type(annotation.__args__[0])}"
    return {int: "an integer", float: "a number", str: "a string", type(None): "null"}[annotation]


def build_model(config: Config) -> AutoencoderKLUltra:
    """The model of section `model`, on the CPU, with the seed's initial weights.

    Raises:
        ValueError: Unknown key, impossible shape, or a resolution schedule that does not suit it.
    """
    known = typing.get_type_hints(AutoencoderKLUltra.__init__)
    del known["return"]
    for key, value in config.model.items():
        if key not in known:
            raise unknown_key(f"model.{key}", [f"model.{name}" for name in known])
        if not _is_of_type(value, known[key]):
            raise ValueError(f"model.{key} must be {_describe_type(known[key])}, got {json.dumps(value)}.")
    torch.manual_seed(config.training_presets.seed)
    model = AutoencoderKLUltra(**config.model)
    sample_size, ratio = model.config.sample_size, model.spatial_compression_ratio
    for size in map(int, config.training_presets.resolution_schedule):
        if model.config.latent_layout == "vector":
            raise ValueError(
                f"training_presets.resolution_schedule has images of {size} pixels, but the vector layout takes only "
                f"{sample_size}: leave it empty, or set model.latent_layout=spatial."
            )
        if sample_size % size or size % ratio or size >= sample_size:
            raise ValueError(
                f"training_presets.resolution_schedule has images of {size} pixels: sizes must be smaller than "
                f"sample_size {sample_size}, divide it, and be multiples of spatial_compression_ratio {ratio}."
            )
    return model


def freeze_parameters(model: AutoencoderKLUltra, presets: TrainingPresets) -> None:
    """Exclude from training the half that `train_only` leaves out, and the PCA branch if `pca_lr_scale` is 0."""
    encoder: list[nn.Module] = [model.encoder, model.logvar_bias]
    decoder: list[nn.Module] = [model.decoder]
    if model.pca_branch is not None:
        encoder.append(model.pca_branch.encoder)
        decoder.append(model.pca_branch.decoder)
        if presets.pca_lr_scale == 0:
            model.pca_branch.requires_grad_(False)
    for module in {"all": [], "encoder": decoder, "decoder": encoder}[presets.train_only]:
        module.requires_grad_(False)


def micro_batch_size(config: Config, processes: int) -> int:
    """Most images in one forward pass of one process, checked; with "auto", what is tried first."""
    batch = config.training_presets.batch_size
    if batch % processes:
        raise ValueError(
            f"training_presets.batch_size {batch} cannot be divided over {processes} processes: "
            f"use {batch // processes * processes or processes} or another multiple of {processes}."
        )
    local = batch // processes
    wanted = config.training_presets.micro_batch_size
    return min(wanted, local) if isinstance(wanted, int) else local


def build_optimizer(
    presets: TrainingPresets, model: nn.Module, parameters: list[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over the parameters of an autoencoder or a prior that are trained.

    Those of the PCA branch, if trained, and with Muon those of the hidden convolutions have groups of their own.

    Each group has `lr_scale`, its learning rate over `training_presets.learning_rate`.
    """
    pca_branch = getattr(model, "pca_branch", None)
    pca_parameters = set() if pca_branch is None else set(pca_branch.parameters())
    convolutions = set(hidden_convolutions(model)) if presets.optimizer == "muon" else set()
    groups = []
    for scale, members, options in (
        (1.0, [p for p in parameters if p not in pca_parameters | convolutions], {}),
        (presets.muon_lr_scale, [p for p in parameters if p in convolutions], {"muon": True}),
        (presets.pca_lr_scale, [p for p in parameters if p in pca_parameters], {}),
    ):
        if members:
            groups.append({"params": members, "lr": presets.learning_rate * scale, "lr_scale": scale, **options})
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}[presets.optimizer]
    return cls(
        groups,
        betas=(presets.adam_beta1, presets.adam_beta2),
        weight_decay=presets.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def hidden_convolutions(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the convolutions between feature maps: not those that read or write pixels, latents or the PCA image."""
    blocks = [module for module in model.modules() if isinstance(module, _BLOCKS)]
    return [each.weight for block in blocks for each in block.modules() if isinstance(each, nn.Conv2d)]
