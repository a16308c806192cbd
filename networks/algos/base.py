"""The contract of an algorithm. Most are additive: a weight change dW [O, I, *kernel] made of a few small
factors; `reweight` has the others.

An algorithm knows shapes and formulas only. Scale (alpha), multiplier, dropout probabilities and dtype policy live in
`layers`; saved names in `files`. `delta` is the definition; `apply_delta` must equal the layer's operation with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ..tensors.geometry import Geometry, Pieces, cast_to_input
from ..tensors.low_rank import Gate
from ..tensors.products import OfWeight, Products
from .clock import Clock
from .saved import Layout, SavedForm

CHUNK = 1 << 22  # elements of dW that are built at a time where only its norms are wanted


class Adapter(SavedForm):
    """Base of all additive algorithms. Parameters are those of `layout`, in fp32."""

    family: ClassVar[str] = Geometry.family  # of the layers that it is for
    options: ClassVar[frozenset[str]]  # names of the keyword options that `layout` takes
    # Arguments which the layer around an adapter obeys where the mathematics allows it; split_qkv: adapters of the
    # parts of a layer, stacked, are one of the same kind (`stack`).
    features: ClassVar[frozenset[str]] = frozenset(
        {"use_dora", "wd_on_output", "ggpo_sigma", "ggpo_beta", "bypass_mode", "init", "init_seed"}
    )
    # Ways to start (`init`) which it has not, and why.
    no_starts: ClassVar[Mapping[str, str]] = dict.fromkeys(("orthogonal", "pissa"), "it has start values of its own")
    frozen: ClassVar[frozenset[str]] = frozenset()  # parameters without gradient and optimizer state
    unsaved: ClassVar[frozenset[str]] = frozenset({"use_scalar"})  # options that do not show in a file
    alpha_option: ClassVar[str] = ""  # the option which a file holds as alpha, where alpha is no strength
    keeps_start: ClassVar[bool] = False  # beside values that come from the base weight, to subtract what they amount to
    stepwise: ClassVar[bool] = False  # a training step uses other values than the rest: `begin` and `end`
    timed: ClassVar[bool] = False  # it acts by the time of the denoising pass: its attribute `clock`
    relative: ClassVar[bool] = False  # dW is a function of the base weight, which its norm needs

    clock: Clock | None = None  # of the timed ones: when it is, if anybody knows
    number: Tensor | None = None  # of the stepwise ones: 0-d, drawn for the step alike in all processes; None = unknown
    refactor_error: float | None = None  # relative, of the tensors of the last `pack`, where they are not the live ones
    side = ""  # of the multiplicative ones: "output" or "input"

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

    @property
    def wants_base(self) -> bool:
        """Whether its start values follow from the base weight, and nothing has set others yet."""
        return False

    def see_base(self, weight: Tensor) -> None:
        """Take the start values from W [O, I, *kernel], fp32 or wider, on any device; without gradient.

        Raises:
            ValueError: it cannot be the weight that the parameters are for.
        """

    @property
    def needs_base(self) -> bool:
        """Whether it wants the base weight and has no other start values."""
        return False

    def await_base_(self, scale: float) -> None:
        """Start as PiSSA (2404.02948): from values that scale * dW would be the principal part of the base weight, if
        it did not start at 0."""
        raise NotImplementedError

    def settle_(self) -> None:
        """Its values were set by other means: nothing is wanted of the base weight any more."""

    def renew_state(self, state: dict[str, Any], prefix: str) -> None:
        """Say a live state of an earlier version, under names that begin so, in today's terms, in place."""

    @classmethod
    def splits(cls, options: Mapping[str, Any]) -> bool:
        """Whether adapters of the parts of a layer, each with these options, can stand for one on the whole."""
        return "split_qkv" in cls.features

    @classmethod
    def no_start(cls, init: str, options: Mapping[str, Any]) -> str:
        """Why this algorithm, with these options, has no such start values; "" if it has."""
        return cls.no_starts.get(init, "")

    def orthogonal_(self) -> None:
        """Every random factor of `reset_parameters` with orthonormal rows instead, or columns where they are fewer."""
        for p in self.parameters():
            if p.dim() > 1 and not p.is_meta and bool(p.any()):
                nn.init.orthogonal_(p)

    # -- the mathematics

    def on(self, base: Products) -> Adapter:
        """This adapter on a base weight, for algorithms whose dW depends on it: before each use of the mathematics.

        With pieces, it is the weight of their rows alone.
        """
        return self

    def weight_change(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        """W' - W for a base weight W [O, I, *kernel], in its dtype and on its device."""
        return (self.on(OfWeight(weight)).delta() * strength).to(device=weight.device, dtype=weight.dtype)

    @property
    def mask_size(self) -> int:
        """How many rank indices a rank mask weighs."""
        return self.dim

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

    def rescale_(self, ratio: float | Tensor) -> None:
        """Multiply dW by `ratio`, in place and evenly over its factors."""
        factors = [p for name, p in self.named_parameters() if name != "scalar" and name not in self.frozen]
        with torch.no_grad():
            for p in factors:
                p.mul_(ratio ** (1 / len(factors)))

    def shrink_(self, ratio: float) -> None:
        """Make the change of the layer `ratio` of its size, or about that: 0 at 0, and without a jump in between."""
        self.rescale_(ratio)


def _chunks(pieces: Pieces, step: int) -> Iterator[tuple[int, int]]:
    for start, stop in pieces:
        for first in range(start, stop, step):
            yield first, min(stop, first + step)


def kaiming_(p: Tensor) -> None:
    """Uniform within 1 / sqrt(fan_in), the start of torch's own layers."""
    nn.init.kaiming_uniform_(p, a=math.sqrt(5))
