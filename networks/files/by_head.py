"""Rows of fused layers that a program has head by head, see ByHead of archs.spec, in the trainer's order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..archs.names import Share
from ..archs.spec import ArchSpec
from . import dotted


def ordered(
    tensors: Mapping[str, Tensor], spoken: Mapping[str, Sequence[Share]], arch: ArchSpec | None, source: str
) -> tuple[Mapping[str, Tensor], list[str]]:
    """The tensors of a file with all such rows in order, and the keys of those which were not.

    Args:
        tensors: key -> tensor, as they stand in the file.
        spoken: name of a layer in the file -> what it stands for.
        arch: of the model; None = not known, and nothing is changed.
        source: name of the file, for messages.

    Raises:
        ValueError: rows do not divide into heads.
    """
    found, moved = dict(tensors), list[str]()
    marked = [one for one in (arch.by_head if arch else ()) if any(re.search(one.mark, key) for key in tensors)]
    for key in tensors if marked else ():
        path, suffix = dotted.divide(key)
        shares = spoken.get(path, ())
        kind = next((one for one in marked if len(shares) == 1 and shares[0].whole and one.is_of(shares[0].name)), None)
        if kind is None or dotted.SUFFIXES.get(suffix) != dotted.UP:
            continue
        rows = tensors[key]
        if len(rows) % (kind.count * kind.head):
            raise ValueError(
                f"{source}: {key} has {len(rows)} rows, which are no {kind.count} projections of heads of {kind.head}, "
                "as its program writes them: rename its keys if another one wrote it (.default. is its mark)"
            )
        heads = rows.unflatten(0, (-1, kind.count, kind.head))
        found[key] = heads.transpose(0, 1).flatten(0, 2).contiguous()
        moved.append(key)
    return found, moved
