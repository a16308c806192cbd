"""Features times learnt lengths over given ones: y = r t + (1 - r) bias, with r = (start + change) / n, and no gradient
for n. At r = 1 that is t, bit for bit, bias included.

Kept: t. A feature whose n is 0 keeps the factor 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import apply_of, refuse_twice


def scaled(
    t: Tensor, change: Tensor, start: Tensor, squares_F: Tensor, bias: Tensor | None, ones: tuple[int, ...]
) -> Tensor:
    """r t + (1 - r) bias, in the dtype of t; the factor is not rounded to that.

    Args:
        t: with the features along an axis; a bias is in it.
        change, start: of the lengths, F values each, in any shape.
        squares_F: n^2.
        bias: [F], or None for 0.
        ones: one 1 for each axis behind that of the features.
    """
    y: Tensor = _scaled(t, change, start, squares_F, bias, ones)
    return y


def _times(t: Tensor, factor: Tensor) -> Tensor:
    """t factor, rounded once, to the dtype of t."""
    return t * factor if t.dtype == factor.dtype else torch.mul(t, factor, out=torch.empty_like(t))


def _between(t: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """factor t + (1 - factor) bias, likewise."""
    if t.dtype == bias.dtype == factor.dtype:
        return torch.lerp(bias, t, factor)
    return torch.addcmul((1 - factor) * bias, t, factor, out=torch.empty_like(t))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, t: Tensor, change: Tensor, start: Tensor, squares: Tensor, bias: Tensor | None, ones: tuple[int, ...]
    ) -> Tensor:
        n = squares.sqrt()
        zero = n == 0
        factor = (start + change).flatten().div_(n).masked_fill_(zero, 1.0).reshape(-1, *ones)
        ctx.save_for_backward(t, factor, n.masked_fill_(zero, torch.inf), bias)
        ctx.shape = change.shape
        return _times(t, factor) if bias is None else _between(t, factor, bias.reshape(factor.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (t, factor, n, bias) = gradients, ctx.saved_tensors
        change: Tensor | None = None
        if ctx.needs_input_grad[1]:
            axis = g.dim() - factor.dim()
            others = [i for i in range(g.dim()) if i != axis]
            change = (g * t).sum(others, dtype=n.dtype)
            if bias is not None:
                change.addcmul_(g.sum(others, dtype=n.dtype), bias.to(n.dtype), value=-1)
            change = change.div_(n).reshape(ctx.shape)
        return _times(g, factor) if ctx.needs_input_grad[0] else None, change, None, None, None, None


_scaled = apply_of(_Scaled)
