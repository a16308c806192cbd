"""What a run does to its layers, watched from the trainer's first step: layers that do not learn are named early."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..args.expressions import as_list
from ..layers.adapted import AdaptedLayer
from ..plan.groups import patterns_in
from ..plan.plan import PlanRow
from .changes import Steps

log = logging.getLogger(__name__)
SHOWN = 3  # names in a warning
WAIT = 20  # steps until a kind of value that does not move is told: a factor beside one that starts at 0 moves later
KINDS = {
    "no_gradient": "have had no gradient, the loss does not depend on them",
    "at_start": "are at their start values still",
    "non_finite": "have NaN or infinite values",
}
RAISE = "their learning rate is 0 or too small: raise --learning_rate, or network_reg_lrs, which some layers go by"
SOONER = "go on from an earlier file with a lower learning rate"
REMEDIES = {  # of values that are not finite, by their dtype
    torch.float16: "Adam divides by its eps, and 1e-8 is 0 in fp16: start again with an fp32 adapter "
    "(adapter_dtype=fp32), or with eps=1e-4 (optimizer_args)"
}


class Diagnosis:
    """Watches the parameters of some layers, at almost no cost: one look at all values at the first step and one after
    it, then one call for the first gradient of each parameter, and a sum of counters in every step.

    Layers that nothing in their model reads (`PlanRow.unread`) are no trouble: they never get a gradient.

    Args:
        after: optimizer steps until the first report; 0 = never watch.
    """

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0
        self._starts: Tensor | None = None
        self._rows: dict[str, PlanRow] = {}
        self._owners: list[str] = []  # layer of each parameter
        self._kinds: list[str] = []  # and what it is there: up, down, magnitude_change, ...
        self._parameters: list[nn.Parameter] = []
        self._seen: set[str] = set()
        self._optimizer = Steps(())

    def step(self, layers: Sequence[tuple[PlanRow, AdaptedLayer]]) -> None:
        """At the start of each pass of the trainer's loop."""
        if not self.after:
            return
        if self._starts is None:
            self._begin(layers)
        if not self._optimizer.taken():
            return
        self.steps += 1
        if self.steps == self.after:
            self.warn(self.find(), f"after {self.steps} steps")
        elif self.steps == 1:  # a dtype that cannot hold the optimizer's numbers shows at once
            self.warn({"non_finite": self.find()["non_finite"]}, "after the first step")

    def find(self) -> dict[str, list[str]]:
        """Kind of trouble -> names of its layers, `dead_kinds` -> kinds of value that moved in no layer whose others
        did; {} before the first step of an optimizer."""
        if self._starts is None or not self._has_stepped:
            return {}
        now = _sums(self._parameters)
        still = (now == self._starts).all(1).tolist()
        same, finite = self._all(still), self._all(now.isfinite().all(1).tolist())
        read = {name: unchanged for name, unchanged in same.items() if not self._rows[name].unread}
        return {
            "no_gradient": [name for name in read if name not in self._seen],
            "at_start": [name for name, unchanged in read.items() if unchanged and name in self._seen],
            "non_finite": [name for name, good in finite.items() if not good],
            "dead_kinds": self._dead(still, read) if self.steps >= WAIT else [],
        }

    @property
    def _has_stepped(self) -> bool:
        return bool(self.steps) or self._optimizer.pending

    def _all(self, each: Sequence[bool]) -> dict[str, bool]:
        """Layer -> whether something holds for all its parameters."""
        found = dict.fromkeys(self._owners, True)
        for owner, holds in zip(self._owners, each, strict=True):
            found[owner] &= holds
        return found

    def _dead(self, still: Sequence[bool], same: Mapping[str, bool]) -> list[str]:
        dead: dict[str, bool] = {}
        for owner, kind, unchanged in zip(self._owners, self._kinds, still, strict=True):
            if not same.get(owner, True):
                dead[kind] = dead.get(kind, True) and unchanged
        return [kind for kind, unmoved in dead.items() if unmoved]

    def warn(self, found: Mapping[str, Sequence[str]], when: str) -> None:
        """One warning per kind of trouble."""
        for kind, text in KINDS.items():
            if names := found.get(kind):
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                shown = ", ".join(self._rows[name].shown_name for name in names[:SHOWN]) + more
                log.warning("%s, %d layers %s: %s; %s", when, len(names), text, shown, self._advice(kind, names))
        for kind in found.get("dead_kinds", ()):
            own = [p.dtype for p, name in zip(self._parameters, self._kinds, strict=True) if name == kind]
            why = _too_small(own, "it") or "the loss does not depend on it, or its learning rate is too small"
            log.warning("%s, %s has moved in none of %d layers, while their other values did: %s",
                        when, kind, len(own), why)  # fmt: skip

    def _advice(self, kind: str, names: Sequence[str]) -> str:
        """What to do about these layers."""
        if kind == "no_gradient":
            return f"add exclude_patterns={as_list(self._patterns(names))} to leave them out"
        wanted = set(names)
        dtypes = [p.dtype for p, owner in zip(self._parameters, self._owners, strict=True) if owner in wanted]
        if kind == "at_start":
            return _too_small(dtypes, "them") or RAISE
        return next((REMEDIES[dtype] for dtype in dtypes if dtype in REMEDIES), SOONER)

    def _patterns(self, names: Sequence[str]) -> list[str]:
        """Regular expressions that mean these layers alone."""
        layers = {name: (row.part, row.trainer_name) for name, row in self._rows.items()}
        dead = {layers[name] for name in names}
        return patterns_in(dead, {*layers.values()} - dead)

    def health(self) -> dict[str, int]:
        """Numbers of layers for a file's metadata, with the warnings of a save; {} where no run was watched."""
        found = self.find()
        if not found:
            return {}
        del found["non_finite"]  # the writer looks at what is saved
        self.warn(found, "at this save")
        read = sum(not self._rows[name].unread for name in {*self._owners})
        return {"layers": read, **{kind: len(names) for kind, names in found.items()}}

    def _begin(self, layers: Sequence[tuple[PlanRow, AdaptedLayer]]) -> None:
        for row, layer in layers:
            self._rows[layer.lora_name] = row
            for path, parameter in layer.learnt():
                if parameter.requires_grad:
                    self._owners.append(layer.lora_name)
                    self._kinds.append(path.rpartition(".")[2])
                    self._parameters.append(parameter)
                    self._watch(parameter, layer.lora_name)
        self._starts = _sums(self._parameters)
        self._optimizer = Steps(self._parameters)

    def _watch(self, parameter: nn.Parameter, name: str) -> None:
        def first_gradient(_: Tensor) -> None:
            self._seen.add(name)
            handle.remove()

        handle = parameter.register_post_accumulate_grad_hook(first_gradient)


def _too_small(dtypes: Sequence[torch.dtype], what: str) -> str:
    """Why values in half precision do not move, and what helps; "" for others."""
    half = next((dtype for dtype in dtypes if dtype.itemsize < torch.float32.itemsize), None)
    name = str(half).removeprefix("torch.")
    return "" if half is None else f"steps are too small for {name}, adapter_dtype=fp32 keeps {what} in fp32"


@torch.no_grad()
def _sums(parameters: Sequence[Tensor]) -> Tensor:
    """Two sums of each parameter [N, 2] in float64 on the CPU: any change of values shows in them."""
    if not parameters:
        return torch.empty(0, 2, dtype=torch.float64)
    sums = [torch.stack((p.sum(dtype=torch.float64), p.double().square().sum())) for p in parameters]
    return torch.stack([pair.to(sums[0].device) for pair in sums]).cpu()
