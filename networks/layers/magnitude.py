"""DoRA (2402.09353): a learnt length for every row or column of the changed weight.

    W' = (W + s dW) * g / n        n = ||W + s dW||, detached, anew in every pass

On the output side (the default) there is a length for each of the O rows, on the input side for each of the I columns.
Applied without building W': with r = g / n, bias outside,

    output side    y = y0 + m ((r - 1) (y0 - bias) + r s F(x; dW))
    input side     y = base(x + m (r - 1) x) + m s F(r x; dW)

where m is the multiplier; a row whose norm is 0 keeps the factor 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..algos import Adapter
from ..tensors.geometry import Geometry, Pieces


def magnitude_shape(geometry: Geometry, on_output: bool) -> tuple[int, ...]:
    """[O, 1, ..] or [1, I, ..]: as saved, and as it multiplies a weight."""
    O, I = geometry.out_features, geometry.in_features
    return (O, 1, *geometry.ones) if on_output else (1, I, *geometry.ones)


@torch.no_grad()
def norm_sq(
    adapter: Adapter, weight: Tensor, strength: float | Tensor, on_output: bool, pieces: Pieces | None = None
) -> Tensor:
    """||W + s dW||^2 of every output row or input column; `weight` may be the rows of some pieces only."""
    with torch.autocast(weight.device.type, enabled=False):
        weight = weight.to(next(adapter.parameters()).dtype)  # a base in fp64 under fp32 adapters
        strength = strength.to(weight.device) if isinstance(strength, Tensor) else strength
        return adapter.norm_sq(weight, strength, on_output, pieces)


def ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """g / n, and 1 where n is 0; the norms have no gradient."""
    zero = norms == 0
    return torch.where(zero, 1.0, magnitude / torch.where(zero, 1.0, norms))
