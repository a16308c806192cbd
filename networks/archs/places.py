"""Where another program's model of an architecture has the layers of the trainer's: the records of names, read
backwards."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .spec import ArchSpec, Part
from .spellings import Rename

DIFFUSERS, COMFYUI = "diffusers", "comfyui"
_KEPT = 1 << 14  # layers whose names are kept: several programs ask for those of one model


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


@dataclass(frozen=True)
class Layer:
    """One layer of the trainer's model.

    Attributes:
        part: of the architecture.
        trainer_name, saved_name: dotted, and in the trainer's files.
        shape: of its weight, [O, I, *kernel].
        trained: whether an adapter's file has it.
    """

    part: Part
    trainer_name: str
    saved_name: str
    shape: tuple[int, ...]
    trained: bool = True


@dataclass(frozen=True)
class Share:
    """What a trainer's layer is of another program's.

    Attributes:
        saved_name: of the trainer's; "" = it is not trained.
        start, stop: its output rows that are meant.
        of: how many it has.
        swapped: their halves are in the other order there.
    """

    saved_name: str
    start: int
    stop: int
    of: int
    swapped: bool = False

    @property
    def is_all(self) -> bool:
        """All rows, in the trainer's order."""
        return self.stop - self.start == self.of and not self.swapped

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of its rows, in the order that they have there."""
        middle = (self.start + self.stop) // 2
        return ((middle, self.stop), (self.start, middle)) if self.swapped else ((self.start, self.stop),)


@dataclass(frozen=True)
class Target:
    """One layer of another program's model.

    Attributes:
        name: what stands before the suffixes of its keys in a file.
        shares: in the order of its rows; one of them at least is trained.
        columns: the rest of its weight's shape, [I, *kernel].
    """

    name: str
    shares: tuple[Share, ...]
    columns: tuple[int, ...]


def targets(arch: ArchSpec, layers: Iterable[Layer], program: str) -> tuple[Target, ...]:
    """Another program's layers that the trained ones of these are, in their order.

    In files for ComfyUI the trainers' names stay where it knows those of all trained layers of a part.

    Args:
        layers: of the model, those that are not trained included: some may be a part of one that is.

    Raises:
        ValueError: as `places`.
    """
    every, found = list(layers), dict[str, dict[int, tuple[Layer, Place]]]()
    flat = {part for part in arch.parts if program == COMFYUI and _stays_flat(arch, part, every)}
    for layer in every:
        if layer.part in flat:
            found[layer.saved_name] = {0: (layer, Place(layer.saved_name, 0, layer.shape[0]))}
        elif layer.trained or program == COMFYUI:  # which alone may have a part of it in another layer
            for place in _places_of(arch, layer, program):
                found.setdefault(place.path, {})[place.piece] = layer, place
    return tuple(
        Target(name, tuple(_share(*pieces[i]) for i in sorted(pieces)), pieces[min(pieces)][0].shape[1:])
        for name, pieces in found.items()
        if any(layer.trained for layer, _ in pieces.values())
    )


def _places_of(arch: ArchSpec, layer: Layer, program: str) -> tuple[Place, ...]:
    """By the names which a file has; a normalisation layer has one value for each feature."""
    found = places(arch, layer.part, layer.trainer_name, layer.shape[0], (*layer.shape, 1)[1], program)
    stem = layer.part.comfyui_root if program == COMFYUI else ""
    return tuple(replace(place, path=stem + place.path) for place in found)


def _stays_flat(arch: ArchSpec, part: Part, layers: Iterable[Layer]) -> bool:
    trained = [layer for layer in layers if layer.part is part and layer.trained]
    return part is not arch.denoiser or all(is_read_flat(part, layer.trainer_name) for layer in trained)


def _share(layer: Layer, place: Place) -> Share:
    name = layer.saved_name if layer.trained else ""
    return Share(name, place.start, place.stop, layer.shape[0], place.swapped)


@functools.lru_cache(_KEPT)
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
    if program == COMFYUI and part.comfyui_divides and layers[0].pieces > 1:
        layers = (Rename(trainer_name, trainer_name),)  # which it takes as rows of its own layer
    count = len(layers)
    sizes = (rows,) if count == 1 else arch.split_of(trainer_name, rows, columns) or (rows // count,) * count
    assert len(sizes) == count and sum(sizes) == rows, f"{trainer_name}: {count} layers in {program} of {rows} rows"
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        Place(
            _path(part, layer.own, program),
            start,
            start + size,
            layer.swapped.at((rows, columns)),
            layer.piece,
            layer.pieces,
            layer.shares,
        )
        for layer, start, size in zip(layers, starts, sizes, strict=True)
    )


def _path(part: Part, own: str, program: str) -> str:
    return own if program != DIFFUSERS or own.startswith(part.components) else f"{part.diffusers}.{own}"


def is_read_flat(part: Part, trainer_name: str) -> bool:
    """Whether ComfyUI knows a trainer's layer by the saved name: as a rule, its own layer's with underscores."""
    if part.comfyui_saved:
        return True
    first, *more = own_layers(part, trainer_name, COMFYUI)
    return not more and first.pieces == 1 and first.own.replace(".", "_") == trainer_name.replace(".", "_")


@functools.lru_cache(_KEPT)
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
