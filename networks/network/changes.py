"""Whether somebody has changed parameters, for what follows an optimizer that belongs to the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def times_changed(tensors: Iterable[Tensor]) -> int:
    """How often these tensors were changed in place, all together: only its growth means something.

    It is torch's own count for autograd, `_version`. The name is private, and there is no other way: comparing values
    would take a copy of them all and a wait for the device in every step.
    """
    return sum(tensor._version for tensor in tensors)


class Steps:
    """Tells of the steps of whichever optimizer has these parameters, or copies of them as ZeRO 1 and 2.

    Two signs are one step. Most optimizers change parameters in place, also behind wrappers; but fused and 8-bit
    kernels and DeepSpeed write behind autograd's count, and there torch's hook tells.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._mine = frozenset(map(id, self._parameters))
        self._changed, self._told = times_changed(self._parameters), False
        if self._parameters:
            _followed.add(self)

    @property
    def pending(self) -> bool:
        """Whether there was one since the last `taken`."""
        return self._told or times_changed(self._parameters) != self._changed

    def taken(self) -> bool:
        """The same, and it is no longer since."""
        found = self.pending
        self._changed, self._told = times_changed(self._parameters), False
        return found

    @contextmanager
    def none(self) -> Iterator[None]:
        """What is changed in here belongs to the step before, or to none."""
        stepped = self.pending
        yield
        if not stepped:
            self._changed = times_changed(self._parameters)

    def see(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped, perhaps that of other parameters."""
        theirs = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        self._told |= any(id(tensor) in self._mine for tensor in theirs) or self._has_copies(theirs)

    def _has_copies(self, theirs: Iterable[Tensor]) -> bool:
        """Whether these are what ZeRO steps in place of the parameters."""
        mappings = (getattr(p, "_hp_mapping", None) for p in self._parameters)
        masters = [mapping.hp_fragment for mapping in mappings if mapping is not None]
        memory = {_memory(tensor) for tensor in theirs} if masters else ()
        return any(_memory(master) in memory for master in masters)


_followed: WeakSet[Steps] = WeakSet()


def _tell(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After each call of an optimizer; the scaler of fp16 calls a fused one for a step, too, that its kernel leaves
    out."""
    found = getattr(optimizer, "found_inf", None) if _followed else None
    if not (isinstance(found, Tensor) and bool(found)):
        for steps in list(_followed):
            steps.see(optimizer)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


register_optimizer_step_post_hook(_tell)
