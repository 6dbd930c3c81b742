"""Builds the objects of a run from a configuration, in phases, and raises `ValueError` for user errors.

The phases, in order: processes, run folder, model, feature networks, data, checks, log, initial weights, training
objects, checkpoint. No file is written before the checks have passed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.budget.estimate import describe_estimate, estimate_micro_batch
from training.builders import build_model, build_optimizer, freeze_parameters, micro_batch_size
from training.checkpoint.format import check_shapes
from training.checkpoint.manager import CheckpointManager
from training.checkpoint.resume import check_resume, check_unfinished
from training.checkpoint.run_dir import RunFolder
from training.checkpoint.state import TrainingState
from training.config import Config
from training.data.stream import TrainStream, first_training_images, load_validation
from training.distributed import (
    AUTOCAST_DTYPES,
    build_accelerator,
    cpu_computes_bf16,
    float32_without_tf32,
    join_processes,
    main_process_first,
    on_main_process,
    resolve_precision,
    set_backend_options,
)
from training.ema import EMAWeights
from training.initial_weights import fitted_priors, load_initial_weights
from training.learning_rate import LearningRate
from training.losses.adversarial import AdversarialWeight
from training.losses.kl_control import KLController
from training.losses.objective import ReconstructionLoss
from training.losses.perceptual import PerceptualTrunk
from training.pca_init import CHECKED_IMAGES, check_images, fit_pca_branch
from training.publish import hub
from training.publish.checkpoints import check_repository
from training.publish.export import model_files
from training.publish.run_record import describe_hardware
from training.run_files import DISCRIMINATOR_FILE, saved_config
from training.step import TrainStep
from training.tracking.alerts import Alerts
from training.tracking.progress import Progress
from training.tracking.report import RunReport
from training.tracking.trackers import Tracker, check_trackers, setup_logging

logger = logging.getLogger(__name__)

ROLLBACK_SEED = 1_000_003  # added to the seed at each roll-back, for another example order and other noise; a prime


@dataclass
class Run:
    """A run, ready to train.

    Attributes:
        config: The configuration.
        folder: Locks the run's folder until `folder.release()`.
        run_dir: The run's folder.
        accelerator: Processes, device and precision.
        model: Unwrapped, on the device.
        eval_lpips_trunk: Feature network of the LPIPS that validation reports.
        loss: The reconstruction loss.
        stream: Training images.
        steps_per_epoch: Steps of an epoch, or None if unknown; the same on every process.
        validation_images: uint8, (n, 3, H, W), on the host; this process's part.
        validation_indices: Their indices in the validation set.
        parameters: Trained parameters.
        optimizer: Over them.
        ema: Their EMA weights, or None.
        learning_rate, kl: Schedule of the learning rate, and controller of beta.
        adversarial_weight: Weight of the adversarial term, or None.
        train_step: One optimizer step.
        progress: Counters and metrics of the run.
        tracker, report: Logs, metrics, images and status.
        checkpoints: Writes and restores checkpoints.
    """

    config: Config
    folder: RunFolder
    run_dir: Path
    accelerator: Accelerator
    model: AutoencoderKLUltra
    eval_lpips_trunk: PerceptualTrunk
    loss: ReconstructionLoss
    stream: TrainStream
    steps_per_epoch: int | None
    validation_images: Tensor
    validation_indices: list[int]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMAWeights | None
    learning_rate: LearningRate
    kl: KLController
    adversarial_weight: AdversarialWeight | None
    train_step: TrainStep
    progress: Progress
    tracker: Tracker
    report: RunReport
    checkpoints: CheckpointManager

    @property
    def max_batches(self) -> int | None:
        """Most global batches in an epoch, or None."""
        return _max_batches(self.config)

    def load(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Restores a checkpoint; see `CheckpointManager.restore`."""
        self.checkpoints.restore(checkpoint, saved)
        self.apply_progress(saved)
        best, before = self.progress.best, saved["config"]["training_presets"]
        metric = self.config.training_presets.best_metric
        same_kind = before.get("best_metric", "reconstruction_loss") == metric
        if metric == "reconstruction_loss":  # the weights of its terms, their networks and crops
            same_kind &= _loss_terms(saved_config(saved["config"])) == _loss_terms(self.config)
        if not same_kind or (best is not None and self.checkpoints.best_metric not in best):
            # Accepted by --allow-changed: values of two metrics cannot be compared.
            self.progress.best, self.progress.early_stopping_bad_epochs = None, 0
            self.learning_rate.restart_plateau()

    def apply_progress(self, saved: dict[str, Any]) -> None:
        """Applies a restored progress to beta, the learning rate, the model's configuration, the step and the stream."""
        presets, before = self.config.training_presets, saved["config"]["training_presets"]
        changed = any(before.get(name) != getattr(presets, name) for name in ("max_images_per_epoch", "batch_size"))
        if changed or "steps_per_epoch" not in saved["progress"]:
            self.progress.steps_per_epoch = self.steps_per_epoch
        self.progress.batch = self.progress.batch * before.get("batch_size", presets.batch_size) // presets.batch_size
        # A new kl_beta_init applies at once; without control, beta is always kl_beta_init.
        if not presets.kl_control_enabled or before.get("kl_beta_init", presets.kl_beta_init) != presets.kl_beta_init:
            self.kl.restart()
            self.progress.log_beta = self.kl.log_beta
        if presets.lr_schedule == "plateau" and before.get("lr_schedule", "plateau") != "plateau":
            self.learning_rate.restart()  # because a plateau never raises the rate that another schedule has lowered
        if self.progress.latents is not None:
            self.model.register_to_config(**self.progress.latents)
        if presets.micro_batch_size == "auto":  # rounding depends on the micro-batch size
            self.train_step.micro_batch = min(saved["micro_batch"], self.train_step.micro_batch)
        self.reseed()

    def reseed(self) -> None:
        """Gives the step and the stream the seed of the current number of roll-backs."""
        seed = self.config.training_presets.seed + ROLLBACK_SEED * self.progress.rollbacks
        self.train_step.seed = seed
        self.stream.reseed(seed)


