"""The training run: builds the pieces from a configuration, then one loop that says what happens when.

`train(config, resume)` is the whole run; train_vae.py is its command line. What a step does is in step.py, what an
epoch's images are in data.py, what beta does in kl.py, what is measured in validation.py.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.budget.plan import describe_plan, planned_micro_batch
from training.builders import (
    build_accelerator,
    build_model,
    build_optimizer,
    cpu_computes_bf16,
    join_processes,
    micro_batch_size,
)
from training.checkpoint.format import CheckpointWriter, Snapshot, quarantine_newer
from training.checkpoint.resume import check_resume, newest_valid
from training.checkpoint.run_dir import RunFolder
from training.checkpoint.state import RunState
from training.config import Config, config_from_dict
from training.data.stream import TrainStream, load_validation
from training.distributed import on_main_process
from training.ema import EMAWeights
from training.evaluate.grids import image_grids
from training.evaluate.validation import Validation, validate
from training.losses.kl_control import KLController
from training.losses.objective import ReconstructionLoss
from training.losses.perceptual import PerceptualTrunk
from training.pca_init import fit_pca_branch, freeze_pca_branch
from training.publish import hub
from training.publish.export import export_model, model_files
from training.publish.run_record import describe_hardware
from training.publish.stage import publish, publish_command
from training.run_files import list_checkpoints, read_state, step_folder
from training.signals import StopSignal
from training.step import OutOfMemory, TrainStep
from training.tracking.alerts import Alerts
from training.tracking.progress import Progress, ProgressLine
from training.tracking.trackers import Tracker, setup_logging

logger = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request with a checkpoint; `--resume auto` goes on
SIGNALLED = "a signal"
REORDER = 1_000_003  # added to the seed by a roll-back: other images, other noise

# Of the plateau scheduler; its settings come from the configuration, which a resume may change.
PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class RollBack(Exception):
    """Too many steps in a row had no finite gradient: the run goes back to its last checkpoint."""


class Trainer:
    """A run, built and ready: `Trainer(config, resume).run()`.

    Args:
        config: The configuration.
        resume: None, "auto" or a path (see `find_run`).
        allow_changed: Keys that a resume may find changed (see `check_resume`).

    Raises:
        ValueError: Anything that the configuration, the files or the machine do not allow, before training starts.
    """

    def __init__(self, config: Config, resume: str | None = None, allow_changed: Sequence[str] = ()) -> None:
        self.config = config
        self._folder = RunFolder(config)
        try:
            self._build(resume, allow_changed)
        except BaseException:
            self._folder.release()
            raise

    def _build(self, resume: str | None, allow_changed: Sequence[str]) -> None:
        config = self.config
        presets, output = config.training_presets, config.output
        state, precision, source = join_processes(presets.mixed_precision)
        opened = on_main_process(state, lambda: self._folder.open(resume))
        self.run_dir, checkpoint, saved, notes = (opened[key] for key in ("run_dir", "checkpoint", "state", "notes"))
        micro_batch = micro_batch_size(config, state.num_processes)
        single_micro_batch = (
            presets.micro_batch_size != "auto" and micro_batch * state.num_processes == presets.batch_size
        )
        self.accelerator = accelerator = build_accelerator(state, precision, self.run_dir, single_micro_batch)
        setup_logging(accelerator, None)
        self.model = build_model(config)
        side = self.model.config.sample_size
        if saved is not None:
            notes += check_resume(config, accelerator.num_processes, saved, allow_changed)
        if config.hub.push:
            on_main_process(accelerator, lambda: hub.check_access(config.hub))

        with accelerator.main_process_first():  # the first may download, the others find it in the cache
            memory_format = torch.channels_last if presets.channels_last else torch.contiguous_format
            name, device = output.eval_lpips_trunk, accelerator.device
            self.reported_trunk = PerceptualTrunk(name, config.loss.trunk_weights)
            self.reported_trunk.to(device, memory_format=memory_format)
            self.loss = ReconstructionLoss.from_config(
                config.loss, device, memory_format=memory_format, networks={name: self.reported_trunk}
            )
        self.loss.check_resolution(side)
        self.reported_trunk.check_size(side, "output.eval_lpips_trunk")

        with accelerator.main_process_first():
            self.stream = TrainStream(
                config.data,
                resolution=side,
                seed=presets.seed,
                global_batch=presets.batch_size,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                pin_memory=accelerator.device.type == "cuda",
            )
            self.validation_images, self.validation_indices = load_validation(
                config.data, resolution=side, rank=accelerator.process_index, world_size=accelerator.num_processes
            )

        if saved is not None and "data" not in allow_changed:
            self.stream.check_resume(saved["data"])
        if (self.stream.num_rows or presets.batch_size) < presets.batch_size:
            raise ValueError(
                f"training_presets.batch_size {presets.batch_size} is more than the {self.stream.num_rows} training "
                f"images of {config.data.dataset}: use a smaller batch or more data."
            )

        # Everything that a user can get wrong has been checked; from here on files are written.
        self.run_dir, claimed = on_main_process(accelerator, lambda: self._folder.claim(checkpoint))
        notes += claimed
        places = accelerator.project_configuration
        places.project_dir = places.logging_dir = str(self.run_dir)
        setup_logging(accelerator, self.run_dir / "training.log")
        logger.info("run       %s", self.run_dir)
        logger.info("device    %s, precision %s (from %s)", accelerator.device, precision, source)
        if precision == "bf16" and accelerator.device.type == "cpu" and not cpu_computes_bf16():
            logger.warning(
                "this CPU has no bfloat16 instructions: bf16 is emulated, slower than float32 (auto avoids it)"
            )
        plan = describe_plan(config, accelerator.num_processes, self.num_train_images)
        for line in (*plan.splitlines(), *notes):
            logger.info(line)

        freeze_pca_branch(self.model, presets.pca_lr_scale)
        if checkpoint is None and self.model.pca_branch is not None and accelerator.is_main_process:
            self._fit_pca_branch()
        if presets.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if presets.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.model.to(accelerator.device)
        if presets.compile:
            self.model.compile()  # in place: names in checkpoints stay those of the eager model
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(config, self.model, self.parameters, accelerator.device)
        # Prepared before the averaged weights are copied: this is where other processes get the main one's weights.
        prepared_model, prepared_optimizer = accelerator.prepare(self.model, self.optimizer)
        self.ema = None
        if presets.ema_decay > 0:
            self.ema = EMAWeights(
                self.parameters, decay=presets.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=presets.ema_power
            )
            self.ema.to(accelerator.device)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            factor=presets.plateau_factor,
            patience=presets.plateau_patience,
            threshold=presets.plateau_threshold,
            min_lr=[presets.min_learning_rate * group["lr_scale"] for group in self.optimizer.param_groups],
        )
        self.kl = KLController(presets, controlled=presets.kl_control_enabled)
        model_config = self.model.config
        self.train_step = TrainStep(
            accelerator,
            prepared_model,
            prepared_optimizer,
            self.parameters,
            ema=self.ema,
            loss=self.loss,
            seed=presets.seed,
            latent_shape=(model_config.latent_channels, model_config.latent_size, model_config.latent_size),
            micro_batch=micro_batch,
            adapt_micro_batch=presets.micro_batch_size == "auto",
            augment=presets.augment,
            max_grad_norm=presets.max_grad_norm,
        )
        self.progress = Progress()
        self.alerts = Alerts(presets)
        self.state = RunState(accelerator, self.model, self.optimizer, self.ema)
        self.writer = CheckpointWriter(self.run_dir, output.keep_checkpoints)
        self._best_on_disk = self._best_in_writing = self.progress.best
        if checkpoint is not None:
            self._load(checkpoint, saved)
        elif presets.micro_batch_size == "auto":
            if accelerator.device.type == "cuda":  # the plan knows better than halving from the whole batch
                own = torch.tensor([torch.cuda.mem_get_info(accelerator.device)[1]], device=accelerator.device)
                limit = accelerator.gather(own).min().item()
                self.train_step.micro_batch = planned_micro_batch(config, accelerator.num_processes, limit)
            self.train_step.find_micro_batch(presets.batch_size // accelerator.num_processes, side)
            logger.info("micro batch: %d images fit in a forward pass", self.train_step.micro_batch)
        self._saved_at = (self.progress.images_seen, time.monotonic())
        self.tracker = Tracker(
            accelerator,
            self.run_dir,
            config.flat(),
            {
                "num_epochs": presets.num_epochs,
                "steps_per_epoch": self.steps_per_epoch,
                "model_dir": None,
                "hardware": describe_hardware(accelerator.device, accelerator.num_processes, precision),
                **self._standing,
            },
            resumed_at=None if checkpoint is None else (self.progress.step, self.progress.epoch),
        )
        steps = self.steps_per_epoch
        total_steps = None if steps is None else steps * presets.num_epochs
        self.progress_line = ProgressLine(total_steps, self.progress.step)

    # ------------------------------------------------------------------ building

    @property
    def num_train_images(self) -> int | None:
        """Training images of an epoch, where known."""
        return self.stream.num_rows or self.config.data.num_train_images

    @property
    def max_batches(self) -> int | None:
        """Most global batches in an epoch, or None."""
        limit = self.config.training_presets.max_images_per_epoch
        return None if limit is None else limit // self.config.training_presets.batch_size

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch, where known."""
        images = self.num_train_images
        steps = None if images is None else images // self.config.training_presets.batch_size
        return steps if self.max_batches is None else min(steps or self.max_batches, self.max_batches)

    def _fit_pca_branch(self) -> None:
        """Fit the linear path on the first images of the stream; on the main process alone."""
        presets = self.config.training_presets
        started = time.monotonic()
        wanted = presets.pca_init_images
        alone = TrainStream(
            self.config.data,
            resolution=self.model.config.sample_size,
            seed=presets.seed,
            global_batch=1,  # exactly the images wanted, whatever the batch and the number of processes
            rank=0,
            world_size=1,
        )
        batches = alone.epoch_batches(0, max_batches=wanted)
        images = torch.cat([batch.pixels for batch in batches])
        if self.accelerator.device.type == "cuda":  # Apple's GPUs have no eigenvalue solver
            self.model.to(self.accelerator.device)
        copies = presets.pca_init_augmented_copies
        result = fit_pca_branch(self.model, images, presets.pca_noise_fraction, copies)
        logger.info(
            "linear path fitted on %d images%s in %.0f s: %d components keep %.2f %% of the variance, KL %.2f nats a "
            "number",
            len(images),
            f" and {copies} moved copies of each" if copies else "",
            time.monotonic() - started,
            result["components"],
            100 * result["kept_fraction"],
            result["kl_per_dimension"],
        )

    # ------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        """Copy the state to host memory and begin to write it; every process calls it."""
        self._settle()
        self._saved_at = (self.progress.images_seen, time.monotonic())
        self._best_in_writing = best = self.progress.best
        if not self.accelerator.is_main_process:
            return
        state = {
            "config": self.config.to_dict(),
            "progress": self.progress.state_dict(),
            "plateau": {key: self.plateau.state_dict()[key] for key in PLATEAU_STATE},
            "kl": self.kl.state_dict(),
            "alerts": self.alerts.state_dict(),
            "processes": self.accelerator.num_processes,
            "micro_batch": self.train_step.micro_batch,
            "data": self.stream.identity,
            **self.state.plain_values(),
        }
        self.writer.start(
            Snapshot(
                step=self.progress.step,
                model_files=model_files(self.model),
                tensors=self.state.host_tensors(),
                trainer_state=copy.deepcopy(state),
                best_step=None if best is None else best["step"],
            )
        )

    def _settle(self) -> None:
        """Wait for the checkpoint in hand, and say how it went; every process calls it and learns the same."""
        outcome = on_main_process(self.accelerator, self.writer.wait)
        if outcome is None:
            return
        step, error = outcome
        best = self.progress.best
        if error is None:
            self._best_on_disk = self._best_in_writing
            return
        self.tracker.event(
            f"the checkpoint of step {step} could not be written, older ones are as they were ({error})",
            "warning",
            **self.progress.where,
        )
        if best is not None and best["step"] == step:  # its weights are nowhere: the next good one is the best
            self.progress.best = self._best_on_disk

    def _load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        self.state.load(checkpoint, state)
        # The learning rates came back with the state; their unit is the configuration's to say.
        presets, saved = self.config.training_presets, config_from_dict(state["config"]).training_presets
        for group in self.optimizer.param_groups:
            group["lr"] *= presets.learning_rate / saved.learning_rate
        self.progress.load_state_dict(state["progress"])
        self._best_on_disk = self._best_in_writing = self.progress.best
        self.plateau.load_state_dict(state["plateau"])
        self.kl.load_state_dict(state["kl"])
        self.alerts.load_state_dict(state["alerts"])
        if self.progress.latents is not None:
            self.model.register_to_config(**self.progress.latents)
        if presets.micro_batch_size == "auto":  # sums round as the pieces are cut
            self.train_step.micro_batch = min(state["micro_batch"], self.train_step.micro_batch)
        self._reorder()
        logger.info("resumed from %s: epoch %d, step %d", checkpoint, self.progress.epoch, self.progress.step)

    def _reorder(self) -> None:
        """After a roll-back, other images meet other noise."""
        seed = self.config.training_presets.seed + REORDER * self.progress.rollbacks
        self.train_step.seed = seed
        self.stream.reseed(seed)

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint that is whole, with another order of images."""
        self._settle()
        step, rollbacks = self.progress.step, self.progress.rollbacks + 1

        def newest() -> tuple[Path, dict[str, Any]]:
            checkpoint, _ = newest_valid(self.run_dir, None)
            quarantine_newer(self.run_dir, checkpoint)  # damaged ones, which would count as kept
            return checkpoint, read_state(checkpoint)

        checkpoint, state = on_main_process(self.accelerator, newest)
        self._load(checkpoint, state)
        self.progress.rollbacks = rollbacks
        self._reorder()
        self.tracker.rewind(self.progress.step, self.progress.epoch)
        self.tracker.event(
            f"rolled back from step {step} to {checkpoint.name}: {self.config.training_presets.max_skipped_in_a_row} "
            "steps in a row had no finite gradient; going on with another order of images",
            "warning",
            **self.progress.where,
        )

    # ------------------------------------------------------------------ the loop

    def run(self) -> int:
        """Train to the end, or until a signal.

        Returns:
            0 when finished (all epochs, early stopping or the time limit), `EXIT_STOPPED` after a signal.

        Raises:
            DataError: The source fails for good, or too many images are unreadable; the last checkpoint is intact.
            ValueError: Out of memory; a checkpoint of that moment is written where one process trains.
            RuntimeError: The gradients stay infinite; the last checkpoint is intact.
        """
        try:
            with StopSignal() as stop:
                reason = self._train(stop)
                if reason is None:
                    self._save()
            self._settle()
            if reason is None:
                self.tracker.event(
                    f"stopped by {stop.received}; continue with --resume auto", "info", **self.progress.where
                )
                self.tracker.update_status(state="stopped", reason=stop.received, **self._standing)
                return EXIT_STOPPED
            self._finish(reason)
            return 0
        except OutOfMemory as error:
            if self.accelerator.num_processes == 1:  # several would have to be in step; they have their last checkpoint
                self._save()
                self._settle()
            logger.error("%s", error)
            self.tracker.update_status(state="failed", reason=str(error), **self._standing)
            raise ValueError(f"{error} Then go on with --resume auto.") from None
        except BaseException as error:
            logger.error("failed: %s: %s", type(error).__name__, error)
            self.tracker.update_status(state="failed", reason=f"{type(error).__name__}: {error}", **self._standing)
            raise
        finally:
            self.writer.wait()
            with self.tracker.guard("progress bar"):
                self.progress_line.close()
            self.tracker.close()
            self._folder.release()

    @property
    def _standing(self) -> dict[str, Any]:
        """Where the run stands, for status.json."""
        best = self.progress.best
        return {
            "best": best,
            "plateau_bad_epochs": self.plateau.num_bad_epochs,
            "early_stopping_bad_epochs": self.progress.early_stopping_bad_epochs,
            **self.progress.where,
        }

    def _train(self, stop: StopSignal) -> str | None:
        """Epochs until something ends them; returns what, or None for a signal."""
        presets, output = self.config.training_presets, self.config.output
        if self.progress.step == 0:
            self._validate("before training")
        while self.progress.epoch < presets.num_epochs:
            bad_epochs = self.progress.early_stopping_bad_epochs
            if presets.early_stopping_patience and bad_epochs >= presets.early_stopping_patience:
                return f"no improvement in {bad_epochs} epochs (early stopping)"
            try:
                ended = self._train_epoch(stop)
            except RollBack:
                self._roll_back()
                continue
            progress = self.progress
            if ended is None:
                progress.epoch += 1
                progress.batch = 0
                last = progress.epoch == presets.num_epochs
                is_best = self._epoch_end(self._validate(f"epoch {progress.epoch}"))
                if last or progress.epoch % output.sample_every_epochs == 0:
                    self._save_grids(f"epoch_{progress.epoch:04d}")
                if is_best or last or progress.epoch % output.checkpoint_every_epochs == 0:
                    self._save()
                push_every = self.config.hub.push_every_epochs
                if push_every is not None and not last and progress.epoch % push_every == 0:
                    self._settle()  # what is sent is the best checkpoint's model
                    self._publish()
            elif ended == SIGNALLED:
                return None
            else:  # the time limit, in mid-epoch
                self._epoch_end(self._validate("time limit"), complete=False)
                self._save()
                return ended
        return f"{presets.num_epochs} epochs"

    def _train_epoch(self, stop: StopSignal) -> str | None:
        """The rest of the epoch in hand; returns None at its end, else what ended the run."""
        presets, progress = self.config.training_presets, self.progress
        remaining = None if self.max_batches is None else self.max_batches - progress.batch
        if remaining == 0:
            return None
        batches = self.stream.epoch_batches(progress.epoch, start_batch=progress.batch, max_batches=remaining)
        with contextlib.closing(batches):
            clock, waited, save_due = time.monotonic(), self.stream.wait_seconds, False
            for batch in batches:
                if save_due:  # here and not after the step, where an epoch may end, which saves by itself
                    self._save()
                    clock = time.monotonic()
                self._set_learning_rate()
                beta = self.kl.beta(progress.epoch, progress.images_seen)
                result = self.train_step(
                    batch.pixels, step=progress.step, beta=beta, resolution=presets.resolution(progress.epoch)
                )
                if result.halved:
                    self.tracker.event(
                        f"out of memory: from here on {self.train_step.micro_batch} images in a forward pass (gradients "
                        "stay the same)",
                        "warning",
                        **progress.where,
                    )
                progress.step += 1
                progress.batch += 1
                progress.images_seen += presets.batch_size
                now = time.monotonic()
                limit = presets.max_train_minutes
                out_of_time = limit is not None and progress.train_seconds + now - clock > 60 * limit
                parts, flags = self._agree(
                    result.parts,
                    stopping=stop.received is not None,
                    out_of_time=out_of_time,
                    save_due=self._save_is_due(),
                    written=self.writer.is_done,
                )
                if flags["written"]:
                    self._settle()
                self._guard(result.skipped, batch.example_ids)
                save_due = flags["save_due"] and not result.skipped  # a run of bad steps is not what to go back to
                if not result.skipped:
                    self.kl.observe(
                        kl=parts["kl"],
                        reconstruction=parts["reconstruction"],
                        num_images=presets.batch_size,
                        epoch=progress.epoch,
                        images_seen=progress.images_seen,
                    )
                progress.add_step(
                    parts,
                    beta=beta,
                    grad_norm=result.grad_norm,
                    max_grad_norm=presets.max_grad_norm,
                    seconds=now - clock,
                    waited=self.stream.wait_seconds - waited,
                )
                clock, waited = now, self.stream.wait_seconds
                if progress.step % self.config.output.log_every_steps == 0:
                    self._log_metrics()
                    clock = time.monotonic()
                if flags["stopping"]:
                    stop.received = stop.received or "a signal to another process"
                    return SIGNALLED
                if flags["out_of_time"]:
                    return f"the limit of {limit:g} minutes of training"
        return None

    def _save_is_due(self) -> bool:
        """Whether so many images or minutes have gone by since the last checkpoint began."""
        images, minutes = self.config.output.checkpoint_every_images, self.config.output.checkpoint_every_minutes
        images_then, then = self._saved_at
        return (images is not None and self.progress.images_seen - images_then >= images) or (
            minutes is not None and time.monotonic() - then >= 60 * minutes
        )

    def _set_learning_rate(self) -> None:
        """The linear warm-up; afterwards the rate belongs to the plateau scheduler."""
        presets, step = self.config.training_presets, self.progress.step
        if step <= presets.lr_warmup_steps:
            factor = min(1.0, (step + 1) / (presets.lr_warmup_steps + 1))
            for group in self.optimizer.param_groups:
                group["lr"] = presets.learning_rate * group["lr_scale"] * factor

    def _agree(self, parts: dict[str, Tensor], **flags: bool) -> tuple[dict[str, float], dict[str, bool]]:
        """Mean loss terms over processes, and which flags any process raises: one collective, one transfer."""
        raised = torch.tensor([float(flag) for flag in flags.values()], device=self.accelerator.device)
        vector = torch.cat([torch.stack(list(parts.values())), raised])
        if self.accelerator.num_processes > 1:
            vector = self.accelerator.reduce(vector, reduction="mean")
        values = vector.tolist()
        means = dict(zip(parts, values))
        return means, {name: value > 0 for name, value in zip(flags, values[len(parts) :])}

    def _guard(self, skipped: bool, example_ids: list[str]) -> None:
        """Count steps without a finite gradient; when they do not end, go back once, then give up."""
        progress, limit = self.progress, self.config.training_presets.max_skipped_in_a_row
        if not skipped:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        shown = ", ".join(example_ids[:4])
        if self.accelerator.scaler is None:  # in fp16, overflows are how the scaler finds its scale
            self.tracker.event(
                f"step {progress.step}: the gradient is not finite, nothing was updated (images {shown}, ...)",
                "warning",
                **self.progress.where,
            )
        if progress.skipped_in_a_row < limit:
            return
        if progress.rollbacks == 0 and self._has_checkpoint():
            raise RollBack
        again = "again, after going back to a checkpoint" if progress.rollbacks else "before the first checkpoint"
        raise RuntimeError(
            f"{limit} steps in a row had no finite gradient, {again} (learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.2e}, beta {self.kl.beta(progress.epoch, progress.images_seen):.2e}, "
            f"last images {shown}): the checkpoints in {self.run_dir / 'checkpoints'} are intact; resume with a lower "
            "training_presets.learning_rate, or with training_presets.mixed_precision=no."
        )

    def _has_checkpoint(self) -> bool:
        self._settle()
        return on_main_process(self.accelerator, lambda: bool(list_checkpoints(self.run_dir)))

    def _warn(self, sentences: list[str]) -> None:
        """Log what the main process found; the others' clocks may have told them something else."""
        for sentence in sentences if self.accelerator.is_main_process else ():
            self.tracker.event(sentence, "warning", **self.progress.where)

    def _log_metrics(self) -> None:
        """One line of figures: means over the steps since the last."""
        presets, progress = self.config.training_presets, self.progress
        values = progress.take_window(
            presets,
            self.kl,
            latent_dim=self.model.config.latent_dim,
            learning_rate=self.optimizer.param_groups[0]["lr"],
        )
        left = progress.seconds_left(presets, self.steps_per_epoch, values["speed/images_per_second"])
        self.tracker.log("train", values, **progress.where)
        with self.tracker.guard("alerts"):
            self._warn(self.alerts.observe_window(values, images_seen=progress.images_seen, step=progress.step))
        self.tracker.update_status(state="running", seconds_left=left, **progress.where)
        if self.accelerator.is_main_process:
            with self.tracker.guard("progress bar"):
                self.progress_line.show(progress, values, left)

    # ------------------------------------------------------------------ validation, best model, grids, the end

    def _ema_weights(self) -> contextlib.AbstractContextManager:
        """The model with the EMA weights, if there are any."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied(self.parameters)

    def _validate(self, when: str) -> Validation:
        progress = self.progress
        with self._ema_weights():
            result = validate(
                self.accelerator,
                self.model,
                self.validation_images,
                self.validation_indices,
                batch=self.train_step.micro_batch,
                loss=self.loss,
                reported=self.reported_trunk,
            )
        lpips = f"lpips_{self.reported_trunk.name}"
        logger.info(
            "%s: validation PSNR %.2f dB, SSIM %.4f, %s %.4f, MSE %.5f on [-1, 1], reconstruction loss %.5f, "
            "KL %.3f nats a number, %d of %d units active",
            when,
            result.values["psnr"],
            result.values["ssim"],
            lpips,
            result.values[lpips],
            result.values["mse"],
            result.values["reconstruction_loss"],
            result.values["kl"],
            result.values["active_units"],
            self.model.config.latent_dim,
        )
        with self.tracker.guard("alerts"):
            warnings = self.alerts.observe_validation(
                result.values,
                images_seen=self.progress.images_seen,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                latent_dim=self.model.config.latent_dim,
            )
            self._warn(warnings)
        self.progress.latents = {
            "scaling_factor": 1.0 / max(result.values["latents_std"], 1e-6),
            "shift_factor": result.values["latents_mean"],
            "latents_mean": result.channel_mean.tolist(),
            "latents_std": result.channel_std.tolist(),
        }
        self.model.register_to_config(**self.progress.latents)
        values = {f"validation/{name}": value for name, value in result.values.items()}
        values["validation/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.tracker.log("validation", values, **self.progress.where)
        self.tracker.histogram("validation/kl_per_dimension", result.kl_per_dimension, progress.step)
        if result.sigma_at_bound_fraction > 0.01:
            self.tracker.event(
                f"{100 * result.sigma_at_bound_fraction:.0f} % of the posterior's sigmas sit at a bound: beta is far "
                "too small or far too large (see kl/beta)",
                "warning",
                **self.progress.where,
            )
        return result

    def _epoch_end(self, result: Validation, complete: bool = True) -> bool:
        """What a validation decides: the learning rate, early stopping, and, returned, whether it is the best."""
        presets, progress = self.config.training_presets, self.progress
        loss = result.values["reconstruction_loss"]
        before = self.optimizer.param_groups[0]["lr"]
        if complete and progress.step > presets.lr_warmup_steps:
            self.plateau.step(loss)
        after = self.optimizer.param_groups[0]["lr"]
        if after < before:
            self.tracker.event(
                f"learning rate {before:.2e} -> {after:.2e}: no improvement in {presets.plateau_patience} epochs",
                "info",
                **self.progress.where,
            )
        best = math.nan if progress.best is None else progress.best["validation/reconstruction_loss"]
        is_best = progress.best is None or math.isnan(best) or loss < best * (1 - presets.plateau_threshold)
        if is_best:
            progress.early_stopping_bad_epochs = 0
            progress.best = {
                "epoch": progress.epoch,
                "step": progress.step,
                **{f"validation/{name}": value for name, value in result.values.items()},
            }
        elif complete:
            progress.early_stopping_bad_epochs += 1
        self.tracker.update_status(**self._standing)
        return is_best

    def _save_grids(self, label: str) -> None:
        if self.accelerator.is_main_process:
            with self.tracker.guard("image grids"):
                self._render_grids(label)

    def _render_grids(self, label: str) -> None:
        name, step = self.config.output.run_name, self.progress.step
        with self._ema_weights():
            grids = image_grids(
                self.accelerator,
                self.model,
                self.validation_images,
                num_samples=self.config.output.num_samples,
                seed=self.config.training_presets.seed,
                batch=self.train_step.micro_batch,
            )
        for kind, grid in grids.items():
            final = label == "final" and kind != "reconstructions"
            file = f"{name}_final_{kind}.png" if final else f"{name}_{kind}_{label}.png"
            self.tracker.image(kind, grid, step, file)

    def _finish(self, reason: str) -> None:
        """Export the best model and say where everything is."""
        output = self.config.output
        model_dir = Path(output.model_dir) / f"vae_{output.run_name}"
        if self.progress.best is None:  # its checkpoint could not be written, or was damaged since
            self._epoch_end(self._validate("at the end"), complete=False)
            self._save()
            self._settle()
        if self.progress.best is None:
            raise RuntimeError("no checkpoint could be written, so there is no model to hand over: make room, --resume")
        if self.accelerator.is_main_process:
            source = step_folder(self.run_dir, self.progress.best["step"]) / "model"
            best = AutoencoderKLUltra.from_pretrained(source, use_safetensors=True)
            try:
                export_model(best, model_dir)
            except OSError as error:
                model_dir = source
                self.tracker.event(
                    f"the model could not be written to {output.model_dir} ({error}); it is in {source}",
                    "warning",
                    **self.progress.where,
                )
            missing = set(self.model.state_dict()) ^ set(best.state_dict())
            assert not missing, missing
            # The final grids show the model that is handed over.
            own = self.model.state_dict()
            kept = {key: value.clone() for key, value in own.items()}
            self.model.load_state_dict(best.state_dict())
            ema, self.ema = self.ema, None
            self._save_grids("final")
            self.ema = ema
            self.model.load_state_dict(kept)
        figures = self.progress.best
        self.tracker.event(
            f"finished: {reason}; best model of epoch {figures['epoch']}, step {figures['step']}: validation PSNR "
            f"{figures['validation/psnr']:.2f} dB, {self._lpips_text(figures)}, MSE {figures['validation/mse']:.5f} on "
            "[-1, 1]",
            "info",
            **self.progress.where,
        )
        self.tracker.update_status(state="finished", reason=reason, model_dir=str(model_dir), seconds_left=0.0)
        logger.info("model        %s", model_dir)
        logger.info("grids        %s", self.run_dir / "samples")
        logger.info("TensorBoard  tensorboard --logdir %s", output.runs_dir)
        self._publish()
        self.accelerator.wait_for_everyone()

    def _publish(self) -> None:
        """Send the model and its card to the Hub, if the configuration says so; a failure costs nothing."""
        if not self.config.hub.push or not self.accelerator.is_main_process:
            return
        try:
            logger.info("published    %s", publish(self.run_dir, self.config.hub))
        except Exception as error:  # of the Hub or the network; the model is on disk, and the upload can be repeated
            self.tracker.event(
                f"the upload failed ({type(error).__name__}: {error}); retry with: "
                f"{publish_command(self.run_dir, self.config.hub)}",
                "warning",
                **self.progress.where,
            )

    def _lpips_text(self, figures: dict[str, Any]) -> str:
        name = f"lpips_{self.reported_trunk.name}"
        return f"{name} {figures[f'validation/{name}']:.4f}"


def train(config: Config, resume: str | None = None) -> int:
    """Run a training; returns the process's exit code."""
    return Trainer(config, resume).run()
