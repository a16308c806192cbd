"""Layers of a file that are a part of one of the model's, or several of them: joined or divided row by row.

One formula for all directions: the trainer's files under diffusers' names and back, ComfyUI's fused projections, files
with some of the projections only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .codec import SavedLayer


def joined(
    name: str, pieces: Sequence[SavedLayer | None], sizes: Sequence[int], columns: tuple[int, ...], base: Tensor | None
) -> tuple[SavedLayer, str]:
    """The one layer of which these are the rows.

    Args:
        name: of the layer that results.
        pieces: in the order of the rows; None = nothing changes there.
        sizes: output rows of each.
        columns: the rest of the weight's shape, [I, *kernel].
        base: weight of the whole layer, for conversions which need it; None = they are refused.

    Returns:
        The layer, and in words what it was converted to; "" = the same algorithm, exact at equal scale.

    Raises:
        ValueError: nothing that this version knows is this layer without the base weight.
    """
    raise ValueError(f"{name}: its {len(pieces)} parts cannot be joined")


def rows_of(saved: SavedLayer, name: str, start: int, stop: int, base: Tensor | None) -> tuple[SavedLayer, str]:
    """Some output rows of a layer, as a layer of its own.

    Args:
        name: of the layer that results.
        start, stop: the rows.
        base: weight of the whole layer [O, I, *kernel], for conversions which need it; None = they are refused.

    Returns:
        As `joined`.

    Raises:
        ValueError: as `joined`.
    """
    raise ValueError(f"{saved.name}: it cannot be divided")
