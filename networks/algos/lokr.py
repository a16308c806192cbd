"""LoKr: the Kronecker product of a small and a larger matrix (2309.14859).

    dW = kron(w1 [A, C], w2 [B, D, *kernel])        O = A B,  I = C D
    w1 = w1_a w1_b     with decompose_both, if R < max(A, C) / 2
    w2 = w2_a w2_b     if R < max(B, D) / 2 and R <= 5120, unless full_matrix
    Tucker (K > 1):    w2[b, d, k] = sum_ij w2_a[i, b] t2[i, j, k] w2_b[j, d]

    Perturbed start (init_lokr_norm=n):  w1 = 1,  w2 = n (m + d z)

There m and d are mean and standard deviation of W, and z are normal numbers, shifted and scaled to mean 0 and standard
deviation 1 (each deviation by N - 1): SimpleTuner's `init_lokr_network_with_perturbed_normal`, for whole factors as
there. The update is then about n times as large as W.

If both are whole there is no rank: the scale is 1 whatever alpha says. The product is applied by reshaping the input
to [.., C, D], never built:  y[.., a, b] = sum_c w1[a, c] (sum_d w2[b, d] x[.., c, d]).

Parameters (saved as lokr_w1, lokr_w1_a, lokr_w1_b, lokr_w2, lokr_w2_a, lokr_w2_b, lokr_t2)
    w1    [A, C], or w1_a [A, R] and w1_b [R, C]    start: uniform 1 / sqrt(fan in)
    w2    [B, D, *kernel]                           start: 0 (with a scalar: as w1)
    w2_a  [B, R]; Tucker [R, B]                     start: as w1
    w2_b  [R, D * K]; Tucker [R, D]                 start: 0 (with a scalar: as w1)
    t2    [R, R, *kernel], Tucker only              start: as w1
    scalar, 0-d, with use_scalar only               start: 0
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..records.lokr import LOKR
from ..tensors.factor import factorization
from ..tensors.fused import FEW, Call, OverBase
from ..tensors.fused_kronecker import kronecker_over_base
from ..tensors.geometry import Geometry, RowRanges, cast_to_input
from ..tensors.low_rank import NO_GATE, Gate, nearest_products, refactor, square_sums
from ..tensors.tucker import core_times_right, nearest_tucker
from .additive import Additive
from .base import kaiming_
from .saved import Count, Layout, alike, concatenated, each, there, wide_dtype

HALVES = ("w1", "w2")
LARGE = 5120  # a dim above it means a whole second factor, whatever the width
Split = tuple[tuple[int, int], tuple[int, int]]  # (A, B), (C, D)


class LoKr(Additive):
    spec = LOKR

    w1: nn.Parameter
    w2: nn.Parameter
    w2_b: nn.Parameter
    perturbed: tuple[float, int] | None = None  # size and seed of a start that waits for the base weight

    @classmethod
    def layout(
        cls,
        geometry: Geometry,
        dim: int,
        use_tucker: bool = False,
        use_scalar: bool = False,
        factor: int = -1,
        decompose_both: bool = False,
        full_matrix: bool = False,
        unbalanced_factorization: bool = False,
        split: Split | None = None,
        whole: tuple[bool, bool] | None = None,
    ) -> Layout:
        """Shapes and rank of its factors.

        Args:
            geometry: of the layer.
            dim: R.
            use_tucker, use_scalar: see the file's head.
            factor: the wanted size of A and C, see `factorization`.
            decompose_both: w1 as a product, too, where R is small enough.
            full_matrix: both factors whole.
            unbalanced_factorization: A and B change places.
            split: ((A, B), (C, D)), what a file holds; None = by the options above.
            whole: whether w1 and w2 are whole in a file; None = by the options above.
        """
        (A, B), (C, D) = split or cls._split(geometry, factor, unbalanced_factorization)
        if whole is None:
            low = decompose_both and dim < max(A, C) / 2, dim < max(B, D) / 2 and dim <= LARGE
            whole = (True, True) if full_matrix else (not low[0], not low[1])
        shapes: dict[str, tuple[int, ...]] = {"w1": (A, C)} if whole[0] else {"w1_a": (A, dim), "w1_b": (dim, C)}
        shapes |= {"w2": (B, D, *geometry.kernel)} if whole[1] else cls._low_rank_w2(geometry, (B, D), dim, use_tucker)
        if use_scalar:
            shapes["scalar"] = ()
        # Grouped convolutions have no reshaped form, so no rank activation either.
        return Layout(shapes, None if all(whole) else dim, rank_axis=not whole[1] and geometry.groups == 1)

    @staticmethod
    def _low_rank_w2(geometry: Geometry, size: tuple[int, int], dim: int, tucker: bool) -> dict[str, tuple[int, ...]]:
        B, D = size
        if tucker and geometry.has_kernel:
            return {"t2": (dim, dim, *geometry.kernel), "w2_a": (dim, B), "w2_b": (dim, D)}
        return {"w2_a": (B, dim), "w2_b": (dim, D * geometry.kernel_size)}

    @classmethod
    def remark(cls, layout: Layout, dim: int, options: Mapping[str, Any]) -> str:
        if layout.shapes.get("w1") != (1, 1):
            return ""
        return "a first factor of one number, so that nothing is split: factor=-1 splits next to the square root"

    @classmethod
    def caution(cls, layout: Layout, dim: int, options: Mapping[str, Any]) -> tuple[str, str]:
        if layout.rank is not None or options.get("full_matrix"):
            return "", ""
        lower = (max(layout.shapes["w2"][:2]) - 1) // 2
        words = f"whole factors, as their dim, {dim} in this one, reaches half of the larger one"
        meant = "full_matrix=True if it is meant"
        return words, f"a dim of at most {lower}, or {meant}" if lower else meant

    @staticmethod
    def _split(geometry: Geometry, factor: int, unbalanced: bool) -> Split:
        A, B = factorization(geometry.out_features, factor)
        return ((B, A) if unbalanced else (A, B)), factorization(geometry.in_features, factor)

    def reset_parameters(self) -> None:
        for p in self.parameters():
            if p.dim() > 1:
                kaiming_(p)
        if self.scalar is not None:
            nn.init.zeros_(self.scalar)
        else:
            nn.init.zeros_(self.w2 if "w2" in self.laid_out.shapes else self.w2_b)

    # -- the perturbed start

    @classmethod
    def no_perturbed_start(cls, layout: Layout, options: Mapping[str, Any]) -> str:
        if options.get("use_scalar"):
            return "use_scalar would start it at 0 times that: leave it out"
        return "" if layout.rank is None else "it is for whole factors, and one is a product: full_matrix=True"

    def perturb_(self, size: float) -> None:
        """The seed is drawn now, where start values are, and the numbers from it on the CPU, whatever the device."""
        self.perturbed = size, int(torch.randint(2**62, (), device="cpu"))

    @property
    def wants_base(self) -> bool:
        return self.perturbed is not None

    @property
    def needs_base(self) -> bool:
        return self.wants_base

    def mark_initialised_(self) -> None:
        self.perturbed = None

    def init_from_base(self, weight: Tensor) -> None:
        if self.perturbed is None:
            return
        size, seed = self.perturbed
        z = torch.randn(self.w2.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype)
        z = (z - z.mean()).div(z.std() if z.numel() > 1 else 1).to(weight.device)
        self.w1.fill_(1 / self.plus_unit)
        self.w2.copy_(size * (weight.mean() + weight.std() * z))
        change, whole = self.norm() * self.plus_unit, torch.linalg.vector_norm(weight)
        self.start_size = float(change / whole) if bool(whole) else 0.0
        self.mark_initialised_()

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        super().unpack_(tensors)
        self.mark_initialised_()
        self.start_size = None

    # -- the mathematics

    @staticmethod
    def _w1(p: Mapping[str, Tensor]) -> Tensor:
        return p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]

    def _w2_factors(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """w2 as ([B, R], [R, D, *kernel])."""
        if "t2" in p:
            return p["w2_a"].T, core_times_right(p["t2"], p["w2_b"])
        return p["w2_a"], p["w2_b"].reshape(self.dim, -1, *self.geometry.kernel)

    def _w2(self, p: Mapping[str, Tensor], rank_mask_R: Tensor | None = None) -> Tensor:
        if "w2" in p:
            return p["w2"]
        left_BR, right_RDK = self._w2_factors(p)
        if rank_mask_R is not None:
            left_BR = left_BR * rank_mask_R
        return (left_BR @ right_RDK.flatten(1)).reshape(-1, *right_RDK.shape[1:])

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        p = self.values()
        w1, w2 = self._w1(p), self._w2(p, rank_mask_R)
        return _kron(w1, w2).reshape(self.geometry.weight_shape)

    def add_delta_(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        """As [A, B, C, D, *kernel], where each of the factors is spread over the axes of the other."""
        p = self.values()
        w1, w2 = (self._w1(p) * strength).to(weight), self._w2(p).to(weight)
        ones = [1] * len(self.geometry.kernel)
        blocks = weight.unflatten(0, (len(w1), -1)).unflatten(2, (w1.shape[1], -1))
        blocks.addcmul_(w1[:, None, :, None].reshape(len(w1), 1, -1, 1, *ones), w2[None, :, None])
        return weight

    def product(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of kron(l1, l2) and kron(r1, r2), of as few ranks as the factors' own shapes allow."""
        p = self.values()
        l1, r1 = (p["w1_a"], p["w1_b"]) if "w1_a" in p else _thinner(p["w1"])
        l2, r2 = _thinner(p["w2"].flatten(1)) if "w2" in p else self._w2_factors(p)
        r2 = r2.reshape(r2.shape[0], -1, *self.geometry.kernel)
        right = torch.einsum("pc,qd...->pqcd...", r1, r2)
        left = torch.einsum("ap,bq->abpq", l1, l2).flatten(2).flatten(0, 1)
        return left, right.reshape(-1, *self.geometry.weight_shape[1:])

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        p = self.factors(x)
        w1 = cast_to_input(self._w1(p), x)
        if "w2" in p and gate.uniform:
            w1, gate = gate.output(w1), NO_GATE  # the smallest tensor in sight
        form = self._conv if self.geometry.is_conv else self._linear
        return form(x, p, w1, gate)

    def _linear(self, x: Tensor, p: Mapping[str, Tensor], w1_AC: Tensor, gate: Gate) -> Tensor:
        C = w1_AC.shape[1]
        h = x.unflatten(-1, (C, -1))  # [.., C, D]
        if "w2" in p:
            w2_DB = p["w2"].T
            h = _mix(w1_AC, h) @ w2_DB if self._w1_first(1.0) else _mix(w1_AC, h @ w2_DB)
            return gate.output(h.flatten(-2))
        left_BR, right_RD = self._w2_factors(p)
        h = gate.rank(h @ right_RD.T, -1)  # [.., C, R]
        return (_mix(w1_AC, h) @ left_BR.T).flatten(-2)

    def _conv(self, x: Tensor, p: Mapping[str, Tensor], w1_AC: Tensor, gate: Gate) -> Tensor:
        """Samples and the C axis share the batch axis of the convolution, so W1 is one product per sample."""
        geometry, (A, C) = self.geometry, w1_AC.shape
        batch = x.shape[0]
        h = x.unflatten(1, (C, -1))  # [batch, C, D, *space]
        if "w2" in p:
            if self._w1_first(_ratio(geometry, x)):
                h = _mix_image(w1_AC, h)
                y = geometry.convolve(h.flatten(0, 1), p["w2"], 1).unflatten(0, (batch, A))
            else:
                y = _mix_image(w1_AC, geometry.convolve(h.flatten(0, 1), p["w2"], 1).unflatten(0, (batch, C)))
            y = gate.output(y)
        else:
            left_BR, right_RDK = self._w2_factors(p)
            h = geometry.convolve(h.flatten(0, 1), right_RDK, 1).unflatten(0, (batch, C))
            h = _mix_image(w1_AC, gate.rank(h, 2))  # [batch, A, R, *space]
            y = geometry.pointwise(h.flatten(0, 1), left_BR).unflatten(0, (batch, A))
        return y.flatten(1, 2)

    def _costs(self, ratio: float) -> tuple[float, float]:
        """Products per output position of a whole w2: (w2 then w1, w1 then w2); ratio = input / output positions."""
        (A, C), (B, D, *_) = self._w1_shape(), self.laid_out.shapes["w2"]
        K = self.geometry.kernel_size
        return B * C * D * K + A * B * C, ratio * A * C * D + A * B * D * K

    def _w1_shape(self) -> tuple[int, int]:
        if "w1" in self.laid_out.shapes:
            return self.laid_out.shapes["w1"][0], self.laid_out.shapes["w1"][1]
        return self.laid_out.shapes["w1_a"][0], self.laid_out.shapes["w1_b"][1]

    def _w1_first(self, ratio: float) -> bool:
        second, first = self._costs(ratio)
        return first < second

    def over_base(self, call: Call) -> OverBase | None:
        whole = super().over_base(call)
        if whole is not None:
            return whole
        positions = math.prod(call.shape) // self.geometry.in_features
        if "w2" not in self.laid_out.shapes:
            return _OverBase(True, True)
        first = self._w1_first(positions / max(1, call.tokens) if self.geometry.is_conv else 1.0)
        return _OverBase(left=first, right=not first)

    def flops(self, tokens: int) -> tuple[float, float]:
        g, R = self.geometry, self.dim
        O, J, N = g.out_features, g.columns, g.out_features * g.columns
        materialised = 6.0 * tokens * N + 2 * N
        if g.groups > 1:
            return float("inf"), materialised
        if "w2" in self.laid_out.shapes:
            return 6.0 * tokens * min(self._costs(1.0)), materialised
        A, C = self._w1_shape()
        return 6.0 * tokens * R * (J + A * C + O), materialised

    def rows(self, start: int, stop: int) -> Tensor:
        p = self.values()
        w1, w2 = self._w1(p), self._w2(p)
        B = w2.shape[0]
        first = start // B
        blocks = _kron(w1[first : -(-stop // B)], w2)
        rows = blocks.reshape(-1, *self.geometry.weight_shape[1:])
        return rows[start - first * B : stop - first * B]

    def apply_rows(self, x: Tensor, gate: Gate, row_ranges: RowRanges) -> Tensor:
        """Whole blocks of w2's rows stay factored: they are rows of w1."""
        p = self.factors(x)
        w1, B = cast_to_input(self._w1(p), x), self.geometry.out_features // self._w1_shape()[0]
        if any(start % B or stop % B for start, stop in row_ranges):
            return super().apply_rows(x, gate, row_ranges)
        return self._linear(x, p, torch.cat([w1[start // B : stop // B] for start, stop in row_ranges]), gate)

    def norm_sq(
        self, weight: Tensor, strength: float | Tensor, on_output: bool, row_ranges: RowRanges | None = None
    ) -> Tensor:
        """<W, kron(w1, w2)> by contraction with the factors; ||kron||^2 of a row is a product of two rows'. W is not
        widened where it is in half precision. A small one is added up as it is."""
        if row_ranges is not None or weight.numel() <= FEW:
            return super().norm_sq(weight, strength, on_output, row_ranges)
        p, wide = self._parameters, torch.promote_types(weight.dtype, torch.float32)
        w1, w2 = self._w1(p).to(wide), self._w2(p).to(wide)  # type: ignore[arg-type]
        (A, C), (B, D) = w1.shape, w2.shape[:2]
        w2 = w2.reshape(B, D, -1)
        if on_output:  # first the sum over c, which reads W as it lies
            rows = w1.to(weight.dtype)[:, None, None].expand(A, B, 1, C).reshape(A * B, 1, C)
            found = torch.bmm(rows, weight.reshape(A * B, C, -1)).reshape(A, B, -1)
            cross = (found * w2.reshape(B, -1)).sum(2)
            own = torch.outer(w1.square().sum(1), w2.square().sum((1, 2)))
            squares = square_sums(weight.flatten(1), 1)
        else:
            W = weight.reshape(A, B, C, D, -1)
            found = torch.einsum("abcdk,bdk->acd", W, w2.to(weight.dtype))
            cross = torch.einsum("acd,ac->cd", found.to(wide), w1)
            own = torch.outer(w1.square().sum(0), w2.square().sum((0, 2)))
            squares = square_sums(weight.transpose(0, 1).flatten(1), 1)
        more = (own * strength).add_(cross, alpha=2) * strength
        return squares.add_(more.flatten()).clamp_min_(0)

    def norm(self) -> Tensor:
        """||kron(w1, w2)|| = ||w1|| ||w2||."""
        p = self.values()
        return torch.linalg.vector_norm(self._w1(p)) * torch.linalg.vector_norm(self._w2(p))

    @classmethod
    def join(
        cls, packs: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int], alpha: float | None = None
    ) -> dict[str, Tensor] | None:
        """Only parts which share the second factor, or that of a larger layer's rows."""
        present = there(packs)
        first = "lokr_w1" if "lokr_w1" in present[0] else "lokr_w1_a"
        if not alike(present, {key for pack in present for key in pack} - {first}):
            return None
        B = cls._rows_of_w2(present[0])
        if not all(first in pack for pack in present) or any(size % B for size in sizes):
            return None
        return {**present[0], first: concatenated(each(packs, first), [size // B for size in sizes])}

    @classmethod
    def take(
        cls, tensors: Mapping[str, Tensor], alpha: float | None, start: int, stop: int
    ) -> tuple[dict[str, Tensor], float | None] | None:
        B = cls._rows_of_w2(tensors)
        if start % B or stop % B:
            return None
        first = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
        return {**tensors, first: tensors[first][start // B : stop // B]}, alpha

    @classmethod
    def nearest(
        cls, tensors: Mapping[str, Tensor], count: Count, parts: int = 1, core: bool = False
    ) -> dict[str, Tensor]:
        """Of each factor that has ranks the nearest one: its relative error is that of the Kronecker product."""
        own = {name: tensors[key] for name, key in cls.spec.keys.items() if key in tensors}
        p, low = {name: t.double() for name, t in own.items()}, [half for half in HALVES if f"{half}_a" in own]
        if not low:
            raise ValueError("both factors of this LoKr are whole: it has no ranks")
        if "t2" in p and core:
            left, p["t2"], p["w2_b"] = nearest_tucker(p["w2_a"].T, p["t2"], p["w2_b"], count)
            p["w2_a"], count = left.T, functools.partial(_given, len(p["w2_b"]))
            low.remove("w2")
        elif "t2" in p:
            p["w2_a"], p["w2_b"] = p["w2_a"].T, core_times_right(p.pop("t2"), p["w2_b"]).flatten(1)
        pairs = nearest_products([(p[f"{half}_a"], p[f"{half}_b"]) for half in low], count)
        for half, (left, right) in zip(low, pairs, strict=True):
            p |= {f"{half}_a": left, f"{half}_b": right}
        return {cls.spec.keys[name]: t.to(own[name].dtype).contiguous() for name, t in p.items()}

    def resized(self, tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[Mapping[str, Tensor], float | None]:
        """A factor may be whole here and a product in the file, or the other way about: the dim decides that."""
        rank, wanted = self.spec.shown_rank(tensors), self.laid_out.rank
        scale = alpha / rank if alpha and rank else 1.0
        if self._first_shape(tensors) != self._w1_shape():  # of another factor
            return tensors, alpha
        p = self._in_form({name: tensors[key] for name, key in self.spec.keys.items() if key in tensors})
        found = {self.spec.keys[name]: t for name, t in p.items()}
        if wanted is None:
            key = self.spec.keys["w1"]
            return {**found, key: found[key] * scale}, None
        if max(len(p[name]) for name in ("w1_b", "w2_b") if name in p) > wanted:
            core = "t2" in self.laid_out.shapes
            found = self.nearest(found, lambda values: min(wanted, len(values)), core=core)
        return self.grown(found, self.pack()), scale * wanted

    @staticmethod
    def _first_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(A, C)."""
        whole = tensors.get("lokr_w1")
        left, right = (whole, whole) if whole is not None else (tensors["lokr_w1_a"], tensors["lokr_w1_b"])
        return len(left), right.shape[1]

    def _in_form(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each factor whole, or a product, as it is here: exact, or as nearly as this dim allows."""
        for half in HALVES:
            if half in self.laid_out.shapes and half not in p:
                p[half] = self._made_whole(p, half)
            elif half not in self.laid_out.shapes and half in p:
                p |= self._divided(p.pop(half), half)
        return p

    def _made_whole(self, p: dict[str, Tensor], half: str) -> Tensor:
        """A factor [.., .., *kernel] that is a product in a file, whose tensors go."""
        left, right = p.pop(f"{half}_a"), p.pop(f"{half}_b")
        if half == "w2" and "t2" in p:
            left, right = left.T, core_times_right(p.pop("t2"), right)
        found = left.double() @ right.double().flatten(1)
        return found.reshape(len(left), -1, *(self.geometry.kernel if half == "w2" else ())).to(wide_dtype(left))

    def _divided(self, whole: Tensor, half: str) -> dict[str, Tensor]:
        """The other way about."""
        wide, dtype = whole.double(), wide_dtype(whole)
        if half == "w2" and "t2" in self.laid_out.shapes:
            rows, columns = (torch.eye(size, dtype=wide.dtype, device=wide.device) for size in wide.shape[:2])
            left, core, right = nearest_tucker(rows, wide, columns, functools.partial(_given, self.dim))
            return {"w2_a": left.T.to(dtype), "t2": core.to(dtype), "w2_b": right.to(dtype)}
        left, right, _ = refactor(*_thinner(wide.flatten(1)), self.dim)
        return {f"{half}_a": left.to(dtype), f"{half}_b": right.to(dtype)}

    @classmethod
    def shown_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        A = len(tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"])
        C = (tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_b"]).shape[1]
        w2 = tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_b"]
        kernel = tensors["lokr_t2"].shape[2:] if "lokr_t2" in tensors else w2.shape[2:]
        return A * cls._rows_of_w2(tensors), C * w2.shape[1], *kernel

    @staticmethod
    def _rows_of_w2(tensors: Mapping[str, Tensor]) -> int:
        """B."""
        left = tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"]
        return left.shape[1 if "lokr_t2" in tensors else 0]

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        """The file does not state the factor; the shapes of w1 and w2 do."""
        t = {name: tensors[suffix].shape for name, suffix in cls.spec.keys.items() if suffix in tensors}
        tucker, whole = "t2" in t, ("w1" in t, "w2" in t)
        A, C = t["w1"] if whole[0] else (t["w1_a"][0], t["w1_b"][1])
        if whole[1]:
            B, D = t["w2"][:2]
        else:
            B = t["w2_a"][1 if tucker else 0]
            D = t["w2_b"][1] if tucker else t["w2_b"][1] // geometry.kernel_size
        if (A * B, C * D) != (geometry.out_features, geometry.in_features):
            raise ValueError(
                f"lokr factors of a {A * B} x {C * D} weight do not fit a weight of {geometry.weight_shape}"
            )
        dim = t["w1_b"][0] if not whole[0] else t["w2_b"][0] if not whole[1] else 0
        return int(dim), {"use_tucker": tucker, "split": ((A, B), (C, D)), "whole": whole}

    @classmethod
    def asked_as(cls, geometry: Geometry, dim: int, options: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """A factor is the larger bound of A and C, or of B and D, where these are the smaller ones."""
        (A, B), (C, D) = options["split"]
        found = super().asked_as(geometry, dim or 1, options)
        switches = dict.fromkeys(("full_matrix", "decompose_both", "unbalanced_factorization"), (False, True))
        return {**found, "factor": (-1, *dict.fromkeys((max(A, C), A, C, B, D))), **switches}


def _given(number: int, values: Tensor) -> int:
    return number


def _thinner(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix as a product with the identity, on its smaller side."""
    rows, columns = matrix.shape
    one = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    return (one, matrix) if rows < columns else (matrix, one)


@dataclass(frozen=True)
class _OverBase:
    """Which parts the second factor has: a whole one comes last, as `left`, or first, as `right`."""

    left: bool
    right: bool

    def __call__(self, adapter: LoKr, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
        p: Any = adapter._parameters
        w1 = p["w1"] if "w1" in p else adapter._w1(p)
        if not (self.left and self.right):
            left, right = (p["w2"] if part else None for part in (self.left, self.right))
        elif "t2" in p:
            left, right = adapter._w2_factors(p)
        else:
            left, right = p["w2_a"], p["w2_b"]
        return kronecker_over_base(adapter.geometry, x, weight, bias, w1, left, right, strength)


def _kron(w1_AC: Tensor, w2: Tensor) -> Tensor:
    """[A, B, C, D, *kernel], which lies as the weight [A B, C D, *kernel] does."""
    return w1_AC.reshape(len(w1_AC), 1, -1, 1, *[1] * (w2.dim() - 2)) * w2[None, :, None]


def _mix(w1_AC: Tensor, h: Tensor) -> Tensor:
    """[.., C, n] -> [.., A, n]. As `w1_AC @ h`, which would fold the leading axes into the columns: that copies h on
    the way in and out, and keeps the copy for backward."""
    flat = h.reshape(-1, *h.shape[-2:])
    mixed = torch.bmm(w1_AC.expand(flat.shape[0], *w1_AC.shape), flat)
    return mixed.reshape(*h.shape[:-2], *mixed.shape[1:])


def _mix_image(w1_AC: Tensor, h: Tensor) -> Tensor:
    """[batch, C, n, *space] -> [batch, A, n, *space]: one matrix product per sample over all the rest."""
    return _mix(w1_AC, h.flatten(2)).unflatten(-1, h.shape[2:])


def _ratio(geometry: Geometry, x: Tensor) -> float:
    """Input positions per output position (4 for a stride of 2 x 2)."""
    positions = x.numel() // (geometry.in_features * geometry.groups)
    return positions / max(1, geometry.tokens(x))
