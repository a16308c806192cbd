"""One autograd function over a base layer and its adapter, where the base weight lies open: y = base(x) + s op(x, dW).

Plain autograd makes the base's output, the update and their sum each by itself, twice over, and keeps what it met on
the way. One function adds the update into the base's output in place, and its part of the input's gradient into the
base's; it keeps the little that its backward pass needs. Each form says on top what it computes and what it keeps.

A weight is saved as the parameter that it is, no view and no copy: hosts move it, and bind other memory to it, between
the passes. Tests compare each form with the formula of its algorithm, in float64, with gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry

SMALL = 1e7  # FLOPs of forward and backward that take no longer than the launches of some operations
FEW = 1 << 16  # numbers that a pass goes over in less time than it takes to be launched
_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Call:
    """What a form is chosen by, once for all calls of a kind.

    Attributes:
        shape: of the layer's input, whose first axis is the samples.
        tokens: T, how many output positions it has.
        factored: whether to build no weight change, or to build it; None = the cheaper one.
        sums: whether W + s dW can be one weight: the base's lies open, and the computation has the digits for it.
    """

    shape: torch.Size
    tokens: int
    factored: bool | None = None
    sums: bool = False

    def cheaper_factored(self, costs: tuple[float, float]) -> bool:
        """Whether to take the factored form.

        Args:
            costs: FLOPs of the factored form and of the one that builds the weight change; inf = no such form.
        """
        factored, materialised = costs
        if self.factored is None or math.inf in costs:
            return factored <= materialised
        return self.factored

    def is_small(self, costs: tuple[float, float]) -> bool:
        """Whether the weight change costs so little that a form is chosen by how few operations it has.

        Args:
            costs: as above.
        """
        return self.factored is None and costs[1] <= SMALL


class OverBase(Protocol):
    """A form of one algorithm over an open base layer. Without state: layers share it, copies of them too."""

    def __call__(self, adapter: Any, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
        """base(x) + strength op(x, dW), or what the algorithm has in its place.

        Args:
            adapter: whose values act.
            x: the layer's input.
            weight, bias: of the base layer, as the layer has them.
            strength: multiplier * scale.

        Returns:
            As the base layer's own output, and no view: hosts change it in place.
        """
        ...


class BesideBase(Protocol):
    """The same where the base's output is at hand, and its weight does not lie open."""

    def __call__(self, adapter: Any, x: Tensor, y: Tensor, strength: float) -> Tensor:
        """y + strength op(x, dW).

        Args:
            adapter: whose values act.
            x: the layer's input.
            y: the base layer's output, in the dtype of the computation; it stays as it is.
            strength: multiplier * scale.
        """
        ...


def apply_of(function: Any) -> Callable[..., Any]:
    """`apply` of a torch.autograd.Function, without its handling of functorch's transforms, in which no form is used: a
    fourth of a call's time."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply
    return apply


class Switch:
    """Whether forms are in use at all."""

    on = True


@contextmanager
def unfused() -> Iterator[None]:
    """Layers compute in plain autograd meanwhile: for second derivatives, and to compare."""
    before, Switch.on = Switch.on, False
    try:
        yield
    finally:
        Switch.on = before


def refuse_twice() -> None:
    """At the beginning of a backward pass: it has no backward of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "an adapted layer's fused form has no second derivatives (create_graph=True): run the forward pass under "
            "networks.api.unfused()"
        )


def is_open(geometry: Geometry) -> bool:
    """Whether forms are made for such a layer: a Linear, or a convolution without groups that pads with zeros, alike on
    both sides."""
    alike = all(before == after for before, after in geometry.pads)
    return geometry.groups == 1 and geometry.padding_mode == "zeros" and alike


# -- the base's part, of a Linear


