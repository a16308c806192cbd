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
from ..tensors.fused import Call, OverBase
from ..tensors.fused_butterfly import Stages, butterfly_over_base
from ..tensors.fused_rotation import cayley_less_identity
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
        less = rotation_less_identity(self.blocks.flatten(0, 1), self.limit).reshape(self.blocks.shape)
        return butterfly_chain(t, self._with_factors(less).to(t.dtype), axis, self.stages.distances, self.stages.unit)

    @property
    def stages(self) -> Stages:
        """How they lie."""
        count, _, size, _ = self.laid_out.shapes["blocks"]
        return Stages(self.geometry.out_features, size, tuple(2**i * (size // 2) for i in range(count)))

    def _with_factors(self, less: Tensor) -> Tensor:
        """r T - 1 for T - 1."""
        if CHANGE not in self.laid_out.shapes:
            return less
        rows = butterfly(self.rescale_change.flatten(), 0, self.stages.distances[-1])  # r P^-1 R P = P^-1 (P r) R P
        return torch.cat([less[:-1], self.with_rows(less[-1], rows)[None]])

    def over_base(self, call: Call) -> OverBase | None:
        return _over_base

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        blocks = tensors["oft_blocks"]
        if blocks.dim() != 4 or blocks.shape[1] * blocks.shape[2] != geometry.out_features:
            raise ValueError(f"oft_blocks {tuple(blocks.shape)} do not fit a weight of {geometry.weight_shape}")
        return blocks.shape[2], {"size": blocks.shape[2], "rescaled": RESCALE in tensors}


def _over_base(adapter: BOFT, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
    p: Any = adapter._parameters
    blocks = p["blocks"].flatten(0, 1)
    limited = adapter.chosen.get("constraint")
    less = rotation_less_identity(blocks, adapter.limit) if limited else cayley_less_identity(blocks)
    less = adapter._with_factors(less.view(p["blocks"].shape))
    return butterfly_over_base(adapter.geometry, x, weight, bias, less, adapter.stages, strength, on_input=False)


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
