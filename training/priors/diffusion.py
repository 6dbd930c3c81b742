"""Trains the diffusion prior on the latents of a trained VAE: a run like that of the VAE, in a run folder of its own.

The posteriors of the training faces and of their horizontal flips are encoded once, on the main process, and kept in
the run's folder (`latents.safetensors`); a step samples from them. All randomness of a step is a function of the seed
and the step, so a resumed run is bitwise identical to an uninterrupted one, and the processes share one batch.

Of the configuration (configs/priors/diffusion.json), the section `model` has the arguments of `DiffusionPrior`; an epoch
is as many samples as there are training faces.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from modeling.latent_prior import DiffusionPrior
from training.budget.devices import local_device
from training.builders import build_optimizer
from training.checkpoint.format import check_shapes
from training.checkpoint.manager import CheckpointManager
from training.checkpoint.resume import check_resume
from training.checkpoint.run_dir import RunFolder
from training.checkpoint.state import TrainingState
from training.cli import check_output
from training.config import Config
from training.distributed import (
    build_accelerator,
    join_processes,
    on_main_process,
    read_later,
    resolve_precision,
    set_backend_options,
)
from training.ema import EMAWeights
from training.learning_rate import LearningRate
from training.priors.latents import latents_fingerprint
from training.publish.export import export_model, model_files
from training.randomness import keyed_generator
from training.run_files import GUIDE_FILE, RUN_FILE, read_json
from training.signals import EXIT_STOPPED, StopSignal
from training.tracking.progress import Progress
from training.tracking.trackers import Tracker, check_trackers, log_failed, setup_logging

logger = logging.getLogger(__name__)

LATENTS_FILE = "latents.safetensors"
_STATISTICS_FACES = 2048  # posterior samples whose images give the standard deviation
_VALIDATION_BATCHES = 8
# Keys without effect here, which are refused.
_KEYS_OF_THE_VAE = (
    "hub.push",
    "hub.push_checkpoints",
    "training_presets.augment",
    "training_presets.best_metric",
    "training_presets.gradient_checkpointing",
    "training_presets.init_from",
    "training_presets.resolution_schedule",
    "training_presets.train_only",
)
_DROP_ALL, _VALIDATION_KEY = 0.1, 1 << 32  # fraction of samples without attributes; third part of validation's seeds


def build_prior(config: Config, vae: AutoencoderKLUltra, attributes: tuple[str, ...]) -> DiffusionPrior:
    """The prior of section `model` for the latents of a VAE, with the seed's initial weights.

    Raises:
        ValueError: The VAE has no suitable PCA branch, or an argument is unknown or impossible.
    """
    device = next(vae.parameters()).device
    image = DiffusionPrior.latents_to_images(vae, torch.zeros(1, *vae.latent_shape, device=device))[0]
    derived = {
        "latent_dim": vae.config.latent_dim,
        "image_channels": len(image),
        "image_size": image.shape[-1],
        "patch_size": max(1, image.shape[-1] // 16),
        "attributes": attributes,
    }
    torch.manual_seed(config.training_presets.seed)
    try:
        return DiffusionPrior(**derived | config.model)
    except TypeError as error:
        raise ValueError(f"section model: {error}: it has the arguments of DiffusionPrior.") from None


def sample_batch(
    latents: dict[str, Tensor], split: str, prior: DiffusionPrior, batch_size: int, key: tuple[int, ...]
) -> dict[str, Tensor]:
    """The global batch of a key (seed, step), on the CPU.

    Args:
        latents: `{split}_mean`, `{split}_std`, (n, latent_dim), and `{split}_attributes`, (n, attributes): 1, 0 or -1.
        split: "train" or "validation".
        prior: For shapes.
        batch_size: N.
        key: Seeds the generator.

    Returns:
        `latents`, samples from posteriors, (N, latent_dim); `noise`, (N, C, H, W); `sigma`, (N,); `attributes`.
    """
    generator = keyed_generator(*key)
    index = torch.randint(len(latents[f"{split}_mean"]), (batch_size,), generator=generator)
    mean, std = latents[f"{split}_mean"][index], latents[f"{split}_std"][index]
    posterior_noise = torch.randn(mean.shape, generator=generator)
    noise = torch.randn(batch_size, *prior.noise_shape, generator=generator)
    # Logit-normal times: the middle of the path is the hardest (Esser et al. 2024, https://arxiv.org/abs/2403.03206).
    sigma = torch.randn(batch_size, generator=generator).sigmoid()
    batch = {"latents": mean + std * posterior_noise, "noise": noise, "sigma": sigma}
    if prior.config.attributes:
        # Some samples have no attributes, for guidance; of the others, any number, because users name only a few.
        values = latents[f"{split}_attributes"][index].float()
        known = torch.rand(values.shape, generator=generator) < torch.rand(batch_size, 1, generator=generator)
        known &= torch.rand(batch_size, 1, generator=generator) >= _DROP_ALL
        batch["attributes"] = values * known
    return batch


class DiffusionTraining:
    """A run that trains a diffusion prior: `DiffusionTraining(vae, encode, config, model_dir).run()`.

    Args:
        vae: In evaluation mode, on the CPU.
        encode: Returns the latents of `sample_batch` for both splits, and `num_faces`, of which some latents may be flipped
            copies; called on the main process of a new run.
        config: The configuration.
        model_dir: Folder of the VAE; the trained prior is copied to `priors/diffusion/` in it.
        attributes: Names of the attributes in the latents.
        resume: None, "auto" or a path (see `find_run`).
        allow_changed: Keys that a resume may find changed (see `check_resume`).
        encoding: What `encode` depends on besides the configuration; a resume compares it.

    Raises:
        ValueError: Anything that the configuration, the files or the machine do not allow, before training starts.
    """

    def __init__(
        self,
        vae: AutoencoderKLUltra,
        encode: Callable[[AutoencoderKLUltra], dict[str, Tensor]],
        config: Config,
        model_dir: Path,
        attributes: tuple[str, ...] = (),
        resume: str | None = None,
        allow_changed: Sequence[str] = (),
        encoding: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.model_dir, presets = config, model_dir, config.training_presets
        processes = join_processes()
        if presets.batch_size % processes.num_processes:
            raise ValueError(
                f"training_presets.batch_size {presets.batch_size} cannot be divided over {processes.num_processes} "
                "processes: use a multiple."
            )
        check_trackers(config.output.trackers)
        if presets.micro_batch_size == "auto":
            raise ValueError(
                'training_presets.micro_batch_size is "auto", which a prior does not have: use a number, or null for one '
                "forward pass."
            )
        values, defaults = config.flat(), Config().flat()
        for key in _KEYS_OF_THE_VAE:
            if values[key] != defaults[key]:
                raise ValueError(
                    f"{key} is {json.dumps(values[key])}, which the training of a prior does not have: leave it out."
                )
        local = presets.batch_size // processes.num_processes
        self.micro_batch = min(presets.micro_batch_size or local, local)
        precision, _ = resolve_precision(presets.mixed_precision, processes.device)
        self.folder = RunFolder(config)
        try:
            self._build(vae, encode, attributes, resume, allow_changed, encoding, processes, precision)
        except BaseException:
            self.folder.release()
            raise

    def _build(self, vae, encode, attributes, resume, allow_changed, encoding, processes, precision) -> None:
        config, presets = self.config, self.config.training_presets
        self.vae_fingerprint = fingerprint = latents_fingerprint(vae)
        prior = build_prior(config, vae, attributes)

        def open_run() -> dict[str, Any]:
            opened = self.folder.open(resume)
            record = read_json(opened["run_dir"] / RUN_FILE)
            return {**opened, "vae": record.get("vae"), "encoding": record.get("encoding")}

        opened = on_main_process(processes, open_run)
        checkpoint, saved, notes = opened["checkpoint"], opened["state"], opened["notes"]
        if saved is not None:
            notes += check_resume(config, processes.num_processes, saved, allow_changed)
            if opened["vae"] not in (None, fingerprint):
                raise ValueError(
                    f"--resume: the run {opened['run_dir']} learns the latents of a VAE with other weights: leave out "
                    "--resume to start a new run, or name the run to resume."
                )
            if opened["encoding"] not in (None, encoding):
                raise ValueError(
                    f"--resume: the latents of {opened['run_dir']} were encoded with {json.dumps(opened['encoding'])}, and not "
                    f"with {json.dumps(encoding)}: give the same --max-images and --no-flip, or start a new run."
                )
            if opened["vae"] is None:
                notes.append("resume: the run has not recorded the weights of its VAE, which are not compared")
            on_main_process(processes, lambda: check_shapes(checkpoint, prior))
        accelerator = self.accelerator = build_accelerator(
            precision, static_graph=self.micro_batch * processes.num_processes == presets.batch_size
        )
        set_backend_options(presets.allow_tf32, presets.deterministic)
        setup_logging(accelerator, None)
        vae.to(accelerator.device).requires_grad_(False)

        def prepare() -> tuple[Path, list[str]]:
            if checkpoint is None:
                check_output(Path(config.output.runs_dir), what="output.runs_dir")
            latents = encode(vae) if checkpoint is None else None
            run_dir, claimed = self.folder.claim(checkpoint, {"vae": fingerprint, "encoding": encoding})
            if latents is not None:
                try:
                    save_file({name: tensor.contiguous() for name, tensor in latents.items()}, run_dir / LATENTS_FILE)
                except SafetensorError as error:
                    raise ValueError(f"{run_dir / LATENTS_FILE} cannot be written ({error}): make room.") from None
            return run_dir, claimed

        run_dir, claimed = self.run_dir, _ = on_main_process(accelerator, prepare)
        setup_logging(accelerator, run_dir / "training.log")
        if not (run_dir / LATENTS_FILE).is_file():
            raise ValueError(
                f"{run_dir / LATENTS_FILE} is missing, which every process reads: with several machines, set output.runs_dir to "
                "a folder on a disk that they share; else restore the file, or start a new run."
            )
        self.latents = load_file(run_dir / LATENTS_FILE)
        if "num_faces" not in self.latents:  # of an older run, whose epochs count flipped images too
            self.latents["num_faces"] = torch.tensor(len(self.latents["train_mean"]))
        for line in (
            f"run       {run_dir}",
            f"device    {accelerator.device}, precision {precision}",
            *notes,
            *claimed,
        ):
            logger.info(line)

        self.vae, self.prior = vae, prior
        prior.to(accelerator.device)
        self._set_statistics()
        if presets.channels_last:
            prior.to(memory_format=torch.channels_last)
        if presets.compile:
            prior.compile()
        self.parameters = [parameter for parameter in prior.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(presets, prior, self.parameters, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(prior, optimizer)
        self.ema = EMAWeights(
            self.parameters, decay=presets.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=presets.ema_power
        )
        self.ema.to(accelerator.device)
        self._next_guide = [parameter.detach().clone() for parameter in self.parameters]
        self.learning_rate, self.progress = LearningRate(optimizer, presets), Progress()
        num_faces = int(self.latents["num_faces"])
        self.steps_per_epoch = max(1, min(num_faces, presets.max_images_per_epoch or num_faces) // presets.batch_size)
        resumed_at = None if saved is None else (saved["progress"]["step"], saved["progress"]["epoch"])
        status = {"num_epochs": presets.num_epochs, "steps_per_epoch": self.steps_per_epoch}
        self.tracker = Tracker(
            accelerator,
            run_dir,
            config.flat(),
            status,
            trackers=config.output.trackers,
            project=config.output.run_name,
            resumed_at=resumed_at,
        )
        components = {"progress": self.progress, "learning_rate": self.learning_rate}
        self.checkpoints = CheckpointManager(
            run_dir,
            config.output,
            TrainingState(accelerator, prior, optimizer, self.ema, components, {GUIDE_FILE: self._next_guide_tensors}),
            self.progress,
            description=lambda: {"config": config.to_dict(), "processes": accelerator.num_processes},
            model_files=lambda: model_files(prior),
            warn=lambda message: self.tracker.event(message, "warning", **self.progress.where),
            best_metric="validation/velocity_loss",
        )
        if checkpoint is not None:
            self.checkpoints.restore(checkpoint, saved)
            logger.info("resumed from %s: epoch %d, step %d", checkpoint, self.progress.epoch, self.progress.step)
        self.progress.steps_per_epoch = self.steps_per_epoch
        self._log_cost(num_faces, precision)

    def _set_statistics(self) -> None:
        """Sets the prior's mean image and standard deviation from the training latents."""
        mean, std = self.latents["train_mean"], self.latents["train_std"]
        index = torch.linspace(0, len(mean) - 1, min(_STATISTICS_FACES, len(mean))).long()
        samples = mean[index] + std[index] * torch.randn(len(index), mean.shape[1], generator=keyed_generator(0))
        standardize = self.prior.standardize
        standardize.mean.copy_(self._images(mean.mean(dim=0, keepdim=True))[0])
        squared = [(self._images(part) - standardize.mean).square().mean() for part in samples.split(256)]
        standardize.std.copy_(torch.stack(squared).mean().sqrt())

    @torch.no_grad()
    def _images(self, latents: Tensor) -> Tensor:
        """Flat latents to the images that the prior learns."""
        return self.prior.latents_to_images(
            self.vae, latents.to(self.accelerator.device).view(-1, *self.vae.latent_shape)
        )

    def _log_cost(self, num_faces: int, precision: str) -> None:
        presets = self.config.training_presets
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            copy = DiffusionPrior.from_config(self.prior.config)
            copy(torch.zeros(1, *copy.noise_shape), torch.zeros(1))
        gflop = counter.get_total_flops() / 1e9
        # The guide costs as much as the network.
        evaluations = self.prior.config.num_inference_steps * (1 if self.prior.config.guidance_scale == 1 else 2)
        device = local_device(self.accelerator.device)
        peak = 1000 * (device.float32_tflops if precision == "no" else device.half_tflops)
        images = presets.num_epochs * self.steps_per_epoch * presets.batch_size
        hours = 3 * gflop * images / (peak * device.efficiency * self.accelerator.num_processes) / 3600
        logger.info(
            "cost      %.1f M parameters, %.2f GFLOPs per image forward, %.2f in training, %.0f per sample; %d faces, "
            "%d steps per epoch, %d images in all: %.1f hours at %.0f %% of the peak of %s",
            sum(parameter.numel() for parameter in self.parameters) / 1e6,
            gflop,
            3 * gflop,
            evaluations * gflop,
            num_faces,
            self.steps_per_epoch,
            images,
            hours,
            100 * device.efficiency,
            device.title,
        )

    # ------------------------------------------------------------------ the run

    def run(self) -> int:
        """Trains to the end, or until a signal.

        Returns:
            0 when finished (all epochs, early stopping or the time limit), `EXIT_STOPPED` after a signal.

        Raises:
            RuntimeError: The gradients stay non-finite; the last checkpoint is intact.
        """
        try:
            with StopSignal() as stop:
                reason = self._train(stop)
                if reason is None:
                    self.checkpoints.save()
            self.checkpoints.wait()
            if reason is None:
                self._event(f"stopped by {stop.received}; resume with the same command and --resume auto")
                self.tracker.update_status(state="stopped", reason=stop.received)
                return EXIT_STOPPED
            if self.progress.best is None:  # stopped before a validation, and out of time now
                self._validate(complete=False)
                self.checkpoints.save()
                self.checkpoints.wait()
            best = self.progress.best
            if best is None:
                raise RuntimeError(
                    f"there is no model to export: no checkpoint of {self.run_dir} could be written, or no validation was "
                    "finite; see training.log."
                )
            target = on_main_process(self.accelerator, self._export)
            self._event(
                f"finished: {reason}; best velocity loss {best['validation/velocity_loss']:.4f} at step {best['step']}"
            )
            self.tracker.update_status(state="finished", reason=reason, model_dir=str(target), seconds_left=0.0)
            return 0
        except BaseException as error:
            self.tracker.update_status(state="failed", reason=log_failed(error))
            raise
        finally:
            self.checkpoints.join_writer()
            self.tracker.close()
            self.folder.release()

    def _export(self) -> Path:
        source, target = self.checkpoints.best_model_dir, self.model_dir / "priors" / "diffusion"
        try:
            is_same = latents_fingerprint(AutoencoderKLUltra.from_pretrained(self.model_dir)) == self.vae_fingerprint
        except OSError:
            is_same = False
        if not is_same:
            raise ValueError(
                f"{self.model_dir} no longer holds the VAE that this prior was trained for: copy the prior, {source}, to "
                "priors/diffusion in that VAE's folder, or restore the VAE and resume."
            )
        export_model(source, target)
        return target

    def _event(self, message: str) -> None:
        self.tracker.event(message, "info", **self.progress.where)

    def _train(self, stop: StopSignal) -> str | None:
        """Trains until something ends the run; returns what, None for a signal."""
        presets, output, progress = self.config.training_presets, self.config.output, self.progress
        limit = presets.max_train_minutes
        if limit is not None and progress.train_seconds >= 60 * limit:  # resumed; the same on all processes
            return f"the limit of {limit:g} minutes of training"
        while progress.epoch < presets.num_epochs:
            if progress.stops_early(presets):
                return f"no improvement in {progress.early_stopping_bad_epochs} epochs (early stopping)"
            out_of_time = False
            while progress.batch < self.steps_per_epoch and not out_of_time:
                flags = self._step(stop)
                if flags["written"]:
                    self.checkpoints.wait()
                if flags["stopping"]:
                    return None
                out_of_time = flags["out_of_time"]
                if flags["save_due"] and progress.batch < self.steps_per_epoch and not out_of_time:
                    self.checkpoints.save()
            if progress.batch >= self.steps_per_epoch:  # more if a resume has shortened the epochs
                progress.epoch, progress.batch = progress.epoch + 1, 0
            is_best = self._validate(complete=progress.batch == 0)
            is_last = out_of_time or progress.epoch == presets.num_epochs or progress.stops_early(presets)
            if is_last or progress.epoch % output.sample_every_epochs == 0:
                on_main_process(self.accelerator, self._save_grid)
            if is_last or self.checkpoints.is_due_at_epoch(is_best, is_last):
                self.checkpoints.save()
            if out_of_time:
                return f"the limit of {limit:g} minutes of training"
        return f"{presets.num_epochs} epochs"

    def _micro_batches(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """This process's part of a global batch."""
        count = len(batch["sigma"]) // self.accelerator.num_processes
        first = self.accelerator.process_index * count
        starts = range(first, first + count, self.micro_batch)
        return [
            {name: tensor[start : min(start + self.micro_batch, first + count)] for name, tensor in batch.items()}
            for start in starts
        ]

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean squared error of the velocity over a micro-batch."""
        batch = send_to_device(batch, self.accelerator.device)
        images, noise = self.prior.standardize(self._images(batch["latents"])), batch["noise"]
        x = torch.lerp(images, noise, batch["sigma"][:, None, None, None])
        if self.config.training_presets.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        velocity = self.model(x, batch["sigma"], batch.get("attributes"))
        return (velocity.float() - (noise - images)).square().mean()

    def _step(self, stop: StopSignal) -> dict[str, bool]:
        """One optimizer step; returns the flags that all processes agree on."""
        presets, progress, started = self.config.training_presets, self.progress, time.monotonic()
        processes = self.accelerator.num_processes
        self.learning_rate.before_step(progress.step, progress.fraction(presets.num_epochs))
        batch = sample_batch(self.latents, "train", self.prior, presets.batch_size, (presets.seed, progress.step))
        parts, loss = self._micro_batches(batch), torch.zeros((), device=self.accelerator.device)
        for index, part in enumerate(parts):  # DDP reduces gradients once, during the last backward pass
            is_last, fraction = index == len(parts) - 1, len(part["sigma"]) * processes / presets.batch_size
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                part_loss = fraction * self._loss(part)
                self.accelerator.backward(part_loss)
            loss += part_loss.detach()
        grad_norm = float(self.accelerator.clip_grad_norm_(self.parameters, presets.max_grad_norm))
        is_finite = math.isfinite(grad_norm)
        if is_finite or self.accelerator.scaler is not None:  # the scaler skips the step, and lowers its scale
            self.optimizer.step()
        if is_finite:
            self.ema.step(self.parameters)
            progress.skipped_in_a_row = 0
        else:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            if progress.skipped_in_a_row >= presets.max_skipped_in_a_row:
                raise RuntimeError(
                    f"{progress.skipped_in_a_row} steps in a row had no finite gradient: resume with a lower "
                    "training_presets.learning_rate, or with training_presets.mixed_precision=no."
                )
        self.optimizer.zero_grad()
        progress.step, progress.batch = progress.step + 1, progress.batch + 1
        self._update_guide()
        progress.images_seen += presets.batch_size
        limit = presets.max_train_minutes
        terms, flags = read_later(
            self.accelerator,
            {"loss/velocity": loss},
            {
                "stopping": stop.received is not None,
                "out_of_time": limit is not None and progress.train_seconds > 60 * limit,
                "save_due": self.checkpoints.images_due or self.checkpoints.minutes_due,
                "written": self.checkpoints.is_written,
            },
        )()
        seconds = time.monotonic() - started
        progress.train_seconds += seconds
        sums = {"steps": 1.0, "seconds": seconds}
        if is_finite or self.accelerator.scaler is None:  # an overflow of fp16 is no measurement
            sums |= {**terms, "optim/grad_norm": grad_norm, "measured": 1.0}
        for name, value in sums.items():
            progress.window[name] = progress.window.get(name, 0.0) + value
        log_due = progress.step == 1 or progress.step % self.config.output.log_every_steps == 0
        if log_due and "loss/velocity" in progress.window:
            self._log_window()
        return flags

    def _update_guide(self) -> None:
        """After 4^k steps, the EMA weights of step 4^(k-1) become the guide.

        So the guide has been trained for a sixteenth to a quarter of the steps of the network, however many these will
        be (a sixteenth in Karras et al. 2024, https://arxiv.org/abs/2406.02507, section 5).
        """
        step = self.progress.step
        if step.bit_count() == 1 and step.bit_length() % 2 == 1:
            torch._foreach_copy_([parameter.data for parameter in self.prior.guide.parameters()], self._next_guide)
            torch._foreach_copy_(self._next_guide, self.ema.shadow_params)

    def _next_guide_tensors(self) -> dict[str, Tensor]:
        """The next guide, for the checkpoint."""
        return {name: tensor for (name, _), tensor in zip(self.prior.guide.named_parameters(), self._next_guide)}

    def _log_window(self) -> None:
        """Logs the means over the steps since the last call."""
        progress, presets = self.progress, self.config.training_presets
        window, progress.window = progress.window, {}
        steps, seconds = window.pop("steps"), window.pop("seconds")
        measured = window.pop("measured")
        values: dict[str, Any] = {name: total / measured for name, total in window.items()}
        values |= {
            "optim/learning_rate": self.learning_rate.value,
            "optim/skipped_steps": progress.skipped_steps,
            "speed/images_per_second": steps * presets.batch_size / max(seconds, 1e-9),
        }
        left = progress.seconds_left(presets, self.steps_per_epoch, values["speed/images_per_second"])
        self.tracker.log("train", values, **progress.where)
        self.tracker.update_status(state="running", seconds_left=left, **progress.where)
        logger.info(
            "epoch %d step %d: loss %.4f grad_norm %.2f images/s %.1f minutes_left %.0f",
            progress.epoch + 1, progress.step, values["loss/velocity"], values["optim/grad_norm"],
            values["speed/images_per_second"], left / 60,
        )  # fmt: skip

    @torch.no_grad()
    def _validate(self, complete: bool) -> bool:
        """Measures the EMA weights on the same noise each time; returns whether they are the best so far.

        Learning rate and early stopping count the ends of epochs only (`complete`).
        """
        presets, progress = self.config.training_presets, self.progress
        with self.ema.applied(self.parameters):
            loss = torch.zeros((), device=self.accelerator.device)
            for index in range(_VALIDATION_BATCHES):
                key = (presets.seed, index, _VALIDATION_KEY)
                batch = sample_batch(self.latents, "validation", self.prior, presets.batch_size, key)
                for part in self._micro_batches(batch):
                    loss += self._loss(part) * len(part["sigma"])
        count = presets.batch_size // self.accelerator.num_processes * _VALIDATION_BATCHES
        loss = self.accelerator.reduce(loss / count, reduction="mean").item()
        if complete:
            before, after = self.learning_rate.after_epoch(loss, progress.step)
            if after < before:
                self._event(
                    f"learning rate {before:.2e} -> {after:.2e}: no improvement in {presets.plateau_patience} epochs"
                )
        values = {"validation/velocity_loss": loss}
        is_best = self.checkpoints.update_best(loss, values, presets.plateau_threshold)
        if is_best:
            progress.early_stopping_bad_epochs = 0
        elif complete:
            progress.early_stopping_bad_epochs += 1
        logger.info("epoch %d: velocity_loss %.4f%s", progress.epoch, loss, " (best)" if is_best else "")
        self.tracker.log("validation", values, **progress.where)
        self.tracker.update_status(best=progress.best, **progress.where)
        return is_best

    @torch.no_grad()
    def _save_grid(self) -> None:
        """Saves a grid of samples of the EMA weights, of the same noise each time."""
        output, presets = self.config.output, self.config.training_presets
        with self.tracker.guard("image grids"), self.ema.applied(self.parameters), self.accelerator.autocast():
            # One image at a time, so that the first images do not depend on num_samples.
            generator = torch.Generator().manual_seed(presets.seed)
            noise = [torch.randn(self.prior.noise_shape, generator=generator) for _ in range(output.num_samples)]
            images = self.prior.denoise(torch.stack(noise).to(self.accelerator.device))
            latents = self.prior.images_to_latents(self.vae, images.float())
            pixels = torch.cat([self.vae.decode(part).sample.float().cpu() for part in latents.split(4)])
            grid = make_grid(pixels.clamp(-1, 1) / 2 + 0.5, nrow=max(1, round(output.num_samples**0.5)))
            file = f"{output.run_name}_samples_epoch_{self.progress.epoch:04d}.png"
            self.tracker.image("samples", grid, self.progress.step, file)
