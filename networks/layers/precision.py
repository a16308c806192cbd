"""Values that keep their digits whatever a host casts a network to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kept_wide(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` does to tensors (casts, moves, ...), for values that are to stay in fp32 or wider: they
    follow to the device, and never pass through fewer bits."""

    def keep(tensor: Tensor) -> Tensor:
        changed = change(tensor)
        if not changed.is_floating_point() or changed.dtype.itemsize >= torch.float32.itemsize:
            return changed
        if tensor.is_meta:  # nothing there to keep: the device alone counts
            return changed.to(torch.float32)
        return tensor.to(changed.device, torch.float32)

    return keep
