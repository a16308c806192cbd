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
    geometry = Geometry.of_weight(weight.shape)
    adapter, base = saved.build(geometry).to(weight.device), nn.Identity()
    base.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    scale = saved.scale(adapter.record.saved_rank)
    layer = AdaptedLayer(saved.name, base, adapter, scale, dora=saved.side(geometry))
    layer.take_magnitude(saved.magnitude)
    return layer.new_weight(weight, multiplier).detach()
