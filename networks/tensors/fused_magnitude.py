"""Features times learnt lengths over given ones: y = t g / n + bias, with g = start + change and n without gradient.

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
    """t g / n + bias, in the dtype of t; the factor is not rounded to that.

    Args:
        t: with the features along an axis.
        change, start: of g, F values each, in any shape.
        squares_F: n^2.
        bias: [F], or None.
        ones: one 1 for each axis behind that of the features.
    """
    y: Tensor = _scaled(t, change, start, squares_F, bias, ones)
    return y


def _times(t: Tensor, factor: Tensor, plus: Tensor | None = None) -> Tensor:
    """t factor + plus, rounded once, to the dtype of t."""
    out = torch.empty_like(t)
    return torch.mul(t, factor, out=out) if plus is None else torch.addcmul(plus, t, factor, out=out)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, t: Tensor, change: Tensor, start: Tensor, squares: Tensor, bias: Tensor | None, ones: tuple[int, ...]
    ) -> Tensor:
        n = squares.sqrt()
        zero = n == 0
        factor = torch.where(zero, 1.0, (start + change).flatten() / n).reshape(-1, *ones)
        ctx.save_for_backward(t, factor, n.masked_fill_(zero, torch.inf))
        ctx.shape = change.shape
        return _times(t, factor, None if bias is None else bias.reshape(-1, *ones))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (t, factor, n) = gradients, ctx.saved_tensors
        change: Tensor | None = None
        if ctx.needs_input_grad[1]:
            axis = g.dim() - factor.dim()
            others = [i for i in range(g.dim()) if i != axis]
            change = ((g * t).sum(others, dtype=n.dtype) / n).reshape(ctx.shape)
        return _times(g, factor) if ctx.needs_input_grad[0] else None, change, None, None, None, None


_scaled = apply_of(_Scaled)
