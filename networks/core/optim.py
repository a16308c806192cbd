"""Optimizer groups: part, learning rate by regular expression, LoRA+."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..layers.adapted import AdaptedLayer
from .plan import PlanRow

Groups = tuple[list[dict[str, Any]], list[str]]


def parameter_groups(layers: Iterable[tuple[PlanRow, AdaptedLayer]], rates: Mapping[str, float | None]) -> Groups:
    """Groups for the optimizer and one description each.

    A layer's rate is that of its regular expression, else its part's; LoRA+ multiplies the plus factors' rate. Layers
    at rate None or 0 stay out of the optimizer and need no gradient.

    Args:
        rates: part -> learning rate.
    """
    groups: dict[tuple[str, float | None, bool], list[nn.Parameter]] = {}
    learning: dict[tuple[str, float | None, bool], float] = {}
    for row, layer in layers:
        rate = rates.get(row.part) if row.lr is None else row.lr
        for name, parameter in layer.adapter.named_parameters():
            plus = row.plus_ratio != 1 and name in layer.adapter.plus
            lr = (rate or 0.0) * (row.plus_ratio if plus else 1.0)
            parameter.requires_grad_(lr > 0)
            if lr > 0:
                key = (row.part, row.lr, plus)
                learning[key] = lr
                groups.setdefault(key, []).append(parameter)
    described = [
        f"{part}{' plus' if plus else ''}" + ("" if own is None else f" lr={learning[part, own, plus]:g}")
        for part, own, plus in groups
    ]
    return [{"params": params, "lr": learning[key]} for key, params in groups.items()], described


def text_encoder_rates(
    given: float | Sequence[float] | None, default: float | None, names: Sequence[str]
) -> dict[str, float | None]:
    """One rate per text encoder: a list in order, its first value where it is too short; None = the default."""
    if given is None or (isinstance(given, Sequence) and not given):
        return {name: default for name in names}
    values = list(given) if isinstance(given, Sequence) else [given] * len(names)
    return {name: values[i] if i < len(values) else values[0] for i, name in enumerate(names)}
