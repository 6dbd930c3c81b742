"""The pages of the demo. Needs `modeling`, gradio, torch and Pillow only, because a Space runs a copy of this file.

build_demo(FaceVAEPipeline.from_pretrained("model_weights/vae_quickstart"), ["face.jpg"]).launch(**LAUNCH)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gradio as gr
import pandas as pd
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from modeling.pipeline import FaceVAEPipeline

MAX_UPLOAD = "20mb"
LAUNCH: dict[str, Any] = {
    "max_file_size": MAX_UPLOAD,
    "show_error": True,
    "footer_links": ["gradio", "settings"],
    "theme": gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["monospace"]
    ),  # the default loads web fonts
}
_MAX_PIXELS, _MIN_SIZE_PX = 64_000_000, 16  # of uploads, as in training
_MAX_SAMPLES, _STEPS = 64, 11  # images in a grid; images of an interpolation
_DEVIATIONS = (-3, -2, -1, 0, 1, 2, 3)  # of one latent dimension
_SHOWN_DIMENSIONS = 64  # in the plot of active dimensions
_ACTIVE_VARIANCE = 0.01  # of the posterior mean over images (Burda et al. 2016, section 2)


def image_upload(label: str) -> gr.Image:
    """An image to upload, as RGB or None, whose errors are sentences.

    Its method is replaced, because Gradio writes a file beside the source of each subclass of a component.
    """
    upload = gr.Image(type="pil", label=label, sources=["upload", "clipboard"], height=260)
    decode = upload.preprocess

    def preprocess(payload: Any) -> Image.Image | None:
        if payload is None:
            return None
        try:
            with Image.open(payload.path) as header:  # decodes nothing
                width, height = header.size
            if width * height <= _MAX_PIXELS and min(width, height) >= _MIN_SIZE_PX:
                return decode(payload)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise _error("This file is not a readable image: use JPEG, PNG or WebP.") from None
        raise _error(
            f"The image has {width}x{height} pixels: it must have at least {_MIN_SIZE_PX}x{_MIN_SIZE_PX} and at most "
            f"{_MAX_PIXELS // 1_000_000} megapixels."
        )

    upload.preprocess = preprocess
    return upload


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two images of the same size, dB; at most 100."""
    # Square each channel's histogram of absolute differences.
    histogram = ImageChops.difference(image, other).histogram()
    mse = sum(count * (level % 256) ** 2 for level, count in enumerate(histogram)) / sum(histogram)
    return 10 * math.log10(255**2 / max(mse, 255**2 * 1e-10))


def strong_difference(image: Image.Image, other: Image.Image) -> Image.Image:
    """The absolute difference of two images, 4 times as strong."""
    return ImageChops.difference(image, other).point(lambda level: min(255, 4 * level))


