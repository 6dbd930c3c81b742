"""The training run: builds the pieces from a configuration, then one loop that says what happens when.

`train(config, resume)` is the whole run; train_vae.py is its command line. What a step does is in step.py, what an
epoch's images are in data.py, what beta does in kl.py, what is measured in validation.py.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, parse_flag_from_env
from diffusers.training_utils import EMAModel
from torch import Tensor

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training import hub
from training.budget import describe_plan
from training.build import build_model, build_optimizer, cpu_computes_bf16, micro_batch_size, resolve_precision
from training.checkpoint import check_resume, find_checkpoint, read_state, save_checkpoint, write_json
from training.config import COLLECTIVE_TIMEOUT_S, Config, config_from_dict
from training.data import TrainStream, load_validation
from training.export import export_model
from training.figures import Progress, ProgressLine
from training.kl import KLController
from training.linear_init import fit_linear_path, freeze_linear_path
from training.losses import LossWeights
from training.perceptual import PerceptualTrunk
from training.signals import StopSignal
from training.step import TrainStep
from training.tracking import Tracker, setup_logging
from training.validation import Validation, reconstruction_grid, sample_grid, validate

logger = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request with a checkpoint; `--resume auto` goes on
SIGNALLED = "a signal"
MAX_SKIPPED_IN_A_ROW = 20  # steps without a finite gradient before the run gives up
GRID_IMAGES = 8  # validation images in the grid of reconstructions

# Of the plateau scheduler; its settings come from the configuration, which a resume may change.
PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class Trainer:
    """A run, built and ready: `Trainer(config, resume).run()`.

    Args:
        config: The configuration.
        resume: None, "auto" or a path (see `find_checkpoint`).

    Raises:
        ValueError: Anything that the configuration, the files or the machine do not allow, before training starts.
    """

    def __init__(self, config: Config, resume: str | None = None) -> None:
        self.config = config
        presets, output = config.training_presets, config.output
        # The main process fits the linear path while the others wait for it in their first collective.
        patience = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S))
        accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if accumulation != "1":
            raise ValueError(
                f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {accumulation}: accumulation follows from "
                "training_presets.batch_size and micro_batch_size; remove gradient_accumulation_steps from the accelerate "
                "configuration."
            )
        # Said to both: by itself PartialState would not listen to the launcher's choice, nor see several processes
        # where there is no GPU.
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        state = PartialState(cpu=cpu, **patience.to_kwargs())
        device, launched = state.device, int(os.environ.get("WORLD_SIZE", "1"))
        if state.num_processes != launched:
            raise ValueError(
                f"{launched} processes were launched but do not find each other (each sees {state.num_processes}): set "
                "ACCELERATE_USE_CPU=true to train on the CPU, or launch one process."
            )
        precision, source = resolve_precision(presets.mixed_precision, device)
        checkpoint = None
        if resume is not None:
            checkpoint = find_checkpoint(resume, Path(output.runs_dir), output.run_name)
        self.run_dir = self._run_dir(checkpoint)
        self.accelerator = accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            log_with="tensorboard",
            project_config=ProjectConfiguration(project_dir=str(self.run_dir), logging_dir=str(self.run_dir)),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, static_graph=False, broadcast_buffers=False)
            ],
        )
        setup_logging(accelerator, None)
        self.micro_batch = micro_batch_size(config, accelerator.num_processes)
        self.model = build_model(config)
        side = self.model.config.sample_size
        notes = []  # for the log, once it has a file
        if checkpoint is not None:
            notes = check_resume(config, checkpoint)
        elif resume is not None:
            notes = [f"--resume auto: no checkpoint of {output.run_name} in {output.runs_dir}, starting anew"]
        if config.hub.push:
            hub.check_access(config.hub)

        with accelerator.main_process_first():  # the first may download, the others find it in the cache
            self.trunk = self._trunk(config.loss.trunk) if config.loss.needs_trunk else None
            same = self.trunk is not None and output.eval_lpips_trunk == config.loss.trunk
            self.lpips_trunk = self.trunk if same else self._trunk(output.eval_lpips_trunk)
        for trunk, key in ((self.trunk, "loss.trunk"), (self.lpips_trunk, "output.eval_lpips_trunk")):
            seen = min(config.loss.perceptual_crop_px or side, side) if key == "loss.trunk" else side
            if trunk is not None and seen < trunk.min_size:
                raise ValueError(
                    f"{key} {trunk.name} needs images or crops of {trunk.min_size} pixels, these have {seen}: use larger "
                    "ones, or another trunk."
                )

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

        if checkpoint is not None:
            self.stream.check_resume(read_state(checkpoint)["data"])
        if (self.stream.num_rows or presets.batch_size) < presets.batch_size:
            raise ValueError(
                f"training_presets.batch_size {presets.batch_size} is more than the {self.stream.num_rows} training "
                f"images of {config.data.dataset}: use a smaller batch or more data."
            )

        # Everything that a user can get wrong has been checked; from here on files are written.
        if accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=checkpoint is not None)
            write_json(self.run_dir / "config.json", config.to_dict())
        setup_logging(accelerator, self.run_dir / "training.log")
        logger.info("run       %s", self.run_dir)
        logger.info("device    %s, precision %s (from %s)", accelerator.device, precision, source)
        if precision == "bf16" and device.type == "cpu" and not cpu_computes_bf16():
            logger.warning(
                "this CPU has no bfloat16 instructions: bf16 is emulated, slower than float32 (auto avoids it)"
            )
        plan = describe_plan(config, accelerator.num_processes, self.num_train_images)
        for line in (*plan.splitlines(), *notes):
            logger.info(line)

        freeze_linear_path(self.model, presets.linear_lr_scale)
        if checkpoint is None and self.model.linear_path is not None and accelerator.is_main_process:
            self._fit_linear_path()
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
            self.ema = EMAModel(
                self.parameters, decay=presets.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=presets.ema_power
            )
            self.ema.to(accelerator.device)
            accelerator.register_for_checkpointing(self.ema)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            factor=presets.plateau_factor,
            patience=presets.plateau_patience,
            threshold=presets.plateau_threshold,
            min_lr=[presets.min_learning_rate * group["lr_scale"] for group in self.optimizer.param_groups],
        )
        self.kl = KLController(presets, controlled=presets.kl_control_enabled)
        loss = config.loss
        self.weights = LossWeights(loss.mse_weight, loss.l1_weight, loss.perceptual_weight, loss.lpips_weight)
        model_config = self.model.config
        self.train_step = TrainStep(
            accelerator,
            prepared_model,
            prepared_optimizer,
            self.parameters,
            ema=self.ema,
            trunk=self.trunk,
            weights=self.weights,
            seed=presets.seed,
            latent_shape=(model_config.latent_channels, model_config.latent_size, model_config.latent_size),
            micro_batch=self.micro_batch,
            crop_px=loss.perceptual_crop_px,
            max_grad_norm=presets.max_grad_norm,
        )
        self.progress = Progress()
        if checkpoint is not None:
            self._load(checkpoint)
        self.tracker = Tracker(
            accelerator,
            self.run_dir,
            config.flat(),
            {
                "num_epochs": presets.num_epochs,
                "steps_per_epoch": self.steps_per_epoch,
                "model_dir": None,
                **self._standing,
            },
        )
        steps = self.steps_per_epoch
        total_steps = None if steps is None else steps * presets.num_epochs
        self.progress_line = ProgressLine(total_steps, self.progress.step)

    # ------------------------------------------------------------------ building

    def _trunk(self, name: str) -> PerceptualTrunk:
        trunk = PerceptualTrunk(name, self.config.loss.trunk_weights).to(self.accelerator.device)
        return trunk.to(memory_format=torch.channels_last) if self.config.training_presets.channels_last else trunk

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

    def _run_dir(self, checkpoint: Path | None) -> Path:
        if checkpoint is not None:
            return checkpoint.parent.parent
        output = self.config.output
        name = [f"{output.run_name}_{datetime.datetime.now():%Y%m%d_%H%M%S}"]  # the main process's clock counts
        return Path(output.runs_dir) / broadcast_object_list(name)[0]

    def _fit_linear_path(self) -> None:
        """Fit the linear path on the first images of the stream; on the main process alone."""
        presets = self.config.training_presets
        started = time.monotonic()
        wanted = presets.linear_init_images
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
        result = fit_linear_path(self.model, images, presets.linear_noise_fraction)
        logger.info(
            "linear path fitted on %d images in %.0f s: %d components keep %.2f %% of the variance, KL %.2f nats a "
            "number",
            len(images),
            time.monotonic() - started,
            result["components"],
            100 * result["kept_fraction"],
            result["kl_per_number"],
        )

    # ------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        state = {
            "config": self.config.to_dict(),
            "progress": vars(self.progress),
            "plateau": {key: self.plateau.state_dict()[key] for key in PLATEAU_STATE},
            "kl": self.kl.state_dict(),
            "processes": self.accelerator.num_processes,
            "data": self.stream.identity,
        }
        save_checkpoint(self.accelerator, self.run_dir, self.progress.step, state, self.config.output.keep_checkpoints)

    def _load(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self.accelerator.load_state(str(checkpoint))
        # The optimizer's settings came back with its state, but they are the configuration's to say.
        presets, saved = self.config.training_presets, config_from_dict(state["config"]).training_presets
        for group in self.optimizer.param_groups:
            group["lr"] *= presets.learning_rate / saved.learning_rate
            group["betas"], group["weight_decay"] = (presets.adam_beta1, presets.adam_beta2), presets.weight_decay
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self.progress = Progress(**state["progress"])
        self.plateau.load_state_dict(state["plateau"])
        self.kl.load_state_dict(state["kl"])
        if state["processes"] != self.accelerator.num_processes:
            logger.warning(
                "resumed on %d processes instead of %d: the images and noise of each step stay the same, sums round "
                "differently",
                self.accelerator.num_processes,
                state["processes"],
            )
        logger.info("resumed from %s: epoch %d, step %d", checkpoint, self.progress.epoch, self.progress.step)

    # ------------------------------------------------------------------ the loop

    def run(self) -> int:
        """Train to the end, or until a signal.

        Returns:
            0 when finished (all epochs, early stopping or the time limit), `EXIT_STOPPED` after a signal.

        Raises:
            DataError: The source fails for good, or too many images are unreadable; the last checkpoint is intact.
            RuntimeError: The gradients stay infinite; likewise.
        """
        try:
            with StopSignal() as stop:
                reason = self._train(stop)
            if reason is None:
                self._save()
                self.tracker.event(
                    f"stopped by {stop.received}; continue with --resume auto", "info", **self.progress.where
                )
                self.tracker.update_status(state="stopped", reason=stop.received, **self._standing)
                return EXIT_STOPPED
            self._finish(reason)
            return 0
        except BaseException as error:
            logger.error("failed: %s: %s", type(error).__name__, error)
            self.tracker.update_status(state="failed", reason=f"{type(error).__name__}: {error}", **self._standing)
            raise
        finally:
            self.progress_line.close()
            self.tracker.close()

    @property
    def _standing(self) -> dict[str, Any]:
        """Where the run stands, for status.json."""
        best = self.progress.best
        return {
            "best": best and {key: value for key, value in best.items() if not isinstance(value, list)},
            "plateau_bad_epochs": self.plateau.num_bad_epochs,
            "early_stopping_bad_epochs": self.progress.early_stopping_bad_epochs,
            **self.progress.where,
        }

    def _train(self, stop: StopSignal) -> str | None:
        """Epochs until something ends them; returns what, or None for a signal."""
        presets, output, progress = self.config.training_presets, self.config.output, self.progress
        if progress.step == 0:
            self._validate("before training")
        while progress.epoch < presets.num_epochs:
            bad_epochs = progress.early_stopping_bad_epochs
            if presets.early_stopping_patience and bad_epochs >= presets.early_stopping_patience:
                return f"no improvement in {bad_epochs} epochs (early stopping)"
            ended = self._train_epoch(stop)
            if ended is None:
                progress.epoch += 1
                progress.batch = 0
                last = progress.epoch == presets.num_epochs
                self._epoch_end(self._validate(f"epoch {progress.epoch}"))
                if last or progress.epoch % output.sample_every_epochs == 0:
                    self._save_grids(f"epoch_{progress.epoch:04d}")
                if last or progress.epoch % output.checkpoint_every_epochs == 0:
                    self._save()
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
            clock, waited = time.monotonic(), self.stream.wait_seconds
            for batch in batches:
                self._set_learning_rate()
                beta = self.kl.beta(progress.epoch, progress.images_seen)
                result = self.train_step(batch.pixels, step=progress.step, beta=beta)
                parts, stopping = self._agree(result.parts, stop.received is not None)
                progress.step += 1
                progress.batch += 1
                progress.images_seen += presets.batch_size
                self._guard(result.skipped, batch.row_ids)
                if not result.skipped:
                    self.kl.observe(
                        kl=parts["kl"],
                        reconstruction=parts["reconstruction"],
                        num_images=presets.batch_size,
                        epoch=progress.epoch,
                        images_seen=progress.images_seen,
                    )
                now = time.monotonic()
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
                    self._log_figures()
                    clock = time.monotonic()
                if stopping:
                    stop.received = stop.received or "a signal to another process"
                    return SIGNALLED
                limit = presets.max_train_minutes
                if limit is not None and self._agree_any(progress.train_seconds > 60 * limit):
                    return f"the limit of {limit:g} minutes of training"
        return None

    def _set_learning_rate(self) -> None:
        """The linear warm-up; afterwards the rate belongs to the plateau scheduler."""
        presets, step = self.config.training_presets, self.progress.step
        if step <= presets.lr_warmup_steps:
            factor = min(1.0, (step + 1) / (presets.lr_warmup_steps + 1))
            for group in self.optimizer.param_groups:
                group["lr"] = presets.learning_rate * group["lr_scale"] * factor

    def _agree(self, parts: dict[str, Tensor], stop: bool) -> tuple[dict[str, float], bool]:
        """Mean loss terms over processes, and whether any process was asked to stop: one collective, one transfer."""
        names = list(parts)
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        vector = torch.stack([*(parts[name] for name in names), flag])
        if self.accelerator.num_processes > 1:
            vector = self.accelerator.reduce(vector, reduction="mean")
        *values, stops = vector.tolist()
        return dict(zip(names, values)), stops > 0

    def _agree_any(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item() > 0)

    def _guard(self, skipped: bool, row_ids: list[str]) -> None:
        """Count steps without a finite gradient, and give up when they do not end."""
        progress = self.progress
        if not skipped:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        if self.accelerator.scaler is None:  # in fp16, overflows are how the scaler finds its scale
            shown = ", ".join(row_ids[:4])
            self.tracker.event(
                f"step {progress.step}: the gradient is not finite, nothing was updated (images {shown}, ...)",
                "warning",
                **self.progress.where,
            )
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"{progress.skipped_in_a_row} steps in a row without a finite gradient: the last checkpoint in "
                f"{self.run_dir / 'checkpoints'} is intact; resume it with a lower training_presets.learning_rate."
            )

    def _log_figures(self) -> None:
        """One line of figures: means over the steps since the last."""
        presets, progress = self.config.training_presets, self.progress
        values = progress.take_window(
            presets,
            self.kl,
            latent_numbers=self.model.config.latent_numbers,
            learning_rate=self.optimizer.param_groups[0]["lr"],
        )
        left = progress.seconds_left(presets, self.steps_per_epoch, values["speed/images_per_second"])
        self.tracker.log("train", values, **progress.where)
        self.tracker.update_status(state="running", seconds_left=left, **progress.where)
        if self.accelerator.is_main_process:
            self.progress_line.show(progress, values, left)

    # ------------------------------------------------------------------ validation, best model, grids, the end

    @contextlib.contextmanager
    def _averaged_weights(self):
        """The model with the averaged weights, if there are any."""
        if self.ema is None:
            yield self.model
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield self.model
        finally:
            self.ema.restore(self.parameters)

    def _validate(self, when: str) -> Validation:
        progress = self.progress
        with self._averaged_weights() as model:
            result = validate(
                self.accelerator,
                model,
                self.validation_images,
                self.validation_indices,
                batch=self.micro_batch,
                weights=self.weights,
                trunk=self.trunk,
                lpips_trunk=self.lpips_trunk,
                crop_px=self.config.loss.perceptual_crop_px,
            )
        lpips = f"lpips_{self.lpips_trunk.name}"
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
            self.model.config.latent_numbers,
        )
        values = {f"validation/{name}": value for name, value in result.values.items()}
        values["validation/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.tracker.log("validation", values, **self.progress.where)
        self.tracker.histogram("validation/kl_of_number", result.kl_of_number, progress.step)
        if result.sigma_at_bound_fraction > 0.01:
            self.tracker.event(
                f"{100 * result.sigma_at_bound_fraction:.0f} % of the posterior's sigmas sit at a bound: beta is far "
                "too small or far too large (see kl/beta)",
                "warning",
                **self.progress.where,
            )
        return result

    def _epoch_end(self, result: Validation, complete: bool = True) -> None:
        """What a validation decides: the learning rate, early stopping, the best model."""
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
        if progress.best is None or math.isnan(best) or loss < best * (1 - presets.plateau_threshold):
            progress.early_stopping_bad_epochs = 0
            progress.best = {
                "epoch": progress.epoch,
                "step": progress.step,
                **{f"validation/{name}": value for name, value in result.values.items()},
                "channel_mean": result.channel_mean.tolist(),
                "channel_std": result.channel_std.tolist(),
            }
            self._export(self.run_dir / "best", progress.best)
        elif complete:
            progress.early_stopping_bad_epochs += 1
        self.tracker.update_status(**self._standing)

    def _export(self, folder: Path, measured: dict[str, Any]) -> None:
        """Save the averaged weights as `from_pretrained` loads them, with the measured scaling of the latents."""
        with self._averaged_weights() as model:
            model.register_to_config(
                scaling_factor=1.0 / max(measured["validation/latents_std"], 1e-6),
                shift_factor=measured["validation/latents_mean"],
                latents_mean=measured["channel_mean"],
                latents_std=measured["channel_std"],
            )
            if self.accelerator.is_main_process:
                export_model(model, folder)
        self.accelerator.wait_for_everyone()

    def _save_grids(self, label: str) -> None:
        if not self.accelerator.is_main_process:
            return
        name, step = self.config.output.run_name, self.progress.step
        images = self.validation_images[:GRID_IMAGES]
        with self._averaged_weights() as model:
            model.eval()
            samples = sample_grid(
                self.accelerator,
                model,
                self.config.output.num_samples,
                self.config.training_presets.seed,
                self.micro_batch,
            )
            pairs = reconstruction_grid(self.accelerator, model, images)
            model.train()
        sampled = f"{name}_final_samples.png" if label == "final" else f"{name}_samples_{label}.png"
        self.tracker.image("samples", samples, step, sampled)
        self.tracker.image("reconstructions", pairs, step, f"{name}_reconstructions_{label}.png")

    def _finish(self, reason: str) -> None:
        """Export the best model and say where everything is."""
        output = self.config.output
        model_dir = Path(output.model_dir) / f"vae_{output.run_name}"
        if self.accelerator.is_main_process:
            best = AutoencoderKLUltra.from_pretrained(self.run_dir / "best")
            export_model(best, model_dir)
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
        if self.config.hub.push and self.accelerator.is_main_process:
            try:
                logger.info("published    %s", hub.push(model_dir, self.config.hub))
            except (
                Exception
            ) as error:  # of the Hub or the network; the model is on disk, and the upload can be repeated
                self.tracker.event(
                    f"the upload failed ({type(error).__name__}: {error}); repeat it with: hf upload "
                    f"{self.config.hub.repo_id} {model_dir}",
                    "warning",
                    **self.progress.where,
                )
        self.accelerator.wait_for_everyone()

    def _lpips_text(self, figures: dict[str, Any]) -> str:
        name = f"lpips_{self.lpips_trunk.name}"
        return f"{name} {figures[f'validation/{name}']:.4f}"


def train(config: Config, resume: str | None = None) -> int:
    """Run a training; returns the process's exit code."""
    return Trainer(config, resume).run()
