"""LoHa over its base: y = base(x) + s op(x, (a1 b1) * (a2 b2)).

    factored   as LoRA of rank R^2, up P = a1 x a2 by rows, down Q = b1 x b2 by columns     kept: x, Q x [T, R^2]
    rebuilt    the weight change itself, for large ranks                                    kept: x

P and Q, or the halves, are made again in the backward pass: kept, they would be many times the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import apply_of, autocast_dtype, cast, from_rows, met, refuse_twice, rows
from .fused_low_rank import Made, back, forth
from .fused_whole import back_to_change, back_to_input
from .fused_whole import forth as forth_whole
from .geometry import Geometry

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def hadamard_over_base(
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    strength: float,
    factored: bool,
) -> Tensor:
    """Output of an open layer with LoHa.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        factors: a1 [O, R], b1 [R, I * K], a2 and b2.
        strength: s.
        factored: which form.
    """
    y: Tensor = (_factored if factored else _rebuilt)(x, weight, bias, *factors, strength, geometry)
    return y


def _by_rows(a1: Tensor, a2: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """P [O, R^2, 1...]."""
    shape = (len(a1), a1.shape[1] ** 2, *geometry.ones) if geometry.kernel else (len(a1), -1)
    return _products(a1.unsqueeze(2), a2.unsqueeze(1), dtype).reshape(shape)


def _by_columns(b1: Tensor, b2: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """Q [R^2, I, *kernel]."""
    return _products(b1.unsqueeze(1), b2, dtype).reshape(-1, *geometry.weight_shape[1:])


def _products(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each with each, rounded once, to the dtype; in the order of memory that theirs has."""
    if one.dtype == other.dtype == dtype:
        return one * other
    out = torch.empty((0,), dtype=dtype, device=one.device)
    return torch.mul(one, other, out=out)


class _Factored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, s: float,
        geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        shape = x.shape
        x, W = met(x, W)
        x = rows(x, geometry)
        dtype = torch.promote_types(x.dtype, W.dtype)
        Q, P = _by_columns(b1, b2, geometry, dtype), _by_rows(a1, a2, geometry, dtype)
        y, h = forth(geometry, x, W, b, Q, P, s)
        ctx.save_for_backward(x, W, a1, b1, a2, b2, h)
        ctx.geometry, ctx.shape, ctx.s = geometry, shape, s
        return from_rows(y, geometry, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (x, W, a1, b1, a2, b2, h) = gradients, ctx.saved_tensors
        geometry, needs, s, R = ctx.geometry, ctx.needs_input_grad, ctx.s, len(b1)
        Q, P = _by_columns(b1, b2, geometry, g.dtype), _by_rows(a1, a2, geometry, g.dtype)
        of_a, of_b = needs[3] or needs[5], needs[4] or needs[6]
        gx, gQ, gP = back(Made(geometry, ctx.shape, x, W, Q, P, h, s, s, s), g, needs[0], of_b, of_a)
        ga1 = ga2 = gb1 = gb2 = None
        if of_a:
            gP = cast(gP, a1.dtype).reshape(-1, R, R)
            ga1 = torch.bmm(gP, a2.unsqueeze(2)).squeeze(2)
            ga2 = torch.bmm(a1.unsqueeze(1), gP).squeeze(1)
        if of_b:
            gQ = gQ.reshape(R, R, -1)  # as it is: the products below are in the factors' own dtype
            gb1, gb2 = (gQ * b2).sum(1), (gQ * b1.unsqueeze(1)).sum(0)
        return gx, None, None, ga1, gb1, ga2, gb2, None, None


class _Rebuilt(torch.autograd.Function):
    """Under autocast the halves are products in its dtype, elsewhere in that of the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, s: float,
        geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        ctx.geometry, ctx.shape, ctx.s = geometry, x.shape, s
        x, W = met(x, W)
        x = rows(x, geometry)
        if autocast_dtype(x) is not None:
            a1, b1, a2, b2 = (cast(t, W.dtype) for t in (a1, b1, a2, b2))
        change = cast(torch.mm(a1, b1).mul_(torch.mm(a2, b2)), W.dtype)
        y = forth_whole(geometry, x, W, b, change.view(W.shape), s)
        ctx.save_for_backward(x, W, a1, b1, a2, b2)
        return from_rows(y, geometry, ctx.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (x, W, a1, b1, a2, b2), geometry, s = ctx.saved_tensors, ctx.geometry, ctx.s
        first, second, gx = torch.mm(a1, b1), torch.mm(a2, b2), None
        g = rows(gradients[0], geometry)
        if ctx.needs_input_grad[0]:
            change = cast(first * second, W.dtype).view(W.shape)
            gx = from_rows(back_to_input(geometry, g, W, change, s, x.shape), geometry, ctx.shape)
        gchange = cast(back_to_change(geometry, g, x, W, s).flatten(1), first.dtype)
        of_first, of_second = second.mul_(gchange), first.mul_(gchange)
        found = of_first @ b1.t(), a1.t() @ of_first, of_second @ b2.t(), a2.t() @ of_second
        return gx, None, None, *found, None, None


_factored, _rebuilt = apply_of(_Factored), apply_of(_Rebuilt)
