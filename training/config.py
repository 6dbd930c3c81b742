"""The configuration of a run: dataclasses that document and check every key, read from JSON.

The JSON file has the sections `model` (passed to `AutoencoderKLUltra`, whose docstring documents its keys), `data`,
`loss`, `training_presets`, `output` and `hub`. Keys equal field names. Constraints are declared beside each field. An
unknown key, a wrong type or a value out of range raises a ValueError that names the key, the value and the remedy.
Imports the standard library only, so that a misspelled key is reported before torch is imported.

    config = load_config("configs/ultra.json", ["training_presets.batch_size=32"])
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

TOKEN = r"hf_[A-Za-z0-9]{16,}"  # an access token of the Hub, which must not appear in any configuration or log
COLLECTIVE_TIMEOUT_S = 3600  # how long a process waits for the others in a collective before the run fails
TRACKERS = ("tensorboard", "trackio", "wandb")
TRUNKS = ("vgg16", "alexnet", "squeezenet", "st_alexnet", "st_vgg16")

# Keys of earlier versions, without their section -> the present name.
RENAMED = {
    "latent_numbers": "model.latent_dim",
    "encoder_channels": "model.encoder_block_out_channels",
    "encoder_layers": "model.encoder_layers_per_block",
    "decoder_channels": "model.decoder_block_out_channels",
    "decoder_layers": "model.decoder_layers_per_block",
    "linear_size": "model.pca_size",
    "linear_decode_size": "model.pca_decode_size",
    "linear_init_images": "training_presets.pca_init_images",
    "linear_init_copies": "training_presets.pca_init_augmented_copies",
    "linear_noise_fraction": "training_presets.pca_noise_fraction",
    "linear_lr_scale": "training_presets.pca_lr_scale",
    "max_bad_fraction": "data.max_corrupt_fraction",
}


# ---------------------------------------------------------------------- constraints

_COMPARISONS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "greater than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}
_TYPES = {
    NoneType: "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "an object",
    list: "a list",
}


def constrained(default: Any, **limits: Any) -> Any:
    """A dataclass field with limits: `ge`, `gt`, `le` and `lt` for numbers, `choices` for strings."""
    return field(default=default, metadata=limits)


def describe_limits(limits: Mapping[str, Any]) -> str:
    """The limits of a number in words, such as "at least 0 and less than 1"; "" without limits."""
    return " and ".join(f"{words} {limits[name]}" for name, (_, words) in _COMPARISONS.items() if name in limits)


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _require(ok: bool, key: str, wanted: str, value: Any) -> None:
    if not ok:
        text = json.dumps(value, default=str)
        raise ValueError(f"{key} must be {wanted}, got {text if len(text) < 200 else text[:200] + '...'}.")


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, (int, float)) or abs(value) <= sys.float_info.max


def _checked(key: str, value: Any, annotation: Any, limits: Mapping[str, Any]) -> Any:
    """Check a JSON value against a field's annotation and limits; returns it, integers as floats where those belong."""
    types = typing.get_args(annotation) or (annotation,)
    _require(_is_finite(value), key, "finite", value)
    if float in types and type(value) is int:
        value = float(value)
    choices = [f'"{choice}"' for choice in limits.get("choices", ())]
    words = [word for each in types for word in (choices if each is str and choices else [_TYPES[each]])]
    valid = type(value) in types and (not isinstance(value, str) or not choices or value in limits["choices"])
    example = f", such as {json.dumps(value.split(','))}" if list in types and isinstance(value, str) else ""
    _require(valid, key, _either(words) + example, value)
    _require(value != "", key, "a non-empty string" + (" or null" if NoneType in types else ""), value)
    if type(value) in (int, float):
        within = all(compare(value, limits[name]) for name, (compare, _) in _COMPARISONS.items() if name in limits)
        _require(within, key, describe_limits(limits), value)
    return value


class _Section:
    """Base of the sections: checks each field on its own, then those that depend on each other."""

    __slots__ = ()
    section = ""

    def __post_init__(self) -> None:
        annotations = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            value = _checked(f"{self.section}.{item.name}", value, annotations[item.name], item.metadata)
            object.__setattr__(self, item.name, value)
        self._check_together()

    def _check_together(self) -> None:
        """Checks of several fields; raises ValueError."""

    def _require(self, ok: bool, key: str, wanted: str) -> None:
        _require(ok, f"{self.section}.{key}", wanted, getattr(self, key))


