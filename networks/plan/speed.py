"""Expressions of a call that take too long on the names of a model, found before they are tried on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..args import presets
from ..args.expressions import part_of, quoted
from ..args.parse import Problems
from ..args.table import TABLE
from ..foreign.expressions import TOO_SLOW, slow
from .walk import Candidate

if TYPE_CHECKING:
    from .plan import Request

_KINDS = ("patterns", "regex_int", "regex_float")  # of arguments


def refuse_slow(request: Request, layers: Sequence[Candidate], problems: Problems) -> None:
    """
    Args:
        request: the call.
        layers: all layers of all parts.
        problems: of the call.

    Raises:
        ValueError: trying one of its expressions would take too long.
    """
    args, parts = request.args, request.arch.part_names
    rows = [row.name for row in TABLE if row.kind in _KINDS]
    given = {name: {part_of(text, parts)[1]: text for text in args.values[name] or ()} for name in rows}
    if args.preset is not None and args.preset.title not in presets.names():
        given[f"preset={args.preset.title}"] = args.preset.expressions(parts)
    for argument, written in given.items():
        found = slow([*written], (name for c in layers for name in (c.dotted_name, *c.names, c.saved_name)))
        if found is not None:
            problems.add(f"{argument}: {quoted(written[found])} {TOO_SLOW}")
            problems.raise_if_any()
