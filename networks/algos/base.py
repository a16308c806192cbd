"""The contract of an algorithm: what it consists of, where it starts, how it is saved, and what a layer asks of it.

There are two families, each with a file for what is its own:

    additive         W' = W + s dW            dW [O, I, *kernel], made of a few small factors
    multiplicative   W' = T W,  or  W T       T - 1 acts on features, so that no base weight is needed

An algorithm knows shapes and formulas only. Scale (alpha), multiplier, dropout probabilities and dtype policy live in
`layers`; saved names in `files`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..records import AlgoSpec
from ..tensors.fused import BesideBase, Call, OverBase
from ..tensors.geometry import Geometry, RowRanges, cast_to_input
from ..tensors.low_rank import PassGate
from ..tensors.per_thread import PerThread
from ..tensors.products import Products
from .clock import Clock
from .saved import Count, Layout, check_tensors, wide_dtype, with_ranks


class _Starts:
    """Whether adapters that are made get start values."""

    def __init__(self) -> None:
        self.wanted = True


_STARTS = PerThread(_Starts)


@contextlib.contextmanager
def unstarted() -> Iterator[None]:
    """Adapters made here have no start values: `unpack_` follows, and nothing is drawn that it would write over."""
    before, _STARTS.mine.wanted = _STARTS.mine.wanted, False
    try:
        yield
    finally:
        _STARTS.mine.wanted = before


class Base(Products, Protocol):
    """What an adapter may ask, in a pass, of the base module that it changes."""

    @property
    def row_ranges(self) -> RowRanges | None:
        """The layer's output rows which this module computes, in its own order; None = all of them."""
        ...

    def bias(self, y: Tensor) -> Tensor | float:
        """The bias, shaped as a part of the output y; 0 without one. Differentiable."""
        ...

    def whole_weight(self, device: torch.device | None = None) -> Tensor:
        """W [O, I, *kernel] of the whole layer, in fp32 or wider, without gradient."""
        ...

    def select_rows(self, whole: Tensor) -> Tensor:
        """This module's rows of something that has one (axis 0) for each output feature of the layer."""
        ...


