"""Butterflies of rotations over a base layer, with T = P_s^-1 R_s P_s ... P_0^-1 R_0 P_0 and the multiplier m:

    y = y0 + m (T - 1)(y0 - bias), y0 = base(x)          or          y = base(x + m (T - 1) x)

Two stages next to each other mix what four half blocks hold: they are one rotation in blocks of twice the size, which
costs what the two cost, and goes over the features once. All stages of few features are one. Kept: y0 - bias, or x, and
the small matrices; the backward pass goes through the stages once more. What changes is added up apart from the
features, whose digits are coarser.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fused import apply_of, base_back, base_of, cast, met, refuse_twice
from .geometry import Geometry
from .rotation import butterfly

FEW_FEATURES = 64  # which a matrix of their own turns in less time than two rotations of blocks


@dataclass(frozen=True)
class Stages:
    """How the stages of a butterfly lie.

    Attributes:
        features: that are turned.
        size: B.
        distances: of each stage.
        unit: of theirs, see `butterfly`.
    """

    features: int
    size: int
    distances: tuple[int, ...]
    unit: int = 1


def butterfly_over_base(
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    less_SNBB: Tensor,
    stages: Stages,
    multiplier: float,
    on_input: bool,
) -> Tensor:
    """The output of an open layer whose output or input is turned in stages.

    Args:
        geometry: of the layer.
        x: its input.
        weight, bias: of the base.
        less_SNBB: the blocks of every R - 1, in order.
        stages: how they lie.
        multiplier: m.
        on_input: whether the input is turned.
    """
    y: Tensor = _turned(x, weight, bias, less_SNBB, multiplier, geometry, on_input, stages)
    return y


@dataclass(frozen=True)
class _Group:
    """Stages that go over the features together: features are [high, parts, low, half], blocks are (parts, half)."""

    high: int
    parts: int
    low: int
    half: int

    @property
    def blocks(self) -> int:
        return self.high * self.low

    @property
    def size(self) -> int:
        return self.parts * self.half


@dataclass(frozen=True)
class _Plan:
    """Groups in order, how many stages each has, and where the numbers of all stages' blocks go in those of groups."""

    groups: tuple[_Group, ...]
    counts: tuple[int, ...]
    places: Tensor

    @property
    def numbers(self) -> int:
        return sum(count * group.blocks * group.size**2 for group, count in zip(self.groups, self.counts, strict=True))

    def divided(self, flat: Tensor) -> list[list[Tensor]]:
        """The stages of each group as blocks [N, size, size]."""
        found, at = list[list[Tensor]](), 0
        for group, count in zip(self.groups, self.counts, strict=True):
            numbers, own = group.blocks * group.size**2, list[Tensor]()
            for start in range(at, at + count * numbers, numbers):
                own.append(flat[start : start + numbers].view(group.blocks, group.size, group.size))
            found.append(own)
            at += count * numbers
        return found


