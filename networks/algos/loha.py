"""LoHa: the Hadamard product of two low-rank matrices (2108.06098, 2309.14859).

    dW = (w1_a w1_b) * (w2_a w2_b)                  rank up to R^2
    Tucker (convolutions with K > 1): each half is sum_ab w_a[a, o] t[a, b, k] w_b[b, i]

The same dW is an ordinary low-rank product of rank R^2, P Q with P[o, ij] = w1_a[o, i] w2_a[o, j] and
Q[ij, c] = w1_b[i, c] w2_b[j, c]: the factored form, which never builds O x I.

Parameters (saved as hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, hada_t1, hada_t2)
    w1_a, w2_a  [O, R]; Tucker [R, O]               start: N(0, 0.1), 0 (with a scalar: both N(0, 0.1))
    w1_b, w2_b  [R, I * K]; Tucker [R, I]           start: N(0, 1)
    t1, t2      [R, R, *kernel], Tucker only        start: N(0, 0.1)
    scalar, 0-d, with use_scalar only               start: 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..records.loha import LOHA
from ..tensors.fused import Call, OverBase
from ..tensors.fused_hadamard import hadamard_over_base
from ..tensors.geometry import Geometry, RowRanges
from ..tensors.hadamard import nearest_hadamard
from ..tensors.low_rank import Gate, low_rank, sum_norm_sq
from ..tensors.tucker import core_times_right, nearest_tucker
from ..tensors.updates import Update
from .additive import CHUNK, Additive, whole_form
from .saved import (
    Count,
    Layout,
    alike,
    block_diagonal,
    blocks_of,
    concatenated,
    each,
    kept_ranks,
    there,
    unstack_diagonal,
)


class LoHa(Additive):
    spec = LOHA

    w2_a: nn.Parameter

    @classmethod
    def layout(cls, geometry: Geometry, dim: int, use_tucker: bool = False, use_scalar: bool = False) -> Layout:
        tucker = use_tucker and geometry.has_kernel
        a = (dim, geometry.out_features) if tucker else (geometry.out_features, dim)
        b = (dim, geometry.in_features if tucker else geometry.columns)
        shapes: dict[str, tuple[int, ...]] = {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}
        if tucker:
            shapes["t1"] = shapes["t2"] = (dim, dim, *geometry.kernel)
        if use_scalar:
            shapes["scalar"] = ()
        return Layout(shapes, rank=dim, rank_axis=True)

    def reset_parameters(self) -> None:
        zero = "w2_a" if self.scalar is None else "scalar"
        for name, p in self.named_parameters():
            if name == zero:
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=1.0 if name in ("w1_b", "w2_b") else 0.1)

    @staticmethod
    def _half(p: Mapping[str, Tensor], half: int) -> tuple[Tensor, Tensor]:
        """One of the two low-rank matrices as ([O, R], [R, I * K])."""
        a, b = p[f"w{half}_a"], p[f"w{half}_b"]
        if f"t{half}" not in p:
            return a, b
        return a.T, core_times_right(p[f"t{half}"], b).flatten(1)

    def product(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        P, Q = self._product(self.values())
        return P, Q.reshape(-1, *self.geometry.weight_shape[1:])

    def _product(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """P [O, R^2] and Q [R^2, I * K] of the factored form."""
        (a1, b1), (a2, b2) = self._half(p, 1), self._half(p, 2)
        P = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        return P, (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        p = self.values()
        (a1, b1), (a2, b2) = self._half(p, 1), self._half(p, 2)
        if rank_mask_R is not None:
            a1 = a1 * rank_mask_R
        return ((a1 @ b1) * (a2 @ b2)).reshape(self.geometry.weight_shape)

    def add_delta_(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        p = self.values()
        ((a1, b1), (a2, b2)) = (tuple(t.to(weight) for t in self._half(p, half)) for half in (1, 2))
        a1, step = a1 * strength, max(1, CHUNK // self.geometry.columns)
        for start in range(0, len(weight), step):
            rows = weight[start : start + step]
            halves = (a[start : start + step] @ b for a, b in ((a1, b1), (a2, b2)))
            rows.addcmul_(*(half.reshape(rows.shape) for half in halves))
        return weight

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        P, Q = self._product(self.factors(x))
        Q = Q.reshape(-1, *self.geometry.weight_shape[1:])
        return low_rank(self.geometry, x, Q, P, _FirstIndex(gate, self.dim))

    def rows(self, start: int, stop: int) -> Tensor:
        p = self.values()
        (a1, b1), (a2, b2) = self._half(p, 1), self._half(p, 2)
        rows = (a1[start:stop] @ b1) * (a2[start:stop] @ b2)
        return rows.reshape(-1, *self.geometry.weight_shape[1:])

    def apply_rows(self, x: Tensor, gate: Gate, row_ranges: RowRanges) -> Tensor:
        P, Q = self._product(self.factors(x))
        P = torch.cat([P[start:stop] for start, stop in row_ranges])
        return low_rank(self.geometry, x, Q, P, _FirstIndex(gate, self.dim))

    def norm_sq(
        self, weight: Tensor, strength: float | Tensor, on_output: bool, row_ranges: RowRanges | None = None
    ) -> Tensor:
        """By the factored form where R^2 is small; else in chunks."""
        if self.dim > 4 or row_ranges is not None:
            return super().norm_sq(weight, strength, on_output, row_ranges)
        P, Q = self._product(self.values())
        return sum_norm_sq(weight, strength * P, Q.reshape(-1, *self.geometry.weight_shape[1:]), on_output)

    def norm(self) -> Tensor:
        """By the Gram matrices of P and Q, R^2 x R^2, where they are cheaper than dW."""
        if self.dim**3 > 2 * self.geometry.out_features:
            return super().norm()
        P, Q = self._product(self.values())
        return torch.sqrt(((P.T @ P) * (Q @ Q.T)).sum().clamp_min(0))

    def over_base(self, call: Call) -> OverBase | None:
        factored, rebuilt = self.flops(call.tokens)
        if call.sums:  # one product for two in each pass; this form keeps no dW, as that of other algorithms would
            rebuilt -= 4.0 * call.tokens * self.geometry.out_features * self.geometry.columns
        costs = factored, rebuilt
        return whole_form if call.is_small(costs) else _OverBase(call.cheaper_factored(costs))

    def flops(self, tokens: int) -> tuple[float, float]:
        g, R = self.geometry, self.dim
        O, J, N = g.out_features, g.columns, g.out_features * g.columns
        return 6.0 * tokens * R * R * (J * g.groups + O), 6.0 * tokens * N + 16 * N * R

    @classmethod
    def stack(cls, packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        beside = {"hada_w1_b", "hada_w2_b"}
        return {
            key: (torch.cat if key in beside else block_diagonal)([pack[key] for pack in packs]) for key in packs[0]
        }

    @classmethod
    def join(
        cls, packs: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int], alpha: float | None = None
    ) -> dict[str, Tensor] | None:
        """One below the other where all share the other factors, otherwise block-diagonal."""
        present = there(packs)
        if len({"hada_t1" in pack for pack in present}) > 1:
            return None
        axis, below = cls._row_axis(present[0]), ("hada_w1_a", "hada_w2_a")
        if alike(present, {*present[0]} - {*below}):
            return {**present[0], **{key: concatenated(each(packs, key), sizes, axis) for key in below}}
        return cls.stack([pack or cls._rankless(present[0], size) for pack, size in zip(packs, sizes, strict=True)])

    @staticmethod
    def _row_axis(tensors: Mapping[str, Tensor]) -> int:
        """Of w1_a and w2_a."""
        return 1 if "hada_t1" in tensors else 0

    @classmethod
    def _rankless(cls, like: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
        """A layer of no rank, with so many output rows."""
        shape = (0, size) if cls._row_axis(like) else (size, 0)
        cores = {key: like[key][:0, :0] for key in ("hada_t1", "hada_t2") if key in like}
        rows = {key: like[key].new_zeros(shape) for key in ("hada_w1_a", "hada_w2_a")}
        return {**rows, **cores, **{key: like[key][:0] for key in ("hada_w1_b", "hada_w2_b")}}

    @classmethod
    def take(
        cls, tensors: Mapping[str, Tensor], alpha: float | None, start: int, stop: int
    ) -> tuple[dict[str, Tensor], float | None]:
        axis = cls._row_axis(tensors)
        rows = {key: tensors[key].narrow(axis, start, stop - start) for key in ("hada_w1_a", "hada_w2_a")}
        both = (
            torch.stack([tensors["hada_w1_a"], tensors["hada_w2_a"]], -1).any(-1) if "hada_t1" not in tensors else None
        )
        kept = None if both is None else kept_ranks(both, start, stop)
        if kept is None:
            return {**tensors, **rows}, alpha
        left = {key: tensor[:, kept] for key, tensor in rows.items()}
        right = {key: tensors[key][kept] for key in ("hada_w1_b", "hada_w2_b")}
        return {**tensors, **left, **right}, alpha and alpha * len(kept) / len(tensors["hada_w1_b"])

    @classmethod
    def unstack(cls, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        parts = {name: unstack_diagonal(name, tensors[name], sizes) for name in ("hada_w1_a", "hada_w2_a")}
        chunks = {name: tensors[name].chunk(len(sizes)) for name in ("hada_w1_b", "hada_w2_b")}
        return [{name: each[i] for name, each in {**parts, **chunks}.items()} for i in range(len(sizes))]

    @classmethod
    def stacked(cls, tensors: Mapping[str, Tensor]) -> int:
        return 1 if "hada_t1" in tensors else blocks_of(tensors["hada_w1_a"].ne(0) & tensors["hada_w2_a"].ne(0))

    @classmethod
    def nearest(
        cls, tensors: Mapping[str, Tensor], count: Count, parts: int = 1, core: bool = False
    ) -> dict[str, Tensor]:
        """A near one: there is no closed form. With a core each half keeps its first directions."""
        p = {name: tensors[key].double() for name, key in cls.spec.keys.items() if key in tensors}
        if core and "t1" in p:
            for n in (1, 2):
                a, t, b = f"w{n}_a", f"t{n}", f"w{n}_b"
                left, p[t], p[b] = nearest_tucker(p[a].T, p[t], p[b], count)
                p[a] = left.T
        else:
            p |= cls._near(cls._half(p, 1), cls._half(p, 2), count, parts)
            p = {name: t for name, t in p.items() if name not in ("t1", "t2")}
        return {cls.spec.keys[name]: t.to(tensors[cls.spec.keys[name]].dtype).contiguous() for name, t in p.items()}

    @staticmethod
    def _near(
        first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], count: Count, parts: int
    ) -> dict[str, Tensor]:
        """w1_a, w1_b, w2_a and w2_b; of each part by itself, on the rows which it has."""
        pieces = list[tuple[Tensor, Update, tuple[Tensor, Tensor, Tensor]]]()
        chunks = (zip(a.chunk(parts, 1), b.chunk(parts), strict=True) for a, b in (first, second))
        for (a1, b1), (a2, b2) in zip(*chunks, strict=True):
            rows = (a1.any(1) & a2.any(1)).nonzero().flatten() if parts > 1 else torch.arange(len(a1))
            change = Update((a1[rows] @ b1) * (a2[rows] @ b2))
            pieces.append((rows, change, change.decomposed()))
        kept = max(count(s) for *_, (_, s, _) in pieces)
        found = list[tuple[Tensor, ...]]()
        for rows, change, (u, s, vh) in pieces:
            fit = nearest_hadamard(change.matrix(), u[:, :kept], s[:kept], vh[:kept])
            lefts = [first[0].new_zeros(len(first[0]), kept) for _ in range(2)]
            for left, narrow in zip(lefts, fit[::2], strict=True):
                left[rows, : narrow.shape[1]] = narrow
            rights = [F.pad(right, (0, 0, 0, kept - len(right))) for right in fit[1::2]]  # it may have fewer ranks
            found.append((lefts[0], rights[0], lefts[1], rights[1]))
        names = ("w1_a", "w1_b", "w2_a", "w2_b")
        joined = (
            torch.cat(factors, axis) for factors, axis in zip(zip(*found, strict=True), (1, 0, 1, 0), strict=True)
        )
        return dict(zip(names, joined, strict=True))

    @classmethod
    def shown_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        a, b = tensors["hada_w1_a"], tensors["hada_w1_b"]
        return (a.shape[1], b.shape[1], *tensors["hada_t1"].shape[2:]) if "hada_t1" in tensors else (len(a), b.shape[1])

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        a, b = tensors["hada_w1_a"], tensors["hada_w1_b"]
        tucker = "hada_t1" in tensors
        found = (a.shape[1] if tucker else a.shape[0], b.shape[1])
        wanted = (geometry.out_features, geometry.in_features if tucker else geometry.columns)
        if found != wanted:
            shapes = f"hada_w1_a {tuple(a.shape)} and hada_w1_b {tuple(b.shape)}"
            raise ValueError(f"{shapes} do not fit a weight of {geometry.weight_shape}")
        return b.shape[0], {"use_tucker": tucker}


@dataclass(frozen=True)
class _OverBase:
    factored: bool

    def __call__(self, adapter: LoHa, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
        p: Any = adapter._parameters
        factors = (*adapter._half(p, 1), *adapter._half(p, 2))
        return hadamard_over_base(adapter.geometry, x, weight, bias, factors, strength, self.factored)


class _FirstIndex:
    """Gate for the R * R wide middle: a dropped rank index i takes its whole row ij along, as in the matrix form."""

    def __init__(self, gate: Gate, dim: int) -> None:
        self.gate, self.dim, self.uniform = gate, dim, gate.uniform

    def rank(self, h: Tensor, dim: int) -> Tensor:
        dim %= h.dim()
        return self.gate.rank(h.unflatten(dim, (self.dim, self.dim)), dim).flatten(dim, dim + 1)

    def output(self, update: Tensor) -> Tensor:
        return self.gate.output(update)
