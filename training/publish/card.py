"""The model card, written from a run: README.md with metadata for the Hub, plots and grids.

Every figure comes from the run's own files (`config.json`, `status.json`, `metrics.jsonl`, `samples/`) or from the
model's; what they do not say, the card does not say either. No path of this machine is copied. What it is not for:
uploading (hub.py), choosing the files (publish.py).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from training.config import Config
from training.publish.hub import safetensors_header
from training.publish.run_record import Result, RunRecord

CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
_LOCAL_SOURCES = {
    "synthetic_faces": "faces drawn by the training program",
    "imagefolder": "a folder of images",
    "parquet": "parquet files",
}
# Figures by the names of training.evaluate: (title, format, what it means); LPIPS and Frechet have a network in theirs.
_FIGURES = {
    "psnr": ("PSNR", "{:.2f} dB", "of images in [-1, 1], peak 2"),
    "ssim": ("SSIM", "{:.4f}", "Gaussian window of 11 pixels"),
    "mse_-1_1": ("MSE", "{:.5f}", "of images in [-1, 1]; a quarter of it in [0, 1]"),
    "l1_-1_1": ("L1", "{:.5f}", "of images in [-1, 1]"),
    "lpips": ("LPIPS ({})", "{:.4f}", "Zhang et al. 2018"),
    "frechet": ("Frechet distance ({})", "{:.3f}", "of all reconstructions to all images; not a published FID"),
    "kl": ("KL", "{:.3f} nats", "to N(0, I), a latent number"),
    "active_units": ("active units", "{:.0f}", "latent numbers whose mean has a variance above 0.01 over images"),
    "posterior_sigma": ("posterior sigma", "{:.4f}", "mean standard deviation of a latent number"),
}
_NETWORKS = {"alexnet": "AlexNet", "vgg16": "VGG16", "squeezenet": "SqueezeNet", "dinov2": "DINOv2"}
_ON_THE_HUB = {"psnr": "psnr", "ssim": "ssim", "mse_-1_1": "mse", "lpips": "lpips"}  # metrics of the model index


# ---------------------------------------------------------------------- the data


def is_celeba(config: Config) -> bool:
    """Whether the images are CelebA's, by the names of the data set and its files."""
    return "celeba" in json.dumps([config.data.dataset, config.data.data_dir, config.data.data_files]).lower()


def hub_dataset(config: Config) -> str | None:
    """Id of the data set on the Hub, if it is one."""
    return None if config.data.dataset in _LOCAL_SOURCES else config.data.dataset


def describe_data(config: Config) -> str:
    """The data in a few words, without places on this machine."""
    data = config.data
    if hub_dataset(config) is None:
        name = _LOCAL_SOURCES[data.dataset]
        return f"{name} (CelebA)" if is_celeba(config) else name
    revision = f" at revision `{data.revision}`" if data.revision else ""
    return f"[{data.dataset}](https://huggingface.co/datasets/{data.dataset}){revision}"


# ---------------------------------------------------------------------- plots


