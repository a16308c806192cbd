"""What is seen at the entrance of a model's own forward: whether it is sampling, and at what time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algos.clock import Clock
from ..archs.spec import Timestep
from ..layers.runtime import Runtime

ReadTime = Callable[[Sequence[Any], Mapping[str, Any]], "Tensor | None"]


def time_reader(root: nn.Module, timestep: Timestep) -> ReadTime:
    """How to find the time [N] of a pass, 0 = nothing but noise and 1 = no noise, in the arguments of its forward.

    Raises:
        ValueError: this class has no such argument.
    """
    names = [*inspect.signature(type(root).forward).parameters][1:]
    name = next((name for name in timestep.arguments if name in names), None)
    if name is None:
        raise ValueError(
            f"{type(root).__name__} is not told the timestep as {' or '.join(timestep.arguments)}, so ranks cannot "
            f"follow it; its arguments are {', '.join(names)}: choose an algorithm other than tlora"
        )
    position = names.index(name)

    def read(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        value = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
        if value is None:
            return None
        time = (torch.as_tensor(value).float() - timestep.noise) / (timestep.clean - timestep.noise)
        time = time.detach().clamp(0, 1)
        # With a time of its own for each frame or token, a sample has that of its noisiest.
        return time.reshape(1) if time.dim() == 0 else time.reshape(time.shape[0], -1).amin(1)

    return read


def watch(root: nn.Module, runtime: Runtime, clocks: Iterable[Clock] = (), read: ReadTime | None = None) -> list[Any]:
    """Hooks on the model itself, below its wrappers, which hosts take off.

    Never inside a layer: reentrant checkpointing runs layers without gradients in training, too. A pass without
    gradients puts back what was before it. The time of one with gradients comes back with its own backward, so that a
    recomputation sees it, also where a host makes several passes (one for each sample, say) before it goes back.
    """
    before: list[tuple[bool, list[Tensor | None]]] = []
    shared = list(clocks)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        before.append((runtime.sampling, [clock.time for clock in shared]))
        runtime.sampling = not torch.is_grad_enabled()
        if read is not None:
            time = read(args, kwargs)
            for clock in shared:
                clock.time = time

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        sampling, times = before.pop() if before else (False, [None] * len(shared))
        if runtime.sampling:
            runtime.sampling = sampling
            _set(shared, times)
        elif shared and not torch.compiler.is_compiling():  # compiled graphs keep their inputs, the time among them
            now = [clock.time for clock in shared]
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: _set(shared, now))

    return [
        root.register_forward_pre_hook(enter, with_kwargs=True),
        root.register_forward_hook(leave, always_call=True),
    ]


def _set(clocks: Sequence[Clock], times: Sequence[Tensor | None]) -> None:
    for clock, time in zip(clocks, times, strict=True):
        clock.time = time


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
