"""DeepSpeed's ZeRO 1 and 2: what the optimizer steps is a copy of each parameter, which must learn of our changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..network.changes import times_changed


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether what the optimizer steps is a copy of it, of which each process has its part."""
    return hasattr(parameter, "_hp_mapping")


@torch.no_grad()
def write_master(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the copy: this process's part of it, so every process has to do it."""
    parameter.set_full_hp_param(value)  # type: ignore[attr-defined]


@contextmanager
def masters_follow(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """What is changed in here is changed in the copies, too: the next step would take it back. The copies of the other
    parameters keep the bits which half precision has lost."""
    before = [(parameter, times_changed([parameter])) for parameter in parameters if is_partitioned(parameter)]
    yield
    for parameter, changed in before:
        if times_changed([parameter]) != changed:
            write_master(parameter, parameter.detach())
