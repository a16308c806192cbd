"""Optimizer groups: part, learning rate by regular expression, LoRA+."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..layers.adapted import AdaptedLayer
from ..plan.plan import PlanRow

Groups = tuple[list[dict[str, Any]], list[str]]
_Key = tuple[str, "float | None", "int | None", bool]  # part, own rate, block, plus


def parameter_groups(layers: Iterable[tuple[PlanRow, AdaptedLayer]], rates: Mapping[str, float | None]) -> Groups:
    """Groups for the optimizer and one description each.

    A layer's rate is that of its regular expression, else its part's; its block and, for the plus factors, LoRA+
    multiply it. Layers at rate None or 0 stay out of the optimizer and need no gradient.

    Args:
        rates: part -> learning rate.
    """
    groups: dict[_Key, list[nn.Parameter]] = {}
    learning: dict[_Key, float] = {}
    for row, layer in layers:
        rate = rates.get(row.part) if row.lr is None else row.lr
        block = None if row.block_rate is None else row.block
        rate = (rate or 0.0) * (1.0 if row.block_rate is None else row.block_rate)
        for path, parameter in layer.named_parameters():
            name = path.rpartition(".")[2]
            if name in layer.adapter.frozen:
                continue
            plus = row.plus_ratio != 1 and name in layer.adapter.plus
            lr = rate * (row.plus_ratio if plus else 1.0)
            parameter.requires_grad_(lr > 0)
            if lr > 0:
                key = (row.part, row.lr, block, plus)
                learning[key] = lr
                groups.setdefault(key, []).append(parameter)
    described = [
        part
        + ("" if block is None else f" block {block}")
        + (" plus" if plus else "")
        + ("" if own is None else f" lr={learning[part, own, block, plus]:g}")
        for part, own, block, plus in groups
    ]
    return [{"params": params, "lr": learning[key]} for key, params in groups.items()], described


def text_encoder_rates(
    given: float | Sequence[float] | None, default: float | None, names: Sequence[str]
) -> dict[str, float | None]:
    """One rate per text encoder: a list in order, its last value where it is too short; None = the default."""
    if given is None or (isinstance(given, Sequence) and not given):
        return {name: default for name in names}
    values = list(given) if isinstance(given, Sequence) else [given] * len(names)
    return {name: values[i] if i < len(values) else values[-1] for i, name in enumerate(names)}
