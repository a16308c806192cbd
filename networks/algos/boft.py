"""BOFT: a butterfly of rotations (2311.06243), so that every output feature meets every other in log2 steps.

    T = r P_p^-1 R_p P_p ... P_0^-1 R_0 P_0        R_i block-diagonal, as in oft

P_i brings features that lie 2^i B / 2 apart side by side. O must be an even block size B up to dim, times a power of 2.

Parameters (saved as oft_blocks, rescale = r)
    blocks          [p + 1, 2^p, B, B]         start: 0
    rescale_change  [O, 1, 1..], r - 1, with rescaled only         start: 0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..records.boft import BOFT as SPEC
from ..records.oft import CHANGE, RESCALE
from ..tensors.geometry import Geometry
from ..tensors.rotation import butterfly, butterfly_chain, rotation_less_identity
from .oft import Rotation
from .saved import Layout


class BOFT(Rotation):
    spec = SPEC

    @classmethod
    def layout(
        cls, geometry: Geometry, dim: int, constraint: float = 0.0, rescaled: bool = False, size: int = 0
    ) -> Layout:
        O = geometry.out_features
        if geometry.groups > 1:
            raise ValueError(f"boft would mix the {geometry.groups} groups of a convolution: leave the layer out")
        size = size or block_size(O, dim)
        count = O // size
        return cls._with_rescale({"blocks": (count.bit_length(), count, size, size)}, geometry, rescaled)

    @classmethod
    def accepts(cls, tensors: Mapping[str, Tensor]) -> bool:
        return tensors["oft_blocks"].dim() == 4

    def change(self, t: Tensor, axis: int) -> Tensor:
        stages, _, size, _ = self.blocks.shape
        less = rotation_less_identity(self.blocks.flatten(0, 1), self.limit).unflatten(0, (stages, -1))
        distances = tuple(2**i * (size // 2) for i in range(stages))
        if CHANGE in self.laid_out.shapes:  # r P^-1 R P = P^-1 (P r) R P
            rows = butterfly(self.rescale_change.flatten(), 0, distances[-1])
            less = torch.cat([less[:-1], self.with_rows(less[-1], rows)[None]])
        return butterfly_chain(t, less.to(t.dtype), axis, distances)

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        blocks = tensors["oft_blocks"]
        if blocks.dim() != 4 or blocks.shape[1] * blocks.shape[2] != geometry.out_features:
            raise ValueError(f"oft_blocks {tuple(blocks.shape)} do not fit a weight of {geometry.weight_shape}")
        return blocks.shape[2], {"size": blocks.shape[2], "rescaled": RESCALE in tensors}


def block_size(features: int, dim: int) -> int:
    """The largest even block size up to dim with a power of 2 of blocks.

    Raises:
        ValueError: there is none; with the least dim that has one.
    """
    fitting = [n for n in range(2, features + 1, 2) if features % n == 0 and (features // n).bit_count() == 1]
    if not fitting:
        raise ValueError(f"boft has no blocks for {features} output features: it needs an even divisor; use diag-oft")
    if fitting[0] > dim:
        raise ValueError(
            f"boft has no blocks of up to {dim} for {features} output features: use network_dim={fitting[0]} or more"
        )
    return max(n for n in fitting if n <= dim)
