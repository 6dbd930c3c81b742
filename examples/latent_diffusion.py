"""A minimal latent diffusion model on the latents of an exported VAE.

    python examples/latent_diffusion.py model_weights/vae_ultra_spatial --images FOLDER --steps 5000 --output samples.png
    python examples/latent_diffusion.py model_weights/vae_ultra_spatial --images FOLDER --steps 300
    python examples/latent_diffusion.py model_weights/vae_ultra_spatial --latents FOLDER --steps 5000

Needs torch, diffusers and Pillow, not this project: `AutoModel` loads the VAE from a folder or the Hub, with the source
that is saved with the weights. The images are encoded once, or `--latents` names the shards that `python -m
training.encode` has written; a residual MLP learns the velocity of flow matching (Lipman
et al. 2022, https://arxiv.org/abs/2210.02747); diffusers' Euler scheduler samples new latents, and the VAE decodes them.
The second command took 46 s on one CPU core (AMD EPYC, 256 images of 64x64 pixels). For good images, replace `Velocity`
by one of diffusers' transformers and train for hours.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoModel, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Velocity(nn.Module):
    """A residual MLP over all latent dimensions: (N, C, h, w) and times (N,) in [0, 1000] to velocities."""

    def __init__(self, latent_dim: int, width: int, blocks: int) -> None:
        super().__init__()
        self.time = nn.Sequential(
            Timesteps(128, flip_sin_to_cos=True, downscale_freq_shift=0), TimestepEmbedding(128, width)
        )
        self.first = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.last = nn.Linear(width, latent_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, latents: Tensor, times: Tensor) -> Tensor:
        h, time = self.first(latents.flatten(1)), self.time(times)
        for block in self.blocks:
            h = h + block(h + time)
        return self.last(h).view_as(latents)


@torch.no_grad()
def encode_folder(vae: nn.Module, folder: Path, limit: int, batch: int = 16) -> Tensor:
    """Encodes the images in a folder, (n, C, h, w); the VAE's measured scaling gives mean 0 and variance 1."""
    size, device = vae.config.sample_size, vae.device
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[:limit]
    if not files:
        raise ValueError(f"--images {folder} has no images ({', '.join(IMAGE_SUFFIXES)}).")
    processor, latents = VaeImageProcessor(), []
    for start in range(0, len(files), batch):
        batch_images = [
            ImageOps.fit(Image.open(path).convert("RGB"), (size, size)) for path in files[start : start + batch]
        ]
        latents.append(vae.encode(processor.preprocess(batch_images).to(device)).latent_dist.sample())
    return (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor


def load_latents(folder: Path, limit: int) -> Tensor:
    """One sample of each posterior in the safetensors shards of a folder, (n, C, h, w); they are scaled already."""
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    if not shards:
        raise ValueError(f"--latents {folder} has no safetensors shards: write them with `python -m training.encode`.")
    mean, std = (torch.cat([shard[name] for shard in shards])[:limit] for name in ("mean", "std"))
    return mean + std * torch.randn(mean.shape)


def train(network: nn.Module, latents: Tensor, steps: int, batch: int, generator: torch.Generator) -> list[float]:
    """Trains the velocity noise - latents on the straight path between them; returns the loss of each step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        clean = latents[torch.randint(len(latents), (batch,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        sigma = torch.rand(batch, generator=generator).to(clean)  # 0 is an image, 1 is noise, as in the scheduler
        s = sigma[:, None, None, None]
        loss = F.mse_loss(network((1 - s) * clean + s * noise, 1000 * sigma), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def sample(
    network: nn.Module, shape: tuple[int, ...], device: torch.device, steps: int, generator: torch.Generator
) -> Tensor:
    """Samples latents of a shape by Euler steps from noise."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps, device=device)
    latents = torch.randn(shape, generator=generator).to(device)
    for time in scheduler.timesteps:
        velocity = network(latents, time.expand(shape[0]))
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    return latents


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a small latent diffusion on an exported model's latents.")
    parser.add_argument("model", metavar="MODEL", help="folder of an exported VAE, or a Hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="FOLDER", help="training images")
    source.add_argument("--latents", type=Path, metavar="FOLDER", help="latents by `python -m training.encode`")
    parser.add_argument("--max-images", type=int, default=100_000, metavar="N")
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="training steps (2,000)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--width", type=int, default=512, metavar="N", help="width of the network (512)")
    parser.add_argument("--sample-steps", type=int, default=50, metavar="N", help="Euler steps per sample (50)")
    parser.add_argument("--num-samples", type=int, default=16, metavar="N", help="images in the grid (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("latent_diffusion.png"), metavar="FILE", help="image grid to write"
    )
    arguments = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    try:
        vae = AutoModel.from_pretrained(arguments.model, trust_remote_code=True).to(device).eval()
        if arguments.latents is not None:
            latents = load_latents(arguments.latents, arguments.max_images).to(device)
        else:
            latents = encode_folder(vae, arguments.images, arguments.max_images)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(latents)} latents {tuple(latents.shape[1:])}: mean {latents.mean():.3f}, variance {latents.var():.3f}")

    network = Velocity(latents[0].numel(), arguments.width, blocks=4).to(device)
    losses = train(network, latents, arguments.steps, arguments.batch_size, generator)
    tenth = max(1, len(losses) // 10)
    print(f"loss {sum(losses[:tenth]) / tenth:.3f} at the start, {sum(losses[-tenth:]) / tenth:.3f} at the end")

    shape = (arguments.num_samples, *latents.shape[1:])
    samples = sample(network.eval(), shape, device, arguments.sample_steps, generator)
    print(f"samples: mean {samples.mean():.3f}, variance {samples.var():.3f}")
    with torch.no_grad():
        images = vae.decode(samples / vae.config.scaling_factor + vae.config.shift_factor).sample
    rows = max(n for n in range(1, math.isqrt(len(images)) + 1) if len(images) % n == 0)
    grid = make_image_grid(VaeImageProcessor().postprocess(images), rows=rows, cols=len(images) // rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    grid.save(arguments.output)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
