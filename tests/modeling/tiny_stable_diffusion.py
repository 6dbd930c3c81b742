"""A Stable Diffusion pipeline of diffusers, small enough for tests, around a spatial model."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra


def stable_diffusion(vae: AutoencoderKLUltra, cls: type = StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A pipeline of class `cls` with random weights and prompts of 8 features."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=vae.config.latent_size,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return cls(vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
