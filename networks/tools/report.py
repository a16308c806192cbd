"""What a tool did with a file: what each layer became and how far it is from what it was, what was left out and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Walk = Callable[[Sequence[str]], Iterable[str]]  # goes over the names of layers, and may show how far it is
SHOWN = 10  # layers that are told by name
MOSTLY_LOST = "more than half of the update is lost: a higher rank, another --factor or another target is nearer"


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: as people know it.
        became: in words; "" = it stayed what it was.
        rank: of it now; None without any.
        error: ||new update - old update|| / ||old update||; 0 = the algebra is exact, what dtypes round included; None
            = not known.
        size: ||old update||, by which errors are weighted; None = not known.
        exact: the algebra is, so that the error is what its dtype rounds.
    """

    name: str
    became: str = ""
    rank: int | None = None
    error: float | None = 0.0
    size: float | None = None
    exact: bool = True


@dataclass
class Report:
    """What one call did.

    Attributes:
        command: of the tool, `convert`.
        inputs: the files, as they were given.
        out: the file; None = none was written.
        rows: of the layers that are in it.
        dropped: (layer or tensor, why) of what is not in it and was in an input.
        notes: sentences for the user.
        details: what only this tool has to say, plain values for JSON.
    """

    command: str
    inputs: Sequence[Path | str]
    out: Path | None = None
    rows: list[Row] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Of all layers together: the length of all errors / the length of all updates; of those that are known."""
        known = [(row.error, row.size) for row in self.rows if row.error is not None and row.size is not None]
        whole = math.fsum(size**2 for _, size in known)
        return math.sqrt(math.fsum((error * size) ** 2 for error, size in known) / whole) if whole else 0.0

    def check(self, allow_dropped: bool = False, max_error: float | None = None) -> None:
        """
        Raises:
            ValueError: something is dropped that may not be, or the error is above the limit: nothing is to be written.
        """
        if self.dropped and not allow_dropped:
            why = Counter(reason for _, reason in self.dropped)
            reasons = "; ".join(f"{count} {reason}" for reason, count in why.items())
            raise ValueError(
                f"{len(self.dropped)} layers or tensors would be lost, e.g. {self.dropped[0][0]} ({reasons}): nothing "
                "was written; --allow_dropped goes on without them"
            )
        if max_error is not None and not self.error <= max_error:
            worst = max((row for row in self.rows if row.error is not None), key=lambda row: row.error or 0.0)
            raise ValueError(
                f"the file would be {self.error:.3g} off its input, more than --max_error {max_error:g} (most, "
                f"{worst.error:.3g}, at {worst.name}): nothing was written; give a higher dim or limit, or another "
                "target"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "command": self.command,
            "inputs": [str(path) for path in self.inputs],
            "out": None if self.out is None else str(self.out),
            "error": self.error,
            "layers": [vars(row) for row in self.rows],
            "dropped": [{"name": name, "why": why} for name, why in self.dropped],
            "notes": self.notes,
            **self.details,
        }

    def lines(self, every: bool = False) -> list[str]:
        """For people.

        Args:
            every: a line for each layer, too.
        """
        counts = Counter(row.became or "as they are" for row in self.rows)
        became = [f"{count} layers: {became}" for became, count in counts.items()]
        rows = [_row(row) for row in self.rows] if every else []
        return [*became, *self._errors(), *_ranks(self.rows), *rows, *_dropped(self.dropped), *self.notes]

    def _errors(self) -> list[str]:
        measured = [row for row in self.rows if row.error and row.size is not None]
        if not measured:
            return ["exact"] if self.rows and all(row.error == 0 for row in self.rows) else []
        if all(row.exact for row in self.rows):
            return [f"exact, but for what the dtype rounds: {self.error:.1e} of the whole update"]
        worst = max(measured, key=lambda row: row.error or 0.0)
        told = f"error {self.error:.2%} of the whole update; most {worst.error:.2%}, at {worst.name}"
        return [told, *([MOSTLY_LOST] if self.error > 0.5 else [])]


def _ranks(rows: Sequence[Row]) -> list[str]:
    ranks = [row.rank for row in rows if row.rank is not None]
    if not ranks or min(ranks) == max(ranks):
        return [f"rank {rank}" for rank in ranks[:1]]
    return [f"ranks {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.1f} on average"]


def silently(names: Sequence[str]) -> Iterable[str]:
    """The `Walk` that shows nothing."""
    return names


def _row(row: Row) -> str:
    parts = (
        row.became,
        None if row.rank is None else f"rank {row.rank}",
        None if row.size is None else f"norm {row.size:.4g}",
        f"error {row.error:.3%}" if row.error else None,
    )
    return f"  {row.name}: {', '.join(filter(None, parts)) or 'as it is'}"


def _dropped(dropped: Iterable[tuple[str, str]]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, why in dropped:
        by_reason.setdefault(why, []).append(name)
    return [
        f"left out, {why}: {len(names)}, {', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}"
        for why, names in by_reason.items()
    ]
