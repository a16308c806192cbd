"""Normalisation layers: the whole difference of weight and bias.

    weight' = weight + w_norm,  bias' = bias + b_norm,  so y' = y + xhat * w_norm + b_norm

with xhat the normalised input (`tensors.norms`). A layer without weight and bias counts as one with 1 and 0.

Parameters (saved under these names, without an alpha, as LyCORIS does)
    w_norm  shape of the weight                         start: 0
    b_norm  the same, for layers with a bias            start: 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..records.norm import NORM
from ..tensors.geometry import Geometry
from ..tensors.low_rank import Gate
from .additive import Additive
from .saved import Layout, concatenated


class Norm(Additive):
    spec = NORM

    w_norm: nn.Parameter

    @classmethod
    def layout(cls, geometry: Geometry, dim: int) -> Layout:
        return Layout({"w_norm": geometry.weight_shape}, rank=None, rank_axis=False)

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        return self.w_norm

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        return gate.output(self.geometry.op(x, self.w_norm))

    def flops(self, tokens: int) -> tuple[float, float]:
        return 8.0 * tokens * self.geometry.out_features, float("inf")

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
        return "w_norm" in tensors or tensors["diff"].dim() == 1

    @classmethod
    def portable(cls, tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[dict[str, Tensor], float | None]:
        own = {"diff": "w_norm", "diff_b": "b_norm"}
        return {own.get(suffix, suffix): tensor for suffix, tensor in tensors.items()}, alpha

    @classmethod
    def shown_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(tensors["w_norm"].shape)

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        for suffix, tensor in tensors.items():
            if tuple(tensor.shape) != geometry.weight_shape:
                raise ValueError(f"{suffix} {tuple(tensor.shape)} does not fit a weight of {geometry.weight_shape}")
        if "b_norm" in tensors and not geometry.bias:
            raise ValueError("the file has b_norm, but this layer has no bias: it was trained on another model")
        return 1, {}
