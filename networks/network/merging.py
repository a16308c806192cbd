"""Putting a network's weights into its model: every base layer is looked at first, and what rounding took is told."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..layers.adapted import AdaptedLayer
from ..tensors import base_weight

log = logging.getLogger(__name__)


def check_bases(layers: Sequence[AdaptedLayer]) -> None:
    """Whether all base weights can be read and written.

    Raises:
        ValueError: the first that cannot.
    """
    for layer in layers:
        try:
            for site in layer.sites:
                base_weight.check(site.module)
        except ValueError as error:
            raise ValueError(f"{layer.lora_name}: {error}") from None


def merge(layers: Sequence[AdaptedLayer], device: torch.device | None = None) -> None:
    """Put every W' into its base layer, rounded once.

    Raises:
        ValueError: a weight cannot be read or written, or does not fit its form.
    """
    check_bases(layers)
    roundings = []
    for layer in layers:
        try:
            roundings.append(layer.merge(device=device))
        except ValueError as error:
            raise ValueError(f"{layer.lora_name}: {error}") from None
    if text := base_weight.told(roundings):
        log.warning("%s", text)