# ---------------------------------------------------------------------- sections


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Section):
    """Section `data`: the data set and its preprocessing."""

    section = "data"

    # A data set id on the Hub ("flwrlabs/celeba"), "parquet" (with data_files), "imagefolder" (with data_dir), or
    # "synthetic_faces", which are rendered on this machine and need no network.
    dataset: str = "synthetic_faces"
    revision: str | None = None  # commit, tag or branch of a Hub data set; pin a commit for repeatable runs
    data_files: dict | None = None  # "parquet": split name -> path or glob, or a list of them
    data_dir: str | None = None  # "imagefolder": folder of images, with one subfolder per split if there are splits
    train_split: str = "train"  # split to train on; of "imagefolder": a subfolder, or "." for the whole folder
    # Split for validation, disjoint from train_split; null holds out `holdout_fraction` of the training examples by a
    # hash of their bytes.
    validation_split: str | None = "validation"
    holdout_fraction: float = constrained(0.02, gt=0, lt=0.5)  # fraction of the training examples that are held out
    image_column: str = "image"  # column of the images: encoded bytes, or an Image feature of `datasets`
    # Columns of booleans (or numbers, present if positive) that priors are conditioned on, such as CelebA's "Smiling".
    attribute_columns: list = field(default_factory=list)
    crop_px: int | None = constrained(None, ge=16)  # size of the center crop before resizing; null: largest square
    horizontal_flip: bool = True  # flip each training image horizontally with probability 1/2
    shuffle_buffer: int = constrained(2048, ge=1)  # examples in the streaming shuffle buffer (about 10 kB each)
    num_train_images: int | None = constrained(
        None, ge=1
    )  # for estimates and lr_schedule where the data set has no count
    max_validation_images: int = constrained(2048, ge=1)  # first readable ones of the split, decoded once and kept
    max_corrupt_fraction: float = constrained(0.01, ge=0, le=1)  # the run stops above this fraction of corrupt images
    decode_threads: int = constrained(0, ge=0)  # 0: one per CPU core, at most 16
    # Decode in this many worker processes of each training process instead of threads, for more images/s.
    decode_processes: int = constrained(0, ge=0)
    prefetch_batches: int = constrained(4, ge=1)  # decoded batches kept ready
    synthetic_train_images: int = constrained(4096, ge=1)  # "synthetic_faces": number of training images
    synthetic_validation_images: int = constrained(256, ge=1)  # "synthetic_faces": number of validation images
    # "on": keep the encoded examples on disk as they arrive, and from the second epoch on read them from there in a
    # globally shuffled order; "only": read the cache of an earlier run, without a network; "off": every process
    # streams the data set in every epoch, through the shuffle buffer. Folders of images are never copied.
    cache: str = constrained("on", choices=("on", "only", "off"))
    cache_dir: str | None = None  # folder of this cache and of `datasets`' own files; null: HF_HOME/datasets
    # Seconds without a new example, retries included, before the run stops. At least 10 minutes below the timeout of
    # collectives, because the other processes wait in one.
    timeout_s: float = constrained(1200.0, gt=0, le=COLLECTIVE_TIMEOUT_S - 600)

    def _check_together(self) -> None:
        for files in (self.data_files or {}).values():
            paths = files if isinstance(files, list) else [files]
            valid = bool(paths) and all(isinstance(path, str) and path for path in paths)
            self._require(valid, "data_files", "an object of split names and paths (or lists of paths)")
        names = self.attribute_columns
        valid = all(isinstance(name, str) and name for name in names) and len({*names}) == len(names)
        self._require(valid, "attribute_columns", "a list of different column names")
        if self.dataset == "parquet":
            self._require(bool(self.data_files), "data_files", 'an object such as {"train": "path/train-*.parquet"}')
        else:
            wanted = 'null unless data.dataset is "parquet" (set data.dataset=parquet, too)'
            self._require(self.data_files is None, "data_files", wanted)
        if self.dataset == "imagefolder":
            self._require(self.data_dir is not None, "data_dir", "the folder of the images")
        else:
            wanted = 'null unless data.dataset is "imagefolder" (set data.dataset=imagefolder, too)'
            self._require(self.data_dir is None, "data_dir", wanted)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(_Section):
    """Section `loss`: weights of the reconstruction terms, on images in [-1, 1], and the perceptual networks."""

    section = "loss"

    mse_weight: float = constrained(0.4, ge=0)  # mean squared error
    l1_weight: float = constrained(0.2, ge=0)  # mean absolute error
    perceptual_weight: float = constrained(0.2, ge=0)  # L1 distance of the trunk's normalized features
    lpips_weight: float = constrained(0.2, ge=0)  # LPIPS (Zhang et al. 2018), which shares the frozen trunk
    # Feature network (trunk): vgg16, alexnet, squeezenet (ImageNet weights, see trunk_weights), st_alexnet or st_vgg16
    # (weights come with the package stlpips-pytorch, of the extra `quickstart`).
    trunk: str = constrained("vgg16", choices=TRUNKS)
    # Second network for LPIPS: the term is the mean of both distances, each of which sees errors that the other
    # misses. AlexNet costs 1/24 of VGG16's FLOPs per pixel. null: trunk alone.
    lpips_trunk: str | None = constrained(None, choices=TRUNKS)
    trunk_weights: str | None = None  # folder with <trunk>_features.safetensors; null: torch's hub cache, or download
    # Size of the random crop (the same of image and reconstruction) that the trunk sees; null: the full image.
    perceptual_crop_px: int | None = constrained(None, ge=32)
    lpips_crop_px: int | None = constrained(None, ge=32)  # the same for lpips_trunk, which has random crops of its own
    # Adversarial term: its gradient at the reconstruction is this fraction of that of the terms above; 0: no discriminator.
    # For a trained model: see configs/ultra_sharp.json.
    adversarial_weight: float = constrained(0.0, ge=0)
    adversarial_max_weight: float = constrained(
        1.0, gt=0
    )  # limit of the resulting weight; the fraction is then smaller
    # Training images for which the discriminator trains alone; then the weight rises linearly over as many images.
    adversarial_start_images: int = constrained(8192, ge=0)
    discriminator_learning_rate: float = constrained(1e-3, gt=0)  # of its Adam
    discriminator_penalty: float = constrained(1e-4, ge=0)  # weight of the squared gradients (R1 and R2) in its loss

    def _check_together(self) -> None:
        weights = (self.mse_weight, self.l1_weight, self.perceptual_weight, self.lpips_weight)
        _require(sum(weights) > 0, "the sum of the weights in section loss", "greater than 0", sum(weights))
        valid = self.lpips_crop_px is None or self.lpips_trunk is not None
        self._require(valid, "lpips_crop_px", "null without loss.lpips_trunk (loss.perceptual_crop_px is for trunk)")
        if self.perceptual_weight == 0 and self.lpips_weight == 0:
            wanted = "0 without a feature network (loss.perceptual_weight and loss.lpips_weight are 0)"
            self._require(self.adversarial_weight == 0, "adversarial_weight", wanted)

    @property
    def trunks(self) -> list[tuple[str, int | None]]:
        """Name and crop size (pixels; None: full images) of each feature network that a term with weight reads."""
        if self.perceptual_weight == 0 and self.lpips_weight == 0:
            return []
        named = [(self.trunk, self.perceptual_crop_px)]
        if self.lpips_trunk is not None and self.lpips_weight > 0:
            named.append((self.lpips_trunk, self.lpips_crop_px))
        return named


