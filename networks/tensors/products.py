"""Products of a base weight with small matrices: all that an adapter may want of the weight in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Products(Protocol):
    """A frozen weight W [O, I, *kernel], wherever and however it is stored."""

    def times(self, matrix_IR: Tensor) -> Tensor:
        """W M [O, R, *kernel], differentiable in M, on its device; in its dtype, or in the one of autocast."""
        ...


@dataclass(frozen=True, eq=False)
class OfWeight:
    """Of a weight at hand."""

    weight: Tensor

    def times(self, matrix_IR: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, matrix_IR.dtype)
        product = weight_times(self.weight.to(wide), matrix_IR.to(self.weight.device, wide))
        return product.to(matrix_IR)


@dataclass(frozen=True, eq=False)
class AsItLies:
    """Of a weight that is not widened: a product in its own dtype is as exact as it is."""

    weight: Tensor

    def times(self, matrix_IR: Tensor) -> Tensor:
        return weight_times(self.weight, matrix_IR.to(self.weight.dtype)).to(matrix_IR.dtype)


def weight_times(weight: Tensor, matrix_IR: Tensor) -> Tensor:
    """W M for a weight [O, I, *kernel]: M acts on the input features, the kernel stays.

    A kernel is seen as an image of K pixels, so that no copy of W is made.
    """
    if weight.dim() == 2:
        return weight @ matrix_IR
    return F.conv1d(weight.flatten(2), matrix_IR.T[..., None]).unflatten(2, weight.shape[2:])
