"""Layers as another program takes them: under its names, joined or divided as its model is, in forms that it computes.

Names change, or the form does, exactly: `joining` has the algebra. A form is changed only where the program does not
compute the layer's own, and in words, since that is one-way and may make a file larger.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..algos import recognise
from ..archs.places import Share, Target
from ..records.full import FULL
from . import joining
from .codec import SavedLayer
from .dialects import Dialect, FileFormat

Base = Callable[[str], Tensor]  # saved name -> weight [O, I, *kernel], fp32 or wider, on the CPU
Make = Callable[[], tuple[SavedLayer, str]]  # a layer of the file, and what it was converted to

DIFFERENCES = "the whole difference"


def translated(layers: Iterable[SavedLayer], form: FileFormat, base: Base) -> tuple[list[SavedLayer], str]:
    """The layers of a file in this form.

    Args:
        layers: the network's, under the trainers' names, on the CPU.
        form: of the file.
        base: asked for the weights of those layers alone whose new form follows from them.

    Returns:
        The layers, named as in the file, and in words what some of them were converted to; "" = none was.

    Raises:
        ValueError: one has no form that the program computes.
    """
    known = {layer.name: layer for layer in layers}
    if not form.dialect.program:
        return [*known.values()], ""
    made, words = [], Counter[str]()
    for _, make in making(known, form, base):
        layer, told = make()
        made.append(layer)
        words[told] += 1
    return made, _in_words(words)


@dataclass(frozen=True)
class Foreseen:
    """What a file will hold.

    Attributes:
        values: how many, in all tensors.
        told: as of `translated`.
        asks: for base weights.
        layers: of it, without values.
    """

    values: int
    told: str
    asks: bool
    layers: tuple[SavedLayer, ...] = ()


def foreseen(kinds: Mapping[str, Hashable], form: FileFormat, make: Callable[[str], SavedLayer]) -> Foreseen:
    """The same before anything is trained, from one layer of each kind.

    Args:
        kinds: saved name -> what the layer has in common with all that are converted alike.
        form: of the file.
        make: gives a layer with values, in the shapes which its file will have.

    Raises:
        ValueError: as `translated`.
    """
    alike = _alike(kinds, form.targets)
    known = {s.saved_name for targets in alike for s in targets[0].shares} & kinds.keys()
    groups = {targets[0].name: targets for targets in alike}
    shapes = {share.saved_name: (share.of, *one.columns) for one in form.targets for share in one.shares}
    base = _no_base if FULL.name in form.dialect.algos else lambda name: torch.ones(shapes[name])
    values, words, asks, layers = 0, Counter[str](), False, list[SavedLayer]()
    for target, build in making({name: make(name) for name in known}, form, base):
        group = groups.get(target.name, [])
        try:
            layer, told = build()
        except _NoBaseError:
            told, asks, layer = DIFFERENCES, True, _difference(target)
        values += len(group) * sum(tensor.numel() for tensor in layer.tensors.values())
        words[told] += len(group)
        layers += [replace(layer.without_values(), name=one.name) for one in group]
    return Foreseen(values, _in_words(words), asks, tuple(layers))


def _difference(target: Target) -> SavedLayer:
    """Its change of the weight, without values."""
    rows = sum(share.stop - share.start for share in target.shares)
    tensors = {"diff": torch.empty(rows, *target.columns, device="meta")}
    algorithm = recognise(tensors)
    assert algorithm is not None
    return SavedLayer(target.name, algorithm, tensors, None)


def _alike(kinds: Mapping[str, Hashable], targets: Iterable[Target]) -> list[list[Target]]:
    """Layers of a file, by what they are made of."""
    owners: dict[str, list[tuple[int, int]]] = {}
    for target in targets:
        for share in target.shares:
            owners.setdefault(share.saved_name, []).append((share.start, share.stop))
    found: dict[Hashable, list[Target]] = {}
    for target in targets:
        shares = ((s, tuple(owners[s.saved_name]) if s.saved_name in kinds else ()) for s in target.shares)
        key = tuple((kinds.get(s.saved_name), rows, s.start, s.stop, s.of, s.swapped) for s, rows in shares)
        found.setdefault((target.columns, key), []).append(target)
    return [*found.values()]


class _NoBaseError(Exception):
    """A layer's new form follows from a base weight, which is not known yet: it is as large as that."""


def _no_base(name: str) -> Tensor:
    raise _NoBaseError(name)


def _in_words(words: Mapping[str, int]) -> str:
    return ", ".join(f"{count} layers as {told}" for told, count in words.items() if told)


