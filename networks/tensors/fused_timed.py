"""T-LoRA over its base, with the mask m of the ranks that act at a sample's time:

    y = base(x) + s [change, start] m (down x)
    change = unit p (lam0 + lam) + p0 lam,  start = p0 lam0,  down = [q0 + q; q]

Kept: x, h = down x [T, 2 R], and the two factors in the dtype of the computation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import apply_of, from_rows, met, refuse_twice, rows
from .fused_low_rank import Made, back, forth
from .geometry import Geometry


def timed_over_base(
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    learnt: tuple[Tensor, Tensor, Tensor],
    start: tuple[Tensor, Tensor, Tensor],
    unit: float,
    strength: float,
    mask: Tensor | None,
) -> Tensor:
    """Output of an open layer with T-LoRA.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        learnt: q [R, I, *kernel], p [O, R, 1...] and lam [1, R].
        start: q0, p0 and lam0.
        unit: what p counts for.
        strength: s.
        mask: [N, 2 R] for N samples, in the dtype of the computation; None = all ranks act.
    """
    y: Tensor = _timed(x, weight, bias, *learnt, *start, unit, strength, mask, geometry)
    return y


class _Timed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, q: Tensor, p: Tensor, lam: Tensor,
        q0: Tensor, p0: Tensor, lam0: Tensor, unit: float, s: float, mask: Tensor | None, geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        shape, R = x.shape, len(q)
        x, W = met(x, W)
        x = rows(x, geometry)
        dtype = torch.promote_types(x.dtype, W.dtype)
        A = torch.empty(2 * R, *q.shape[1:], dtype=dtype, device=x.device)
        torch.add(q0, q, out=A[:R])
        A[R:].copy_(q)
        B = torch.empty(len(p), 2 * R, *geometry.ones, dtype=dtype, device=x.device)
        lam, lam0 = (t.reshape(1, -1, *geometry.ones) for t in (lam, lam0))
        size = lam0 + lam
        torch.addcmul(p0 * lam, p, size, value=unit, out=B[:, :R])
        torch.mul(p0, lam0, out=B[:, R:])
        y, h = forth(geometry, x, W, b, A, B, s, mask)
        ctx.save_for_backward(x, W, A, B, h, mask, p, p0, size)
        ctx.geometry, ctx.shape, ctx.unit, ctx.s = geometry, shape, unit, s
        return from_rows(y, geometry, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        x, W, A, B, h, mask, p, p0, size = ctx.saved_tensors
        geometry, unit, s, needs, R = ctx.geometry, ctx.unit, ctx.s, ctx.needs_input_grad, len(A) // 2
        made = Made(geometry, ctx.shape, x, W, A, B, h, s, s, s, mask)
        gx, gA, gB = back(made, gradients[0], needs[0], needs[3], needs[4] or needs[5])
        gq = gp = glam = None
        if gA is not None:
            gq = torch.add(gA[:R], gA[R:], out=torch.empty_like(gA[:R], dtype=size.dtype))
        if gB is not None:
            of_change = gB[:, :R]
            gp = (of_change * size).mul_(unit) if unit != 1.0 else of_change * size
            glam = (torch.add(p0, p, alpha=unit) * of_change).sum([i for i in range(p.dim()) if i != 1]).reshape(1, R)
        return gx, None, None, gq, gp, glam, None, None, None, None, None, None, None


_timed = apply_of(_Timed)