@dataclass(frozen=True, kw_only=True, slots=True)
class KLSchedule(_Section):
    """The keys of section `training_presets` that set the weight of the KL term (beta); see docs/explanation/kl-control.md."""

    section = "training_presets"

    kl_target_low: float = constrained(0.01, gt=0, lt=1)  # lower end of the target range of the smoothed KL fraction
    kl_target_high: float = constrained(0.03, gt=0, lt=1)  # upper end of the target range
    kl_beta_init: float = constrained(1e-4, gt=0)  # controlled beta at the start; constant beta where control is off
    kl_beta_min: float = constrained(1e-6, gt=0)  # lower limit of beta
    kl_beta_max: float = constrained(1.0, gt=0)  # upper limit of beta
    kl_half_life_images: int = constrained(2048, ge=1)  # half-life of the exponential moving averages, in images
    # Gain per half-life: with 0.5, 1 - exp(-0.5) = 39 % of the error is corrected in one half-life.
    kl_gain: float = constrained(0.5, gt=0, le=2)
    # Limit of |change of log beta| per half-life; 0.7 = log 2: beta doubles or halves.
    kl_max_step: float = constrained(0.7, gt=0, le=3)
    # Images over which beta rises linearly to kl_beta_init, from 0 or from the minimum beta. Control starts after them.
    kl_warmup_images: int = constrained(2048, ge=0)
    # Below this smoothed KL, in nats per dimension, beta decreases whatever the fraction; 0: off. A dimension whose
    # posterior mean has variance 0.01, the least that counts as active (Burda et al. 2016), costs 0.005 nats.
    kl_collapse_nats: float = constrained(0.01, ge=0)
    kl_cycle_enabled: bool = True  # begin each cycle of epochs with a low-beta phase; false: none
    kl_cycle_period: int = constrained(8, ge=1)  # epochs per cycle
    kl_cooldown_epochs: int = constrained(2, ge=0)  # epochs of the low-beta phase, the first of each cycle
    kl_cooldown_reduction: float = constrained(
        0.25, gt=0, le=1
    )  # factor of beta (not below the minimum beta) and of the target range
    kl_beta_floor: float = constrained(5e-5, ge=0)  # minimum beta is kl_beta_floor * kl_floor_growth**epoch; 0: none
    kl_floor_growth: float = constrained(1.02, ge=1)  # growth of the minimum beta per epoch

    def _check_together(self) -> None:
        low, high = self.kl_beta_min, self.kl_beta_max
        above = f"greater than kl_target_low = {self.kl_target_low}"
        self._require(self.kl_target_high > self.kl_target_low, "kl_target_high", above)
        self._require(low < high, "kl_beta_max", f"greater than kl_beta_min = {low}")
        self._require(low <= self.kl_beta_init <= high, "kl_beta_init", f"at least {low} and at most {high}")
        self._require(self.kl_beta_floor <= high, "kl_beta_floor", f"at most kl_beta_max = {high}")
        collapse = self.kl_collapse_nats
        self._require(collapse == 0 or collapse >= 0.001, "kl_collapse_nats", "0 (off) or at least 0.001")
        if self.kl_cycle_enabled:
            below = f"less than kl_cycle_period = {self.kl_cycle_period} (or set kl_cycle_enabled to false)"
            self._require(self.kl_cooldown_epochs < self.kl_cycle_period, "kl_cooldown_epochs", below)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPresets(KLSchedule):
    """Section `training_presets`: the optimization; its kl_* keys are in a table of their own."""

    num_epochs: int = constrained(200, ge=1)  # passes over the training images, or over max_images_per_epoch of them
    batch_size: int = constrained(64, ge=1)  # images per optimizer step, over all processes and micro-batches
    # Images per forward pass of one process; gradients are accumulated over the micro-batches of a batch. null:
    # batch_size / processes; "auto": the most that fits in memory, found by trial and halved when memory runs out.
    micro_batch_size: int | str | None = constrained(None, ge=1, choices=("auto",))
    learning_rate: float = constrained(5e-5, gt=0)  # after the warm-up and before it is lowered
    # "plateau": ReduceLROnPlateau. The others follow the fraction of num_epochs that is done: "constant"; "cosine" to
    # min_learning_rate; "warmup_stable_decay", constant until the last lr_decay_fraction, then to min_learning_rate.
    lr_schedule: str = constrained("plateau", choices=("plateau", "constant", "cosine", "warmup_stable_decay"))
    lr_decay_fraction: float = constrained(0.2, gt=0, le=1)  # "warmup_stable_decay": last part of the run
    # L2 weight decay ("adam") or decoupled ("adamw"); "muon": Muon for the convolutions between feature maps, AdamW for the
    # other weights.
    optimizer: str = constrained("adam", choices=("adam", "adamw", "muon"))
    muon_lr_scale: float = constrained(3.0, gt=0)  # learning rate of Muon's weights over learning_rate
    weight_decay: float = constrained(1e-5, ge=0)  # of all trained weights
    adam_beta1: float = constrained(0.9, gt=0, lt=1)  # decay of the first moment, per step
    adam_beta2: float = constrained(0.999, gt=0, lt=1)  # decay of the second moment, per step
    lr_warmup_steps: int = constrained(100, ge=0)  # steps over which the learning rate rises linearly
    max_grad_norm: float = constrained(1.0, gt=0)  # gradients are clipped to this norm
    # Consecutive steps with a non-finite gradient, all of them skipped, before the run rolls back to its last
    # checkpoint with another example order; the second time the run stops.
    max_skipped_in_a_row: int = constrained(20, ge=1)
    # Epochs without improvement of best_metric before ReduceLROnPlateau (lr_schedule "plateau") multiplies the learning
    # rate by plateau_factor.
    plateau_patience: int = constrained(10, ge=1)
    plateau_factor: float = constrained(0.5, gt=0, lt=1)  # factor of the learning rate on a plateau
    # Validation metric that decides which model is the best, and when the plateau and early stopping act: the weighted sum
    # of the reconstruction terms, which beta does not affect, or LPIPS with output.eval_lpips_trunk.
    best_metric: str = constrained("reconstruction_loss", choices=("reconstruction_loss", "lpips"))
    plateau_threshold: float = constrained(1e-4, ge=0)  # relative improvement that counts, also for the best model
    min_learning_rate: float = constrained(1e-7, ge=0)  # lower limit of the learning rate, after the warm-up
    early_stopping_patience: int = constrained(20, ge=0)  # epochs without improvement before the run stops; 0: never
    ema_decay: float = constrained(0.9999, ge=0, lt=1)  # of the EMA weights, which are validated and exported; 0: off
    ema_power: float = constrained(0.75, gt=0, le=1)  # warm-up: decay is 1 - (1 + step)^-power until ema_decay
    # "auto": bf16 where the hardware supports it, else fp16 on CUDA, else float32 ("no").
    mixed_precision: str = constrained("auto", choices=("auto", "no", "bf16", "fp16"))
    channels_last: bool = True  # channels-last memory format of the model and its images
    compile: bool = False  # torch.compile the forward and backward pass of the training step
    allow_tf32: bool = True  # CUDA: float32 convolutions of the training step in TF32, as PyTorch does by default
    # CUDA: deterministic kernels where there are any (not for reflection padding in the st_* networks), else the fastest.
    deterministic: bool = False
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    # Resolution in pixels -> epochs: the first epochs train on downsampled images and the rest at sample_size, such as
    # {"128": 100}. Spatial layout only; a quarter of the pixels costs a quarter of the FLOPs.
    resolution_schedule: dict = field(default_factory=dict)
    augment: bool = False  # small random translations, rotations and scalings; for small data sets
    pca_init_images: int = constrained(8192, ge=2)  # training images for the PCA initialization before step 0
    pca_init_augmented_copies: int = constrained(0, ge=0)  # randomly transformed copies of each, also used for it
    # Squared error that the posterior's noise adds at the start, as a fraction of that of the PCA reconstruction.
    pca_noise_fraction: float = constrained(0.05, gt=0, le=1)
    pca_lr_scale: float = constrained(0.0, ge=0)  # learning rate of the PCA branch over learning_rate; 0: it is frozen
    # Start from the weights of a trained model of the same architecture: the folder of an exported model, a run or a
    # checkpoint, or a Hub id (`--init-from`). null: random weights and a PCA initialization.
    init_from: str | None = None
    pca_refit: bool = False  # with init_from: repeat the PCA initialization on these images; false: keep the PCA branch
    train_only: str = constrained("all", choices=("all", "encoder", "decoder"))  # the other half of the model is frozen
    kl_control_enabled: bool = True  # false: beta is kl_beta_init after the warm-up
    max_images_per_epoch: int | None = constrained(None, ge=1)  # shorter epochs; null: all training images
    max_train_minutes: float | None = constrained(
        None, gt=0
    )  # end the run after this training time, over all resumes; null: never
    seed: int = constrained(0, ge=0, le=2**64 - 1)  # of initial weights, example order, flips, crops, posterior noise

    def _check_together(self) -> None:
        KLSchedule._check_together(self)
        for resolution, epochs in self.resolution_schedule.items():
            valid = str(resolution).isdecimal() and int(resolution) >= 32 and type(epochs) is int and epochs >= 1
            wanted = 'an object {"pixels": epochs} of at least 32 pixels and 1 epoch'
            self._require(valid, "resolution_schedule", wanted)
        valid = sum(self.resolution_schedule.values()) < self.num_epochs
        self._require(valid, "resolution_schedule", f"shorter than num_epochs = {self.num_epochs}")
        if self.pca_refit:
            valid = self.init_from is not None and self.train_only == "all"
            self._require(valid, "pca_refit", 'false without init_from, or where train_only is not "all"')
        if self.max_images_per_epoch is not None:
            valid = self.max_images_per_epoch >= self.batch_size
            self._require(valid, "max_images_per_epoch", f"at least batch_size = {self.batch_size}")

    def resolution(self, epoch: int) -> int | None:
        """Resolution of the training images in an epoch, counted from 0, in pixels; None for the model's own."""
        for resolution, epochs in self.resolution_schedule.items():
            if epoch < epochs:
                return int(resolution)
            epoch -= epochs
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig(_Section):
    """Section `output`: what a run writes, and where."""

    section = "output"

    run_name: str = "ultra_high_quality"  # a run writes into <runs_dir>/<run_name>_YYYYMMDD_HHMMSS/
    runs_dir: str = "runs"  # folder of all runs
    model_dir: str = "model_weights"  # the trained model is exported to <model_dir>/vae_<run_name>/
    log_every_steps: int = constrained(
        50, ge=1
    )  # optimizer steps between lines of metrics.jsonl and points of the trackers; the first step has its own
    # Trackers of experiments: "tensorboard", "trackio" and "wandb" (a package each, see the extras). Trackio and Weights &
    # Biases show the runs of one run_name as a project, and stay on this machine unless the environment says otherwise.
    trackers: list = field(default_factory=lambda: ["tensorboard"])
    checkpoint_every_epochs: int = constrained(1, ge=1)  # a new best model is always saved
    checkpoint_every_images: int | None = constrained(None, ge=1)  # also after this many training images; null: off
    checkpoint_every_minutes: float | None = constrained(30.0, gt=0)  # also after this many minutes; null: off
    keep_checkpoints: int = constrained(2, ge=2)  # newest checkpoints to keep, besides the best one
    sample_every_epochs: int = constrained(10, ge=1)  # epochs between grids of samples and reconstructions
    num_samples: int = constrained(16, ge=1)  # images in a grid of samples
    eval_lpips_trunk: str = constrained("alexnet", choices=TRUNKS)  # LPIPS of validation; weights as for loss.trunk

    def _check_together(self) -> None:
        for name in ("runs_dir", "model_dir"):
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        valid = all(name in TRACKERS for name in self.trackers) and len(set(self.trackers)) == len(self.trackers)
        self._require(valid, "trackers", f"a list without repetition of {_either([json.dumps(n) for n in TRACKERS])}")
        valid = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.run_name) is not None
        self._require(valid, "run_name", "letters, digits, '_', '-' and '.', starting with a letter or digit")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig(_Section):
    """Section `hub`: publishing the trained model. Log in with `hf auth login` or the environment variable HF_TOKEN."""

    section = "hub"

    push: bool = False  # upload <model_dir>/vae_<run_name>/ when training ends
    repo_id: str | None = None  # "organization/name"
    private: bool = True  # visibility of a repository that this creates
    push_every_epochs: int | None = constrained(None, ge=1)  # also upload the best model so far; null: only at the end
    # "organization/name": upload the newest and the best checkpoint to this private repository as they are written,
    # for `--resume hub://organization/name` on another machine. null: checkpoints stay on this machine.
    push_checkpoints: str | None = None

    def _check_together(self) -> None:
        if self.push_checkpoints is not None:
            valid = re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_checkpoints) is not None
            self._require(valid, "push_checkpoints", '"organization/name" or null')
        if self.push:
            valid = self.repo_id is not None and self.repo_id.count("/") == 1
            self._require(valid, "repo_id", '"organization/name" where hub.push is true')


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The configuration of a run."""

    model: dict = field(default_factory=dict)  # arguments of AutoencoderKLUltra
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training_presets: TrainingPresets = field(default_factory=TrainingPresets)
    output: OutputConfig = field(default_factory=OutputConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        for key, value in self.model.items():
            _require(_is_finite(value), f"model.{key}", "finite", value)
        if self.loss.adversarial_weight > 0:
            presets = self.training_presets
            _require(not presets.compile, "training_presets.compile", "false with loss.adversarial_weight", True)
            valid, only = presets.train_only != "encoder", presets.train_only
            _require(valid, "training_presets.train_only", '"decoder" or "all" with loss.adversarial_weight', only)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as in the JSON file."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, as for `--set`."""
        sections = self.to_dict().items()
        return {f"{section}.{key}": value for section, values in sections for key, value in values.items()}


