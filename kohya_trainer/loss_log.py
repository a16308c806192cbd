"""The record of a training run: a CSV that grows while it trains, and the curve drawn from it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from networks.cli.command_line import write_atomically

COLUMNS = "step,loss,lr,val_loss\n"
SMOOTHING = 0.95  # weight of the past in the smoothed curve


@dataclass
class LossLog:
    """Losses of a run, written to `path` line by line, so that an interrupted run keeps what it had.

    Columns: step, loss (mean over the step's batches), lr (first optimizer group), val_loss. Empty = not measured.

    Args:
        resumed: the step from which the run goes on; earlier rows are kept, without one that a crash cut off.
        comparable: losses of the training and held-out ones are of one kind.
        writes: one of several processes does.
    """

    path: Path
    resumed: int = 0
    comparable: bool = True
    writes: bool = True
    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    _norm: float = 0.0

    def __enter__(self) -> LossLog:
        self._file: TextIO = io.StringIO()
        if self.writes:
            text = COLUMNS + "".join(self._record(*row) for row in self._kept())
            write_atomically(self.path, partial(Path.write_text, data=text, encoding="utf-8", newline="\n"))
            self._file = self.path.open("a", encoding="utf-8", newline="\n", buffering=1)
        return self

    def _kept(self) -> Iterator[tuple[Any, ...]]:
        if not self.resumed or not self.path.is_file():
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # behind it is what a crash cut off
        for row in csv.DictReader(io.StringIO(whole)):
            try:
                step, cells = int(row["step"]), [row[key] for key in ("loss", "lr", "val_loss")]
                values = [float(cell) if cell else None for cell in cells]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path} is no record of a run ({error}). Move it away, or mend it.") from error
            if step <= self.resumed:
                yield step, *values

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, step: int, loss: float | None, lr: float | None, val_loss: float | None = None) -> None:
        """Record one step.

        Args:
            step: 0 is the state before training.
            loss: mean over the step's batches.
            lr: of the first optimizer group.
            val_loss: mean over the held-out examples; None = not measured, as in the others.
        """
        self._file.write(self._record(step, loss, lr, val_loss))

    def _record(self, step: int, loss: float | None, lr: float | None, val_loss: float | None) -> str:
        if loss is not None:
            self.train.append((step, loss))
            self._smooth(loss)
        if val_loss is not None:
            self.validation.append((step, val_loss))
        cells = ["" if value is None else f"{value:.8g}" for value in (loss, lr, val_loss)]
        return ",".join([str(step), *cells]) + "\n"

    @property
    def average(self) -> float:
        """The smoothed loss of the last step; nan before the first."""
        return self.smoothed[-1] if self.smoothed else float("nan")

    def _smooth(self, loss: float) -> None:
        """Exponential moving average without the bias of its start: a weighted mean of the losses so far."""
        former = self.smoothed[-1] * self._norm if self.smoothed else 0.0
        self._norm = SMOOTHING * self._norm + (1 - SMOOTHING)
        self.smoothed.append((SMOOTHING * former + (1 - SMOOTHING) * loss) / self._norm)

    def draw(self, path: Path, title: str) -> None:
        """Write the loss curve as PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
        if self.train:
            steps, losses = zip(*self.train, strict=True)
            axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
            axes.plot(steps, self.smoothed, color="#08519c", linewidth=2, label="training, smoothed")
        second = axes if self.comparable or not self.validation else axes.twinx()
        if self.validation:
            steps, losses = zip(*self.validation, strict=True)
            kind = "held out" if second is axes else "held out, mean squared error (right)"
            second.plot(steps, losses, "o-", color="#d95f0e", markersize=6, label=kind)
            for (step, loss), side in zip((self.validation[0], self.validation[-1]), ("left", "right"), strict=True):
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
                place = {"textcoords": "offset points", "xytext": (0, -16), "ha": side, "bbox": box}
                second.annotate(f"{loss:.4f}", (step, loss), color="#993404", **place)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_title(title, parse_math=False)  # a name may have $ in it
        for each in {axes, second}:
            each.set_ylim(0, 1.15 * each.get_ylim()[1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        handles = [line for each in dict.fromkeys((axes, second)) for line in each.get_lines()]
        axes.legend(handles=handles, loc="upper right")
        figure.tight_layout()
        write_atomically(path, lambda temporary: figure.savefig(temporary))
        pyplot.close(figure)
