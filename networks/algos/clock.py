"""The time of a denoising pass, for algorithms that act by it. A network's hook tells it, its adapters ask for it.

It belongs to a thread of execution: a thread, or a backward pass, which computes checkpoints again and may do so in
threads of autograd's own. Neither thread-local values nor context variables reach those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..tensors.per_thread import PerThread

_ROUNDING = 1e-4  # of fp32 times: what is a whole number on paper must not fall below it


@dataclass(eq=False)
class Moment:
    """What is told of one pass.

    Attributes:
        time: [N], of each sample: 0 = nothing but noise, 1 = no noise; None = nobody has told.
        mask: [R] or [N, R], set by hand; goes before the time.
    """

    time: Tensor | None = None
    mask: Tensor | None = None
    made: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)  # masks of this pass, by what they are for


_UNTOLD = Moment()


class _Thread:
    """What a thread was told: of its last pass, and the mask for those to come."""

    def __init__(self) -> None:
        self.moment: Moment | None = None
        self.mask: Tensor | None = None


class Clock:
    """That of one network, or of all networks of a group.

    Args:
        group: its number; None = of one network.

    Attributes:
        last: of the last pass entered with gradients, in whatever thread: for threads that were told nothing.
    """

    def __init__(self, group: int | None = None) -> None:
        self.group = group
        self.last: Moment | None = None
        self._threads = PerThread(_Thread)
        # Number of a backward pass -> the moment of the pass which it goes through; the graph keeps that alive.
        self._backwards: WeakValueDictionary[int, Moment] = WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is of a copied network, that of a group of the same group."""
        if self.group is not None:
            return clock_of, (self.group,)
        return Clock, (), {"last": self.last, "_threads": self._threads}

    @property
    def now(self) -> Moment:
        """What was told in this thread of execution."""
        return self._told() or self.last or _UNTOLD

    def enter(self, time: Tensor | None) -> Moment | None:
        """A pass begins; what was told here before it."""
        before = self._told()
        moment = Moment(time, self._threads.mine.mask)
        self._tell(moment)
        if torch.is_grad_enabled():
            self.last = moment
        return before

    def leave(self, before: Moment | None) -> None:
        """A pass ends that nothing comes back to: what `enter` gave is in force again."""
        self._tell(before)

    def go_back(self, moment: Moment) -> None:
        """The backward of a pass begins: what is computed again in it sees its moment.

        Compiled layers cannot ask for the number of the backward pass: they have what their thread was told, or in
        one of autograd's own, which is told nothing else, the last.
        """
        self._backwards[_backward()] = moment
        here = self._threads.mine
        if here.moment is None:
            self.last = moment
        else:
            here.moment = moment

    def set_mask(self, mask: Tensor | None) -> None:
        """For the passes of this thread from now on; None = by their time."""
        self._threads.mine.mask = mask
        told = self._told()
        if told is not None or mask is not None:
            self._tell(Moment(told.time if told else None, mask))

    def _told(self) -> Moment | None:
        number = _backward()
        again = self._backwards.get(number) if number >= 0 else None
        return again or self._threads.mine.moment

    def _tell(self, moment: Moment | None) -> None:
        self._threads.mine.moment = moment
        number = _backward()
        if number >= 0:
            self._backwards.pop(number, None)
            if moment is not None:
                self._backwards[number] = moment

    def pair_mask(self, dim: int, least: int, exponent: float, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`rank_mask` twice side by side, [N, 2 R], made once in a pass for all layers alike.

        Args:
            dim, least, exponent: as for `rank_mask`.
            like: on whose device it is to be.
            dtype: its own.
        """
        made, kind = self.now.made, (dim, least, exponent, like.device, dtype)
        if kind not in made:
            mask = self.rank_mask(dim, least, exponent)
            made[kind] = None if mask is None else mask.repeat(1, 2).to(like.device, dtype)
        return made[kind]

    def rank_mask(self, dim: int, least: int, exponent: float) -> Tensor | None:
        """[N, R] of 0 and 1: the first floor(time^exponent (R - least)) + least ranks of each sample; None = all.

        Raises:
            ValueError: the mask that was set is for another number of ranks.
        """
        now = self.now
        if now.mask is not None:
            if now.mask.shape[-1] != dim:
                raise ValueError(
                    f"the timestep mask is {tuple(now.mask.shape)}, this layer has {dim} ranks: give [{dim}] or "
                    f"[samples, {dim}], or one dim to all layers"
                )
            return now.mask.reshape(-1, dim)
        if now.time is None:
            return None
        active = torch.floor(now.time**exponent * (dim - least) + _ROUNDING) + least
        return (torch.arange(dim, device=active.device) < active[:, None]).to(active.dtype)


def _backward() -> int:
    """The number of the backward pass under way here; -1 outside."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


_GROUPS: dict[int, Clock] = {}


def clock_of(group: int) -> Clock:
    """The clock of all networks with this `mask_group_id`."""
    return _GROUPS.setdefault(group, Clock(group))
