"""How far what a program makes of a layer is from what is meant, by formulas which several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..codec import SavedLayer
from ..merged import merged_weight
from .contract import STRENGTHS

Errors = tuple[float | None, float | None]
UNKNOWN: Errors = (None, None)


def errors(saved: SavedLayer, base: Tensor | None, acts: Callable[[SavedLayer, Tensor, float], Tensor]) -> Errors:
    """Of a layer, if the base weight is known.

    Args:
        base: W [O, I, *kernel].
        acts: (layer, W, strength) -> W' as the program has it.
    """
    if base is None:
        return UNKNOWN
    new = merged_weight(saved, base, bias_too=True)
    first, second = (
        relative(acts(saved, base, strength) - base - strength * (new - base), strength * (new - base))
        for strength in STRENGTHS
    )
    return first, second


def relative(error: Tensor, update: Tensor) -> float:
    size = float(torch.linalg.vector_norm(update.double()))
    return float(torch.linalg.vector_norm(error.double())) / size if size else 0.0


def plain(saved: SavedLayer, base: Tensor, strength: float) -> Tensor:
    """W' without the magnitudes."""
    return merged_weight(replace(saved, magnitude=None), base, strength, bias_too=True)


def below_the_norm(saved: SavedLayer, base: Tensor, strength: float) -> Tensor:
    """W' of PEFT's DoRA on output rows: m V / ||V||, V = W + strength s dW."""
    assert saved.magnitude is not None
    whole, magnitude = plain(saved, base, strength), saved.magnitude.reshape(-1, *[1] * (base.dim() - 1))
    return whole * (magnitude.to(base) / whole.flatten(1).norm(dim=1).reshape(magnitude.shape))
