"""W' of one layer of a file, by the formula of the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layers.adapted import AdaptedLayer
from ..tensors.norms import weight_geometry
from .codec import SavedLayer


def merged_weight(
    saved: SavedLayer,
    weight: Tensor,
    multiplier: float = 1.0,
    start: Callable[[], Tensor] | None = None,
    bias_too: bool = False,
    in_place: bool = False,
) -> Tensor:
    """W' of one layer, by the formula of the forward pass.

    Args:
        saved: the layer as `codec.decode` found it.
        weight: base weight [O, I, *kernel], or [C] of a normalisation layer; fp32 or wider.
        start: gives it as it was before other files were merged into it, where the adapter's start values come from.
        bias_too: the caller sees to the bias (`merged_bias`).
        in_place: the weight may be written over, which saves the memory of another.

    Returns:
        As the weight; itself where nothing changes, or in place.

    Raises:
        ValueError: the file's tensors do not fit the weight, or would change a bias that is not merged.
    """
    if saved.bias_change is not None and not bias_too:
        raise ValueError(
            f"it changes a bias ({saved.algorithm.spec.bias_key}), which cannot be merged from the weight "
            "alone: apply the network to its model and merge there, or merge the file into the checkpoint "
            "(kohya-networks merge)"
        )
    with _layer(saved, weight) as layer:
        with torch.no_grad():
            if start is not None and layer.adapter.wants_base:
                layer.adapter.init_from_base(start())
            layer.init_from_base()
            layer.load_magnitude(saved.magnitude, saved.folded)
            return layer.new_weight(weight, multiplier, in_place).detach()


@contextmanager
def _layer(saved: SavedLayer, weight: Tensor) -> Iterator[AdaptedLayer]:
    """It on a module that has nothing but this weight."""
    geometry = weight_geometry(weight.shape)
    adapter, base = saved.build(geometry).to(weight.device), nn.Identity()
    base.register_parameter("weight", nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False))
    layer = AdaptedLayer(saved.name, base, adapter, saved.scale, dora=saved.side(geometry))
    try:
        layer.base.weight = nn.Parameter(weight, requires_grad=False)  # not before: no start of magnitudes is wanted
        yield layer
    finally:
        layer.sites = ()  # each knows its layer: as a cycle they would keep the weight until the next collection


def refolded(saved: SavedLayer, weight: Tensor, folded: bool) -> SavedLayer:
    """A layer whose magnitudes are folded for readers that divide by the norm of the base weight alone, or are not.

    Args:
        saved: the layer.
        weight: base weight [O, I, *kernel]; fp32 or wider.
        folded: what they are to be.

    Raises:
        ValueError: the file's tensors do not fit the weight.
    """
    if saved.magnitude is None or saved.folded == folded:
        return saved
    with _layer(saved, weight) as layer:
        magnitude = layer.folded(saved.magnitude.to(weight), back=not folded)
    return replace(
        saved, magnitude=magnitude.to(torch.promote_types(saved.magnitude.dtype, torch.float32)), folded=folded
    )


def merged_bias(saved: SavedLayer, bias: Tensor, multiplier: float = 1.0) -> Tensor:
    """The bias of one layer with the file's change of it.

    Args:
        bias: base bias [O], fp32 or wider.

    Raises:
        ValueError: the change does not fit the bias.
    """
    change = saved.bias_change
    if change is None or multiplier == 0:
        return bias
    if change.shape != bias.shape:
        raise ValueError(
            f"{saved.algorithm.spec.bias_key} {tuple(change.shape)} does not fit a bias of {tuple(bias.shape)}: choose "
            "the model that it was trained for"
        )
    return bias + multiplier * change.to(bias)
