"""Watches a training run from outside: a live page in the terminal, or one HTML file.

What this file is for: the command, and the figures that the terminal and the HTML file share. It only reads
(`training.monitor.run`), imports no torch and uses no device: a run never notices it. What it is not for:
curves (`training.monitor.html`; TensorBoard for closer looks) or steering a run.

    python -m training.monitor [RUN] [--runs-dir runs] [--once] [--html FILE] [--refresh 2]

RUN is a run directory, its name, or a run name without its time stamp; without it, the newest run. The page
refreshes until the run ends. In a pipe it is printed once, without escape codes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from training.monitor.run import Run, clean, duration, find_run, number

MAX_WIDTH = 110  # columns of the page on a wider terminal
_STYLES = {"live": "green", "starting": "cyan", "finished": "blue", "stopped": "yellow"}  # else red


@dataclass(frozen=True)
class Example:
    """One line of the page.

    Attributes:
        label: What the figures are.
        text: The figures.
        draw: Draws them, given `width` in columns and `ascii_only`.
        minor: Left out first where the terminal is too low for the page.
    """

    label: str
    text: str
    draw: Callable[..., str] | None = None
    minor: bool = False


def sparkline(values: Iterable[float | None], width: int, ascii_only: bool = False, log: bool = False) -> str:
    """Draws values as one line of at most `width` blocks, from their least to their greatest.

    Args:
        values: What is not finite is left out.
        width: Where there are more values than columns, each column shows a mean.
        ascii_only: Use characters of ASCII.
        log: Scale logarithmically, unless a value is not above 0.
    """
    kept = [value for value in map(number, values) if value is not None]
    if not kept or width < 1:
        return ""
    columns = min(width, len(kept))
    edges = [index * len(kept) // columns for index in range(columns + 1)]
    means = [sum(kept[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    if log and min(means) > 0:
        means = [math.log(mean) for mean in means]
    low, high = min(means), max(means)
    flat = high - low <= 1e-9 * max(abs(low), abs(high))  # no more than rounding
    levels = "_.-=+*%#" if ascii_only else "▁▂▃▄▅▆▇█"
    return "".join(levels[3 if flat else round((mean - low) / (high - low) * 7)] for mean in means)


def gauge(share: float | None, low: float, high: float, width: int, ascii_only: bool = False) -> str:
    """Draws a share against its band on a log axis that reaches 8 times past either edge."""
    if low <= 0 or high <= low or width < 3:
        return ""
    start, span = math.log(low / 8), math.log(high / low * 64)
    outside, band, mark = ".=O" if ascii_only else "·━●"

    def column(value: float) -> int:
        return round(min(max((math.log(value) - start) / span, 0.0), 1.0) * (width - 1)) if value > 0 else 0

    cells = [band if column(low) <= index <= column(high) else outside for index in range(width)]
    if share is not None:
        cells[column(share)] = mark
    return "".join(cells)


def bar(fraction: float, width: int, ascii_only: bool = False) -> str:
    """Draws a fraction from 0 to 1 as a bar."""
    full = round(min(max(fraction, 0.0), 1.0) * width)
    return ("#" if ascii_only else "█") * full + ("-" if ascii_only else "░") * (width - full)


def _figure(value: Any, form: str = ".4g") -> str:
    value = number(value)
    return "n/a" if value is None else f"{value:{form}}"


def _percent(value: Any) -> str:
    value = number(value)
    return "n/a" if value is None else f"{100 * value:.3g} %"


def _row(run: Run, label: str, key: str, text: str, *, log: bool = False, minor: bool = False) -> list[Example]:
    """A row with the curve of a field; none where the latest lines lack the field."""
    if key not in run.train and key not in run.validation:
        return []
    return [Example(label, text, partial(sparkline, run.series[key].ys, log=log) if key in run.series else None, minor)]


def _progress_rows(run: Run) -> list[Example]:
    merged = run.train | {key: value for key, value in run.status.items() if value is not None}
    names = ("epoch", "step", "images_seen", "num_epochs", "steps_per_epoch", "seconds_left")
    epoch, step, images, epochs, per_epoch, left = (number(merged.get(name)) for name in names)
    epochs = epochs or run.preset("num_epochs")
    if epoch is None:
        return [Example("progress", "nothing logged yet")]
    if epochs:
        done = min(step / (per_epoch * epochs) if per_epoch and step is not None else epoch / epochs, 1.0)
        if run.state.alive:  # `epoch` counts from 0 and is the one in hand, or the number of those done
            text = f"epoch {min(epoch + 1, epochs):.0f} of {epochs:.0f}, {_percent(done)}"
        else:
            text = f"{epoch:.0f} of {epochs:.0f} epochs done, {_percent(done)}"
        made = [Example("progress", text, partial(bar, done))]
    else:
        made = [Example("progress", f"epoch {epoch + 1:.0f}")]
    if step is not None and images is not None:
        made.append(Example("seen", f"{images:,.0f} images in {step:,.0f} steps", minor=True))
    if left is not None and run.state.alive:
        left = max(0.0, left - (time.time() - run.last_update))
        end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + left))
        made.append(Example("time left", f"{duration(left)}, until {end}"))
    return made


def _loss_rows(run: Run) -> list[Example]:
    made: list[Example] = []
    for name in ("total", "reconstruction", "mse", "l1", "perceptual", "lpips", "kl"):
        text = _figure(run.train.get(f"loss/{name}"))
        if f"weighted/{name}" in run.train:
            text = f"{text:<9} weighted {_figure(run.train[f'weighted/{name}'])}"
        label = "loss without KL" if name == "reconstruction" else f"loss {name}"
        made += _row(run, label, f"loss/{name}", text, log=True, minor=name not in ("total", "kl"))
    return made


def _kl_rows(run: Run) -> list[Example]:
    train = run.train
    smoothed = number(train.get("kl/smoothed_fraction"))
    key = "kl/loss_fraction" if smoothed is None else "kl/smoothed_fraction"
    share, low, high = (number(train.get(name)) for name in (key, "kl/target_low", "kl/target_high"))
    made: list[Example] = []
    if share is not None and low is not None and high is not None:
        place = "below" if share < low else "above" if share > high else "inside"
        text = f"{_percent(share)}, {place} band {100 * low:.3g} to {_percent(high)}"
        made.append(Example("KL share", text, partial(gauge, share, low, high)))
    made += _row(run, "KL share trend", key, f"now {_percent(train.get('kl/loss_fraction'))} unsmoothed", log=True)
    if "kl/nats_per_image" in train:
        nats = [_figure(train.get(name)) for name in ("loss/kl", "kl/nats_per_image")]
        made.append(Example("KL in nats", f"{nats[0]} per number, {nats[1]} per image", minor=True))
    text = f"{_figure(train.get('kl/beta'), '.3g')}, floor {_figure(train.get('kl/beta_floor'), '.3g')}"
    return made + _row(run, "KL beta", "kl/beta", text, log=True)


def _optimizer_rows(run: Run) -> list[Example]:
    names = ("learning_rate", "grad_norm", "clipped_fraction", "skipped_steps")
    rate, norm, clipped, skipped = (number(run.train.get(f"optim/{name}")) for name in names)
    text = f"{_figure(rate, '.3g')}, minimum {_figure(run.preset('min_learning_rate'), '.3g')}"
    made = _row(run, "learning rate", "optim/learning_rate", text, log=True)
    text = f"{_figure(norm, '.3g')}, clipped in {_percent(clipped)}"
    text += f", {skipped:,.0f} skipped" if skipped else ""
    made += _row(run, "gradient norm", "optim/grad_norm", text, log=True, minor=True)
    for label, name in (("plateau", "plateau"), ("early stop", "early_stopping")):
        bad, patience = number(run.status.get(f"{name}_bad_epochs")), run.preset(f"{name}_patience")
        if patience == 0:
            made.append(Example(label, f"off ({name}_patience is 0)", minor=True))
        elif bad is not None:
            limit = "" if patience is None else f" of {patience:.0f}"
            made.append(Example(label, f"{bad:.0f}{limit} epochs without improvement"))
    return made


def _validation_rows(run: Run) -> list[Example]:
    validation = run.validation
    best = run.status.get("best") if isinstance(run.status.get("best"), dict) else {}
    made: list[Example] = []
    if number(best.get("epoch")) is not None:
        made.append(Example("best model", f"after {best['epoch']:.0f} epochs"))
    labels = {"reconstruction_loss": "val. loss", "psnr": "PSNR", "mse": "MSE", "ssim": "SSIM"}
    trunks = sorted(key[11:] for key in validation if key.startswith("validation/lpips_"))
    for name in ("reconstruction_loss", "psnr", *trunks, "mse", "ssim"):
        key, form = f"validation/{name}", ".2f" if name == "psnr" else ".4g"
        text = _figure(validation.get(key), form)
        text += {"psnr": " dB", "mse": " in [-1, 1]"}.get(name, f" {name[6:]}" if name in trunks else "")
        text += f", best model {_figure(best[key], form)}" if key in best else ""
        made += _row(run, labels.get(name, "LPIPS"), key, text, minor=name in ("mse", "ssim"))
    units, sigma = (validation.get(f"validation/{name}") for name in ("active_units", "posterior_sigma"))
    text = f"{_figure(units)} active units, sigma {_figure(sigma, '.3g')}"
    return made + _row(run, "latents", "validation/active_units", text, minor=True)


def _machine_rows(run: Run) -> list[Example]:
    names = ("images_per_second", "data_wait_fraction", "memory_gib")
    rate, wait, memory = (number(run.train.get(f"speed/{name}")) for name in names)
    text = f"{_figure(rate)} images/s" + (f", {memory:.3g} GiB" if memory else "")
    made = _row(run, "throughput", "speed/images_per_second", text)
    return made + _row(run, "data wait", "speed/data_wait_fraction", f"{_percent(wait)} of the time")


def rows(run: Run) -> list[Example]:
    """The figures of a run; what it does not log has no row."""
    made = _progress_rows(run) + _loss_rows(run) + _kl_rows(run) + _optimizer_rows(run)
    made += _validation_rows(run) + _machine_rows(run)
    for kind in ("samples", "reconstructions"):
        if path := run.grid(kind):
            # The directory heads the page, so that this fits on one line and can be copied whole.
            made.append(Example(kind, path.relative_to(run.path).as_posix(), minor=kind != "samples"))
    if run.status.get("model_dir"):
        made.append(Example("model", str(run.status["model_dir"])))
    return made


def page(run: Run, console: Console, height: int | None = None) -> Group:
    """The page for the terminal.

    Args:
        console: Gives the width and the characters that its encoding has.
        height: Lines that there are; minor rows give way. None: any number.
    """
    encoding = console.encoding
    try:
        ascii_only = not "█·━●░▁".encode(encoding)
    except UnicodeEncodeError:
        ascii_only = True
    width = min(console.width, MAX_WIDTH)
    style = _STYLES.get(run.state.name, "red")
    drawn = max(10, (width - 19) * 2 // 5)

    def text(value: Any, style: str = "") -> Text:  # never markup: names and messages come from elsewhere
        return Text(clean(value, encoding), style=style, overflow="fold")

    def build(shown: list[Example]) -> Group:
        head = Table.grid(expand=True)
        head.width = width
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(
            text(run.path, "bold"),
            text(f" {run.state.name.upper()} ", f"bold reverse {style}"),
        )
        table = Table.grid(padding=(0, 2, 0, 0))
        table.width = width
        table.add_column(style="dim", no_wrap=True, width=15)
        table.add_column(ratio=1)
        for row in shown:
            drawing = row.draw(width=drawn, ascii_only=ascii_only) if row.draw else ""
            line = Table.grid(padding=(0, 1, 0, 0), expand=True)
            line.add_column(ratio=1)
            if drawing:
                line.add_column(width=drawn, no_wrap=True)
            line.add_row(*[text(row.text), Text(drawing, style=style)][: 1 + bool(drawing)])
            table.add_row(Text(row.label), line)
        warnings = run.warnings()
        notes = [text(f"! {warning}", "yellow") for warning in warnings[-3:]]
        if len(warnings) > 3:
            notes.insert(0, text(f"! {len(warnings) - 3} more: --html shows them", "yellow"))
        notes += [text(f"| {line}", "red") for line in run.log_tail(3)]
        detail = [text(run.state.detail, style)] if run.state.detail else []
        return Group(head, *detail, *notes, Text("-" * width if ascii_only else "─" * width, style="dim"), table)

    shown = rows(run)
    built = build(shown)
    while height and len(console.render_lines(built)) > height and any(row.minor for row in shown):
        shown.remove([row for row in shown if row.minor][-1])
        built = build(shown)
    return built


def watch(run: Run, console: Console, refresh_seconds: float) -> None:
    """Shows the page until the run ends or Ctrl-C; the last page stays on the terminal."""
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(page(run, console, console.height - 1 if run.state.alive else None), refresh=True)
            if not run.state.alive:
                return
            time.sleep(refresh_seconds)
            run.refresh()


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m training.monitor", description="Watch a training run.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="run directory or name (default: the newest run)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--once", action="store_true", help="print the page and exit; so it is in a pipe")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with curves and grids, and exit")
    parser.add_argument("--refresh", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")
    arguments = parser.parse_args(argv)
    if not 0.1 <= arguments.refresh <= 3600:
        parser.error(f"--refresh {arguments.refresh}: give 0.1 to 3600 seconds")
    # Without force_terminal, FORCE_COLOR and the like would bring escape codes into a pipe.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False)
    try:
        run = Run(find_run(arguments.run, arguments.runs_dir))
        if arguments.html:
            from training.monitor.html import write_page

            write_page(run, [(row.label, row.text) for row in rows(run)], arguments.html)
        if arguments.once or not (arguments.html or console.is_terminal) or console.is_dumb_terminal:
            console.print(page(run, console))
        elif not arguments.html:
            watch(run, console, arguments.refresh)
        if arguments.html:
            print(f"wrote {clean(arguments.html, console.encoding)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
