"""What the model is to go on doing: beside each training example another one, whose target is the model's own answer
with the network off.

    loss + w * distance(answer, answer without the network)        both at the same noise

Distance and weights by noise level are those of the loss itself. Which example it is, and its noise, follow from the
seed, the step and the training example, as everything does. Only the network's answer has a gradient.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from .training_data import TrainingData, draw_noise, seed_of

Case = tuple[TrainingData, dict[str, Any], Tensor, Tensor, Tensor, Tensor]
"""Data, batch, latents, noise, levels and the noise that is added, as the objective takes them."""


class Prior:
    """The examples of a run that keep the model as it is.

    Args:
        data: of them.
        sizes: of the training examples, whose batches are of one size each.
        themselves: example i stands beside training example i; else it is drawn from those of its size, or of the most
            common size where there are none of it, so that a batch of them is of one size, too.
    """

    def __init__(self, data: TrainingData, sizes: Sequence[tuple[int, int]], themselves: bool) -> None:
        self.data, self.sizes, self.themselves = data, sizes, themselves
        self._usual = Counter(data.sizes).most_common(1)[0][0]
        by_size = sorted(range(len(data)), key=lambda number: data.sizes[number])
        self._pools = {
            size: list(numbers) for size, numbers in itertools.groupby(by_size, key=lambda number: data.sizes[number])
        }

    def beside(self, seed: int, unit: int, example: int) -> int:
        """The number of the one that stands beside a training example in a step."""
        if self.themselves:
            return example
        pool = self._pools.get(self.sizes[example], self._pools[self._usual])
        return pool[seed_of(seed, "prior", unit, example) % len(pool)]

    def draw(self, seed: int, unit: int, examples: Sequence[int], *noise: float) -> Case:
        """Those that stand beside a batch, with noise of their own.

        Args:
            seed, unit: of the run, and number of the step.
            examples: numbers of the batch's examples.
            noise: offset and perturbation, as for `draw_noise`.
        """
        batch = default_collate([self.data[self.beside(seed, unit, example), 1.0] for example in examples])
        latents = self.data.latents(batch)
        return self.data, batch, latents, *draw_noise(seed, unit, [("prior", i) for i in examples], latents, *noise)
