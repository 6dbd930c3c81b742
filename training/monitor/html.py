"""Writes a training run as one self-contained HTML file: state, metrics, curves, image grids, events, configuration.

Curves (SVG) and grids (PNG) are data URIs; the page has no script, and its content security policy forbids the network.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter, StrMethodFormatter

from training.monitor.rows import Row
from training.monitor.run import Run, clean, event_text

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1rem 1.5rem }
body { color: #1c2126; background: #fff }
h1 { font-size: 1.5rem; margin: 0 0 .4rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .6rem }
.state { display: inline-block; padding: .1rem .6rem; border-radius: .3rem; color: #fff; background: #b3261e }
.live { background: #1a7f37 }
.starting { background: #0b6e8a }
.finished { background: #0a58ca }
.stopped { background: #8a5a00 }
.warnings { border-left: .3rem solid #d29922; background: #fff8e6 }
.warnings, pre { padding: .5rem .8rem; overflow-wrap: anywhere }
pre { background: #f3f4f6; white-space: pre-wrap }
dl { margin: 0; columns: 26rem; column-gap: 2rem }
dl div { display: flex; gap: .8rem; break-inside: avoid }
dt { flex: 0 0 8rem; color: #57606a }
dd { margin: 0; overflow-wrap: anywhere }
.charts, .grids, .config { display: grid; gap: 1rem }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) }
.grids, .config { grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)) }
img { max-width: 100% }
.charts img { width: 100% }
figure { margin: 0 0 1rem }
figcaption { color: #57606a; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; height: fit-content }
caption { text-align: left; font-weight: 600 }
th, td { text-align: left; font-weight: 400; padding: .1rem .6rem .1rem 0; border-top: 1px solid #e3e6ea }
th { width: 50% }
td { overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .9em }
"""


@dataclass(frozen=True)
class Chart:
    """A chart over images seen.

    Attributes:
        title: With the unit.
        keys: Metric names; one that ends in `*` stands for all that start so.
        log: Logarithmic y axis, if the values differ enough.
        target_range: Metrics of the lower and upper limit of a range that is shaded.
    """

    title: str
    keys: tuple[str, ...]
    log: bool = False
    target_range: tuple[str, str] | None = None


CHARTS = (
    Chart("Weighted loss terms", ("loss/total", "weighted/*"), log=True),
    Chart(
        "KL fraction of the loss",
        ("kl/loss_fraction", "kl/smoothed_fraction"),
        True,
        ("kl/target_low", "kl/target_high"),
    ),
    Chart("KL weight (beta)", ("kl/beta", "kl/beta_floor"), log=True),
    Chart("KL, nats per dimension", ("loss/kl",), log=True),
    Chart("Learning rate", ("optim/learning_rate",), log=True),
    Chart("Validation PSNR, dB", ("validation/psnr",)),
    Chart("Validation LPIPS", ("validation/lpips_*",)),
    Chart("Validation MSE, images in [-1, 1]", ("validation/mse",), log=True),
    Chart("Validation reconstruction loss", ("validation/reconstruction_loss",), log=True),
    Chart("Active latent dimensions", ("validation/active_units",)),
    Chart("Gradient norm before clipping", ("optim/grad_norm",), log=True),
    Chart("Throughput, images per second", ("speed/images_per_second",)),
    Chart("Fraction of time waiting for data", ("speed/data_wait_fraction",)),
)


