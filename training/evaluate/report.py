"""Shows evaluation results: a table, a grid of the worst, median and best images, and an HTML page.

The page is one file: images and charts are inside it, it has no script, and its content security policy forbids the
network.
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
from training.evaluate.measure import MetricNetworks, ModelResult, reconstruct

_COLUMNS = 4  # images of each kind in the grid
_MIN_TILE = 128  # pixels; smaller images are enlarged by an integer factor
_GAP, _LINE = 8, 20
_LABELS = {
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "mse_-1_1": ("MSE, images in [-1, 1]", "{:.5f}"),
    "mse_0_1": ("MSE, images in [0, 1]", "{:.5f}"),
    "l1_-1_1": ("L1, images in [-1, 1]", "{:.4f}"),
    "identity_distance": ("identity, distance of embeddings", "{:.3f}"),
    "same_person": ("identity, same person", "{:.1%}"),
    "kl": ("KL, nats per dimension", "{:.3f}"),
    "posterior_sigma": ("posterior sigma", "{:.4f}"),
    "active_units": ("active latent dimensions", "{:,}"),
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


def label_and_format(name: str, networks: MetricNetworks) -> tuple[str, str]:
    """A metric's name for people, and the format of its values."""
    if networks.frechet is not None and name == networks.frechet.key:
        return networks.frechet.label, "{:.4g}"
    if name.startswith("lpips_"):
        return f"LPIPS, {name.removeprefix('lpips_')}", "{:.4f}"
    return _LABELS[name]


def table_rows(summaries: Sequence[dict], networks: MetricNetworks) -> tuple[list[str], list[list[str]]]:
    """The comparison as text: a column for each set of reconstructions, a row for each metric.

    Returns:
        Heads of the columns after the first; rows, each beginning with its label. A dash is what a model does not
        have; metrics of the posterior stand in the column of its mean.
    """
    columns = [(s, kind) for s in summaries for kind in ("reconstruction", "posterior_sample") if s[kind] is not None]
    kinds = {"reconstruction": "posterior mean", "posterior_sample": "posterior sample"}
    heads = [f"{s['model']}\n{kinds[kind] if s['kl'] is not None else s['class']}" for s, kind in columns]

    def cells(name: str, values: list) -> list[str]:
        label, form = label_and_format(name, networks)
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
        ["latent dimensions", *(f"{s['latent_dim']:,} ({'x'.join(map(str, s['latent_shape']))})" for s, _ in columns)],
        ["parameters", *(f"{s['parameters']:,}" for s, _ in columns)],
    ]
    if any("run" in s["weights"] for s in summaries):
        names = ["{run}, step {step}".format(**s["weights"]) if "run" in s["weights"] else "-" for s, _ in columns]
        rows.append(["trained in", *names])
    rows += [cells(name, [s[kind][name] for s, kind in columns]) for name in summaries[0]["reconstruction"]]
    for name in ("kl", "active_units", "posterior_sigma"):
        rows.append(cells(name, [s[name] if kind == "reconstruction" else None for s, kind in columns]))
    return heads, rows


