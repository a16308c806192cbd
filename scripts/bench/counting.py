"""What a pass costs whatever the machine: FLOPs, bytes kept for backward, traffic, peak and launches, by counting.

A launch is an ATen call below autograd and autocast that runs a kernel. Calls that run none do not count: views,
`detach`, `_unsafe_view`, and allocations without a value (`empty` and the like). Traffic is what launches read and
write, in bytes of their tensors: one that is only written over (`copy_`, `fill_`, `out=`) is not read, and of an
expanded one what is really there counts. The numbers are those of plain calls: what a compiler would fuse is not seen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

# Beside views and all that is called `empty`.
SILENT = {"_unsafe_view", "detach", "lift_fresh", "promote_types", "resize_", "set_"}
LARGE = 1 << 14  # elements
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"}  # without reading


def _added_product(total: Any, left: Any, right: Any, **rest: Any) -> int:
    return 2 * math.prod(left) * (right[-1] if len(right) > 1 else 1)


def _product(left: Any, right: Any, **rest: Any) -> int:
    return _added_product(None, left, right)


def _added_outer(total: Any, left: Any, right: Any, **rest: Any) -> int:
    return 2 * left[0] * right[0]


# Of products PyTorch's counter knows neither those added in place, nor those with a vector, nor a sum over a batch.
_ATEN = torch.ops.aten
_MORE: dict[Any, Callable[..., int]] = dict.fromkeys(
    [_ATEN.addmm_, _ATEN.baddbmm_, _ATEN.addbmm, _ATEN.addbmm_, _ATEN.addmv, _ATEN.addmv_], _added_product
)
_MORE |= dict.fromkeys([_ATEN.mv, _ATEN.dot, _ATEN.vdot], _product)
_MORE |= dict.fromkeys([_ATEN.addr, _ATEN.addr_], _added_outer)


@dataclass(frozen=True)
class Launch:
    """One call that runs a kernel.

    Attributes:
        name: with its overload, `addmm.default`.
        largest: elements of its largest output.
        traffic: bytes that it reads and writes.
    """

    name: str
    largest: int
    traffic: int


@dataclass(frozen=True)
class Counts:
    """Of one forward and backward pass.

    Attributes:
        flops: of products and convolutions.
        kept: bytes held for backward, by unique storages, without the input and the parameters.
        keeps_input: whether the input itself is held, too.
        peak: the most bytes that are alive at once of what the pass made: output and gradients are part of it.
        launches: in their order.
    """

    flops: int
    kept: int
    keeps_input: bool
    peak: int
    launches: tuple[Launch, ...]

    @property
    def traffic(self) -> int:
        """Bytes read and written by all launches."""
        return sum(launch.traffic for launch in self.launches)


class Watch(TorchDispatchMode):
    """Records the launches of what runs inside, and the memory that their results take.

    Attributes:
        launches: in their order.
        peak: the most bytes of results that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        given = {key_of(t) for t in _tensors((args, kwargs))}
        new = [t for t in made if key_of(t) not in given]
        self._alive |= {key_of(t): (StorageWeakRef(t.untyped_storage()), _held(t)) for t in new}
        self.peak = max(self.peak, sum(size for _, size in self.alive().values()))
        if runs_kernel(func):
            largest = max((t.numel() for t in made), default=0)
            self.launches.append(Launch(func.__name__, largest, _traffic(func, args, kwargs, made)))
        return result

    def alive(self) -> dict[int, tuple[StorageWeakRef, int]]:
        """Storage -> bytes of results that somebody still holds."""
        self._alive = {key: found for key, found in self._alive.items() if not found[0].expired()}
        return self._alive


class Skipped(TorchDispatchMode):
    """Calls on large tensors give zeros of the right shape, in no time: for what is counted and not used. Inside a
    watch, as the watch must see them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if not runs_kernel(func) or max((t.numel() for t in given), default=0) < LARGE:
            return func(*args, **kwargs)
        if any(each.alias_info is not None for each in func._schema.arguments):  # the result is there
            return kwargs.get("out", args[0])
        there = {"device": torch.device("meta")} if "device" in kwargs else {}
        shapes = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs) | there)
        return tree_map(lambda t: _blank(t, given[0].device) if isinstance(t, Tensor) else t, shapes)


def _blank(like: Tensor, device: torch.device) -> Tensor:
    """Zeros; of what is very large, memory that nobody has touched, which takes no time."""
    made = torch.empty_like(like, device=device)
    return made if made.numel() >= 256 * LARGE else made.zero_()


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def count(
    forward: Callable[[], Tensor], x: Tensor, gradient: Tensor, parameters: Iterable[Tensor], computed: bool = True
) -> Counts:
    """What a pass costs.

    Args:
        forward: of what is counted, on x, under autocast where that is meant. It is called twice, so that what a first
            call settles is not part of the result.
        x: the input, whose gradient is computed.
        gradient: of the output.
        parameters: whatever was there before the pass: parameters, frozen weights, buffers.
        computed: False = what is large is skipped, as its values do not matter.

    Returns:
        The counts. Gradients of x and the parameters are set to None before and after.
    """
    known = list(parameters)

    def clear() -> None:
        for t in (x, *known):
            t.grad = None

    def run() -> None:
        clear()
        forward().backward(gradient)

    values = contextlib.nullcontext() if computed else Skipped()
    with values:
        flops = flops_of(run)
    clear()
    held: dict[int, int] = {}
    with values, Watch() as watch:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _noted(t, held), lambda t: t):
            y = forward()
        # What a function holds by other ways than save_for_backward is kept as well.
        held |= {key: size for key, (_, size) in watch.alive().items() if key != key_of(y)}
        y.backward(gradient)
    clear()
    return Counts(
        flops,
        sum(size for key, size in held.items() if key not in {key_of(t) for t in (x, *known)}),
        key_of(x) in held,
        watch.peak,
        tuple(watch.launches),
    )


def flops_of(run: Callable[[], object]) -> int:
    """FLOPs of products and convolutions in a call."""
    with FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
        run()
    return counter.get_total_flops()


def runs_kernel(func: Any) -> bool:
    """Whether an ATen call is a launch."""
    name = func.__name__.split(".")[0]
    view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
    return not (view or name in SILENT or "empty" in name)


def key_of(t: Tensor) -> int:
    """The same for all tensors of one storage, as long as it is alive."""
    return int(t.untyped_storage()._cdata)


def _noted(t: Tensor, held: dict[int, int]) -> Tensor:
    held[key_of(t)] = _held(t)
    return t


def _held(t: Tensor) -> int:
    return t.untyped_storage().nbytes()


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _traffic(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    name, outputs = func.__name__.split(".")[0], {each.name for each in func._schema.arguments if each.is_out}
    given = list(_tensors((args, {key: value for key, value in kwargs.items() if key not in outputs})))
    unread = set[int]()
    if name in OVERWRITES:
        unread = {0}
    elif name == "convolution_backward":  # reads what the gradients that are asked for need
        of_input, of_weight, _ = args[-1]
        unread = ({2} if not of_input else set()) | ({1} if not of_weight else set())
    return sum(_bytes(t) for i, t in enumerate(given) if i not in unread) + sum(map(_bytes, made))


def _bytes(t: Tensor) -> int:
    """Of its elements, each once."""
    there = math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride or not size)
    return there * t.element_size()
