"""Reading and writing the weight of a frozen base layer. Merges compute in fp32 (or wider) and round once."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BACKUPS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def read(module: nn.Module, device: torch.device | None = None) -> Tensor:
    """The weight as it is now, in fp32 or wider, detached.

    Raises:
        ValueError: the weight is stored in a form that cannot be read or written back exactly.
    """
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dtype not in _PLAIN:
        found = getattr(weight, "dtype", type(weight).__name__)
        raise ValueError(
            f"cannot merge into a weight of type {found}: load the model in fp32, fp16 or bf16 to merge, "
            "or apply the network without merging"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(device=device or weight.device, dtype=wide)


def write(module: nn.Module, weight: Tensor) -> None:
    """Put a weight back in place, so that hosts which hold the parameter see the change."""
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight)


def backup(module: nn.Module) -> None:
    """Remember the weight until it is restored. Networks on one module share the backup, from before any merge."""
    if module not in _BACKUPS:
        _BACKUPS[module] = module.get_parameter("weight").detach().clone()


def restore(module: nn.Module) -> None:
    """Put the remembered weight back, bit for bit, and forget it; nothing without a backup."""
    kept = _BACKUPS.pop(module, None)
    if kept is not None:
        write(module, kept)
