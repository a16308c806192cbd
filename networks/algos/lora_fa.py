"""LoRA-FA: LoRA whose down factor keeps its random start (2308.03303).

    dW = up . down, down frozen

The down factor has neither gradient nor optimizer state, and the layer's input is not kept for the backward pass.
Parameters, forms and saved keys are LoRA's; start of down: N(0, sqrt(2 / (I + R))); with
init=pissa and init=milora the directions of the base weight that LoRA would start from, and up from 0.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..records.lora_fa import LORA_FA
from ..tensors.fused import Call, OverBase
from ..tensors.fused_low_rank import low_rank_over_base
from .lora import LoRA, low_rank_form


class LoRAFA(LoRA):
    spec = LORA_FA

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.down, std=math.sqrt(2 / (self.geometry.in_features * self.geometry.groups + self.dim)))

    def over_base(self, call: Call) -> OverBase | None:
        found = super().over_base(call)
        return _over_base if found is low_rank_form else found


def _over_base(adapter: LoRAFA, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
    p: Any = adapter._parameters
    down = p["down"].detach()  # hosts switch the gradient of every parameter on
    return low_rank_over_base(adapter.geometry, x, weight, bias, down, p["up"], strength)
