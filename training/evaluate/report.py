"""Evaluation figures for people: a table in the terminal, a grid of worst, median and best images, a page.

What it is for: `python -m training.evaluate`'s output. The page is one file: images and charts are inside it, it has no
script, and its content security policy forbids the network. What it is not for: measuring (evaluation.py).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from torch import Tensor

from training.data.images import denormalize, normalize
from training.evaluate.measure import Instruments, Measurement, decode_both

_IN_A_ROW = 4  # images of each kind in the grid
_SMALLEST_TILE = 128  # pixels; smaller images are enlarged by a whole factor
_GAP, _LINE = 8, 20
_LABELS = {
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "mse_-1_1": ("MSE, images in [-1, 1]", "{:.5f}"),
    "mse_0_1": ("MSE, images in [0, 1]", "{:.5f}"),
    "l1_-1_1": ("L1, images in [-1, 1]", "{:.4f}"),
    "kl": ("KL, nats per number", "{:.3f}"),
    "posterior_sigma": ("posterior sigma", "{:.4f}"),
    "active_units": ("active units", "{:,}"),
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1rem 1.5rem; color: #1c2126 }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem; overflow-wrap: anywhere }
div { overflow-x: auto } img { max-width: 100% }
table { border-collapse: collapse } caption { text-align: left }
th, td { padding: .2rem .9rem .2rem 0; border-top: 1px solid #e3e6ea; text-align: left; font-weight: 400 }
th:first-child { min-width: 16rem }
td { font-variant-numeric: tabular-nums; white-space: nowrap } small { color: #57606a }
"""


def label_and_format(name: str, instruments: Instruments) -> tuple[str, str]:
    """A figure's name for people, and how to write its value."""
    if instruments.frechet is not None and name == instruments.frechet.key:
        return instruments.frechet.label, "{:.4g}"
    if name.startswith("lpips_"):
        return f"LPIPS, {name.removeprefix('lpips_')}", "{:.4f}"
    return _LABELS[name]


def table_rows(summaries: Sequence[dict], instruments: Instruments) -> tuple[list[str], list[list[str]]]:
    """The comparison as text: a column for each set of reconstructions, a row for each figure.

    Returns:
        Heads of the columns after the first; rows, each beginning with its label. A dash is what a model does not
        have; figures of the posterior stand in the column of its mean.
    """
    columns = [(s, kind) for s in summaries for kind in ("reconstruction", "draw") if s[kind] is not None]
    kinds = {"reconstruction": "posterior mean", "draw": "posterior draw"}
    heads = [f"{s['model']}\n{kinds[kind] if s['kl'] is not None else s['class']}" for s, kind in columns]

    def cells(name: str, values: list) -> list[str]:
        label, form = label_and_format(name, instruments)
        texts = []
        for value in values:
            if isinstance(value, dict):
                low, high = form.format(value["low"]), form.format(value["high"])
                texts.append(f"{form.format(value['mean'])} [{low}, {high}]")
            else:
                texts.append("-" if value is None else form.format(value))
        return [label, *texts]

    rows = [
        ["class", *(s["class"] for s, _ in columns)],
        ["image size, pixels", *(str(s["resolution"]) for s, _ in columns)],
        ["latent numbers", *(f"{s['latent_dim']:,} ({'x'.join(map(str, s['latent_shape']))})" for s, _ in columns)],
        ["parameters", *(f"{s['parameters']:,}" for s, _ in columns)],
    ]
    rows += [cells(name, [s[kind][name] for s, kind in columns]) for name in summaries[0]["reconstruction"]]
    for name in ("kl", "active_units", "posterior_sigma"):
        rows.append(cells(name, [s[name] if kind == "reconstruction" else None for s, kind in columns]))
    return heads, rows


def remarks(summaries: Sequence[dict], instruments: Instruments) -> list[str]:
    """What one must know to read the figures."""
    counts = sorted({s["images"] for s in summaries})
    lines = [
        f"{' or '.join(f'{count:,}' for count in counts)} images; means over images, [percentile-bootstrap 95 % "
        "interval over images]. Reconstructions of a model with a posterior: from its mean, and from one draw."
    ]
    if len({s["resolution"] for s in summaries}) > 1:
        lines.append("The image sizes differ, so no figure is comparable between columns: give --resolution.")
    if instruments.frechet is not None:
        few = f", and {counts[0]:,} are few" if counts[0] < 5000 else ""
        lines.append(
            f"{instruments.frechet.label}: its estimate is biased upwards, the more the fewer images{few}; compare it "
            "only over the same images and features."
        )
    return lines


