"""DyLoRA over its base: LoRA of the first `active` ranks, of which those before `first` stay as they are:

    y = base(x) + s up[:, :active] (down[:active] x)

Kept: x, and h = down[:active] x. No product is made for ranks that do not act, no gradient for those that do not learn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import apply_of, cast, convolved_back, flat, met, pointwise_back, refuse_twice, unflat
from .fused_low_rank import forth, sized
from .geometry import Geometry

Ranks = tuple[int, int]  # the first one that learns, and the first one behind those that act


def nested_over_base(
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down_RIK: Tensor,
    up_OR: Tensor,
    strength: float,
    ranks: Ranks,
) -> Tensor:
    """base(x) + strength up (down x) with some of the ranks, for an open layer.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        down_RIK: [R, I, *kernel].
        up_OR: [O, R, 1...].
        strength: s.
        ranks: which of them learn, and act.
    """
    y: Tensor = (_conv if geometry.kernel else _linear)(x, weight, bias, down_RIK, up_OR, strength, ranks, geometry)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, down: Tensor, up: Tensor, s: float, ranks: Ranks,
        geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        shape = x.shape
        x, W = met(x, W)
        x2 = flat(x)
        A, B, ctx.left = sized(down[: ranks[1]], up[:, : ranks[1]], s, torch.promote_types(x.dtype, W.dtype))
        y, h = forth(geometry, x2, W, b, A, B, ctx.left)
        ctx.save_for_backward(x2, W, A, B, h)
        ctx.s, ctx.ranks, ctx.sizes = s, ranks, (down.shape, up.shape)
        return unflat(y, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (x2, W, A, B, h), (first, active) = gradients, ctx.saved_tensors, ctx.ranks
        needs, shape, g = ctx.needs_input_grad, g.shape, flat(g)
        gx = gA = gB = None
        gh = torch.mm(g, B)
        if needs[0]:
            gx = unflat(torch.mm(g, W).addmm_(gh, A, alpha=ctx.left), shape)
        if needs[3]:
            gA = torch.zeros(ctx.sizes[0], dtype=g.dtype, device=g.device)
            part = gA[first:active]
            torch.addmm(part, gh[:, first:].t(), x2, beta=0, alpha=ctx.left, out=part)
        if needs[4]:
            gB = torch.zeros(ctx.sizes[1], dtype=g.dtype, device=g.device)
            part = gB[:, first:active]
            torch.addmm(part, g.t(), h[:, first:], beta=0, alpha=ctx.s, out=part)
        return gx, None, None, gA, gB, None, None, None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        down: Tensor,
        up: Tensor,
        s: float,
        ranks: Ranks,
        geometry: Geometry,
    ) -> Tensor:
        x, W = met(x, W)
        A, B = (cast(t, torch.promote_types(x.dtype, W.dtype)) for t in (down[: ranks[1]], up[:, : ranks[1]]))
        y, h = forth(geometry, x, W, b, A, B, s)
        ctx.save_for_backward(x, W, A, B, h)
        ctx.s, ctx.ranks, ctx.sizes, ctx.geometry = s, ranks, (down.shape, up.shape), geometry
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (x, W, A, B, h), (first, active) = gradients, ctx.saved_tensors, ctx.ranks
        needs, geometry = ctx.needs_input_grad, ctx.geometry
        gx = gA = gB = None
        gh = pointwise_back(g, h, B, (True, False))[0].mul_(ctx.s)
        if needs[0]:
            gx = convolved_back(geometry, g, x.shape, W, (True, False))[0]
            gx.add_(convolved_back(geometry, gh, x.shape, A, (True, False))[0])
        if needs[3]:
            gA = torch.zeros(ctx.sizes[0], dtype=g.dtype, device=g.device)
            gA[first:active] = convolved_back(geometry, gh[:, first:], x, A[first:], (False, True))[1]
        if needs[4]:
            gB = torch.zeros(ctx.sizes[1], dtype=g.dtype, device=g.device)
            gB[:, first:active] = pointwise_back(g, h[:, first:], B[:, first:], (False, True))[1].mul_(ctx.s)
        return gx, None, None, gA, gB, None, None, None


_linear, _conv = apply_of(_Linear), apply_of(_Conv)