def build_run(config: Config, resume: str | None = None, allow_changed: Sequence[str] = ()) -> Run:
    """Builds a run.

    Args:
        config: The configuration.
        resume: None, "auto" or a path (see `find_run`).
        allow_changed: Keys that a resume may find changed (see `check_resume`).

    Raises:
        FinishedRun: The run that `resume` names has nothing left to do.
        ValueError: The configuration does not fit the model, the data, the checkpoint or the machine.
    """
    folder = RunFolder(config)
    try:
        return _build(config, folder, resume, allow_changed)
    except BaseException:
        folder.release()
        raise


def _build(config: Config, folder: RunFolder, resume: str | None, allow_changed: Sequence[str]) -> Run:
    presets = config.training_presets
    processes = join_processes()
    check_trackers(config.output.trackers)
    precision, precision_source = resolve_precision(presets.mixed_precision, processes.device)
    if config.loss.adversarial_weight > 0 and precision == "fp16":
        raise ValueError(
            f"training_presets.mixed_precision is fp16 (from {precision_source}), and the gradients of the adversarial term "
            "are too small for it: use bf16 or no, or loss.adversarial_weight=0."
        )
    opened = on_main_process(processes, lambda: folder.open(resume))
    checkpoint, saved, notes = opened["checkpoint"], opened["state"], opened["notes"]
    accelerator = _build_accelerator(config, processes, precision)
    set_backend_options(presets.allow_tf32, presets.deterministic)
    setup_logging(accelerator, None)

    model = build_model(config)
    if saved is not None:
        notes += check_resume(config, accelerator.num_processes, saved, allow_changed)
        on_main_process(accelerator, lambda: check_shapes(checkpoint, model))
        on_main_process(accelerator, lambda: check_unfinished(config, opened["run_dir"], saved))
    origin, priors = {}, []
    if checkpoint is None and presets.init_from is not None:
        origin = on_main_process(accelerator, lambda: load_initial_weights(model, presets.init_from))
        notes.append(f"weights   from {presets.init_from}")
        if presets.train_only == "decoder" and presets.pca_lr_scale == 0:  # latents and PCA images stay as they are
            priors = on_main_process(accelerator, lambda: fitted_priors(presets.init_from, model.config.latent_dim))
            notes.append(f"priors    kept: {', '.join(path.name for path in priors) or 'none were found'}")
    if config.hub.push_every_epochs is not None and not config.hub.push:
        raise ValueError(
            f"hub.push_every_epochs is {config.hub.push_every_epochs}, but hub.push is false: set it to true, or "
            "hub.push_every_epochs to null."
        )
    if config.hub.push:
        on_main_process(accelerator, lambda: hub.check_access(config.hub))
    if config.hub.push_checkpoints is not None:
        on_main_process(accelerator, lambda: check_repository(config.hub.push_checkpoints))
    loss, eval_lpips_trunk = _load_networks(config, model, accelerator)
    stream, validation_images, validation_indices = _open_data(config, model, accelerator)
    if saved is not None and "data" not in allow_changed:
        stream.check_resume(saved["data"])

    # All checks have passed; from here on files are written.
    run_dir, claimed = on_main_process(accelerator, lambda: folder.claim(checkpoint, origin, priors))
    setup_logging(accelerator, run_dir / "training.log")
    # The main process's, because machines may know the number of examples from caches that are complete or not.
    steps_per_epoch = on_main_process(accelerator, lambda: _steps_per_epoch(config, stream))
    num_validation = accelerator.reduce(torch.tensor(len(validation_images), device=accelerator.device)).item()
    notes.append(f"held out  {num_validation} images for validation")
    _log_start(config, accelerator, stream, run_dir, precision, precision_source, [*notes, *claimed])

    is_new = checkpoint is None
    _initialize_model(config, model, accelerator, is_new)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.training_presets, model, parameters, accelerator.device)
    # The main process's weights reach the other processes here, before the EMA weights are copied from them.
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    ema = _build_ema(config, parameters, accelerator)
    train_step = TrainStep(
        accelerator,
        prepared_model,
        prepared_optimizer,
        parameters,
        loss=loss,
        ema=ema,
        seed=presets.seed,
        latent_shape=model.latent_shape,
        micro_batch=micro_batch_size(config, accelerator.num_processes),
        adapt_micro_batch=presets.micro_batch_size == "auto",
        augment=presets.augment,
        compile=presets.compile,
        max_grad_norm=presets.max_grad_norm,
    )
    learning_rate = LearningRate(optimizer, presets)
    kl = KLController(presets, controlled=presets.kl_control_enabled)
    progress, alerts = Progress(), Alerts(presets)
    tracker = Tracker(
        accelerator,
        run_dir,
        config.flat(),
        {
            "num_epochs": presets.num_epochs,
            "model_dir": None,
            "hardware": describe_hardware(accelerator.device, accelerator.num_processes, precision),
        },
        trackers=config.output.trackers,
        project=config.output.run_name,
        resumed_at=None if saved is None else (saved["progress"]["step"], saved["progress"]["epoch"]),
    )
    report = RunReport(
        config,
        tracker,
        alerts,
        progress,
        learning_rate,
        kl,
        latent_dim=model.config.latent_dim,
        sample_size=model.config.sample_size,
        steps_per_epoch=steps_per_epoch,
    )
    components = {"progress": progress, "learning_rate": learning_rate, "kl": kl, "alerts": alerts}
    adversarial_weight, other_tensors = None, {}
    if loss.adversarial is not None:
        adversarial_weight = components["adversarial_weight"] = AdversarialWeight(config.loss)
        other_tensors[DISCRIMINATOR_FILE] = loss.adversarial.tensors
    best_metric = f"lpips_{eval_lpips_trunk.name}" if presets.best_metric == "lpips" else presets.best_metric
    checkpoints = CheckpointManager(
        run_dir,
        config.output,
        TrainingState(accelerator, model, optimizer, ema, components, other_tensors),
        progress,
        best_metric=f"validation/{best_metric}",
        description=lambda: {
            "config": config.to_dict(),
            "processes": accelerator.num_processes,
            "micro_batch": train_step.micro_batch,
            "data": stream.identity,
        },
        model_files=lambda: model_files(model),
        warn=lambda message: report.event(message, "warning"),
        upload_to=config.hub.push_checkpoints,
    )
    run = Run(
        config=config,
        folder=folder,
        run_dir=run_dir,
        accelerator=accelerator,
        model=model,
        eval_lpips_trunk=eval_lpips_trunk,
        loss=loss,
        stream=stream,
        steps_per_epoch=steps_per_epoch,
        validation_images=validation_images,
        validation_indices=validation_indices,
        parameters=parameters,
        optimizer=optimizer,
        ema=ema,
        learning_rate=learning_rate,
        kl=kl,
        adversarial_weight=adversarial_weight,
        train_step=train_step,
        progress=progress,
        tracker=tracker,
        report=report,
        checkpoints=checkpoints,
    )
    try:
        if checkpoint is not None:
            run.load(checkpoint, saved)
            logger.info("resumed from %s: epoch %d, step %d", checkpoint, progress.epoch, progress.step)
        elif presets.micro_batch_size == "auto":
            _find_micro_batch(run)
    except Exception as error:
        report.failed(error)
        raise
    return run


