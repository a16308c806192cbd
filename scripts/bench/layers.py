"""Tables of one layer: counts, times, and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .cases import CASES, LAYERS, MAIN, SMALL, Case, Layer
from .counting import Counts, Skipped, count
from .peers import Peer, adapted
from .report import Table
from .setting import AUTOCAST, MODES, Setting
from .timing import seconds

FROZEN = "frozen"
COUNTED = "FLOP / frozen · kept · peak · traffic (in inputs x; +x: the input is kept as well) · launches"


@dataclass(frozen=True)
class Cell:
    """Counts in the units of the tables."""

    flops: float
    kept: float
    keeps_input: bool
    peak: float
    traffic: float
    launches: int

    @classmethod
    def of(cls, counts: Counts, frozen: Counts, unit: int) -> Cell:
        """Args:
        counts, frozen: of a layer with and without its adapter.
        unit: bytes of the input.
        """
        return cls(
            counts.flops / frozen.flops, counts.kept / unit, counts.keeps_input, counts.peak / unit,
            counts.traffic / unit, len(counts.launches),
        )  # fmt: skip

    def text(self) -> str:
        kept = f"{self.kept:.2f}{'+x' if self.keeps_input else ''}"
        return f"{self.flops:.2f} · {kept} · {self.peak:.1f} · {self.traffic:.1f} · {self.launches}"

    @staticmethod
    def least(cells: Sequence[Cell]) -> str:
        """Of each number the least, whosever it is; the input counts as kept."""
        if not cells:
            return "-"
        kept = min(cell.kept + cell.keeps_input for cell in cells)
        parts = [f"{min(cell.flops for cell in cells):.2f}", f"{kept:.2f}"]
        parts += [f"{min(cell.peak for cell in cells):.1f}", f"{min(cell.traffic for cell in cells):.1f}"]
        return " · ".join([*parts, str(min(cell.launches for cell in cells))])


def counts_of(setting: Setting, peer: Peer | None, layer: Layer, case: Case, mode: str) -> tuple[Counts, int] | None:
    """What a layer with an adapter costs, and the bytes of its input; None where the peer has no such adapter.

    Args:
        setting: of the run.
        peer: whose adapter; None = the frozen layer.
        layer, case: what is counted.
        mode: of `MODES`.
    """
    dtype = MODES[mode]
    torch.manual_seed(0)
    random.seed(0)
    with Skipped():
        made = adapted(peer, layer, case, dtype, setting.device)
        if made is None:
            return None
        x = layer.input(dtype, setting.device)
        forward, _ = setting.passes(made, x, mode)
        gradient = torch.ones_like(forward())
    return count(forward, x, gradient, made.known, computed=False), x.numel() * x.element_size()


def cells_of(setting: Setting, layer: Layer, case: Case, mode: str) -> dict[str, Cell]:
    """By the names of the peers that have the adapter."""
    frozen, found = counts_of(setting, None, layer, case, mode), {}
    assert frozen is not None
    for peer in setting.peers:
        with setting.failing(peer, case):
            counted = counts_of(setting, peer, layer, case, mode)
            if counted is not None:
                found[peer.name] = Cell.of(counted[0], frozen[0], counted[1])
    return found


def counts(setting: Setting) -> Iterator[Table]:
    """Of every layer; all peers on the first."""
    names = [peer.name for peer in setting.peers]
    for title in setting.sizes.counted:
        for mode in MODES if title == MAIN else (AUTOCAST,):
            rows = []
            for name in setting.sizes.cases:
                setting.progress.step(f"counts: {title}, {name}")
                cells = cells_of(setting, LAYERS[title], CASES[name], mode)
                if title == MAIN:
                    rows.append([name, *(cells[each].text() if each in cells else "-" for each in names)])
                elif "ours" in cells:
                    others = [cell for each, cell in cells.items() if each != "ours"]
                    rows.append([name, Cell.least([cells["ours"]]), Cell.least(others)])
            columns = names if title == MAIN else ["ours", "least of the others, of each number"]
            yield Table(f"{title}, {mode}: counts", COUNTED, ["adapter", *columns], rows)


def times_of(setting: Setting, layer: Layer, case: Case, mode: str, each: float) -> dict[str, float]:
    """Seconds of forward and backward, of the frozen layer and of the peers that have the adapter.

    Args:
        setting: of the run.
        layer, case, mode: what is measured.
        each: seconds for each of them.
    """
    runs = {}
    for peer in (None, *setting.peers):
        with setting.failing(peer, case):
            made = adapted(peer, layer, case, MODES[mode], setting.device)
            if made is not None:
                _, both = setting.passes(made, layer.input(MODES[mode], setting.device), mode)
                both()
                runs[FROZEN if peer is None else peer.name] = both
    return seconds(runs, each, setting.device)


def times(setting: Setting) -> Iterator[Table]:
    """Times over the frozen layer."""
    names = [peer.name for peer in setting.peers]
    for title in setting.sizes.timed:
        for mode in MODES if title == MAIN else (AUTOCAST,):
            chart: dict[str, dict[str, float]] = {}
            for name in setting.sizes.cases if title == MAIN else setting.sizes.few:
                setting.progress.step(f"times: {title}, {mode}, {name}")
                found = times_of(setting, LAYERS[title], CASES[name], mode, setting.sizes.seconds)
                chart[name] = {each: took / found[FROZEN] for each, took in found.items() if each != FROZEN}
            yield Table(
                f"{title}, {mode}: time of forward and backward over that of the frozen layer", "",
                ["adapter", *names], _rows(chart, names, "{:.2f}"), chart if mode == AUTOCAST else {},
            )  # fmt: skip


def python(setting: Setting) -> Iterator[Table]:
    """Of a layer so small that nothing but calls takes time."""
    names = [peer.name for peer in setting.peers]
    for mode in MODES:
        chart: dict[str, dict[str, float]] = {}
        for name in setting.sizes.cases:
            setting.progress.step(f"Python: {mode}, {name}")
            case = small(CASES[name])
            found = times_of(setting, SMALL, case, mode, setting.sizes.seconds / 2)
            chart[name] = {each: (took - found[FROZEN]) * 1e6 for each, took in found.items() if each != FROZEN}
        yield Table(
            f"Python per layer, {mode}: microseconds over the frozen one (16 x 16, 4 tokens)", "",
            ["adapter", *names], _rows(chart, names, "{:.0f}"),
        )  # fmt: skip


def small(case: Case) -> Case:
    """With a rank or block that fits 16 channels."""
    return Case(
        case.algo, min(case.dim, 4), {**case.options} | ({"factor": 4} if "factor" in case.options else {}), case.dora
    )


def _rows(chart: Mapping[str, Mapping[str, float]], names: Sequence[str], form: str) -> list[list[str]]:
    return [
        [row, *(form.format(found[name]) if name in found else "-" for name in names)] for row, found in chart.items()
    ]