def build_demo(pipe: FaceVAEPipeline, examples: Sequence[str], title: str = "Face VAE") -> gr.Blocks:
    """Build the demo; `launch(**LAUNCH)` starts it.

    Args:
        pipe: A model with the priors that were fitted.
        examples: Image files of faces, at least two, over which the variance of the latents is measured.
        title: Heading of the page.
    """
    size = pipe.vae.config.sample_size
    priors = ["standard", *pipe.fitted_priors]
    # Attributes of faces that the Gaussian prior has directions of, and those that the diffusion prior was trained on.
    editable, conditions = (
        [] if prior is None else list(prior.config.attributes) for prior in (pipe.gaussian, pipe.diffusion)
    )
    faces = [Image.open(path).convert("RGB") for path in examples]
    example_latents = torch.cat([pipe.encode(face) for face in faces]).flatten(1).float().cpu()
    variances, order = example_latents.var(dim=0).sort(descending=True)
    means, deviations = example_latents.mean(dim=0), example_latents.std(dim=0)
    active = int((variances > _ACTIVE_VARIANCE).sum())

    def decode_flat(latents: Tensor) -> list[Image.Image]:
        return pipe.decode(latents.view(-1, *pipe.vae.latent_shape))

    def reconstruct(image: Image.Image | None) -> tuple[list[tuple[Image.Image, str]], str]:
        _require(image)
        original = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        decoded = pipe.reconstruct(original)[0]
        difference = strong_difference(original, decoded)
        pairs = [(original, f"original, {size}x{size}"), (decoded, "reconstruction"), (difference, "difference x 4")]
        return pairs, f"PSNR {psnr(original, decoded):.2f} dB"

    def sample(
        prior: str, temperature: float, seed: float, count: float, present: list[str], guidance: float
    ) -> list[Image.Image]:
        chosen: dict[str, Any] = {"attributes": dict.fromkeys(present, 1)}
        if prior == "diffusion":
            chosen["guidance_scale"] = guidance
        try:
            return pipe(int(count), prior, temperature, _generator(seed), **chosen).images
        except ValueError as error:  # such as attributes without the diffusion prior
            raise _error(str(error)) from None

    def edit(image: Image.Image | None, *amounts: float) -> list[tuple[Image.Image, str]]:
        _require(image)
        changes = {name: amount for name, amount in zip(editable, amounts) if amount}
        return [(pipe.edit(image, {})[0], "reconstruction"), (pipe.edit(image, changes)[0], "edited")]

    def end_latents(image: Image.Image | None, seed: float, prior: str) -> Tensor:
        if image is not None:
            return pipe.encode(image)
        return pipe.sample_latents(1, prior, generator=_generator(seed))

    def interpolate(start, end, start_seed: float, end_seed: float, prior: str):
        ends = end_latents(start, start_seed, prior), end_latents(end, end_seed, prior)
        frames = pipe.decode(pipe.interpolate_latents(*ends, _STEPS, prior))
        large = [frame.resize([size * max(1, 256 // size)] * 2, Image.Resampling.BICUBIC) for frame in frames]
        return frames, large, gr.Slider(value=_STEPS // 2 + 1), large[_STEPS // 2]

    def traverse(image: Image.Image | None, rank: float) -> tuple[list[tuple[Image.Image, str]], str]:
        _require(image)
        dimension = int(order[int(rank) - 1])
        latents = pipe.encode(image).flatten(1).repeat(len(_DEVIATIONS), 1)
        steps = torch.tensor(_DEVIATIONS).to(latents)
        latents[:, dimension] = means[dimension].to(latents) + deviations[dimension].to(latents) * steps
        captions = [f"{step:+d} std" if step else "mean" for step in _DEVIATIONS]
        text = (
            f"Latent dimension {dimension}: variance {variances[int(rank) - 1]:.3f}, rank {int(rank)} of {len(order)}"
        )
        images = decode_flat(latents)
        difference = strong_difference(images[0], images[-1])
        return [*zip(images, captions), (difference, "difference x 4")], text

    # One queue: one computation at a time for all visitors and tabs.
    queue: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    gallery: dict[str, Any] = {"object_fit": "contain", "height": "auto", "interactive": False, "format": "png"}

    def offer_examples(samples: list, inputs: Any) -> None:
        gr.Examples(samples, inputs, label="synthetic faces", examples_per_page=16)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(f"# {title}\n{pipe.vae.config.latent_dim} latent dimensions for a face of {size}x{size} pixels.")
        with gr.Tab("Reconstruct"), gr.Row():
            with gr.Column(scale=2):
                image = image_upload("face, upright; the center square is used")
                button = gr.Button("Reconstruct", variant="primary")
                offer_examples(list(examples), image)
            with gr.Column(scale=3):
                output, text = gr.Gallery(label="result", columns=3, **gallery), gr.Textbox(label="quality")
            button.click(reconstruct, image, [output, text], **queue)
        with gr.Tab("Samples"):
            with gr.Row():
                prior = gr.Dropdown(priors, value=priors[-1], label="prior")
                temperature = gr.Slider(0, 1.5, value=0.8, step=0.05, label="temperature")
                seed = gr.Number(0, label="seed", precision=0)
                count = gr.Slider(1, _MAX_SAMPLES, value=16, step=1, label="images")
            with gr.Row(visible=pipe.diffusion is not None):
                present = gr.Dropdown(
                    conditions, multiselect=True, visible=bool(conditions), label="attributes, with the prior diffusion"
                )
                default = 1.0 if pipe.diffusion is None else pipe.diffusion.config.guidance_scale
                guidance = gr.Slider(
                    min(1, default),
                    max(2, default),
                    value=default,
                    step=0.05,
                    label="guidance, with the prior diffusion",
                )
            button, output = gr.Button("Sample", variant="primary"), gr.Gallery(label="samples", columns=8, **gallery)
            button.click(sample, [prior, temperature, seed, count, present, guidance], output, **queue)
        with gr.Tab("Interpolate"):
            gr.Markdown("Between two images; where one is missing, a sample of its seed takes its place.")
            with gr.Row():
                ends = [image_upload(label) for label in ("from", "to")]
            offer_examples([list(pair) for pair in zip(examples[:3], examples[3:])], ends)
            with gr.Row():
                seeds = [
                    gr.Number(value, label=f"{name} seed", precision=0) for value, name in ((1, "from"), (2, "to"))
                ]
                prior = gr.Dropdown(priors, value=priors[-1], label="prior of the samples")
            button, frames = gr.Button("Interpolate", variant="primary"), gr.State([])
            position = gr.Slider(1, _STEPS, value=1, step=1, label="position")
            shown = gr.Image(label="image", interactive=False, height=300, format="png", elem_id="shown")
            strip = gr.Gallery(label="all images", columns=_STEPS, **gallery | {"height": 140})
            button.click(interpolate, [*ends, *seeds, prior], [strip, frames, position, shown], **queue)
            position.input(lambda frames, place: frames[int(place) - 1] if frames else None, [frames, position], shown)
        with gr.Tab("Edit", visible=bool(editable)), gr.Row():
            with gr.Column(scale=2):
                image = image_upload("face")
                offer_examples(list(examples), image)
            with gr.Column(scale=3):
                output = gr.Gallery(label="result", columns=2, **gallery)
                button = gr.Button("Edit", variant="primary")
                gr.Markdown(
                    "1 is the mean difference between faces with and without the attribute; below 0 removes it."
                )
                amounts = [gr.Slider(-3, 3, value=0, step=0.25, label=name.replace("_", " ")) for name in editable]
            button.click(edit, [image, *amounts], output, **queue)
        with gr.Tab("Latent"):
            gr.Markdown(
                f"{active} of {len(order)} latent dimensions are active: their posterior mean varies by more than "
                f"{_ACTIVE_VARIANCE} over {len(faces)} synthetic faces."
            )
            shown_variances = variances[:_SHOWN_DIMENSIONS].tolist()
            table = pd.DataFrame({"rank": range(1, len(shown_variances) + 1), "variance": shown_variances})
            gr.BarPlot(table, x="rank", y="variance", title="variance of the posterior mean, largest first", height=220)
            with gr.Row():
                with gr.Column(scale=2):
                    image = image_upload("face")
                    offer_examples(list(examples), image)
                with gr.Column(scale=3):
                    rank = gr.Slider(1, len(order), value=1, step=1, label="dimension, by rank of its variance")
                    button = gr.Button("Change this dimension", variant="primary")
                    output = gr.Gallery(label="result", columns=4, **gallery)
                    text = gr.Textbox(label="dimension")
            button.click(traverse, [image, rank], [output, text], **queue)
    return demo.queue(max_size=16)


def _error(message: str) -> gr.Error:
    """An error of the visitor: shown on the page, without a traceback in the terminal."""
    return gr.Error(message, print_exception=False)


def _require(image: Image.Image | None) -> None:
    if image is None:
        raise _error("Upload an image, or choose an example.")


def _generator(seed: float | None) -> torch.Generator:
    if seed is None or not 0 <= seed < 2**63:
        raise _error(f"The seed must be an integer from 0 to {2**63 - 1}.")
    return torch.Generator().manual_seed(int(seed))
