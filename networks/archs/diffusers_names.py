"""Where diffusers' model of an architecture has the layers of the trainer's: the records of names, read backwards."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from .spec import ArchSpec, Part
from .spellings import Rename

_GROUP = re.compile(r"\(([^()]*)\)")


@dataclass(frozen=True)
class Place:
    """One of diffusers' layers, and the part of a trainer's layer which it is.

    Attributes:
        path: dotted name, with the pipeline's component in front: `transformer.transformer_blocks.0.attn.to_q`.
        start, stop: output rows of the trainer's layer.
        swapped: its halves of rows are in the other order there.
    """

    path: str
    start: int
    stop: int
    swapped: bool = False


def places(arch: ArchSpec, part: Part, trainer_name: str, rows: int, columns: int) -> tuple[Place, ...]:
    """diffusers' layers that make up one of the trainer's, in the order of its rows.

    Args:
        rows, columns: output and input features of the trainer's layer.

    Raises:
        ValueError: diffusers has no such part.
    """
    if not part.diffusers:
        raise ValueError(f"diffusers reads no adapter of the {part.name} of {arch.title}")
    layers = _own_layers(part, trainer_name)
    sizes = (rows,) if len(layers) == 1 else arch.split_of(trainer_name, rows, columns)
    assert len(sizes) == len(layers), f"{trainer_name}: {len(layers)} layers in diffusers, {len(sizes)} projections"
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        Place(f"{part.diffusers}.{layer.own}", start, start + size, layer.swapped and rows == 2 * columns)
        for layer, start, size in zip(layers, starts, sizes, strict=True)
    )


def _own_layers(part: Part, trainer_name: str) -> tuple[Rename, ...]:
    known = _backwards(part.layouts)
    for i, (expression, _, first) in enumerate(known):
        match = expression.fullmatch(trainer_name)
        if match:
            return tuple(replace(one, own=match.expand(own)) for _, own, one in known[i : i + first.count])
    for own, new in sorted(part.rename, key=lambda pair: -len(pair[1])):
        if trainer_name.startswith(new):
            return (Rename(own + trainer_name[len(new) :], trainer_name),)
    return (Rename(trainer_name, trainer_name),)


@functools.lru_cache
def _backwards(layouts: tuple[Rename, ...]) -> tuple[tuple[re.Pattern[str], str, Rename], ...]:
    """(expression on the trainer's name, template of this model's name, record) of each layout."""
    return tuple(_turn(one) for one in layouts)


def _turn(layout: Rename) -> tuple[re.Pattern[str], str, Rename]:
    groups, seen = _GROUP.findall(layout.own), set(re.findall(r"\\(\d)", layout.trainer))
    assert len(seen) == len(groups), f"{layout.own}: every group must be in {layout.trainer}"
    pieces = _GROUP.split(layout.own)[::2]
    template = re.sub(r"\\(.)", r"\1", pieces[0])
    for number, piece in enumerate(pieces[1:], start=1):
        template += rf"\g<g{number}>" + re.sub(r"\\(.)", r"\1", piece)
    return re.compile(layout.trainer_pattern), template, layout