# ---------------------------------------------------------------------- reading


def unknown_key(key: str, known: Sequence[str]) -> ValueError:
    """The error for a key that does not exist: names its new name, the nearest valid key or all of them."""
    # Only the last parts are compared: a common section would make any two of its keys look alike.
    name, names = key.rpartition(".")[2], {valid.rpartition(".")[2]: valid for valid in known}
    nearest = difflib.get_close_matches(name, names, n=1)
    if name in RENAMED:
        hint = f"it was renamed to {RENAMED[name]}."
    elif nearest:
        hint = f"did you mean {names[nearest[0]]}?"
    else:
        hint = f"valid keys are {', '.join(sorted(known))}."
    return ValueError(f"unknown configuration key {key}: {hint}")


def config_from_dict(values: dict[str, Any]) -> Config:
    """Build and check a configuration.

    Args:
        values: Section -> key -> value, as in the JSON file.

    Raises:
        ValueError: Unknown key, wrong type, a value out of range, or a value that looks like an access token.
    """
    classes = typing.get_type_hints(Config)
    sections = {}
    for name, keys in values.items():
        if name not in classes:
            raise unknown_key(name, list(classes))
        _require(isinstance(keys, dict), f"section {name}", "an object of keys and values", keys)
        if name == "model":
            sections[name] = keys
            continue
        known = [item.name for item in dataclasses.fields(classes[name])]
        for key in keys:
            if key not in known:
                raise unknown_key(f"{name}.{key}", [f"{name}.{each}" for each in known])
        sections[name] = classes[name](**keys)
    config = Config(**sections)
    for key, value in config.flat().items():
        if re.search(TOKEN, json.dumps(value, default=str)):
            raise ValueError(
                f"{key} holds what looks like an access token, and a configuration is logged and published: remove it, "
                "and use `hf auth login` or the environment variable HF_TOKEN."
            )
    return config


