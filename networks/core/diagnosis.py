"""What a run does to its layers, watched from the trainer's first step: layers that do not learn are named early."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..layers.adapted import AdaptedLayer

log = logging.getLogger(__name__)
SHOWN = 3  # names in a warning
KINDS = {
    "no_gradient": "have had no gradient: the loss does not depend on them, so leave them out (exclude_patterns)",
    "at_start": "are at their start values still: their learning rate is 0 or too small for their dtype",
    "non_finite": "have NaN or infinite values: go on from an earlier file with a lower learning rate",
}


class Diagnosis:
    """Watches the parameters of some layers, at almost no cost: one look at all values at the first step, then one
    call for the first gradient of each parameter, and a sum of counters in every step.

    Args:
        after: optimizer steps until the first report; 0 = never watch.
    """

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0
        self._starts: Tensor | None = None
        self._owners: list[str] = []  # layer of each parameter
        self._parameters: list[nn.Parameter] = []
        self._seen: set[str] = set()
        self._version = 0

    def step(self, layers: Sequence[AdaptedLayer]) -> None:
        """At the start of each pass of the trainer's loop; a step of the optimizer is known by what it changed."""
        if not self.after:
            return
        if self._starts is None:
            self._begin(layers)
        version = self._versions()
        if version == self._version:
            return
        self._version = version
        self.steps += 1
        if self.steps == self.after:
            self.warn(self.find(), f"after {self.steps} steps")

    def find(self) -> dict[str, list[str]]:
        """Kind of trouble -> names of its layers; {} before the first step of an optimizer."""
        if self._starts is None or (not self.steps and self._versions() == self._version):
            return {}
        now = _sums(self._parameters)
        same = dict.fromkeys(self._owners, True)
        finite = dict.fromkeys(self._owners, True)
        rows = zip(self._owners, (now == self._starts).all(1).tolist(), now.isfinite().all(1).tolist(), strict=True)
        for owner, unchanged, good in rows:
            same[owner] &= unchanged
            finite[owner] &= good
        return {
            "no_gradient": [name for name in same if name not in self._seen],
            "at_start": [name for name, unchanged in same.items() if unchanged and name in self._seen],
            "non_finite": [name for name, good in finite.items() if not good],
        }

    def warn(self, found: Mapping[str, Sequence[str]], when: str) -> None:
        """One warning per kind."""
        for kind, names in found.items():
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                log.warning("%s, %d layers %s: %s%s", when, len(names), KINDS[kind], ", ".join(names[:SHOWN]), more)

    def health(self) -> dict[str, int]:
        """Numbers of layers for a file's metadata, with the warnings of a save; {} where no run was watched."""
        found = self.find()
        if not found:
            return {}
        self.warn({kind: names for kind, names in found.items() if kind != "non_finite"}, "at this save")
        layers = len(set(self._owners))
        return {"layers": layers, **{k: len(names) for k, names in found.items() if k != "non_finite"}}

    def _begin(self, layers: Sequence[AdaptedLayer]) -> None:
        for layer in layers:
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    self._owners.append(layer.lora_name)
                    self._parameters.append(parameter)
                    self._watch(parameter, layer.lora_name)
        self._starts = _sums(self._parameters)
        self._version = self._versions()

    def _watch(self, parameter: nn.Parameter, name: str) -> None:
        def first_gradient(_: Tensor) -> None:
            self._seen.add(name)
            handle.remove()

        handle = parameter.register_post_accumulate_grad_hook(first_gradient)

    def _versions(self) -> int:
        return sum(parameter._version for parameter in self._parameters)


@torch.no_grad()
def _sums(parameters: Sequence[Tensor]) -> Tensor:
    """Two sums of each parameter [N, 2] in float64 on the CPU: any change of values shows in them."""
    if not parameters:
        return torch.empty(0, 2, dtype=torch.float64)
    sums = [torch.stack((p.sum(dtype=torch.float64), p.double().square().sum())) for p in parameters]
    return torch.stack([pair.to(sums[0].device) for pair in sums]).cpu()