def _loss_terms(config: Config) -> dict[str, Any]:
    """Section `loss` without the place of its networks."""
    return {name: value for name, value in config.to_dict()["loss"].items() if name != "trunk_weights"}


def _max_batches(config: Config) -> int | None:
    limit = config.training_presets.max_images_per_epoch
    return None if limit is None else limit // config.training_presets.batch_size


def _steps_per_epoch(config: Config, stream: TrainStream) -> int | None:
    images, limit = stream.num_examples or config.data.num_train_images, _max_batches(config)
    steps = None if images is None else images // config.training_presets.batch_size
    return steps if limit is None else min(steps or limit, limit)


# ---------------------------------------------------------------------- phases


def _build_accelerator(config: Config, processes: PartialState, precision: str) -> Accelerator:
    presets = config.training_presets
    micro_batch = micro_batch_size(config, processes.num_processes)
    static_graph = presets.micro_batch_size != "auto" and micro_batch * processes.num_processes == presets.batch_size
    return build_accelerator(precision, static_graph)


def _load_networks(
    config: Config, model: AutoencoderKLUltra, accelerator: Accelerator
) -> tuple[ReconstructionLoss, PerceptualTrunk]:
    """Loads the feature networks of the loss, in the dtype of autocast, and of the reported LPIPS, in float32."""
    resolution = model.config.sample_size
    memory_format = torch.channels_last if config.training_presets.channels_last else torch.contiguous_format
    name = config.output.eval_lpips_trunk

    def load() -> tuple[ReconstructionLoss, PerceptualTrunk]:
        eval_lpips_trunk = PerceptualTrunk(name, config.loss.trunk_weights)
        eval_lpips_trunk.to(accelerator.device, memory_format=memory_format)
        dtype = AUTOCAST_DTYPES[accelerator.mixed_precision]
        loss = ReconstructionLoss.from_config(
            config.loss,
            accelerator.device,
            memory_format=memory_format,
            dtype=dtype,
            networks={name: eval_lpips_trunk} if dtype is None else None,
        )
        return loss, eval_lpips_trunk

    loss, eval_lpips_trunk = main_process_first(accelerator, load)  # the other processes find a download in the cache
    loss.check_resolution(resolution)
    eval_lpips_trunk.check_size(resolution, "output.eval_lpips_trunk")
    return loss, eval_lpips_trunk


