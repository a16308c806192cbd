"""Where another program's model of an architecture has the layers of the trainer's: the records of names, read
backwards."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from .spec import ArchSpec, Part
from .spellings import Rename

DIFFUSERS, COMFYUI = "diffusers", "comfyui"


@dataclass(frozen=True)
class Place:
    """Another program's layer, or a share of one, and the part of a trainer's layer which it is.

    Attributes:
        path: dotted name; diffusers' begin with the pipeline's component: `transformer.transformer_blocks.0.attn.to_q`.
        start, stop: output rows of the trainer's layer.
        swapped: its halves of rows are in the other order there.
        piece, pieces: where that program has one layer for several of the trainer's: its rows are `pieces` equal
            shares, of which this one's begin there, from the first row down; pieces 1 = the place is a whole layer.
        shares: how many of them are this one's.
    """

    path: str
    start: int
    stop: int
    swapped: bool = False
    piece: int = 0
    pieces: int = 1
    shares: int = 1


def places(
    arch: ArchSpec, part: Part, trainer_name: str, rows: int, columns: int, program: str = DIFFUSERS
) -> tuple[Place, ...]:
    """Another program's layers that make up one of the trainer's, in the order of its rows.

    Args:
        trainer_name: dotted.
        rows, columns: output and input features of the trainer's layer.
        program: DIFFUSERS or COMFYUI. ComfyUI reads text encoders under the trainers' names: of those alone it is their
            place.

    Raises:
        ValueError: diffusers has no such part.
    """
    if program == DIFFUSERS and not part.diffusers:
        raise ValueError(f"diffusers reads no adapter of the {part.name} of {arch.title}")
    layers = own_layers(part, trainer_name, program)
    sizes = (rows,) if len(layers) == 1 else arch.split_of(trainer_name, rows, columns)
    assert len(sizes) == len(layers), f"{trainer_name}: {len(layers)} layers in {program}, {len(sizes)} projections"
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    stem = f"{part.diffusers}." if program == DIFFUSERS else ""
    return tuple(
        Place(
            f"{stem}{layer.own}",
            start,
            start + size,
            layer.swapped and rows == 2 * columns,
            layer.piece,
            layer.pieces,
            layer.shares,
        )
        for layer, start, size in zip(layers, starts, sizes, strict=True)
    )


def own_layers(part: Part, trainer_name: str, program: str = DIFFUSERS) -> tuple[Rename, ...]:
    """The records of a trainer's layer in the names of a program, filled in, in the order of its rows; a layer that has
    the trainer's name there is one of its own."""
    known, subtree = _table(part, program)
    for i, (expression, _, first) in enumerate(known):
        match = expression.fullmatch(trainer_name)
        if match:
            return tuple(
                replace(one, own=match.expand(own), trainer=trainer_name) for _, own, one in known[i : i + first.count]
            )
    for own, new in subtree:
        if trainer_name.startswith(new):
            return (Rename(own + trainer_name[len(new) :], trainer_name),)
    return (Rename(trainer_name, trainer_name),)


_Backwards = tuple[tuple[re.Pattern[str], str, Rename], ...]


@functools.lru_cache
def _table(part: Part, program: str) -> tuple[_Backwards, tuple[tuple[str, str], ...]]:
    """(expression on the trainer's name, template of the program's name, record) of each layer; prefixes of both."""
    if program == COMFYUI:
        return tuple(_turn(one) for one in part.comfyui), ()
    longest_first = tuple(sorted(part.rename, key=lambda pair: -len(pair[1])))
    return tuple(_turn(one) for one in part.layouts), longest_first


def _turn(layout: Rename) -> tuple[re.Pattern[str], str, Rename]:
    groups, seen = re.findall(r"\(([^()]*)\)", layout.own), set(re.findall(r"\\(\d)", layout.trainer))
    assert len(seen) == len(groups), f"{layout.own}: every group must be in {layout.trainer}"
    pieces = re.split(r"\([^()]*\)", layout.own)
    template = re.sub(r"\\(.)", r"\1", pieces[0])
    for number, piece in enumerate(pieces[1:], start=1):
        template += rf"\g<g{number}>" + re.sub(r"\\(.)", r"\1", piece)
    return re.compile(layout.trainer_pattern), template, layout
