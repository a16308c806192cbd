"""DyLoRA: LoRA whose first b ranks are a good LoRA, too, for every b (2210.07558).

    dW_b = R / b * up[:, :b] . down[:b]             R / b makes the scale alpha / R of the layer alpha / b

Each training step draws one block of `block_size` ranks at random: the ranks up to its end act, those of the block
alone learn. Otherwise all R act. A file is a LoRA, and cut to its first b ranks with the same alpha it is dW_b.
Processes that share a step have the same block; where nobody counts steps, each pass draws its own.

Parameters, start values and saved keys are LoRA's, without its Tucker form and scalar.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..records.dylora import DYLORA
from ..tensors.fused import BesideBase, Call, OverBase
from ..tensors.fused_low_rank import low_rank_over_base
from ..tensors.fused_nested import nested_over_base
from ..tensors.geometry import Geometry
from ..tensors.per_thread import PerThread
from .lora import LoRA
from .saved import Layout


class _Step:
    """The training pass of a layer that is under way in a thread."""

    def __init__(self) -> None:
        self.block: int | Tensor | None = None  # 0-d where a compiler is at work, which knows no numbers of one pass


class DyLoRA(LoRA):
    spec = DYLORA

    def __init__(self, geometry: Geometry, dim: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(geometry, dim, options)
        self.block_size: int = self.chosen.get("block_size", 1)
        self._step = PerThread(_Step)

    @classmethod
    def layout(cls, geometry: Geometry, dim: int, block_size: int = 1) -> Layout:  # type: ignore[override]
        return super().layout(geometry, dim)

    @classmethod
    def remark(cls, layout: Layout, dim: int, options: Mapping[str, Any]) -> str:
        block = options.get("block_size", 1)
        left = dim % block if block < dim else 0
        return f"a last block of {left} ranks, as {dim} is no multiple of block_size {block}" if left else ""

    @classmethod
    def caution(cls, layout: Layout, dim: int, options: Mapping[str, Any]) -> tuple[str, str]:
        block = options.get("block_size", 1)
        if block < dim or block == 1:
            return "", ""
        return f"all ranks in one block, which is plain LoRA, as block_size={block} is not below their dim", "a divisor"

    def begin(self, x: Tensor) -> None:
        blocks = -(-self.dim // self.block_size)
        if torch.compiler.is_compiling():
            drawn = torch.randint(blocks, (), device=x.device) if self.number is None else self.number % blocks
            self._step.mine.block = drawn.to(x.device)
        else:  # on the CPU, so that no pass waits for the device
            number = torch.randint(blocks, (), device="cpu") if self.number is None else self.number
            self._step.mine.block = int(number) % blocks

    def end(self) -> None:
        self._step.mine.block = None

    def ranks(self, block: int) -> tuple[int, int]:
        """The first rank that learns, and the first one behind those that act, in a step with this block."""
        first = block * self.block_size
        return first, min(first + self.block_size, self.dim)

    def values(self) -> dict[str, Tensor]:
        block = self._step.mine.block
        if block is None:
            return super().values()
        if isinstance(block, int):
            first, active = self.ranks(block)
            still, learning = (lambda t: t[:first].detach()), (lambda t: t[first:active])
            up = self.up.transpose(0, 1)
            down, up = (torch.cat([still(t), learning(t)]) for t in (self.down, up))
            return {"down": down, "up": up.transpose(0, 1) * (self.dim / active)}
        return self._masked(block)

    def _masked(self, block: Tensor) -> dict[str, Tensor]:
        """The same without numbers of one pass: ranks that do not act are 0."""
        device = self.down.device
        rank, first = torch.arange(self.dim, device=device), block.to(device) * self.block_size
        active = (first + self.block_size).clamp(max=self.dim)
        learns, acts = (rank >= first) & (rank < active), (rank < active).to(self.down.dtype)
        ones = [1] * len(self.geometry.kernel)
        rows, columns = learns.reshape(-1, 1, *ones), learns.reshape(1, -1, *ones)
        ratio = (acts * self.dim / active.to(acts.dtype)).reshape(1, -1, *ones)
        down = torch.where(rows, self.down, self.down.detach())
        return {"down": down, "up": torch.where(columns, self.up, self.up.detach()) * ratio}

    def over_base(self, call: Call) -> OverBase | None:
        return _over_base if call.cheaper_factored(self.flops(call.tokens)) else super().over_base(call)

    def beside_base(self, call: Call) -> BesideBase | None:
        return None

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        if "lora_mid.weight" in tensors:
            raise ValueError("lora_mid.weight: the Tucker form has no nested ranks; train on with algo=lora")
        return super().describe(geometry, tensors)[0], {}


def _over_base(adapter: DyLoRA, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
    p, block = cast(Any, adapter._parameters), adapter._step.mine.block
    if block is None:
        return low_rank_over_base(adapter.geometry, x, weight, bias, p["down"], p["up"], strength)
    ranks = adapter.ranks(cast(int, block))
    strength = strength * adapter.dim / ranks[1]
    return nested_over_base(adapter.geometry, x, weight, bias, p["down"], p["up"], strength, ranks)
