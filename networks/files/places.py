"""A file of which much has no place is the wrong one, or its names are unknown: one rule for all programs.

An error where a whole part (an encoder), a whole kind of layers (all attention, all norms) or more than a tenth of the
file's layers have no place; less is a warning with names and counts. Parts that a call does not hold are counted.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .weight_names import PREFIXES

MOST = 0.1  # of a file's layers that may be without a place
_KINDS = 8  # of layers that are counted one by one in a message


@dataclass(frozen=True)
class Allowance:
    """What a user gave leave for: nothing, everything, or the layers of some parts.

    Attributes:
        remedy: how he gives it, for messages.
    """

    everything: bool = False
    parts: frozenset[str] = frozenset()
    remedy: str = "allow_missing=True"

    @classmethod
    def given(cls, values: Sequence[str] | None, remedy: str) -> Allowance:
        """Of an option that may be given alone ("") or with parts, several times."""
        found = frozenset(values or ())
        return cls("" in found, found - {""}, remedy)

    def covers(self, part: str) -> bool:
        return self.everything or part in self.parts


@dataclass(frozen=True)
class Missing:
    """What of a file has no place.

    Attributes:
        elsewhere: layers of parts which the call does not hold.
        unwanted: layers which the call says to leave out.
        names: the others.
    """

    elsewhere: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def counted(self) -> str:
        """A line on what is not held or wanted; "" without any."""
        lines = []
        if self.elsewhere:
            parts = ", ".join(f"{count} of {part}" for part, count in Counter(map(part_of, self.elsewhere)).items())
            lines.append(f"{len(self.elsewhere)} of its layers are for models that are not here ({parts})")
        if self.unwanted:
            lines.append(f"{len(self.unwanted)} of its layers are left out by the arguments")
        return "; ".join(lines)

    def warning(self) -> str:
        """A line on the others; "" without any."""
        return f"{len(self.names)} of its layers have no place here{examples(self.names)}" if self.names else ""


def find_missing(
    families: Mapping[str, str],
    placed: Collection[str],
    held: Collection[str],
    known: Collection[str],
    unwanted: Collection[str],
    allowance: Allowance,
    source: str,
    names: Collection[str] = (),
) -> Missing:
    """The layers of a file that have no place.

    Args:
        families: saved name of each layer of the file -> the kind of layer that it is for.
        placed: those that have a place.
        held: prefixes of the parts that the call trains or holds.
        known: prefixes of the parts that the model can have.
        unwanted: names of layers which the call says to leave out.
        allowance: what may be without a place.
        source: name of the file, for messages.
        names: saved names of the model's layers, of which an error tells the nearest.

    Raises:
        ValueError: they are too many.
    """
    without, absent = families.keys() - set(placed), {*known} - {*held}
    away = {name for name in without if part_of(name) in absent}
    refused = (without & {*unwanted}) - away
    here = [name for name in families if name not in away and name not in refused]
    left = [name for name in here if name in without]
    judged = [name for name in left if not allowance.covers(part_of(name))]
    why = _too_much(judged, here, families)
    if why:
        raise ValueError(
            f"{source}: {len(left)} of its {len(here)} layers have no place here{examples(left)}, {why}: it is of "
            f"another model or has names that are not known{nearest_name(left[0], names)}; {allowance.remedy} goes on "
            "without them"
        )
    return Missing(tuple(sorted(away)), tuple(sorted(refused)), tuple(left))


def nearest_name(name: str, names: Collection[str]) -> str:
    """A word on which of a model's layers the unknown one is most like; "" if it is like none."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (the nearest one here is {near[0]})" if near else ""


def _too_much(missing: Sequence[str], here: Sequence[str], families: Mapping[str, str]) -> str:
    """Why these are too many of those, or ""."""
    gone = set(missing)
    groups = (
        ("all of part {}", [part_of(name) for name in here], 1),
        ("all like {}", [_pattern(name) for name in here], 2),  # one alone is a layer outside the blocks
        ("all of kind {}", [families[name] for name in here], 2),
    )
    for title, keys, least in groups:
        kept = {key for key, name in zip(keys, here, strict=True) if name not in gone}
        lost = [key for key, count in Counter(keys).items() if key not in kept and count >= least]
        if lost:
            return "among them " + " and ".join(title.format(key) for key in lost[:3])
    return f"more than {MOST:.0%}" if len(missing) > MOST * len(here) else ""


def part_of(name: str) -> str:
    """`lora_unet`, `lora_te1`, or the component that a dotted name starts with."""
    if "/" in name:
        return name.partition("/")[0]
    known = (p for p in sorted(PREFIXES, key=len, reverse=True) if name.startswith(f"{p}_"))
    return next(known, name.partition("_")[0])


def _pattern(name: str) -> str:
    """The name in any block."""
    return re.sub(r"(?<=[_/])\d+(?=[_/]|$)", "N", name)


def examples(names: Sequence[str]) -> str:
    """Counted by part and kind of layer: ` (24 lora_unet: 8 attn1_to_q, 16 mlp_fc1; e.g. ...)`."""
    parts: dict[str, Counter[str]] = {}
    for name in names:
        part = part_of(name)
        parts.setdefault(part, Counter())[_kind(name.removeprefix(part).lstrip("_/"))] += 1
    counted = []
    for part, kinds in parts.items():
        common = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(_KINDS))
        rest = sum(kinds.values()) - sum(n for _, n in kinds.most_common(_KINDS))
        counted.append(f"{sum(kinds.values())} {part}: {common}" + (f", {rest} of other kinds" if rest else ""))
    return f" ({'; '.join(counted)}; e.g. {names[0]})"


def _kind(name: str) -> str:
    """What a layer is, whichever block it is in: the name behind the last block number, other numbers as N."""
    return re.sub(r"_\d+(?=_)", "_N", re.sub(r".*s(_\d+)+_(?=[a-z])", "", name))
