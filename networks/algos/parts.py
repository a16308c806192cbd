"""Several adapters on one fused projection: one for each part of its output rows (query, key, value, MLP).

    dW = [dW_1; dW_2; ...]        or  T = diag(T_1, T_2, ...)

A file holds additive ones as one adapter of n times the rank with a block-diagonal left factor, which every reader
knows; those of rotations are numbered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..tensors.geometry import Geometry, RowRanges
from .base import Adapter
from .saved import Layout


def layout_of(
    algorithm: type[Adapter], geometry: Geometry, dim: int, options: Mapping[str, Any], sizes: Sequence[int] = ()
) -> Layout:
    """Layout of a layer with one adapter, or with one for each of its parts.

    Args:
        geometry: of the whole layer.
        dim: of each part.
        options: of the algorithm; a tuple has one value for each part.
        sizes: output rows of the parts, from the first row down; () = one adapter.

    Raises:
        ValueError: layer, dim and options do not go together.
    """
    return (
        _together(algorithm, geometry, dim, options, sizes) if sizes else algorithm.whole_layout(geometry, dim, options)
    )


def make_adapter(
    algorithm: type[Adapter], geometry: Geometry, dim: int, options: Mapping[str, Any], sizes: Sequence[int] = ()
) -> Adapter:
    """The adapter of `layout_of`.

    Args:
        geometry: of the whole layer.
        dim: of each part.
        options: of the algorithm; a tuple has one value for each part.
        sizes: output rows of the parts, from the first row down; () = one adapter.

    Raises:
        ValueError: layer, dim and options do not go together.
    """
    return algorithm.of_parts(geometry, dim, sizes, options) if sizes else algorithm(geometry, dim, options)


def _together(
    algorithm: type[Adapter], geometry: Geometry, dim: int, options: Mapping[str, Any], sizes: Sequence[int]
) -> Layout:
    """Parameter names are those of the parts, numbered."""
    parts = [
        algorithm.whole_layout(replace(geometry, out_features=size), dim, _of_part(options, i))
        for i, size in enumerate(sizes)
    ]
    shapes = {f"parts.{i}.{name}": shape for i, part in enumerate(parts) for name, shape in part.shapes.items()}
    return Layout(shapes, parts[0].rank, parts[0].rank_axis, stacked=len(parts))


def _of_part(options: Mapping[str, Any], i: int) -> dict[str, Any]:
    """A tuple has one value for each part."""
    return {name: value[i] if isinstance(value, tuple) else value for name, value in options.items()}


class Parts(Adapter):
    """Adapters of one algorithm on the parts of a Linear: what both families share.

    Args:
        algorithm: of each part.
        geometry: of the whole layer.
        dim: of each part.
        sizes: output rows of the parts, from the first row down.
        options: of the algorithm; a tuple has one value for each part.
    """

    def __init__(
        self, algorithm: type[Adapter], geometry: Geometry, dim: int, sizes: Sequence[int], options: Mapping[str, Any]
    ) -> None:
        nn.Module.__init__(self)
        assert algorithm.splits(options) and sum(sizes) == geometry.out_features
        self.spec = algorithm.spec
        self.algorithm, self.sizes = algorithm, tuple(sizes)
        self.geometry, self.dim, self.chosen = geometry, dim, dict(options)
        self.laid_out = _together(algorithm, geometry, dim, options, sizes)
        self.register_parameter("scalar", None)  # each part has its own
        parts = [
            algorithm(replace(geometry, out_features=size), dim, _of_part(options, i)) for i, size in enumerate(sizes)
        ]
        for part in parts:  # what a file says of all of them must reach them
            part.chosen = self.chosen
        self.parts = nn.ModuleList(parts)

    def _each(self) -> Sequence[Adapter]:
        return cast("list[Adapter]", list(self.parts))

    def members(self) -> list[Adapter]:
        return [self, *self._each()]

    def _starting(self, row_ranges: RowRanges) -> list[int] | None:
        """Numbers of the parts whose rows these ranges are; None if they cut one."""
        starts = {sum(self.sizes[:i]): i for i in range(len(self.sizes))}
        found = [starts.get(start) for start, _ in row_ranges]
        whole = [i for i, (a, b) in zip(found, row_ranges, strict=True) if i is not None and self.sizes[i] == b - a]
        return whole if len(whole) == len(row_ranges) else None

    def shrink_(self, ratio: float) -> None:
        for part in self._each():
            part.shrink_(ratio)

    @property
    def plus_gain(self) -> float:
        return self._each()[0].plus_gain

    def fold_plus_(self, unit: float) -> None:
        for part in self._each():
            part.fold_plus_(unit)

    # -- the start

    def orthogonal_(self) -> None:
        for part in self._each():
            part.orthogonal_()

    def defer_init_(self, scale: float, init: str = "pissa") -> None:
        for part in self._each():
            part.defer_init_(scale, init)

    @property
    def wants_base(self) -> bool:
        return any(part.wants_base for part in self._each())

    @property
    def needs_base(self) -> bool:
        return any(part.needs_base for part in self._each())

    def mark_initialised_(self) -> None:
        for part in self._each():
            part.mark_initialised_()

    def init_from_base(self, weight: Tensor) -> None:
        for part, rows in zip(self._each(), weight.split(list(self.sizes)), strict=True):
            part.init_from_base(rows)

    def renew_state(self, state: dict[str, Any], prefix: str) -> None:
        for i, part in enumerate(self._each()):
            part.renew_state(state, f"{prefix}parts.{i}.")

    # -- a pass

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
        return _stacked(self.algorithm, packs)

    def check_fits(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = self.pack().keys()
        if wanted != set(tensors):
            raise ValueError(
                f"the file has {', '.join(sorted(tensors))}; this network wants {', '.join(sorted(wanted))}"
            )
        for part, own in zip(self._each(), _unstacked(self.algorithm, tensors, self.sizes), strict=True):
            part.check_fits(own)

    def resized(self, tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[Mapping[str, Tensor], float | None]:
        own, n = _unstacked(self.algorithm, tensors, self.sizes), len(self.sizes)
        found = [part.resized(each, alpha and alpha / n) for part, each in zip(self._each(), own, strict=True)]
        return _stacked(self.algorithm, [pack for pack, _ in found]), alpha and (found[0][1] or 0.0) * n

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        self.check_fits(tensors)
        for part, own in zip(self._each(), _unstacked(self.algorithm, tensors, self.sizes), strict=True):
            part.unpack_(own)


def _stacked(algorithm: type[Adapter], packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`stack`, with the changes of the biases."""
    key = algorithm.spec.bias_key
    biases = [pack[key] for pack in packs if key in pack]
    return {**algorithm.stack(packs), **({key: torch.cat(biases)} if biases else {})}


def _unstacked(
    algorithm: type[Adapter], tensors: Mapping[str, Tensor], sizes: Sequence[int]
) -> list[dict[str, Tensor]]:
    """The inverse.

    Raises:
        ValueError: the tensors are no such stack.
    """
    key = algorithm.spec.bias_key
    packs = algorithm.unstack({suffix: t for suffix, t in tensors.items() if suffix != key}, sizes)
    if key in tensors:
        for pack, bias in zip(packs, tensors[key].split([*sizes]), strict=True):
            pack[key] = bias
    return packs
