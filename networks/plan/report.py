"""Plans, summaries and load reports as text. Wording only; no decisions."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..files.places import Missing, examples

if TYPE_CHECKING:
    from .plan import Plan, PlanRow

Item = TypeVar("Item")

_FIELDS = (
    "part",
    "dotted_name",
    "saved_name",
    "kind",
    "algo",
    "dim",
    "alpha",
    "scale",
    "lr",
    "plus_ratio",
    "plus_unit",
    "dora_ratio",
)


def plan_json(plan: Plan) -> dict[str, Any]:
    """JSON-able form: one object per layer and the totals."""
    rows = []
    for row in plan.rows:
        entry = {name: getattr(row, name) for name in _FIELDS} | row.dropouts.given if row.trained else {}
        entry |= {"name": row.shown_name, "part": row.part, "dotted_name": row.dotted_name}
        entry |= {"saved_name": row.saved_name, "kind": row.kind}
        entry |= {"shape": list(row.shape), "trained": row.trained}
        entry |= {"parameters": row.parameters, "bytes": row.bytes} if row.trained else {"reason": row.reason}
        rows.append(entry)
    return {
        "architecture": plan.title,
        "rows": rows,
        "totals": totals(plan),
        "training_adapters": [asdict(one) for one in plan.beside],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "readers": plan.readers(),
    }


def totals(plan: Plan) -> dict[str, Any]:
    """Sums over the trained layers, `learning` of what the optimizer gets; bytes in fp32."""
    parameters, learning = (sum(getattr(row, name) for row in plan.trained) for name in ("parameters", "learning"))
    return {
        "layers": len(plan.rows),
        "trained": len(plan.trained),
        "trained_by_part": dict(Counter(row.part for row in plan.trained)),
        "without_gradient": sum(row.unread for row in plan.trained),
        "parameters": parameters,
        "learning": learning,
        "bytes": 4 * parameters,
        "training_bytes": 4 * parameters + 12 * learning,  # weight; gradient and two moments of AdamW
        "average_bytes": 4 * learning if plan.average else 0,
    }


def plan_text(plan: Plan, columns: int = 0) -> str:
    """A table: one line per layer, then totals and notes.

    Args:
        plan: the plan.
        columns: of the terminal; where the table is wider, each layer has two lines, and saved names and bytes are left
            out. 0 = as wide as it is.
    """
    text = _table(plan)
    if columns and max(map(len, text)) > columns:
        text = [line for row in plan.rows for line in _narrow(row, columns)]
        text = [plan.title, "saved names and bytes: in a wider terminal, in a file, with --json", *text]
    return "\n".join([*text, "", *summary(plan)]) + "\n"


def _narrow(row: PlanRow, columns: int) -> list[str]:
    about = f"{row.kind} {'x'.join(map(str, row.shape))}"
    if row.trained:
        values = [f"rank {row.dim}", f"alpha {row.alpha:g}", f"scale {row.scale:.6g}", f"lr {_lr(row)}"]
        values += [f"{row.parameters:,} values"] + ([_dropouts(row)] if row.dropouts else [])
        about += f", {', '.join(values)}"
    else:
        about += f" - {row.reason}"
    return [
        row.shown_name,
        *textwrap.wrap(
            about, columns, initial_indent="    ", subsequent_indent="        ", break_long_words=False,
            break_on_hyphens=False,
        ),
    ]  # fmt: skip


def _table(plan: Plan) -> list[str]:
    head: tuple[str, ...] = (
        "layer", "saved name", "kind", "shape", "rank", "alpha", "scale", "lr", "parameters", "bytes",
    )  # fmt: skip
    dropouts = any(row.dropouts for row in plan.trained)
    head = (*head, "dropouts") if dropouts else head
    lines = [head, *(_cells(row, dropouts) for row in plan.rows)]
    widths = [max(len(cells[i]) for cells in lines if len(cells) == len(head)) for i in range(len(head))]
    text = [f"{plan.title}"]
    for cells in lines:
        if len(cells) == len(head):
            text.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        else:
            *first, reason = cells
            text.append("  ".join([*(c.ljust(w) for c, w in zip(first, widths, strict=False)), f"- {reason}"]))
    return text


def _cells(row: PlanRow, dropouts: bool) -> tuple[str, ...]:
    name = row.shown_name
    shape = "x".join(map(str, row.shape))
    if not row.trained:
        return name, row.saved_name, row.kind, shape, row.reason
    values = (str(row.dim), f"{row.alpha:g}", f"{row.scale:.6g}", _lr(row), f"{row.parameters:,}", f"{row.bytes:,}")
    return (name, row.saved_name, row.kind, shape, *values, *([_dropouts(row)] if dropouts else []))


def _dropouts(row: PlanRow) -> str:
    return " ".join(f"{name} {p:g}" for name, p in row.dropouts.given.items()) or "-"


def _lr(row: PlanRow) -> str:
    """x1: the part's learning rate; =1e-05: its own; x1/x16: plus parameters 16 times faster, by a rate or a unit;
    x1/dora x0.1: magnitudes 10 times slower."""
    base = "x1" if row.lr is None else f"={row.lr:g}"
    factors = {"unit ": row.plus_unit, "x": row.plus_ratio, "dora x": row.dora_ratio}
    return "/".join([base, *(f"{mark}{factor:g}" for mark, factor in factors.items() if factor != 1)])


def summary(plan: Plan) -> list[str]:
    """What is trained, in a few lines."""
    found = totals(plan)
    lines = []
    for part, count in found["trained_by_part"].items():
        rows = [row for row in plan.trained if row.part == part]
        kinds = Counter(f"{row.algo} dim {row.dim} scale {row.scale:.4g}" for row in rows)
        common = ", ".join(f"{n}x {kind}" for kind, n in kinds.most_common(4)) + (", ..." if len(kinds) > 4 else "")
        left = Counter(row.reason for row in plan.rows if row.part == part and not row.trained)
        unread = sum(row.unread for row in rows)
        normal = f", {unread} of them never get a gradient in this model" if unread else ""
        lines.append(f"{part}: {count} layers ({common}){normal}, {sum(left.values())} left out")
    return [*lines, _in_all(found, plan.average), *map(str, plan.beside), *plan.notes]


def _in_all(found: Mapping[str, Any], average: str) -> str:
    """The totals, with the place of an average."""
    of_them = "" if found["learning"] == found["parameters"] else f" ({found['learning']:,} of them are trained)"
    where = " on the CPU" if average == "cpu" else ""
    more = f", {shown_size(found['average_bytes'])} more{where} for the average of what is trained" if average else ""
    return (
        f"in all {found['trained']} layers, {found['parameters']:,} parameters{of_them}, "
        f"{shown_size(found['bytes'])} in fp32, {shown_size(found['training_bytes'])} with gradients and AdamW{more}"
    )


def shown_size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


@dataclass(frozen=True)
class LoadReport:
    """What a file gave to a network.

    Attributes:
        matched, missing: layers of the network that are in the file, and that are not.
        without: what of the file has no place.
        stray: keys of the file that are no adapter.
        strength: where its strengths stand, if that is not beside the tensors.
    """

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    without: Missing = Missing()
    stray: tuple[str, ...] = ()
    strength: str = ""

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Layers of the file that have no place, wherever they belong."""
        return (*self.without.elsewhere, *self.without.unwanted, *self.without.names)

    @property
    def incomplete(self) -> bool:
        """Whether layers of the network or of the file stayed without the other."""
        return bool(self.missing or self.without.names)

    def __str__(self) -> str:
        text = f"{self.source}: {len(self.matched)} layers loaded"
        if self.missing:
            text += f"; {len(self.missing)} layers of this network are not in it{examples(self.missing)}"
        for more in (self.without.warning(), self.without.counted()):
            text += f"; {more}" if more else ""
        if self.stray:
            text += f"; {len(self.stray)} keys are no adapter, e.g. {self.stray[0]}"
        return text + (f"; strength by {self.strength}" if self.strength else "")


def progress(items: Sequence[Item], long: bool) -> Iterable[Item]:
    """The items, with a bar behind them if that takes more than two seconds and there is a program for it."""
    if not long:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return iter(tqdm(items, desc="start values from the base weights", delay=2, leave=False))
