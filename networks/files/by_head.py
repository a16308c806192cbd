"""Rows of fused layers that a program has head by head, see ByHead of archs.spec, in the trainer's order."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..archs.spec import ArchSpec, ByHead
from . import dotted


def ordered(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], arch: ArchSpec | None, source: str
) -> dict[str, Tensor]:
    """Those tensors of a file whose rows stand otherwise there, with their rows in order.

    Args:
        tensors: key -> tensor, as they stand in the file.
        names: of a layer in the file -> the saved name of the trainer's that it is, or anything else.
        arch: of the model; None = not known, and nothing is changed.
        source: name of the file, for messages.

    Raises:
        ValueError: rows do not divide into heads.
    """
    found: dict[str, Tensor] = {}
    for kind in () if arch is None else arch.by_head:
        for key, rows in tensors.items() if any(re.search(kind.mark, key) for key in tensors) else ():
            path, suffix = dotted.divide(key)
            if dotted.SUFFIXES.get(suffix) == dotted.UP and kind.is_of(names.get(path, "")):
                found[key] = _ordered(rows, kind, f"{source}: {key}")
    return found


def _ordered(rows: Tensor, kind: ByHead, where: str) -> Tensor:
    if len(rows) % (kind.count * kind.head):
        raise ValueError(
            f"{where} has {len(rows)} rows, which are no {kind.count} projections of heads of {kind.head}, as the "
            "program writes them whose mark is in this key: take that out if another one wrote the file"
        )
    return rows.unflatten(0, (-1, kind.count, kind.head)).transpose(0, 1).flatten(0, 2).contiguous()
