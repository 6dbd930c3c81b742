"""The configuration: one file of dataclasses, JSON in and out; the place that documents every key.

Sections of the JSON file: `model` (passed straight to `AutoencoderKLUltra`, whose docstring documents it), `data`,
`loss`, `training_presets`, `output`, `hub`. Keys equal field names. An unknown key or a value of the wrong type is an
error that names the key, the value and the remedy; nothing is repaired silently. Stdlib only, so that reading a
configuration costs no import of torch.

    config = load_config("configs/ultra.json", ["training_presets.batch_size=32"])
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

TOKEN = r"hf_[A-Za-z0-9]{16,}"  # an access token of the Hub, which must be in no configuration and no log
COLLECTIVE_TIMEOUT_S = 3600  # how long processes wait for each other before the run fails


def _require(ok: bool, key: str, value: Any, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{key} is {value!r}: {remedy}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Section `data`: where images come from and what is done to their bytes."""

    # A dataset id on the Hub ("flwrlabs/celeba"), or "parquet" (with data_files), "imagefolder" (with data_dir), or
    # "synthetic_faces", which is drawn on this machine and needs no network.
    dataset: str = "synthetic_faces"
    revision: str | None = None  # commit, tag or branch of a Hub dataset; pin a commit to make runs repeatable
    data_files: dict | None = None  # "parquet": split name -> path, glob, or a list of them
    data_dir: str | None = None  # "imagefolder": folder of images, with a folder for each split if there are splits
    train_split: str = "train"  # split to train on
    # Split for validation; null holds out `holdout_fraction` of the training rows by a hash of their bytes.
    validation_split: str | None = "validation"
    holdout_fraction: float = 0.02  # share of the training rows to validate on where there is no split for it
    image_column: str = "image"  # column of the images: encoded bytes, or what `datasets` calls an image
    crop_px: int | None = None  # side of the centre crop before resizing; null: the largest centred square
    horizontal_flip: bool = True  # mirror each training image with probability 1/2
    shuffle_buffer: int = 2048  # rows in the streaming shuffle buffer (encoded bytes, about 10 kB each)
    num_train_images: int | None = None  # for plans and time left where the source does not say how many it has
    max_validation_images: int = 2048  # the first so many rows of the validation split, decoded once and kept
    max_corrupt_fraction: float = 0.01  # share of undecodable images above which the run stops
    decode_threads: int = 0  # 0: one for each CPU core, at most 16
    prefetch_batches: int = 4  # decoded batches kept ready
    synthetic_train_images: int = 4096  # "synthetic_faces": how many are drawn to train on
    synthetic_validation_images: int = 256  # the same to validate on
    # "on": rows are kept on disk, encoded, as they arrive, and from the second epoch on read from there in an order
    # that shuffles all of them; "only": the same from rows that an earlier run has kept, without a network; "off":
    # every process reads the source in every epoch, through the shuffle buffer. Folders of images are never copied.
    cache: str = "on"
    cache_dir: str | None = None  # folder of these rows and of `datasets`' own files; null: HF_HOME/datasets
    # Seconds without a new row, retries included, before the run gives up. Below COLLECTIVE_TIMEOUT_S by 10 minutes,
    # because the processes that have their rows wait in a collective for the one that has not.
    timeout_s: float = 1200.0

    def __post_init__(self) -> None:
        _require(
            bool(self.dataset), "data.dataset", self.dataset, "give a Hub id, parquet, imagefolder or synthetic_faces"
        )
        if self.dataset == "parquet":
            _require(
                bool(self.data_files),
                "data.data_files",
                self.data_files,
                'give {"train": "path/train-*.parquet", "validation": ...}',
            )
        if self.dataset == "imagefolder":
            _require(bool(self.data_dir), "data.data_dir", self.data_dir, "give the folder that holds the images")
        _require(0 < self.holdout_fraction < 0.5, "data.holdout_fraction", self.holdout_fraction, "use 0.001 to 0.5")
        if self.crop_px is not None:
            _require(self.crop_px >= 16, "data.crop_px", self.crop_px, "use at least 16 pixels, or null")
        _require(self.shuffle_buffer >= 1, "data.shuffle_buffer", self.shuffle_buffer, "use at least 1 row")
        _require(
            self.max_validation_images >= 1, "data.max_validation_images", self.max_validation_images, "use at least 1"
        )
        _require(
            0 <= self.max_corrupt_fraction <= 1, "data.max_corrupt_fraction", self.max_corrupt_fraction, "use 0 to 1"
        )
        _require(self.cache in ("on", "off", "only"), "data.cache", self.cache, "use on, off or only")
        limit = COLLECTIVE_TIMEOUT_S - 600
        _require(0 < self.timeout_s <= limit, "data.timeout_s", self.timeout_s, f"use more than 0 to {limit} seconds")
        _require(self.decode_threads >= 0, "data.decode_threads", self.decode_threads, "use 0 (automatic) or more")
        _require(self.prefetch_batches >= 1, "data.prefetch_batches", self.prefetch_batches, "use at least 1")
        _require(
            self.synthetic_train_images >= 1,
            "data.synthetic_train_images",
            self.synthetic_train_images,
            "use at least 1",
        )
        _require(
            self.synthetic_validation_images >= 1,
            "data.synthetic_validation_images",
            self.synthetic_validation_images,
            "use at least 1",
        )


