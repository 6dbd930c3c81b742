"""Reads a run's folder for the model card: configuration, hardware, metrics, grids.

The metrics are those of `evaluation.json`, which
`python -m training.evaluate MODEL --config RUN/config.json --output RUN` writes for the best model, or else those of
the validation that chose it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from training.config import Config
from training.run_files import MODEL_FILE, RUN_FILE, best_checkpoint, read_json, saved_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """A metric of the published weights: mean over images, and the bounds of a 95 % interval where known."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass
class RunRecord:
    """The contents of a run's folder.

    Attributes:
        config: The configuration.
        status: `status.json`.
        best: `epoch`, `step` and `validation/*` of the best model.
        train, validation: Lines of `metrics.jsonl` in order of steps; of a step that a resume repeated, the last.
        grids: Name in the card -> file.
        train_seconds: Duration of all training steps, without validation.
        metrics: Finite metrics of the best model, by the names of `training.evaluate`.
        init_from: Model whose weights the run started from; None for random weights.
        base_model: Its id on the Hub, if it came from there.
        evaluated: `dataset`, `split` and `images` of `evaluation.json`; None if the metrics are from the validation.
    """

    config: Config
    status: dict[str, Any]
    best: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    grids: dict[str, Path] = field(default_factory=dict)
    train_seconds: float = 0.0
    metrics: dict[str, Metric] = field(default_factory=dict)
    init_from: str | None = None
    base_model: str | None = None
    evaluated: dict[str, Any] | None = None


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ValueError: It is not a run's folder, or has no best model.
    """
    for name in ("config.json", "status.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the folder of a run (runs/<run_name>_<time>).")
    origin, (checkpoint, best) = read_json(folder / RUN_FILE), best_checkpoint(folder)
    record = RunRecord(
        config=saved_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))),
        status=json.loads((folder / "status.json").read_text(encoding="utf-8")),
        best=best,
        init_from=origin.get("init_from"),
        base_model=origin.get("base_model"),
    )
    lines: dict[str, dict[int, dict]] = {"train": {}, "validation": {}}
    images_seen = 0
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:  # truncated by a crash
                continue
            if line.get("kind") not in lines:
                continue
            lines[line["kind"]][line["step"]] = line
            if line["kind"] == "train":  # steps that a resume repeats count again
                new, speed = line["images_seen"] - images_seen, line.get("speed/images_per_second")
                record.train_seconds += new / speed if new > 0 and speed else 0.0
                images_seen = line["images_seen"]
    record.train, record.validation = ([kind[step] for step in sorted(kind)] for kind in lines.values())
    record.grids = _grids(folder / "samples", record.config.output.run_name)
    if (folder / "evaluation.json").is_file():
        with safe_open(checkpoint / MODEL_FILE, "pt") as weights:
            values, record.evaluated = _evaluation(folder / "evaluation.json", weights.metadata() or {})
    if record.evaluated is None:
        values = {k.removeprefix("validation/"): v for k, v in record.best.items() if k.startswith("validation/")}
        values["mse_-1_1"] = values.pop("mse", None)
    metrics = {key: Metric(**value) if isinstance(value, dict) else Metric(value) for key, value in values.items()}
    record.metrics = {
        key: metric
        for key, metric in metrics.items()
        if isinstance(metric.mean, (int, float)) and math.isfinite(metric.mean)
    }
    return record


def _evaluation(file: Path, weights: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Metrics in `evaluation.json` and the images that they were measured on; None if they are of other `weights`."""
    evaluation = json.loads(file.read_text(encoding="utf-8"))
    models = [model for model in evaluation["models"] if model["class"] == "AutoencoderKLUltra"]
    if len(models) != 1:
        raise ValueError(
            f"{file} holds {len(models)} models of class AutoencoderKLUltra: evaluate the published one only."
        )
    (model,) = models
    if model.get("weights") != weights:
        logger.warning("%s was measured with other weights than the best model's: evaluate again", file)
        return {}, None
    values = model["reconstruction"] | {key: model[key] for key in ("kl", "active_units", "posterior_sigma")}
    data = evaluation["data"]
    return values, {"dataset": data["dataset"], "split": data["split"], "images": model["images"]}


def _grids(folder: Path, run_name: str) -> dict[str, Path]:
    """The final grids, or else the newest of each kind."""
    grids = sorted(folder.glob("*.png"))
    newest: dict[str, Path] = {}
    for path in [path for path in grids if "final" in path.stem] or grids:
        kind = re.sub(r"_?(?:final|epoch_\d+)_?", "_", path.stem.removeprefix(run_name)).strip("_")
        newest[kind] = path  # sorted: a later epoch replaces an earlier one
    return newest


def describe_hardware(device: torch.device, num_processes: int, precision: str) -> dict[str, Any]:
    """The hardware of a run, for `status.json` and the card.

    Args:
        device: Of this process.
        num_processes: Each has a device of this kind.
        precision: "no", "bf16" or "fp16".

    Returns:
        `device` (its name), `processes`, `precision`, and `watts`, the power limit of one GPU by `nvidia-smi`, or None.
    """
    name, watts = device.type.upper(), None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):  # missing, hanging, or not text
            answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout
            match = re.match(r"\s*(\d+(?:\.\d+)?)", answer)
            watts = float(match[1]) if match else None
    elif device.type == "cpu" and Path("/proc/cpuinfo").is_file():
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        name = match[1].strip() if match else name
    return {"device": name, "processes": num_processes, "precision": precision, "watts": watts}