class Adapter(nn.Module):
    """Base of all algorithms. Parameters are those of `layout`, in fp32.

    Args:
        geometry: of the layer that it is for.
        dim: the rank, or what the algorithm has in its place.
        options: of `layout`.

    Raises:
        ValueError: the layer, the dim and the options do not go together.
    """

    spec: AlgoSpec
    magnitudes: ClassVar[bool] = True  # whether magnitudes of DoRA can stand beside it in a file

    scalar: nn.Parameter | None
    started: bool = True  # False of one without start values, see `unstarted`
    start_size: float | None = None  # relative to the base weight, of an update that has not started at 0
    plus_unit: float = 1.0  # what a plus parameter of this adapter counts for; dW is linear in each of them
    clock: Clock | None = None  # of the timed ones: when it is, if anybody knows
    number: Tensor | None = None  # of the stepwise ones: 0-d, drawn for the step alike in all processes; None = unknown
    refactor_error: float | None = None  # relative, of the tensors of the last `pack`, where they are not the live ones

    def __init__(self, geometry: Geometry, dim: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.geometry, self.dim, self.chosen = geometry, dim, dict(options or {})
        self.laid_out = self.whole_layout(geometry, dim, self.chosen)  # shapes and ranks of this one
        self.register_parameter("scalar", None)
        for name, shape in self.laid_out.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=name not in self.spec.frozen))
        with torch.no_grad():
            self.started = _STARTS.mine.wanted
            if not self.started:
                self.await_values()
                return
            self.reset_parameters()
            if self.bias_parameter is not None:
                self.bias_parameter.zero_()

    # -- what it consists of

    @classmethod
    def layout(cls, geometry: Geometry, dim: int, *args: Any, **options: Any) -> Layout:
        """What an adapter of a layer consists of. Every algorithm defines it.

        Args:
            geometry: of the layer.
            dim: the rank, or what the algorithm has in its place.
            options: those of the algorithm, by name.

        Raises:
            ValueError: they do not go together.
        """
        raise NotImplementedError

    @classmethod
    def whole_layout(cls, geometry: Geometry, dim: int, options: Mapping[str, Any]) -> Layout:
        """`layout`, with the change of the bias where there is one.

        Args:
            geometry, dim: as for `layout`.
            options: of `layout`; `bias` says outright whether a file has that change.

        Raises:
            ValueError: as `layout`.
        """
        own = dict(options)
        bias = own.pop("bias", cls.spec.shifts and geometry.bias)
        layout = cls.layout(geometry, dim, **own)
        shape = geometry.weight_shape[:1] if geometry.family == Geometry.family else geometry.weight_shape
        return replace(layout, shapes={**layout.shapes, cls.spec.bias_name: shape}) if bias else layout

    @property
    def bias_parameter(self) -> nn.Parameter | None:
        """The change of the bias, if it has one."""
        return self._parameters.get(self.spec.bias_name)

    @classmethod
    def of_parts(cls, geometry: Geometry, dim: int, sizes: Sequence[int], options: Mapping[str, Any]) -> Adapter:
        """One adapter of this algorithm for each part of a Linear, together. Both families define it.

        Args:
            geometry: of the whole layer.
            dim: of each part.
            sizes: output rows of the parts, from the first row down.
            options: of `layout`; a tuple has one value for each part.
        """
        raise NotImplementedError

    @classmethod
    def splits(cls, options: Mapping[str, Any]) -> bool:
        """Whether adapters of the parts of a layer, each with these options, can stand for one on the whole."""
        return "split_qkv" in cls.spec.features

    @classmethod
    def remark(cls, layout: Layout, dim: int, options: Mapping[str, Any]) -> str:
        """What a user should know of layers like this, to follow "so many layers have"; "" = nothing.

        Args:
            layout: of the layer.
            dim: which it was given.
            options: of the algorithm.
        """
        return ""

    @classmethod
    def caution(cls, layout: Layout, dim: int, options: Mapping[str, Any]) -> tuple[str, str]:
        """What is seldom meant of layers like this: (words to follow "so many layers have", what to give instead), or
        two times "".

        Args:
            layout, dim, options: as for `remark`.
        """
        return "", ""

    def members(self) -> list[Adapter]:
        """This adapter, and those that it is made of."""
        return [self]

    def values(self) -> dict[str, Tensor]:
        """All parameters as they act now, differentiable where they are trained: frozen ones are detached, since some
        hosts switch the gradient of every parameter on."""
        named = self.named_parameters() if self._modules else self._parameters.items()  # the walk takes a while
        frozen = self.spec.frozen
        return {name: p.detach() if name in frozen else p for name, p in named if p is not None}

    def factors(self, x: Tensor) -> dict[str, Tensor]:
        """The same in the dtype in which they meet x."""
        return {name: cast_to_input(p, x) for name, p in self.values().items()}

    def shrink_(self, ratio: float) -> None:
        """Make the change of the layer `ratio` of its size, or about that: 0 at 0, and without a jump in between. Both
        families define it."""
        raise NotImplementedError

    # -- LoRA+ in the parametrisation

    def fold_plus_(self, unit: float) -> None:
        """From now on a plus parameter holds its value / unit, so that a step of an optimizer moves it by `unit` times
        as much. The layer's strength makes up for it."""
        if unit == self.plus_unit:
            return
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name in self.spec.plus:
                    p.mul_(self.plus_unit / unit)
        self.plus_unit = unit

    @property
    def plus_gain(self) -> float:
        """What the change of the weight lacks because of `plus_unit`, a factor."""
        if self.plus_unit == 1.0:  # nearly always, and asked for in every pass
            return 1.0
        return float(self.plus_unit ** sum(name in self.spec.plus for name in self.laid_out.shapes))

    # -- the start

    def reset_parameters(self) -> None:
        """Start values, with which the layer is the base layer. Every algorithm defines it."""
        raise NotImplementedError

    def await_values(self) -> None:
        """In the place of `reset_parameters` where a file is to set all values: what the adapter has beside them."""

    @classmethod
    def no_start(cls, init: str, options: Mapping[str, Any]) -> str:
        """Why this algorithm, with these options, has no such start values; "" if it has."""
        return cls.spec.no_starts.get(init, "")

    def orthogonal_(self) -> None:
        """Every random factor of `reset_parameters` with orthonormal rows instead, or columns where they are fewer."""
        for p in self.parameters():
            if p.dim() > 1 and not p.is_meta and bool(p.any()):
                nn.init.orthogonal_(p)

    def defer_init_(self, scale: float, init: str = "pissa") -> None:
        """Start from the base weight, once it is seen: from values that scale * dW would be a part of it, if it did not
        start at 0.

        Args:
            scale: the layer's.
            init: "pissa" (2404.02948): the principal part; "milora" (2406.09044): that of the smallest singular values.

        Raises:
            ValueError: the algorithm has no such start, see `no_start`.
        """
        raise ValueError(f"{self.spec.name} has no start of {init}: {self.no_start(init, self.chosen)}")

    @classmethod
    def no_perturbed_start(cls, layout: Layout, options: Mapping[str, Any]) -> str:
        """Why such an adapter has no start of `perturb_`; "" if it has.

        Args:
            layout: of the layer.
            options: of the algorithm.
        """
        return f"{cls.spec.name} has no start beside the base model"

    def perturb_(self, size: float) -> None:
        """Start from random values, once the base weight is seen.

        Args:
            size: of the update at the start, relative to the base weight, or about that.

        Raises:
            ValueError: there is no such start, see `no_perturbed_start`.
        """
        raise ValueError(self.no_perturbed_start(self.laid_out, self.chosen))

    @property
    def wants_base(self) -> bool:
        """Whether its start values follow from the base weight, and nothing has set others yet."""
        return False

    @property
    def needs_base(self) -> bool:
        """Whether it wants the base weight and has no other start values."""
        return False

    def init_from_base(self, weight: Tensor) -> None:
        """Take the start values from the base weight; without gradient.

        Args:
            weight: W [O, I, *kernel], fp32 or wider, on any device.

        Raises:
            ValueError: it cannot be the weight that the parameters are for.
        """

    def mark_initialised_(self) -> None:
        """Its values were set by other means: nothing is wanted of the base weight any more."""

    def renew_state(self, state: dict[str, Any], prefix: str) -> None:
        """Say a live state of an earlier version in today's terms, in place.

        Args:
            state: of a whole network, perhaps.
            prefix: with which the names of this adapter's values begin there.
        """

    # -- what a layer asks of it

    def strength(self, multiplier: float | Tensor, scale: float) -> float | Tensor:
        """What multiplies its change of the layer. Both families define it.

        Args:
            multiplier: the user's strength, 0 where a dropout leaves the call out; [N] with one for each sample.
            scale: the layer's, that of a dW: from alpha and rank.
        """
        raise NotImplementedError

    def weight_change(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        """W' - W, at multiplier 1: what a merge adds. Both families define it.

        Args:
            weight: W [O, I, *kernel], fp32 or wider.
            strength: at multiplier 1.

        Returns:
            [O, I, *kernel] in the dtype and on the device of W, differentiable.
        """
        raise NotImplementedError

    def add_change_(self, weight: Tensor, multiplier: float, strength: float | Tensor) -> Tensor:
        """Add `multiplier` times `weight_change` to a weight, in place, with little memory beside it: the largest
        weights of a model take most of what there is. Both families define it.

        Args:
            weight: W [O, I, *kernel], fp32 or wider, which becomes W'; differentiable where it is no leaf.
            multiplier: the user's.
            strength: at multiplier 1.
        """
        raise NotImplementedError

    def input_change(self, x: Tensor) -> Tensor | None:
        """What the layer's input has to get added, at multiplier 1, in the dtype of x; None = nothing ever."""
        return None

    def output_change(
        self, x: Tensor, y: Tensor, base: Base, gate: PassGate, factored: bool | None = None
    ) -> Tensor | None:
        """What the output of a base module has to get added to be that of W'. Both families define it.

        Args:
            x: the layer's input, with the change of `input_change`.
            y: the base module's output, bias included.
            base: the module.
            gate: the strength of `strength`, and dropouts.
            factored: whether to build no weight change, or to build it; None = the cheaper one.

        Returns:
            As y, in the dtype of the computation; None = nothing ever.
        """
        raise NotImplementedError

    def over_base(self, call: Call) -> OverBase | None:
        """The form in which this adapter and an open base layer are one function; None = there is none. Asked once for
        all calls of a kind, so that it must not depend on what changes between them.

        Args:
            call: the kind.
        """
        return None

    def beside_base(self, call: Call) -> BesideBase | None:
        """The form in which this adapter is one function beside a base layer of any kind, likewise."""
        return None

    def product(self, weight: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """[O, R] and [R, I, *kernel] whose product is the weight change, without scale and scalar; None where it is not
        made of such factors.

        Args:
            weight: W, for algorithms whose change is a function of it.
        """
        return None

    def bias_change(self) -> Tensor | None:
        """[O], what is added to the base's bias at multiplier 1; None = nothing ever."""
        return self.bias_parameter

    def change_norm(self, weight: Callable[[], Tensor], strength: float | Tensor) -> Tensor:
        """Frobenius norm of `weight_change`, 0-d. Both families define it.

        Args:
            weight: gives W, for algorithms which need it.
            strength: at multiplier 1.
        """
        raise NotImplementedError

    def begin(self, x: Tensor) -> None:
        """A training pass with the input x begins: what is random about `values` until `end` is drawn here, by tensor
        operations."""

    def end(self) -> None:
        """It is over: `values` is what a file would hold."""

    # -- files

    @classmethod
    def accepts(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors under its suffixes are its own, where several algorithms share the names."""
        return True

    @classmethod
    def rows_of_parts(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """Output rows of the parts that have adapters of their own in a file, () for none; None where tensors of
        `stack` do not show them."""
        return None

    @classmethod
    def with_scale(cls, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Saved tensors with the alpha for this scale; without a rank it goes into a factor, if there is one."""
        rank = cls.spec.shown_rank(tensors)
        if rank is not None:
            return {**tensors, "alpha": torch.tensor(scale * rank)}
        factors = [cls.spec.keys[name] for name in cls.spec.fold if cls.spec.keys[name] in tensors][:1]
        return {**tensors, **{key: tensors[key].to(wide_dtype(tensors[key])) * scale for key in factors}}

    @classmethod
    def portable(cls, tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[Mapping[str, Tensor], float | None]:
        """A layer of any program's file as our own files would have it: scale = alpha / rank."""
        return tensors, alpha

    @classmethod
    def of_peft(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """A layer of a file of PEFT, under `peft_keys`, with what its adapter_config.json says.

        Raises:
            ValueError: that makes no sense.
        """
        return tensors

    @classmethod
    def assumed(cls, tensors: Mapping[str, Tensor]) -> str:
        """What is taken for granted of a layer that programs write in several ways, for the log; "" if nothing is."""
        return ""

    def alpha_at(self, scale: float, rank: int | None) -> float:
        """The alpha of a layer of this scale, in a file that holds it with this rank."""
        if self.spec.alpha_option:
            return float(self.chosen.get(self.spec.alpha_option) or 0.0)
        return scale * rank if rank is not None else float(max(1, self.dim))

    @property
    def saves_alpha(self) -> bool:
        """Whether its files have an alpha."""
        return self.spec.saves_alpha

    def pack(self) -> dict[str, Tensor]:
        """Saved suffix -> tensor. The scalar goes into one factor: no reader knows it."""
        tensors = {name: p.detach() for name, p in self.named_parameters() if name != "scalar"}
        if self.plus_unit != 1:
            tensors = {name: t * self.plus_unit if name in self.spec.plus else t for name, t in tensors.items()}
        if self.scalar is not None:
            name = next(name for name in self.spec.fold if name in tensors)
            tensors[name] = tensors[name] * self.scalar.detach()
        return {self.spec.keys[name]: tensor for name, tensor in tensors.items()}

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        """What a layer of a file is. Every algorithm defines it.

        Args:
            geometry: of the layer that it is for.
            tensors: saved suffix -> tensor.

        Returns:
            (dim, options) under which `layout` gives the shapes of these tensors.

        Raises:
            ValueError: they do not fit the layer.
        """
        raise NotImplementedError

    @classmethod
    def asked_as(cls, geometry: Geometry, dim: int, options: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Which arguments may have made a layer of a file: `dim` and options -> their possible values, the likeliest
        first.

        Args:
            geometry: of the layer.
            dim, options: what `describe` says of it.
        """
        return {"dim": (dim,), **{name: (value,) for name, value in options.items() if name in cls.spec.options}}

    def check_fits(self, tensors: Mapping[str, Tensor]) -> None:
        """Check saved tensors against this adapter. 1x1 convolutions and Linears may stand for each other.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape.
        """
        check_tensors(self._by_suffix(), tensors)

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved tensors.

        Raises:
            ValueError: they do not fit; nothing was changed.
        """
        self.check_fits(tensors)
        with torch.no_grad():
            for suffix, p in self._by_suffix().items():
                p.copy_(tensors[suffix].reshape(p.shape))
            unit, self.plus_unit = self.plus_unit, 1.0
            self.fold_plus_(unit)
            if self.scalar is not None:
                self.scalar.fill_(1.0)

    def _by_suffix(self) -> dict[str, nn.Parameter]:
        keys = self.spec.keys
        return {keys[name]: p for name, p in self._parameters.items() if p is not None and name != "scalar"}

    @classmethod
    def stack(cls, packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Saved tensors of the layer whose parts, from the first output row down, have these. Algorithms with the
        feature split_qkv define it."""
        raise NotImplementedError

    @classmethod
    def unstack(cls, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """The inverse of `stack` for parts of these output sizes; defined with it.

        Raises:
            ValueError: the tensors are no such stack.
        """
        raise NotImplementedError

    @classmethod
    def shown_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """Of the weight, as saved tensors show it, perhaps with the positions of a kernel among the columns (see
        `AlgoSpec.hides_kernel`); None where they do not."""
        return None

    @classmethod
    def settled(cls, tensors: Mapping[str, Tensor], alpha: float | None) -> dict[str, Tensor] | None:
        """Saved tensors which act the same without an alpha; None where there are none.

        Args:
            tensors: saved suffix -> tensor.
            alpha: beside them.
        """
        rank = cls.spec.shown_rank(tensors)
        scale = alpha / rank if rank and alpha else 1.0
        if scale == 1:
            return dict(tensors)
        folding = [cls.spec.keys[name] for name in cls.spec.fold if cls.spec.keys[name] in tensors][:1]
        folded = {key: tensors[key].to(wide_dtype(tensors[key])) * scale for key in folding}
        return {**tensors, **folded} if folding else None

    @classmethod
    def join(
        cls, packs: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int], alpha: float | None
    ) -> dict[str, Tensor] | None:
        """Saved tensors of the layer whose parts, from the first output row down, have these; None where that is no
        layer of this algorithm, or one only beside the base weight.

        Args:
            packs: None = nothing changes there; not all of them. All act at one scale.
            sizes: output rows of the parts.
            alpha: of each, where it is no strength but an option.
        """
        return None

    @classmethod
    def take(
        cls, tensors: Mapping[str, Tensor], alpha: float | None, start: int, stop: int
    ) -> tuple[dict[str, Tensor], float | None] | None:
        """Saved tensors and alpha of some output rows of a layer as a layer of their own; None as for `join`.

        Args:
            tensors, alpha: of the whole layer.
            start, stop: the rows.
        """
        return None

    # -- ranks

    @classmethod
    def stacked(cls, tensors: Mapping[str, Tensor]) -> int:
        """Of how many parts of equal rank saved tensors are the stack (`stack`), as far as they show it."""
        return 1

    @classmethod
    def first_ranks(cls, tensors: Mapping[str, Tensor], dim: int) -> dict[str, Tensor]:
        """The first `dim` ranks (of each part, in a stack): what DyLoRA trains to stand alone.

        Raises:
            ValueError: no ranks of this form stand alone.
        """
        raise ValueError(f"{cls.spec.name} has no ranks that could stand alone")

    @classmethod
    def nearest(
        cls, tensors: Mapping[str, Tensor], count: Count, parts: int = 1, core: bool = False
    ) -> dict[str, Tensor]:
        """Saved tensors of the nearest change with fewer ranks, at the same scale.

        Args:
            tensors: saved suffix -> tensor.
            count: how many of all singular values, the largest first, are kept.
            parts: of which it is to stay a stack, each with as many ranks.
            core: with the core of the Tucker form, where there is one, though the nearest change has none.

        Raises:
            ValueError: it has no ranks.
        """
        raise ValueError(f"{cls.spec.name} has no ranks")

    @classmethod
    def grown(cls, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], parts: int = 1) -> dict[str, Tensor]:
        """Saved tensors of the same change at the same scale with more ranks, which change nothing yet, and learn.

        Args:
            tensors: saved suffix -> tensor.
            start: those of a new adapter of that rank, of which the new ranks are.
            parts: of which it is to stay a stack, each with as many ranks.

        Raises:
            ValueError: it has no ranks.
        """
        if not cls.spec.grows:
            raise ValueError(f"{cls.spec.name} has no ranks")
        still = {cls.spec.keys[name] for name in cls.spec.grows}
        return {
            suffix: with_ranks(tensor, start[suffix], parts, suffix in still) if suffix in start else tensor
            for suffix, tensor in tensors.items()
        }

    def resized(self, tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[Mapping[str, Tensor], float | None]:
        """Saved tensors of another rank, and the alpha beside them, with the ranks of this adapter, which is at its
        start: the same change with more of them, the nearest one with fewer.

        Raises:
            ValueError: the algorithm has no ranks.
        """
        own, wanted = self.spec.shown_rank(tensors), self.laid_out.saved_rank
        if not own or not wanted or own == wanted:
            return tensors, alpha
        found = dict(tensors)
        if own > wanted:
            core = self.spec.core in self.laid_out.shapes
            found = self.nearest(found, lambda values: min(wanted, len(values)), core=core)
        if (self.spec.shown_rank(found) or 0) < wanted:  # a small layer has not so many singular values
            found = self.grown(found, self.pack())
        return found, alpha and alpha * wanted / own


def kaiming_(p: Tensor) -> None:
    """Uniform within 1 / sqrt(fan_in), the start of torch's own layers."""
    nn.init.kaiming_uniform_(p, a=math.sqrt(5))