def draw_plots(record: RunRecord, folder: Path) -> list[str]:
    """Curves of the losses and of the KL control as PNG.

    Returns:
        The names of the files written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def curve(lines: list[dict], key: str) -> tuple[list[float], list[float]]:
        points = [(line["images_seen"], line[key]) for line in lines if line.get(key) is not None and line[key] > 0]
        return [x for x, _ in points], [y for _, y in points]

    losses = [
        (record.train, "loss/reconstruction", "training, reconstruction", "C0-"),
        (record.validation, "validation/reconstruction_loss", "validation, reconstruction", "C1o-"),
        (record.train, "weighted/kl", "training, beta x KL", "C2-"),
    ]
    shares = [
        (record.train, "kl/smoothed_fraction", "share of KL in the loss, smoothed", "C0-"),
        (record.train, "kl/target_low", "its band", "C7--"),
        (record.train, "kl/target_high", None, "C7--"),
        (record.train, "kl/beta", "beta", "C3-"),
    ]
    written = []
    for name, curves in (("loss", losses), ("kl", shares)):
        figure = Figure(figsize=(8, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for lines, key, label, style in curves:
            xs, ys = curve(lines, key)
            if xs:
                axes.plot(xs, ys, style, label=label, markersize=3, linewidth=1)
        if not axes.lines:
            continue
        axes.set(xlabel="training images seen", yscale="log", title={"loss": "Loss", "kl": "KL control"}[name])
        axes.grid(alpha=0.3)
        axes.legend()
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
        written.append(f"{name}.png")
    return written


# ---------------------------------------------------------------------- the card


def write_card(folder: Path, repo_id: str, record: RunRecord | None) -> None:
    """Write README.md and `images/` into a model's folder.

    Args:
        folder: Holds the exported model.
        repo_id: Where it will be published; the card's examples name it.
        record: What the run says; without it the card says what the model is, but not how it came about.
    """
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    images: list[str] = []
    if record is not None:
        images = draw_plots(record, folder / "images")
        for kind, path in record.grids.items():
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(path, folder / "images" / f"{kind}.png")
            images.append(f"{kind}.png")
    priors = sorted(path.parent.name for path in folder.glob("priors/*/config.json"))
    body = "\n\n".join(_sections(model, count_parameters(folder), repo_id, record, images, priors))
    card = ModelCard(f"---\n{_metadata(repo_id, record).to_yaml()}\n---\n\n{body}\n")
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def count_parameters(folder: Path) -> int:
    """Numbers in a model's float32 weights, from the headers of its files."""
    files = folder.glob("diffusion_pytorch_model*.safetensors")
    headers = [json.loads(safetensors_header(path)) for path in files if not re.search(r"\.(fp16|bf16)\b", path.name)]
    return sum(math.prod(entry.get("shape", [0])) for header in headers for entry in header.values())


def _metadata(repo_id: str, record: RunRecord | None) -> ModelCardData:
    name = repo_id.rpartition("/")[2]
    data: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["diffusers", "autoencoder", "vae", "faces", "AutoencoderKLUltra"],
        "model_name": name,
    }
    if record is None:
        return ModelCardData(**data)
    if is_celeba(record.config):
        data |= {"license": "other", "license_name": "celeba-non-commercial", "license_link": CELEBA_PAGE}
    elif record.config.data.dataset == "synthetic_faces":
        data["license"] = "apache-2.0"
    dataset, kind = hub_dataset(record.config), record.config.data.dataset
    images = record.evaluated or {"dataset": kind, "split": record.config.data.validation_split or "held out"}
    results = [
        EvalResult(
            task_type="image-to-image",
            task_name="reconstruction",
            dataset_type=images["dataset"],
            dataset_name=_LOCAL_SOURCES.get(images["dataset"], images["dataset"]),
            dataset_split=images["split"],
            dataset_revision=record.config.data.revision if images["dataset"] == kind else None,
            metric_type=_ON_THE_HUB[_family(key)],
            metric_name=_title(key),
            metric_value=round(result.mean, 6),
        )
        for key, result in record.results.items()
        if _family(key) in _ON_THE_HUB
    ]
    return ModelCardData(**data, datasets=[dataset] if dataset else None, eval_results=results or None)


def _family(key: str) -> str:
    return key.partition("_")[0] if key.startswith(("lpips_", "frechet_")) else key


def _title(key: str) -> str:
    network = key.partition("_")[2]
    return _FIGURES[_family(key)][0].format(_NETWORKS.get(network, network))


def _row(key: str, result: Result) -> str:
    _, form, meaning = _FIGURES[_family(key)]
    interval = "" if result.low is None else f"{form.format(result.low)} to {form.format(result.high)}"
    return f"| {_title(key)} | {form.format(result.mean)} | {interval} | {meaning} |"