def terminal_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The comparison for a terminal."""
    table = Table(show_lines=False)
    table.add_column("", overflow="fold")
    for head in heads:
        table.add_column(head, overflow="fold", justify="right")
    for row in rows:
        # Square brackets are rich's markup.
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table


def ranking_metric(measurement: Measurement) -> tuple[str, np.ndarray]:
    """By what images are called worst and best: the first LPIPS, else the squared error; its name, and (n,)."""
    of_image = measurement.reconstruction.of_image
    name = next((name for name in of_image if name.startswith("lpips_")), "mse_-1_1")
    return name, of_image[name]


@torch.no_grad()
def extremes_grid(measurement: Measurement, images: Tensor, device: torch.device) -> Image.Image:
    """The images that a model reconstructs worst, those around the median, and the best, with their figures.

    Args:
        measurement: Of these images.
        images: (n, 3, H, W), uint8.
        device: Of the model.

    Returns:
        One row each; every image beside its reconstruction, and under both its row number and figures.
    """
    name, values = ranking_metric(measurement)
    order = np.argsort(-values, kind="stable")
    count = min(_IN_A_ROW, len(order))
    middle = (len(order) - count) // 2
    kinds = {"worst": order[:count], "median": order[middle : middle + count], "best": order[::-1][:count]}
    side = images.shape[-1]
    factor = max(1, -(-_SMALLEST_TILE // side))
    tile = side * factor
    font = ImageFont.load_default(size=14)
    width = _GAP + count * (2 * tile + 2 * _GAP)
    canvas = Image.new("RGB", (width, _LINE + 3 * (2 * _LINE + tile + _GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    title = f"by {name}; left the image, right its reconstruction" + (
        " from the posterior's mean" if measurement.posterior is not None else ""
    )
    draw.text((_GAP, 2), title, "black", font)
    top = _LINE
    for kind, places in kinds.items():
        draw.text((_GAP, top + 2), kind, "black", font)
        top += _LINE
        chosen = [measurement.indices[place] for place in places]
        originals = images[torch.as_tensor(places.copy())]
        made = denormalize(decode_both(measurement.model, normalize(originals.to(device)), chosen)[0]).cpu()
        left = _GAP
        for place, number, *pair in zip(places, chosen, originals, made):
            for offset, picture in zip((0, tile), pair):
                picture = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
                    (tile, tile), Image.Resampling.NEAREST
                )
                canvas.paste(picture, (left + offset, top))
            text = f"row {number}: {measurement.reconstruction.of_image['psnr'][place]:.1f} dB"
            if name.startswith("lpips_"):
                text += f", LPIPS {values[place]:.3f}"
            draw.text((left, top + tile + 2), text, "black", font)
            left += 2 * tile + 2 * _GAP
        top += tile + _LINE + _GAP
    return canvas


def _data_uri(save: Callable[[io.BytesIO], None], kind: str) -> str:
    buffer = io.BytesIO()
    save(buffer)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _histogram(name: str, measurements: Sequence[Measurement], label: str) -> str:
    """Distribution over images, one line a model, as a data URI."""
    values = [(m.model.name, m.reconstruction.of_image[name]) for m in measurements]
    edges = np.histogram_bin_edges(np.concatenate([part for _, part in values]), bins=40)
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot(xlabel=label, ylabel="images")
        for title, part in values:
            axes.stairs(np.histogram(part, edges)[0], edges, label=title[-40:])
        axes.legend(fontsize=7, loc="best")
        return _data_uri(lambda buffer: figure.savefig(buffer, format="svg"), "svg+xml")


def page(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    measurements: Sequence[Measurement],
    grids: Sequence[Image.Image],
    instruments: Instruments,
) -> str:
    """The comparison as one HTML file.

    Args:
        title: What was evaluated on what.
        heads, rows: Of `table_rows`.
        notes: Of `remarks`.
        measurements: Of each model.
        grids: Of each model.
        instruments: For the figures' names.
    """

    def cell(tag: str, text: str) -> str:
        return f"<{tag}>{html.escape(text).replace(chr(10), '<br>')}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", head) for head in ["", *heads]) + "</tr>"]
    lines += ["<tr>" + cell("th", row[0]) + "".join(cell("td", text) for text in row[1:]) + "</tr>" for row in rows]
    charts = [
        f'<img src="{_histogram(name, measurements, label_and_format(name, instruments)[0])}" alt="{html.escape(name)}">'
        for name in measurements[0].reconstruction.of_image
        if name != "mse_0_1"  # the same picture as on [-1, 1]
    ]
    pictures = [
        f'<h2>{html.escape(m.model.name)}</h2>\n<img alt="worst, median and best" src="'
        + _data_uri(lambda buffer, grid=grid: grid.save(buffer, "PNG"), "png")
        + '">'
        for m, grid in zip(measurements, grids)
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *(f"<p><small>{html.escape(note)}</small></p>" for note in notes),
            "<div><table>",
            *lines,
            "</table></div>",
            "<h2>Figures of single images</h2>",
            *charts,
            *pictures,
            "</body></html>\n",
        ]
    )
