"""LoRA and what comes to it, over its base: y = base(x) + s up (down x).

Kept: x, and h = down x [T, R]; x only where `down` learns. `forth` and `back` are for other forms, too, whose factors
are made of others: up in the dtype of the computation, and with what is left of s to multiply their product by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    from_rows,
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
    y: Tensor = _low_rank(x, weight, bias, down_RIK, up_OR, strength, geometry)
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


def forth(
    geometry: Geometry,
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    left: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = base(x) + left B h and h = A x, with h times a mask of its ranks.

    Args:
        geometry: of the layer.
        x, W: its input and the base's weight, in the dtype in which they meet; that of a Linear as rows [T, I].
        b: the base's bias.
        A, B: [R, I, *kernel] and [O, R, 1...], in the dtype of y.
        left: a factor.
        mask: [N, R] for N samples, which divide the rows or images; in the dtype of y.
    """
    if geometry.kernel:
        y, h = convolved(geometry, x, W, b), convolved(geometry, x, A)
    else:
        y, h = F.linear(x, W, b), torch.mm(x, A.t())
    h = h if mask is None else _masked_(h, mask)
    if geometry.kernel:
        add_pointwise_(y, h, B, left)
    else:
        y.addmm_(h, B.t(), alpha=left)
    return y, h


def _masked_(h: Tensor, mask: Tensor) -> Tensor:
    """h [T, R], or [B, R, *places], times a mask [N, R], in place: rows of a sample follow each other."""
    h = h.contiguous()
    h.view(len(mask), len(h) // len(mask), mask.shape[1], -1).mul_(mask[:, None, :, None])
    return h


@dataclass
class Made:
    """What a forward pass made of x, and the factors by which its gradients differ.

    Attributes:
        W, A, B, h, left, mask: as in `forth`.
        x: None where no gradient of A is wanted; `shape` is its own.
        of_A, of_B: what gradients of A and B at left = 1 are multiplied by.
    """

    geometry: Geometry
    shape: Sequence[int]
    x: Tensor | None
    W: Tensor
    A: Tensor
    B: Tensor
    h: Tensor
    left: float
    of_A: float
    of_B: float
    mask: Tensor | None = None


def back(made: Made, g: Tensor, on_x: bool, on_A: bool, on_B: bool) -> tuple[Any, Any, Any]:
    """Gradients of x, in the layer's own shape, A and B, None for those that are not wanted.

    Args:
        made: by `forth`.
        g: the output's gradient, in its own shape.
        on_x, on_A, on_B: which are wanted.
    """
    if made.geometry.kernel:
        return _back_conv(made, g, on_x, on_A, on_B)
    gx, gA, gB = _back_linear(made, flat(g), on_x, on_A, on_B)
    return from_rows(gx, made.geometry, made.shape), gA, gB


def _back_linear(made: Made, g: Tensor, on_x: bool, on_A: bool, on_B: bool) -> tuple[Any, Any, Any]:
    gx = gA = gB = None
    if on_x or on_A:
        gh = torch.mm(g, made.B)
        gh = gh if made.mask is None else _masked_(gh, made.mask)
        if on_x:
            gx = torch.mm(g, made.W).addmm_(gh, made.A, alpha=made.left)
        if on_A and made.x is not None:
            gA = torch.addmm(made.A, gh.t(), made.x, beta=0, alpha=made.of_A)
    if on_B:
        gB = torch.addmm(made.B, g.t(), made.h, beta=0, alpha=made.of_B)
    return gx, gA, gB


def _back_conv(made: Made, g: Tensor, on_x: bool, on_A: bool, on_B: bool) -> tuple[Any, Any, Any]:
    geometry, gx, gA = made.geometry, None, None
    gh, gB = pointwise_back(g, made.h, made.B, (on_x or on_A, on_B))
    if gh is not None:
        gh = times_(gh if made.mask is None else _masked_(gh, made.mask), made.left)
        gx, gA = convolved_back(geometry, gh, made.shape if made.x is None else made.x, made.A, (on_x, on_A))
    if gx is not None:
        gx.add_(convolved_back(geometry, g, made.shape, made.W, (True, False))[0])
    wide = torch.promote_types(g.dtype, torch.float32)  # in which the factors are kept
    return gx, times_(gA, made.of_A / made.left, wide), times_(gB, made.of_B, wide)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, down: Tensor, up: Tensor, s: float, geometry: Geometry
    ) -> Tensor:
        shape = x.shape
        x, W = met(x, W)
        dtype = torch.promote_types(x.dtype, W.dtype)
        if geometry.kernel:
            (B, A, left), scales = sized(up, down, s, dtype), (s, 1.0)
        else:
            (A, B, left), scales, x = sized(down, up, s, dtype), (1.0, s), flat(x)
        y, h = forth(geometry, x, W, b, A, B, left)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, W, A, B, h)
        ctx.geometry, ctx.shape, ctx.scales = geometry, shape, (s, s, s) if left == s else (1.0, *scales)
        return from_rows(y, geometry, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        made, needs = Made(ctx.geometry, ctx.shape, *ctx.saved_tensors, *ctx.scales), ctx.needs_input_grad
        gx, gA, gB = back(made, gradients[0], needs[0], needs[3], needs[4])
        return gx, None, None, gA, gB, None, None


def sized(one: Tensor, other: Tensor, s: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """The factors in the dtype of the computation, and what is left of s: it is in the copy of the other, where copies
    are made anyway."""
    if one.dtype == other.dtype == dtype:
        return one, other, s
    return one.to(dtype), torch.mul(other, s, out=torch.empty_like(other, dtype=dtype)), 1.0


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


_low_rank, _beside = apply_of(_LowRank), apply_of(_Beside)
