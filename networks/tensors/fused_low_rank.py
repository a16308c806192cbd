"""LoRA and what comes to it, over its base: y = base(x) + s up (down x).

Kept: x, and h = down x [T, R]; x only where `down` learns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import (
    add_pointwise_,
    apply_of,
    cast,
    convolved,
    convolved_back,
    flat,
    met,
    pointwise_back,
    refuse_twice,
    times_,
    unflat,
)
from .geometry import Geometry


def low_rank_over_base(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, down_RIK: Tensor, up_OR: Tensor, strength: float
) -> Tensor:
    """base(x) + strength up (down x), for an open layer.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        down_RIK: [R, I, *kernel].
        up_OR: [O, R, 1...].
        strength: s.
    """
    if geometry.kernel:
        y: Tensor = _conv(x, weight, bias, down_RIK, up_OR, strength, geometry)
    else:
        y = _linear(x, weight, bias, down_RIK, up_OR, strength)
    return y


def low_rank_beside(x: Tensor, y: Tensor, down_RI: Tensor, up_OR: Tensor, strength: float) -> Tensor:
    """y + strength up (down x), where y is what a Linear of any kind made of x.

    Args:
        x: [.., I].
        y: [.., O], in the dtype of the computation; it stays as it is.
        down_RI, up_OR: the factors.
        strength: s.
    """
    total: Tensor = _beside(cast(x, y.dtype), y, down_RI, up_OR, strength)
    return total


def sized(down: Tensor, up: Tensor, s: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """The factors in the dtype of the computation, and what is left of s: it is in the copy of `up`, where one is made
    anyway."""
    if up.dtype == down.dtype == dtype:
        return down, up, s
    return down.to(dtype), torch.mul(up, s, out=torch.empty_like(up, dtype=dtype)), 1.0


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, down: Tensor, up: Tensor, s: float) -> Tensor:
        shape = x.shape
        x, W = met(x, W)
        x2 = flat(x)
        y = F.linear(x2, W, b)
        A, B, ctx.left = sized(down, up, s, y.dtype)
        h = torch.mm(x2, A.t())
        y.addmm_(h, B.t(), alpha=ctx.left)
        ctx.save_for_backward(x2 if ctx.needs_input_grad[3] else None, W, A, B, h)
        ctx.s = s
        return unflat(y, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (x2, W, A, B, h), left = gradients, ctx.saved_tensors, ctx.left
        needs, shape = ctx.needs_input_grad, g.shape
        g = flat(g)
        gx = gA = gB = None
        if needs[0] or needs[3]:
            gh = torch.mm(g, B)
            if needs[0]:
                gx = unflat(torch.mm(g, W).addmm_(gh, A, alpha=left), shape)
            if needs[3]:
                gA = torch.addmm(A, gh.t(), x2, beta=0, alpha=left)
        if needs[4]:
            gB = torch.addmm(B, g.t(), h, beta=0, alpha=ctx.s)
        return gx, None, None, gA, gB, None


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, down: Tensor, up: Tensor, s: float) -> Tensor:
        x2 = flat(x)
        A, B, ctx.left = sized(down, up, s, y.dtype)
        h = torch.mm(x2, A.t())
        ctx.save_for_backward(x2 if ctx.needs_input_grad[2] else None, A, B, h)
        ctx.s = s
        return unflat(torch.addmm(flat(y), h, B.t(), alpha=ctx.left), y.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (gy,), (x2, A, B, h), left = gradients, ctx.saved_tensors, ctx.left
        needs, g = ctx.needs_input_grad, flat(gradients[0])
        gx = gA = gB = None
        if needs[0] or needs[2]:
            gh = torch.mm(g, B)
            if needs[0]:
                gx = unflat(torch.addmm(A[0], gh, A, beta=0, alpha=left), gy.shape)
            if needs[2]:
                gA = torch.addmm(A, gh.t(), x2, beta=0, alpha=left)
        if needs[3]:
            gB = torch.addmm(B, g.t(), h, beta=0, alpha=ctx.s)
        return gx, gy, gA, gB, None


class _Conv(torch.autograd.Function):
    """A convolution takes no factor: s is in the copy of `down`, where one is made anyway, or beside `up`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, down: Tensor, up: Tensor, s: float, geometry: Geometry
    ) -> Tensor:
        x, W = met(x, W)
        y = convolved(geometry, x, W, b)
        A, B, copied = down, cast(up, y.dtype), down.dtype != y.dtype
        if copied:
            A = torch.mul(down, s, out=torch.empty_like(down, dtype=y.dtype))
        ctx.on_A, ctx.on_B = (s, 1.0) if copied else (1.0, s)
        h = convolved(geometry, x, A)
        add_pointwise_(y, h, B, ctx.on_B)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, W, A, B, h)
        ctx.geometry, ctx.shape = geometry, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (x, W, A, B, h), geometry = gradients, ctx.saved_tensors, ctx.geometry
        on_x, on_A, on_B = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        gx = gA = None
        gh, gB = (times_(t, ctx.on_B) for t in pointwise_back(g, h, B, (on_x or on_A, on_B)))
        if gh is not None:
            gx, gA = convolved_back(geometry, gh, ctx.shape if x is None else x, A, (on_x, on_A))
            gA = times_(gA, ctx.on_A, torch.promote_types(g.dtype, torch.float32))
        if gx is not None:
            gx.add_(convolved_back(geometry, g, ctx.shape, W, (True, False))[0])
        return gx, None, None, gA, gB, None, None


_linear, _beside, _conv = apply_of(_Linear), apply_of(_Beside), apply_of(_Conv)
