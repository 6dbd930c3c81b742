"""The training run, top to bottom: epochs, steps, validation, checkpoints, the end.

How the objects are built is in setup.py, one optimizer step in step.py, beta in losses/kl_control.py, checkpoints in
checkpoint/manager.py.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from modeling.latent_prior import DiffusionPrior
from training.config import Config
from training.distributed import float32_without_tf32, on_main_process
from training.evaluate.grids import diffusion_grid, image_grids
from training.evaluate.validation import Validation, validate
from training.publish.export import export_model
from training.publish.stage import publish, publish_command
from training.run_files import PRIORS
from training.setup import build_run
from training.signals import EXIT_STOPPED, StopSignal
from training.step import OutOfMemory, StepResult

logger = logging.getLogger(__name__)

STOPPED = "stopped by a signal"


class RollBack(Exception):
    """Too many steps in a row had no finite gradient: the run returns to its last checkpoint."""


class Trainer:
    """A run: `Trainer(config, resume).run()`.

    Args:
        config: The configuration.
        resume: None, "auto" or a path (see `find_run`).
        allow_changed: Keys that a resume may find changed (see `check_resume`).

    Raises:
        ValueError: Anything that the configuration, the files or the machine do not allow, before training starts.
    """

    def __init__(self, config: Config, resume: str | None = None, allow_changed: Sequence[str] = ()) -> None:
        self.setup = run = build_run(config, resume, allow_changed)
        self.config, self.run_dir, self.accelerator = config, run.run_dir, run.accelerator
        self.model, self.ema, self.train_step, self.stream = run.model, run.ema, run.train_step, run.stream
        self.kl, self.learning_rate, self.progress = run.kl, run.learning_rate, run.progress
        self.checkpoints, self.tracker, self.report = run.checkpoints, run.tracker, run.report
        self._clock, self._waited, self._save_due = 0.0, 0.0, False  # time and image waiting up to the last step
        self._example_ids: list[str] = []  # of the step that is being computed
        self.report.status(steps_per_epoch=run.steps_per_epoch)

    # ------------------------------------------------------------------ the run

    def run(self) -> int:
        """Trains to the end, or until a signal.

        Returns:
            0 when finished (all epochs, early stopping or the time limit), 1 on the main process when finished but not
            uploaded as `hub.push` asks, `EXIT_STOPPED` after a signal.

        Raises:
            DataError: The source fails for good, or too many images are corrupt; the last checkpoint is intact.
            OutOfMemory: With one process, a checkpoint of the last step has been written.
            RuntimeError: The gradients stay non-finite; the last checkpoint is intact.
        """
        try:
            with StopSignal() as stop:
                reason = self._train(stop)
                if reason == STOPPED:
                    self.checkpoints.save()
            self.checkpoints.wait()
            if reason == STOPPED:
                self.report.event(f"stopped by {stop.received}; resume with the same command and --resume auto")
                self.report.status(state="stopped", reason=stop.received)
                return EXIT_STOPPED
            # Of the main process alone: a launcher ends the others' work when one fails.
            return 0 if self._finish(reason) or not self.accelerator.is_main_process else 1
        except OutOfMemory as error:
            if self.accelerator.num_processes == 1:  # several may be at different steps; they have the last checkpoint
                self._complete_step(self.train_step.finish(), stop)
                self.checkpoints.save()
                self.checkpoints.wait()
            self.report.failed(error)
            raise OutOfMemory(f"{error} Then resume with --resume auto.") from None
        except BaseException as error:
            self.report.failed(error)
            raise
        finally:
            self.checkpoints.join_writer()
            self.report.close()
            self.setup.folder.release()

    def _train(self, stop: StopSignal) -> str:
        """Trains until something ends the run; returns what, `STOPPED` for a signal."""
        presets, progress = self.config.training_presets, self.progress
        limit = presets.max_train_minutes
        if limit is not None and progress.train_seconds >= 60 * limit:  # resumed; the same on all processes
            return f"the limit of {limit:g} minutes of training"
        if progress.step == 0:
            progress.steps_per_epoch = self.setup.steps_per_epoch
            self._validate("before training")
        while progress.epoch < presets.num_epochs:
            if progress.stops_early(presets):
                return f"no improvement in {progress.early_stopping_bad_epochs} epochs (early stopping)"
            try:
                reason = self._train_epoch(stop)
            except RollBack:
                self._roll_back()
                continue
            if reason == STOPPED:
                return reason
            if reason is not None:  # the time limit, within an epoch
                self._end_epoch(self._validate("time limit"), complete=False)
                self.checkpoints.save()
                return reason
            progress.epoch += 1
            progress.batch = 0
            is_best = self._end_epoch(self._validate(f"epoch {progress.epoch}"))
            is_last = progress.epoch == presets.num_epochs or progress.stops_early(presets)
            if is_last or progress.epoch % self.config.output.sample_every_epochs == 0:
                with self._ema_applied():
                    label = f"epoch_{progress.epoch:04d}"
                    on_main_process(self.accelerator, lambda label=label: self._save_grids(self.model, label))
            if self.checkpoints.is_due_at_epoch(is_best, is_last):
                self.checkpoints.save()
            push_every = self.config.hub.push_every_epochs
            if push_every is not None and not is_last and progress.epoch % push_every == 0:
                self.checkpoints.wait()  # the best checkpoint's model is uploaded
                on_main_process(self.accelerator, self._publish)
        return f"{presets.num_epochs} epochs"

    def _train_epoch(self, stop: StopSignal) -> str | None:
        """Trains the rest of the current epoch; returns None at its end, else what ends the run.

        The device computes a step while the host reads the values of the step before and launches the next one.
        """
        presets, progress, max_batches = self.config.training_presets, self.progress, self.setup.max_batches
        remaining = None if max_batches is None else max_batches - progress.batch
        if remaining == 0:
            return None
        batches = self.stream.epoch_batches(progress.epoch, start_batch=progress.batch, max_batches=remaining)
        self._clock, self._waited, self._save_due = time.monotonic(), self.stream.wait_seconds, False
        with contextlib.closing(batches):
            for batch in batches:
                # Not right after a step: at the end of an epoch the epoch's own checkpoint is enough.
                if self._save_due or self.checkpoints.images_due:
                    if reason := self._complete_step(self.train_step.finish(), stop):
                        return reason
                    if progress.skipped_in_a_row == 0:  # never return to a series of skipped steps
                        self.checkpoints.save()
                        self._clock, self._save_due = time.monotonic(), False
                self.learning_rate.before_step(progress.step, progress.fraction(presets.num_epochs))
                previous = self.train_step(
                    batch.pixels,
                    step=progress.step,
                    beta=self.kl.beta(progress.epoch, progress.images_seen, progress.log_beta),
                    resolution=presets.resolution(progress.epoch),
                    adversarial_weight=progress.adversarial_weight,
                    flags=lambda: self._flags(stop),
                )
                reason = self._complete_step(previous, stop)
                progress.log_beta = self.kl.log_beta  # of the next step: known without waiting for this one
                progress.step += 1
                progress.batch += 1
                progress.images_seen += presets.batch_size
                if self.setup.adversarial_weight is not None:
                    progress.adversarial_weight = self.setup.adversarial_weight.value(progress.images_seen)
                self._example_ids = batch.example_ids
                log_due = progress.step == 1 or progress.step % self.config.output.log_every_steps == 0
                if log_due or reason is not None:
                    reason = self._complete_step(self.train_step.finish(), stop) or reason
                if log_due and progress.has_measurements:
                    self.report.step_metrics()
                    self._clock = time.monotonic()
                if reason is not None:
                    return reason
        return self._complete_step(self.train_step.finish(), stop)

    def _flags(self, stop: StopSignal) -> dict[str, bool]:
        """Conditions of this process that all processes must know."""
        limit, seconds = self.config.training_presets.max_train_minutes, self.progress.train_seconds
        return {
            "stopping": stop.received is not None,
            "out_of_time": limit is not None and seconds + time.monotonic() - self._clock > 60 * limit,
            "save_due": self.checkpoints.minutes_due,
            "written": self.checkpoints.is_written,
        }

    def _complete_step(self, result: StepResult | None, stop: StopSignal) -> str | None:
        """Records the values of a step, if there is one; returns what ends the run, or None.

        Raises:
            RollBack: See `_check_step`.
        """
        if result is None:
            return None
        presets, progress = self.config.training_presets, self.progress
        if result.flags["written"]:
            self.checkpoints.wait()
        self._check_step(result)
        self._save_due |= result.flags["save_due"]
        if not result.skipped:
            self.kl.observe(
                kl=result.terms["kl"],
                reconstruction=result.terms["reconstruction"],
                num_images=presets.batch_size,
                epoch=progress.epoch,
                images_seen=progress.images_seen,
            )
            if self.setup.adversarial_weight is not None:
                self.setup.adversarial_weight.observe(result.terms, presets.batch_size, progress.images_seen)
        now, waited = time.monotonic(), self.stream.wait_seconds
        overflow = result.skipped and self.accelerator.scaler is not None  # of fp16: no measurement
        progress.add_step(
            None if overflow else result.terms,
            beta=result.beta,
            grad_norm=result.grad_norm,
            max_grad_norm=presets.max_grad_norm,
            seconds=now - self._clock,
            waited=waited - self._waited,
        )
        self._clock, self._waited = now, waited
        if result.flags["stopping"]:
            stop.received = stop.received or "a signal to another process"
            return STOPPED
        if result.flags["out_of_time"]:
            return f"the limit of {presets.max_train_minutes:g} minutes of training"
        return None

    def _check_step(self, result: StepResult) -> None:
        """Reports a smaller micro-batch and skipped steps; rolls back once after too many in a row, then gives up."""
        progress, limit = self.progress, self.config.training_presets.max_skipped_in_a_row
        if result.halved:
            size = self.train_step.micro_batch
            self.report.event(f"out of memory: micro_batch_size is now {size} (gradients stay the same)", "warning")
        if not result.skipped:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        shown = ", ".join(self._example_ids[:4])
        if self.accelerator.scaler is None:  # in fp16, overflows are how the scaler finds its scale
            self.report.event(
                f"step {progress.step} skipped: the gradient is not finite (images {shown}, ...)", "warning"
            )
        if progress.skipped_in_a_row < limit:
            return
        if progress.rollbacks == 0 and self.checkpoints.exists():
            raise RollBack
        when = "again, after a roll-back to a checkpoint" if progress.rollbacks else "before the first checkpoint"
        raise RuntimeError(
            f"{limit} steps in a row had no finite gradient, {when} (learning rate {self.learning_rate.value:.2e}, beta "
            f"{result.beta:.2e}, last images {shown}): the checkpoints in "
            f"{self.run_dir / 'checkpoints'} are intact; resume with a lower training_presets.learning_rate, or with "
            "training_presets.mixed_precision=no."
        )

    def _roll_back(self) -> None:
        """Returns to the newest valid checkpoint and continues with another example order."""
        step, rollbacks = self.progress.step, self.progress.rollbacks + 1
        self.train_step.finish()  # the one after the last skipped step: forgotten
        checkpoint, saved = self.checkpoints.roll_back()
        self.progress.rollbacks = rollbacks
        self.setup.apply_progress(saved)
        self.tracker.rewind(self.progress.step, self.progress.epoch)
        self.report.event(
            f"rolled back from step {step} to {checkpoint.name}: {self.config.training_presets.max_skipped_in_a_row} "
            "steps in a row had no finite gradient; training continues with another example order",
            "warning",
        )

    # ------------------------------------------------------------------ validation and the end of an epoch

    def _ema_applied(self) -> contextlib.AbstractContextManager:
        """The model has the EMA weights inside, if there are any."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied(self.setup.parameters)

    @float32_without_tf32()
    def _validate(self, when: str) -> Validation:
        """Measures the EMA weights on the validation images; logs, and updates the model's latent scaling."""
        with self._ema_applied():
            result = validate(
                self.accelerator,
                self.model,
                self.setup.validation_images,
                self.setup.validation_indices,
                batch=self.train_step.micro_batch,
                loss=self.setup.loss,
                lpips_trunk=self.setup.eval_lpips_trunk,
            )
        self.report.validation(when, result)
        self.progress.latents = result.latent_scaling
        self.model.register_to_config(**result.latent_scaling)
        return result

    def _end_epoch(self, result: Validation, complete: bool = True) -> bool:
        """Applies a validation to the learning rate, early stopping and the best model; returns whether it is best."""
        presets, progress = self.config.training_presets, self.progress
        values = {f"validation/{name}": value for name, value in result.values.items()}
        loss = values[self.checkpoints.best_metric]
        if complete:
            before, after = self.learning_rate.after_epoch(loss, progress.step)
            if after < before:
                patience = presets.plateau_patience
                self.report.event(f"learning rate {before:.2e} -> {after:.2e}: no improvement in {patience} epochs")
        is_best = self.checkpoints.update_best(loss, values, presets.plateau_threshold)
        if is_best:
            progress.early_stopping_bad_epochs = 0
        elif complete:
            progress.early_stopping_bad_epochs += 1
        self.report.status()
        return is_best

    def _save_grids(self, model: nn.Module, label: str) -> None:
        """Saves grids of samples and reconstructions of a model."""
        settings = {
            "num_samples": self.config.output.num_samples,
            "seed": self.config.training_presets.seed,
            "batch": self.train_step.micro_batch,
        }
        with self.tracker.guard("image grids"):
            images = self.setup.validation_images
            self.report.grids(image_grids(self.accelerator, model, images, **settings), label)
        folder = self.run_dir / PRIORS / "diffusion"
        if folder.is_dir():
            with self.tracker.guard("the grid of the diffusion prior"):
                prior = DiffusionPrior.from_pretrained(folder).to(self.accelerator.device)
                grid = diffusion_grid(self.accelerator, model, prior, **settings)
                self.report.grids({"samples_diffusion": grid}, label)

    # ------------------------------------------------------------------ the end

    def _finish(self, reason: str) -> bool:
        """Exports and publishes the best model; returns `_publish`'s result."""
        output, progress = self.config.output, self.progress
        if progress.best is None:  # its checkpoint could not be written, or has been damaged since
            self._end_epoch(self._validate("at the end"), complete=False)
            self.checkpoints.save()
            self.checkpoints.wait()
        if progress.best is None:
            raise RuntimeError(
                f"there is no model to export: no checkpoint could be written (make room, then --resume), or no validation "
                f"was finite; see {self.run_dir / 'training.log'}."
            )
        best, model_dir = progress.best, Path(output.model_dir) / f"vae_{output.run_name}"
        if self.accelerator.is_main_process:
            source = self.checkpoints.best_model_dir
            model = AutoencoderKLUltra.from_pretrained(source, use_safetensors=True)
            try:
                export_model(source, model_dir, self.run_dir / PRIORS)
            except OSError as error:
                self.report.event(f"cannot export to {model_dir} ({error}); the model is in {source}", "warning")
                model_dir = source
            self._save_grids(model.to(self.accelerator.device), "final")
        lpips = next(name for name in best if name.startswith("validation/lpips_"))  # its network when it was measured
        self.report.event(
            f"finished: {reason}; best model of step {best['step']}: validation PSNR {best['validation/psnr']:.2f} dB, "
            f"{lpips.removeprefix('validation/')} {best[lpips]:.4f}, MSE {best['validation/mse']:.5f} on [-1, 1]",
        )
        self.report.status(state="finished", reason=reason, model_dir=str(model_dir), seconds_left=0.0)
        logger.info("model        %s", model_dir)
        logger.info("grids        %s", self.run_dir / "samples")
        for name, command in self.tracker.viewers():
            logger.info("%-12s %s", name, command)
        return on_main_process(self.accelerator, self._publish)

    def _publish(self) -> bool:
        """Uploads the model and its card if `hub.push` is set; returns whether nothing failed, and logs what did."""
        if not self.config.hub.push:
            return True
        try:
            logger.info("published    %s", publish(self.run_dir, self.config.hub))
            return True
        except Exception as error:  # of the Hub or the network; the model is on disk
            self.report.event(
                f"the upload failed ({type(error).__name__}: {error}); retry with: "
                f"{publish_command(self.run_dir, self.config.hub)}",
                "warning",
            )
            return False
