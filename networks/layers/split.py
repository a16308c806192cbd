"""Several adapters on one fused projection: one for each part of its output rows (query, key, value, MLP).

    dW = [dW_1; dW_2; ...]        or  T = diag(T_1, T_2, ...)

A file holds additive ones as one adapter of n times the rank with a block-diagonal left factor, which every reader
knows; those of rotations are numbered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algos import Adapter, Layout, Reweight
from ..tensors.geometry import Geometry, Pieces
from ..tensors.low_rank import Gate


def split_layout(
    algorithm: type[Adapter], geometry: Geometry, dim: int, sizes: Sequence[int], options: Mapping[str, Any]
) -> Layout:
    """Layout of the whole; parameter names are those of the parts, numbered."""
    parts = [
        algorithm.layout(replace(geometry, out_features=size), dim, **_of_part(options, i))
        for i, size in enumerate(sizes)
    ]
    shapes = {f"parts.{i}.{name}": shape for i, part in enumerate(parts) for name, shape in part.shapes.items()}
    frozen = sum(part.frozen for part in parts)
    return Layout(shapes, parts[0].rank, parts[0].rank_axis, stacked=len(parts), frozen=frozen)


def _of_part(options: Mapping[str, Any], i: int) -> dict[str, Any]:
    """A tuple has one value for each part."""
    return {name: value[i] if isinstance(value, tuple) else value for name, value in options.items()}


def layout_of(
    algorithm: type[Adapter], geometry: Geometry, dim: int, options: Mapping[str, Any], sizes: Sequence[int] = ()
) -> Layout:
    """Layout of a layer with one adapter, or with one for each of the parts of these sizes."""
    if sizes:
        return split_layout(algorithm, geometry, dim, sizes, options)
    return algorithm.layout(geometry, dim, **options)


def make_adapter(
    algorithm: type[Adapter], geometry: Geometry, dim: int, options: Mapping[str, Any], sizes: Sequence[int] = ()
) -> Adapter:
    """The adapter of `layout_of`."""
    if sizes:
        kind = SplitRotation if issubclass(algorithm, Reweight) else Split
        return kind(algorithm, geometry, dim, sizes, options)
    return algorithm(geometry, dim, options)


class _Parts(Adapter):
    """Adapters of one algorithm on the parts of a Linear.

    Args:
        sizes: output rows of the parts, from the first row down.
    """

    def __init__(
        self, algorithm: type[Adapter], geometry: Geometry, dim: int, sizes: Sequence[int], options: Mapping[str, Any]
    ) -> None:
        nn.Module.__init__(self)
        assert algorithm.splits(options) and not geometry.is_conv and sum(sizes) == geometry.out_features
        for name in ("algo", "plus", "frozen", "saved_as", "alpha_option", "stepwise"):
            setattr(self, name, getattr(algorithm, name))
        self.algorithm, self.sizes = algorithm, tuple(sizes)
        self.geometry, self.dim, self.chosen = geometry, dim, dict(options)
        self.record = split_layout(algorithm, geometry, dim, sizes, options)
        self.register_parameter("scalar", None)  # each part has its own
        parts = [
            algorithm(replace(geometry, out_features=size), dim, _of_part(options, i)) for i, size in enumerate(sizes)
        ]
        for part in parts:  # what a file says of all of them must reach them
            part.chosen = self.chosen
        self.parts = nn.ModuleList(parts)

    def _each(self) -> list[Adapter]:
        return [part for part in self.parts if isinstance(part, Adapter)]

    def renew_state(self, state: dict[str, Any], prefix: str) -> None:
        for i, part in enumerate(self._each()):
            part.renew_state(state, f"{prefix}parts.{i}.")

    def _whole(self, pieces: Pieces) -> list[Adapter] | None:
        """The parts whose rows these pieces are; None if they cut one."""
        starts = {sum(self.sizes[:i]): part for i, part in enumerate(self._each())}
        chosen = [starts.get(start) for start, _ in pieces]
        whole = [p for p, (a, b) in zip(chosen, pieces, strict=True) if p and p.geometry.out_features == b - a]
        return whole if len(whole) == len(pieces) else None

    def begin(self, x: Tensor) -> None:
        for part in self._each():
            part.begin(x)

    def end(self) -> None:
        for part in self._each():
            part.end()

    # -- files

    def pack(self) -> dict[str, Tensor]:
        packs = [part.pack() for part in self._each()]
        errors = [part.refactor_error for part in self._each() if part.refactor_error is not None]
        self.refactor_error = max(errors, default=None)
        return self.algorithm.stack(packs)

    def fits(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = self.pack().keys()
        if wanted != set(tensors):
            raise ValueError(
                f"the file has {', '.join(sorted(tensors))}; this network wants {', '.join(sorted(wanted))}"
            )
        for part, own in zip(self._each(), self.algorithm.unstack(tensors, self.sizes), strict=True):
            part.fits(own)

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        self.fits(tensors)
        for part, own in zip(self._each(), self.algorithm.unstack(tensors, self.sizes), strict=True):
            part.unpack_(own)


class Split(_Parts):
    """Additive ones."""

    @property
    def plus_gain(self) -> float:
        return self._each()[0].plus_gain

    def fold_plus_(self, unit: float) -> None:
        for part in self._each():
            part.fold_plus_(unit)

    def await_base_(self, scale: float) -> None:
        for part in self._each():
            part.await_base_(scale)

    @property
    def wants_base(self) -> bool:
        return any(part.wants_base for part in self._each())

    @property
    def needs_base(self) -> bool:
        return any(part.needs_base for part in self._each())

    def settle_(self) -> None:
        for part in self._each():
            part.settle_()

    def see_base(self, weight: Tensor) -> None:
        for part, rows in zip(self._each(), weight.split(list(self.sizes)), strict=True):
            part.see_base(rows)

    def orthogonal_(self) -> None:
        for part in self._each():
            part.orthogonal_()

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        return torch.cat([_scaled(part, part.delta(rank_mask_R)) for part in self._each()])

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        return torch.cat([part.apply_delta(x, _ScaledGate(gate, part.scalar)) for part in self._each()], -1)

    def apply_rows(self, x: Tensor, gate: Gate, pieces: Pieces) -> Tensor:
        """By parts where the pieces are whole ones."""
        chosen = self._whole(pieces)
        if chosen is None:
            return super().apply_rows(x, gate, pieces)
        return torch.cat([part.apply_delta(x, _ScaledGate(gate, part.scalar)) for part in chosen], -1)

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

    def shrink_(self, ratio: float) -> None:
        for part in self._each():
            part.shrink_(ratio)

    @property
    def mask_size(self) -> int:
        return self._each()[0].mask_size

    def shown_rank(self, tensors: Mapping[str, Tensor]) -> int | None:  # type: ignore[override]
        return self.algorithm.shown_rank(tensors)


class SplitRotation(_Parts, Reweight):
    """Rotations of the parts of the output."""

    def change(self, t: Tensor, axis: int) -> Tensor:
        return _changes(self._each(), t, axis)

    def change_rows(self, t: Tensor, axis: int, pieces: Pieces) -> Tensor | None:
        chosen = self._whole(pieces)
        return None if chosen is None else _changes(chosen, t, axis)

    def shrink_(self, ratio: float) -> None:
        for part in self._each():
            part.shrink_(ratio)


def _changes(parts: Sequence[Adapter], t: Tensor, axis: int) -> Tensor:
    """(T - 1) t, where t has the rows of these parts along an axis."""
    each = t.split([part.geometry.out_features for part in parts], axis)
    changes = [p.change(rows, axis) for p, rows in zip(parts, each, strict=True) if isinstance(p, Reweight)]
    return torch.cat(changes, axis)


def _scaled(part: Adapter, value: Tensor) -> Tensor:
    return value if part.scalar is None else value * part.scalar


class _ScaledGate:
    """A gate behind a part's own learnt scalar."""

    def __init__(self, gate: Gate, scalar: Tensor | None) -> None:
        self.gate, self.scalar, self.uniform = gate, scalar, gate.uniform

    def rank(self, h: Tensor, dim: int) -> Tensor:
        return self.gate.rank(h if self.scalar is None else h * self.scalar, dim)

    def output(self, update: Tensor) -> Tensor:
        return self.gate.output(update if self.scalar is None else update * self.scalar)
