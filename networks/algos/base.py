"""The contract of an additive algorithm: a weight change dW [O, I, *kernel] made of a few small factors.

An algorithm knows shapes and formulas only. Scale (alpha), multiplier, dropout probabilities and dtype policy live in
`layers`; saved names in `files`. `delta` is the definition; `apply_delta` must equal the layer's operation with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..tensors.geometry import Geometry, cast_to_input
from ..tensors.low_rank import Gate


@dataclass(frozen=True)
class Layout:
    """What an adapter would consist of, before any tensor exists.

    Attributes:
        shapes: parameter name -> shape, `scalar` (0-d) included.
        rank: the rank that alpha is divided by; None if the form has none (its scale is then 1).
        rank_axis: whether there is a rank activation, on which dropouts can act.
    """

    shapes: dict[str, tuple[int, ...]]
    rank: int | None
    rank_axis: bool

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


class Adapter(nn.Module):
    """Base of all additive algorithms. Parameters are those of `layout`, in fp32."""

    algo: ClassVar[str]
    options: ClassVar[frozenset[str]]  # names of the keyword options that `layout` takes
    plus: ClassVar[frozenset[str]]  # parameters which LoRA+ (2402.12354) trains faster
    keys: ClassVar[dict[str, str]]  # parameter -> suffix in a file
    required: ClassVar[tuple[frozenset[str], ...]]  # one of these sets of suffixes marks the algorithm
    fold: ClassVar[tuple[str, ...]]  # the first of these that exists takes up the learnt scalar at save

    scalar: nn.Parameter | None

    def __init__(self, geometry: Geometry, dim: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.geometry, self.dim, self.chosen = geometry, dim, dict(options or {})
        self.record = self.layout(geometry, dim, **self.chosen)
        self.register_parameter("scalar", None)
        for name, shape in self.record.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        with torch.no_grad():
            self.reset_parameters()

    # -- the record

    @classmethod
    def layout(cls, geometry: Geometry, dim: int, *args: Any, **options: Any) -> Layout:
        """Shapes for a layer, a dim and this algorithm's options."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Start values; dW is 0, or its scalar is."""
        raise NotImplementedError

    # -- the mathematics

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        """dW [O, I, *kernel] without scale and scalar, differentiable; the mask weighs its rank indices."""
        raise NotImplementedError

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        """The layer's operation with dW, in factored form; strength and dropouts through the gate.

        A convolution's input always comes with a batch axis.
        """
        raise NotImplementedError

    def flops(self, tokens: int) -> tuple[float, float]:
        """Cost of (factored, materialised) forward + backward for T tokens, by the closed forms; inf = no such form."""
        raise NotImplementedError

    def norm(self) -> Tensor:
        """Frobenius norm of dW, 0-d, without scale and scalar."""
        return torch.linalg.vector_norm(self.delta())

    # -- shared by all

    def factors(self, x: Tensor) -> dict[str, Tensor]:
        """All parameters, in the dtype in which they meet x."""
        return {name: cast_to_input(p, x) for name, p in self.named_parameters()}

    def rescale_(self, ratio: float | Tensor) -> None:
        """Multiply dW by `ratio`, in place and evenly over its factors."""
        factors = [p for name, p in self.named_parameters() if name != "scalar"]
        with torch.no_grad():
            for p in factors:
                p.mul_(ratio ** (1 / len(factors)))

    # -- files

    @classmethod
    def recognises(cls, suffixes: set[str]) -> bool:
        return any(marks <= suffixes for marks in cls.required)

    def pack(self) -> dict[str, Tensor]:
        """Saved suffix -> tensor. The scalar goes into one factor: no reader knows it."""
        tensors = {name: p.detach() for name, p in self.named_parameters() if name != "scalar"}
        if self.scalar is not None:
            name = next(name for name in self.fold if name in tensors)
            tensors[name] = tensors[name] * self.scalar.detach()
        return {self.keys[name]: tensor for name, tensor in tensors.items()}

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        """(dim, options) under which `layout` gives the shapes of these saved tensors.

        Raises:
            ValueError: they do not fit the layer.
        """
        raise NotImplementedError

    def fits(self, tensors: Mapping[str, Tensor]) -> None:
        """Check saved tensors against this adapter. 1x1 convolutions and Linears may stand for each other.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape.
        """
        own = self._by_suffix()
        if own.keys() != tensors.keys():
            raise ValueError(f"the file has {', '.join(sorted(tensors))}; this network wants {', '.join(sorted(own))}")
        for suffix, p in own.items():
            if not tensors[suffix].is_floating_point():
                raise ValueError(f"{suffix} is of type {tensors[suffix].dtype}, not floating point")
            if _squeezed(tensors[suffix].shape) != _squeezed(p.shape):
                raise ValueError(f"{suffix} is {tuple(tensors[suffix].shape)}, this network wants {tuple(p.shape)}")

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved tensors.

        Raises:
            ValueError: they do not fit; nothing was changed.
        """
        self.fits(tensors)
        with torch.no_grad():
            for suffix, p in self._by_suffix().items():
                p.copy_(tensors[suffix].reshape(p.shape))
            if self.scalar is not None:
                self.scalar.fill_(1.0)

    def _by_suffix(self) -> dict[str, nn.Parameter]:
        return {self.keys[name]: p for name, p in self.named_parameters() if name != "scalar"}


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Shape without trailing axes of length 1 after the second."""
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def kaiming_(p: Tensor) -> None:
    """Uniform within 1 / sqrt(fan_in), the start of torch's own layers."""
    nn.init.kaiming_uniform_(p, a=math.sqrt(5))
