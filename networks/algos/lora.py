"""LoRA and its convolutional form LoCon (2106.09685, 2309.14859).

    dW = up . down                         rank R
    Tucker (convolutions with K > 1):  dW[o, i, k] = sum_ab up[o, a] mid[a, b, k] down[b, i]

    PiSSA (init=pissa):  dW = (up0 + up) . (down0 + down) - up0 . down0 = up . (down0 + down) + up0 . down

There up0 and down0 are the start, with scale * up0 . down0 the principal part of the base weight (2404.02948), with
init=milora that of its smallest singular values (2406.09044), and the parameters are what has changed since, from 0:
the base weight stays as it is, the start is the base model, no two large numbers are subtracted in a forward pass, and
half precision holds small changes of large factors. A file holds the difference, of rank 2 R, by QR and SVD.

Parameters (saved as lora_down.weight, lora_mid.weight, lora_up.weight)
    down  [R, I, *kernel]; Tucker [R, I, 1...]      start: uniform 1 / sqrt(fan in)
    mid   [R, R, *kernel], Tucker only              start: as down
    up    [O, R, 1...]                              start: 0 (with a scalar: as down)
    scalar, 0-d, with use_scalar only               start: 0
Buffers, part of the live state, with init=pissa and init=milora only: down0, up0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..records.lora import LORA
from ..tensors.fused import BesideBase, Call, OverBase
from ..tensors.fused_low_rank import low_rank_beside, low_rank_over_base
from ..tensors.geometry import Geometry, RowRanges
from ..tensors.low_rank import (
    Gate,
    low_rank,
    nearest_products,
    product_error,
    product_norm_sq,
    refactor,
    singular,
    sum_norm_sq,
)
from ..tensors.tucker import core_times_right, nearest_tucker
from .additive import Additive, add_product_
from .base import kaiming_
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
    wide_dtype,
)

PARTS = {"pissa": "principal", "milora": "last"}  # init -> which of the singular values of the base weight


class LoRA(Additive):
    spec = LORA

    down: nn.Parameter
    mid: nn.Parameter
    up: nn.Parameter
    down0: Tensor | None
    up0: Tensor | None

    def __init__(self, geometry: Geometry, dim: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(geometry, dim, options)
        self.start_scale: float | None = None  # of one that is to start from a base weight, and has not seen it yet
        self.start_part = PARTS["pissa"]
        self.register_buffer("down0", None)
        self.register_buffer("up0", None)

    @classmethod
    def layout(cls, geometry: Geometry, dim: int, use_tucker: bool = False, use_scalar: bool = False) -> Layout:
        O, I, ones = geometry.out_features, geometry.in_features, geometry.ones
        shapes: dict[str, tuple[int, ...]]
        if use_tucker and geometry.has_kernel:
            shapes = {"down": (dim, I, *ones), "mid": (dim, dim, *geometry.kernel), "up": (O, dim, *ones)}
        else:
            shapes = {"down": (dim, I, *geometry.kernel), "up": (O, dim, *ones)}
        if use_scalar:
            shapes["scalar"] = ()
        return Layout(shapes, rank=dim, rank_axis=True)

    def reset_parameters(self) -> None:
        kaiming_(self.down)
        if "mid" in self.laid_out.shapes:
            kaiming_(self.mid)
        if self.scalar is None:
            nn.init.zeros_(self.up)
        else:
            kaiming_(self.up)
            nn.init.zeros_(self.scalar)

    @classmethod
    def no_start(cls, init: str, options: Mapping[str, Any]) -> str:
        if init in PARTS and options.get("use_tucker"):
            return "use_tucker has no core for a part of a kernel: leave it out"
        if init in PARTS and options.get("use_scalar"):
            return "use_scalar would start it at 0 times that: leave it out"
        return super().no_start(init, options)

    # -- a start from the base weight

    def defer_init_(self, scale: float, init: str = "pissa") -> None:
        self.start_scale, self.start_part = scale, PARTS[init]
        if self.spec.keeps_start:
            self.down0, self.up0 = torch.zeros_like(self.down), torch.zeros_like(self.up)

    @property
    def wants_base(self) -> bool:
        return self.start_scale is not None

    @property
    def needs_base(self) -> bool:
        return self.start_scale is not None

    def mark_initialised_(self) -> None:
        self.start_scale = None

    def init_from_base(self, weight: Tensor) -> None:
        """Directions in which W has nothing keep the default start: at 0 in both factors they would never learn."""
        if self.start_scale is None:
            return
        matrix, part = weight.flatten(1), self.start_part
        u, s, vh = singular(matrix if part == "principal" else _wide(matrix), self.dim, part)
        least = s[0] * torch.finfo(s.dtype).eps * max(weight.shape[:2])
        if part != "principal":  # the largest value is not among them
            least = torch.finfo(torch.float32).eps * torch.linalg.vector_norm(matrix).to(s)
        n = int((s > least).sum())
        root = (s[:n] / self.start_scale).sqrt()
        self.down[:n] = (root[:, None] * vh[:n]).reshape(self.down[:n].shape).to(self.down)
        if self.down0 is not None and self.up0 is not None:
            self.down0.copy_(self.down)
            self.up0[:, :n] = (u[:, :n] * root / self.plus_unit).reshape(self.up0[:, :n].shape).to(self.up0)
            self.down.zero_()
        self.mark_initialised_()

    def renew_state(self, state: dict[str, Any], prefix: str) -> None:
        for name in ("down", "up"):  # of an earlier version: whole factors beside their start
            start = state.pop(f"{prefix}start_{name}", None)
            if start is not None:
                state[f"{prefix}{name}0"], state[prefix + name] = start, state[prefix + name] - start

    def values(self) -> dict[str, Tensor]:
        p = super().values()
        return p if self.down0 is None or self.up0 is None else _since(p["down"], p["up"], self.down0, self.up0)

    @property
    def mask_size(self) -> int:
        return self.dim if self.down0 is None else 2 * self.dim

    def shrink_(self, ratio: float) -> None:
        if self.down0 is None:
            return super().shrink_(ratio)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(ratio)

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        p = self.values()
        up_OR = p["up"].flatten(1)
        if rank_mask_R is not None:
            up_OR = up_OR * rank_mask_R
        return (up_OR @ self._right(p).flatten(1)).reshape(self.geometry.weight_shape)

    def add_delta_(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        p = self.values()
        return add_product_(weight, p["up"].flatten(1) * strength, self._right(p))

    def product(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        p = self.values()
        return p["up"].flatten(1), self._right(p)

    @staticmethod
    def _right(p: Mapping[str, Tensor]) -> Tensor:
        """[R, I, *kernel]: down, with the core of the Tucker form in it."""
        return core_times_right(p["mid"], p["down"].flatten(1)) if "mid" in p else p["down"]

    def rows(self, start: int, stop: int) -> Tensor:
        p = self.values()
        rows = p["up"][start:stop].flatten(1) @ self._right(p).flatten(1)
        return rows.reshape(-1, *self.geometry.weight_shape[1:])

    def apply_rows(self, x: Tensor, gate: Gate, row_ranges: RowRanges) -> Tensor:
        p = self.factors(x)
        up_OR = torch.cat([p["up"][start:stop] for start, stop in row_ranges])
        return low_rank(self.geometry, x, p["down"], up_OR, gate)

    def norm_sq(
        self, weight: Tensor, strength: float | Tensor, on_output: bool, row_ranges: RowRanges | None = None
    ) -> Tensor:
        p = self.values()
        up_OR = p["up"].flatten(1)
        if row_ranges is not None:
            up_OR = torch.cat([up_OR[start:stop] for start, stop in row_ranges])
        return sum_norm_sq(weight, strength * up_OR, self._right(p), on_output)

    def gradient_norm_sq(self) -> Tensor:
        if "mid" in self.laid_out.shapes or self.up.grad is None or self.down.grad is None:
            return super().gradient_norm_sq()
        down, up = self.down.detach(), self.up.detach()
        if self.down0 is not None and self.up0 is not None:
            down, up = self.down0 + down, self.up0 + up
        left = torch.cat([up, self.up.grad], 1).flatten(1)
        right = torch.cat([self.down.grad, down]).flatten(1)
        return product_norm_sq(left, right)

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        p, geometry = self.factors(x), self.geometry
        down_RIK, up_OR = p["down"], p["up"].flatten(1)
        if "mid" not in p:
            return low_rank(geometry, x, down_RIK, up_OR, gate)
        if geometry.groups > 1:
            return low_rank(geometry, x, core_times_right(p["mid"], down_RIK.flatten(1)), up_OR, gate)
        # Without groups the chain 1x1, kernel, 1x1 is cheaper than the merged first two.
        h = geometry.convolve(geometry.pointwise(x, down_RIK.flatten(1)), p["mid"], 1)
        return geometry.pointwise(gate.rank(h, 1), up_OR)

    def over_base(self, call: Call) -> OverBase | None:
        if not call.cheaper_factored(self.flops(call.tokens)):
            return super().over_base(call)
        return None if "mid" in self.laid_out.shapes or self.down0 is not None else low_rank_form

    def beside_base(self, call: Call) -> BesideBase | None:
        return None if self.geometry.is_conv or self.over_base(call) is not low_rank_form else _beside_base

    def flops(self, tokens: int) -> tuple[float, float]:
        g, R = self.geometry, self.mask_size
        O, J, N = g.out_features, g.columns, g.out_features * g.columns
        if "mid" in self.laid_out.shapes and g.groups == 1:
            middle = R * g.in_features + R * R * g.kernel_size
        else:
            middle = R * J * g.groups
        return 6 * tokens * (middle + O * R), 6 * tokens * N + 6 * N * R

    def norm(self) -> Tensor:
        """By the Gram matrices, R x R each: ||up down||^2 = sum(up^T up * down down^T)."""
        if "mid" in self.laid_out.shapes:
            return super().norm()
        p = self.values()
        return torch.sqrt(product_norm_sq(p["up"].flatten(1), p["down"].flatten(1)).sum())

    def pack(self) -> dict[str, Tensor]:
        self.refactor_error = None
        if self.down0 is None or self.up0 is None or not bool(self.down0.any()):
            return super().pack()
        tensors = (self.down, self.up, self.down0, self.up0)
        p = _since(*(t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors))
        left, right = p["up"].flatten(1) * self.plus_unit, p["down"].flatten(1)
        up, down, _ = refactor(left, right)
        self.refactor_error = product_error((left, right), (up, down))
        missing = 2 * self.dim - up.shape[1]  # of a weight with few rows or columns
        up, down = F.pad(up, (0, missing)), F.pad(down, (0, 0, 0, missing))
        return {
            "lora_down.weight": down.reshape(-1, *self.down.shape[1:]),
            "lora_up.weight": up.reshape(*up.shape, *self.geometry.ones),
        }

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        """A file holds all that there is."""
        super().unpack_(tensors)
        self.mark_initialised_()
        for start in (self.down0, self.up0):
            if start is not None:
                start.zero_()

    @classmethod
    def stack(cls, packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        found = {"lora_down.weight": torch.cat([pack["lora_down.weight"] for pack in packs])}
        for key in ("lora_mid.weight", "lora_up.weight"):
            if key in packs[0]:
                found[key] = block_diagonal([pack[key] for pack in packs])
        return found

    @classmethod
    def join(
        cls, packs: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int], alpha: float | None = None
    ) -> dict[str, Tensor] | None:
        """One below the other where all share the other factors, otherwise block-diagonal."""
        present = there(packs)
        if any("lora_up.weight" not in pack for pack in present):
            return None
        if len({"lora_mid.weight" in pack for pack in present}) > 1:
            return cls.join([None if pack is None else cls._without_core(pack) for pack in packs], sizes)
        if alike(present, {*present[0]} - {"lora_up.weight"}):
            return {**present[0], "lora_up.weight": concatenated(each(packs, "lora_up.weight"), sizes)}
        return cls.stack([pack or cls._rankless(present[0], size) for pack, size in zip(packs, sizes, strict=True)])

    @staticmethod
    def _rankless(like: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
        """A layer of no rank, with so many output rows."""
        up = like["lora_up.weight"]
        empty = {key: t[:0, :0] if key == "lora_mid.weight" else t[:0] for key, t in like.items()}
        return {**empty, "lora_up.weight": up.new_zeros(size, 0, *up.shape[2:])}

    @classmethod
    def _without_core(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same without the Tucker form's core."""
        if "lora_mid.weight" not in tensors:
            return dict(tensors)
        own = {name: tensors[key] for name, key in cls.spec.keys.items() if key in tensors}
        wide = {name: tensor.to(wide_dtype(tensor)) for name, tensor in own.items()}
        return {"lora_down.weight": cls._right(wide), "lora_up.weight": tensors["lora_up.weight"]}

    @classmethod
    def take(
        cls, tensors: Mapping[str, Tensor], alpha: float | None, start: int, stop: int
    ) -> tuple[dict[str, Tensor], float | None] | None:
        if "lora_up.weight" not in tensors:
            return None
        up = tensors["lora_up.weight"]
        kept = kept_ranks(up.flatten(1), start, stop)
        if "lora_mid.weight" in tensors or kept is None:
            return {**tensors, "lora_up.weight": up[start:stop]}, alpha
        pair = {"lora_down.weight": tensors["lora_down.weight"][kept], "lora_up.weight": up[start:stop, kept]}
        return {**tensors, **pair}, alpha and alpha * len(kept) / up.shape[1]

    @classmethod
    def unstack(cls, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        ups = unstack_diagonal("lora_up.weight", tensors["lora_up.weight"], sizes)
        downs = tensors["lora_down.weight"].chunk(len(sizes))
        pairs = zip(downs, ups, strict=True)
        return [{"lora_down.weight": down, "lora_up.weight": up} for down, up in pairs]

    @classmethod
    def stacked(cls, tensors: Mapping[str, Tensor]) -> int:
        return 1 if "lora_mid.weight" in tensors else blocks_of(tensors["lora_up.weight"].flatten(1))

    @classmethod
    def first_ranks(cls, tensors: Mapping[str, Tensor], dim: int) -> dict[str, Tensor]:
        if "lora_mid.weight" in tensors:
            raise ValueError("the ranks of the Tucker form do not stand alone")
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        kept = torch.arange(len(down)) % (len(down) // cls.stacked(tensors)) < dim
        return {**tensors, "lora_down.weight": down[kept], "lora_up.weight": up[:, kept]}

    @classmethod
    def nearest(
        cls, tensors: Mapping[str, Tensor], count: Count, parts: int = 1, core: bool = False
    ) -> dict[str, Tensor]:
        p = {name: tensors[key].double() for name, key in cls.spec.keys.items() if key in tensors}
        up, right = p["up"].flatten(1), p["down"]
        if core and "mid" in p:
            up, p["mid"], right = nearest_tucker(up, p["mid"], right.flatten(1), count)
            right = right.reshape(*right.shape, *p["down"].shape[2:])
        else:
            whole = cls._right(p)
            ((up, right),) = nearest_products([(up, whole.flatten(1))], count, parts)
            right = right.reshape(-1, *whole.shape[1:])
            p.pop("mid", None)
        p |= {"up": up.reshape(*up.shape, *p["up"].shape[2:]), "down": right}
        return {cls.spec.keys[name]: t.to(tensors[cls.spec.keys[name]].dtype) for name, t in p.items()}

    @classmethod
    def shown_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        kernel = tensors["lora_mid.weight" if "lora_mid.weight" in tensors else "lora_down.weight"].shape[2:]
        return len(tensors["lora_up.weight"]), tensors["lora_down.weight"].shape[1], *kernel

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        tucker = "lora_mid.weight" in tensors
        columns = geometry.in_features if tucker else geometry.columns
        if math.prod(down.shape[1:]) != columns or up.shape[0] != geometry.out_features:
            found = f"lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)}"
            raise ValueError(f"{found} do not fit a weight of {geometry.weight_shape}")
        return down.shape[0], {"use_tucker": tucker}


def low_rank_form(adapter: LoRA, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
    p: Any = adapter._parameters
    return low_rank_over_base(adapter.geometry, x, weight, bias, p["down"], p["up"], strength)


def _beside_base(adapter: LoRA, x: Tensor, y: Tensor, strength: float) -> Tensor:
    p: Any = adapter._parameters
    return low_rank_beside(x, y, p["down"], p["up"], strength)


def _since(down: Tensor, up: Tensor, down0: Tensor, up0: Tensor) -> dict[str, Tensor]:
    """Factors of (up0 + up) . (down0 + down) - up0 . down0, in which nothing large cancels."""
    return {"down": torch.cat([down0 + down, down]), "up": torch.cat([up, up0], 1)}


def _wide(matrix: Tensor) -> Tensor:
    """In fp64, which a device may lack."""
    return matrix.to("cpu" if matrix.device.type == "mps" else matrix.device, torch.float64)
