"""Which layers of a file belong to which layers of a network, before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ..files import codec
from ..files.adapter_file import AdapterFile
from ..files.codec import SavedLayer
from ..files.places import Allowance, Missing, find_missing, part_of
from ..layers.adapted import AdaptedLayer
from ..plan.plan import PlanRow

log = logging.getLogger(__name__)

NAMED = 5  # layers in a message


@dataclass(frozen=True)
class Places:
    """Where a network has a place for the layers of a file.

    Attributes:
        layers: of the network, by saved name.
        aliases: other saved names for them.
        held, known: prefixes of the parts that it has, and that its architecture has.
        unwanted: saved names of layers that its call left out.
        title: of the network, for messages.
        allowance: what of a file may be without a place.
    """

    layers: Mapping[str, tuple[PlanRow, AdaptedLayer]]
    aliases: Mapping[str, str]
    held: Collection[str]
    known: Collection[str]
    unwanted: Collection[str]
    title: str
    allowance: Allowance

    def own(self, name: str) -> str:
        """The network's name of a file's layer; "" if it has none."""
        return name if name in self.layers else self.aliases.get(name, "")


def match(file: AdapterFile, places: Places) -> tuple[dict[str, SavedLayer], Missing]:
    """Saved layers by the network's own names, and what of the file has no place in it.

    Raises:
        ValueError: they do not fit, none or too few belong to this network, or magnitudes of DoRA are missing.
    """
    _check_read(file, places)
    found = {own: saved for name, saved in file.layers.items() if (own := places.own(name)) in places.layers}
    _check_fit(file, found, places)
    if not found:
        raise ValueError(_nothing(file, places))
    families = file.families
    placed = {name for name in families if places.own(name) in places.layers}
    away = (places.held, places.known, places.unwanted)
    missing = find_missing(families, placed, *away, places.allowance, file.source, places.layers)
    return _with_magnitudes(file, found, places), missing


def _check_read(file: AdapterFile, places: Places) -> None:
    """What the file has for the parts that the network holds is understood, or left out by intention."""
    for name, suffix in file.unread.items():
        part, text = part_of(name), codec.unknown_form(file.source, name, suffix)
        if places.own(name) in places.layers:
            raise ValueError(text)
        if part in places.held and name not in places.unwanted and not places.allowance.covers(part):
            raise ValueError(f"{text}; {places.allowance.remedy} goes on without such layers")


def _check_fit(file: AdapterFile, found: Mapping[str, SavedLayer], places: Places) -> None:
    wrong = []
    for own, saved in found.items():
        try:
            _check(places.layers[own][1], saved)
        except ValueError as error:
            wrong.append(f"{saved.name}: {error}")
    if wrong:
        raise ValueError(
            f"{file.source} does not fit this network in {len(wrong)} layers, e.g. {wrong[0]}; use the dim and "
            "arguments it was trained with, or --dim_from_weights, which takes them from the file"
        )


def _check(layer: AdaptedLayer, saved: SavedLayer) -> None:
    if layer.adapter.spec.file_algo != saved.algorithm.spec.file_algo:
        raise ValueError(f"the file has {saved.algorithm.spec.name}, this network has {layer.adapter.spec.name}")
    side = saved.side(layer.adapter.geometry)
    if side and layer.side and side != layer.side:
        raise ValueError(
            f"the file has DoRA magnitudes on the {side} side, this network on the other: give "
            f"wd_on_output={side == 'output'}"
        )
    layer.adapter.check_fits(saved.tensors)


def _with_magnitudes(file: AdapterFile, found: Mapping[str, SavedLayer], places: Places) -> dict[str, SavedLayer]:
    """The layers with the magnitudes that this network uses, whatever the dialect.

    Raises:
        ValueError: some that it expects are missing.
    """
    dora = [own for own in found if places.layers[own][1].side]
    missing = [found[own].name for own in dora if found[own].magnitude is None]
    if missing and len(missing) == len(dora):
        raise ValueError(
            f"DoRA flag mismatch: this network expects DoRA but {file.source} has no magnitudes; leave out "
            "use_dora=True, or load a file that was trained with it"
        )
    if missing:
        raise ValueError(
            f"{file.source} has no DoRA magnitude for {len(missing)} of {len(dora)} layers: "
            f"{', '.join(sorted(missing)[:NAMED])}; use the arguments that it was trained with"
        )
    surplus = [own for own in found if found[own].magnitude is not None and own not in dora]
    if surplus:
        log.warning(
            "DoRA flag mismatch: %s has DoRA magnitudes for %d layers but this network does not expect them there: "
            "they are ignored and the rest acts as plain LoRA; add use_dora=True to use them",
            file.source, len(surplus),
        )  # fmt: skip
    return {**found, **{own: replace(found[own], magnitude=None) for own in surplus}}


def _nothing(file: AdapterFile, places: Places) -> str:
    ours = next(iter(places.layers), "-")
    return (
        f"{file.source} has nothing for this network: it holds names like {file.names_like}, this network "
        f"({places.title}) has names like {ours}; choose a file of this architecture"
    )
