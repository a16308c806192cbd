"""Weights stored as codes with one scale per block: W = (code - zero) * scale.

The one mathematics of scaled fp8, of int8 with a scale per row and of int8 or int4 with one per group. A block is
given by its shape, one size per axis of the weight; scales stand in the order of the blocks, in any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SLICE = 1 << 20  # elements of a weight that are worked on at a time, where it need not be whole


@dataclass(frozen=True)
class Codes:
    """A weight in this form; the tensors are those that a layer holds, not copies.

    Attributes:
        codes: integers or fp8 numbers, of the weight's shape.
        scale: one value per block.
        block: shape of a block; divides the weight's shape.
        low, high: the range of a code.
        zero: code of 0 per block, where codes are not symmetric; None means 0 everywhere.
        unit: what the layer multiplies a code by is scale / unit.
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, ...]
    low: float
    high: float
    zero: Tensor | None = None
    unit: float = 1.0

    def decode(self, device: torch.device | None = None) -> Tensor:
        """W in fp32 or wider. Codes and scales may stand on different devices (block swap moves codes alone)."""
        return self.rows(0, len(self.codes), device)

    def rows(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """W[start:stop], likewise."""
        device = device or self.codes.device
        dtype = torch.promote_types(self.scale.dtype, torch.float32)
        values = widened(self.codes[start:stop].to(device), dtype)
        blocks = _blocks(values, (1, *self.block[1:]))
        if self.zero is not None:
            blocks.sub_(self._per_row(self.zero, start, stop).to(device, dtype))
        blocks.mul_(self._per_row(self.scale, start, stop).to(device, dtype) / self.unit)
        return values

    def encode_(self, weight: Tensor) -> None:
        """Take another W [as codes], in place: a new scale for every block, each value rounded once to that scale.

        The scale is rounded to its dtype first, upwards where it would be too small for the largest value.
        """
        values = _blocks(weight, self.block)
        axes = tuple(range(1, values.dim(), 2))
        shifted = self.zero is not None and bool(self.zero.any())
        top, bottom = values.amax(axes, keepdim=True), values.amin(axes, keepdim=True)
        if shifted:
            top, bottom = top.clamp(min=0), bottom.clamp(max=0)
            scale = self._rounded(top - bottom, self.high - self.low)
            zero = torch.round(self.low - bottom / scale)
        else:
            scale = self._rounded(torch.maximum(top, -bottom), self.high)
            zero = torch.zeros_like(scale)
        axis = 0 if len(values) > 1 else 1  # by slices, so that little memory is needed beside a large weight
        step = max(1, SLICE * values.shape[axis] // max(1, values.numel()))
        for start in range(0, values.shape[axis], step):
            size = min(step, values.shape[axis] - start)
            part = slice(start, start + size) if axis == 0 else slice(None)
            codes = (values.narrow(axis, start, size) / scale[part]).add_(zero[part])
            if not self.codes.is_floating_point():
                codes.round_()
            first, per = (start * self.block[0], self.block[0]) if axis == 0 else (start, 1)
            rows = self.codes[first : first + size * per]
            rows.copy_(codes.clamp_(self.low, self.high).reshape(rows.shape))
        self.scale.copy_((scale * self.unit).reshape(self.scale.shape))
        if shifted and self.zero is not None:
            self.zero.copy_(zero.reshape(self.zero.shape))

    def _rounded(self, size: Tensor, steps: float) -> Tensor:
        """Step size for a range: representable in the scale's dtype, not 0, and large enough."""
        info, wide = torch.finfo(self.scale.dtype), size.dtype
        exact = size * (self.unit / steps)
        scale = exact.to(self.scale.dtype).to(wide)
        more = (exact * (1 + 2 * info.eps) + info.smallest_normal * info.eps).to(self.scale.dtype).to(wide)
        scale = torch.where((scale < exact) | (scale == 0), more, scale)
        return scale / self.unit

    def _per_row(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """One value per block, for some rows as blocks of one row."""
        counts = [size // part for size, part in zip(self.codes.shape, self.block, strict=True)]
        by_rows = tensor.reshape(counts).repeat_interleave(self.block[0], 0)[start:stop]
        return by_rows.reshape([stop - start, 1, *(n for count in counts[1:] for n in (count, 1))])


def widened(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of codes in a wide dtype, in memory of their own.

    Many float8 numbers on the CPU are looked up among the 256 that there are: torch's cast takes four times as long.
    """
    wide = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not codes.is_floating_point() or codes.is_cuda or codes.numel() <= SLICE or not codes.is_contiguous():
        return wide.copy_(codes)
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(dtype)
    for numbers, found in zip(codes.view(torch.uint8).view(-1).split(SLICE), wide.view(-1).split(SLICE), strict=True):
        torch.index_select(table, 0, numbers.int(), out=found)
    return wide


def block_of_scale(weight: Sequence[int], scale: Sequence[int]) -> tuple[int, ...] | None:
    """Shape of a block for a scale [] or [1] (one for all), [O, 1] (per row), [O, blocks, 1], or [blocks, blocks]; None
    for others."""
    if tuple(scale) in ((), (1,)):
        return tuple(weight)
    if len(scale) == 3 and scale[0] == weight[0] and scale[2] == 1:
        scale = scale[:2]
    if len(weight) != 2 or len(scale) != 2 or any(not n or size % n for size, n in zip(weight, scale, strict=True)):
        return None
    return weight[0] // scale[0], weight[1] // scale[1]


def _blocks(values: Tensor, block: Sequence[int]) -> Tensor:
    """[a, b] as [a / a', a', b / b', b'] for a block [a', b']."""
    return values.reshape([n for size, part in zip(values.shape, block, strict=True) for n in (size // part, part)])
