"""Encodes a data set to shards of latents, for training a latent diffusion model.

    python -m training.encode model_weights/vae_ultra_spatial --config configs/ultra_spatial.json --output latents
    torchrun --nproc_per_node 8 -m training.encode MODEL --data imagefolder:faces --output latents --format parquet

Each shard holds `mean` and `std` of the posteriors, (n, C, h, w) float32, with the model's scaling: `mean + std * noise`
has mean 0 and variance 1 over the data set, and `latents / scaling_factor + shift_factor` is what the model decodes.
A safetensors shard lists the images' ids in its metadata, a parquet shard in the column `id`. Shards are written
atomically; the same command skips those that exist. Processes divide the shards and do not exchange anything else.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.cli import add_option, data_source, positive_int, resolve_model, run, select_device
from training.config import DataConfig, config_from_dict, load_config
from training.io import file_sha256, write_file, write_json
from training.launch import check_launch_environment
from training.run_files import WEIGHTS, read_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "latents.json"
logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.encode", description="Encode a data set to shards of latents."
    )
    add_option(parser, "model")
    add_option(parser, "--data")
    add_option(parser, "--config", help="configuration whose section data names the images, instead of --data")
    add_option(parser, "--set")
    parser.add_argument("--split", choices=["train", "validation"], default="train", help="default: train")
    add_option(parser, "--crop-px")
    add_option(parser, "--resolution")
    add_option(parser, "--output", required=True, metavar="DIR", help="folder for the shards and latents.json")
    parser.add_argument("--format", choices=["safetensors", "parquet"], default="safetensors", help="of the shards")
    parser.add_argument(
        "--shard-size", type=positive_int, default=4096, metavar="N", help="images per shard (default: %(default)s)"
    )
    add_option(parser, "--batch-size", default=32)
    add_option(parser, "--device")
    return parser


def _data_config(arguments: argparse.Namespace) -> DataConfig:
    if (arguments.data is None) == (arguments.config is None):
        raise ValueError("give either --data or --config, which name the images.")
    if arguments.overrides and arguments.config is None:
        raise ValueError("--set changes a configuration: give --config.")
    if arguments.config is not None:
        settings = load_config(arguments.config, arguments.overrides).to_dict()["data"]
    else:
        settings = data_source(arguments.data, arguments.split)
    if arguments.crop_px is not None:
        settings["crop_px"] = arguments.crop_px
    return config_from_dict({"data": settings}).data


def _encode(arguments: argparse.Namespace) -> None:
    data = _data_config(arguments)
    check_launch_environment()
    import torch

    from training.data.images import CorruptImage, decode_image, normalize
    from training.data.order import open_examples
    from training.data.shards import encoded_bytes
    from training.data.stream import decode_pool
    from training.distributed import join_processes
    from training.evaluate.models import load_autoencoder

    state = join_processes()
    device = state.device if state.num_processes > 1 else select_device(arguments.device)
    source = resolve_model(arguments.model)
    model = load_autoencoder(arguments.model, None, arguments.resolution, device)
    scale, shift = source.config.get("scaling_factor") or 1.0, source.config.get("shift_factor") or 0.0
    examples = open_examples(data, arguments.split)
    folder, shard_size, weights = arguments.output, arguments.shard_size, Path(source.path) / WEIGHTS
    index = {
        "model": arguments.model,
        "weights_sha256": file_sha256(weights) if weights.is_file() else None,
        "data": json.loads(json.dumps(examples.identity)),
        "crop_px": data.crop_px,
        "resolution": model.resolution,
        "scaling_factor": scale,
        "shift_factor": shift,
        "format": arguments.format,
        "shard_size": shard_size,
    }
    _check_index(folder, index)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / INDEX, index)
    state.wait_for_everyone()

    def decode(reference: Any) -> tuple[str, Any]:
        try:
            image_bytes, example_id = encoded_bytes(examples.read(reference))
            return example_id, torch.from_numpy(decode_image(image_bytes, data.crop_px, model.resolution))
        except CorruptImage as error:
            logger.warning("corrupt image skipped: %s", error)
            return "", None

    references = examples.first()
    with decode_pool(data) as pool, torch.no_grad():
        for number in itertools.count():
            shard = list(itertools.islice(references, shard_size))
            if not shard:
                break
            path = folder / f"latents_{number:05d}.{arguments.format}"
            if number % state.num_processes != state.process_index or path.exists():
                continue
            decoded = (each for each in pool.map(decode, shard) if each[1] is not None)
            ids: list[str] = []
            parts: dict[str, list[Tensor]] = {"mean": [], "std": []}
            while batch := list(itertools.islice(decoded, arguments.batch_size)):
                names, images = zip(*batch)
                ids += names
                mean, logvar = model.encode(normalize(torch.stack(images).permute(0, 3, 1, 2).to(device)))
                parts["mean"].append(((mean - shift) * scale).cpu())
                parts["std"].append((torch.zeros_like(mean) if logvar is None else (logvar / 2).exp() * scale).cpu())
            if ids:
                tensors = {name: torch.cat(values).contiguous() for name, values in parts.items()}
                write_file(path, shard_bytes(ids, tensors, arguments.format))
                logger.info("%s: %d latents", path, len(ids))
    state.wait_for_everyone()
    if state.is_main_process:
        files = sorted(folder.glob(f"latents_*.{arguments.format}"))
        if not files:
            raise ValueError(f"no image of {data.dataset!r} is readable: nothing was written.")
        count, shape = _count_latents(files)
        write_json(folder / INDEX, index | {"images": count, "latent_shape": shape, "shards": [f.name for f in files]})
        print(f"{folder}: {count} latents {'x'.join(map(str, shape))} in {len(files)} shards")
    state.destroy_process_group()


def _check_index(folder: Path, index: dict[str, Any]) -> None:
    """Check that the shards in a folder, if there are any, come from the same model, images and settings."""
    if not any(folder.glob("latents_*.*")):
        return
    saved = read_json(folder / INDEX)
    changed = [key for key, value in index.items() if saved.get(key) != value]
    if changed:
        raise ValueError(
            f"{folder} holds latents of other settings ({', '.join(changed)}): give another --output, or remove them."
        )


def shard_bytes(ids: list[str], tensors: dict[str, Tensor], kind: str) -> bytes:
    """A shard as the content of a file.

    Args:
        ids: Of the images.
        tensors: `mean` and `std`, (n, C, h, w).
        kind: "safetensors" or "parquet", whose columns are flat lists.
    """
    if kind == "safetensors":
        from safetensors.torch import save

        return save(tensors, metadata={"ids": json.dumps(ids)})
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: pa.FixedSizeListArray.from_arrays(t.numpy().ravel(), t[0].numel()) for name, t in tensors.items()}
    shape = json.dumps(list(tensors["mean"].shape[1:]))
    table, buffer = pa.table({"id": ids, **columns}).replace_schema_metadata({"latent_shape": shape}), io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _count_latents(files: Sequence[Path]) -> tuple[int, list[int]]:
    """The number of latents in shards, and the shape of one."""
    if files[0].suffix == ".safetensors":
        from safetensors import safe_open

        shapes = []
        for path in files:
            with safe_open(path, "pt") as file:
                shapes.append(file.get_slice("mean").get_shape())
        return sum(shape[0] for shape in shapes), shapes[0][1:]
    import pyarrow.parquet as pq

    footers = [pq.read_metadata(path) for path in files]
    return sum(footer.num_rows for footer in footers), json.loads(footers[0].metadata[b"latent_shape"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run(_encode, arguments)


if __name__ == "__main__":
    sys.exit(main())
