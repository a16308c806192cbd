"""What a run leaves: Markdown tables, a chart, and the bar that says how far it is."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: its heading.
        note: what the cells say; "" = the heading does.
        header: names of the columns.
        rows: texts, as many as there are columns.
        chart: row -> column -> a number, for the picture; empty = not drawn.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    chart: dict[str, dict[str, float]] = field(default_factory=dict)

    def text(self) -> str:
        """As Markdown."""
        lines = [f"### {self.title}", "", *([self.note, ""] if self.note else [])]
        lines += [f"| {' | '.join(row)} |" for row in (self.header, ["---"] * len(self.header), *self.rows)]
        return "\n".join([*lines, ""])


class Progress:
    """A bar on the terminal, by tables; silent elsewhere.

    Attributes:
        begun: when the run began, by the clock on the wall.
    """

    def __init__(self, tables: int) -> None:
        self._tables, self._done, self.begun = max(1, tables), 0, time.monotonic()

    def table(self) -> None:
        """A table is done."""
        self._done += 1

    def step(self, what: str) -> None:
        """Another part of a table begins."""
        if sys.stderr.isatty():
            share = min(self._done, self._tables) * 30 // self._tables
            bar, taken = "#" * share + "." * (30 - share), time.monotonic() - self.begun
            print(f"\r[{bar}] {taken:4.0f} s  {what[:60]:60}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The line below the bar."""
        if sys.stderr.isatty():
            print(file=sys.stderr)


def machine(device: torch.device) -> str:
    """What it ran on, in general terms."""
    where = f"{torch.cuda.get_device_name(device)}, {platform.system()}" if device.type == "cuda" else "CPU, one thread"
    return f"{where}; Python {platform.python_version()}, torch {torch.__version__}"


def draw(tables: Sequence[Table], path: Path) -> bool:
    """The charts of the tables, one below the other; False where there is none, or no matplotlib."""
    shown = [table for table in tables if table.chart]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if shown:
        heights = [2 + len(table.chart) for table in shown]
        figure = Figure(figsize=(9, 0.3 * sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(shown), squeeze=False, height_ratios=heights)
        for axes, table in zip(grid[:, 0], shown, strict=True):
            _bars(axes, table)
        figure.savefig(path, dpi=110)
    return bool(shown)


def _bars(axes: Any, table: Table) -> None:
    names = list(dict.fromkeys(name for row in table.chart.values() for name in row))
    for at, name in enumerate(names):
        offset = (at + 0.5) / len(names) * 0.8 - 0.4
        bars = {i + offset: row[name] for i, row in enumerate(table.chart.values()) if name in row}
        axes.barh(list(bars), list(bars.values()), 0.8 / len(names), label=name, color=f"C{at}")
    axes.set_yticks(range(len(table.chart)), list(table.chart))
    axes.invert_yaxis()
    axes.set_title(table.title, fontsize=10, loc="left")
    axes.legend(fontsize=7)
    axes.tick_params(labelsize=8)
