"""Storing a frozen model in less memory: its layers' weights in 8-bit floats, or in 4 or 8 bits by bitsandbytes.

Only layers inside numbered blocks change: they are almost all of a model, and its first and last layers are sensitive.
Adapters and all results stay in the precision of training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

QUANTIZED = ("nf4", "int8")


def block_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, Any]]:
    """Layers below numbered blocks, `transformer_blocks.0.attn.to_q`."""
    for name, module in list(model.named_modules()):
        if re.search(r"\.\d+\.", name) and isinstance(module, kinds):
            yield name, module


def shrink(model: nn.Module, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Store the weights of a model in memory in less, layer by layer.

    Args:
        model: changed in place.
        kind: "fp8" or one of QUANTIZED.
        dtype: what bitsandbytes' products are computed in.
        device: where bitsandbytes' weights are put.

    Raises:
        ValueError: it needs bitsandbytes, which is not installed.
    """
    if kind == "fp8":
        to_fp8(model)
    else:
        quantize(model, kind, dtype, device)


def to_fp8(model: nn.Module) -> None:
    """Round weights to float8_e4m3fn; under autocast each is cast up when it is used."""
    for _, layer in block_layers(model, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)


def quantize(model: nn.Module, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replace Linear layers by bitsandbytes'. Args and Raises as of `shrink`, for the kinds of QUANTIZED."""
    try:
        from bitsandbytes import nn as bits
    except ImportError as error:
        raise ValueError(f"--quantize {kind} needs bitsandbytes. Install it: pip install bitsandbytes") from error
    for name, layer in block_layers(model, (nn.Linear,)):
        shape, bias, weight = (layer.in_features, layer.out_features), layer.bias, layer.weight.data
        if kind == "nf4":
            new = bits.Linear4bit(*shape, bias=bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
            new.weight = bits.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new).to(device)
        else:
            new = bits.Linear8bitLt(*shape, bias=bias is not None, has_fp16_weights=False, device="meta")
            new.weight = bits.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
        if bias is not None:
            new.bias = nn.Parameter(bias.data.to(device, dtype), requires_grad=False)
        model.set_submodule(name, new)
