"""FaceVAEPipeline: images from a VAE and the priors that were fitted to its latents, as a diffusers pipeline.

    pipe = FaceVAEPipeline.from_pretrained("model_weights/vae_quickstart").to("cuda")
    pipe(num_images=4, prior="gaussian", generator=torch.Generator().manual_seed(0)).images[0].save("face.png")

`save_pretrained` writes this file and the sources of the components beside the weights, so that
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads the pipeline where this project is not
installed. Therefore, this file imports nothing of the project.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from torch import Tensor

FITTED_PRIORS = ("gaussian", "mixture", "flow")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")

Generators = torch.Generator | list[torch.Generator] | None
Images = Image.Image | np.ndarray | Tensor | list[Image.Image] | list[np.ndarray] | list[Tensor]


class FaceVAEPipeline(DiffusionPipeline):
    """Samples, reconstructs and interpolates faces.

    Args:
        vae: An `AutoencoderKLUltra`.
        gaussian, mixture, flow: Fitted priors (`LatentPrior`) of that kind, or None.

    Raises:
        ValueError: A prior's dimension is not that of the VAE's latent.
    """

    model_cpu_offload_seq = "gaussian->mixture->flow->vae"
    _optional_components = list(FITTED_PRIORS)

    def __init__(
        self,
        vae: ModelMixin,
        gaussian: ModelMixin | None = None,
        mixture: ModelMixin | None = None,
        flow: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, gaussian=gaussian, mixture=mixture, flow=flow)
        for name in self.fitted_priors:
            prior_dim = getattr(self, name).config.latent_dim
            if prior_dim != vae.config.latent_dim:
                raise ValueError(
                    f"the prior {name!r} has {prior_dim} dimensions and the latent of the VAE has "
                    f"{vae.config.latent_dim}: fit the prior to the latents of this VAE."
                )
        self.image_processor = VaeImageProcessor(do_resize=False)

    @property
    def fitted_priors(self) -> list[str]:
        """Names of the fitted priors that this pipeline has."""
        return [name for name in FITTED_PRIORS if getattr(self, name) is not None]

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> FaceVAEPipeline:
        """Loads a saved pipeline, or an exported VAE with the fitted priors in its folder `priors`.

        Runs the classes of this project, not the sources that were saved with the weights.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id.
            **kwargs: Passed to `from_pretrained` of every component, such as `torch_dtype`. Options of the Hub
                (`revision`, `token`, `cache_dir`, ...) are used for the download.

        Raises:
            OSError: There is no such model.
            ValueError: Weights are missing, or a prior does not fit the VAE.
        """
        # `as`: diffusers searches this file for imports and would ask users to install what is not on their path.
        import modeling.autoencoder_kl_ultra as autoencoder_kl_ultra
        import modeling.latent_prior as latent_prior

        hub_options = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            repo_id = str(pretrained_model_name_or_path)
            folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"], **hub_options))
        is_pipeline = (folder / cls.config_name).is_file()
        vae_folder, prior_folder = (folder / "vae", folder) if is_pipeline else (folder, folder / "priors")
        vae = autoencoder_kl_ultra.AutoencoderKLUltra.from_pretrained(vae_folder, **kwargs)
        missing = [name for name, parameter in vae.named_parameters() if parameter.is_meta]
        if missing:  # diffusers only warns
            raise ValueError(f"the weights in {vae_folder} lack {', '.join(missing)}: download or export them again.")
        priors = {
            name: latent_prior.LatentPrior.from_pretrained(prior_folder / name, **kwargs)
            for name in FITTED_PRIORS
            if (prior_folder / name / "config.json").is_file()
        }
        pipeline = cls(vae, **priors)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes `model_index.json` and the Python sources; called by `save_pretrained`.

        `model_index.json` names each class of this project by its file (without a package), as diffusers expects of
        custom pipelines and components.
        """
        super().save_config(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)
        sources = {folder: type(self)}
        for name, component in self.components.items():
            if component is not None and not type(component).__module__.startswith("diffusers."):
                sources[folder / name] = type(component)
                index[name] = [Path(inspect.getfile(type(component))).stem, type(component).__name__]
        index["_class_name"] = [Path(inspect.getfile(type(self))).stem, type(self).__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for destination, component_class in sources.items():
            source = Path(inspect.getfile(component_class))
            if source.resolve() != (destination / source.name).resolve():
                shutil.copyfile(source, destination / source.name)

    # ------------------------------------------------------------------ latents

    def _prior(self, name: str | None) -> ModelMixin | None:
        """The prior of that name (None: the last that was fitted); None for N(0, I)."""
        if name is None:
            name = ["standard", *self.fitted_priors][-1]
        if name == "standard":
            return None
        if name not in FITTED_PRIORS:
            raise ValueError(f"prior {name!r} does not exist: use one of standard, {', '.join(FITTED_PRIORS)}.")
        if getattr(self, name) is None:
            raise ValueError(
                f"this model has no fitted prior {name!r} (it has {', '.join(['standard', *self.fitted_priors])}): fit "
                f"it with `python -m training.fit_prior {self.name_or_path or 'MODEL'} --data IMAGES --priors {name}`."
            )
        return getattr(self, name)

    def prior_mean(self, prior: str | None = None) -> Tensor:
        """The mean of a prior, (C, h, w): zero for N(0, I)."""
        fitted, shape = self._prior(prior), self.vae.latent_shape
        return torch.zeros(shape) if fitted is None else fitted.mean.view(shape)

    @torch.no_grad()
    def sample_latents(
        self,
        num_images: int = 1,
        prior: str | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Samples latents from a prior, (num_images, C, h, w); see `__call__`."""
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}.")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a number of at least 0, got {temperature}.")
        generators = generator if isinstance(generator, list) else [generator] * num_images
        if len(generators) != num_images:
            raise ValueError(f"generator must be one generator or {num_images}, got a list of {len(generators)}.")
        fitted = self._prior(prior)
        if fitted is not None:
            latents = fitted.sample(num_images, generators, temperature)
        else:
            shape, device = (1, self.vae.config.latent_dim), self._execution_device
            noise = torch.cat([randn_tensor(shape, each, device, torch.float32) for each in generators])
            latents = temperature * noise
        return latents.view(num_images, *self.vae.latent_shape)

    @torch.no_grad()
    def encode(self, images: Images) -> Tensor:
        """The posterior means of images, (N, C, h, w).

        Args:
            images: One or several PIL images (cropped to a centered square and resized to the VAE's `sample_size`),
                arrays (H, W, 3) or tensors (3, H, W) in [0, 1].
        """
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, list):
            images = [self._to_square(image) if isinstance(image, Image.Image) else image for image in images]
        pixels = self.image_processor.preprocess(images).to(self._execution_device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.mode()

    def _to_square(self, image: Image.Image) -> Image.Image:
        size = (self.vae.config.sample_size, self.vae.config.sample_size)
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), size, Image.Resampling.LANCZOS)

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil", batch_size: int = 8) -> Any:
        """Decodes latents (N, C, h, w), `batch_size` at once, to images; see `__call__` for `output_type`."""
        latents = latents.to(self._execution_device, self.vae.dtype)
        images = torch.cat([self.vae.decode(part).sample for part in latents.split(batch_size)])
        return self.image_processor.postprocess(images, output_type)

    # ------------------------------------------------------------------ images

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        prior: str | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
        batch_size: int = 8,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images: samples latents from a prior and decodes them.

        Args:
            num_images: Number of images.
            prior: "standard" for N(0, I), or a prior fitted to training latents: "gaussian", "mixture" or "flow".
                None for the last of these that was fitted.
            temperature: Factor of the standard normal noise that a prior transforms; below 1 samples closer to the
                mean, with less variety and fewer artifacts.
            generator: One generator, from which the images are sampled one after the other, or one for each image.
                The images do not depend on `batch_size`, and the first images not on `num_images` (up to rounding).
            batch_size: Images decoded at once.
            output_type: "pil"; "np" for an array (N, H, W, 3) in [0, 1]; "pt" for a tensor (N, 3, H, W) in [0, 1].
            return_dict: False for a plain tuple.

        Returns:
            `images`.

        Raises:
            ValueError: The prior was not fitted, or an argument is out of range.
        """
        latents = self.sample_latents(num_images, prior, temperature, generator)
        images = self.decode(latents, output_type, batch_size)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def reconstruct(self, images: Images, output_type: str = "pil", batch_size: int = 8) -> Any:
        """Decodes the posterior means of images; see `encode` and `__call__`."""
        return self.decode(self.encode(images), output_type, batch_size)

    def interpolate(
        self,
        start: Images,
        end: Images,
        steps: int = 9,
        prior: str | None = None,
        output_type: str = "pil",
        batch_size: int = 8,
    ) -> Any:
        """Images from `start` to `end`, by spherical interpolation around the mean of a prior.

        Args:
            start, end: One image each, as for `encode`.
            steps: Number of images, both ends included; at least 2.
            prior, output_type, batch_size: See `__call__`.
        """
        latents = interpolate_latents(self.encode(start)[0], self.encode(end)[0], steps, self.prior_mean(prior))
        return self.decode(latents, output_type, batch_size)


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Spherical linear interpolation (Shoemake 1985, section 3.3), with linear interpolation of the norm.

    Samples of a Gaussian in many dimensions have almost the same norm. Points on the line between two of them have a
    smaller one, 0.71 times as large in the middle, and are therefore unlike any sample.

    Args:
        start, end: Of one shape.
        fraction: 0 for the start, 1 for the end.
    """
    a, b = start.flatten().double().cpu(), end.flatten().double().cpu()
    norm_a, norm_b = a.norm(), b.norm()
    cosine = torch.clamp(a @ b / (norm_a * norm_b), -1, 1)
    angle = torch.arccos(cosine)
    if not torch.sin(angle) >= 1e-6:  # the same or opposite directions, or a norm of 0 (NaN)
        return torch.lerp(start, end, fraction)
    direction = torch.sin((1 - fraction) * angle) * a / norm_a + torch.sin(fraction * angle) * b / norm_b
    norm = (1 - fraction) * norm_a + fraction * norm_b
    return (norm / torch.sin(angle) * direction).to(start).view_as(start)


def interpolate_latents(
    start: Tensor, end: Tensor, steps: int, center: Tensor | None = None, linear: bool = False
) -> Tensor:
    """Latents from `start` to `end`, (steps, C, h, w).

    Args:
        start, end: (C, h, w).
        steps: Number of latents, both ends included; at least 2.
        center: Center of the spherical interpolation, (C, h, w), such as the mean of the prior; default zero.
        linear: Interpolate linearly instead.

    Raises:
        ValueError: Fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}.")
    fractions = [index / (steps - 1) for index in range(steps)]
    if linear:
        return torch.stack([torch.lerp(start, end, fraction) for fraction in fractions])
    center = torch.zeros_like(start) if center is None else center.to(start)
    return torch.stack([center + slerp(start - center, end - center, fraction) for fraction in fractions])
