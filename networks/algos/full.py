"""Full fine-tuning as an adapter: the whole difference.

    dW = diff,  bias' = bias + diff_b

Parameters (saved under these names; readers ignore the alpha beside them)
    diff    [O, I, *kernel]                         start: 0
    diff_b  [O], for layers with a bias             start: 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..records.full import FULL
from ..tensors.geometry import Geometry
from ..tensors.low_rank import Gate
from .additive import Additive
from .saved import Layout, concatenated


class Full(Additive):
    spec = FULL

    diff: nn.Parameter

    @classmethod
    def layout(cls, geometry: Geometry, dim: int, bias: bool | None = None) -> Layout:
        """`bias` states outright what a file holds."""
        shapes: dict[str, tuple[int, ...]] = {"diff": geometry.weight_shape}
        if geometry.bias if bias is None else bias:
            shapes["diff_b"] = (geometry.out_features,)
        return Layout(shapes, rank=None, rank_axis=False)

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        return self.diff

    def bias_change(self) -> Tensor | None:
        return self.values().get("diff_b")

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        return gate.output(self.geometry.op(x, self.factors(x)["diff"]))

    def flops(self, tokens: int) -> tuple[float, float]:
        return float("inf"), 6.0 * tokens * self.geometry.out_features * self.geometry.columns

    def rescale_(self, ratio: float | Tensor) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(ratio)

    @classmethod
    def join(
        cls, packs: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int], alpha: float | None = None
    ) -> dict[str, Tensor]:
        found = {key: [None if p is None else p.get(key) for p in packs] for pack in packs for key in pack or ()}
        return {key: concatenated(parts, sizes) for key, parts in found.items()}

    @classmethod
    def take(
        cls, tensors: Mapping[str, Tensor], alpha: float | None, start: int, stop: int
    ) -> tuple[dict[str, Tensor], float | None]:
        return {key: tensor[start:stop] for key, tensor in tensors.items()}, alpha

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        if tuple(tensors["diff"].shape) != geometry.weight_shape:
            raise ValueError(f"diff {tuple(tensors['diff'].shape)} does not fit a weight of {geometry.weight_shape}")
        return 1, {"bias": "diff_b" in tensors}