def snippet(repo_id: str, side: int) -> str:
    """Loading and using the model in six lines; they run as they stand."""
    return f"""from diffusers import AutoModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
vae, images = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True), VaeImageProcessor()
latents = vae.encode(images.preprocess(load_image("face.png"), {side}, {side})).latent_dist.mode().detach()
images.postprocess(vae.decode(latents).sample.detach())[0].save("reconstruction.png")"""


def _sections(
    model: dict[str, Any], parameters: int, repo_id: str, record: RunRecord | None, images: list[str], priors: list[str]
) -> list[str]:
    """The card's paragraphs, in order."""
    side, channels, size = model["sample_size"], model["latent_channels"], model["latent_size"]
    numbers = channels * size * size
    measured = (
        "measured on validation faces" if model.get("latents_std") else "not measured: this model was not trained"
    )
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        f"A variational autoencoder for faces, a diffusers model: {side}x{side} pixels to **{numbers:,} numbers** and "
        f"back, {3 * side * side / numbers:,.0f} times fewer. {parameters / 1e6:.1f} million parameters, float32 "
        "safetensors. Principal components of the training faces stand beside convolutions on both sides, in one source "
        "file that travels with the weights.",
        "## Use",
        f"```python\n{snippet(repo_id, side)}\n```",
        f"Only torch and diffusers are needed. `trust_remote_code=True` runs `autoencoder_kl_ultra.py` of this repository: "
        "read it, and pin `revision=` to the commit that you read. Faces are expected as in training: a centred square "
        f"crop, values in [-1, 1]{_crop(record)}.",
        f"| latent | |\n| --- | --- |\n| shape | ({channels}, {size}, {size}), layout `{model['latent_layout']}` |\n"
        f"| `scaling_factor` | {model['scaling_factor']:.6g} |\n| `shift_factor` | {model['shift_factor']:.6g} |",
        f"`(latents - shift_factor) * scaling_factor` has mean 0 and variance 1 ({measured}); `latents_mean` and "
        "`latents_std` in `config.json` say the same for each channel.",
    ]
    if priors:
        parts.append(
            f"Fitted priors: {', '.join(f'`{name}`' for name in priors)}. New faces from one:\n\n```python\n"
            f'prior = AutoModel.from_pretrained("{repo_id}", subfolder="priors/{priors[0]}", trust_remote_code=True)\n'
            f"images = vae.decode(prior.sample(4).view(4, {channels}, {size}, {size})).sample\n```"
        )
    if record is None:
        return [*parts, "## Limits", _limits(None)]

    known = sorted(
        (key for key in record.results if _family(key) in _FIGURES), key=lambda k: list(_FIGURES).index(_family(k))
    )
    rows = [_row(key, record.results[key]) for key in known]
    if rows:
        head = "| figure | mean over images | 95 % interval | |\n| --- | --- | --- | --- |\n"
        parts += ["## Evaluation", head + "\n".join(rows), _evaluation(record)]
    if images:
        captions = {"reconstructions": "Validation faces, originals above.", "samples": "Decoded draws from N(0, I)."}
        shown = [f"![{name[:-4]}](images/{name})" + f"\n\n{captions.get(name[:-4], '')}".rstrip() for name in images]
        parts += ["## Pictures", *shown]
    parts += ["## Training", _training(record), "## Data and licence", _licence(record.config)]
    return [*parts, "## Limits", _limits(record.config)]


