"""Features times factors, of DoRA and IA3: y = f t + (1 - f) bias. At f = 1 that is t, bit for bit, bias included.

    DoRA    f = (start + change) / n, and no gradient for n; a feature whose n is 0 keeps the factor 1
    IA3     f = 1 + m w

Kept: t. Factors stay in fp32 or wider: half precision holds no small change of 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import FEW, apply_of, base_back, base_of, met, refuse_twice
from .geometry import Geometry


def with_lengths(
    t: Tensor, change: Tensor, start: Tensor, squares_F: Tensor, bias: Tensor | None, ones: tuple[int, ...]
) -> Tensor:
    """f t + (1 - f) bias of DoRA, in the dtype of t.

    Args:
        t: with the features along an axis; a bias is in it.
        change, start: of the lengths, F values each, in any shape.
        squares_F: n^2.
        bias: [F], or None for 0.
        ones: one 1 for each axis behind that of the features.
    """
    y: Tensor = _with_lengths(t, change, start, squares_F, bias, ones)
    return y


def stretched_over_base(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, w_F: Tensor, multiplier: float, on_input: bool
) -> Tensor:
    """IA3 on the output of an open layer, or on its input.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        w_F: the parameter, [O] or [I].
        multiplier: m.
        on_input: which of them.
    """
    y: Tensor = _stretched(x, weight, bias, w_F, multiplier, geometry, on_input)
    return y


def _scaled(t: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """f t + (1 - f) bias, rounded once, to the dtype of t."""
    if t.dtype == factor.dtype and (bias is None or bias.dtype == t.dtype):
        return t * factor if bias is None else torch.lerp(bias.reshape(factor.shape), t, factor)
    out = torch.empty_like(t)
    if bias is None:
        return torch.mul(t, factor, out=out)
    bias = bias.reshape(factor.shape)
    return torch.addcmul(torch.addcmul(bias, bias, factor, value=-1), t, factor, out=out)


def _of_factor(g: Tensor, t: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of f [F]: the sum of g (t - bias) over all other axes."""
    axis = g.dim() - factor.dim()
    others = [i for i in range(g.dim()) if i != axis]
    found = (g * t).sum(others, dtype=factor.dtype)
    return found if bias is None else found.addcmul_(g.sum(others, dtype=factor.dtype), bias, value=-1)


class _WithLengths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, t: Tensor, change: Tensor, start: Tensor, squares: Tensor, bias: Tensor | None, ones: tuple[int, ...]
    ) -> Tensor:
        n = squares.sqrt()
        zero = n == 0
        factor = (start + change).flatten().div_(n).masked_fill_(zero, 1.0)
        factor = factor.reshape(-1, *ones) if ones else factor
        ctx.save_for_backward(t, factor, n.masked_fill_(zero, torch.inf), bias)
        ctx.shape = change.shape
        return _scaled(t, factor, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (t, factor, n, bias), needs = gradients, ctx.saved_tensors, ctx.needs_input_grad
        change = _of_factor(g, t, factor, bias).div_(n).reshape(ctx.shape) if needs[1] else None
        return _scaled(g, factor, None) if needs[0] else None, change, None, None, None, None


class _Stretched(torch.autograd.Function):
    """Of x or of t = base(x), as t + m w (t - bias), which takes the fewest operations, or as f t + (1 - f) bias, which
    goes over a large output once less."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, w: Tensor, m: float, geometry: Geometry, on_input: bool
    ) -> Tensor:
        x, W = met(x, W)
        w = w if w.dtype.itemsize >= 4 else w.float()
        w = geometry.on_outputs(w)  # or on inputs: groups have no form
        ctx.m, ctx.geometry, ctx.shape, ctx.on_input = m, geometry, x.shape, on_input
        t = x if on_input else base_of(geometry, x, W, b)
        over = None if on_input or b is None or t.numel() <= FEW else b
        u = t if on_input or b is None or over is not None else t - geometry.on_outputs(b)
        ctx.save_for_backward(u if ctx.needs_input_grad[3] else None, W, over, w)
        if on_input:
            return base_of(geometry, _grown(t, t, w, m), W, b)
        return _grown(t, u, w, m) if over is None else _scaled(t, torch.rsub(w, 1.0, alpha=-m), b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (u, W, b, w), (on_x, _, _, on_w, *_) = gradients, ctx.saved_tensors, ctx.needs_input_grad
        gx = gw = None
        if ctx.on_input:
            g = base_back(ctx.geometry, g, W, ctx.shape)
        if on_w:
            gw = _of_factor(g, u, w, b)
            gw = gw if ctx.m == 1.0 else gw.mul_(ctx.m)
        if on_x:
            gx = _grown(g, g, w, ctx.m)
            gx = gx if ctx.on_input else base_back(ctx.geometry, gx, W, ctx.shape)
        return gx, None, None, gw, None, None, None


def _grown(t: Tensor, u: Tensor, w: Tensor, m: float) -> Tensor:
    """t + m w u, rounded once, to the dtype of t."""
    if t.dtype == w.dtype:
        return torch.addcmul(t, u, w, value=m)
    return torch.addcmul(t, u, w, value=m, out=torch.empty_like(t))


_with_lengths, _stretched = apply_of(_WithLengths), apply_of(_Stretched)
