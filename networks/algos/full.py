"""Full fine-tuning as an adapter: the whole difference.

    dW = diff,  bias' = bias + diff_b

Parameters (saved under these names; readers ignore the alpha beside them)
    diff    [O, I, *kernel]                         start: 0
    diff_b  [O], for layers with a bias             start: 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    def layout(cls, geometry: Geometry, dim: int) -> Layout:
        return Layout({"diff": geometry.weight_shape}, rank=None, rank_axis=False)

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        return self.diff

    def add_delta_(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        if isinstance(strength, Tensor) or self.diff.dtype != weight.dtype:
            return super().add_delta_(weight, strength)
        return weight.add_(self.diff.to(weight.device), alpha=strength)

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        return gate.output(self.geometry.op(x, self.factors(x)["diff"]))

    def flops(self, tokens: int) -> tuple[float, float]:
        return float("inf"), 6.0 * tokens * self.geometry.out_features * self.geometry.columns

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
    def accepts(cls, tensors: Mapping[str, Tensor]) -> bool:
        """That of a vector is of a normalisation layer."""
        return tensors["diff"].dim() > 1

    @classmethod
    def shown_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(tensors["diff"].shape)

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        if tuple(tensors["diff"].shape) != geometry.weight_shape:
            raise ValueError(f"diff {tuple(tensors['diff'].shape)} does not fit a weight of {geometry.weight_shape}")
        return 1, {}