def _evaluation(record: RunRecord) -> str:
    """Of which weights and images the figures are, and how far they carry."""
    best, data = record.status.get("best") or {}, record.config.data
    averaged = "averaged over training, " if record.config.training_presets.ema_decay > 0 else ""
    weights = (
        f"Weights {averaged}of epoch {best.get('epoch')}, step {best.get('step')}; the posterior's mean is decoded."
    )
    if record.evaluated is not None:
        about = record.evaluated
        name = _LOCAL_SOURCES.get(about["dataset"], about["dataset"])
        return (
            f"{weights} Measured by `python -m training.evaluate` on {about['images']:,} images: {name}, split "
            f"`{about['split']}`. The intervals are bootstrapped over images; they say nothing about another training run."
        )
    split = f"split `{data.validation_split}`" if data.validation_split else "rows held out by a hash of their bytes"
    return (
        f"{weights} Measured by the validation in training on {describe_data(record.config)}, {split}, its first "
        f"{data.max_validation_images:,} images or all if there are fewer, none of them trained on. The same images chose "
        "the epoch, which flatters a little. No intervals: one run, and means only."
    )


def _crop(record: RunRecord | None) -> str:
    crop = None if record is None else record.config.data.crop_px
    return "" if crop is None else f" (the central {crop}x{crop} pixels of the data set's images, resized)"


def _training(record: RunRecord) -> str:
    presets, loss = record.config.training_presets, record.config.loss
    hours, seen = record.train_seconds / 3600, record.status.get("images_seen", 0)
    networks = f"trunk {loss.trunk}" + ("" if loss.lpips_trunk is None else f", LPIPS also of {loss.lpips_trunk}")
    lines = [
        f"- {seen:,} images in {record.status.get('epoch')} epochs, batch {presets.batch_size}, {presets.optimizer}, learning "
        f"rate {presets.learning_rate:g}, seed {presets.seed}; every key is in `training_config.json`.",
        f"- Loss: {loss.mse_weight:g} MSE + {loss.l1_weight:g} L1 + {loss.perceptual_weight:g} perceptual + "
        f"{loss.lpips_weight:g} LPIPS ({networks}) + beta x KL, beta "
        + ("held so that KL's share of the loss stays in a band." if presets.kl_control_enabled else "fixed."),
        f"- {hours:.2f} hours ({60 * hours:.1f} minutes) of training steps, without validation.",
    ]
    hardware = record.status.get("hardware")
    if hardware:
        count = hardware["processes"]
        lines.append(f"- Hardware: {count} x {hardware['device']}, precision {hardware['precision']}.")
        if hardware["watts"]:
            energy = hardware["watts"] * count * hours / 1000
            lines.append(
                f"- Energy: at most about {energy:.2g} kWh, an estimate and not a measurement: power limit "
                f"{hardware['watts']:.0f} W x {count} x {hours:.2f} h, without the rest of the machine."
            )
    return "\n".join(lines)


def _licence(config: Config) -> str:
    """Terms of what the weights were made from."""
    text = f"Trained on {describe_data(config)}. "
    if is_celeba(config):
        return text + (
            f"[CelebA]({CELEBA_PAGE}) is available for **non-commercial research purposes only**, and its images are not "
            "the property of those who collected them. Weights trained on it are published under the same restriction. "
            "Liu et al. 2015, Deep Learning Face Attributes in the Wild."
        )
    if config.data.dataset == "synthetic_faces":
        return text + "They show nobody and are under no other terms than the program (Apache-2.0)."
    return text + "This card does not know its terms: whoever publishes the weights states them here."


def _limits(config: Config | None) -> str:
    lines = [
        "Reconstructions are approximate: do not use them as evidence of what somebody looks like. Not for identifying "
        "people, and not for pictures of real people without their consent.",
        "The latent holds faces in the frame of the training images. Other frames, hands, text, several people and "
        "anything that is not a face come back wrong.",
    ]
    if config is None or config.data.dataset != "synthetic_faces":
        lines.append(
            "Face data sets do not show all people equally often, and errors are larger for those who are rare in them. "
            "CelebA shows celebrities, mostly adult, light-skinned and made up for the camera (on the balance of face data "
            "sets: Kärkkäinen and Joo 2021, FairFace). The figures above are means, which hide this: measure on the people "
            "whom your use concerns."
        )
    else:
        lines.append("It was trained on drawings, to show that the program works: photographs come back wrong.")
    return "\n\n".join(lines)
