"""Loads autoencoders behind one interface: ours, diffusers' own, and a PCA baseline."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import diffusers
import huggingface_hub
import torch
from safetensors import safe_open
from torch import Tensor, nn

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.cli import resolve_model
from training.config import DataConfig
from training.data.images import normalize
from training.data.shards import in_one_line
from training.data.stream import first_training_images
from training.pca_init import principal_components
from training.run_files import WEIGHTS

logger = logging.getLogger(__name__)

# All of them take and give images in [-1, 1]; other autoencoders of diffusers take video, or images in [0, 1].
CLASSES = {
    "AutoencoderKLUltra": AutoencoderKLUltra,
    "AutoencoderKL": diffusers.AutoencoderKL,
    "AutoencoderDC": diffusers.AutoencoderDC,
    "AutoencoderTiny": diffusers.AutoencoderTiny,
}


def load_model(
    model: str,
    subfolder: str | None = None,
    *,
    device: torch.device | str = "cpu",
    classes: Sequence[str] = ("AutoencoderKLUltra",),
) -> nn.Module:
    """Load a complete model in float32 and evaluation mode.

    Args:
        model, subfolder: See `training.cli.resolve_model`.
        device: Where to put it.
        classes: Keys of `CLASSES` that are accepted.

    Raises:
        ValueError: No such model, another class, or weights that do not fit its `config.json`.
    """
    source = resolve_model(model, subfolder)
    name = source.config.get("_class_name")
    if name not in classes:
        raise ValueError(
            f"{model}: its config.json names {name or 'no class'}, which must be {' or '.join(classes)}; for the "
            "autoencoder of a pipeline give its subfolder."
        )
    try:
        # Without low_cpu_mem_usage=False, missing weights would stay on the meta device.
        # Of huggingface_hub, about an argument that diffusers passes.
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
        loaded, info = CLASSES[name].from_pretrained(
            source.path,
            subfolder=source.subfolder,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{model} ({name}) cannot be loaded: {in_one_line(error)}") from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ValueError(
            f"{model} ({name}): {len(wrong)} weights do not fit its config.json, such as {wrong[0]}: export or download "
            "it again."
        )
    return loaded.to(device).eval()


def weights_metadata(model: str, subfolder: str | None = None) -> dict[str, str]:
    """What the header of a model's weights records, such as `run` and `step` of ours; empty where there is no header.

    Args:
        model, subfolder: See `training.cli.resolve_model`; a model on the Hub must be in the cache.
    """
    source = resolve_model(model, subfolder)
    file: str | Path | None = Path(source.path, WEIGHTS)
    if not Path(source.path).is_dir():
        name = WEIGHTS if source.subfolder is None else f"{source.subfolder}/{WEIGHTS}"
        file = huggingface_hub.try_to_load_from_cache(source.path, name)
    if not isinstance(file, (str, Path)) or not Path(file).is_file():  # several shards
        return {}
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


class Autoencoder:
    """An autoencoder as `measure` sees it.

    Attributes:
        name: As the user gave it.
        class_name: Of the model.
        resolution: Size of the images, pixels.
        num_parameters: Of encoder and decoder together.
        metadata: See `weights_metadata`.
    """

    metadata: dict[str, str] = {}

    def __init__(self, name: str, model: nn.Module, resolution: int) -> None:
        self.name, self.model, self.resolution = name, model, resolution
        self.class_name = type(model).__name__
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, 3, H, W) in [-1, 1] to the posterior's mean and log-variance, (N, C, h, w), float32.

        A model without a posterior returns its latents, and None.
        """
        output = self.model.encode(pixels)
        if "latent_dist" in output:
            return output.latent_dist.mean.float(), output.latent_dist.logvar.float()
        return (output.latents if "latents" in output else output.latent).float(), None

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images (N, 3, H, W), nominally in [-1, 1], float32."""
        return self.model.decode(latents).sample.float()

    @torch.no_grad()
    def check(self, device: torch.device) -> None:
        """Reconstruct one gray image.

        Raises:
            ValueError: The model cannot reconstruct images of this resolution.
        """
        shape = (1, 3, self.resolution, self.resolution)
        try:
            result = tuple(self.decode(self.encode(torch.zeros(shape, device=device))[0]).shape)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            result = in_one_line(error)
        if result != shape:
            raise ValueError(
                f"{self.name} ({self.class_name}) cannot reconstruct {self.resolution}x{self.resolution} images "
                f"({result}): give a --resolution that is a multiple of its compression ratio (a model with a vector "
                "latent takes its own sample_size only)."
            )


class PCABaseline(Autoencoder):
    """Principal components of training images: the best linear autoencoder with as many latent dimensions.

    Args:
        components: Orthonormal columns (3 x resolution^2, k).
        mean: (3 x resolution^2,).
        resolution: Size of the images, pixels.
        num_images: Images that the components were computed from.
    """

    def __init__(self, components: Tensor, mean: Tensor, resolution: int, num_images: int) -> None:
        self.name, self.class_name = f"PCA of {num_images:,} training images", "PCA"
        self.resolution, self.num_parameters = resolution, components.numel() + mean.numel()
        self._components, self._mean = components, mean

    def encode(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Coordinates (N, k, 1, 1), and no posterior."""
        return ((pixels.flatten(1) - self._mean) @ self._components)[:, :, None, None], None

    def decode(self, latents: Tensor) -> Tensor:
        """Mean plus the components weighted by the coordinates."""
        pixels = latents.flatten(1) @ self._components.T + self._mean
        return pixels.view(-1, 3, self.resolution, self.resolution)


def fit_pca_baseline(
    data: DataConfig, count: int, max_images: int, resolution: int, device: torch.device
) -> PCABaseline:
    """Compute principal components of training images, not flipped.

    All images are held in memory as float32: 0.8 MB each at 256 pixels.

    Args:
        data: The `data` section.
        count: Components.
        max_images: Use at most so many images, in the order of a training run's first epoch.
        resolution: Size of the images, pixels.
        device: Where to compute.

    Raises:
        ValueError: No training images, or too few for so many components.
    """
    data = dataclasses.replace(data, horizontal_flip=False)
    images = first_training_images(data, resolution, 0, max_images)
    if len(images) <= count:
        raise ValueError(
            f"--pca {count}: {len(images)} training images determine at most {len(images) - 1} components; ask for "
            "fewer, or raise --pca-images."
        )
    logger.info("computing %d principal components of %d images of %d pixels", count, len(images), resolution)
    samples = torch.cat([normalize(part.to(device)).flatten(1) for part in images.split(64)])
    mean = samples.mean(dim=0)
    components = principal_components(samples.sub_(mean), count)[1]
    return PCABaseline(components, mean, resolution, len(images))


def load_autoencoder(model: str, subfolder: str | None, resolution: int | None, device: torch.device) -> Autoencoder:
    """Load a model, ours or diffusers', for `measure`.

    Args:
        model, subfolder: See `training.cli.resolve_model`.
        resolution: Size of the images; None for the model's `sample_size`.
        device: Where to put it.

    Raises:
        ValueError: See `load_model`; or the model does not take images of this resolution.
    """
    loaded = load_model(model, subfolder, device=device, classes=tuple(CLASSES))
    size = resolution or loaded.config.get("sample_size")
    if not isinstance(size, int):
        raise ValueError(f"{model} ({type(loaded).__name__}) has no sample_size in its config.json: give --resolution.")
    autoencoder = Autoencoder(model, loaded, size)
    autoencoder.metadata = weights_metadata(model, subfolder)
    autoencoder.check(device)
    return autoencoder
