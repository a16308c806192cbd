"""Optimizer groups: part, learning rate by regular expression, LoRA+, magnitudes of DoRA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..layers.adapted import AdaptedLayer
from ..plan.plan import PlanRow

Groups = tuple[list[dict[str, Any]], list[str]]


@dataclass(frozen=True)
class _Group:
    """What the parameters of a group have in common.

    Attributes:
        own_rate: of a regular expression; None = the part's.
        block: number of a block with a rate of its own.
        kind: "plus", what LoRA+ trains faster; "magnitudes" of DoRA with a rate of their own; "" = all others.
    """

    part: str
    own_rate: float | None
    block: int | None
    kind: str

    def describe(self, rate: float) -> str:
        text = self.part + ("" if self.block is None else f" block {self.block}") + (self.kind and f" {self.kind}")
        return text if self.own_rate is None else f"{text} lr={rate:g}"


def parameter_groups(layers: Iterable[tuple[PlanRow, AdaptedLayer]], rates: Mapping[str, float | None]) -> Groups:
    """Groups for the optimizer and one description each.

    A layer's rate is that of its regular expression, else its part's; its block multiplies it, for the plus factors
    LoRA+, too, and for magnitudes dora_lr_ratio. What is at rate None or 0 stays out of the optimizer and needs no
    gradient.

    Args:
        layers: with the plan's row of each.
        rates: part -> learning rate.
    """
    groups: dict[_Group, list[nn.Parameter]] = {}
    learning: dict[_Group, float] = {}
    for row, layer in layers:
        ratios = {"plus": row.plus_ratio, "magnitudes": row.dora_ratio}
        for parameter, kind in _trained(layer):
            rate = _rate(row, rates) * ratios.get(kind, 1.0)
            parameter.requires_grad_(rate > 0)
            if rate > 0:
                kind = kind if ratios.get(kind) != 1 else ""
                group = _Group(row.part, row.lr, None if row.block_rate is None else row.block, kind)
                learning[group] = rate
                groups.setdefault(group, []).append(parameter)
    described = [group.describe(learning[group]) for group in groups]
    return [{"params": params, "lr": learning[group]} for group, params in groups.items()], described


def _trained(layer: AdaptedLayer) -> Iterator[tuple[nn.Parameter, str]]:
    """A layer's parameters but those that are never trained, each with what it is: "plus", "magnitudes", or ""."""
    for path, parameter in layer.learnt():
        own = "magnitudes" if parameter is layer.magnitude_change else ""
        yield parameter, "plus" if path.rpartition(".")[2] in layer.adapter.spec.plus else own


def _rate(row: PlanRow, rates: Mapping[str, float | None]) -> float:
    """Of a layer, before the ratios."""
    rate = rates.get(row.part) if row.lr is None else row.lr
    return (rate or 0.0) * (1.0 if row.block_rate is None else row.block_rate)


def text_encoder_rates(
    given: float | Sequence[float] | None, default: float | None, names: Sequence[str]
) -> dict[str, float | None]:
    """One rate per text encoder: a list in order, its last value where it is too short; None = the default.

    Args:
        given: --text_encoder_lr as the host hands it over.
        default: for all of them, where none is given.
        names: of the encoders' parts.
    """
    if given is None or (isinstance(given, Sequence) and not given):
        return {name: default for name in names}
    values = list(given) if isinstance(given, Sequence) else [given] * len(names)
    return {name: values[i] if i < len(values) else values[-1] for i, name in enumerate(names)}