def reading_notes(summaries: Sequence[dict], networks: MetricNetworks) -> list[str]:
    """What to know when reading the table."""
    counts = sorted({s["images"] for s in summaries})
    lines = [
        f"{' or '.join(f'{count:,}' for count in counts)} images; means over images, [95 % percentile-bootstrap "
        "interval over images]. A model with a posterior reconstructs from its mean, and from one sample of it."
    ]
    if len({s["resolution"] for s in summaries}) > 1:
        lines.append("The image sizes differ, so no metric is comparable between columns: give --resolution.")
    if networks.frechet is not None:
        few = f", and {counts[0]:,} are few" if counts[0] < 5000 else ""
        lines.append(
            f"{networks.frechet.label}: its estimate is biased upwards, the more the fewer images{few}; compare it "
            "only over the same images and features."
        )
    if networks.identity is not None and networks.identity.undetected:
        lines.append(
            f"Identity: no face was detected in {networks.identity.undetected:,} images, whose middle was taken for one."
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


def ranking_metric(result: ModelResult) -> tuple[str, np.ndarray]:
    """The metric that ranks images from worst to best, the first LPIPS or else the MSE; its name and values (n,)."""
    per_image = result.reconstruction.per_image
    name = next((name for name in per_image if name.startswith("lpips_")), "mse_-1_1")
    return name, per_image[name]


@torch.no_grad()
def extremes_grid(result: ModelResult, images: Tensor, device: torch.device) -> Image.Image:
    """The worst, median and best reconstructions of a model, with their metrics.

    Args:
        result: Of these images.
        images: (n, 3, H, W), uint8.
        device: Of the model.

    Returns:
        A row for each kind: every image beside its reconstruction, its index and metrics below.
    """
    name, values = ranking_metric(result)
    order = np.argsort(-values, kind="stable")
    count = min(_COLUMNS, len(order))
    middle = (len(order) - count) // 2
    kinds = {"worst": order[:count], "median": order[middle : middle + count], "best": order[::-1][:count]}
    tile = images.shape[-1] * max(1, -(-_MIN_TILE // images.shape[-1]))
    column, row = 2 * (tile + _GAP), tile + 2 * _LINE + _GAP
    canvas = Image.new("RGB", (_GAP + count * column, _LINE + 3 * (row + _LINE)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    origin = " from the posterior's mean" if result.posterior is not None else ""
    draw.text((_GAP, 2), f"by {name}; left: image, right: reconstruction{origin}", "black", font)
    top = _LINE
    for kind, chosen in kinds.items():
        draw.text((_GAP, top + 2), kind, "black", font)
        top += _LINE
        indices = [result.indices[i] for i in chosen]
        originals = images[torch.as_tensor(chosen.copy())]
        decoded = denormalize(reconstruct(result.model, normalize(originals.to(device)), indices)[0]).cpu()
        for i, *pair in zip(range(count), originals, decoded):
            left = _GAP + i * column
            for offset, pixels in zip((0, tile), pair):
                picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                canvas.paste(picture.resize((tile, tile), Image.Resampling.NEAREST), (left + offset, top))
            text = f"image {indices[i]}: {result.reconstruction.per_image['psnr'][chosen[i]]:.1f} dB"
            if name.startswith("lpips_"):
                text += f", LPIPS {values[chosen[i]]:.3f}"
            draw.text((left, top + tile + 2), text, "black", font)
        top += row
    return canvas


def _data_uri(save: Callable[[io.BytesIO], None], kind: str) -> str:
    buffer = io.BytesIO()
    save(buffer)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _histogram(name: str, results: Sequence[ModelResult], label: str) -> str:
    """Distribution over images, one line per model, as a data URI."""
    values = [(r.model.name, r.reconstruction.per_image[name]) for r in results]
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
    results: Sequence[ModelResult],
    grids: Sequence[Image.Image],
    networks: MetricNetworks,
) -> str:
    """The comparison as one HTML file.

    Args:
        title: What was evaluated on what.
        heads, rows: Of `table_rows`.
        notes: Of `reading_notes`.
        results: Of each model.
        grids: Of each model.
        networks: Name the metrics.
    """

    def cell(tag: str, text: str) -> str:
        return f"<{tag}>{html.escape(text).replace(chr(10), '<br>')}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", head) for head in ["", *heads]) + "</tr>"]
    lines += ["<tr>" + cell("th", row[0]) + "".join(cell("td", text) for text in row[1:]) + "</tr>" for row in rows]
    charts = [
        f'<img src="{_histogram(name, results, label_and_format(name, networks)[0])}" alt="{html.escape(name)}">'
        for name in results[0].reconstruction.per_image
        if name != "mse_0_1"  # the same shape as on [-1, 1]
    ]
    pictures = [
        f'<h2>{html.escape(r.model.name)}</h2>\n<img alt="worst, median and best" src="'
        + _data_uri(lambda buffer, grid=grid: grid.save(buffer, "PNG"), "png")
        + '">'
        for r, grid in zip(results, grids)
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
            "<h2>Distributions over images</h2>",
            *charts,
            *pictures,
            "</body></html>\n",
        ]
    )
