"""DoRA (2402.09353): a learnt length for every row or column of the changed weight.

    W' = (W + s dW) * g / n        n = ||W + s dW||, detached, anew in every pass

On the output side (the default) there is a length for each of the O rows, on the input side for each of the I columns.
Applied without building W': with r = g / n, bias outside,

    output side    y = y0 + m ((r - 1) (y0 - bias) + r s F(x; dW))
    input side     y = base(x + m (r - 1) x) + m s F(r x; dW)

where m is the multiplier; a row whose norm is 0 keeps the factor 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..algos import Additive
from ..tensors.geometry import Geometry
from ..tensors.products import OfWeight
from .site import Site, read_whole


def magnitude_shape(geometry: Geometry, on_output: bool) -> tuple[int, ...]:
    """[O, 1, ..] or [1, I, ..]: as saved, and as it multiplies a weight."""
    O, I = geometry.out_features, geometry.in_features
    return (O, 1, *geometry.ones) if on_output else (1, I, *geometry.ones)


@torch.no_grad()
def norms(
    adapter: Additive,
    weights: Mapping[Site, Tensor],
    strength: float | Tensor,
    shape: tuple[int, ...],
    on_output: bool,
    only: bool = False,
) -> Tensor:
    """||W + s dW|| in the magnitude's shape.

    Args:
        adapter: on any base.
        weights: the base weight of every module, W or its rows.
        strength: s, that of dW: scale * scalar.
        shape: of the whole magnitude, [O, 1, ..] or [1, I, ..].
        on_output: whether magnitudes are those of rows.
        only: there is one module, whose own rows are asked for in its own order.
    """
    squares = {}
    for site, weight in weights.items():
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight.to(next(adapter.parameters()).dtype)  # a base in fp64 under fp32 adapters
            s = strength.to(weight.device) if isinstance(strength, Tensor) else strength
            squares[site] = adapter.on(OfWeight(weight)).norm_sq(weight, s, on_output, site.row_ranges)
    if not on_output:
        return torch.stack(list(squares.values())).sum(0).sqrt().reshape(shape)
    roots = {site: square.sqrt().reshape(-1, *shape[1:]) for site, square in squares.items()}
    return next(iter(roots.values())) if only else read_whole(tuple(roots), shape, roots.__getitem__)


def ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """g / n, and 1 where n is 0: a row of zeros acts, and learns, as without DoRA.

    Args:
        magnitude: g.
        norms: n, in the same shape, without gradient.
    """
    zero = norms == 0
    return torch.where(zero, 1.0, magnitude / torch.where(zero, 1.0, norms))
