"""LoKr over its base: y = base(x) + s kron(w1 [A, C], left [B, R] right [R, D, *kernel]) x.

The input is seen as [N, C, D, ..], with N tokens of a Linear, or images of a convolution:

    h = right x  [N, C, R, ..]      m = w1 h  [N, A, R, ..]      y += left m  [N, A, B, ..]

A whole second factor [B, D, *kernel] is `right` alone where the products with it come first, `left` alone where they
come last. Kept: x, h and m, those of them that a factor has made.
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
    from_rows,
    met,
    pointwise_back,
    refuse_twice,
    rows,
)
from .geometry import Geometry


def kronecker_over_base(
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w1_AC: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    strength: float,
) -> Tensor:
    """base(x) + strength op(x, kron(w1, left right)), for an open layer.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        w1_AC: the first factor.
        left: [B, R], or a whole second factor [B, D, *kernel]; None = `right` is that.
        right: [R, D * K], or a whole second factor [B, D, *kernel]; None = `left` is that.
        strength: s.
    """
    y: Tensor = _apply(x, weight, bias, w1_AC, left, right, strength, geometry)
    return y


class _Linear:
    """Products with the two parts of the second factor, on rows [N, features]."""

    @staticmethod
    def base(geometry: Geometry, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W, b)

    @staticmethod
    def base_back(geometry: Geometry, g: Tensor, W: Tensor, shape: torch.Size) -> Tensor:
        return torch.mm(g, W)

    @staticmethod
    def right(geometry: Geometry, x: Tensor, right: Tensor) -> Tensor:
        return torch.mm(x, right.t())

    @staticmethod
    def right_back_(
        geometry: Geometry, gx: Tensor | None, gh: Tensor, x: Tensor, right: Tensor, learns: bool
    ) -> Tensor | None:
        if gx is not None:
            gx.addmm_(gh, right)
        return torch.mm(gh.t(), x) if learns else None

    @staticmethod
    def add_left_(geometry: Geometry, y: Tensor, m: Tensor, left: Tensor, whole: bool) -> None:
        y.addmm_(m, left.t())

    @staticmethod
    def left_back(
        geometry: Geometry, g: Tensor, m: Tensor, left: Tensor, whole: bool, learns: bool
    ) -> tuple[Tensor, Tensor | None]:
        return torch.mm(g, left), torch.mm(g.t(), m) if learns else None


class _Conv:
    """The same on images."""

    @staticmethod
    def base(geometry: Geometry, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return convolved(geometry, x, W, b).contiguous()

    @staticmethod
    def base_back(geometry: Geometry, g: Tensor, W: Tensor, shape: torch.Size) -> Tensor:
        gx: Tensor = convolved_back(geometry, g, shape, W, (True, False))[0]
        return gx.contiguous()

    @staticmethod
    def right(geometry: Geometry, x: Tensor, right: Tensor) -> Tensor:
        return convolved(geometry, x, right)

    @staticmethod
    def right_back_(
        geometry: Geometry, gx: Tensor | None, gh: Tensor, x: Tensor, right: Tensor, learns: bool
    ) -> Tensor | None:
        more, found = convolved_back(geometry, gh, x, right, (gx is not None, learns))
        if gx is not None:
            gx.add_(more)
        gradient: Tensor | None = found
        return gradient

    @staticmethod
    def add_left_(geometry: Geometry, y: Tensor, m: Tensor, left: Tensor, whole: bool) -> None:
        if whole:
            y.add_(convolved(geometry, m, left))
        else:
            add_pointwise_(y, m, left)

    @staticmethod
    def left_back(
        geometry: Geometry, g: Tensor, m: Tensor, left: Tensor, whole: bool, learns: bool
    ) -> tuple[Tensor, Tensor | None]:
        back = (
            convolved_back(geometry, g, m, left, (True, learns))
            if whole
            else pointwise_back(g, m, left.reshape(*left.shape, *geometry.ones), (True, learns))
        )
        return back[0], back[1]


class _Kronecker(torch.autograd.Function):
    """s is in the copy of w1, the smallest of all tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        w1: Tensor,
        left: Any,
        right: Any,
        s: float,
        geometry: Geometry,
    ) -> Tensor:
        op = _Conv if geometry.kernel else _Linear
        ctx.s, ctx.geometry, ctx.op, ctx.shape = s, geometry, op, x.shape
        ctx.of_left, ctx.of_right = (None if t is None else t.shape for t in (left, right))
        x, W = met(x, W)
        x = rows(x, geometry)
        y = op.base(geometry, x, W, b)
        (A, C), N, space = w1.shape, len(x), x.shape[2:]
        parts = x.reshape(N * C, -1, *space)
        w1 = torch.mul(w1, s, out=torch.empty_like(w1, dtype=y.dtype))
        h, m = parts, None
        if right is not None:
            right = cast(right, y.dtype).reshape(len(right), parts.shape[1], *geometry.kernel)
            h = op.right(geometry, parts, right)
        spread = w1.expand(N, A, C)
        if left is None:
            y.view(N, A, -1).baddbmm_(spread, h.reshape(N, C, -1))
        else:
            left = cast(left, y.dtype)
            m = torch.bmm(spread, h.reshape(N, C, -1)).view(N * A, *h.shape[1:])
            op.add_left_(geometry, y.view(N * A, -1, *y.shape[2:]), m, left, right is None)
        ctx.save_for_backward(x, W, w1, left, right, None if right is None else h, m)
        return from_rows(y, geometry, ctx.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (x, W, w1, left, right, h, m) = gradients, ctx.saved_tensors
        geometry, op, needs = ctx.geometry, ctx.op, ctx.needs_input_grad
        (A, C), N = w1.shape, len(x)
        g = rows(g, geometry).contiguous()  # which tokens of one image may not be
        gx = op.base_back(geometry, g, W, x.shape) if needs[0] else None
        parts = x.reshape(N * C, -1, *x.shape[2:])
        h = parts if h is None else h
        gm, gw1, gleft, gright = g, None, None, None
        if left is not None:
            gm, gleft = op.left_back(geometry, g.view(N * A, -1, *g.shape[2:]), m, left, right is None, needs[4])
        gm = gm.reshape(N, A, -1)
        if needs[3]:
            gw1 = _of_first(gm, h.reshape(N, C, -1), ctx.s)
        back = w1.t().expand(N, C, A)
        if right is not None and (gx is not None or needs[5]):
            gh = torch.bmm(back, gm).view(h.shape)
            into = None if gx is None else gx.view(parts.shape)
            gright = op.right_back_(geometry, into, gh, parts, right, needs[5])
        elif gx is not None:
            gx.view(N, C, -1).baddbmm_(back, gm)
        gleft, gright = (_shaped(*one) for one in ((gleft, ctx.of_left), (gright, ctx.of_right)))
        return from_rows(gx, geometry, ctx.shape), None, None, gw1, gleft, gright, None, None


def _of_first(gm: Tensor, h: Tensor, s: float) -> Tensor:
    """The gradient of w1, summed over tokens or images in fp32 or wider."""
    wide = torch.promote_types(gm.dtype, torch.float32)
    return torch.bmm(gm, h.transpose(1, 2)).sum(0, dtype=wide).mul_(s)


def _shaped(gradient: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if gradient is None else gradient.reshape(shape)


_apply = apply_of(_Kronecker)
