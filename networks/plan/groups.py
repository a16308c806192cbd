"""A few regular expressions for a set of layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

_NUMBER = "[0-9]+"
Layer = tuple[str, str]  # the name of its part, its dotted name
_Key = tuple[tuple[str, ...], tuple[str, ...]]  # first and last components of a name


def patterns_for(wanted: Collection[str], others: Collection[str]) -> list[str]:
    """Regular expressions that match the whole of each wanted name and of none of the others.

    Args:
        wanted, others: dotted names.

    Returns:
        As few as are easily found, those that mean most layers first.
    """
    wanted, others = set(wanted), set(others) - set(wanted)
    meant = {name: set(_keys(name)) for name in wanted}
    forbidden = {key for name in others for key in _keys(name)}
    found, left = list[str](), set(wanted)
    while left:
        counts = Counter(key for name in left for key in meant[name] - forbidden)
        if not counts:
            break
        key = max(counts, key=lambda one: (counts[one], -len(one[0]) - len(one[1]), one))
        found.append(_expression(key, others))
        left = {name for name in left if key not in meant[name]}
    return [*found, *_by_numbers(left, others)]


def patterns_in(wanted: Collection[Layer], others: Collection[Layer]) -> list[str]:
    """The same where parts may have names alike: an expression names the part where it must.

    Args:
        wanted, others: (part, dotted name).
    """
    names, rest = ({name for _, name in layers} for layers in (wanted, others))
    if names.isdisjoint(rest):
        return patterns_for(names, rest)
    found = list[str]()
    for part in sorted({part for part, _ in wanted}):
        own, theirs = ({name for one, name in layers if one == part} for layers in (wanted, others))
        found += [f"{part}:{pattern}" for pattern in patterns_for(own, theirs)]
    return found


def _keys(name: str) -> Iterator[_Key]:
    """What a pattern may say of a name: how it begins, how it ends in any block, or the whole in any block."""
    parts = tuple(name.split("."))
    free = tuple(_NUMBER if part.isdigit() else part for part in parts)
    yield from ((parts[:n], ()) for n in range(1, len(parts)))
    yield from (((), free[-n:]) for n in range(1, len(parts)) if not free[-n] == _NUMBER)
    yield free, ("",)


def _expression(key: _Key, others: Collection[str]) -> str:
    first, last = key
    if last == ("",):
        return _unless(others, ".".join(first), "[.]".join(first))
    if first:
        return _unless(others, f"{'.'.join(first)}.*", f"{'[.]'.join(first)}[.].*")
    return _unless(others, f".*{'.'.join(last)}", f".*[.]{'[.]'.join(last)}")


def _unless(others: Collection[str], plain: str, strict: str) -> str:
    """The plain one, as trainers' documentation writes them, where it means no other layer."""
    return strict if any(re.fullmatch(plain, name) for name in others) else plain


def _by_numbers(names: Collection[str], others: Collection[str]) -> list[str]:
    """Names that are alike but for their numbers, in one expression where the numbers are free of each other."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name in sorted(names):
        parts = name.split(".")
        shape = tuple("" if part.isdigit() else part for part in parts)
        groups.setdefault(shape, []).append(tuple(part for part in parts if part.isdigit()))
    return [text for shape, numbers in groups.items() for text in _product(shape, numbers, others)]


def _product(shape: tuple[str, ...], numbers: Sequence[tuple[str, ...]], others: Collection[str]) -> list[str]:
    choices = [list(dict.fromkeys(column)) for column in zip(*numbers, strict=True)]
    waiting = iter(choices)
    parts = [part or _either(next(waiting)) for part in shape]
    strict = "[.]".join(parts)
    if len(numbers) == 1 or not any(re.fullmatch(strict, name) for name in others):
        return [_unless(others, ".".join(parts), strict)]
    half = len(numbers) // 2
    return [*_product(shape, numbers[:half], others), *_product(shape, numbers[half:], others)]


def _either(numbers: Sequence[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"({'|'.join(sorted(numbers, key=int))})"
