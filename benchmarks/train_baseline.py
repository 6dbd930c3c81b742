"""Trains an `AutoencoderKL` baseline with our loss on our data, to compare quality after equal training time.

    python -m benchmarks.train_baseline --config configs/ultra.json --model baseline_1024 --minutes 10 --output baseline
    python -m training.evaluate baseline/10 --config configs/ultra.json

The models are those of `compare_baseline`; batches, loss terms, learning rate, clipping and EMA weights are the
configuration's, beta stays at kl_beta_init. After each of --minutes of training (saving excluded) the EMA weights are saved in
a folder of that name. One process, without resume and validation.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.compare_baseline import BASELINES, build_baseline, optimizer_class
from benchmarks.step import add_common_arguments, read_config
from modeling.autoencoder_kl_ultra import AutoencoderKLUltraOutput
from training.config import Config
from training.data.stream import TrainStream
from training.distributed import resolve_precision
from training.ema import EMAWeights
from training.losses.objective import ReconstructionLoss
from training.step import TrainStep


class BaselineModel(nn.Module):
    """A baseline with the signature that `TrainStep` calls: the posterior noise is an argument."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, noise: Tensor) -> AutoencoderKLUltraOutput:
        """Reconstruct images (N, 3, H, W) with standard normal noise (N, C, h, w)."""
        posterior = self.model.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        return AutoencoderKLUltraOutput(sample=self.model.decode(latents).sample, posterior=posterior)


def build_step(config: Config, name: str) -> tuple[AutoencoderKL, TrainStep]:
    """The baseline with fresh weights, and its training step.

    Args:
        config: Of its model section only `sample_size` is used.
        name: Key of `BASELINES`.
    """
    presets = config.training_presets
    torch.manual_seed(presets.seed)
    cpu = not torch.accelerator.is_available()
    precision, _ = resolve_precision(presets.mixed_precision, torch.device("cpu") if cpu else torch.device("cuda"))
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    layout = torch.channels_last if presets.channels_last else torch.contiguous_format
    model = build_baseline(name).to(accelerator.device, memory_format=layout)
    if presets.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    wrapped = BaselineModel(model).train()
    parameters = list(wrapped.parameters())
    kind = optimizer_class(presets)
    betas = (presets.adam_beta1, presets.adam_beta2)
    optimizer = kind(parameters, lr=presets.learning_rate, betas=betas, weight_decay=presets.weight_decay)
    ema = EMAWeights(parameters, decay=presets.ema_decay, use_ema_warmup=True, power=presets.ema_power)
    stages = len(BASELINES[name]["block_out_channels"])
    latent_size = config.model["sample_size"] // 2 ** (stages - 1)
    micro = presets.micro_batch_size
    step = TrainStep(
        accelerator,
        *accelerator.prepare(wrapped, optimizer),
        parameters,
        ema=ema if presets.ema_decay > 0 else None,
        loss=ReconstructionLoss.from_config(config.loss, accelerator.device, memory_format=layout),
        seed=presets.seed,
        latent_shape=(BASELINES[name]["latent_channels"], latent_size, latent_size),
        micro_batch=micro if isinstance(micro, int) else presets.batch_size,
        adapt_micro_batch=micro == "auto",
        max_grad_norm=presets.max_grad_norm,
        augment=presets.augment,
    )
    return model, step


def train(config: Config, name: str, minutes: Sequence[float], output: Path) -> Iterator[str]:
    """Train, and save the EMA weights at each of the given times.

    Args:
        config: See `build_step`.
        name: Key of `BASELINES`.
        minutes: Training times at which to save, in any order.
        output: Folder for the saved models.

    Yields:
        A line to print after each save.
    """
    presets = config.training_presets
    model, step = build_step(config, name)
    stream = TrainStream(
        config.data,
        resolution=config.model["sample_size"],
        seed=presets.seed,
        global_batch=presets.batch_size,
        rank=0,
        world_size=1,
    )
    remaining = sorted(minutes)
    num_steps, epoch, seconds = 0, 0, 0.0
    while remaining:
        for batch in stream.epoch_batches(epoch):
            began = time.perf_counter()
            step(batch.pixels, step=num_steps, beta=presets.kl_beta_init)
            loss = step.finish().terms["reconstruction"]
            seconds += time.perf_counter() - began
            num_steps += 1
            if seconds >= 60 * remaining[0]:
                folder = output / f"{remaining.pop(0):g}"
                model.register_to_config(sample_size=config.model["sample_size"])
                with contextlib.nullcontext() if step.ema is None else step.ema.applied(step.parameters):
                    model.save_pretrained(folder)
                images = num_steps * presets.batch_size
                yield f"{folder}: {seconds / 60:.1f} minutes, {num_steps} steps, {images} images, loss {loss:.4f}"
                if not remaining:
                    return
        epoch += 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_baseline", description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--model", choices=tuple(BASELINES), default="baseline_1024")
    parser.add_argument("--minutes", nargs="+", type=float, required=True, help="training times at which to save")
    parser.add_argument("--output", required=True, metavar="DIR", help="gets a folder for each of --minutes")
    parser.set_defaults(batch=None, rounds=None)
    arguments = parser.parse_args(argv)
    try:
        if not all(0 < value < float("inf") for value in arguments.minutes):
            raise ValueError(f"--minutes {arguments.minutes}: use numbers above 0.")
        config = read_config(arguments)
        if arguments.trunk_weights is not None:
            raise ValueError("--trunk-weights does nothing here: use --set loss.trunk_weights=DIR.")
        for line in train(config, arguments.model, arguments.minutes, Path(arguments.output)):
            print(line, flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
