"""What is random about a training step and not about a sample: the block of a DyLoRA, the noise of GGPO.

It follows a seed and the number of the step, so that processes which share a step agree, whatever their generators are
at, and so does a recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..algos import Adapter
from ..tensors.seeding import seed_of
from .adapted import AdaptedLayer
from .perturbation import Perturbation


class Draws:
    """One number for each taker in each step. Until the first step there is none, and takers draw as they run.

    Args:
        layers: whose adapters and perturbations take them.
    """

    def __init__(self, layers: Iterable[AdaptedLayer]) -> None:
        self.takers: list[Adapter | Perturbation] = []
        for layer in layers:
            self.takers += [member for member in layer.adapter.members() if member.spec.stepwise]
            self.takers += [layer.perturbation] if layer.perturbation is not None else []
        self._numbers = torch.zeros(len(self.takers), dtype=torch.int64, device="cpu")

    def begin(self, seed: int, step: int) -> None:
        """Draw for a step. In place: a compiled graph has the numbers as an input."""
        if not self.takers:
            return
        self._numbers.random_(generator=torch.Generator().manual_seed(seed_of(f"step {step}", seed)))
        if self.takers[0].number is None:
            for taker, number in zip(self.takers, self._numbers, strict=True):
                taker.number = number
