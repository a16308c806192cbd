"""Which layers of a file belong to which layers of a network, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..files import codec
from ..files.codec import SavedLayer
from ..layers.adapted import AdaptedLayer
from .plan import PlanRow


def match(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, tuple[PlanRow, AdaptedLayer]],
    aliases: Mapping[str, str],
    source: str,
    title: str,
) -> tuple[dict[str, SavedLayer], tuple[str, ...]]:
    """Saved layers by the network's own names, and the names of those that have no place in it.

    Args:
        layers: of the network, by saved name.
        aliases: other saved names for them.
        title: of the network, for messages.

    Raises:
        ValueError: they do not fit, or none belongs to this network.
    """
    saved, unknown = codec.decode(tensors)
    unexpected: list[str] = []
    found: dict[str, SavedLayer] = {}
    wrong: list[str] = []
    for key in unknown:
        name, _, suffix = key.partition(".")
        if name in layers or name in aliases:
            raise ValueError(codec.unknown_form(source, name, suffix))
        else:
            unexpected.append(name)
    for name, layer in saved.items():
        own = name if name in layers else aliases.get(name, "")
        if own not in layers:
            unexpected.append(name)
            continue
        found[own] = layer
        try:
            _check(layers[own][1], layer)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise ValueError(_misfit(source, wrong))
    if not found:
        theirs, ours = next(iter(tensors), "no tensor"), next(iter(layers), "-")
        raise ValueError(
            f"{source} has nothing for this network: it holds names like {theirs}, this network "
            f"({title}) has names like {ours}; choose a file of this architecture"
        )
    return found, tuple(dict.fromkeys(unexpected))


def _check(layer: AdaptedLayer, saved: SavedLayer) -> None:
    if (layer.adapter.saved_as or layer.adapter.algo) != saved.algorithm.form():
        raise ValueError(f"the file has {saved.algorithm.algo}, this network has {layer.adapter.algo}")
    side, own = saved.side(layer.adapter.geometry), layer.side
    if side and side != own:
        remedy = "give use_dora=True" if not own else f"give wd_on_output={side == 'output'}"
        raise ValueError(f"the file has DoRA magnitudes on the {side} side, this network has not: {remedy}")
    layer.adapter.fits(saved.tensors)


def _misfit(source: str, wrong: Sequence[str]) -> str:
    return (
        f"{source} does not fit this network in {len(wrong)} layers, e.g. {wrong[0]}; use the dim and arguments it was "
        "trained with, or --dim_from_weights, which takes them from the file"
    )