def making(known: Mapping[str, SavedLayer], form: FileFormat, base: Base) -> Iterator[tuple[Target, Make]]:
    """Each layer of the file, and what makes it: `translated` piece by piece."""
    for target in form.targets:
        if any(share.saved_name in known for share in target.shares):
            yield target, functools.partial(_made_of, known, target, form.dialect, base)


@dataclass(frozen=True)
class _Piece:
    """What a layer of the network is of one of the file.

    Attributes:
        saved: these rows, as a layer.
        shape: of their weight.
        base: that weight.
    """

    saved: SavedLayer
    shape: tuple[int, ...]
    base: Callable[[], Tensor]

    def held(self, dialect: Dialect) -> tuple[SavedLayer, str]:
        """It in a form that the program of a dialect computes, and in words which; "" = its own.

        Raises:
            ValueError: there is none.
        """
        spec = self.saved.algorithm.spec
        if dialect.computes(spec, self.saved.tensors, len(self.shape) - 2):
            return self.saved, ""
        lora = self.lora()
        if lora is not None:
            return lora, "LoRA"
        if FULL.name in dialect.algos:
            return self.difference(), DIFFERENCES
        raise ValueError(
            f"the {spec.name} of {self.saved.name} is no LoRA of fewer values than its weight, and that program reads "
            "no other form: lower the dim, or leave this form out and merge the file into the model for it"
        )

    def lora(self) -> SavedLayer | None:
        return self._with_base(joining.as_lora)

    def difference(self) -> SavedLayer:
        found = self._with_base(joining.as_diff)
        assert found is not None
        return found

    def _with_base(self, make: Callable[..., SavedLayer | None]) -> SavedLayer | None:
        """What `make` makes of it, beside the base weight where it has to be."""
        try:
            return make(self.saved, self.shape)
        except ValueError:
            return make(self.saved, self.shape, self.base())


def _made_of(known: Mapping[str, SavedLayer], target: Target, dialect: Dialect, base: Base) -> tuple[SavedLayer, str]:
    """One layer of a file, and in words what it was converted to."""
    pieces = [_piece(known, target, share, base) if share.saved_name in known else None for share in target.shares]
    return _made(target, pieces, dialect)


def _made(target: Target, pieces: Sequence[_Piece | None], dialect: Dialect) -> tuple[SavedLayer, str]:
    """One layer of a file, and in words what it was converted to."""
    held = [None if piece is None else piece.held(dialect) for piece in pieces]
    words = next((told for _, told in filter(None, held) if told), "")
    if len(pieces) == 1:
        assert held[0] is not None
        return replace(held[0][0], name=target.name), words
    sizes = [share.stop - share.start for share in target.shares]
    for layers, form in _ways(pieces, [None if one is None else one[0] for one in held], words, dialect):
        try:
            layer, told = joining.joined(target.name, layers, sizes, target.columns, None)
        except ValueError:  # it takes the base weight
            continue
        return layer, told or form
    raise ValueError(f"{target.name}: {len(sizes)} trained layers are this one there, and cannot become one")


def _ways(
    pieces: Sequence[_Piece | None], held: list[SavedLayer | None], words: str, dialect: Dialect
) -> Iterator[tuple[list[SavedLayer | None], str]]:
    """Forms of the pieces, which may be joined, and in words: from the smallest to the one which can be in any case."""
    yield held, words
    yield [None if piece is None else piece.lora() or piece.saved for piece in pieces], "LoRA"
    if FULL.name in dialect.algos:
        yield [None if piece is None else piece.difference() for piece in pieces], DIFFERENCES


def _piece(known: Mapping[str, SavedLayer], target: Target, share: Share, base: Base) -> _Piece:
    """What a layer of the network is of the target."""
    shape, saved = (share.stop - share.start, *target.columns), _rows(known[share.saved_name], target, share)
    return _Piece(saved, shape, functools.partial(_base_of, base, share))


def _base_of(base: Base, share: Share) -> Tensor:
    weight = base(share.saved_name)
    return weight if share.is_all else torch.cat([weight[start:stop] for start, stop in share.ranges])


def _rows(saved: SavedLayer, target: Target, share: Share) -> SavedLayer:
    """The rows of a share, in its order."""
    if share.is_all:
        return saved
    shape = (share.of, *target.columns)
    pieces = [joining.rows_of(saved, saved.name, *one, None, shape)[0] for one in share.ranges]
    if len(pieces) == 1:
        return pieces[0]
    sizes = [stop - start for start, stop in share.ranges]
    return joining.joined(saved.name, pieces, sizes, target.columns, None)[0]
