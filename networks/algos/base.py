"""The contract of an algorithm. Most are additive: a weight change dW [O, I, *kernel] made of a few small
factors; `reweight` has the others.

An algorithm knows shapes and formulas only. Scale (alpha), multiplier, dropout probabilities and dtype policy live in
`layers`; saved names in `files`. `delta` is the definition; `apply_delta` must equal the layer's operation with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ..tensors.geometry import Geometry, Pieces, cast_to_input
from ..tensors.low_rank import Gate

CHUNK = 1 << 22  # elements of dW that are built at a time where only its norms are wanted


@dataclass(frozen=True)
class Layout:
    """What an adapter would consist of, before any tensor exists.

    Attributes:
        shapes: parameter name -> shape, `scalar` (0-d) included.
        rank: the rank that alpha is divided by; None if the form has none (its scale is then 1).
        rank_axis: whether there is a rank activation, on which dropouts can act.
        stacked: how many adapters of that rank a file holds as one.
        frozen: how many of the values are never trained.
    """

    shapes: dict[str, tuple[int, ...]]
    rank: int | None
    rank_axis: bool
    stacked: int = 1
    frozen: int = 0

    @property
    def saved_rank(self) -> int | None:
        """The rank that readers of the file see, and divide its alpha by."""
        return None if self.rank is None else self.rank * self.stacked

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Resized:
    """Saved tensors with fewer ranks.

    Attributes:
        ranks: before and after; with the nearest update both keep their scale, with the first ranks their alpha.
        lost, whole: squared norms of what is left out of the nearest update, and of the whole.
    """

    tensors: dict[str, Tensor]
    ranks: tuple[int, int]
    lost: float = 0.0
    whole: float = 0.0


class Adapter(nn.Module):
    """Base of all additive algorithms. Parameters are those of `layout`, in fp32."""

    algo: ClassVar[str]
    options: ClassVar[frozenset[str]]  # names of the keyword options that `layout` takes
    plus: ClassVar[frozenset[str]]  # parameters which LoRA+ (2402.12354) trains faster
    keys: ClassVar[dict[str, str]]  # parameter -> suffix in a file
    required: ClassVar[tuple[frozenset[str], ...]]  # one of these sets of suffixes marks the algorithm
    fold: ClassVar[tuple[str, ...]]  # the first of these that exists takes up the learnt scalar at save
    # Arguments which the layer around an adapter obeys where the mathematics allows it; split_qkv: adapters of the
    # parts of a layer, stacked, are one of the same kind (`stack`).
    features: ClassVar[frozenset[str]] = frozenset(
        {"use_dora", "wd_on_output", "ggpo_sigma", "ggpo_beta", "bypass_mode"}
    )
    frozen: ClassVar[frozenset[str]] = frozenset()  # parameters without gradient and optimizer state
    unsaved: ClassVar[frozenset[str]] = frozenset({"use_scalar"})  # options that do not show in a file
    saved_as: ClassVar[str] = ""  # the algorithm whose files these are, if it is not this one
    alpha_option: ClassVar[str] = ""  # the option which a file holds as alpha, where alpha is no strength
    nested: ClassVar[bool] = False  # the first ranks of a file are a good one, too
    stepwise: ClassVar[bool] = False  # a training step uses other values than the rest: `begin` and `end`

    side = ""  # of the multiplicative ones: "output" or "input"
    plus_unit = 1.0  # what a plus parameter of this adapter counts for; dW is linear in each of them
    scalar: nn.Parameter | None

    def __init__(self, geometry: Geometry, dim: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.geometry, self.dim, self.chosen = geometry, dim, dict(options or {})
        self.record = self.layout(geometry, dim, **self.chosen)
        self.register_parameter("scalar", None)
        for name, shape in self.record.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=name not in self.frozen))
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

    def bias_change(self) -> Tensor | None:
        """[O], what is added to the base's bias at strength 1; None = nothing ever."""
        return None

    def rows(self, start: int, stop: int) -> Tensor:
        """dW[start:stop]."""
        return self.delta()[start:stop]

    def apply_rows(self, x: Tensor, gate: Gate, pieces: Pieces) -> Tensor:
        """`apply_delta` of a Linear for some of its output rows only."""
        weight = torch.cat([self.rows(*piece) for piece in pieces])
        return gate.output(self.geometry.op(x, cast_to_input(weight, x)))

    def flops(self, tokens: int) -> tuple[float, float]:
        """Cost of (factored, materialised) forward + backward for T tokens, by the closed forms; inf = no such form."""
        raise NotImplementedError

    def norm(self) -> Tensor:
        """Frobenius norm of dW, 0-d, without scale and scalar."""
        return torch.linalg.vector_norm(self.delta())

    def norm_sq(
        self, weight: Tensor, strength: float | Tensor, on_output: bool, pieces: Pieces | None = None
    ) -> Tensor:
        """||W + c dW||^2 of every output row [O], or of every input column [I], without the whole sum at once.

        Args:
            weight: W, or the rows of W that `pieces` lists.
        """
        g, sums, at = self.geometry, [], 0
        for start, stop in _chunks(pieces or ((0, g.out_features),), max(1, CHUNK // g.columns)):
            whole = weight[at : at + stop - start] + strength * self.rows(start, stop)
            at += stop - start
            squares = whole.reshape(whole.shape[0], g.in_features, -1).square().sum(-1)
            sums.append(squares.sum(1) if on_output else squares.sum(0))
        return torch.cat(sums) if on_output else torch.stack(sums).sum(0)

    def gradient_norm_sq(self) -> Tensor:
        """Squared row norms [O] of the change of dW along the gradients of its factors; without the scalar."""
        own = {name: p for name, p in self.named_parameters() if name != "scalar"}
        values = {name: p.detach() for name, p in own.items()}
        tangents = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.items()}
        change = jvp(lambda given: functional_call(self, given, ()), (values,), (tangents,))[1]
        return change.flatten(1).square().sum(1)

    def forward(self) -> Tensor:
        """dW, for torch's functional tools."""
        return self.delta()

    # -- a training step

    def begin(self, x: Tensor) -> None:
        """A training pass begins: what is random about `values` until `end` is drawn here, by tensor operations."""

    def end(self) -> None:
        """It is over: `values` is what a file would hold."""

    # -- shared by all

    def values(self) -> dict[str, Tensor]:
        """All parameters as they act now, differentiable where they are trained."""
        return dict(self.named_parameters())

    def factors(self, x: Tensor) -> dict[str, Tensor]:
        """The same in the dtype in which they meet x."""
        return {name: cast_to_input(p, x) for name, p in self.values().items()}

    @property
    def plus_gain(self) -> float:
        """What `delta` lacks because of `plus_unit`."""
        return float(self.plus_unit ** sum(name in self.plus for name in self.record.shapes))

    def fold_plus_(self, unit: float) -> None:
        """LoRA+ in the parametrisation: from now on a plus parameter holds its value / unit, so that a step of an
        optimizer moves it by `unit` times as much. The layer's strength makes up for it."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name in self.plus:
                    p.mul_(self.plus_unit / unit)
        self.plus_unit = unit

    def rescale_(self, ratio: float | Tensor) -> None:
        """Multiply dW by `ratio`, in place and evenly over its factors."""
        factors = [p for name, p in self.named_parameters() if name != "scalar" and name not in self.frozen]
        with torch.no_grad():
            for p in factors:
                p.mul_(ratio ** (1 / len(factors)))

    def shrink_(self, ratio: float) -> None:
        """Make the change of the layer `ratio` of its size, or about that."""
        self.rescale_(ratio)

    # -- files

    @classmethod
    def form(cls) -> str:
        """The algorithm whose saved keys it has."""
        return cls.saved_as or cls.algo

    @classmethod
    def recognises(cls, suffixes: set[str]) -> bool:
        return any(marks <= suffixes for marks in cls.required)

    @classmethod
    def accepts(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors under its suffixes are its own, where several algorithms share the names."""
        return True

    def pack(self) -> dict[str, Tensor]:
        """Saved suffix -> tensor. The scalar goes into one factor: no reader knows it."""
        tensors = {name: p.detach() for name, p in self.named_parameters() if name != "scalar"}
        if self.plus_unit != 1:
            tensors = {name: t * self.plus_unit if name in self.plus else t for name, t in tensors.items()}
        if self.scalar is not None:
            name = next(name for name in self.fold if name in tensors)
            tensors[name] = tensors[name] * self.scalar.detach()
        return {self.keys[name]: tensor for name, tensor in tensors.items()}

    @classmethod
    def stack(cls, packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Saved tensors of the layer whose parts, from the first output row down, have these, with split_qkv."""
        raise NotImplementedError

    @classmethod
    def unstack(cls, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """The inverse of `stack` for parts of these output sizes.

        Raises:
            ValueError: the tensors are no such stack.
        """
        raise NotImplementedError

    @classmethod
    def first_ranks(cls, tensors: Mapping[str, Tensor], dim: int) -> Resized:
        """The first `dim` ranks (of each part, in a stack): what DyLoRA trains to stand alone.

        Raises:
            ValueError: no ranks of this form stand alone.
        """
        raise ValueError(f"{cls.algo} has no ranks that could stand alone")

    @classmethod
    def nearest(cls, tensors: Mapping[str, Tensor], dim: int) -> Resized:
        """The nearest update of rank `dim`.

        Raises:
            ValueError: it has not this algorithm's form.
        """
        raise ValueError(f"the nearest update of a lower rank is no {cls.algo}")

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
            unit, self.plus_unit = self.plus_unit, 1.0
            self.fold_plus_(unit)
            if self.scalar is not None:
                self.scalar.fill_(1.0)

    def _by_suffix(self) -> dict[str, nn.Parameter]:
        return {self.keys[name]: p for name, p in self.named_parameters() if name != "scalar"}


def _chunks(pieces: Pieces, step: int) -> Iterator[tuple[int, int]]:
    for start, stop in pieces:
        for first in range(start, stop, step):
            yield first, min(stop, first + step)


def unstack_diagonal(name: str, stacked: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The blocks [size, R, ...] of a block-diagonal [sum of sizes, n R, ...].

    Raises:
        ValueError: it has another shape, or something outside its blocks.
    """
    n = len(sizes)
    if stacked.shape[0] != sum(sizes) or stacked.shape[1] % n:
        raise ValueError(f"{name} {tuple(stacked.shape)} is no stack of {n} parts with {tuple(sizes)} rows")
    columns = stacked.shape[1] // n
    blocks = [rows[:, i * columns : (i + 1) * columns] for i, rows in enumerate(stacked.split(list(sizes)))]
    if sum(int(block.count_nonzero()) for block in blocks) != int(stacked.count_nonzero()):
        raise ValueError(f"{name} mixes the parts of its layer: it was trained without split_qkv")
    return blocks


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Shape without trailing axes of length 1 after the second."""
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def kaiming_(p: Tensor) -> None:
    """Uniform within 1 / sqrt(fan_in), the start of torch's own layers."""
    nn.init.kaiming_uniform_(p, a=math.sqrt(5))