def _open_data(
    config: Config, model: AutoencoderKLUltra, accelerator: Accelerator
) -> tuple[TrainStream, Tensor, list[int]]:
    """Opens the training images and decodes the validation images."""
    presets, resolution = config.training_presets, model.config.sample_size
    rank, world_size = accelerator.process_index, accelerator.num_processes

    def open_both() -> tuple[TrainStream, tuple[Tensor, list[int]]]:
        stream = TrainStream(
            config.data,
            resolution=resolution,
            seed=presets.seed,
            global_batch=presets.batch_size,
            rank=rank,
            world_size=world_size,
            pin_memory=accelerator.device.type == "cuda",
        )
        return stream, load_validation(config.data, resolution=resolution, rank=rank, world_size=world_size)

    stream, validation = main_process_first(accelerator, open_both)
    if (stream.num_examples or presets.batch_size) < presets.batch_size:
        raise ValueError(
            f"training_presets.batch_size {presets.batch_size} is more than the {stream.num_examples} training images of "
            f"{config.data.dataset}: use a smaller batch or more data."
        )
    return stream, *validation


def _log_start(
    config: Config,
    accelerator: Accelerator,
    stream: TrainStream,
    run_dir: Path,
    precision: str,
    precision_source: str,
    notes: list[str],
) -> None:
    logger.info("run       %s", run_dir)
    logger.info("device    %s, precision %s (from %s)", accelerator.device, precision, precision_source)
    if accelerator.device.type == "cuda":
        presets = config.training_presets
        logger.info(
            "backends  TF32 in float32 convolutions %s, deterministic %s", presets.allow_tf32, presets.deterministic
        )
    if precision == "bf16" and accelerator.device.type == "cpu" and not cpu_computes_bf16():
        logger.warning(
            "this CPU has no bfloat16 instructions: bf16 is emulated and slower than float32 (auto avoids it)"
        )
    presets = config.training_presets
    if presets.lr_schedule in ("cosine", "warmup_stable_decay") and (
        presets.early_stopping_patience or presets.max_train_minutes is not None
    ):
        logger.warning(
            "training_presets.lr_schedule=%s lowers the learning rate towards the end of num_epochs, before which early "
            "stopping or max_train_minutes may end the run: set early_stopping_patience=0 and max_train_minutes=null",
            presets.lr_schedule,
        )
    last = KLController(presets, presets.kl_control_enabled).minimum_beta(presets.num_epochs - 1)
    if last > presets.kl_beta_init:
        slower = (presets.kl_beta_init / presets.kl_beta_floor) ** (1 / max(1, presets.num_epochs - 1))
        logger.warning(
            "the minimum beta grows to %.1e in epoch %d, above kl_beta_init %.1e: KL will leave its target range; set "
            "training_presets.kl_floor_growth to at most %.4f, or a smaller kl_beta_floor",
            last,
            presets.num_epochs,
            presets.kl_beta_init,
            math.floor(1e4 * slower) / 1e4,
        )
    if config.loss.adversarial_weight > 0 and presets.best_metric != "lpips":
        logger.warning(
            "training_presets.best_metric=%s rises when the adversarial term adds texture, so that the best model is the one "
            "before: set training_presets.best_metric=lpips",
            presets.best_metric,
        )
    images = stream.num_examples or config.data.num_train_images
    for line in (*describe_estimate(config, accelerator.num_processes, images).splitlines(), *notes):
        logger.info(line)


