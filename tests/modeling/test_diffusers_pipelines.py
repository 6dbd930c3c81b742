"""diffusers' own pipelines, built with a spatial model: they read its configuration and decode with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
)
from tiny_stable_diffusion import stable_diffusion

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra

TEXT = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(1, 4)
PROMPT = {"prompt_embeds": TEXT, "guidance_scale": 1.0}


def spatial_vae(patch_size: int = 2) -> AutoencoderKLUltra:
    """32 pixels to 4 channels of 8 x 8."""
    stages = {1: 3, 2: 2, 4: 1}[patch_size]
    torch.manual_seed(0)
    vae = AutoencoderKLUltra(
        sample_size=32,
        latent_dim=256,
        latent_layout="spatial",
        latent_channels=4,
        latent_size=8,
        patch_size=patch_size,
        encoder_block_out_channels=(8, 16, 16)[:stages],
        encoder_layers_per_block=(1,) * stages,
        decoder_block_out_channels=(8, 16, 16)[:stages],
        decoder_layers_per_block=(1,) * stages,
        pca_size=None,
    )
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.1)
    return vae.eval()


def text_to_image(vae):
    return stable_diffusion(vae), PROMPT


def image_to_image(vae):
    pipe = stable_diffusion(vae, StableDiffusionImg2ImgPipeline)
    return pipe, PROMPT | {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def stable_diffusion_3(vae):
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    parts = dict.fromkeys(names)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )
    return pipe, {"prompt_embeds": TEXT, "pooled_prompt_embeds": TEXT[:, 0], "guidance_scale": 1.0}


def pixart(vae):
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    pipe = PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=DDIMScheduler()
    )
    arguments = {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 1.0}
    return pipe, arguments | {"prompt_embeds": TEXT, "prompt_attention_mask": MASK}


def flux(vae):
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    return pipe, {"prompt_embeds": TEXT, "pooled_prompt_embeds": TEXT[:, 0], "guidance_scale": 1.0}


def sana(vae):
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    pipe = SanaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler()
    )
    arguments = {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 1.0}
    return pipe, arguments | {"prompt_embeds": TEXT, "prompt_attention_mask": MASK}


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("build", [text_to_image, image_to_image, stable_diffusion_3, pixart, flux])
def test_a_pipeline_takes_the_model(build, patch_size):
    vae = spatial_vae(patch_size)
    pipe, arguments = build(vae)
    assert pipe.vae_scale_factor == vae.spatial_compression_ratio == 4
    check_images(pipe, arguments)


def test_sana_takes_a_model_without_patches():
    check_images(*sana(spatial_vae(patch_size=1)))
    # It counts the encoder's stages, and the patch is none of them: docs/guides/latent-diffusion.md names what to set.
    pipe, arguments = sana(spatial_vae(patch_size=2))
    assert pipe.vae_scale_factor == 2
    pipe.vae_scale_factor = pipe.vae.spatial_compression_ratio
    check_images(pipe, arguments)


def check_images(pipe, arguments) -> None:
    """The images are those of the model's own `decode` of the latents that the pipeline passed to it."""
    pipe.set_progress_bar_config(disable=True)
    decoded = []
    decode = pipe.vae.decode

    def spy(z, *args, **kwargs):
        decoded.append(z.clone())
        return decode(z, *args, **kwargs)

    pipe.vae.decode = spy
    if not isinstance(pipe, StableDiffusionImg2ImgPipeline):
        arguments = arguments | {"height": 32, "width": 32}
    images = pipe(num_inference_steps=2, output_type="np", **arguments).images
    assert images.shape == (1, 32, 32, 3)
    (latents,) = decoded
    assert latents.shape == (1, 4, 8, 8)
    expected = (decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().float().numpy()
    np.testing.assert_allclose(images, expected, atol=1e-6)


def test_the_configuration_has_what_pipelines_read_of_an_autoencoder():
    """Each pipeline of diffusers takes 2 ** (len(block_out_channels) - 1) for the compression ratio."""
    assert 2 ** (len(AutoencoderKL().config.block_out_channels) - 1) == 1
    for patch_size in (1, 2, 4):
        config = spatial_vae(patch_size).config
        assert 2 ** (len(config.block_out_channels) - 1) == 4 and config.force_upcast is False
    assert "block_out_channels" not in AutoencoderKLUltra().config  # the vector layout is no map