TRUNKS = ("vgg16", "alexnet", "squeezenet", "st_alexnet", "st_vgg16")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Section `loss`: weights of the reconstruction terms on images in [-1, 1], and the perceptual trunk."""

    mse_weight: float = 0.4  # mean squared error
    l1_weight: float = 0.2  # mean absolute error
    perceptual_weight: float = 0.2  # L1 distance of the trunk's unit-length features
    lpips_weight: float = 0.2  # LPIPS (Zhang et al. 2018); one frozen trunk serves both perceptual terms
    # vgg16, alexnet, squeezenet (ImageNet weights: see trunk_weights), st_alexnet, st_vgg16 (come with pip).
    trunk: str = "vgg16"
    # A second network for LPIPS: the term is the mean of both networks' figures, so that what one of them overlooks the
    # other sees. AlexNet reads a pixel for 1/24 of VGG16's arithmetic. null: trunk alone.
    lpips_trunk: str | None = None
    # Folder with <trunk>_features.safetensors; null: torch's hub cache, else torchvision's download.
    trunk_weights: str | None = None
    # The trunk sees a random window of this side of each image (the same of both); null: the whole image.
    perceptual_crop_px: int | None = None
    lpips_crop_px: int | None = None  # the same for lpips_trunk, which has windows of its own

    def __post_init__(self) -> None:
        for name in ("mse_weight", "l1_weight", "perceptual_weight", "lpips_weight"):
            _require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "use 0 or more")
        total = self.mse_weight + self.l1_weight + self.perceptual_weight + self.lpips_weight
        _require(total > 0, "the sum of the loss weights", total, "give at least one term a weight above 0")
        _require(self.trunk in TRUNKS, "loss.trunk", self.trunk, f"use one of {', '.join(TRUNKS)}")
        allowed = (None, *TRUNKS)
        _require(self.lpips_trunk in allowed, "loss.lpips_trunk", self.lpips_trunk, f"use null or one of {TRUNKS}")
        for key in ("perceptual_crop_px", "lpips_crop_px"):
            side = getattr(self, key)
            remedy = "use at least 32 pixels (the trunks need them), or null"
            _require(side is None or side >= 32, f"loss.{key}", side, remedy)
        _require(
            self.lpips_crop_px is None or self.lpips_trunk is not None,
            "loss.lpips_crop_px",
            self.lpips_crop_px,
            "set loss.lpips_trunk too; without it all terms read the windows of loss.perceptual_crop_px",
        )

    @property
    def trunks(self) -> list[tuple[str, int | None]]:
        """Name and crop size (pixels; None: full images) of each feature network that a term with weight reads."""
        if self.perceptual_weight == 0 and self.lpips_weight == 0:
            return []
        named = [(self.trunk, self.perceptual_crop_px), (self.lpips_trunk, self.lpips_crop_px)]
        return [(name, crop_size) for name, crop_size in named if name is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class KLSchedule:
    """The settings of the KL control; each field is the key of that name in the section `training_presets`.

    Raises:
        ValueError: A value has the wrong type or lies outside its range.
    """

    kl_target_low: float = 0.01  # band of the smoothed KL share, fraction of the total loss
    kl_target_high: float = 0.03  # upper end of the band
    kl_beta_init: float = 1e-4  # controlled beta at the start, and the constant beta where control is off
    kl_beta_min: float = 1e-6  # range of beta
    kl_beta_max: float = 1.0  # upper end of the range of beta
    kl_half_life_images: int = 2048  # half-life of the average, images
    kl_gain: float = 0.5  # per half-life; of the error, 1 - exp(-0.5) = 39 % is corrected in one half-life
    kl_max_step: float = 0.7  # bound of |change of log beta| per half-life; 0.7 = log 2: it doubles or halves
    # Images over which beta rises linearly; log beta is still meanwhile, the average is fed. One half-life:
    # a run of 5,000 images has control for more than half of its length.
    kl_warmup_images: int = 2048
    # Below this smoothed KL, nats per number, beta goes down whatever the share; 0: off. A number whose
    # posterior mean has variance 0.01, the least that counts as active (Burda et al. 2016), costs 0.005 nats.
    kl_collapse_nats: float = 0.01
    kl_cycle_enabled: bool = True  # cool-downs at the beginning of each cycle of epochs; false: none
    kl_cycle_period: int = 8  # epochs
    kl_cooldown_epochs: int = 2  # the first epochs of each cycle
    kl_cooldown_reduction: float = 0.25  # beta and its band are multiplied by this in a cool-down
    kl_beta_floor: float = 5e-5  # beta is never below kl_beta_floor * kl_floor_growth**epoch
    kl_floor_growth: float = 1.02  # per epoch

    def __post_init__(self) -> None:
        kinds = {"bool": (bool,), "int": (int,), "float": (int, float)}
        for item in fields(KLSchedule):
            value = getattr(self, item.name)
            typed = isinstance(value, kinds[item.type]) and isinstance(value, bool) == (item.type == "bool")
            if not typed or not math.isfinite(value):
                self._refuse(item.name, f"a finite value of type {item.type}")
        low, high = self.kl_beta_min, self.kl_beta_max
        collapse, cooldown, period = self.kl_collapse_nats, self.kl_cooldown_epochs, self.kl_cycle_period
        cycle = f"0 or more but less than kl_cycle_period = {period}, or set kl_cycle_enabled to false"
        above_low = f"a share above kl_target_low = {self.kl_target_low} and below 1"
        for key, ok, remedy in (
            ("kl_target_low", 0 < self.kl_target_low < 1, "a share above 0 and below 1, such as 0.01"),
            ("kl_target_high", self.kl_target_low < self.kl_target_high < 1, above_low),
            ("kl_beta_min", low > 0, "a number above 0, such as 1e-6"),
            ("kl_beta_max", low < high, f"a number above kl_beta_min = {low}"),
            ("kl_beta_init", low <= self.kl_beta_init <= high, f"a number from {low} to {high}"),
            ("kl_half_life_images", self.kl_half_life_images >= 1, "at least 1 image, such as 2048"),
            ("kl_gain", 0 < self.kl_gain <= 2, "a number above 0 and at most 2, such as 0.5"),
            ("kl_max_step", 0 < self.kl_max_step <= 3, "a number above 0 and at most 3, such as 0.7"),
            ("kl_warmup_images", self.kl_warmup_images >= 0, "0 (no warm-up) or a number of images"),
            ("kl_collapse_nats", collapse == 0 or collapse >= 0.001, "0 (off) or at least 0.001 nats"),
            ("kl_cycle_period", period >= 1, "at least 1 epoch, such as 8"),
            ("kl_cooldown_epochs", 0 <= cooldown < period or not self.kl_cycle_enabled, cycle),
            ("kl_cooldown_reduction", 0 < self.kl_cooldown_reduction <= 1, "a factor above 0 and at most 1"),
            ("kl_beta_floor", 0 <= self.kl_beta_floor <= high, f"0 (no floor) to kl_beta_max = {high}"),
            ("kl_floor_growth", self.kl_floor_growth >= 1, "a factor of at least 1, such as 1.02"),
        ):
            if not ok:
                self._refuse(key, remedy)

    def _refuse(self, key: str, remedy: str) -> None:
        raise ValueError(f"training_presets.{key} is {getattr(self, key)!r}: give {remedy}")

    @classmethod
    def from_presets(cls, presets: Mapping[str, Any]) -> KLSchedule:
        """Builds the schedule from the section `training_presets`; keys of other owners are left alone."""
        return cls(**{item.name: presets[item.name] for item in fields(cls) if item.name in presets})

    def in_cooldown(self, epoch: int) -> bool:
        """Whether the epoch (from 0) is one of the first `kl_cooldown_epochs` of its cycle."""
        return self.kl_cycle_enabled and epoch % self.kl_cycle_period < self.kl_cooldown_epochs

    def cycle_factor(self, epoch: int) -> float:
        """What the cycle multiplies beta and the band by: the reduction in a cool-down, else 1."""
        return self.kl_cooldown_reduction if self.in_cooldown(epoch) else 1.0

    def floor(self, epoch: int) -> float:
        """The least beta of an epoch: `kl_beta_floor * kl_floor_growth**epoch`, at most `kl_beta_max`."""
        if self.kl_beta_floor == 0:
            return 0.0
        # Compared as logarithms, because the power overflows in a very long run.
        if epoch * math.log(self.kl_floor_growth) >= math.log(self.kl_beta_max / self.kl_beta_floor):
            return self.kl_beta_max
        return self.kl_beta_floor * self.kl_floor_growth**epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPresets(KLSchedule):
    """Section `training_presets`: the optimization; the kl_* keys are those of `KLSchedule`."""

    num_epochs: int = 200  # passes over the training images, or over max_images_per_epoch of them
    batch_size: int = 64  # images in one optimizer step, over all processes and accumulation
    # Images in one forward pass of one process; the rest is accumulated, with the same gradients. null: batch_size /
    # processes; "auto": the most that fits, found by trial and halved when memory runs out in mid-run.
    micro_batch_size: int | str | None = None
    learning_rate: float = 5e-5  # after its warm-up and before the first plateau
    optimizer: str = "adam"  # "adam" (weight decay as an L2 term) or "adamw" (decoupled)
    weight_decay: float = 1e-5  # of all trained weights; how it acts depends on optimizer
    adam_beta1: float = 0.9  # decay of the average of gradients, per step
    adam_beta2: float = 0.999  # decay of the average of squared gradients, per step
    lr_warmup_steps: int = 100  # the learning rate rises linearly over so many steps
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # Steps in a row without a finite gradient, none of which changes anything, before the run goes back to its last
    # checkpoint with another order of images; the second time it gives up.
    max_skipped_in_a_row: int = 20
    # Epochs in which the validation reconstruction loss with fixed weights, which beta does not move, does not improve
    # before ReduceLROnPlateau multiplies the learning rate by plateau_factor.
    plateau_patience: int = 10
    plateau_factor: float = 0.5  # what the learning rate is multiplied by on a plateau
    plateau_threshold: float = 1e-4  # relative improvement that counts, here and for the best model
    min_learning_rate: float = 1e-7  # the learning rate is never reduced below this
    early_stopping_patience: int = 20  # epochs without improvement before the run stops; 0: never
    ema_decay: float = 0.9999  # of the averaged weights that are validated and exported; 0: no averaging
    ema_power: float = 0.75  # warm-up of the average: decay = 1 - (1 + step)^-power until ema_decay
    # "auto": bf16 where the hardware computes in it, else fp16 on CUDA, else float32; or "no", "bf16", "fp16".
    mixed_precision: str = "auto"
    channels_last: bool = True  # channels-last memory layout of the model and its images
    compile: bool = False  # torch.compile the model in place
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    # Side in pixels -> epochs: the first epochs on images averaged down to that side, the rest at sample_size, such as
    # {"128": 100}. Spatial layout only; a quarter of the pixels cost a quarter of the arithmetic.
    resolution_schedule: dict = field(default_factory=dict)
    augment: bool = False  # shift, turn and scale each training image a little; for small data sets
    pca_init_images: int = 8192  # training images from which the linear path is fitted before step 0
    pca_init_augmented_copies: int = 0  # shifted, turned and scaled copies of each that it is fitted to as well
    # Posterior noise at the start: its share of the error that the linear path makes anyway.
    pca_noise_fraction: float = 0.05
    pca_lr_scale: float = 0.0  # learning rate of the linear path over the others'; 0: it stays fixed
    kl_control_enabled: bool = True  # False: beta is kl_beta_init after its warm-up
    max_images_per_epoch: int | None = None  # shorter epochs; null: every training image
    max_train_minutes: float | None = None  # stop cleanly after so many minutes of training; null: never
    seed: int = 0  # of the initial weights, the order of images, flips, windows and the posterior's noise

    def __post_init__(self) -> None:
        KLSchedule.__post_init__(self)
        name = "training_presets."
        for key in ("num_epochs", "batch_size", "plateau_patience", "max_skipped_in_a_row"):
            _require(getattr(self, key) >= 1, name + key, getattr(self, key), "use at least 1")
        _require(self.pca_init_images >= 2, name + "pca_init_images", self.pca_init_images, "use at least 2")
        epochs_below = 0
        for side, epochs in self.resolution_schedule.items():
            key = f"{name}resolution_schedule"
            whole = isinstance(side, str) and side.isdecimal() and int(side) >= 32
            _require(whole and type(epochs) is int and epochs >= 1, key, {side: epochs}, 'write {"pixels": epochs}')
            epochs_below += epochs
        _require(
            epochs_below < self.num_epochs,
            name + "resolution_schedule",
            self.resolution_schedule,
            f"leave some of the {self.num_epochs} epochs for the full resolution",
        )
        copies = self.pca_init_augmented_copies
        _require(copies >= 0, name + "pca_init_augmented_copies", copies, "use 0 or more")
        micro = self.micro_batch_size
        allowed = micro in (None, "auto") or (isinstance(micro, int) and micro >= 1)
        _require(allowed, name + "micro_batch_size", micro, 'use at least 1, "auto" or null')
        images = self.max_images_per_epoch
        _require(images is None or images >= 1, name + "max_images_per_epoch", images, "use at least 1, or null")
        for key in ("learning_rate", "max_grad_norm", "adam_beta1", "adam_beta2"):
            _require(getattr(self, key) > 0, name + key, getattr(self, key), "use a number above 0")
        for key in ("weight_decay", "lr_warmup_steps", "early_stopping_patience", "min_learning_rate", "seed"):
            _require(getattr(self, key) >= 0, name + key, getattr(self, key), "use 0 or more")
        for key in ("pca_lr_scale", "plateau_threshold"):
            _require(getattr(self, key) >= 0, name + key, getattr(self, key), "use 0 or more")
        for key in ("adam_beta1", "adam_beta2", "plateau_factor"):
            _require(0 < getattr(self, key) < 1, name + key, getattr(self, key), "use a number between 0 and 1")
        _require(0 <= self.ema_decay < 1, name + "ema_decay", self.ema_decay, "use 0 (off) to less than 1")
        _require(0 < self.ema_power <= 1, name + "ema_power", self.ema_power, "use above 0 to 1")
        _require(
            0 < self.pca_noise_fraction <= 1,
            name + "pca_noise_fraction",
            self.pca_noise_fraction,
            "use above 0 to 1",
        )
        _require(self.optimizer in ("adam", "adamw"), name + "optimizer", self.optimizer, "use adam or adamw")
        _require(
            self.mixed_precision in ("auto", "no", "bf16", "fp16"),
            name + "mixed_precision",
            self.mixed_precision,
            "use auto, no, bf16 or fp16",
        )
        _require(
            self.max_train_minutes is None or self.max_train_minutes > 0,
            name + "max_train_minutes",
            self.max_train_minutes,
            "use a number above 0, or null",
        )
        if self.max_images_per_epoch is not None:
            _require(
                self.max_images_per_epoch >= self.batch_size,
                name + "max_images_per_epoch",
                self.max_images_per_epoch,
                f"use at least batch_size = {self.batch_size}",
            )

    def resolution(self, epoch: int) -> int | None:
        """Side of the images that an epoch, counted from 0, trains on, in pixels; None for the model's."""
        for side, epochs in self.resolution_schedule.items():
            if epoch < epochs:
                return int(side)
            epoch -= epochs
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Section `output`: what a run writes, and where."""

    run_name: str = "ultra_high_quality"  # a run writes into <runs_dir>/<run_name>_YYYYMMDD_HHMMSS/
    runs_dir: str = "runs"  # folder of all runs
    model_dir: str = "model_weights"  # the finished model goes to <model_dir>/vae_<run_name>/
    log_every_steps: int = 50  # optimizer steps between lines of metrics.jsonl and TensorBoard
    checkpoint_every_epochs: int = 1  # a new best model is always saved
    checkpoint_every_images: int | None = None  # also after so many training images; null: not by images
    checkpoint_every_minutes: float | None = 30.0  # also after so many minutes; null: not by time
    keep_checkpoints: int = 2  # newest checkpoints kept, at least 2; the best one is kept besides
    sample_every_epochs: int = 10  # epochs between grids of samples and reconstructions
    num_samples: int = 16  # images in a grid of samples
    # Trunk of the LPIPS that validation reports; its weights are found like loss.trunk's.
    eval_lpips_trunk: str = "alexnet"

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.run_name) is not None,
            "output.run_name",
            self.run_name,
            "use letters, digits, '_', '-' and '.', beginning with a letter or digit (it becomes a folder's name)",
        )
        for key in (
            "log_every_steps",
            "checkpoint_every_epochs",
            "sample_every_epochs",
            "num_samples",
        ):
            _require(getattr(self, key) >= 1, f"output.{key}", getattr(self, key), "use at least 1")
        _require(
            self.keep_checkpoints >= 2,
            "output.keep_checkpoints",
            self.keep_checkpoints,
            "use at least 2, so that one is left where the newest is damaged",
        )
        for key in ("checkpoint_every_images", "checkpoint_every_minutes"):
            value = getattr(self, key)
            _require(value is None or value > 0, f"output.{key}", value, "use a number above 0, or null")
        _require(
            self.eval_lpips_trunk in TRUNKS,
            "output.eval_lpips_trunk",
            self.eval_lpips_trunk,
            f"use one of {', '.join(TRUNKS)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig:
    """Section `hub`: publishing the finished model. Authentication is the Hub's own (`hf auth login`, `HF_TOKEN`)."""

    push: bool = False  # upload <model_dir>/vae_<run_name>/ when training ends
    repo_id: str | None = None  # "organisation/name"
    private: bool = True  # visibility of a repository that has to be created
    # Also upload the best model so far every so many epochs; null: only at the end.
    push_every_epochs: int | None = None

    def __post_init__(self) -> None:
        if self.push:
            _require(
                self.repo_id is not None and self.repo_id.count("/") == 1,
                "hub.repo_id",
                self.repo_id,
                'give "organisation/name", or set hub.push to false',
            )
        every = self.push_every_epochs
        _require(every is None or every >= 1, "hub.push_every_epochs", every, "use at least 1, or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration of a run."""

    model: dict = field(default_factory=dict)  # arguments of AutoencoderKLUltra
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training_presets: TrainingPresets = field(default_factory=TrainingPresets)
    output: OutputConfig = field(default_factory=OutputConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as they stand in the JSON file."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, as `--set` spells them."""
        flat: dict[str, Any] = {}
        for section, values in self.to_dict().items():
            flat.update({f"{section}.{key}": value for key, value in values.items()})
        return flat


def unknown_key(key: str, known: Sequence[str]) -> ValueError:
    """The error for a key that does not exist, with the nearest one that does."""
    # Last parts are compared: a section's name in common would make any two of its keys look alike.
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    nearest = difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1)
    hint = f"did you mean {last[nearest[0]]}?" if nearest else f"known are {', '.join(sorted(known))}."
    return ValueError(f"unknown configuration key {key}: {hint}")


def _typed(key: str, value: Any, annotation: Any) -> Any:
    """Check one JSON value against a field's annotation; whole numbers pass as floats."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option in (int, bool, str, dict) and type(value) is option:
            return value
    names = {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    wanted = " or ".join(names.get(option, "an object") for option in options)
    raise ValueError(f"{key} is {json.dumps(value, default=str)}: give {wanted}.")


def _section(cls: type, name: str, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"section {name} is {json.dumps(values, default=str)}: give an object of keys and values.")
    hints = typing.get_type_hints(cls)
    known = {item.name for item in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise unknown_key(f"{name}.{key}", [f"{name}.{item}" for item in known])
    return cls(**{key: _typed(f"{name}.{key}", value, hints[key]) for key, value in values.items()})


def config_from_dict(values: dict[str, Any]) -> Config:
    """Build and check a configuration.

    Raises:
        ValueError: Unknown key, wrong type, or a value out of range.
    """
    hints = typing.get_type_hints(Config)
    for name in values:
        if name not in hints:
            raise unknown_key(name, list(hints))
    sections = {
        name: _typed(name, values[name], dict) if name == "model" else _section(hints[name], name, values[name])
        for name in values
    }
    config = Config(**sections)
    for key, value in config.flat().items():
        if re.search(TOKEN, json.dumps(value, default=str)):
            raise ValueError(
                f"{key} holds what looks like an access token, and a configuration is logged and published: remove it, "
                "and use `hf auth login` or the environment variable HF_TOKEN."
            )
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON file and apply `section.key=value` overrides.

    Args:
        path: The file.
        overrides: Values are JSON; what is not JSON is taken as a string, so that `output.run_name=test` works.

    Raises:
        ValueError: The file does not exist or is not JSON; an override has no `=`; or the result is invalid.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(sorted(str(other) for other in Path("configs").glob("*.json"))) or "none in configs/"
        raise ValueError(f"there is no configuration file {path}: give one that exists ({near}).")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}: it must be an object of sections.")
    for override in overrides:
        key, separator, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not separator or not dot or not name:
            raise ValueError(f"--set {override}: write section.key=value, such as training_presets.batch_size=32.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if section not in typing.get_type_hints(Config):
            raise unknown_key(key, list(Config().flat()))
        if isinstance(values.setdefault(section, {}), dict):  # what it is otherwise, is refused below
            values[section][name] = value
    return config_from_dict(values)
