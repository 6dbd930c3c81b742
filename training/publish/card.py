"""Writes the model card: README.md with metadata for the Hub, plots and grids.

Everything in it comes from the run's files (see `run_record`) and the model's; what they do not contain is left out. No
path of this machine is copied.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from training.config import Config
from training.publish.hub import safetensors_header
from training.publish.run_record import Metric, RunRecord

CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
_LOCAL_SOURCES = {
    "synthetic_faces": "synthetic faces, rendered by the training program",
    "imagefolder": "a folder of images",
    "parquet": "parquet files",
}


class _MetricText(NamedTuple):
    """How the card presents a metric."""

    title: str  # with a placeholder for the network
    value_format: str
    meaning: str
    hub_type: str | None  # metric type on the Hub


# By the names in training.evaluate, without the network with which those of LPIPS and Frechet metrics end.
_METRICS = {
    "psnr": _MetricText("PSNR", "{:.2f} dB", "images in [-1, 1], peak 2", "psnr"),
    "ssim": _MetricText("SSIM", "{:.4f}", "Gaussian window of 11 pixels", "ssim"),
    "mse_-1_1": _MetricText("MSE", "{:.5f}", "images in [-1, 1]; a quarter of it in [0, 1]", "mse"),
    "l1_-1_1": _MetricText("L1", "{:.5f}", "images in [-1, 1]", None),
    "lpips": _MetricText("LPIPS ({})", "{:.4f}", "Zhang et al. 2018", "lpips"),
    "frechet": _MetricText(
        "Frechet distance ({})", "{:.3f}", "all reconstructions to all images; not a published FID", None
    ),
    "kl": _MetricText("KL", "{:.3f} nats", "to N(0, I), per latent dimension", None),
    "active_units": _MetricText(
        "active latent dimensions", "{:.0f}", "variance of the mean over images above 0.01", None
    ),
    "posterior_sigma": _MetricText("posterior sigma", "{:.4f}", "mean standard deviation per latent dimension", None),
}
_NETWORKS = {"alexnet": "AlexNet", "vgg16": "VGG16", "squeezenet": "SqueezeNet", "dinov2": "DINOv2"}


# ---------------------------------------------------------------------- the data


def is_celeba(config: Config) -> bool:
    """Whether the images are CelebA's, by the names of the data set and its files."""
    return "celeba" in json.dumps([config.data.dataset, config.data.data_dir, config.data.data_files]).lower()


def hub_dataset(config: Config) -> str | None:
    """Id of the data set on the Hub, if it is one."""
    return None if config.data.dataset in _LOCAL_SOURCES else config.data.dataset


def describe_data(config: Config) -> str:
    """The data set in a few words, without paths."""
    data = config.data
    if hub_dataset(config) is None:
        name = _LOCAL_SOURCES[data.dataset]
        return f"{name} (CelebA)" if is_celeba(config) else name
    revision = f" at revision `{data.revision}`" if data.revision else ""
    return f"[{data.dataset}](https://huggingface.co/datasets/{data.dataset}){revision}"


# ---------------------------------------------------------------------- plots


