"""Rotations of blocks of features, and how they act along an axis of any tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotation_less_identity(blocks_NBB: Tensor, limit: float = 0.0, terms: int = 0) -> Tensor:
    """R - 1 of the Cayley transform R = (1 + Q)(1 - Q)^-1 of Q = B - B^T, [N, B, B], in fp32 or wider.

    R - 1 = 2 Q (1 - Q)^-1: what a rotation changes, without the digits that subtracting the 1 would cost.

    Args:
        limit: the largest Frobenius norm of all Q together; 0 = none.
        terms: of the Neumann series that stands for the inverse, see `series_less_identity`; 0 = the inverse itself.
    """
    Q = generator(blocks_NBB, limit)
    if terms:
        return series_less_identity(Q, terms)
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return 2 * torch.linalg.solve(one - Q, Q, left=False)


def series_less_identity(Q_NBB: Tensor, terms: int) -> Tensor:
    """R - 1 = 2 Q + 2 Q^2 + ... + 2 Q^(terms - 2) + Q^(terms - 1), as OFT v2 cuts the series off (2506.19847).

    In the programs that have it 3 terms are 4, and the last one is whole where there are but 2.
    """
    if terms < 3:
        return Q_NBB * (2.0 * (terms - 1))
    two = 2 * torch.eye(Q_NBB.shape[-1], dtype=Q_NBB.dtype, device=Q_NBB.device)
    factor = two + Q_NBB
    for _ in range(max(terms, 4) - 3):
        factor = two + Q_NBB @ factor
    return Q_NBB @ factor


def generator(blocks_NBB: Tensor, limit: float = 0.0) -> Tensor:
    """Q = B - B^T within that limit, [N, B, B], in fp32 or wider."""
    wide = blocks_NBB.to(torch.promote_types(blocks_NBB.dtype, torch.float32))
    Q = wide - wide.transpose(1, 2)
    return Q * (limit / Q.norm().clamp_min(1e-30)).clamp_max(1.0) if limit else Q


def apply_blocks(blocks_NBB: Tensor, t: Tensor, axis: int) -> Tensor:
    """out[n, i] = sum_j blocks[n, i, j] t[n, j] along an axis of N B features."""
    count, size = blocks_NBB.shape[:2]
    axis %= t.dim()
    parts = t.unflatten(axis, (count, size))
    if axis == t.dim() - 1:
        return torch.einsum("...nj,nij->...ni", parts, blocks_NBB).flatten(-2)
    # Positions stay behind the features, as convolutions have them: no copy of t is made, nor kept for backward.
    return torch.matmul(blocks_NBB, parts.flatten(axis + 2)).reshape(t.shape)


def butterfly(t: Tensor, axis: int, distance: int, back: bool = False, unit: int = 1) -> Tensor:
    """Bring features next to each other that lie apart.

    Args:
        t: any tensor.
        axis: of the features, 2 * distance * unit of them or a multiple.
        distance: between two that come together, in units.
        back: undo it.
        unit: features that stay together.

    Returns:
        As t, in another order along the axis.
    """
    last = t.movedim(axis, -1)
    pair = (distance, 2) if back else (2, distance)
    return last.unflatten(-1, (-1, *pair, unit)).transpose(-2, -3).flatten(-4).movedim(-1, axis)


def butterfly_chain(t: Tensor, less_SNBB: Tensor, axis: int, distances: tuple[int, ...], unit: int = 1) -> Tensor:
    """(T - 1) t for T = P_s^-1 R_s P_s ... P_0^-1 R_0 P_0.

    Only t is kept for backward, which goes through the stages once more: they would keep as many copies of t.

    Args:
        t: any tensor with N B features along an axis.
        less_SNBB: the blocks [N, B, B] of every R - 1, in order.
        axis: of the features.
        distances: of the butterflies P, one for each.
        unit: of theirs.
    """
    change: Tensor = _Chain.apply(t, less_SNBB, axis, distances, unit)
    return change


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, less: Tensor, axis: int, distances: tuple[int, ...], unit: int) -> Tensor:
        ctx.save_for_backward(t, less)
        ctx.axis, ctx.distances, ctx.unit = axis, distances, unit
        return _stages(t, less, axis, distances, unit)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (t, less), (G,) = ctx.saved_tensors, gradients
        axis, found, more = ctx.axis, [], torch.zeros_like(G)
        inputs = _stages(t, less, axis, ctx.distances, ctx.unit)[1] if ctx.needs_input_grad[1] else []
        for i in reversed(range(len(less))):
            mixed = butterfly(G + more, axis, ctx.distances[i], unit=ctx.unit)
            if ctx.needs_input_grad[1]:
                pair = (_in_blocks(whole, axis, less.shape[2]) for whole in (mixed, inputs[i]))
                found.append(torch.einsum("...ni,...nj->nij", *pair))
            turned = apply_blocks(less[i].transpose(1, 2), mixed, axis)
            more = more + butterfly(turned, axis, ctx.distances[i], back=True, unit=ctx.unit)
        return more, torch.stack(found[::-1]) if found else None, None, None, None


def _stages(t: Tensor, less: Tensor, axis: int, distances: tuple[int, ...], unit: int) -> tuple[Tensor, list[Tensor]]:
    """(T - 1) t, and what goes into the blocks of each stage. Added up apart from t, whose digits are coarser."""
    inputs, change = [], torch.zeros_like(t)
    for blocks, distance in zip(less, distances, strict=True):
        inputs.append(butterfly(t + change, axis, distance, unit=unit))
        change = change + butterfly(apply_blocks(blocks, inputs[-1], axis), axis, distance, back=True, unit=unit)
    return change, inputs


def _in_blocks(t: Tensor, axis: int, size: int) -> Tensor:
    """[..., N, B] of an axis of N B features."""
    return t.movedim(axis, -1).unflatten(-1, (-1, size))
