"""The contract of a multiplicative algorithm: it changes the features that go into a layer, or those that come out.

    output side    W' = T W,  y' - bias = T (y - bias)         T acts on the O axis
    input side     W' = W T,  y' = base(T x)                   T acts on the I axis
    columns        W' = W T,  y' = op(x, W')                   T acts on the axis of I times kernel positions

with T - 1 given by `change`, so that the first two need no base weight: bases of any kind will do, quantised ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..tensors.geometry import Geometry, RowRanges, cast_to_input
from ..tensors.low_rank import PassGate
from .base import Adapter, Base
from .parts import Parts
from .saved import alike, there

SLICES, SLICE = 8, 1 << 20  # of a weight that is changed in place: at most so many, and of so many elements at least


class Multiplicative(Adapter):
    """Base of all multiplicative algorithms. They have no rank, no scale and nothing that dropouts could act on."""

    magnitudes = False
    side = "output"  # or "input", or "columns"

    @classmethod
    def of_parts(
        cls, geometry: Geometry, dim: int, sizes: Sequence[int], options: Mapping[str, Any]
    ) -> MultiplicativeParts:
        return MultiplicativeParts(cls, geometry, dim, sizes, options)

    # -- the mathematics

    def change(self, t: Tensor, axis: int) -> Tensor:
        """(T - 1) t. Every algorithm defines it.

        Args:
            t: any tensor with the features that come out of the layer, or go in, along one axis.
            axis: this axis.

        Returns:
            As t, in its dtype, differentiable.
        """
        raise NotImplementedError

    def change_rows(self, t: Tensor, axis: int, row_ranges: RowRanges) -> Tensor | None:
        """The same for t that has only these of the output features; None if the others would have a say in them."""
        return None

    def new_weight(self, weight: Tensor) -> Tensor:
        """W' for W [O, I, *kernel]."""
        return weight + self.weight_change(weight)

    def shrink_(self, ratio: float) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(ratio)

    # -- what a layer asks of it

    def strength(self, multiplier: float | Tensor, scale: float) -> float | Tensor:
        return multiplier

    def weight_change(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        return self.change(weight, 0 if self.side == "output" else 1)

    def change_of_slices(self) -> Callable[[Tensor, float | Tensor], Tensor]:
        """`weight_change` for the slices of one weight: what is the same for all of them is computed here, once."""
        return self.weight_change

    def add_change_(self, weight: Tensor, multiplier: float, strength: float | Tensor) -> Tensor:
        axis = self.free_axis
        if axis is None or weight.dim() < 2:
            return weight.add_(self.weight_change(weight, strength), alpha=multiplier)
        size, change = weight.shape[axis], self.change_of_slices()
        step = max(-(-size // SLICES), SLICE * size // max(1, weight.numel()), 1)
        for start in range(0, size, step):
            part = weight.narrow(axis, start, min(step, size - start))
            part.add_(change(part, strength), alpha=multiplier)
        return weight

    @property
    def free_axis(self) -> int | None:
        """Of a weight, along which slices of it change by themselves; None = there is none."""
        return 1 if self.side == "output" else 0

    def input_change(self, x: Tensor) -> Tensor | None:
        return self.change(x, self.geometry.feature_axis) if self.side == "input" else None

    def output_change(
        self, x: Tensor, y: Tensor, base: Base, gate: PassGate, factored: bool | None = None
    ) -> Tensor | None:
        if self.side == "input":
            return None
        change = self._of_outputs(y, base) if self.side == "output" else None
        if change is None:  # of other modules' rows, or of columns: they are in the weight alone
            weight = base.select_rows(self.weight_change(base.whole_weight(x.device)))
            change = self.geometry.op(x, cast_to_input(weight, x)).to(y.dtype)
        return gate.output(change)

    def _of_outputs(self, y: Tensor, base: Base) -> Tensor | None:
        """(T - 1)(y - bias) for the rows of a module; None if those of others have a say in them."""
        plain, axis = y - base.bias(y), self.geometry.feature_axis
        return self.change(plain, axis) if base.row_ranges is None else self.change_rows(plain, axis, base.row_ranges)

    def change_norm(self, weight: Callable[[], Tensor], strength: float | Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.weight_change(weight()))


def alike_inputs(packs: Sequence[Mapping[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """What changes the input of all parts of a layer alike, None if they are not alike: saved tensors.

    Args:
        packs: of the parts; None = nothing changes there.
    """
    present = there(packs)
    same = len(present) == len(packs) and alike(present, {key for pack in present for key in pack})
    return dict(present[0]) if same else None


class MultiplicativeParts(Parts, Multiplicative):
    """Rotations of the parts of the output of a Linear."""

    def _each(self) -> Sequence[Multiplicative]:
        return cast("list[Multiplicative]", list(self.parts))

    def change(self, t: Tensor, axis: int) -> Tensor:
        return _changes(self._each(), t, axis)

    def change_rows(self, t: Tensor, axis: int, row_ranges: RowRanges) -> Tensor | None:
        chosen = self._starting(row_ranges)
        return None if chosen is None else _changes([self._each()[i] for i in chosen], t, axis)


def _changes(parts: Sequence[Multiplicative], t: Tensor, axis: int) -> Tensor:
    """(T - 1) t, where t has the rows of these parts along an axis."""
    each = t.split([part.geometry.out_features for part in parts], axis)
    return torch.cat([part.change(rows, axis) for part, rows in zip(parts, each, strict=True)], axis)
