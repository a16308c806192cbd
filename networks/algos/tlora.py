"""T-LoRA: from an orthogonal start, with fewer ranks the noisier the sample (2507.05964).

    dW = P diag(m lam) Q - P0 diag(m lam0) Q0        m: the first ranks, by the time of the sample; all in weights

The start P0, lam0, Q0 are the first, middle or last singular triples of the base weight [O, I * K] or of a random
matrix. A convolution has Q as its kernel and P as the 1x1 convolution behind it.

Parameters are what has changed since the start, so that no precision is lost to the difference of two near numbers:
    q    [R, I, *kernel]   Q - Q0                   start: 0
    p    [O, R, 1...]      P - P0                   start: 0
    lam  [1, R]            lam - lam0               start: 0
Buffers, part of the live state: q0, p0, lam0, and unit: what p counts for (LoRA+ in the parametrisation), 1.

Saved as a LoRA of rank 2 R, exact in every reader, at full rank; in few bits too, since each term is a small one:
    lora_up = [b - b0, b0]    lora_down = [Q; Q - Q0]    with b = P diag(lam), b0 = P0 diag(lam0)
Rank index i of T-LoRA is the pair i, R + i of that file, so that start and masks come back from it. The keys of another
program (q_layer.weight, p_layer.weight, lambda_layer) can be read, too: they lack the start, which is computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..records.tlora import TLORA
from ..tensors.fused import BesideBase, Call, OverBase, autocast_dtype
from ..tensors.fused_timed import timed_over_base
from ..tensors.geometry import Geometry, RowRanges
from ..tensors.low_rank import Gate, singular
from .additive import Additive
from .lora import LoRA
from .saved import Count, Layout, check_tensors

FOREIGN = TLORA.keys["lam"]  # marks the keys without a start
_OTHER_SAMPLES = "the timesteps of {} samples reached a layer with a batch of {}"
NEAR = 0.5  # of their length, the least that such factors must have in the space of the start


class TLoRA(LoRA):
    spec = TLORA
    _unit: tuple[tuple[int, int], float] = (0, 0), 1.0

    q: nn.Parameter
    p: nn.Parameter
    lam: nn.Parameter
    q0: Tensor
    p0: Tensor
    lam0: Tensor
    unit: Tensor

    def __init__(self, geometry: Geometry, dim: int, options: Mapping[str, Any] | None = None) -> None:
        chosen = dict(options or {})
        self.sig_type: str = chosen.get("sig_type", "principal")
        self.use_data_init: bool = chosen.get("use_data_init", True)
        self.schedule: tuple[int, float] = chosen.get("min_rank", 1), chosen.get("alpha_rank_scale", 1.0)
        super().__init__(geometry, dim, chosen)

    @classmethod
    def layout(  # type: ignore[override]
        cls,
        geometry: Geometry,
        dim: int,
        sig_type: str = "principal",
        use_data_init: bool = True,
        mask_group_id: int | None = None,
        min_rank: int = 1,
        alpha_rank_scale: float = 1.0,
    ) -> Layout:
        """Shapes of its factors.

        Args:
            geometry: of the layer.
            dim: R.
            sig_type: which singular vectors it starts from: "principal", "middle" or "last".
            use_data_init: those of the base weight; False = of a random matrix.
            mask_group_id: of networks which share a clock; None = the network's own.
            min_rank: ranks that act in pure noise.
            alpha_rank_scale: exponent of the time, by which ranks grow with it.

        Raises:
            ValueError: min_rank is above the dim.
        """
        if min_rank > dim:
            raise ValueError(
                f"min_rank={min_rank} is above its dim {dim}: the least rank of a timestep is 1 to the dim"
            )
        shapes = {
            "q": (dim, geometry.in_features, *geometry.kernel),
            "p": (geometry.out_features, dim, *geometry.ones),
            "lam": (1, dim),
        }
        return Layout(shapes, rank=dim, rank_axis=True, stacked=2)

    # -- the start

    def reset_parameters(self) -> None:
        """From random orthogonal factors, until the base weight is seen."""
        self.await_values()
        for p in self.parameters():
            nn.init.zeros_(p)
        if self.use_data_init:
            nn.init.orthogonal_(self.q0)
            nn.init.orthogonal_(self.p0)
        else:
            self._start_from(torch.randn(self.geometry.out_features, self.geometry.columns) / self.dim, self.sig_type)
        self._drawn = self.use_data_init  # at random for the time being: nothing has set the start since

    def await_values(self) -> None:
        for name, p in list(self.named_parameters()):
            self.register_buffer(f"{name}0", torch.ones_like(p))
        self.register_buffer("unit", torch.ones(()))
        self._drawn = False
        self._waiting = False  # for the start of factors which came without one

    def _start_from(self, matrix_OJ: Tensor, part: str, exact: bool = False) -> None:
        u, s, vh = singular(matrix_OJ, self.dim, part, exact)
        missing = self.dim - len(s)  # above the full rank of the layer: free directions of length 0
        if missing > 0:
            u = torch.cat([u, nn.functional.normalize(torch.randn_like(u[:, :1]).expand(-1, missing), dim=0)], 1)
            vh = torch.cat([vh, nn.functional.normalize(torch.randn_like(vh[:1]).expand(missing, -1), dim=1)])
            s = torch.cat([s, s.new_zeros(missing)])
        for buffer, value in ((self.q0, vh), (self.p0, u), (self.lam0, s)):
            buffer.copy_(value.reshape(buffer.shape))

    @property
    def wants_base(self) -> bool:
        return self._waiting or self._drawn

    @property
    def needs_base(self) -> bool:
        return self.wants_base

    def mark_initialised_(self) -> None:
        self._waiting = self._drawn = False

    def init_from_base(self, weight: Tensor) -> None:
        if not self._waiting:
            self._start_from(weight.flatten(1), self.sig_type)
            return self.mark_initialised_()
        given = {name: p.clone() for name, p in self.named_parameters()}  # whole factors, not changes
        self._start_from(weight.flatten(1), "principal", exact=True)
        q, p, q0, p0 = given["q"].flatten(1), given["p"].flatten(1), self.q0.flatten(1), self.p0.flatten(1)
        shares = torch.cat([(q @ q0.T).norm(dim=1) / q.norm(dim=1), (p0.T @ p).norm(dim=0) / p.norm(dim=0)])
        if bool(shares.mean() < NEAR):
            raise ValueError(
                f"only {float(shares.mean()):.0%} of its factors lie in the space of the first {self.dim} singular "
                "vectors of this weight, from which such a file must have started: it was trained on another base "
                "model, with another sig_type or with use_data_init=False, and does not hold its start"
            )
        signs = torch.where((q * q0).sum(1) < 0, -1.0, 1.0)  # a pair of singular vectors has two
        self.q0.mul_(signs.reshape(-1, *[1] * (self.q0.dim() - 1)))
        self.p0.mul_(signs.reshape(1, -1, *[1] * (self.p0.dim() - 2)))
        for name, p in self.named_parameters():
            p.copy_(given[name] - getattr(self, f"{name}0"))
        self.p.div_(self.unit)
        self.mark_initialised_()

    # -- the mathematics

    def values(self) -> dict[str, Tensor]:
        """The factors [2 R, ...] and [O, 2 R] of the LoRA that is saved, with gradients, in fp32 or wider."""
        if self._waiting:
            raise ValueError("its start is that of the base weight, which has not been seen: attach it to its layer")
        wide = torch.promote_types(self.q.dtype, torch.float32)
        q, p, q0, p0 = (t.to(wide) for t in (self.q, self.p, self.q0, self.p0))
        lam, lam0 = (t.to(wide).reshape(1, -1, *self.geometry.ones) for t in (self.lam, self.lam0))
        change = p * (self.unit * (lam0 + lam)) + p0 * lam
        return {"up": torch.cat([change, p0 * lam0], 1), "down": torch.cat([q0 + q, q])}

    def over_base(self, call: Call) -> OverBase | None:
        return _over_base

    def beside_base(self, call: Call) -> BesideBase | None:
        return None

    @property
    def unit_number(self) -> float:
        """`unit`, without a wait for the device but where it has changed."""
        if self.unit.is_inference():  # has no version
            return float(self.unit)
        kind = id(self.unit), self.unit._version
        if self._unit[0] != kind:
            self._unit = kind, float(self.unit)
        return self._unit[1]

    def pair_mask(self, x: Tensor) -> Tensor | None:
        """[N, 2 R], the mask of a pass with the input x, in the dtype of the computation."""
        if self.clock is None:
            return None
        mask = self.clock.pair_mask(self.dim, *self.schedule, x, autocast_dtype(x) or x.dtype)
        if mask is not None and len(x) % len(mask):
            raise ValueError(_OTHER_SAMPLES.format(len(mask), len(x)))
        return mask

    def delta(self, rank_mask_R: Tensor | None = None) -> Tensor:
        return super().delta(None if rank_mask_R is None else rank_mask_R.repeat(2))

    def apply_delta(self, x: Tensor, gate: Gate) -> Tensor:
        return super().apply_delta(x, self._masked(gate))

    def apply_rows(self, x: Tensor, gate: Gate, row_ranges: RowRanges) -> Tensor:
        return super().apply_rows(x, self._masked(gate), row_ranges)

    def _masked(self, gate: Gate) -> Gate:
        mask = None if self.clock is None else self.clock.rank_mask(self.dim, *self.schedule)
        return _Pairs(gate, self.dim, mask)

    def gradient_norm_sq(self) -> Tensor:
        return Additive.gradient_norm_sq(self)

    def flops(self, tokens: int) -> tuple[float, float]:
        return 2 * super().flops(tokens)[0], math.inf

    @property
    def plus_gain(self) -> float:
        return 1.0  # `values` has it

    def fold_plus_(self, unit: float) -> None:
        with torch.no_grad():
            self.p.mul_(self.unit / unit)
            self.unit.fill_(unit)

    def rescale_(self, ratio: float | Tensor) -> None:
        """By lam and lam0: no other factors give the change evenly."""
        with torch.no_grad():
            self.lam.mul_(ratio)
            self.lam0.mul_(ratio)

    # -- files

    def pack(self) -> dict[str, Tensor]:
        return {LoRA.spec.keys[name]: tensor.detach() for name, tensor in self.values().items()}

    @classmethod
    def nearest(
        cls, tensors: Mapping[str, Tensor], count: Count, parts: int = 1, core: bool = False
    ) -> dict[str, Tensor]:
        """The first pairs, which act at all times: others would have no start."""
        return cls.first_ranks(tensors, count(tensors["lora_down.weight"]) // 2)

    @classmethod
    def grown(cls, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], parts: int = 1) -> dict[str, Tensor]:
        """New pairs are at their start, behind the others."""
        return super().grown(cls._with_start(tensors), start, 2)

    @staticmethod
    def _with_start(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if FOREIGN in tensors:
            raise ValueError(
                f"{FOREIGN} without a start: such ranks cannot become more or fewer; load it at its own dim"
            )
        return tensors

    @classmethod
    def stacked(cls, tensors: Mapping[str, Tensor]) -> int:
        return 1

    @classmethod
    def first_ranks(cls, tensors: Mapping[str, Tensor], dim: int) -> dict[str, Tensor]:
        cls._with_start(tensors)
        up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
        kept = torch.arange(len(down)) % (len(down) // 2) < dim
        return {**tensors, "lora_down.weight": down[kept], "lora_up.weight": up[:, kept]}

    @classmethod
    def describe(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        if FOREIGN in tensors:
            q, p = tensors["q_layer.weight"], tensors["p_layer.weight"]
            return LoRA.describe(geometry, {"lora_down.weight": q, "lora_up.weight": p})[0], {}
        if "lora_mid.weight" in tensors:
            raise ValueError("lora_mid.weight: T-LoRA has no Tucker form; train on with algo=lora")
        rank = super().describe(geometry, tensors)[0]
        if rank % 2:
            raise ValueError(f"its rank {rank} is odd: files of T-LoRA have twice its dim; use algo=lora")
        return rank // 2, {}

    def check_fits(self, tensors: Mapping[str, Tensor]) -> None:
        if FOREIGN not in tensors:
            return check_tensors(self.pack(), tensors)
        if self.sig_type != "principal" or not self.use_data_init:
            raise ValueError(
                f"{FOREIGN} without a start: it can be known only for sig_type=principal and use_data_init=True, where "
                "it is that of the base weight; files of this program hold theirs"
            )
        check_tensors({self.spec.keys[name]: p for name, p in self.named_parameters()}, tensors)

    def unpack_(self, tensors: Mapping[str, Tensor]) -> None:
        self.check_fits(tensors)
        with torch.no_grad():
            if FOREIGN in tensors:
                for name, p in self.named_parameters():
                    p.copy_(tensors[self.spec.keys[name]].reshape(p.shape))
                self._waiting = True
                return
            up, down = (tensors[key].to(self.q) for key in ("lora_up.weight", "lora_down.weight"))
            (change, b0), (q, dq) = up.flatten(1).chunk(2, 1), down.chunk(2)
            lam0, lam = b0.norm(dim=0), (b0 + change).norm(dim=0)
            p0 = nn.functional.normalize(torch.where(lam0 > 0, b0, change), dim=0)
            lam = torch.where(lam > 0, lam, 1.0)
            p = (change - p0 * (lam - lam0)) / lam
            for name, now, start in (("q", dq, q - dq), ("p", p, p0), ("lam", lam - lam0, lam0)):
                self.get_parameter(name).copy_(now.reshape(self.get_parameter(name).shape))
                self.get_buffer(f"{name}0").copy_(start.reshape(self.get_buffer(f"{name}0").shape))
            self.p.div_(self.unit)
            self.mark_initialised_()


class _Pairs:
    """Gate for the 2 R wide middle: both halves of a rank index are masked, and dropped by rank, together.

    Args:
        mask: [N, R], one row for all samples or one for each; in layers with more rows than samples (frames, tokens)
            those of a sample follow each other.
    """

    def __init__(self, gate: Gate, dim: int, mask: Tensor | None) -> None:
        self.gate, self.dim, self.mask, self.uniform = gate, dim, mask, gate.uniform

    def rank(self, h: Tensor, dim: int) -> Tensor:
        dim %= h.dim()
        pairs = self.gate.rank(h.unflatten(dim, (2, self.dim)), dim + 1)
        return (pairs if self.mask is None else pairs * self._mask(pairs, dim + 1)).flatten(dim, dim + 1)

    def _mask(self, pairs: Tensor, dim: int) -> Tensor:
        assert self.mask is not None
        mask = self.mask.to(pairs)
        samples, rows = mask.shape[0], 1
        if samples > 1:
            rows = pairs.shape[0] if dim > 1 else 1
            if rows % samples:
                raise ValueError(_OTHER_SAMPLES.format(samples, rows))
            mask = mask.repeat_interleave(rows // samples, 0)
        return mask.reshape(rows, *[1] * (dim - 1), self.dim, *[1] * (pairs.dim() - dim - 1))

    def output(self, update: Tensor) -> Tensor:
        return self.gate.output(update)


def _over_base(adapter: TLoRA, x: Tensor, weight: Tensor, bias: Tensor | None, strength: float) -> Tensor:
    if adapter._waiting:
        adapter.values()  # says why there are none
    p, start = cast(Any, adapter._parameters), cast(Any, adapter._buffers)
    return timed_over_base(
        adapter.geometry, x, weight, bias, (p["q"], p["p"], p["lam"]), (start["q0"], start["p0"], start["lam0"]),
        adapter.unit_number, strength, adapter.pair_mask(x),
    )  # fmt: skip
