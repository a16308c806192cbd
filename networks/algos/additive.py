"""The contract of an additive algorithm: it has a weight change dW [O, I, *kernel] of its own.

    W' = W + s dW        y' = y + s op(x, dW)

`delta` is the definition; `apply_delta` is op(x, dW) in factored form, which builds no dW. Which of the two is cheaper
depends on the layer and on the tokens of a pass; both are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from ..tensors.fused import Call, OverBase, without_autocast
from ..tensors.fused_whole import whole_over_base
from ..tensors.geometry import Geometry, RowRanges, cast_to_input
from ..tensors.low_rank import Gate, PassGate, square_sums
from ..tensors.products import AsItLies, OfWeight, Products
from .base import Adapter, Base
from .parts import Parts

T = TypeVar("T", Tensor, "float | Tensor")

CHUNK = 1 << 22  # elements of dW that are built at a time where only its norms are wanted


class Additive(Adapter):
    """Base of all additive algorithms."""

    @classmethod
    def of_parts(cls, geometry: Geometry, dim: int, sizes: Sequence[int], options: Mapping[str, Any]) -> AdditiveParts:
        return AdditiveParts(cls, geometry, dim, sizes, options)

    # -- the mathematics

    def on(self, base: Products) -> Additive:
        """This adapter on a base weight, for algorithms whose dW depends on it: before each use of the mathematics.

        Args:
            base: products with W [O, I, *kernel], or with some of its rows, where no others are asked for.
        """
        return self

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        """dW [O, I, *kernel] without scale and scalar, differentiable. Every algorithm defines it.

        Args:
            rank_mask_R: weighs its rank indices, `mask_size` of them.
        """
        raise NotImplementedError

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        """The layer's operation with dW, in factored form. Every algorithm defines it.

        Args:
            x: [.., I] of a Linear; that of a convolution always comes with a batch axis.
            gate: strength and dropouts.

        Returns:
            [.., O] or [B, O, *space], without bias.
        """
        raise NotImplementedError

    def flops(self, tokens: int) -> tuple[float, float]:
        """Cost of (factored, materialised) forward + backward for T tokens, by the closed forms; inf = no such form.
        Every algorithm defines it."""
        raise NotImplementedError

    @property
    def mask_size(self) -> int:
        """How many rank indices a rank mask weighs."""
        return self.dim

    def rows(self, start: int, stop: int) -> Tensor:
        """dW[start:stop]."""
        return self.delta()[start:stop]

    def add_delta_(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        """weight += strength * dW, in place; by the factors, where that builds no dW."""
        return weight.add_((self.delta() * strength).to(weight))

    def apply_rows(self, x: Tensor, gate: Gate, row_ranges: RowRanges) -> Tensor:
        """`apply_delta` of a Linear for some of its output rows only, in their order."""
        weight = torch.cat([self.rows(*piece) for piece in row_ranges])
        return gate.output(self.geometry.op(x, cast_to_input(weight, x)))

    def norm(self) -> Tensor:
        """Frobenius norm of dW, 0-d, without scale and scalar."""
        return torch.linalg.vector_norm(self.delta())

    def norm_sq(
        self, weight: Tensor, strength: float | Tensor, on_output: bool, row_ranges: RowRanges | None = None
    ) -> Tensor:
        """||W + s dW||^2 of every output row [O], or of every input column [I], without the whole sum at once.

        Args:
            weight: W [O, I, *kernel], or the rows of W that `row_ranges` lists.
            strength: s.
            on_output: of rows; False = of columns, over these rows.
            row_ranges: ranges of output rows, in their order; None = all.
        """
        g, sums, at = self.geometry, [], 0
        if row_ranges is None and weight.numel() <= CHUNK:
            whole = weight + strength * self.delta()
            return square_sums(whole.flatten(1) if on_output else whole.transpose(0, 1).flatten(1), 1)
        for start, stop in _chunks(row_ranges or ((0, g.out_features),), max(1, CHUNK // g.columns)):
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

    def rescale_(self, ratio: float | Tensor) -> None:
        """Multiply dW by `ratio`, in place and evenly over its factors, and the change of the bias."""
        left_out = {"scalar", self.spec.bias_name, *self.spec.frozen}
        factors = [p for name, p in self.named_parameters() if name not in left_out]
        with torch.no_grad():
            for p in factors:
                p.mul_(ratio ** (1 / len(factors)))
            if self.bias_parameter is not None:
                self.bias_parameter.mul_(ratio)

    # -- what a layer asks of it

    def strength(self, multiplier: float | Tensor, scale: float) -> float | Tensor:
        strength, scalar = multiplier * (scale * self.plus_gain), self._parameters["scalar"]
        return strength if scalar is None else strength * scalar.to(torch.promote_types(scalar.dtype, torch.float32))

    def weight_change(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        return (self.on(OfWeight(weight)).delta() * strength).to(device=weight.device, dtype=weight.dtype)

    def add_change_(self, weight: Tensor, multiplier: float, strength: float | Tensor) -> Tensor:
        return self.on(OfWeight(weight)).add_delta_(weight, multiplier * strength)

    def output_change(self, x: Tensor, y: Tensor, base: Base, gate: PassGate, factored: bool | None = None) -> Tensor:
        return self.on(base).update(x, gate, base.row_ranges, factored)

    def update(
        self, x: Tensor, gate: PassGate, row_ranges: RowRanges | None = None, factored: bool | None = None
    ) -> Tensor:
        """op(x, dW), through the gate, in the cheaper of its exact forms.

        Args:
            x: the layer's input; a convolution's may lack the batch axis.
            gate: strength and dropouts.
            row_ranges: the output rows that are wanted; None = all.
            factored: which form to take, where there are both; None = the cheaper one.
        """
        geometry = self.geometry
        if geometry.is_conv and x.dim() == len(geometry.kernel) + 1:
            return self.update(x[None], gate, row_ranges, factored)[0]
        if row_ranges is not None:
            return self.apply_rows(x, gate, row_ranges)
        # Elementwise dropout needs the rank activation, which only the factored form has.
        if self._cheaper_factored(geometry.tokens(x), factored) or (gate.elementwise and self.laid_out.rank_axis):
            return self.apply_delta(x, gate)
        delta = self.delta(gate.mask(self.mask_size, x) if self.laid_out.rank_axis else None)
        if not torch.is_autocast_enabled(x.device.type):
            delta = delta.to(x.dtype)
        return gate.output(geometry.op(x, delta))

    def _cheaper_factored(self, tokens: int, wanted: bool | None) -> bool:
        factored, materialised = self.flops(tokens)
        if wanted is None or math.inf in (factored, materialised):
            return factored <= materialised
        return wanted

    def over_base(self, call: Call) -> OverBase | None:
        """The whole weight change, where that is the cheaper form, or the layer is so small that few operations count;
        most algorithms have a form of their own for the others."""
        costs = self.flops(call.tokens)
        return None if call.cheaper_factored(costs) and not call.is_small(costs) else whole_form

    def change_norm(self, weight: Callable[[], Tensor], strength: float | Tensor) -> Tensor:
        return self.norm() * (strength.abs() if isinstance(strength, Tensor) else abs(strength))

    def shrink_(self, ratio: float) -> None:
        self.rescale_(ratio)


def whole_form(adapter: Additive, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
    with without_autocast(x):  # a small change of few digits
        change = adapter.on(AsItLies(weight)).delta()
    return whole_over_base(adapter.geometry, x, weight, bias, change, strength)


def _chunks(row_ranges: RowRanges, step: int) -> Iterator[tuple[int, int]]:
    for start, stop in row_ranges:
        for first in range(start, stop, step):
            yield first, min(stop, first + step)


class AdditiveParts(Parts, Additive):
    """Adapters of one additive algorithm on the parts of a Linear."""

    def _each(self) -> Sequence[Additive]:
        return cast("list[Additive]", list(self.parts))

    @property
    def mask_size(self) -> int:
        return self._each()[0].mask_size

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        return torch.cat([_scaled(part, part.delta(rank_mask_R)) for part in self._each()])

    def add_delta_(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        first = 0
        for part, size in zip(self._each(), self.sizes, strict=True):
            part.add_delta_(weight[first : first + size], _scaled(part, strength))
            first += size
        return weight

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        return torch.cat([part.apply_delta(x, _ScaledGate(gate, part.scalar)) for part in self._each()], -1)

    def bias_change(self) -> Tensor | None:
        changes = [part.bias_change() for part in self._each()]
        given = [change for change in changes if change is not None]
        return torch.cat(given) if given else None

    def apply_rows(self, x: Tensor, gate: Gate, row_ranges: RowRanges) -> Tensor:
        """By parts where the ranges are whole ones."""
        chosen = self._starting(row_ranges)
        if chosen is None:
            return super().apply_rows(x, gate, row_ranges)
        parts = [self._each()[i] for i in chosen]
        return torch.cat([part.apply_delta(x, _ScaledGate(gate, part.scalar)) for part in parts], -1)

    def flops(self, tokens: int) -> tuple[float, float]:
        costs = [part.flops(tokens) for part in self._each()]
        return sum(a for a, _ in costs), sum(b for _, b in costs)

    def norm(self) -> Tensor:
        return torch.stack([_scaled(part, part.norm()) for part in self._each()]).norm()

    def gradient_norm_sq(self) -> Tensor:
        return torch.cat([part.gradient_norm_sq() for part in self._each()])

    def rescale_(self, ratio: float | Tensor) -> None:
        for part in self._each():
            part.rescale_(ratio)


def add_product_(weight: Tensor, left_OR: Tensor, right_RIK: Tensor) -> Tensor:
    """weight += left @ right, in place, in its dtype and on its device."""
    left, right = left_OR.to(weight), right_RIK.flatten(1).to(weight)
    if weight.dim() == 2:
        return weight.addmm_(left, right)
    if weight.is_contiguous():  # otherwise flat weights are copies
        weight.view(len(weight), -1).addmm_(left, right)
        return weight
    return weight.add_((left @ right).reshape(weight.shape))


def _scaled(part: Adapter, value: T) -> T:
    return value if part.scalar is None else value * part.scalar


class _ScaledGate:
    """A gate behind a part's own learnt scalar."""

    def __init__(self, gate: Gate, scalar: Tensor | None) -> None:
        self.gate, self.scalar, self.uniform = gate, scalar, gate.uniform

    def rank(self, h: Tensor, dim: int) -> Tensor:
        return self.gate.rank(h if self.scalar is None else h * self.scalar, dim)

    def output(self, update: Tensor) -> Tensor:
        return self.gate.output(update if self.scalar is None else update * self.scalar)