def draw_chart(run: Run, chart: Chart, last_x: float) -> bytes | None:
    """Render a chart from 0 to `last_x` images as SVG; None if the run has none of its curves."""
    keys: list[str] = []
    for key in chart.keys:
        matching = [name for name in run.series if name.startswith(key[:-1])] if key.endswith("*") else [key]
        keys += [name for name in matching if name in run.series]
    if not keys:
        return None
    figure = Figure(figsize=(5.6, 2.9))
    axes = figure.add_axes((0.12, 0.16, 0.85, 0.74))  # fixed, so that charts line up
    for color, key in enumerate(keys):
        curve = run.series[key]
        marker = "o" if len(curve.xs) <= 40 else None
        is_noisy = key == "kl/loss_fraction" and len(keys) > 1  # faint, behind its average
        style = {"alpha": 0.35, "linewidth": 0.7} if is_noisy else {"linewidth": 1.4}
        axes.plot(curve.xs, curve.ys, label=key, color=f"C{color}", marker=marker, markersize=2.5, **style)
    if chart.target_range and all(name in run.series for name in chart.target_range):
        low, high = (run.series[name] for name in chart.target_range)
        for limit in (low, high):
            axes.plot(limit.xs, limit.ys, "C2--", linewidth=1.0)
        if low.xs == high.xs:
            axes.fill_between(low.xs, low.ys, high.ys, color="C2", alpha=0.18, linewidth=0, label="target range")
    axes.set_title(chart.title, fontsize=10, loc="left")
    axes.set_xlabel("images seen", fontsize=8)
    axes.set_xlim(0, last_x or 1)
    positive = [y for key in keys for y in run.series[key].ys if y > 0] or [1.0]
    if chart.log and max(positive) > 5 * min(positive):  # a log axis needs a few round numbers
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    else:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))  # the default may use an offset
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.3)
    if len(keys) > 1 or chart.target_range:
        axes.legend(fontsize=7, ncols=2, loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _text(value: Any) -> str:
    return html.escape(clean(value))


def _image(data: bytes, kind: str, description: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{_text(description)}" src="data:image/{kind};base64,{encoded}"/>'


def _section(title: str, content: Iterable[str], tag: str = "div", kind: str = "") -> str:
    inside = "\n".join(content)
    return f'<h2>{_text(title)}</h2>\n<{tag} class="{kind}">\n{inside}\n</{tag}>' if inside else ""


def _config_table(name: str, values: Any) -> str:
    pairs = values.items() if isinstance(values, dict) else [("", values)]
    cells = [f"<tr><th>{_text(key)}</th><td>{_text(json.dumps(value))}</td></tr>" for key, value in pairs]
    return f"<table><caption>{_text(name)}</caption>{''.join(cells)}</table>" if cells else ""


def render(run: Run, rows: Sequence[Row]) -> str:
    """The page, as text that is both HTML and well-formed XML."""
    last_x = max((curve.xs[-1] for curve in run.series.values()), default=0.0)
    # `parse_math`: metric names are not trusted, so they must not be parsed as formulas.
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "monitor"}):
        rendered = [(chart.title, draw_chart(run, chart, last_x)) for chart in CHARTS]
    charts = [_image(data, "svg+xml", f"Chart: {title}") for title, data in rendered if data]
    grids = []
    for kind in ("samples", "reconstructions"):
        if path := run.grid(kind):
            image = _image(path.read_bytes(), "png", f"Grid of {kind}")
            grids.append(f"<figure>{image}<figcaption>{_text(path.name)}</figcaption></figure>")
    detail = f" {_text(run.state.detail)}" if run.state.detail else ""
    pairs = (f"<div><dt>{_text(row.label)}</dt><dd>{_text(row.text)}</dd></div>" for row in rows)
    tables = (_config_table(name, values) for name, values in run.config.items())
    log = [_text(line) for line in run.log_tail(20)]
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    name, state = _text(run.path.resolve().name), run.state.name
    parts = [
        f"<h1>{name}</h1>",
        f'<p><strong class="state {state}">{state.upper()}</strong>{detail}; page written {written}</p>',
        _section("Warnings", (f"<div>{_text(warning)}</div>" for warning in run.warnings()), kind="warnings"),
        _section("Last lines of training.log", log, tag="pre") if any(log) else "",
        _section("Metrics", pairs, tag="dl", kind="metrics"),
        _section("Curves", charts, kind="charts"),
        _section("Grids", grids, kind="grids"),
        _section("Latest events", (f"<div>{_text(event_text(event))}</div>" for event in run.events)),
        _section("Configuration", tables, kind="config"),
        "<p>Written by training.monitor. Points of long curves are means of neighboring log lines.</p>",
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n<title>{name}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>\n'
        '<meta name="viewport" content="width=device-width"/>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n</body>\n</html>\n"
    )


def write_page(run: Run, rows: Sequence[Row], path: Path) -> None:
    """Write the page atomically.

    Raises:
        ValueError: The file's name does not end in .html, or its folder does not exist.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--html must be a file name that ends in .html, got {path}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--html {path}: the folder does not exist; create it, or give another one.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(render(run, rows), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
