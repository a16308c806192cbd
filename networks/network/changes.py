"""Whether somebody has changed parameters, for what follows an optimizer that belongs to the trainer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def times_changed(tensors: Iterable[Tensor]) -> int:
    """How often these tensors were changed in place, all together: only its growth means something.

    It is torch's own count for autograd, `_version`. The name is private, and there is no other way: no optimizer tells
    of its steps (they come from several libraries, fused, behind wrappers, or as copies of what a backend writes), and
    comparing values would take a copy of them all and a wait for the device in every step.
    """
    return sum(tensor._version for tensor in tensors)
