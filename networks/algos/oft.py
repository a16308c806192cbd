"""Diagonal OFT: rotations of blocks of output features (2306.07280).

    Q_n = B_n - B_n^T        R_n = (1 + Q_n)(1 - Q_n)^-1        W'_n = r_n R_n^T W_n      for each block n of rows

The block size is the smaller of the two factors of O next to dim (tensors.factor); with `dim_is_count` there are as
many blocks as the largest divisor of O up to dim.
`constraint` limits the norm of all Q together to constraint * O (0 = none); a file holds it as alpha. With `rescaled`
every row has a factor r, too.

Parameters (saved as oft_blocks, rescale)
    blocks   [N, B, B]         start: 0
    rescale  [O, 1, 1..], with rescaled only         start: 1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors.factor import factorization
from ..tensors.geometry import Geometry
from ..tensors.rotation import apply_blocks, rotation_less_identity
from .reweight import Reweight
from .saved import Layout


class Rotation(Reweight):
    """What both kinds of orthogonal fine-tuning share: blocks, a constraint, factors by row."""

    keys = {"blocks": "oft_blocks", "rescale": "rescale"}
    required = (frozenset({"oft_blocks"}),)
    alpha_option = "constraint"
    blocks: nn.Parameter
    rescale: nn.Parameter

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.blocks)
        if "rescale" in self.record.shapes:
            nn.init.ones_(self.rescale)

    @property
    def limit(self) -> float:
        return float(self.chosen.get("constraint") or 0.0) * self.geometry.out_features

    def rotated(self, t: Tensor, axis: int) -> Tensor:
        """(T - 1) t without the factors by row."""
        raise NotImplementedError

    def change(self, t: Tensor, axis: int) -> Tensor:
        change = self.rotated(t, axis)
        if "rescale" not in self.record.shapes:
            return change
        shape = [1] * t.dim()
        shape[axis] = -1
        r = self.rescale.reshape(shape)
        return change * r.to(t.dtype) + t * (r - 1).to(t.dtype)

    def shrink_(self, ratio: float) -> None:
        with torch.no_grad():
            self.blocks.mul_(ratio)
            if "rescale" in self.record.shapes:
                self.rescale.sub_(1).mul_(ratio).add_(1)

    @staticmethod
    def _with_rescale(shapes: dict[str, tuple[int, ...]], geometry: Geometry, rescaled: bool) -> Layout:
        if rescaled:
            shapes["rescale"] = (geometry.out_features, 1, *geometry.ones)
        return Layout(shapes, rank=None, rank_axis=False)


class DiagOFT(Rotation):
    algo = "diag-oft"
    options = frozenset({"constraint", "rescaled", "dim_is_count"})

    @classmethod
    def layout(
        cls, geometry: Geometry, dim: int, constraint: float = 0.0, rescaled: bool = False, dim_is_count: bool = False,
        size: int = 0,
    ) -> Layout:  # fmt: skip
        """`size` states the blocks' size outright; else dim and dim_is_count decide."""
        O = geometry.out_features
        if not size:
            size = O // max(n for n in range(1, dim + 1) if O % n == 0) if dim_is_count else factorization(O, dim)[0]
        if O // geometry.groups % size:
            raise ValueError(f"diag-oft: blocks of {size} rows would mix the {geometry.groups} groups of a convolution")
        return cls._with_rescale({"blocks": (O // size, size, size)}, geometry, rescaled)

    @classmethod
    def accepts(cls, tensors: Mapping[str, Tensor]) -> bool:
        return tensors["oft_blocks"].dim() == 3

    def rotated(self, t: Tensor, axis: int) -> Tensor:
        less = rotation_less_identity(self.blocks, self.limit)
        return apply_blocks(less.transpose(1, 2).to(t.dtype), t, axis)

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        blocks = tensors["oft_blocks"]
        if blocks.dim() != 3 or blocks.shape[0] * blocks.shape[1] != geometry.out_features:
            raise ValueError(f"oft_blocks {tuple(blocks.shape)} do not fit a weight of {geometry.weight_shape}")
        return blocks.shape[1], {"size": blocks.shape[1], "rescaled": "rescale" in tensors}
