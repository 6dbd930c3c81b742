"""What a run says about itself, read from its folder when it has ended or stopped: for the model card.

What it is for: `config.json`, `status.json`, `metrics.jsonl`, `samples/` and, where there is one, the `evaluation.json`
that `python -m training.evaluate MODEL --config RUN/config.json --output RUN` writes, as plain values. What it is
not for: watching a run that trains (monitor_run.py), or saying anything (model_card.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.config import Config, config_from_dict


@dataclass(frozen=True)
class Result:
    """One figure of the published weights: its mean over images, and the bounds of a 95 % interval where known."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass
class RunRecord:
    """What a finished or interrupted run has written.

    Attributes:
        config: As resolved before the first step.
        status: `status.json`.
        train, validation: Lines of `metrics.jsonl`, one for each step (the last written, after a resume), in order.
        grids: Name in the card -> file.
        train_seconds: Of training steps, without validation and waiting for a restart.
        results: Finite figures of the published weights, by the names of `training.evaluate`.
        evaluated: What `evaluation.json` says of its images (`dataset`, `split`, `images`); None: the results are those
            of the validation in training.
    """

    config: Config
    status: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    grids: dict[str, Path] = field(default_factory=dict)
    train_seconds: float = 0.0
    results: dict[str, Result] = field(default_factory=dict)
    evaluated: dict[str, Any] | None = None


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ValueError: It is not a run's folder.
    """
    for name in ("config.json", "status.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the folder of a run (runs/<run_name>_<time>).")
    config = config_from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    record = RunRecord(config, json.loads((folder / "status.json").read_text(encoding="utf-8")))
    lines: dict[str, dict[int, dict]] = {"train": {}, "validation": {}}
    seen = 0
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:  # cut off by a crash
                continue
            if line.get("kind") not in lines:
                continue
            lines[line["kind"]][line["step"]] = line
            if line["kind"] == "train":
                # A resume goes back; what was done twice took its time twice.
                new = line["images_seen"] - seen
                speed = line.get("speed/images_per_second")
                record.train_seconds += new / speed if new > 0 and speed else 0.0
                seen = line["images_seen"]
    record.train, record.validation = ([kind[step] for step in sorted(kind)] for kind in lines.values())
    record.grids = _grids(folder / "samples", config.output.run_name)
    record.results, record.evaluated = _results(folder / "evaluation.json", record.status.get("best") or {})
    return record


def _results(evaluation: Path, best: dict[str, Any]) -> tuple[dict[str, Result], dict[str, Any] | None]:
    """Figures from an evaluation of our model, or else from the validation at which the weights were the best."""
    if evaluation.is_file():
        found = json.loads(evaluation.read_text(encoding="utf-8"))
        ours = [model for model in found["models"] if model["class"] == "AutoencoderKLUltra"]
        if len(ours) != 1:
            raise ValueError(
                f"{evaluation} holds {len(ours)} models of ours: evaluate the published one alone, or beside others' only."
            )
        (model,) = ours
        values = {**model["reconstruction"], **{key: model[key] for key in ("kl", "active_units", "posterior_sigma")}}
        about = {"dataset": found["data"]["dataset"], "split": found["data"]["split"], "images": model["images"]}
    else:
        values = {
            key.removeprefix("validation/"): value for key, value in best.items() if key.startswith("validation/")
        }
        if "mse" in values:
            values["mse_-1_1"] = values.pop("mse")
        about = None
    results = {}
    for key, value in values.items():
        result = Result(**value) if isinstance(value, dict) else Result(value)
        if isinstance(result.mean, (int, float)) and math.isfinite(result.mean):
            results[key] = result
    return results, about


def _grids(folder: Path, run_name: str) -> dict[str, Path]:
    """The final grids, or else the newest of each kind."""
    grids = sorted(folder.glob("*.png"))
    found: dict[str, Path] = {}
    for path in [path for path in grids if "final" in path.stem] or grids:
        kind = re.sub(r"_?(?:final|epoch_\d+)_?", "_", path.stem.removeprefix(run_name)).strip("_")
        found[kind] = path  # sorted: a later epoch replaces an earlier one
    return found


def describe_hardware(device: torch.device, num_processes: int, precision: str) -> dict[str, Any]:
    """What a run trains on, for `status.json`, from where the card takes it.

    Args:
        device: Of this process.
        num_processes: Each with a device of this kind.
        precision: "no", "bf16" or "fp16".

    Returns:
        `device` (its name), `processes`, `precision`, and `watts`: the power limit of one GPU as `nvidia-smi` says it,
        None where it does not.
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
