"""What is wrong with many layers for one cause is one sentence with their number and an example."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ..args.expressions import quoted

_NAMED = 3


def grouped(refused: Iterable[tuple[str, str]]) -> list[str]:
    """One sentence for each cause.

    Args:
        refused: (why, layer). Reasons that differ in their numbers alone are one cause; told is the one with the
            largest, the last of which is what to write: it serves the others, too.
    """
    causes: dict[str, dict[str, list[str]]] = {}
    for reason, layer in refused:
        causes.setdefault(re.sub(r"\d+", "#", reason), {}).setdefault(reason, []).append(layer)
    return [_told(reasons) for reasons in causes.values()]


def subject(texts: Collection[str], one: str, several: str) -> str:
    """The beginning of a sentence about expressions of the user: `'a', 'b', 'c' and 2 more match`.

    Args:
        texts: as the user wrote them.
        one, several: the verb in singular and plural.
    """
    named = ", ".join(map(quoted, list(texts)[:_NAMED]))
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return f"{named}{more} {one if len(texts) == 1 else several}"


def _told(reasons: dict[str, list[str]]) -> str:
    worst = max(reasons, key=_numbers)
    count, example = sum(map(len, reasons.values())), reasons[worst][0]
    return f"{example}: {worst}" if count == 1 else f"{worst} ({count} layers, such as {example})"


def _numbers(reason: str) -> list[int]:
    """The last one first."""
    return [int(number) for number in reversed(re.findall(r"\d+", reason))]
