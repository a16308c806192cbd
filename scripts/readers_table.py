"""What each program makes of each kind of file on each architecture, by the models of these programs: docs/readers.md,
and the cells of the README where a file is lost.

Layers of a model that differ in their numbers alone are alike to every program: some of each are looked at, and counted
as all.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from networks.archs import ARCHS
from networks.archs.spec import ArchSpec
from networks.files.verdicts import Verdict
from networks.hosts.caller import Caller
from networks.models.skeleton import skeleton
from networks.plan.forecast import forecast
from networks.plan.plan import PlanRow

SOME = 5  # more than two programs' tolerance of unknown keys
KINDS: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {},
    "DoRA": {"dora": "output"},
    "DoRA, input side": {"dora": "input"},
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr", "options": {"factor": 8}},
    "GLoRA": {"algo": "glora"},
    "whole difference": {"algo": "full"},
    "OFT": {"algo": "diag-oft"},
    "OFT, input side": {"algo": "diag-oft", "options": {"train_on_input": True}},
    "IA3": {"algo": "ia3"},
}
IN_README = ("LoRA", "DoRA", "LoKr")


@dataclass(frozen=True)
class Cell:
    """One kind of file on one architecture, as one program reads it.

    Attributes:
        loaded, inexact, total: layers of the released model.
        reason: the commonest one of a layer that is not loaded, else of one that is not exact; "" = all of it, exactly.
    """

    loaded: int
    inexact: int
    total: int
    reason: str = ""
    refused: bool = False

    @property
    def is_short(self) -> bool:
        """Whether a file is read, and not all of it."""
        return not self.refused and self.loaded < self.total

    def __str__(self) -> str:
        if self.refused:
            return f"refused: {self.reason}"
        count = f"{self.loaded}/{self.total}"
        return f"{count} exact" if not self.reason else f"{count}, {self.reason}"


@functools.cache
def cells() -> dict[str, dict[str, dict[str, Cell]]]:
    """Program -> architecture -> kind -> cell."""
    found: dict[str, dict[str, dict[str, Cell]]] = defaultdict(lambda: defaultdict(dict))
    for arch in ARCHS:
        for kind, title, cell in _of(arch) if arch.releases else ():
            found[title][arch.title][kind] = cell
    return found


def _of(arch: ArchSpec) -> Iterator[tuple[str, str, Cell]]:
    model = skeleton(arch.releases[0].name)
    plan = Caller(f"networks.{arch.entry}", "lora").plan(4, 1.0, model.text_encoders, model.unet)
    some, alike = _some(plan.trained), Counter(map(_pattern, plan.trained))
    shares = {pattern: count / min(SOME, count) for pattern, count in alike.items()}
    for kind, changes in KINDS.items():
        rows = [replace(row, **{"options": {}, **changes}) for row in some]
        small = replace(plan, rows=(*rows, *(row for row in plan.rows if not row.trained)))
        weights = {row.saved_name: shares[_pattern(row)] for row in rows}
        for verdict in forecast(small, plan.file_format):
            yield kind, verdict.title, _cell(verdict, weights, len(plan.trained))


def _pattern(row: PlanRow) -> tuple[str, str, tuple[int, ...]]:
    return row.part, re.sub(r"\d+", "#", row.trainer_name), row.shape


def _some(rows: Sequence[PlanRow]) -> list[PlanRow]:
    seen: Counter[object] = Counter()
    kept = []
    for row in rows:
        seen[_pattern(row)] += 1
        kept += [row] if seen[_pattern(row)] <= SOME else []
    return kept


def _cell(verdict: Verdict, weights: Mapping[str, float], total: int) -> Cell:
    reading = verdict.reading
    assert not reading.failed, f"{verdict.title}: {reading.failed}"
    if reading.refused:
        return Cell(0, 0, total, textwrap.shorten(reading.refused, 80, placeholder=" ...").replace("|", "\\|"), True)
    lost, inexact = Counter[str](), Counter[str]()
    for name, fate in reading.fates.items():
        counts = inexact if fate.loaded else lost
        counts[fate.reason] += weights[name]  # type: ignore[assignment]
    wrong = Counter({reason: count for reason, count in inexact.items() if reason})
    reason = next((reason for counts in (lost, wrong) for reason, _ in counts.most_common(1)), "")
    return Cell(round(inexact.total()), round(wrong.total()), total, reason)


def document() -> str:
    """docs/readers.md."""
    lines = [
        "# Which programs read which files",
        "",
        "Made by `python scripts/docs.py` from the models of these programs (`networks/files/readers/`), which are",
        "tested against the programs themselves. A cell has the layers that a program loads of those which a network",
        "trains by default, in the trainers' names (`save_format=portable`), and what is wrong with the rest or all.",
        "`kohya-networks show FILE` says it of one file, with the errors.",
    ]
    for title, rows in cells().items():
        lines += ["", f"## {title}", "", f"| | {' | '.join(KINDS)} |", f"| --- |{' --- |' * len(KINDS)}"]
        lines += [f"| {arch} | {' | '.join(str(row.get(kind, '-')) for kind in KINDS)} |" for arch, row in rows.items()]
    return "\n".join(lines) + "\n"


def worst() -> str:
    """One line for each program, with the models on which it loses layers of the commonest kinds of file."""
    lines = [f"| | {' | '.join(IN_README)} |", f"| --- |{' --- |' * len(IN_README)}"]
    for title, rows in cells().items():
        lines.append(f"| {title} | {' | '.join(_lost(rows, kind) for kind in IN_README)} |")
    return "\n".join(lines) + "\n"


def _lost(rows: Mapping[str, Mapping[str, Cell]], kind: str) -> str:
    here = [(arch, row[kind]) for arch, row in rows.items() if kind in row]
    acting, inexact = _where(here, "loaded"), _where(here, "inexact")
    short = [f"{arch} {cell.loaded}/{cell.total}" for arch, cell in here if cell.is_short]
    found = {"refused on": _where(here, "refused"), "layers lost on": short, "not exact on": inexact}
    texts = [f"{what} {', '.join(archs)}" for what, archs in found.items() if archs]
    if inexact and inexact == acting:
        texts[-1] = "not exact"
    if len(found["refused on"]) == len(here):
        return "refused on all"
    if not acting and not found["refused on"]:
        return "loads no layer"
    return "; ".join(texts) or "all, exactly"


def _where(here: Sequence[tuple[str, Cell]], what: str) -> list[str]:
    return [arch for arch, cell in here if getattr(cell, what)]
