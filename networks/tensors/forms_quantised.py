"""Forms of the quantisation libraries: bitsandbytes and torchao.

Neither is imported to find out: a form is recognised by the names of classes and their packages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .blocks import Codes
from .forms import REMEDY, Coded, Form, bare, has_class


class BitsAndBytes8(Coded):
    """bitsandbytes' Linear8bitLt, LLM.int8 (2208.07339): W = CB * SCB / 127, one SCB per row."""

    title = "bitsandbytes int8"

    def matches(self, module: Any) -> bool:
        return has_class(module.weight, "bitsandbytes", "Int8Params") and module.weight.dtype == torch.int8

    def codes(self, module: Any) -> Codes:
        # The first forward moves both from the parameter to the layer's state.
        scale = getattr(module.weight, "SCB", None)
        if scale is None:
            scale = getattr(module.state, "SCB", None)
        if scale is None:
            raise ValueError("a Linear8bitLt has int8 codes without their scale SCB: load it with its whole state")
        weight = bare(module)
        return Codes(weight, scale.detach(), (1, weight.shape[1]), -127, 127, unit=127.0)


class BitsAndBytes4(Form):
    """bitsandbytes' Linear4bit, QLoRA (2305.14314): nf4 or fp4 codes in flat blocks, scales perhaps quantised too."""

    title = "bitsandbytes 4-bit"

    def matches(self, module: Any) -> bool:
        packed = has_class(module.weight, "bitsandbytes", "Params4bit") and not module.weight.is_floating_point()
        return packed or (_lost_class(module) and getattr(module, "quant_state", None) is not None)

    def check(self, module: Any) -> None:
        self._state(module)

    @staticmethod
    def _state(module: Any) -> Any:
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            state = getattr(module, "quant_state", None)
        if state is None:
            raise ValueError("a Linear4bit has packed codes without a quant_state: load it with its whole state")
        return state

    def read(self, module: Any, device: torch.device | None) -> Tensor:
        from bitsandbytes import functional

        codes, state = bare(module), copy.deepcopy(self._state(module))
        if device is not None:
            codes = codes.to(device)
        state.to(codes.device)
        if getattr(state, "packing_format_for_cpu", False):  # a layout of its own, after an eval forward on some CPUs
            state.original_nested = False  # its scales are not quantised, but turned
            codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
            state.absmax = state.absmax.float().T.reshape(-1).contiguous()
        state.dtype = torch.float32
        return functional.dequantize_4bit(codes, state).reshape(state.shape)

    def write(self, module: Any, weight: Tensor, largest: float) -> None:
        from bitsandbytes import functional

        own, state = module.weight, self._state(module)
        repacked = getattr(state, "packing_format_for_cpu", False)
        storage = getattr(state, "original_storage_type", torch.uint8) if repacked else own.dtype
        codes, new = functional.quantize_4bit(
            weight.float().contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.original_nested if repacked else state.nested,
            quant_type=state.quant_type,
            quant_storage=storage,
        )
        new.dtype = state.original_dtype if repacked else state.dtype  # what the layer computes in
        new.to(own.device)
        own.data = codes.to(own.device)
        state.__dict__.clear()  # the layer, its parameter and the host may all hold this object
        state.__dict__.update(new.__dict__)

    def save(self, module: Any) -> Callable[[Any], None]:
        codes, kept = bare(module).clone(), copy.deepcopy(self._state(module))

        def put_back(target: Any) -> None:
            state, device = self._state(target), target.weight.device
            again = copy.deepcopy(kept)
            again.to(device)
            target.weight.data = codes.clone().to(device)
            state.__dict__.clear()
            state.__dict__.update(again.__dict__)

        return put_back


class TorchAO(Coded):
    """torchao's weight tensors that keep one code per number: int8, int4 and intN in int8, float8."""

    title = "torchao"

    def matches(self, module: Any) -> bool:
        return _root(type(module.weight)) == "torchao"

    def codes(self, module: Any) -> Codes:
        weight = module.weight
        inner: Any = getattr(weight, "tensor_impl", weight)  # before torchao 0.17
        names = ("qdata", "int_data", "float8_data")
        codes = next((t for n in names if isinstance(t := getattr(inner, n, None), Tensor)), None)
        scale, zero = getattr(inner, "scale", None), getattr(inner, "zero_point", None)
        block = getattr(weight, "block_size", None)
        if codes is None or scale is None or block is None or codes.shape != weight.shape or len(block) != codes.dim():
            raise ValueError(f"torchao's {type(inner).__name__} is packed for one kernel and cannot be read: {REMEDY}")
        if (zero is not None and zero.is_floating_point()) or getattr(weight, "act_pre_scale", None) is not None:
            raise ValueError(
                f"torchao's {type(inner).__name__} with a float zero point or scaled inputs cannot be written back: "
                f"{REMEDY}"
            )
        low, high = _code_range(weight, codes.dtype)
        return Codes(codes, scale, tuple(int(n) for n in block), low, high, zero)


def _root(cls: type) -> str:
    """The package that a class, or one it derives from, comes from; torch's own count last."""
    if cls in (torch.Tensor, torch.nn.Parameter):  # torch.compile cannot walk over base classes
        return "torch"
    roots = [base.__module__.partition(".")[0] for base in cls.__mro__]
    return next((root for root in roots if root not in ("torch", "builtins")), "torch")


def _lost_class(module: Any) -> bool:
    """A Linear4bit whose parameter lost its class, as FSDP does it."""
    # In this order: torch.compile cannot walk over base classes.
    return not module.weight.is_floating_point() and any(c.__name__ == "Linear4bit" for c in type(module).__mro__)


def _code_range(weight: Any, dtype: torch.dtype) -> tuple[float, float]:
    if dtype.is_floating_point:
        return -torch.finfo(dtype).max, torch.finfo(dtype).max
    low, high = getattr(weight, "quant_min", None), getattr(weight, "quant_max", None)
    if low is not None and high is not None:
        return float(low), float(high)
    target = str(getattr(weight, "target_dtype", dtype)).rpartition("int")[2]  # torch.int4 has no iinfo
    half = 2 ** (int(target) - 1)
    low, high = -half, half - 1
    return (low // 2, high // 2) if getattr(weight, "reduce_range", False) else (low, high)
