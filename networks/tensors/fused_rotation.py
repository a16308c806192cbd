"""Rotations of blocks of features over a base layer, with L = T - 1 as blocks [N, B, B] and the multiplier m:

    y = y0 + m L (y0 - bias), y0 = base(x)          or          y = base(x + m L x)

Kept: y0 - bias, or x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import apply_of, base_back, base_of, cast, met, refuse_twice
from .geometry import Geometry


def turned_over_base(
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    less_NBB: Tensor,
    multiplier: float,
    on_input: bool,
) -> Tensor:
    """The output of an open layer whose output or input is turned.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        less_NBB: L.
        multiplier: m.
        on_input: whether the input is turned.
    """
    y: Tensor = _turned(x, weight, bias, less_NBB, multiplier, geometry, on_input)
    return y


def cayley_less_identity(blocks_NBB: Tensor) -> Tensor:
    """R - 1 = 2 Q (1 - Q)^-1 of Q = B - B^T, as `rotation_less_identity` has it; kept is the inverse alone, and no wait
    for the device asks whether there is one: there is for every such Q."""
    less: Tensor = _cayley(blocks_NBB)
    return less


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor) -> Tensor:
        blocks = cast(blocks, torch.promote_types(blocks.dtype, torch.float32))
        A = blocks.transpose(1, 2) - blocks  # -Q, whose diagonal is 0
        diagonal = A.diagonal(dim1=1, dim2=2)
        diagonal.fill_(1)
        M = torch.linalg.inv_ex(A)[0]
        diagonal.zero_()
        ctx.save_for_backward(M)
        return _product(A, M, -2.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        refuse_twice()
        back = ctx.saved_tensors[0].transpose(1, 2)
        gQ = _product(_product(back, gradients[0], 1.0), back, 2.0)
        return gQ - gQ.transpose(1, 2)


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """In place, so that autocast has no say."""
    return torch.empty_like(right, memory_format=torch.contiguous_format).baddbmm_(left, right, beta=0, alpha=factor)


def _in_blocks(t: Tensor, count: int, axes: int) -> Tensor:
    """[N, T, B] of rows [.., N B], or [batch N, B, places] of images with so many axes of places."""
    if not axes:
        return t.reshape(-1, count, t.shape[-1] // count).transpose(0, 1)
    return t.reshape(len(t) * count, t.shape[1] // count, -1)


def _add_turned_(into: Tensor, blocks: Tensor, t: Tensor, m: float, axes: int) -> Tensor:
    """into += m blocks t, along the features."""
    views = _in_blocks(into, len(blocks), axes), _in_blocks(t, len(blocks), axes)
    if not axes:
        views[0].baddbmm_(views[1], blocks.transpose(1, 2), alpha=m)
    else:
        views[0].baddbmm_(blocks if len(t) == 1 else blocks.repeat(len(t), 1, 1), views[1], alpha=m)
    return into


def _of_blocks(g: Tensor, t: Tensor, blocks: Tensor, m: float, axes: int) -> Tensor:
    """The gradient of the blocks: m g t^T, summed over places."""
    g, t = _in_blocks(g, len(blocks), axes), _in_blocks(t, len(blocks), axes)
    if not axes:
        return torch.baddbmm(blocks[:1, :1, :1], g.transpose(1, 2), t, beta=0, alpha=m)
    each = torch.baddbmm(g[:1, :, :1], g, t.transpose(1, 2), beta=0, alpha=m)
    return each.view(-1, *blocks.shape).sum(0)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, less: Tensor, m: float, geometry: Geometry, on_input: bool
    ) -> Tensor:
        x, W = met(x, W)
        axes, shape = len(geometry.kernel), x.shape
        if on_input:
            blocks, t = cast(less, x.dtype), x
            y = base_of(geometry, _add_turned_(_copy(x), blocks, x, m, axes), W, b)
        else:
            y = base_of(geometry, x, W, b).contiguous()
            blocks, t = cast(less, y.dtype), _copy(y) if b is None else y - geometry.on_outputs(cast(b, y.dtype))
            _add_turned_(y, blocks, t, m, axes)
        ctx.save_for_backward(t if ctx.needs_input_grad[3] else None, W, blocks)
        ctx.m, ctx.geometry, ctx.shape, ctx.on_input = m, geometry, shape, on_input
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (t, W, blocks), geometry = gradients, ctx.saved_tensors, ctx.geometry
        axes, gx, gless = len(geometry.kernel), None, None
        if ctx.on_input:
            g = base_back(geometry, g, W, ctx.shape)
        if ctx.needs_input_grad[3]:
            gless = _of_blocks(g, t, blocks, ctx.m, axes)
        if ctx.needs_input_grad[0]:
            gx = _add_turned_(_copy(g), blocks.transpose(1, 2), g, ctx.m, axes)
            gx = gx if ctx.on_input else base_back(geometry, gx, W, ctx.shape)
        return gx, None, None, gless, None, None, None


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


_turned, _cayley = apply_of(_Turned), apply_of(_Cayley)
