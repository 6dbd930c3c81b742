"""Watches a training run from another process: a live page in the terminal, or one HTML file.

    python -m training.monitor [RUN] [--runs-dir runs] [--once] [--html FILE] [--refresh 2]

RUN is a run folder, its name, or a run name without its time; the default is the newest run. The page refreshes until
the run ends; in a pipe it is printed once. The monitor only reads files and does not import torch.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from training import cli
from training.monitor.rows import rows
from training.monitor.run import Run, clean, number, select_run

MAX_WIDTH = 110  # columns
_STYLES = {"live": "green", "starting": "cyan", "finished": "blue", "stopped": "yellow"}  # else red


def sparkline(values: Iterable[Any], width: int, ascii_only: bool = False, log: bool = False) -> str:
    """Draw values as one line of at most `width` characters, scaled from their minimum to their maximum.

    Args:
        values: Non-finite ones are ignored; if there are more than `width`, each character shows a mean.
        width: Columns.
        ascii_only: Use ASCII characters.
        log: Logarithmic scale, if all values are positive.
    """
    finite = [value for value in map(number, values) if value is not None]
    columns = min(width, len(finite))
    if columns < 1:
        return ""
    edges = [index * len(finite) // columns for index in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    if log and min(means) > 0:
        means = [math.log(mean) for mean in means]
    low, high = min(means), max(means)
    is_flat = high - low <= 1e-9 * max(abs(low), abs(high))  # rounding only
    levels = "_.-=+*%#" if ascii_only else "▁▂▃▄▅▆▇█"
    return "".join(levels[3 if is_flat else round((mean - low) / (high - low) * 7)] for mean in means)


def page(run: Run, console: Console) -> RenderableType:
    """The page for the terminal."""
    width = min(console.width, MAX_WIDTH)
    style = _STYLES.get(run.state.name, "red")
    drawing_width = max(10, width // 4)
    ascii_only = console.options.ascii_only

    def text(value: Any, style: str = "") -> Text:  # not markup: names and messages may contain brackets
        return Text(clean(value), style=style, overflow="fold")

    head = Table.grid(expand=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    head.add_row(text(run.path, "bold"), text(f" {run.state.name.upper()} ", f"bold reverse {style}"))
    warnings = run.warnings()
    notes = [text(run.state.detail, style)] if run.state.detail else []
    if len(warnings) > 3:
        notes.append(text(f"! {len(warnings) - 3} more warnings: see --html", "yellow"))
    notes += [text(f"! {warning}", "yellow") for warning in warnings[-3:]]
    notes += [text(f"| {line}", "red") for line in run.log_tail(3)]
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(style="dim", max_width=20, overflow="fold")
    table.add_column(ratio=1)
    table.add_column(width=drawing_width, no_wrap=True)
    for row in rows(run):
        drawing: RenderableType = Text(sparkline(row.values, drawing_width, ascii_only, row.log), style=style)
        if row.fraction is not None:
            drawing = ProgressBar(completed=100 * row.fraction, width=drawing_width)
        table.add_row(text(row.label), text(row.text), drawing)
    return Constrain(Group(head, *notes, Rule(characters="-", style="dim"), table), width)


def watch(run: Run, console: Console, refresh_seconds: float) -> None:
    """Show the page until the run ends or Ctrl-C is pressed; the last page stays on the terminal."""
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:  # crops what is too high
            while run.state.is_alive:
                live.update(page(run, console), refresh=True)
                time.sleep(refresh_seconds)
                run.refresh()
    except KeyboardInterrupt:
        pass
    console.print(page(run, console))


def _monitor(arguments: argparse.Namespace) -> None:
    if not 0.1 <= arguments.refresh <= 3600:
        raise ValueError(f"--refresh must be between 0.1 and 3600 seconds, got {arguments.refresh:g}.")
    run = Run(select_run(arguments.run, arguments.runs_dir))
    sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
    # Without force_terminal, FORCE_COLOR and the like would write escape codes into a pipe.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False)
    if arguments.html:
        from training.monitor.html import write_page

        write_page(run, rows(run), arguments.html)
        print(f"wrote {clean(arguments.html)}")
    if arguments.once or (console.is_dumb_terminal or not console.is_terminal) and not arguments.html:
        console.print(page(run, console))
    elif not arguments.html:
        watch(run, console, arguments.refresh)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.monitor", description="Watch a training run.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder or run name (default: the newest run)")
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (default: runs)"
    )
    parser.add_argument("--once", action="store_true", help="print the page once and exit; the default in a pipe")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with curves and image grids, and exit")
    parser.add_argument("--refresh", type=float, default=2.0, metavar="SECONDS", help="refresh interval (default: 2)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return cli.run(_monitor, build_parser().parse_args(argv))
