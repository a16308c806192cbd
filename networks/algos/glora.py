"""GLoRA: a low-rank change of what goes into the layer, beside one of its weight (2306.07967).

    dW = W A + B        A = a1 a2 [I, I],  B = b1 b2 [O, I, *kernel]        both of rank R

In a convolution A acts on the channels, in front of it; with groups, on those of each group alike.

base(x + A x) is one pass, too, but its update is never apart from the base's output, where DoRA, regions and fused
layers of several modules need it, and A x is rounded beside x (in bf16, a thousandth of x is off by 80 %). A second
pass, base(A x), doubles the cost. So W a1 [O, R] is computed instead, one product of R columns, R / T of a pass over T
tokens. With it both terms are low-rank chains of the input, (W a1)(a2 x) + b1 (b2 x), which are added to the base's
output as any other update: the base runs once, on its own input, and its bias counts once. W is read in whatever form
it is stored and not kept (layers.site); its own dtype is good enough for W a1 in half precision.

Parameters (saved as a1.weight, a2.weight, b1.weight, b2.weight; LyCORIS' layout since 2024)
    a1  [I, R, 1...]                                start: uniform 1 / sqrt(fan in)
    a2  [R, I, 1...]                                start: 0 (with a scalar: as a1)
    b1  [O, R, 1...]                                start: as a1
    b2  [R, I, *kernel]                             start: 0 (with a scalar: as a1)
    scalar, 0-d, with use_scalar only               start: 0; saved as part of a2 and b2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..records.glora import GLORA
from ..tensors.fused import Call, OverBase
from ..tensors.fused_glora import glora_over_base
from ..tensors.geometry import Geometry, RowRanges, cast_to_input
from ..tensors.low_rank import Gate, low_rank, nearest_products, product_norm_sq, sum_norm_sq
from ..tensors.per_thread import PerThread
from ..tensors.products import OfWeight, Products, weight_times
from .additive import Additive, add_product_
from .base import kaiming_
from .saved import Count, Layout, alike, block_diagonal, there, wide_dtype

FACTORS = ("a1", "a2", "b1", "b2")


class _On:
    """The base on which a thread uses the mathematics."""

    def __init__(self) -> None:
        self.base: Products | None = None


class GLoRA(Additive):
    spec = GLORA

    a1: nn.Parameter
    a2: nn.Parameter
    b2: nn.Parameter

    def __init__(self, geometry: Geometry, dim: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(geometry, dim, options)
        self._on = PerThread(_On)

    @classmethod
    def layout(cls, geometry: Geometry, dim: int, use_scalar: bool = False) -> Layout:
        O, I, ones = geometry.out_features, geometry.in_features, geometry.ones
        shapes: dict[str, tuple[int, ...]] = {"a1": (I, dim, *ones), "a2": (dim, I, *ones)}
        shapes |= {"b1": (O, dim, *ones), "b2": (dim, I, *geometry.kernel)}
        if use_scalar:
            shapes["scalar"] = ()
        return Layout(shapes, rank=dim, rank_axis=True)

    def reset_parameters(self) -> None:
        for name in FACTORS:
            kaiming_(self.get_parameter(name))
        for p in (self.a2, self.b2) if self.scalar is None else (self.scalar,):
            nn.init.zeros_(p)

    def on(self, base: Products) -> GLoRA:
        self._on.mine.base = base
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the adapter is none of the base."""
        return self.__dict__ | {"_on": PerThread(_On)}

    def change_norm(self, weight: Callable[[], Tensor], strength: float | Tensor) -> Tensor:
        return super(GLoRA, self.on(OfWeight(weight()))).change_norm(weight, strength)

    @property
    def mask_size(self) -> int:
        return 2 * self.dim

    def _factors(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W a1 [O, R, *kernel], a2 [R, I], b1 [O, R], b2 [R, I, *kernel]."""
        base = self._on.mine.base
        assert base is not None, "GLoRA reads its base: use adapter.on(...)"
        return base.times(p["a1"].flatten(1)), p["a2"].flatten(1), p["b1"].flatten(1), p["b2"]

    def _joined(self, p: Mapping[str, Tensor], row_ranges: RowRanges | None = None) -> tuple[Tensor, Tensor]:
        """The same without kernel as one pair of factors, [O, 2R] and [2R, I, 1...]."""
        Wa, a2, b1, b2 = self._factors(p)
        if row_ranges is not None:
            b1 = torch.cat([b1[start:stop] for start, stop in row_ranges])
        return torch.cat([Wa.flatten(1).to(b1.dtype), b1], 1), torch.cat([a2.reshape(b2.shape), b2])

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        Wa, a2, b1, b2 = self._factors(self.values())
        if rank_mask_R is not None:
            mask_a, mask_b = rank_mask_R.chunk(2)
            a2, b1 = a2 * mask_a[:, None], b1 * mask_b
        return weight_times(Wa, a2) + (b1 @ b2.flatten(1)).reshape(self.geometry.weight_shape)

    def add_delta_(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        if self.geometry.has_kernel:
            return super().add_delta_(weight, strength)
        left, right = self._joined(self.values())
        return add_product_(weight, left * strength, right)

    def product(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """W A has a rank for each position of a kernel, where B has one."""
        assert weight is not None
        Wa, a2, b1, b2 = self.on(OfWeight(weight))._factors(self.values())
        one = torch.eye(self.geometry.kernel_size, dtype=a2.dtype, device=a2.device)
        each = torch.einsum("ri,kl->rkil", a2, one).reshape(-1, *self.geometry.weight_shape[1:])
        return torch.cat([Wa.flatten(1).to(b1.dtype), b1], 1), torch.cat([each, b2.reshape(-1, *each.shape[1:])])

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        p, geometry = self.factors(x), self.geometry
        if not geometry.has_kernel:
            up_OR, down_RI = self._joined(p)
            return low_rank(geometry, x, down_RI, up_OR, gate)
        Wa, a2, b1, b2 = self._factors(p)
        groups = geometry.groups
        h = geometry.pointwise(x, a2.repeat(groups, 1), groups).unflatten(1, (groups, -1))
        update = geometry.convolve(gate.rank(h, 2).flatten(1, 2), cast_to_input(Wa, x), groups)
        return update + low_rank(geometry, x, b2, b1, gate)

    def apply_rows(self, x: Tensor, gate: Gate, row_ranges: RowRanges) -> Tensor:
        """The base knows the rows of those ranges only."""
        up_OR, down_RI = self._joined(self.factors(x), row_ranges)
        return F.linear(gate.rank(F.linear(x, down_RI), -1), up_OR)

    def norm_sq(
        self, weight: Tensor, strength: float | Tensor, on_output: bool, row_ranges: RowRanges | None = None
    ) -> Tensor:
        if not self.geometry.has_kernel:
            up_OR, down_RI = self._joined(self.values(), row_ranges)
            return sum_norm_sq(weight, strength * up_OR, down_RI, on_output)
        squares = (weight + strength * self.delta()).square()
        return squares.flatten(1).sum(1) if on_output else squares.transpose(0, 1).flatten(1).sum(1)

    def norm(self) -> Tensor:
        if self.geometry.has_kernel:
            return super().norm()
        up_OR, down_RI = self._joined(self.values())
        return torch.sqrt(product_norm_sq(up_OR, down_RI.flatten(1)).sum())

    def over_base(self, call: Call) -> OverBase | None:
        return _over_base if call.cheaper_factored(self.flops(call.tokens)) else super().over_base(call)

    def flops(self, tokens: int) -> tuple[float, float]:
        """With a kernel those of the form in front of the base, which half precision cannot take."""
        g, R = self.geometry, self.dim
        O, I, J, N = g.out_features, g.in_features * g.groups, g.columns * g.groups, g.out_features * g.columns
        if g.has_kernel and g.groups == 1:
            return 6 * tokens * R * (2 * I + J + O), 6 * tokens * N + 16 * N * R
        chains = R * (I + O * g.kernel_size) + R * (J + O)
        return 6 * tokens * chains + 4 * N * R, 6 * tokens * N + 16 * N * R

    @property
    def plus_gain(self) -> float:
        """Each of the two terms has one plus factor."""
        return float(self.plus_unit)

    def rescale_(self, ratio: float | Tensor) -> None:
        with torch.no_grad():
            for name in FACTORS:
                self.get_parameter(name).mul_(ratio**0.5)
            if self.bias_parameter is not None:
                self.bias_parameter.mul_(ratio)

    def pack(self) -> dict[str, Tensor]:
        packed = super().pack()
        if self.scalar is not None:
            packed["a2.weight"] = packed["a2.weight"] * self.scalar.detach()
        return packed

    @classmethod
    def settled(cls, tensors: Mapping[str, Tensor], alpha: float | None) -> dict[str, Tensor] | None:
        """Both terms, where the record names the factor of one."""
        found, key = super().settled(tensors, alpha), "a2.weight"
        if found is not None and alpha:
            found[key] = tensors[key].to(wide_dtype(tensors[key])) * (alpha / len(tensors[key]))
        return found

    @classmethod
    def join(
        cls, packs: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int], alpha: float | None = None
    ) -> dict[str, Tensor] | None:
        """Only parts which change the input alike: all have one A. Their B are joined as those of LoRA."""
        present = there(packs)
        if len(present) < len(packs) or not alike(present, ("a1.weight", "a2.weight")):
            return None
        if alike(present, ("b2.weight",)):
            return {**present[0], "b1.weight": torch.cat([pack["b1.weight"] for pack in present])}
        b1 = block_diagonal([pack["b1.weight"] for pack in present])
        b2 = torch.cat([pack["b2.weight"] for pack in present])
        a1, a2 = present[0]["a1.weight"], present[0]["a2.weight"]
        more = b1.shape[1] - a1.shape[1]
        a1 = torch.cat([a1, a1.new_zeros(len(a1), more, *a1.shape[2:])], 1)
        return {
            "a1.weight": a1,
            "a2.weight": torch.cat([a2, a2.new_zeros(more, *a2.shape[1:])]),
            "b1.weight": b1,
            "b2.weight": b2,
        }

    @classmethod
    def take(
        cls, tensors: Mapping[str, Tensor], alpha: float | None, start: int, stop: int
    ) -> tuple[dict[str, Tensor], float | None]:
        return {**tensors, "b1.weight": tensors["b1.weight"][start:stop]}, alpha

    @classmethod
    def shown_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return len(tensors["b1.weight"]), *tensors["b2.weight"].shape[1:]

    @classmethod
    def nearest(
        cls, tensors: Mapping[str, Tensor], count: Count, parts: int = 1, core: bool = False
    ) -> dict[str, Tensor]:
        """The nearest A and the nearest B: what W A changes is known with the base weight alone."""
        own = {name: tensors[cls.spec.keys[name]] for name in FACTORS}
        wide = {name: t.double().flatten(1) for name, t in own.items()}
        pairs = nearest_products([(wide["a1"], wide["a2"]), (wide["b1"], wide["b2"])], count)
        found = dict(zip(FACTORS, (factor for pair in pairs for factor in pair), strict=True))
        shaped = {
            name: t.reshape(
                *((len(t), *own[name].shape[1:]) if name in ("a2", "b2") else (*t.shape, *own[name].shape[2:]))
            )
            for name, t in found.items()
        }
        return {**tensors, **{cls.spec.keys[name]: t.to(own[name].dtype).contiguous() for name, t in shaped.items()}}

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        shapes = {name: tuple(tensors[cls.spec.keys[name]].shape) for name in FACTORS}
        dim = shapes["a2"][0]
        wanted = {name: shape[:2] for name, shape in cls.layout(geometry, dim).shapes.items()}
        if any(shape[:2] != wanted[name] for name, shape in shapes.items()):
            raise ValueError(
                f"glora factors {', '.join(f'{name} {shape}' for name, shape in shapes.items())} do not fit a weight "
                f"of {geometry.weight_shape} (LyCORIS files from before 2024 have a1 with a2 and b1 with b2 swapped)"
            )
        return dim, {}


def _over_base(adapter: GLoRA, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
    p: Any = adapter._parameters
    return glora_over_base(adapter.geometry, x, weight, bias, tuple(p[name] for name in FACTORS), strength)