@functools.lru_cache(maxsize=64)
def _plan(stages: Stages, device: torch.device) -> _Plan:
    half, groups, counts, places, at = stages.size // 2, list[_Group](), list[int](), list[Tensor](), 0
    bits = [(distance * stages.unit // half).bit_length() - 1 for distance in stages.distances]
    step = len(bits) if stages.features <= FEW_FEATURES else 2
    for start in range(0, len(bits), step):
        own = bits[start : start + step]
        low, parts = 2 ** min(own), 2 ** len(own)
        group = _Group(stages.features // (half * parts * low), parts, low, half)
        groups.append(group)
        counts.append(len(own))
        features = torch.arange(stages.features)
        order = features.view(group.high, parts, low, half).transpose(1, 2).reshape(-1)
        position = torch.empty_like(order)
        position[order] = features  # of a feature in the order of the group
        for stage in range(start, start + len(own)):
            mine = position[butterfly(features, 0, stages.distances[stage], unit=stages.unit)].view(-1, stages.size)
            block, row = mine // group.size, mine % group.size
            rows = block[:, :1] * group.size + row
            places.append((at + rows[:, :, None] * group.size + row[:, None, :]).reshape(-1))
            at += group.blocks * group.size**2
    return _Plan(tuple(groups), tuple(counts), torch.cat(places).to(device))


def _together(less: Tensor, plan: _Plan) -> tuple[list[Tensor], Tensor]:
    """T - 1 of each group [blocks, size, size], and of all stages in one."""
    flat = torch.zeros(plan.numbers, dtype=less.dtype, device=less.device)
    flat.index_copy_(0, plan.places, less.reshape(-1))
    return [_product(own) for own in plan.divided(flat)], flat


def _product(stages: Sequence[Tensor]) -> Tensor:
    """The last times .. the first, less 1, of blocks less 1."""
    less, *others = stages
    for other in others:
        less = (less + other).baddbmm_(other, less)
    return less


def _apart(gradients: Sequence[Tensor], flat: Tensor, plan: _Plan, shape: torch.Size) -> Tensor:
    """The gradient of all stages from those of the groups."""
    found = torch.empty_like(flat)
    for G, own, parts in zip(gradients, plan.divided(flat), plan.divided(found), strict=True):
        for i in reversed(range(1, len(own))):  # G is that of the product of the stages up to i
            torch.baddbmm(G, G, _product(own[:i]).transpose(1, 2), out=parts[i])
            G = torch.baddbmm(G, own[i].transpose(1, 2), G)
        parts[0].copy_(G)
    return found.index_select(0, plan.places).view(shape)


class _Features:
    """Features along the last axis of rows, or the second one of images, seen in the blocks of a group."""

    def __init__(self, images: bool) -> None:
        self.images = images

    def seen(self, t: Tensor, group: _Group) -> Tensor:
        """[high, low, N, parts, half] of rows, [high, low, parts, half, N, places] of images."""
        if self.images:
            return t.view(len(t), group.high, group.parts, group.low, group.half, -1).permute(1, 3, 2, 4, 0, 5)
        return t.view(-1, group.high, group.parts, group.low, group.half).permute(1, 3, 0, 2, 4)

    def sum(self, t: Tensor, change: Tensor | None, group: _Group) -> Tensor:
        """t + change as [blocks, N, size] of rows, [blocks, size, N places] of images."""
        seen = self.seen(t, group)
        if change is None:
            found = seen.contiguous()
        else:
            found = torch.empty(seen.shape, dtype=t.dtype, device=t.device)
            torch.add(seen, self.seen(change, group), out=found)
        last = (group.size, -1) if self.images else (-1, group.size)
        return found.view(group.blocks, *last)

    def times(self, t: Tensor, blocks: Tensor) -> Tensor:
        """Blocks times features."""
        return torch.bmm(blocks, t) if self.images else torch.bmm(t, blocks.transpose(1, 2))

    def outer(self, g: Tensor, t: Tensor) -> Tensor:
        """The gradient of the blocks."""
        return torch.bmm(g, t.transpose(1, 2)) if self.images else torch.bmm(g.transpose(1, 2), t)

    def added(self, change: Tensor | None, more: Tensor, group: _Group, like: Tensor) -> Tensor:
        """change + more, in the order of the features."""
        if change is None and group.blocks == 1 and not self.images:
            return more.view(like.shape)  # they are in order
        total = torch.empty_like(like) if change is None else change
        seen = self.seen(total, group)
        seen.copy_(more.view(seen.shape)) if change is None else seen.add_(more.view(seen.shape))
        return total


def _forth(t: Tensor, whole: Sequence[Tensor], plan: _Plan, features: _Features, kept: list[Tensor] | None) -> Any:
    """(T - 1) t; what goes into the blocks of each group is kept in a list, the last of which is enough then."""
    change: Tensor | None = None
    for i, (group, blocks) in enumerate(zip(plan.groups, whole, strict=True)):
        inner = features.sum(t, change, group)
        if kept is not None:
            kept.append(inner)
            if i == len(whole) - 1:
                return None
        change = features.added(change, features.times(inner, blocks), group, t)
    return change


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, less: Tensor, m: float, geometry: Geometry, on_input: bool,
        stages: Stages,
    ) -> Tensor:  # fmt: skip
        shape = x.shape
        x, W = met(x, W)
        plan, features = _plan(stages, less.device), _Features(bool(geometry.kernel))
        whole, flat = _together(less, plan)
        y = x.contiguous() if on_input else base_of(geometry, x, W, b).contiguous()
        t = y if on_input or b is None else y - geometry.on_outputs(cast(b, y.dtype))
        whole = [cast(blocks, y.dtype) for blocks in whole]
        change = _forth(t, whole, plan, features, None)
        ctx.save_for_backward(t, W, flat, *whole)
        ctx.m, ctx.geometry, ctx.shape, ctx.on_input = m, geometry, shape, on_input
        ctx.plan, ctx.blocks = plan, less.shape
        if on_input:
            return base_of(geometry, torch.add(x, change, alpha=m), W, b)
        return y.add_(change, alpha=m) if t is not y else torch.add(y, change, alpha=m)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (g,), (t, W, flat, *whole), geometry = gradients, ctx.saved_tensors, ctx.geometry
        plan, features = ctx.plan, _Features(bool(geometry.kernel))
        if ctx.on_input:
            g = base_back(geometry, g, W, ctx.shape)
        more: Any = None
        g, inputs, found = g.contiguous(), list[Tensor](), list[Tensor]()
        learns = ctx.needs_input_grad[3]
        if learns:
            _forth(t, whole, plan, features, inputs)
        for i in reversed(range(len(whole))):
            mixed = features.sum(g, more, plan.groups[i])
            if learns:
                found.append(features.outer(mixed, inputs.pop()))
            more = features.added(more, features.times(mixed, whole[i].transpose(1, 2)), plan.groups[i], g)
        gless = gx = None
        if learns:
            wide = [cast(one, flat.dtype) for one in found[::-1]]
            gless = _apart(wide, flat, plan, ctx.blocks)
            gless = gless if ctx.m == 1.0 else gless.mul_(ctx.m)
        if ctx.needs_input_grad[0]:
            gx = torch.add(g, more, alpha=ctx.m)
            gx = gx if ctx.on_input else base_back(geometry, gx, W, ctx.shape)
        return gx, None, None, gless, None, None, None, None


_turned = apply_of(_Turned)
