"""Frozen Linears in every form that hosts store weights in, each with a dequantisation of our own to compare with.

The scaled fp8 layers are built from the description of the trainers' buffers; they share no code with the package.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUT, IN = 96, 128  # multiples of the 64 and 32 that blocks and kernels want
FLOAT8 = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Quantised:
    """A form.

    Attributes:
        make: a Linear of this form from the weight and bias of a plain fp32 one.
        dense: its weight [O, I] in float64, by our own formula.
        error: for a weight W' [O, I] in float64, how far each stored value may be from it after one quantisation.
        input: what its forward takes, fp32 if it does not care.
        autocast: whether the layer's own forward needs it.
        exact: whether its forward multiplies by the dequantised weight (otherwise it also rounds its input).
    """

    make: Callable[[nn.Linear], nn.Module]
    dense: Callable[[Any], Tensor]
    error: Callable[[Tensor], Tensor]
    input: torch.dtype = torch.float32
    autocast: bool = False
    exact: bool = True


# -- plain


def _plain(dtype: torch.dtype) -> Quantised:
    def error(W: Tensor) -> Tensor:
        return (W.to(dtype).double() - W).abs() + 3e-7 * W.abs().amax()

    fp8 = dtype.itemsize == 1
    dense = (lambda m: m.weight.to(torch.float32).double()) if fp8 else (lambda m: m.weight.double())
    return Quantised(lambda lin: lin.to(dtype), dense, error, torch.float32 if fp8 else dtype, fp8)


# -- scaled fp8, as the trainers build it


def _scale_per_value(scale: Tensor) -> Tensor:
    """Scale [1], [O, 1] or [O, blocks, 1] as [O, I]."""
    scale = scale.double()
    if scale.dim() == 3:
        return scale[:, :, 0].repeat_interleave(IN // scale.shape[1], dim=1)
    return scale.expand(OUT, IN)


def _trainers_forward(self: Any, x: Tensor) -> Tensor:
    weight = self.weight.to(self.scale_weight.dtype)
    scale = self.scale_weight
    if scale.dim() == 3:
        weight = (weight.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1)
    else:
        weight = weight * scale
    return F.linear(x, weight, self.bias)


def scaled_float8(lin: nn.Linear, mode: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> nn.Module:
    shape = {"tensor": (1, 1, OUT * IN), "row": (OUT, 1, IN), "block": (OUT, IN // 32, 32)}[mode]
    scale = lin.weight.reshape(shape).abs().amax(2, keepdim=True) / torch.finfo(dtype).max
    scale = scale.reshape({"tensor": (1,), "row": (OUT, 1), "block": scale.shape}[mode]).to(scale_dtype)
    codes = (lin.weight / _scale_per_value(scale)).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    lin.weight = nn.Parameter(codes.to(dtype), requires_grad=False)
    lin.register_buffer("scale_weight", scale)
    lin.bias.data = lin.bias.data.to(scale_dtype)
    lin.forward = types.MethodType(_trainers_forward, lin)  # type: ignore[method-assign]
    return lin


def _scaled(mode: str, name: str = "e4m3fn", scale_dtype: torch.dtype = torch.float32) -> Quantised:
    dtype = FLOAT8[name]
    relative, smallest = {"e4m3fn": (2**-4, 2**-10), "e5m2": (2**-3, 2**-17)}[name]  # half a step: normal, subnormal

    def error(W: Tensor) -> Tensor:
        blocks = {"tensor": (OUT, IN), "row": (1, IN), "block": (1, 32)}[mode]
        largest = _per_block(W.abs(), blocks)
        slack = 1 + 4 * torch.finfo(scale_dtype).eps  # the scale's own rounding
        return torch.maximum(W.abs() * relative, largest / torch.finfo(dtype).max * smallest) * slack

    return Quantised(
        lambda lin: scaled_float8(lin, mode, dtype, scale_dtype),
        lambda m: m.weight.to(torch.float32).double() * _scale_per_value(m.scale_weight),
        error,
        scale_dtype,
    )


def _per_block(values: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest value of each block, for every value in it."""
    a, b = block
    parts = values.reshape(OUT // a, a, IN // b, b)
    return parts.amax((1, 3), keepdim=True).expand_as(parts).reshape(OUT, IN)


# -- bitsandbytes


def linear8bit(lin: nn.Linear) -> nn.Module:
    import bitsandbytes

    made = bitsandbytes.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    made.load_state_dict(lin.state_dict())
    return made.to("cpu")


def _dense8bit(m: Any) -> Tensor:
    scale = m.weight.SCB if m.weight.SCB is not None else m.state.SCB
    return m.weight.data.double() * scale.double()[:, None] / 127


def linear4bit(lin: nn.Linear, quant_type: str, nested: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(IN, OUT, compute_dtype=dtype, quant_type=quant_type, compress_statistics=nested)
    made.weight.data, made.bias.data = lin.weight.data.clone(), lin.bias.data.clone()
    return made.to("cpu")


def _scales4bit(state: Any) -> Tensor:
    """One per 64 values, in float64."""
    if not state.nested:
        return state.absmax.double()
    second = state.state2
    outer = second.absmax.double().repeat_interleave(second.blocksize)[: state.absmax.numel()]
    return second.code.double()[state.absmax.long()] * outer + float(state.offset)


def _dense4bit(m: Any) -> Tensor:
    state, packed = m.weight.quant_state, m.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    return (state.code.double()[codes].reshape(-1, 64) * _scales4bit(state)[:, None]).reshape(OUT, IN)


def _four_bits(quant_type: str, nested: bool) -> Quantised:
    widest = {"nf4": 0.1520, "fp4": 0.1667}[quant_type]  # half the widest gap between two neighbours of the table

    def error(W: Tensor) -> Tensor:
        largest = W.abs().reshape(-1, 64).amax(1, keepdim=True)
        nested_scale = 0.02 * largest.amax() if nested else 0.0  # 8-bit scales: their steps are widest at the top
        return (widest * largest * 1.001 + nested_scale).expand(-1, 64).reshape(OUT, IN)

    return Quantised(lambda lin: linear4bit(lin, quant_type, nested), _dense4bit, error)


# -- torchao


def _torchao(config: str, block: tuple[int, int], steps: float, **options: Any) -> Quantised:
    def make(lin: nn.Linear) -> nn.Module:
        from torchao import quantization

        holder = nn.Sequential(lin.requires_grad_(False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = getattr(quantization, config)(**{k: v() if callable(v) else v for k, v in options.items()})
            quantization.quantize_(holder, chosen)
        return holder[0]

    def error(W: Tensor) -> Tensor:
        if not steps:  # float8
            return torch.maximum(W.abs() * 2**-4, _per_block(W.abs(), block) / 448 * 2**-10) * (1 + 1e-5)
        rounded = 2 * steps * torch.finfo(torch.float32).eps  # W' itself is in fp32, an ulp off: of half a step
        return _per_block(W.abs(), block) / steps / 2 * (1 + 1e-5 + rounded)

    return Quantised(make, lambda m: m.weight.dequantize().double(), error)


def _group() -> Any:
    from torchao.quantization import PerGroup

    return PerGroup(32)


FORMS: dict[str, Quantised] = {
    "float64": _plain(torch.float64),
    "float32": _plain(torch.float32),
    "float16": _plain(torch.float16),
    "bfloat16": _plain(torch.bfloat16),
    "float8_e4m3fn": _plain(torch.float8_e4m3fn),
    "float8_e5m2": _plain(torch.float8_e5m2),
    "scaled_tensor": _scaled("tensor"),
    "scaled_row": _scaled("row"),
    "scaled_block": _scaled("block"),
    "scaled_block_bf16": _scaled("block", scale_dtype=torch.bfloat16),
    "scaled_row_e5m2": _scaled("row", "e5m2"),
    "bnb_int8": Quantised(
        linear8bit, _dense8bit, lambda W: _per_block(W.abs(), (1, IN)) / 127 / 2 * (1 + 1e-5), exact=False
    ),
    "bnb_nf4": _four_bits("nf4", nested=False),
    "bnb_nf4_nested": _four_bits("nf4", nested=True),
    "bnb_fp4": _four_bits("fp4", nested=False),
    "bnb_fp4_nested": _four_bits("fp4", nested=True),
    "torchao_int8": _torchao("Int8WeightOnlyConfig", (1, IN), 127),
    "torchao_int8_groups": _torchao("IntxWeightOnlyConfig", (1, 32), 127, weight_dtype=torch.int8, granularity=_group),
    "torchao_int4_groups": _torchao("IntxWeightOnlyConfig", (1, 32), 7, weight_dtype=torch.int4, granularity=_group),
    "torchao_float8": _torchao("Float8WeightOnlyConfig", (1, IN), 0),
}


def plain_linear(seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    lin = nn.Linear(IN, OUT).requires_grad_(False)
    lin.weight.copy_(torch.randn(OUT, IN, generator=generator) * 0.05)
    lin.bias.copy_(torch.randn(OUT, generator=generator) * 0.1)
    return lin


def quantised(form: str, seed: int = 0) -> nn.Module:
    return FORMS[form].make(plain_linear(seed)).requires_grad_(False)


def bits(module: Any) -> list[bytes]:
    """Every byte that the layer keeps: parameters, buffers, scales, quantisation state."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                collect(getattr(value, name))
        elif isinstance(value, Tensor):
            found.append(value)

    for value in (*module.parameters(), *module.buffers()):
        collect(value)
    for holder in (module.weight, getattr(module, "state", None)):
        for name in ("CB", "SCB"):
            collect(getattr(holder, name, None))
    state = getattr(module.weight, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            collect(getattr(state, name, None))
        found.append(torch.tensor([str(state.dtype) == "torch.float32", state.blocksize, bool(state.nested)]))
        state = getattr(state, "state2", None)
    return [t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in found]