def _initialize_model(config: Config, model: AutoencoderKLUltra, accelerator: Accelerator, is_new: bool) -> None:
    """Initializes the PCA branch, moves the model to the device and sets its memory format."""
    presets = config.training_presets
    freeze_parameters(model, presets)
    if is_new and model.pca_branch is not None and (presets.init_from is None or presets.pca_refit):
        # `prepare` sends the weights to the other processes; an error must reach them here.
        on_main_process(accelerator, lambda: _fit_pca_branch(config, model, accelerator.device))
    elif is_new and model.pca_branch is not None:
        on_main_process(accelerator, lambda: _check_pca_branch(config, model))
    if presets.compile:
        model.to_json_string()  # it adds entries to the configuration; at the first checkpoint they would compile again
    if presets.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if presets.channels_last:
        model.to(memory_format=torch.channels_last)
    model.to(accelerator.device)


@float32_without_tf32()
def _fit_pca_branch(config: Config, model: AutoencoderKLUltra, device: torch.device) -> None:
    """Fits the PCA branch to the first images of the stream."""
    presets, started = config.training_presets, time.monotonic()
    images = first_training_images(config.data, model.config.sample_size, presets.seed, presets.pca_init_images)
    check_images(model, images)
    if device.type == "cuda":  # MPS has no eigenvalue solver
        model.to(device)
    copies = presets.pca_init_augmented_copies
    result = fit_pca_branch(model, images, presets.pca_noise_fraction, copies)
    logger.info(
        "PCA initialization: images %d, augmented copies %d, seconds %.0f, components %d, variance kept %.2f %%, "
        "KL %.2f nats per dimension",
        len(images),
        copies,
        time.monotonic() - started,
        result["components"],
        100 * result["kept_fraction"],
        result["kl_per_dimension"],
    )


def _check_pca_branch(config: Config, model: AutoencoderKLUltra) -> None:
    """Warns if the PCA branch of `init_from` does not describe the training images."""
    presets = config.training_presets
    images = first_training_images(config.data, model.config.sample_size, presets.seed, CHECKED_IMAGES)
    check_images(model, images, fitted_to=presets.init_from)


def _build_ema(config: Config, parameters: list[nn.Parameter], accelerator: Accelerator) -> EMAWeights | None:
    presets = config.training_presets
    if presets.ema_decay == 0:
        return None
    ema = EMAWeights(parameters, decay=presets.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=presets.ema_power)
    ema.to(accelerator.device)
    return ema


def _find_micro_batch(run: Run) -> None:
    """Sets the largest micro-batch that fits: on CUDA from the memory estimate, then by trial."""
    presets, accelerator = run.config.training_presets, run.accelerator
    run.checkpoints.state.create_optimizer_state()
    if accelerator.device.type == "cuda":  # starts closer than halving the full batch
        # What other programs on the device leave, and what this one has reserved already, for the weights and Adam.
        available = torch.cuda.mem_get_info(accelerator.device)[0] + torch.cuda.memory_reserved(accelerator.device)
        limit = accelerator.gather(torch.tensor([available], device=accelerator.device)).min().item()
        run.train_step.micro_batch = max(1, estimate_micro_batch(run.config, accelerator.num_processes, limit))
    run.train_step.find_micro_batch(presets.batch_size // accelerator.num_processes, run.model.config.sample_size)
    logger.info("micro_batch_size auto: %d images per forward pass", run.train_step.micro_batch)
