"""The latest metrics of a run as labeled rows, for the terminal and the HTML file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.monitor.run import Run, clock, duration, number


@dataclass(frozen=True)
class Row:
    """A row of the page.

    Attributes:
        label: Name of the metric.
        text: Its latest values.
        values: Drawn as a sparkline, on a logarithmic scale if `log`.
        fraction: Drawn as a progress bar.
    """

    label: str
    text: str
    values: Sequence[float] = ()
    log: bool = False
    fraction: float | None = None


def _format(value: Any, form: str = ".4g") -> str:
    value = number(value)
    return "n/a" if value is None else f"{value:{form}}"


def _percent(value: Any) -> str:
    value = number(value)
    return "n/a" if value is None else f"{100 * value:.3g} %"


def _metric(run: Run, label: str, key: str, text: str, log: bool = False) -> list[Row]:
    """A row with the curve of a metric; none if the run does not log the metric."""
    if key not in run.train and key not in run.validation:
        return []
    return [Row(label, text, run.series[key].ys if key in run.series else (), log)]


def _progress_rows(run: Run) -> list[Row]:
    merged = run.train | {key: value for key, value in run.status.items() if value is not None}
    names = ("epoch", "step", "num_epochs", "steps_per_epoch", "seconds_left")
    epoch, step, epochs, per_epoch, left = (number(merged.get(name)) for name in names)
    epochs = epochs or run.preset("num_epochs")
    if epoch is None:
        return [Row("progress", "no metrics yet")]
    if not epochs:
        rows = [Row("progress", f"epoch {epoch + 1:.0f}")]
    else:
        done = min(step / (per_epoch * epochs) if per_epoch and step is not None else epoch / epochs, 1.0)
        # `epoch` counts from 0: the current epoch of a live run, the completed epochs of one that has ended.
        current = f"epoch {min(epoch + 1, epochs):.0f}" if run.state.is_alive else f"{epoch:.0f} epochs done"
        rows = [Row("progress", f"{current} of {epochs:.0f}, {_percent(done)}", fraction=done)]
    if left is not None and run.state.is_alive:
        left = max(0.0, left - (time.time() - run.last_update))
        rows.append(Row("time left", f"{duration(left)}, until {clock(time.time() + left, '%a %d %b %H:%M')}"))
    return rows


def _loss_rows(run: Run) -> dict[str, Row]:
    """Loss term -> row, for every `loss/*` that is logged."""
    rows = {}
    for key in (key for key in run.train if key.startswith("loss/")):
        name, text = key.removeprefix("loss/"), _format(run.train[key])
        if f"weighted/{name}" in run.train:
            text = f"{text:<9} weighted {_format(run.train[f'weighted/{name}'])}"
        rows[name] = _metric(run, f"loss {name}", key, text, log=True)[0]
    return rows


def _kl_rows(run: Run) -> list[Row]:
    key = "kl/smoothed_fraction" if number(run.train.get("kl/smoothed_fraction")) is not None else "kl/loss_fraction"
    fraction, low, high = (number(run.train.get(name)) for name in (key, "kl/target_low", "kl/target_high"))
    text = _percent(fraction)
    if fraction is not None and low is not None and high is not None:
        place = "below" if fraction < low else "above" if fraction > high else "inside"
        text += f", {place} target range {100 * low:.3g} to {_percent(high)}"
    beta, minimum = (_format(run.train.get(f"kl/{name}"), ".3g") for name in ("beta", "beta_floor"))
    return [
        *_metric(run, "KL fraction", key, text, log=True),
        *_metric(run, "KL beta", "kl/beta", f"{beta}, minimum {minimum}", log=True),
    ]


def _schedule_rows(run: Run) -> list[Row]:
    rate = _format(run.train.get("optim/learning_rate"), ".3g")
    text = f"{rate}, minimum {_format(run.preset('min_learning_rate'), '.3g')}"
    rows = _metric(run, "learning rate", "optim/learning_rate", text, log=True)
    for label, name in (("plateau", "plateau"), ("early stopping", "early_stopping")):
        bad_epochs, patience = number(run.status.get(f"{name}_bad_epochs")), run.preset(f"{name}_patience")
        if patience == 0:
            rows.append(Row(label, f"off ({name}_patience is 0)"))
        elif bad_epochs is not None:
            limit = "" if patience is None else f" of {patience:.0f}"
            rows.append(Row(label, f"{bad_epochs:.0f}{limit} epochs without improvement"))
    return rows


def _validation_rows(run: Run, names: Sequence[str]) -> list[Row]:
    best = run.status.get("best")
    best = best if isinstance(best, dict) else {}
    rows = []
    for name in names:
        key, form = f"validation/{name}", ".2f" if name == "psnr" else ".4g"
        text = _format(run.validation.get(key), form) + {"psnr": " dB", "mse": " in [-1, 1]"}.get(name, "")
        text += f", best model {_format(best[key], form)}" if key in best else ""
        rows += _metric(run, "val loss" if name == "reconstruction_loss" else f"val {name}", key, text)
    return rows


def _optimizer_rows(run: Run) -> list[Row]:
    norm, clipped, skipped = (
        run.train.get(f"optim/{name}") for name in ("grad_norm", "clipped_fraction", "skipped_steps")
    )
    text = f"{_format(norm, '.3g')}, clipped {_percent(clipped)}, skipped steps {_format(skipped, ',.0f')}"
    return _metric(run, "gradient norm", "optim/grad_norm", text, log=True)


def _speed_rows(run: Run) -> list[Row]:
    names = ("images_per_second", "data_wait_fraction", "memory_gib")
    rate, wait, memory = (run.train.get(f"speed/{name}") for name in names)
    text = f"{_format(rate)} images/s, {_format(memory, '.3g')} GiB"
    return [
        *_metric(run, "throughput", "speed/images_per_second", text),
        *_metric(run, "data wait", "speed/data_wait_fraction", f"{_percent(wait)} of the time"),
    ]


def rows(run: Run) -> list[Row]:
    """The metrics of a run, the most important ones first; what a run does not log has no row."""
    losses = _loss_rows(run)
    lpips = sorted(key.removeprefix("validation/") for key in run.validation if key.startswith("validation/lpips_"))
    found = [*_progress_rows(run), *([losses.pop("total")] if "total" in losses else [])]
    found += [*_kl_rows(run), *_schedule_rows(run), *_validation_rows(run, ["reconstruction_loss", "psnr", *lpips])]
    found += _speed_rows(run)
    for kind in ("samples", "reconstructions"):
        if path := run.grid(kind):
            found.append(Row(kind, path.relative_to(run.path).as_posix()))
    if run.status.get("model_dir"):
        found.append(Row("model", str(run.status["model_dir"])))
    found += [*losses.values(), *_optimizer_rows(run)]
    if "kl/nats_per_image" in run.train:
        found.append(Row("KL per image", f"{_format(run.train['kl/nats_per_image'])} nats"))
    return found + _validation_rows(run, ["mse", "ssim", "active_units", "posterior_sigma"])