class _DuplicateKeyError(ValueError):
    pass


def _parse_json(text: str) -> Any:
    """`json.loads`, but a key that an object has twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = {}
        for key, value in pairs:
            if key in values:
                raise _DuplicateKeyError(f"the key {key} is given twice in one object: keep one of them.")
            values[key] = value
        return values

    return json.loads(text, object_pairs_hook=unique)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON file and apply overrides.

    Args:
        path: The file; a pipe such as /dev/stdin works, too.
        overrides: `section.key=value`, or `section={...}` for a whole section. Values are JSON; anything else is a
            string, so that `output.run_name=test` works.

    Raises:
        ValueError: The file does not exist or is not a JSON object, an override is malformed, or the result is invalid.
    """
    path = Path(path)
    try:
        values = _parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        existing = ", ".join(sorted(map(str, Path("configs").glob("*.json")))) or "none in configs/"
        raise ValueError(f"cannot read configuration file {path} ({error.strerror}): use one of {existing}.") from None
    except _DuplicateKeyError as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    _require(isinstance(values, dict), f"configuration file {path}", "an object of sections", values)
    for override in overrides:
        _apply(override, values)
    return config_from_dict(values)


def _apply(override: str, values: dict[str, Any]) -> None:
    """Write the value of a `--set` into nested values."""
    key, separator, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not separator or (dot and not name):
        raise ValueError(f"--set {override}: write section.key=value, such as training_presets.batch_size=32.")
    try:
        value = _parse_json(text)
    except _DuplicateKeyError as error:
        raise ValueError(f"--set {override}: {error}") from None
    except (ValueError, RecursionError):
        value = text
    if section not in typing.get_type_hints(Config):
        raise unknown_key(key, list(Config().flat()))
    if not dot:
        values[section] = value
    elif isinstance(values.setdefault(section, {}), dict):  # anything else is refused later
        values[section][name] = value