def flat(x: Tensor) -> Tensor:
    """[.., F] as [T, F]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def unflat(y: Tensor, like: Sequence[int]) -> Tensor:
    """[T, F] as [.., F] of the axes of another shape; for autograd no view of it, which could not be changed in place.
    Only where there is no graph."""
    return y if len(like) == 2 else y.view(*like[:-1], y.shape[1]).data


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def met(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's input and its base weight in the dtype in which they meet: under autocast the copies, if any, which the
    base's own forward would make and keep."""
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return x, weight
    return cast(x, dtype), cast(weight, dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in where x is; None = it is off."""
    kind = device_type(x)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def is_wide(dtype: torch.dtype) -> bool:
    """Whether a weight of the dtype has digits for a small change: W + s dW then is as good as the two apart."""
    return dtype.itemsize >= 4


_TYPES: dict[torch.device, str] = {}


def device_type(x: Tensor) -> str:
    """`x.device.type`, which makes a new text each time and takes as long as a small product."""
    device = x.device
    if device not in _TYPES:
        _TYPES[device] = device.type
    return _TYPES[device]


class without_autocast:
    """Autocast is off meanwhile where x is. `torch.autocast` sees to threads and caches of its own besides, and takes
    four times as long."""

    def __init__(self, x: Tensor) -> None:
        self.kind = device_type(x)

    def __enter__(self) -> None:
        self.was = torch.is_autocast_enabled(self.kind)
        if self.was:
            torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *error: object) -> None:
        if self.was:
            torch.set_autocast_enabled(self.kind, True)


def times_(gradient: Any, factor: float, dtype: torch.dtype | None = None) -> Any:
    """A gradient, or None, times a factor: in place, or else in another dtype."""
    if gradient is None or factor == 1.0:
        return gradient
    return cast(gradient, dtype or gradient.dtype).mul_(factor)


# -- the base's part, of a convolution


def convolved(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's convolution with any weight [*, *, *kernel]."""
    g = geometry
    return _CONVS[len(g.kernel)](x, weight, bias, g.stride, tuple(a for a, _ in g.pads), g.dilation)


def convolved_back(
    geometry: Geometry, gradient: Tensor, x: Tensor | Sequence[int], weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Any, Any]:
    """Gradients of the input and of the weight of `convolved`, None for one that is not wanted.

    Args:
        geometry: of the layer.
        gradient: of the output.
        x: the input; its shape, where the weight's gradient is not wanted.
        weight: [*, *, *kernel].
        wanted: of the input, of the weight.
    """
    g, zeros = geometry, [0] * len(geometry.kernel)
    given = x if isinstance(x, Tensor) else gradient.as_strided(x, [0] * len(x))  # a shape is all that is asked of it
    both = torch.ops.aten.convolution_backward.default(
        gradient, given, weight, None, g.stride, [a for a, _ in g.pads], g.dilation, False, zeros, 1, [*wanted, False]
    )
    return both[0], both[1]


# -- of either


def rows(t: Tensor, geometry: Geometry) -> Tensor:
    """Inputs, outputs and their gradients in the shape in which forms compute: those of a Linear as rows [T, F], images
    as they are."""
    return t if geometry.kernel else flat(t)


def from_rows(t: Any, geometry: Geometry, shape: Sequence[int]) -> Any:
    """The inverse, for an input or output with the axes of this shape; None stays None."""
    return t if geometry.kernel or t is None else unflat(t, shape)


def base_of(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """base(x), no view."""
    if geometry.kernel:
        return convolved(geometry, x, weight, bias)
    return unflat(F.linear(flat(x), weight, bias), x.shape)


def base_back(geometry: Geometry, gradient: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of the input, whose shape is all that is asked of it: PyTorch's own convolution would keep it."""
    if geometry.kernel:
        found: Tensor = convolved_back(geometry, gradient, shape, weight, (True, False))[0]
        return found
    return unflat(torch.mm(flat(gradient), weight), shape)


def pointwise(h: Tensor, matrix: Tensor) -> Tensor:
    """A 1x1 convolution with a matrix [O, R, 1...]."""
    return _CONVS[h.dim() - 2](h, matrix)


def add_pointwise_(y: Tensor, h: Tensor, matrix: Tensor, scale: float = 1.0) -> None:
    """Add a 1x1 convolution with a matrix [O, R, 1...] to an output, in place."""
    if y.is_contiguous() and h.is_contiguous():  # the flat images of others would be copies
        y.flatten(2).baddbmm_(matrix.flatten(1).expand(len(y), -1, -1), h.flatten(2), alpha=scale)
    else:
        y.add_(pointwise(h, matrix), alpha=scale)


def pointwise_back(gradient: Tensor, h: Tensor, matrix: Tensor, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
    """Gradients of h and of the matrix, at scale 1, None for one that is not wanted."""
    ones, zeros = [1] * (h.dim() - 2), [0] * (h.dim() - 2)
    both = torch.ops.aten.convolution_backward.default(
        gradient, h, matrix, None, ones, zeros, ones, False, zeros, 1, [*wanted, False]
    )
    return both[0], both[1]
