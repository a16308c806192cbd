"""Max-norm regularisation: no update above a given Frobenius norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapted import AdaptedLayer

SLACK = 1e-6  # of the limit, by which a norm may miss it
STEPS = 40  # at most, of the search where a form does not shrink in proportion


@torch.no_grad()
def update_norm(layer: AdaptedLayer) -> Tensor:
    """Frobenius norm of W' - W at multiplier 1 and without magnitudes, 0-d: of scale * scalar * dW."""
    with torch.autocast(next(layer.parameters()).device.type, enabled=False):
        return layer.wide_adapter().change_norm(layer.whole_weight, layer.strength)


def limit_norms(layers: Sequence[AdaptedLayer], limit: float) -> tuple[int, float, float]:
    """Shrink every true update above `limit` to it; (number shrunk, mean and maximum norm afterwards)."""
    norms = _norms(layers)
    above = [i for i, norm in enumerate(norms) if norm > limit * (1 + SLACK)]
    for i in above:
        layers[i].adapter.shrink_(limit / norms[i])
    for i, norm in zip(above, _norms([layers[i] for i in above]), strict=True):
        norms[i] = norm if _at(layers[i], norm, limit) else _find(layers[i], norm, limit, norms[i])
    return len(above), sum(norms) / len(norms), max(norms)


def _norms(layers: Sequence[AdaptedLayer]) -> list[float]:
    """With one wait for the device."""
    found: list[float] = torch.stack([update_norm(layer).float() for layer in layers]).tolist() if layers else []
    return found


def _at(layer: AdaptedLayer, norm: float, limit: float) -> bool:
    """Whether a norm is the limit; half precision may leave it below by what that cannot tell apart."""
    eps = max(torch.finfo(p.dtype).eps for p in layer.adapter.parameters())
    return limit * (1 - max(SLACK, eps)) <= norm <= limit * (1 + SLACK)


@torch.no_grad()
def _find(layer: AdaptedLayer, norm: float, limit: float, before: float) -> float:
    """Rotations, and differences of products, do not shrink in proportion: find the ratio at which the norm is the
    limit, between two of which one is too small and one too large (regula falsi, Illinois); the norm there.

    Args:
        norm: now, after shrinking by limit / before.
    """
    values = [(t, t.detach().clone()) for t in (*layer.adapter.parameters(), *layer.adapter.buffers())]
    low, high = ((1.0, norm), (before / limit, before)) if norm < limit else ((0.0, 0.0), (1.0, norm))
    weights = [1.0, 1.0]  # on the two distances: an end that stays counts half
    for _ in range(STEPS):
        under, over = (limit - low[1]) * weights[0], (high[1] - limit) * weights[1]
        norm = _shrunk(layer, values, ratio := low[0] + (high[0] - low[0]) * under / (under + over))
        if _at(layer, norm, limit):
            return norm
        if norm < limit:
            low, weights = (ratio, norm), [1.0, weights[1] / 2]
        else:
            high, weights = (ratio, norm), [weights[0] / 2, 1.0]
    return _shrunk(layer, values, low[0])


def _shrunk(layer: AdaptedLayer, values: Sequence[tuple[Tensor, Tensor]], ratio: float) -> float:
    """The norm after shrinking from these values of its tensors."""
    for tensor, value in values:
        tensor.copy_(value)
    layer.adapter.shrink_(ratio)
    return _norms([layer])[0]
