"""The contract of a multiplicative algorithm: it changes the features that go into a layer, or those that come out.

    output side    W' = T W,  y' - bias = T (y - bias)         T acts on the O axis
    input side     W' = W T,  y' = base(T x)                   T acts on the I axis
    columns        W' = W T,  y' = op(x, W')                   T acts on the axis of I times kernel positions

with T - 1 given by `change`, so that the first two need no base weight: bases of any kind will do, quantised ones too.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..tensors.geometry import Pieces
from ..tensors.low_rank import Gate
from .base import Adapter


class Reweight(Adapter):
    """Base of all multiplicative algorithms. They have no rank, no scale and nothing that dropouts could act on."""

    features: ClassVar[frozenset[str]] = frozenset()
    plus: ClassVar[frozenset[str]] = frozenset()
    required: ClassVar[tuple[frozenset[str], ...]]
    fold: ClassVar[tuple[str, ...]] = ()
    side = "output"  # or "input", or "columns"
    relative = True

    def change(self, t: Tensor, axis: int) -> Tensor:
        """(T - 1) t along the axis of the features that come out, or go in; in t's dtype, differentiable."""
        raise NotImplementedError

    def change_rows(self, t: Tensor, axis: int, pieces: Pieces) -> Tensor | None:
        """The same for t that has only these of the output features; None if the others would have a say in them."""
        return None

    def new_weight(self, weight: Tensor) -> Tensor:
        """W' for W [O, I, *kernel]."""
        return weight + self.weight_change(weight)

    def weight_change(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        return self.change(weight, 0 if self.side == "output" else 1)

    def shrink_(self, ratio: float) -> None:
        """Make the change smaller, to about `ratio` of its size."""
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(ratio)

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        raise TypeError(f"{self.algo} has no update apart from the base weight")

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        raise TypeError(f"{self.algo} has no update apart from the base weight")
