"""Layers that have each other's names in a file, see Twins of archs.spellings: told by what they hold, not by who wrote
it."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from ..archs import ARCHS
from ..archs.spellings import Twins

T = TypeVar("T", bound=Collection[str])
log = logging.getLogger(__name__)

_warned: set[Twins] = set()
_TWINS = tuple(twins for arch in ARCHS for part in arch.parts for twins in part.twins)
NAMED = "live_names_are_right"  # key of a live state with such layers


def right_names(layers: Mapping[str, Collection[str]], own_class: bool) -> dict[str, str]:
    """Saved name -> the name that it should have, for layers of a file which have another's.

    Args:
        layers: saved name -> ends of the keys of its tensors.
        own_class: the model at hand is of the trainer's class. It decides where a file without marks has both: it was
            probably trained on such a model, and only old ones of the trainer's class are wrong.
    """
    found: dict[str, str] = {}
    for twins, *names in _pairs(layers):
        has = [twins.tensor in layers.get(name, ()) for name in names]
        marked = [there and twins.mark in layers[name] for there, name in zip(has, names, strict=True)]
        if any(marked):
            wrong = marked == [True, False]
        else:  # the first is the one which other programs train, too
            wrong = own_class if all(has) else has[1]
            if all(has):
                _warn(twins, " and ".join(names))
        found |= dict(zip(names, names[::-1], strict=True)) if wrong else {}
    return {name: right for name, right in found.items() if name in layers}


def rightly_named(layers: Mapping[str, T], own_class: bool) -> dict[str, T]:
    """The layers of a file under the names that they should have."""
    right = right_names(layers, own_class)
    return {right.get(name, name): layer for name, layer in layers.items()}


def _warn(twins: Twins, names: str) -> None:
    """Once per process: a file has many of them, and is read several times."""
    if twins not in _warned:
        _warned.add(twins)
        log.warning(
            "%s have each other's names in old files that were trained on the trainer's class: this one is taken for a "
            "file of the class of the model at hand; if it is of the other, load it on that and save it again",
            names,
        )


def is_marked(name: str, tensors: Collection[str]) -> bool:
    """Whether this layer is saved with the mark, which shows that names are right."""
    return any(name == second and twins.tensor in tensors for twins, _, second in _pairs([name]))


def name_in(tensors: Mapping[str, Any], name: str) -> str:
    """The name which a layer has in a file, read on a model of the trainer's class."""
    layers: dict[str, set[str]] = {}
    for key in tensors if has_twins([name]) else ():
        layers.setdefault(key.partition(".")[0], set()).add(key.partition(".")[2])
    right = right_names(layers, own_class=True)
    return next((written for written in layers if right.get(written, written) == name), name)


def has_twins(names: Iterable[str]) -> bool:
    """Whether there are such layers among these."""
    return next(_pairs(names), None) is not None


def renamed_state(state: Mapping[str, Any], own_class: bool) -> dict[str, Any]:
    """A live state with every layer under its right name, without the mark. One that had none is old."""
    names = {key.partition(".")[0] for key in state}
    wrong = own_class and NAMED not in state
    right = {name: other for _, *pair in _pairs(names) for name, other in (pair, pair[::-1])} if wrong else {}
    parts = ((key.partition("."), value) for key, value in state.items() if key != NAMED)
    return {f"{right.get(name, name)}{dot}{suffix}": value for (name, dot, suffix), value in parts}


def _pairs(names: Iterable[str]) -> Iterator[tuple[Twins, str, str]]:
    names = list(names)
    for twins in (one for one in _TWINS if not any(map(re.compile(one.unless).fullmatch, names))):
        either = re.compile(f"({twins.stem})(?:{re.escape(twins.first)}|{re.escape(twins.second)})")
        for stem in dict.fromkeys(match[1] for match in map(either.fullmatch, names) if match):
            yield twins, stem + twins.first, stem + twins.second
