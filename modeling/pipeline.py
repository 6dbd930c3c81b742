"""FaceVAEPipeline: images from a VAE and the priors that were fitted to its latents, as a diffusers pipeline.

    pipe = FaceVAEPipeline.from_pretrained("model_weights/vae_quickstart").to("cuda")
    pipe(num_images=4, generator=torch.Generator().manual_seed(0)).images[0].save("face.png")

`save_pretrained` writes this file and the sources of the components beside the weights, so that
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads the pipeline where this project is not
installed. Therefore, this file imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Mapping
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

FITTED_PRIORS = ("gaussian", "diffusion")  # from the worst to the best
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_DIRECTIONS = ("means", "ridge")  # kinds of `GaussianPrior.directions`, in its order

Generators = torch.Generator | list[torch.Generator] | None
Images = Image.Image | np.ndarray | Tensor | list[Image.Image] | list[np.ndarray] | list[Tensor]
Attributes = Mapping[str, float] | None


class FaceVAEPipeline(DiffusionPipeline):
    """Samples, reconstructs, interpolates and edits faces.

    Args:
        vae: An `AutoencoderKLUltra`.
        gaussian, diffusion: A fitted `GaussianPrior` and a trained `DiffusionPrior`, or None.

    Raises:
        ValueError: A prior's dimension is not that of the VAE's latent.
    """

    model_cpu_offload_seq = "diffusion->vae"
    _exclude_from_cpu_offload = ["gaussian"]  # 4 MB, of which parts are used without its forward
    _optional_components = list(FITTED_PRIORS)

    def __init__(
        self, vae: ModelMixin, gaussian: ModelMixin | None = None, diffusion: ModelMixin | None = None
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, gaussian=gaussian, diffusion=diffusion)
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

    @property
    def default_prior(self) -> str:
        """The prior that is used where none is named: the best that was fitted."""
        return ["standard", *self.fitted_priors][-1]

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
        vae_class = autoencoder_kl_ultra.AutoencoderKLUltra
        vae, info = vae_class.from_pretrained(vae_folder, **kwargs | {"output_loading_info": True})
        if missing := sorted(info["missing_keys"]):  # diffusers only warns
            raise ValueError(f"the weights in {vae_folder} lack {', '.join(missing)}: download or export them again.")
        classes = {"gaussian": latent_prior.GaussianPrior, "diffusion": latent_prior.DiffusionPrior}
        variant, priors = kwargs.pop("variant", None), {}
        for name in FITTED_PRIORS:
            if (prior_folder / name / "config.json").is_file():
                # `export_formats` writes variants of the VAE alone, a saved pipeline of all components.
                has_variant = variant is not None and any((prior_folder / name).glob(f"*.{variant}.*"))
                options = kwargs | ({"variant": variant} if has_variant else {})
                priors[name] = classes[name].from_pretrained(prior_folder / name, **options)
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
            component = getattr(component, "_orig_mod", component)  # of torch.compile
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

    def _prior(self, name: str | None) -> tuple[str, ModelMixin | None]:
        """The name and the prior of that name (None: the default); N(0, I), "standard", has no component."""
        name = name or self.default_prior
        if name not in ("standard", *FITTED_PRIORS):
            raise ValueError(f"prior {name!r} does not exist: use one of standard, {', '.join(FITTED_PRIORS)}.")
        if name != "standard" and getattr(self, name) is None:
            raise ValueError(
                f"this model has no fitted prior {name!r} (it has {', '.join(['standard', *self.fitted_priors])}): fit "
                f"it with `python -m training.fit_prior {self.name_or_path or 'MODEL'} --config FILE --priors {name}`."
            )
        return name, None if name == "standard" else getattr(self, name)

    @torch.no_grad()
    def sample_latents(
        self,
        num_images: int = 1,
        prior: str | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
        attributes: Attributes = None,
        guidance_scale: float | None = None,
        attribute_scale: float | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Samples latents from a prior, (num_images, C, h, w); see `__call__`."""
        noise = self.sample_noise(num_images, prior, temperature, generator)
        options = prior, attributes, guidance_scale, attribute_scale
        return torch.cat([self.noise_to_latents(part, *options) for part in noise.split(batch_size)])

    def sample_noise(
        self, num_images: int = 1, prior: str | None = None, temperature: float = 1.0, generator: Generators = None
    ) -> Tensor:
        """Samples the noise that a prior transforms, (num_images, *shape of the prior's noise); see `__call__`."""
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}.")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a number of at least 0, got {temperature}.")
        generators = generator if isinstance(generator, list) else [generator] * num_images
        if len(generators) != num_images:
            raise ValueError(f"generator must be one generator or {num_images}, got a list of {len(generators)}.")
        _, fitted = self._prior(prior)
        shape = (1, *((self.vae.config.latent_dim,) if fitted is None else fitted.noise_shape))
        noise = torch.cat([randn_tensor(shape, each, self._execution_device, torch.float32) for each in generators])
        return temperature * noise

    @torch.no_grad()
    def noise_to_latents(
        self,
        noise: Tensor,
        prior: str | None = None,
        attributes: Attributes = None,
        guidance_scale: float | None = None,
        attribute_scale: float | None = None,
    ) -> Tensor:
        """Transforms standard normal noise, in the shape of the prior, to latents (N, C, h, w); see `__call__`."""
        name, fitted = self._prior(prior)
        if attribute_scale is not None and not attributes:
            raise ValueError(f"attribute_scale {attribute_scale:g} needs attributes, whose weight it is: name some.")
        if name == "diffusion":
            return fitted.noise_to_latents(self.vae, noise, attributes, guidance_scale, attribute_scale)
        if attributes:
            raise ValueError(f"attributes need the diffusion prior, got the prior {name!r}: train one, or use `edit`.")
        if guidance_scale is not None:
            raise ValueError(f"guidance_scale needs the diffusion prior, got the prior {name!r}: leave it out.")
        if fitted is None:
            return noise.view(-1, *self.vae.latent_shape)
        return fitted.noise_to_latents(self.vae, noise)

    @torch.no_grad()
    def latents_to_noise(self, latents: Tensor, prior: str | None = None) -> Tensor:
        """The inverse of `noise_to_latents`; of the diffusion prior that with `guidance_scale=1`, approximately."""
        _, fitted = self._prior(prior)
        return latents.flatten(1) if fitted is None else fitted.latents_to_noise(self.vae, latents)

    @torch.no_grad()
    def encode(self, images: Images, batch_size: int = 8) -> Tensor:
        """The posterior means of images, (N, C, h, w).

        Args:
            images: One or several PIL images (cropped to a centered square and resized to the VAE's `sample_size`),
                arrays (H, W, 3) or tensors (3, H, W): uint8, or floating-point in [0, 1].
            batch_size: Images computed at once.

        Raises:
            ValueError: Arrays or tensors of another type or range.
        """
        if isinstance(images, list):
            images = [self._checked(image) for image in images]
        else:
            images = [self._checked(images)] if isinstance(images, Image.Image) else self._checked(images)
        pixels = self.image_processor.preprocess(images).to(self._execution_device, self.vae.dtype)
        return torch.cat([self.vae.encode(part).latent_dist.mode() for part in pixels.split(batch_size)])

    def _checked(self, image: Image.Image | np.ndarray | Tensor) -> Image.Image | np.ndarray | Tensor:
        """A PIL image as an RGB square of `sample_size`, an array or a tensor as floating-point values in [0, 1]."""
        if isinstance(image, Image.Image):
            size = (self.vae.config.sample_size, self.vae.config.sample_size)
            with contextlib.suppress(Exception):  # broken EXIF raises SyntaxError, struct.error, KeyError, ...
                image = ImageOps.exif_transpose(image)
            return ImageOps.fit(_to_rgb(image), size, Image.Resampling.LANCZOS)
        if str(image.dtype).endswith("uint8"):
            return image / 255
        lowest, highest = float(image.min()), float(image.max())
        # Resizing filters overshoot a little.
        if not -0.5 <= lowest <= highest <= 1.5 or "float" not in str(image.dtype):
            raise ValueError(
                f"arrays and tensors must be uint8 or floating-point in [0, 1], got {image.dtype} from {lowest:g} to "
                f"{highest:g}: scale them."
            )
        return image.clip(0, 1)  # below 0 diffusers would take it for [-1, 1]

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
        attributes: Attributes = None,
        guidance_scale: float | None = None,
        attribute_scale: float | None = None,
        batch_size: int = 8,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images: samples latents from a prior and decodes them.

        Args:
            num_images: Number of images.
            prior: "standard" for N(0, I), or a fitted prior: "gaussian" or "diffusion". None for `default_prior`, the
                best that was fitted.
            temperature: Factor of the standard normal noise that a prior transforms; below 1 samples closer to the
                mean, with less variety and fewer artifacts.
            generator: One generator, from which the images are sampled one after the other, or one for each image.
                The images do not depend on `batch_size`, and the first images not on `num_images` (up to rounding).
            attributes: Diffusion prior only: name -> 1 for present, 0 for absent, such as `{"Smiling": 1}`.
            guidance_scale: Diffusion prior only: above 1, faces are more plausible; from about 2 on, contrast is
                exaggerated. 1: no guidance. None for that of the prior's configuration.
            attribute_scale: Above 1, faces show the given attributes more clearly, with less variety. None for that of
                the prior's configuration.
            batch_size: Images computed at once.
            output_type: "pil"; "np" for an array (N, H, W, 3) in [0, 1]; "pt" for a tensor (N, 3, H, W) in [0, 1].
            return_dict: False for a plain tuple.

        Returns:
            `images`.

        Raises:
            ValueError: The prior was not fitted or not to these attributes, or an argument is out of range.
        """
        options = attributes, guidance_scale, attribute_scale, batch_size
        latents = self.sample_latents(num_images, prior, temperature, generator, *options)
        images = self.decode(latents, output_type, batch_size)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def reconstruct(self, images: Images, output_type: str = "pil", batch_size: int = 8) -> Any:
        """Decodes the posterior means of images; see `encode` and `__call__`."""
        return self.decode(self.encode(images, batch_size), output_type, batch_size)

    def edit(
        self,
        images: Images,
        changes: Mapping[str, float],
        directions: str = "ridge",
        output_type: str = "pil",
        batch_size: int = 8,
    ) -> Any:
        """Reconstructs images with changed attributes.

        Args:
            images: See `encode`.
            changes: Name of an attribute -> how much to change it, such as `{"Eyeglasses": 2.0}`; 1 is the mean
                difference between faces with and without it, and a negative value removes it.
            directions: "ridge", which leaves the other attributes as they are, or "means", the difference of means.
            output_type, batch_size: See `__call__`.

        Raises:
            ValueError: The Gaussian prior was not fitted, or not with these attributes.
        """
        names = () if self.gaussian is None else self.gaussian.config.attributes
        if unknown := [name for name in changes if name not in names]:
            raise ValueError(
                f"attribute {unknown[0]!r} is unknown, this model has {', '.join(names) or 'none'}: fit the Gaussian "
                "prior to data with data.attribute_columns."
            )
        if directions not in _DIRECTIONS:
            raise ValueError(f"directions must be one of {', '.join(_DIRECTIONS)}, got {directions!r}.")
        latents = self.encode(images, batch_size)
        for name, amount in changes.items():
            direction = self.gaussian.directions[_DIRECTIONS.index(directions), names.index(name)]
            latents = latents + amount * direction.to(latents).view(1, *self.vae.latent_shape)
        return self.decode(latents, output_type, batch_size)

    def interpolate(
        self,
        start: Images,
        end: Images,
        steps: int = 9,
        prior: str | None = None,
        output_type: str = "pil",
        batch_size: int = 8,
    ) -> Any:
        """Images from `start` to `end`, by spherical interpolation of the noise from which a prior makes them.

        Args:
            start, end: One image each, as for `encode`.
            steps: Number of images, both ends included; at least 2.
            prior, output_type, batch_size: See `__call__`.
        """
        latents = self.interpolate_latents(self.encode(start), self.encode(end), steps, prior)
        return self.decode(latents, output_type, batch_size)

    @torch.no_grad()
    def interpolate_latents(
        self, start: Tensor, end: Tensor, steps: int, prior: str | None = None, linear: bool = False
    ) -> Tensor:
        """Latents from `start` to `end`, each (1, C, h, w): (steps, C, h, w).

        Args:
            start, end: Latents.
            steps: Number of latents, both ends included; at least 2.
            prior: See `__call__`.
            linear: Interpolate the latents themselves linearly instead.

        Raises:
            ValueError: Fewer than two steps.
        """
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}.")
        fractions = [index / (steps - 1) for index in range(steps)]
        if linear:
            return torch.cat([torch.lerp(start, end, fraction) for fraction in fractions])
        noise = self.latents_to_noise(torch.cat([start, end]), prior)
        between = [slerp(*noise, fraction) for fraction in fractions[1:-1]]
        # Without guidance, as the noise was found.
        options = {"guidance_scale": 1.0} if self._prior(prior)[0] == "diffusion" else {}
        middle = [self.noise_to_latents(each[None], prior, **options).to(start) for each in between]
        return torch.cat([start, *middle, end])


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB as the training data is converted: 16 bits are scaled, transparency becomes white.

    Raises:
        ValueError: Pixels without a known range.
    """
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.float32)
        if image.mode == "F" or not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError(
                f"pixels of mode {image.mode} from {values.min():g} to {values.max():g} have no known range: convert them "
                "to 8 bits."
            )
        scale = 1 if image.mode == "I" and values.max() <= 255 else 257
        image = Image.fromarray((values / scale).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
