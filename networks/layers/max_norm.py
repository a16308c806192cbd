"""Max-norm regularisation: no update above a given Frobenius norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algos import Reweight
from .adapted import AdaptedLayer

STEPS = 20  # at most, where one is not exact: a rotation shrinks by less than its angle


@torch.no_grad()
def update_norm(layer: AdaptedLayer) -> Tensor:
    """Frobenius norm of W' - W at multiplier 1 and without magnitudes, 0-d: of scale * scalar * dW."""
    strength, adapter = layer.strength, layer.wide_adapter()
    with torch.autocast(next(layer.parameters()).device.type, enabled=False):
        if isinstance(adapter, Reweight):
            W = layer.whole_weight()
            return torch.linalg.vector_norm(adapter.new_weight(W) - W)
        return adapter.norm() * (strength.abs() if isinstance(strength, Tensor) else abs(strength))


def limit_norms(layers: Sequence[AdaptedLayer], limit: float) -> tuple[int, float, float]:
    """Shrink every true update above `limit`; (number shrunk, mean and maximum norm afterwards)."""
    norms = torch.stack([update_norm(layer).float() for layer in layers]).tolist()  # one wait for the device
    above = [(layer, norm) for layer, norm in zip(layers, norms, strict=True) if norm > limit]
    for layer, norm in above:
        layer.adapter.shrink_(limit / norm)
        for _ in range(0 if layer.adapter.shrinks_exactly else STEPS):
            norm = float(update_norm(layer))
            if norm <= limit * (1 + 1e-6):
                break
            layer.adapter.shrink_(limit / norm)
    norms = [min(norm, limit) for norm in norms]
    return len(above), sum(norms) / len(norms), max(norms)
