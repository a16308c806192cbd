"""GLoRA over its base, without a product of W by A = a1 a2 in full:

    y = base(x) + s (W a1)(a2 x) + s b1 (b2 x)              kept: x, a2 x and b2 x, and W a1
    y = base(x + s a1 (a2 x)) + s b1 (b2 x)                 for kernels in fp32 and wider, kept: x, a2 x and b2 x

W a1 reads all of W, which is large beside the images of a convolution with a kernel; the second way does not, but in
half precision the sum x + A x has no digits left for A x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import (
    add_pointwise_,
    apply_of,
    autocast_dtype,
    cast,
    convolved,
    convolved_back,
    from_rows,
    met,
    pointwise,
    pointwise_back,
    refuse_twice,
    rows,
)
from .fused_low_rank import Made, back, forth
from .geometry import Geometry
from .products import weight_times

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def glora_over_base(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, strength: float
) -> Tensor:
    """Output of an open layer with GLoRA.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        factors: a1 [I, R, 1...], a2 [R, I, 1...], b1 [O, R, 1...] and b2 [R, I, *kernel].
        strength: s.
    """
    halved = autocast_dtype(x) is not None or weight.dtype.itemsize < 4
    function = _joined if not geometry.has_kernel else _outer if halved else _inner
    y: Tensor = function(x, weight, bias, *factors, strength, geometry)
    return y


class _Joined(torch.autograd.Function):
    """Without a kernel: one pair of factors [W a1, b1] and [a2; b2]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, s: float,
        geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        shape, R = x.shape, len(a2)
        x, W = met(x, W)
        x = rows(x, geometry)
        dtype = torch.promote_types(x.dtype, W.dtype)
        A = torch.empty(2 * R, *b2.shape[1:], dtype=dtype, device=x.device)
        A[:R].copy_(a2)
        A[R:].copy_(b2)
        B = torch.empty(len(b1), 2 * R, *geometry.ones, dtype=dtype, device=x.device)
        a1 = cast(a1, dtype).flatten(1)
        torch.mm(W.flatten(1), a1, out=B.flatten(1)[:, :R])
        B[:, R:].copy_(b1)
        y, h = forth(geometry, x, W, b, A, B, s)
        ctx.save_for_backward(x, W, A, B, h)
        ctx.geometry, ctx.shape, ctx.s = geometry, shape, s
        return from_rows(y, geometry, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        x, W, A, B, h = ctx.saved_tensors
        geometry, needs, s, R = ctx.geometry, ctx.needs_input_grad, ctx.s, len(A) // 2
        made = Made(geometry, ctx.shape, x, W, A, B, h, s, s, s)
        gx, gA, gB = back(made, gradients[0], needs[0], any(needs[4:7:2]), any(needs[3:6:2]))
        ga1 = None if gB is None else torch.mm(W.flatten(1).t(), cast(gB[:, :R].flatten(1), W.dtype))
        ga2, gb2 = (None, None) if gA is None else (gA[:R], gA[R:])
        return gx, None, None, _as(ga1, geometry), ga2, None if gB is None else gB[:, R:], gb2, None, None


def _as(matrix: Tensor | None, geometry: Geometry) -> Tensor | None:
    return None if matrix is None else matrix.reshape(*matrix.shape, *geometry.ones)


class _Outer(torch.autograd.Function):
    """With a kernel, in half precision: W a1 [O, R, *kernel] convolves a2 x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, s: float,
        geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        x, W = met(x, W)
        dtype = torch.promote_types(x.dtype, W.dtype)
        a1, a2, b1, b2 = (cast(t, dtype) for t in (a1, a2, b1, b2))
        y, h = forth(geometry, x, W, b, b2, b1, s)
        inner, Wa = pointwise(x, a2), weight_times(W, a1.flatten(1))
        y.add_(convolved(geometry, inner, Wa), alpha=s)
        ctx.save_for_backward(x, W, a1, a2, b1, b2, h, inner, Wa)
        ctx.geometry, ctx.s = geometry, s
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (x, W, a1, a2, b1, b2, h, inner, Wa) = gradients, ctx.saved_tensors
        geometry, s, on_x = ctx.geometry, ctx.s, ctx.needs_input_grad[0]
        gx, gb2, gb1 = back(Made(geometry, x.shape, x, W, b2, b1, h, s, s, s), g, on_x, True, True)
        ginner, gWa = (t.mul_(s) for t in convolved_back(geometry, g, inner, Wa, (True, True)))
        more, ga2 = pointwise_back(ginner, x, a2, (on_x, True))
        if on_x:
            gx.add_(more)
        images = W.flatten(2), a1.flatten(1).t()[..., None]  # as `weight_times` sees them
        (ga1,) = pointwise_back(gWa.flatten(2), *images, (False, True))[1:]
        return gx, None, None, _as(ga1[..., 0].t(), geometry), ga2, gb1, gb2, None, None


class _Inner(torch.autograd.Function):
    """With a kernel, in fp32 and wider: the base runs on x + s a1 (a2 x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, s: float,
        geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        x, W = met(x, W)
        dtype = torch.promote_types(x.dtype, W.dtype)
        a1, a2, b1, b2 = (cast(t, dtype) for t in (a1, a2, b1, b2))
        inner, changed = pointwise(x, a2), x.clone()
        add_pointwise_(changed, inner, a1, s)
        y, h = convolved(geometry, changed, W, b), convolved(geometry, x, b2)
        add_pointwise_(y, h, b1, s)
        ctx.save_for_backward(x, W, a1, a2, b1, b2, h, inner)
        ctx.geometry, ctx.s = geometry, s
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (x, W, a1, a2, b1, b2, h, inner) = gradients, ctx.saved_tensors
        geometry, s, on_x = ctx.geometry, ctx.s, ctx.needs_input_grad[0]
        gx = convolved_back(geometry, g, x.shape, W, (True, False))[0]
        ginner, ga1 = (t.mul_(s) for t in pointwise_back(gx, inner, a1, (True, True)))
        more, ga2 = pointwise_back(ginner, x, a2, (on_x, True))
        gh, gb1 = (t.mul_(s) for t in pointwise_back(g, h, b1, (True, True)))
        most, gb2 = convolved_back(geometry, gh, x, b2, (on_x, True))
        if on_x:
            gx.add_(more).add_(most)
        return gx if on_x else None, None, None, ga1, ga2, gb1, gb2, None, None


_joined, _outer, _inner = apply_of(_Joined), apply_of(_Outer), apply_of(_Inner)
