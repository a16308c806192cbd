"""Which layers of a file belong to which layers of a network, before anything is changed."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from ..algos import Adapter
from ..files import codec, resize
from ..files.adapter_file import AdapterFile
from ..files.codec import SavedLayer
from ..files.places import Allowance, Missing, find_missing, part_of
from ..layers.adapted import AdaptedLayer
from ..plan.plan import PlanRow
from ..tensors.seeding import seeded

log = logging.getLogger(__name__)

NAMED = 5  # layers in a message
EXACT = 1e-6  # of the update: what rounding to fp32 takes


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
        resizes: layers of a file with other ranks get those of the network.
    """

    layers: Mapping[str, tuple[PlanRow, AdaptedLayer]]
    aliases: Mapping[str, str]
    held: Collection[str]
    known: Collection[str]
    unwanted: Collection[str]
    title: str
    allowance: Allowance
    resizes: bool = False

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
    found = _with_ranks(file, found, places) if places.resizes else found
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


def _with_ranks(file: AdapterFile, found: Mapping[str, SavedLayer], places: Places) -> dict[str, SavedLayer]:
    """The layers with the ranks of the network's, and the log says how near they are. What fits no rank stays as it is,
    for the check."""
    resized, lost, whole = dict(found), list[float](), list[float]()
    counts = Counter[tuple[int, int]]()
    for own, saved in found.items():
        row, layer = places.layers[own]
        if layer.adapter.spec.file_algo != saved.algorithm.spec.file_algo or _fits(layer, saved):
            continue
        with contextlib.suppress(ValueError), seeded(0):  # the trainer's own draws do not depend on it
            resized[own] = resize.fitted(saved, _at_start(row, layer))
            counts[_rank(saved), _rank(resized[own])] += 1
            base = layer.whole_weight() if saved.algorithm.spec.relative else None
            error, size = resize.distance(resized[own], saved, row.shape, base)
            lost, whole = [*lost, error], [*whole, size]
    if counts:
        told = ", ".join(f"{count} from {old} to {new}" for (old, new), count in counts.items())
        error = math.hypot(*lost) / (math.hypot(*whole) or 1.0)
        log.info(
            "%s: %d layers get the ranks of this network (%s); %s",
            file.source, sum(counts.values()), told,
            f"{error:.2%} of the update is lost" if error > EXACT else "the update is that of the file",
        )  # fmt: skip
    return resized


def _fits(layer: AdaptedLayer, saved: SavedLayer) -> bool:
    try:
        layer.adapter.check_fits(saved.tensors)
    except ValueError:
        return False
    return True


def _rank(saved: SavedLayer) -> int:
    return saved.algorithm.spec.shown_rank(saved.tensors) or 0


def _at_start(row: PlanRow, layer: AdaptedLayer) -> Adapter:
    """A new adapter of a layer, of which ranks are taken that its file has not."""
    adapter = replace(row, init="default", init_seed=row.init_seed or 0, plus_unit=1.0).make_adapter()
    if adapter.wants_base:
        with torch.no_grad():
            adapter.init_from_base(layer.whole_weight())
    return adapter


def _check_fit(file: AdapterFile, found: Mapping[str, SavedLayer], places: Places) -> None:
    wrong = []
    for own, saved in found.items():
        try:
            _check(places.layers[own][1], saved)
        except ValueError as error:
            wrong.append(f"{saved.name}: {error}")
    if wrong:
        raise ValueError(
            f"{file.source} does not fit this network in {len(wrong)} layers, e.g. {wrong[0]}; {_remedy(found, places)}"
        )


def _remedy(found: Mapping[str, SavedLayer], places: Places) -> str:
    """What to do about layers that do not fit."""
    dims = Counter[int]()
    for own, saved in found.items():
        adapter = places.layers[own][1].adapter
        rank, wanted = _rank(saved), adapter.laid_out.saved_rank
        if wanted and rank != wanted and adapter.spec.file_algo == saved.algorithm.spec.file_algo:
            dims[rank * adapter.dim // wanted] += 1
    if not any(dims) or places.resizes:
        return "use the dim and arguments it was trained with, or --dim_from_weights, which takes them from the file"
    return (
        f"give the dim of the file, network_dim={dims.most_common(1)[0][0]} (or --dim_from_weights), or "
        "resume_resize=True, which gives its layers the ranks of this network (kohya-networks resize makes such a file)"
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
