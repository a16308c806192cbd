"""What is seen at the entrance of a model's own forward: whether it is sampling, and at what time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..algos.clock import Clock, Moment
from ..archs.spec import Timestep
from ..layers.runtime import Runtime
from ..tensors.per_thread import PerThread
from .average import Average, Layers


@dataclass(frozen=True)
class TimeReader:
    """Finds the time [N] of a pass, 0 = nothing but noise and 1 = no noise, in the arguments of a model's forward.

    Args:
        name, position: of the argument.
        timestep: what its values mean.
        attribute: of the argument, which is the time; "" = the argument is.
    """

    name: str
    position: int
    timestep: Timestep
    attribute: str = ""

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        at, timestep = self.position, self.timestep
        value = kwargs[self.name] if self.name in kwargs else args[at] if at < len(args) else None
        if value is None:
            return None
        value = getattr(value, self.attribute) if self.attribute else value
        time = (torch.as_tensor(value).float() - timestep.noise) / (timestep.clean - timestep.noise)
        time = time.detach().clamp(0, 1)
        # With a time of its own for each frame or token, a sample has that of its noisiest.
        one = time.dim() == 0 or timestep.shared
        return time.reshape(1 if one else time.shape[0], -1).amin(1)


def time_reader(root: nn.Module, timestep: Timestep) -> TimeReader:
    """That of a model.

    Raises:
        ValueError: this class has no such argument.
    """
    names = [*inspect.signature(type(root).forward).parameters][1:]
    found = (name.partition(".") for name in timestep.arguments)
    name, _, attribute = next((one for one in found if one[0] in names), ("", "", ""))
    if not name:
        raise ValueError(
            f"{type(root).__name__} is not told the timestep as {' or '.join(timestep.arguments)}, so ranks cannot "
            f"follow it; its arguments are {', '.join(names)}: choose an algorithm other than tlora"
        )
    return TimeReader(name, names.index(name), timestep.at(type(root).__name__), attribute)


class Watch:
    """Hooks on the model itself, below its wrappers, which hosts take off. What they tell is told to their thread.

    Never inside a layer: reentrant checkpointing runs layers without gradients in training, too. A pass without
    gradients puts back what was before it. The time of one with gradients comes back with its own backward, so that a
    recomputation sees it, also where a host makes several passes (one for each sample, say) before it goes back.

    Args:
        clocks: those to be told the time.
        read: finds it.
        average: whose values passes without gradients have, and which looks for steps at the others, where the host
            tells of none; None = there is none.
        layers: of the average.
    """

    def __init__(
        self,
        runtime: Runtime,
        clocks: Iterable[Clock] = (),
        read: TimeReader | None = None,
        average: Average | None = None,
        layers: Layers = (),
    ) -> None:
        self.runtime, self.clocks, self.read = runtime, list(clocks), read
        self.average = average if average is not None and average.decay else None
        self.layers = layers if self.average else ()  # no pickle of a model follows its layers for nothing
        self._before: PerThread[list[tuple[bool, list[Moment | None]]]] = PerThread(list)

    def hook(self, root: nn.Module) -> list[Any]:
        return [
            root.register_forward_pre_hook(self.enter, with_kwargs=True),
            root.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        time = None if self.read is None else self.read(args, kwargs)
        self._before.mine.append((self.runtime.sampling, [clock.enter(time) for clock in self.clocks]))
        self.runtime.sampling = not torch.is_grad_enabled()
        if self.average is not None:
            self._enter_average(self.average)

    def _enter_average(self, average: Average) -> None:
        if self.runtime.sampling and average.is_shown:
            average.enter()
        elif not self.runtime.sampling and (average.in_use or not average.is_told):
            average.follow(self.layers)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = self._before.mine
        sampling, before = stack.pop() if stack else (False, [None] * len(self.clocks))
        if self.runtime.sampling:
            if self.average is not None and self.average.is_shown:
                self.average.leave()
            self.runtime.sampling = sampling
            for clock, moment in zip(self.clocks, before, strict=True):
                clock.leave(moment)
        elif (
            self.clocks and not torch.compiler.is_compiling()
        ):  # compiled graphs keep their inputs, the time among them
            now = [(clock, clock.now) for clock in self.clocks]
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: _go_back(now))


def _go_back(now: Iterable[tuple[Clock, Moment]]) -> None:
    for clock, moment in now:
        clock.go_back(moment)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those in a model's output, which may be of a library's own class."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