def draw_plots(record: RunRecord, folder: Path) -> list[str]:
    """Plot the losses and the KL control as PNG.

    Returns:
        The names of the files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {
        "loss": [
            (record.train, "loss/reconstruction", "training, reconstruction", "C0-"),
            (record.validation, "validation/reconstruction_loss", "validation, reconstruction", "C1o-"),
            (record.train, "weighted/kl", "training, beta x KL", "C2-"),
        ],
        "kl": [
            (record.train, "kl/smoothed_fraction", "KL's fraction of the loss, smoothed", "C0-"),
            (record.train, "kl/target_low", "target range", "C7--"),
            (record.train, "kl/target_high", None, "C7--"),
            (record.train, "kl/beta", "beta", "C3-"),
        ],
    }
    names = []
    for name, title in (("loss", "Loss"), ("kl", "KL control")):
        figure = Figure(figsize=(8, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for lines, key, label, style in curves[name]:
            points = [(line["images_seen"], line[key]) for line in lines if (line.get(key) or 0) > 0]
            if points:
                axes.plot(*zip(*points), style, label=label, markersize=3, linewidth=1)
        if not axes.lines:
            continue
        axes.set(xlabel="training images seen", yscale="log", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
        names.append(f"{name}.png")
    return names


# ---------------------------------------------------------------------- the card


def write_card(folder: Path, repo_id: str, record: RunRecord | None, with_photographs: bool = False) -> None:
    """Write README.md and `images/` into a model's folder.

    Args:
        folder: Holds the exported model.
        repo_id: "organization/name", for the examples in the card.
        record: The run; without it the card describes the model only.
        with_photographs: Include the grid of validation images and their reconstructions. Without it only that of
            synthetic faces is, because people have a say in pictures of them, and so has the owner of a data set.
    """
    images: list[str] = []
    if record is not None:
        images = draw_plots(record, folder / "images")
        private = not with_photographs and record.config.data.dataset != "synthetic_faces"
        for kind, path in record.grids.items():
            if private and "reconstructions" in kind:
                continue
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(path, folder / "images" / f"{kind}.png")
            images.append(f"{kind}.png")
    sections = _model_sections(folder, repo_id, record)
    if record is not None:
        sections += _run_sections(record, images)
    sections += ["## Limits", _limits(None if record is None else record.config)]
    body = "\n\n".join(sections)
    card = ModelCard(f"---\n{_metadata(repo_id, record).to_yaml()}\n---\n\n{body}\n")
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def weight_files(folder: Path) -> dict[str | None, list[Path]]:
    """The weights of a model, one file or several shards, by variant ("fp16", ...); the default variant is None."""
    pattern = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
    files: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := pattern.fullmatch(path.name):
            files.setdefault(match[1], []).append(path)
    return files


def _default_variant(folder: Path) -> str | None:
    variants = weight_files(folder)
    return None if None in variants else min(variants)


def count_parameters(folder: Path) -> int:
    """Number of parameters of a model, from the headers of its weights."""
    headers = [json.loads(safetensors_header(path)) for path in weight_files(folder)[_default_variant(folder)]]
    return sum(math.prod(entry.get("shape", [0])) for header in headers for entry in header.values())


def _metadata(repo_id: str, record: RunRecord | None) -> ModelCardData:
    data: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["diffusers", "autoencoder", "vae", "faces", "AutoencoderKLUltra"],
        "model_name": repo_id.rpartition("/")[2],
    }
    if record is None:
        return ModelCardData(**data)
    config = record.config
    if record.base_model is not None:
        data |= {"base_model": record.base_model, "base_model_relation": "finetune"}
    if is_celeba(config):
        data |= {"license": "other", "license_name": "celeba-non-commercial", "license_link": CELEBA_PAGE}
    elif config.data.dataset == "synthetic_faces":
        data["license"] = "apache-2.0"
    images = record.evaluated or {"dataset": config.data.dataset, "split": config.data.validation_split or "held out"}
    results = [
        EvalResult(
            task_type="image-to-image",
            task_name="reconstruction",
            dataset_type=images["dataset"],
            dataset_name=_LOCAL_SOURCES.get(images["dataset"], images["dataset"]),
            dataset_split=images["split"],
            dataset_revision=config.data.revision if images["dataset"] == config.data.dataset else None,
            metric_type=_METRICS[_family(key)].hub_type,
            metric_name=_title(key),
            metric_value=round(metric.mean, 6),
        )
        for key, metric in record.metrics.items()
        if _family(key) in _METRICS and _METRICS[_family(key)].hub_type
    ]
    dataset = hub_dataset(config)
    return ModelCardData(**data, datasets=[dataset] if dataset else None, eval_results=results or None)


def _family(key: str) -> str:
    """Key of `_METRICS` for a metric."""
    return key.partition("_")[0] if key.startswith(("lpips_", "frechet_")) else key


def _title(key: str) -> str:
    network = key.partition("_")[2]
    return _METRICS[_family(key)].title.format(_NETWORKS.get(network, network))


def _table_row(key: str, metric: Metric) -> str:
    text = _METRICS[_family(key)]
    formatted = text.value_format.format
    interval = "" if metric.low is None else f"{formatted(metric.low)} to {formatted(metric.high)}"
    return f"| {_title(key)} | {formatted(metric.mean)} | {interval} | {text.meaning} |"


def snippet(repo_id: str, size: int, variant: str | None = None) -> str:
    """Code that loads and uses a published model."""
    options = "trust_remote_code=True" + ("" if variant is None else f', variant="{variant}"')
    return f"""from diffusers import AutoModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
