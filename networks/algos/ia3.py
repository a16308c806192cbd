"""IA3: a learnt factor for every feature that comes out of a layer, or goes in (2205.05638).

    W'[o, i] = W[o, i] (1 + w[o]), or (1 + w[i]) with train_on_input

Parameters (saved as weight, with on_input beside it; a vector for a Linear, [1, O, 1..] or [1, I, 1..] for a
convolution)
    weight  [O], or [I]         start: 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..records.ia3 import IA3 as SPEC
from ..records.ia3 import PEFT
from ..tensors.fused import Call, OverBase
from ..tensors.fused_scaling import stretched_over_base
from ..tensors.geometry import Geometry, RowRanges
from .multiplicative import Multiplicative, alike_inputs
from .saved import Layout, concatenated, each, there, wide_dtype


class IA3(Multiplicative):
    spec = SPEC
    weight: nn.Parameter

    @classmethod
    def layout(cls, geometry: Geometry, dim: int, train_on_input: bool = False) -> Layout:
        features = geometry.in_features if train_on_input else geometry.out_features
        return Layout({"weight": (features,)}, rank=None, rank_axis=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    @property
    def side(self) -> str:  # type: ignore[override]
        return "input" if self.chosen.get("train_on_input") else "output"

    def change(self, t: Tensor, axis: int) -> Tensor:
        shape = [1] * t.dim()
        shape[axis] = -1
        w = self.weight.to(t.dtype)
        groups = t.shape[axis] // w.numel()  # of a grouped convolution: each group has its own I channels
        return t * w.repeat(groups).reshape(shape)

    def change_rows(self, t: Tensor, axis: int, row_ranges: RowRanges) -> Tensor:
        shape = [1] * t.dim()
        shape[axis] = -1
        return t * torch.cat([self.weight[start:stop] for start, stop in row_ranges]).to(t.dtype).reshape(shape)

    def over_base(self, call: Call) -> OverBase | None:
        return _OverBase(self.side == "input")

    def pack(self) -> dict[str, Tensor]:
        w, on_input = self.weight.detach(), self.side == "input"
        shape = (1, -1, *self.geometry.ones) if self.geometry.is_conv else (-1,)
        return {"weight": w.reshape(shape), "on_input": torch.tensor(int(on_input))}

    @classmethod
    def accepts(cls, tensors: Mapping[str, Tensor]) -> bool:
        """PEFT's factors of outputs stand for its bias, too, and those of convolutions do not show their side."""
        return PEFT not in tensors or (tensors[PEFT].dim() == 2 and len(tensors[PEFT]) == 1)

    @classmethod
    def portable(cls, tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[Mapping[str, Tensor], float | None]:
        if PEFT not in tensors:
            return tensors, alpha
        factors = tensors[PEFT].flatten()
        return {"weight": factors.to(wide_dtype(factors)) - 1, "on_input": torch.tensor(1)}, None

    @classmethod
    def join(
        cls, packs: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int], alpha: float | None
    ) -> dict[str, Tensor] | None:
        present = there(packs)
        if any(bool(pack["on_input"]) for pack in present):
            return alike_inputs(packs)
        axis = min(1, present[0]["weight"].dim() - 1)
        return {**present[0], "weight": concatenated(each(packs, "weight"), sizes, axis)}

    @classmethod
    def take(
        cls, tensors: Mapping[str, Tensor], alpha: float | None, start: int, stop: int
    ) -> tuple[dict[str, Tensor], float | None]:
        if bool(tensors["on_input"]):
            return dict(tensors), alpha
        weight = tensors["weight"]
        return {**tensors, "weight": weight.narrow(min(1, weight.dim() - 1), start, stop - start)}, alpha

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        on_input = bool(tensors["on_input"])
        wanted = geometry.in_features if on_input else geometry.out_features
        shape = tuple(tensors["weight"].shape)
        if math.prod(shape) != wanted or wanted not in shape:
            raise ValueError(
                f"ia3 weight {shape} has no axis for the {wanted} features of {geometry.weight_shape} alone"
            )
        return 1, {"train_on_input": on_input}

    def check_fits(self, tensors: Mapping[str, Tensor]) -> None:
        on_input = self.describe(self.geometry, tensors)[1]["train_on_input"]
        if on_input != (self.side == "input"):
            raise ValueError(f"the file has train_on_input={on_input}, this network has the other")

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        self.check_fits(tensors)
        with torch.no_grad():
            self.weight.copy_(tensors["weight"].reshape(-1))


@dataclass(frozen=True)
class _OverBase:
    on_input: bool

    def __call__(self, adapter: IA3, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
        p: Any = adapter._parameters
        return stretched_over_base(adapter.geometry, x, weight, bias, p["weight"], strength, self.on_input)
