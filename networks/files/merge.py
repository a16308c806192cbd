"""Merging straight from a file: no trainer and no model object needed, only weights."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.adapted import AdaptedLayer
from ..tensors.geometry import Geometry
from .codec import SavedLayer


def merged_weight(saved: SavedLayer, weight: Tensor, multiplier: float = 1.0) -> Tensor:
    """W' of one layer, by the formula of the forward pass.

    Args:
        saved: the layer as `codec.decode` found it.
        weight: base weight [O, I, *kernel], fp32 or wider.

    Raises:
        ValueError: the file's tensors do not fit the weight.
    """
    adapter = saved.build(Geometry.of_weight(weight.shape)).to(weight.device)
    layer = AdaptedLayer(saved.name, nn.Identity(), adapter, saved.scale(adapter.record.rank))
    return layer.new_weight(weight, multiplier).detach()