vae, images = AutoModel.from_pretrained("{repo_id}", {options}), VaeImageProcessor()
pixels = images.preprocess(load_image("face.png"), {size}, {size}, resize_mode="crop")
latents = vae.encode(pixels).latent_dist.mode().detach()
images.postprocess(vae.decode(latents).sample.detach())[0].save("reconstruction.png")"""


def _model_sections(folder: Path, repo_id: str, record: RunRecord | None) -> list[str]:
    """What the model is and how to use it."""
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    image_size, channels, size = model["sample_size"], model["latent_channels"], model["latent_size"]
    latent_dim = channels * size * size
    measured = "measured on validation faces" if model.get("latents_std") else "not measured: the model is untrained"
    crop_px = None if record is None else record.config.data.crop_px
    crop = "" if crop_px is None else f" (the central {crop_px}x{crop_px} pixels of the data set's images, resized)"
    sections = [
        f"# {repo_id.rpartition('/')[2]}",
        f"A variational autoencoder for faces, for diffusers: {image_size}x{image_size} pixels to **{latent_dim:,} latent "
        f"dimensions** and back, {3 * image_size * image_size / latent_dim:,.0f} times fewer values. "
        f"{count_parameters(folder) / 1e6:.1f} million parameters in safetensors. Encoder and decoder combine a PCA branch, "
        "initialized with the principal components of the training faces, with convolutions.",
        "## Use",
        f"```python\n{snippet(repo_id, image_size, _default_variant(folder))}\n```",
        f"Only torch and diffusers are needed. `trust_remote_code=True` runs `autoencoder_kl_ultra.py` of this repository: "
        "read it, and pin `revision=` to the commit that you read. Preprocess faces as in training: a centered square "
        f"crop, values in [-1, 1]{crop}.",
        f"| latent | |\n| --- | --- |\n| shape | ({channels}, {size}, {size}), layout `{model['latent_layout']}` |\n"
        f"| `scaling_factor` | {model['scaling_factor']:.6g} |\n| `shift_factor` | {model['shift_factor']:.6g} |",
        f"`(latents - shift_factor) * scaling_factor` has mean 0 and variance 1 ({measured}); `latents_mean` and "
        "`latents_std` in `config.json` are the values for each channel.",
    ]
    priors = sorted(path.parent.name for path in folder.glob("priors/*/config.json"))
    if priors:
        sections.append(
            f"Fitted priors: {', '.join(f'`{name}`' for name in priors)}. New faces from one:\n\n```python\n"
            f'prior = AutoModel.from_pretrained("{repo_id}", subfolder="priors/{priors[0]}", trust_remote_code=True)\n'
            "latents = prior.noise_to_latents(vae, torch.randn(4, *prior.noise_shape))\n"
            "images = vae.decode(latents).sample\n```"
        )
    return sections


def _run_sections(record: RunRecord, images: list[str]) -> list[str]:
    """Metrics, images, training and license."""
    sections = []
    if rows := [
        _table_row(key, record.metrics[key]) for family in _METRICS for key in record.metrics if _family(key) == family
    ]:
        head = "| metric | mean over images | 95 % interval | |\n| --- | --- | --- | --- |\n"
        sections += ["## Evaluation", head + "\n".join(rows), _evaluation(record)]
    if images:
        captions = {
            "reconstructions": "Validation faces, originals above.",
            "samples": "Generated images: decoded samples from N(0, I).",
        }
        shown = [f"![{name[:-4]}](images/{name})" + f"\n\n{captions.get(name[:-4], '')}".rstrip() for name in images]
        sections += ["## Images", *shown]
    return [*sections, "## Training", _training(record), "## Data and license", _license(record.config)]


def _describe_split(split: str | None) -> str:
    return "examples held out by a hash of their bytes" if split is None else f"split `{split}`"


def _evaluation(record: RunRecord) -> str:
    """Which weights and images the metrics are measured on."""
    best, data = record.best, record.config.data
    kind = "EMA weights" if record.config.training_presets.ema_decay > 0 else "Weights"
    weights = f"{kind} of epoch {best.get('epoch')}, step {best.get('step')}; decoded from the posterior's mean."
    if record.evaluated is not None:
        evaluated = record.evaluated
        name = _LOCAL_SOURCES.get(evaluated["dataset"], evaluated["dataset"])
        return (
            f"{weights} Measured by `python -m training.evaluate` on {evaluated['images']:,} images: {name}, "
            f"{_describe_split(evaluated['split'])}. The intervals are bootstrapped over images; they do not cover the variation between "
            "training runs."
        )
    return (
        f"{weights} Measured by the validation during training on {describe_data(record.config)}, "
        f"{_describe_split(data.validation_split)}, at most "
        f"{data.max_validation_images:,} images, none of them trained on. The same images selected the epoch, so the "
        "values are slightly optimistic. One run, no intervals."
    )


def _training(record: RunRecord) -> str:
    presets, loss = record.config.training_presets, record.config.loss
    hours, images_seen = record.train_seconds / 3600, record.status.get("images_seen", 0)
    networks = f"feature network {loss.trunk}" + (
        "" if loss.lpips_trunk is None or loss.lpips_weight == 0 else f", LPIPS also {loss.lpips_trunk}"
    )
    beta = "controlled to keep KL's fraction of the loss in a target range" if presets.kl_control_enabled else "fixed"
    kl = "" if presets.train_only == "decoder" else f" + beta x KL, beta {beta}"
    if loss.adversarial_weight > 0:
        kl += (
            f"; an adversarial term with {loss.adversarial_weight:g} times the gradient of the others, after "
            f"{loss.adversarial_start_images:,} images"
        )
    lines = [
        f"- {images_seen:,} images in {record.status.get('epoch')} epochs, batch {presets.batch_size}, "
        f"{presets.optimizer}, learning rate {presets.learning_rate:g}, seed {presets.seed}; every key is in "
        "`training_config.json`.",
        f"- Loss: {loss.mse_weight:g} MSE + {loss.l1_weight:g} L1 + {loss.perceptual_weight:g} perceptual + "
        f"{loss.lpips_weight:g} LPIPS ({networks}){kl}.",
        f"- {hours:.2f} hours ({60 * hours:.1f} minutes) of training steps, without validation.",
    ]
    if record.init_from is not None:
        base = record.base_model
        name = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(record.init_from).name}`"
        trained = {"all": "", "encoder": "; the decoder was frozen", "decoder": "; the encoder was frozen"}
        lines.insert(0, f"- Started from the weights of {name}{trained[presets.train_only]}.")
    if hardware := record.status.get("hardware"):
        count = hardware["processes"]
        lines.append(f"- Hardware: {count} x {hardware['device']}, precision {hardware['precision']}.")
        if watts := hardware["watts"]:
            lines.append(
                f"- Energy: at most about {watts * count * hours / 1000:.2g} kWh, an estimate: power limit {watts:.0f} W x "
                f"{count} x {hours:.2f} h, without the rest of the machine."
            )
    return "\n".join(lines)


def _license(config: Config) -> str:
    """Terms of the training data."""
    text = f"Trained on {describe_data(config)}. "
    if is_celeba(config):
        return text + (
            f"[CelebA]({CELEBA_PAGE}) is available for **non-commercial research purposes only**, and its images are not "
            "the property of those who collected them. Weights trained on it are published under the same restriction. "
            "Liu et al. 2015, Deep Learning Face Attributes in the Wild."
        )
    if config.data.dataset == "synthetic_faces":
        return text + "They show nobody; their license is the program's (Apache-2.0)."
    return text + "The license of the data is unknown: state it here before you publish the weights."


def _limits(config: Config | None) -> str:
    lines = [
        "Reconstructions are approximate: do not use them as evidence of what somebody looks like. Not for identifying "
        "people, and not for images of real people without their consent.",
        "The latent space covers faces aligned and cropped like the training images. Other alignments, hands, text, "
        "several people and anything that is not a face are reconstructed badly.",
    ]
    if config is None or config.data.dataset != "synthetic_faces":
        lines.append(
            "Face data sets do not show all people equally often, and errors are larger for those who are rare in them. "
            "CelebA shows celebrities, mostly adult, light-skinned and wearing makeup (on the balance of face data "
            "sets: Kärkkäinen and Joo 2021, FairFace). The metrics above are means, which hide this: measure on the people "
            "whom your use concerns."
        )
    else:
        lines.append("It was trained on synthetic faces, as a demonstration: photographs are reconstructed badly.")
    return "\n\n".join(lines)
