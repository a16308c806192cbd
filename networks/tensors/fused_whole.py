"""A whole weight change over its base: y = base(x) + s op(x, dW), where dW is at hand.

In fp32 and wider W + s dW is one weight, as a merge makes it. Half precision has no digits for a small change of W:
there the products are two. Kept: x, and dW in the dtype of the computation where it was made of something.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import (
    apply_of,
    cast,
    convolved,
    convolved_back,
    from_rows,
    is_wide,
    met,
    refuse_twice,
    rows,
    times_,
)
from .geometry import Geometry


def whole_over_base(
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    change: Tensor,
    strength: float,
) -> Tensor:
    """The output of an open layer with a change of its weight.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        change: dW [O, I, *kernel].
        strength: s.
    """
    y: Tensor = _whole(x, weight, bias, change, strength, geometry)
    return y


def forth(geometry: Geometry, x: Tensor, W: Tensor, b: Tensor | None, change: Tensor, s: float) -> Tensor:
    """base(x) + s op(x, dW).

    Args:
        geometry: of the layer.
        x, W: its input, in rows, and the base's weight, in the dtype in which they meet.
        b: the base's bias.
        change: dW [O, I, *kernel], in that dtype.
        s: a factor.
    """
    if is_wide(W.dtype):
        return _op(geometry, x, torch.add(W, change, alpha=s), b)
    if geometry.kernel:
        return _op(geometry, x, W, b).add_(_op(geometry, x, change, None), alpha=s)
    return F.linear(x, W, b).addmm_(x, change.t(), alpha=s)


def back_to_input(geometry: Geometry, g: Tensor, W: Tensor, change: Tensor, s: float, shape: torch.Size) -> Tensor:
    """The gradient of x, of that shape.

    Args:
        geometry, W, change, s: as in `forth`.
        g: the output's gradient, in rows.
        shape: of x.
    """
    if is_wide(W.dtype):
        return _op_back(geometry, g, torch.add(W, change, alpha=s), shape)
    if geometry.kernel:
        return _op_back(geometry, g, W, shape).add_(_op_back(geometry, g, change, shape), alpha=s)
    return torch.mm(g, W).addmm_(g, change, alpha=s)


def back_to_change(geometry: Geometry, g: Tensor, x: Tensor, W: Tensor, s: float) -> Tensor:
    """The gradient of dW, in the dtype of the computation."""
    if geometry.kernel:
        found: Tensor = times_(convolved_back(geometry, g, x, W, (False, True))[1], s)
        return found
    return torch.addmm(W, g.t(), x, beta=0, alpha=s)


def _op(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolved(geometry, x, weight, bias) if geometry.kernel else F.linear(x, weight, bias)


def _op_back(geometry: Geometry, g: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    if geometry.kernel:
        found: Tensor = convolved_back(geometry, g, shape, weight, (True, False))[0]
        return found
    return torch.mm(g, weight)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, change: Tensor, s: float, geometry: Geometry
    ) -> Tensor:
        ctx.s, ctx.geometry, ctx.shape = s, geometry, x.shape
        x, W = met(x, W)
        x = rows(x, geometry)
        used = cast(change, W.dtype)
        y = forth(geometry, x, W, b, used, s)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, W, change if change.is_leaf else used)
        ctx.inner = x.shape
        return from_rows(y, geometry, ctx.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (x, W, change), geometry, s, needs = ctx.saved_tensors, ctx.geometry, ctx.s, ctx.needs_input_grad
        g, gx, gchange = rows(gradients[0], geometry), None, None
        if needs[0]:
            gx = back_to_input(geometry, g, W, cast(change, W.dtype), s, ctx.inner)
        if needs[3]:
            gchange = back_to_change(geometry, g, x, W, s)
        return from_rows(gx, geometry, ctx.shape), None, None, gchange, None, None


_whole = apply_of(_Whole)
