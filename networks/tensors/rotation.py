"""Rotations of blocks of features, and how they act along an axis of any tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_less_identity(blocks_NBB: Tensor, limit: float = 0.0) -> Tensor:
    """R - 1 of the Cayley transform R = (1 + Q)(1 - Q)^-1 of Q = B - B^T, [N, B, B], in fp32 or wider.

    R - 1 = 2 Q (1 - Q)^-1: what a rotation changes, without the digits that subtracting the 1 would cost.

    Args:
        limit: the largest Frobenius norm of all Q together; 0 = none.
    """
    Q = generator(blocks_NBB, limit)
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return 2 * torch.linalg.solve(one - Q, Q, left=False)


def generator(blocks_NBB: Tensor, limit: float = 0.0) -> Tensor:
    """Q = B - B^T within that limit, [N, B, B], in fp32 or wider."""
    wide = blocks_NBB.to(torch.promote_types(blocks_NBB.dtype, torch.float32))
    Q = wide - wide.transpose(1, 2)
    return Q * (limit / Q.norm().clamp_min(1e-30)).clamp_max(1.0) if limit else Q


def apply_blocks(blocks_NBB: Tensor, t: Tensor, axis: int) -> Tensor:
    """out[n, i] = sum_j blocks[n, i, j] t[n, j] along an axis of N B features."""
    count, size = blocks_NBB.shape[:2]
    last = t.movedim(axis, -1)
    out = torch.einsum("...nj,nij->...ni", last.unflatten(-1, (count, size)), blocks_NBB)
    return out.flatten(-2).movedim(-1, axis)


def butterfly(t: Tensor, axis: int, distance: int, back: bool = False) -> Tensor:
    """Bring features that lie `distance` apart next to each other along an axis; `back` undoes it."""
    last = t.movedim(axis, -1)
    pair = (distance, 2) if back else (2, distance)
    return last.unflatten(-1, (-1, *pair)).transpose(-1, -2).flatten(-3).movedim(-1, axis)
