"""Autoencoders behind one interface, so that one measurement serves ours, diffusers' own, and a linear floor.

What it is for: finding out from `config.json` which class a folder or Hub repository holds, loading it completely, and
giving latents and images in the same terms for all. What it is not for: measuring (evaluation.py).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import diffusers
import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from torch import Tensor, nn

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.data.images import normalize
from training.data.shards import in_one_line
from training.data.stream import TrainStream
from training.pca_init import principal_components

logger = logging.getLogger(__name__)

# All of them take images in [-1, 1] and give images in [-1, 1]; others in diffusers take video or [0, 1].
CLASSES = {
    "AutoencoderKLUltra": AutoencoderKLUltra,
    "AutoencoderKL": diffusers.AutoencoderKL,
    "AutoencoderDC": diffusers.AutoencoderDC,
    "AutoencoderTiny": diffusers.AutoencoderTiny,
}
_CHUNK = 64  # images turned to float at once


class Autoencoder:
    """An autoencoder as the measurement sees it.

    Attributes:
        name: As the user gave it.
        class_name: Of the model.
        resolution: Side of the images, pixels.
        num_parameters: Of encoder and decoder together.
    """

    def __init__(self, name: str, model: nn.Module, resolution: int) -> None:
        self.name, self.model, self.resolution = name, model, resolution
        self.class_name = type(model).__name__
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, 3, H, W) in [-1, 1] to the posterior's mean and log-variance, (N, C, h, w), float32.

        A model without a posterior gives its latents, and None.
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
        """Pass one grey image through.

        Raises:
            ValueError: The model cannot take or give images of this resolution.
        """
        shape = (1, 3, self.resolution, self.resolution)
        try:
            given = tuple(self.decode(self.encode(torch.zeros(shape, device=device))[0]).shape)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            given = in_one_line(error)
        if given != shape:
            raise ValueError(
                f"{self.name} ({self.class_name}) cannot reconstruct {self.resolution}x{self.resolution} images "
                f"({given}): give --resolution, a multiple of its downsampling factor (a vector layout takes its own "
                "sample_size only)."
            )


class PCABaseline(Autoencoder):
    """Principal components of training images: what a linear autoencoder with as many numbers achieves.

    Args:
        components: Orthonormal columns (3 x resolution^2, k).
        mean: (3 x resolution^2,).
        resolution: Side of the images, pixels.
        num_images: That they were fitted to.
    """

    def __init__(self, components: Tensor, mean: Tensor, resolution: int, num_images: int) -> None:
        self.name, self.class_name = f"PCA of {num_images:,} training images", "PCA"
        self.resolution, self.num_parameters = resolution, components.numel() + mean.numel()
        self._components, self._mean = components, mean

    def encode(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Coordinates (N, k, 1, 1), and no posterior."""
        return ((pixels.flatten(1) - self._mean) @ self._components)[:, :, None, None], None

    def decode(self, latents: Tensor) -> Tensor:
        """The nearest point of the components' plane."""
        rows = latents.flatten(1) @ self._components.T + self._mean
        return rows.view(-1, 3, self.resolution, self.resolution)


def fit_pca_baseline(config, count: int, max_images: int, resolution: int, device: torch.device) -> PCABaseline:
    """Fit principal components to training images, unmirrored. All are held in float32: 0.8 MB each at 256 pixels.

    Args:
        config: The `data` section.
        count: Components.
        max_images: Most images to fit to, in the order of a training run's first epoch.
        resolution: Side of the images, pixels.
        device: Where to compute.

    Raises:
        ValueError: No training rows, or too few for so many components.
    """
    config = dataclasses.replace(config, horizontal_flip=False)
    # Batches of one, so that no row is left over.
    stream = TrainStream(config, resolution=resolution, seed=0, global_batch=1, rank=0, world_size=1)
    images = torch.cat([batch.pixels for batch in stream.epoch_batches(0, max_batches=max_images)])
    if len(images) <= count:
        raise ValueError(
            f"--pca {count}: {len(images)} training images determine at most {len(images) - 1} components; ask for "
            "fewer, or raise --pca-images."
        )
    logger.info("fitting %d principal components to %d images of %d pixels", count, len(images), resolution)
    rows = torch.cat([normalize(part.to(device)).flatten(1) for part in images.split(_CHUNK)])
    mean = rows.mean(dim=0)
    components = principal_components(rows.sub_(mean), count)[1]
    return PCABaseline(components, mean, resolution, len(images))


def load_autoencoder(model: str, subfolder: str | None, resolution: int | None, device: torch.device) -> Autoencoder:
    """Load a model, ours or diffusers'.

    Args:
        model: Folder, or Hub id.
        subfolder: Folder inside it to look into first (`vae` in a whole pipeline).
        resolution: Side of the images; None for the model's `sample_size`.
        device: Where to.

    Raises:
        ValueError: No such model, no `config.json`, another class, incomplete weights, or no resolution.
    """
    config, place = _find_config(model, subfolder)
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"{model}: its config.json is of {'no class' if name is None else name}, and evaluated are "
            f"{', '.join(CLASSES)}; for the autoencoder of a whole pipeline give --subfolder vae."
        )
    size = resolution or config.get("sample_size")
    if not isinstance(size, int):
        raise ValueError(f"{model} ({name}) does not say its image size: give --resolution.")
    where = {"subfolder": place} if place else {}
    try:
        loaded, info = CLASSES[name].from_pretrained(
            model, output_loading_info=True, low_cpu_mem_usage=False, torch_dtype=torch.float32, **where
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{model} ({name}) cannot be loaded: {in_one_line(error)}") from error
    missing = [*info["missing_keys"], *info["mismatched_keys"]]
    if missing:
        raise ValueError(f"{model} ({name}) lacks {len(missing)} of its weights, such as {missing[0]}: fetch it anew.")
    autoencoder = Autoencoder(model, loaded.to(device).eval(), size)
    autoencoder.check(device)
    return autoencoder


def _find_config(model: str, subfolder: str | None) -> tuple[dict, str | None]:
    """`config.json` of a model, and the sub-folder it lies in."""
    folder = Path(model).expanduser()
    places = [subfolder, None] if subfolder else [None]
    if folder.exists():
        for place in places:
            path = folder / (place or "") / "config.json"
            if path.is_file():
                return _read_json(path), place
        found = ", ".join(sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/config.json")))
        hint = f"; there is one in {found}, so give --subfolder" if found else ""
        raise ValueError(f"{model} holds no config.json: give the folder of a saved model{hint}.")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        raise ValueError(f"there is no folder {model}, and it is no Hub id (name/model): give one of them.")
    for place in places:
        try:
            return _read_json(huggingface_hub.hf_hub_download(model, "config.json", subfolder=place)), place
        except hub_errors.LocalEntryNotFoundError as error:  # an EntryNotFoundError too, but of the network's making
            raise ValueError(
                f"there is no folder {model}, and the Hub does not answer ({in_one_line(error)})."
            ) from error
        except hub_errors.EntryNotFoundError:
            continue
        except hub_errors.HfHubHTTPError as error:
            raise ValueError(
                f"there is no folder {model}, and the Hub refuses the model of that name ({in_one_line(error)}): check "
                "the name, or log in (`hf auth login`)."
            ) from error
    raise ValueError(f"{model} on the Hub holds no config.json: for a whole pipeline give --subfolder vae.")


def _read_json(path: str | Path) -> dict:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not a model's configuration.")
    return values
