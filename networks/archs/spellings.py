"""What the layers of a model are called by other programs: rules from their names to the trainer's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

Pairs = tuple[tuple[str, str], ...]

_GROUP = re.compile(r"\(([^()]*)\)")


class Swap(Enum):
    """Which layers of a name have the halves of their output rows in the other order in another program."""

    NEVER = "none"
    ALWAYS = "all"
    DOUBLE = "those with twice as many rows as columns"

    def at(self, shape: Sequence[int]) -> bool:
        """Whether one with a weight of this shape has."""
        return self is Swap.ALWAYS or (self is Swap.DOUBLE and len(shape) > 1 and shape[0] == 2 * shape[1])


@dataclass(frozen=True)
class Rename:
    """Another library's name of a layer -> the trainer's.

    Attributes:
        own: the dotted name in this model or file; a regular expression once it is `below` a prefix.
        trainer: the trainer's dotted name, with groups as in `re.Match.expand`.
        position, count: where the trainer has one fused layer for `count` of this model's: the place, from 0, of this
            one in the order of the output rows; count 1 = one to one.
        span: how many of the places, from `position` on, this one fills.
        swapped: whether its halves of rows are in the other order (shift and scale, gate and value).
        piece, pieces: where this model has one fused layer for several of the trainer's: its output rows are `pieces`
            equal shares, of which the trainer's begins with this one, from 0; pieces 1 = all rows.
        shares: how many of the pieces the trainer's has.
        bare: `own` names the tensor itself, not a layer whose tensors are called weight (or scale) and bias.
        transposed: the tensor is [I, O].
    """

    own: str
    trainer: str
    position: int = 0
    count: int = 1
    span: int = 1
    swapped: Swap = Swap.NEVER
    piece: int = 0
    pieces: int = 1
    shares: int = 1
    bare: bool = False
    transposed: bool = False

    @property
    def trainer_pattern(self) -> str:
        """A regular expression on the trainer's name, whose groups g1, g2 ... are those of `own`."""
        groups = _GROUP.findall(self.own)
        parts = re.findall(r"([^\\]*)(?:\\(\d))?", self.trainer)
        return "".join(re.escape(text) + (f"(?P<g{n}>{groups[int(n) - 1]})" if n else "") for text, n in parts)

    @property
    def template(self) -> str:
        """`own` as `trainer` is written: its groups as numbers."""
        first, *rest = (re.sub(r"\\(.)", r"\1", piece) for piece in re.split(r"\([^()]*\)", self.own))
        return first + "".join(f"\\{number}{piece}" for number, piece in enumerate(rest, start=1))


@dataclass(frozen=True)
class Twins:
    """Two layers of the trainer's class that may have each other's names in files.

    Attributes:
        stem: regular expression of their saved names up to where they differ.
        first, second: the ends of the two.
        tensor, mark: an adapter of either has the one tensor; that of the second, which no other program trains, is
            saved with the other, by which one sees that the names are right.
        unless: regular expression of saved names beside which these are layers of another model.
    """

    stem: str
    first: str
    second: str
    tensor: str
    mark: str
    unless: str


def _flat(rename: Rename) -> Rename:
    """The same names with underscores for their dots, as the trainers save them."""
    return replace(rename, own=rename.own.replace(r"\.", "_"), trainer=rename.trainer.replace(".", "_"))


def below(own: str, trainer: str, *renames: Rename) -> tuple[Rename, ...]:
    """Layers below a prefix.

    Args:
        own: regular expression of the prefix in this model.
        trainer: the trainer's prefix, with groups as in `re.Match.expand`.
    """
    return tuple(replace(r, own=own + re.escape(r.own), trainer=trainer + r.trainer) for r in renames)


def fused(own: tuple[str, ...], trainer: str) -> tuple[Rename, ...]:
    """Layers of this model, in row order, that are one layer of the trainer's."""
    return tuple(Rename(name, trainer, i, len(own)) for i, name in enumerate(own))


def numbered(trainer: str, count: int) -> tuple[Rename, ...]:
    """Parts of a layer of the trainer's, called by its name and their number."""
    return fused(tuple(f"{trainer}.{number}" for number in range(count)), trainer)


def divided(own: str, trainer: tuple[str, ...], bare: bool = False) -> tuple[Rename, ...]:
    """The reverse: one layer of this model whose output rows are several layers of the trainer's, in this order."""
    return tuple(Rename(own, name, piece=i, pieces=len(trainer), bare=bare) for i, name in enumerate(trainer))


def exchanged(
    renames: tuple[Rename, ...], spelt: tuple[Rename, ...] = (), shares: Mapping[int, tuple[int, ...]] | None = None
) -> tuple[Rename, ...]:
    """The rules of a trainer that has the other library's classes: both names of each rule change places.

    Args:
        renames: of a trainer that has this model's classes.
        spelt: other names for those of that trainer; () = its own.
        shares: number of layers that are one -> how many equal shares of its rows each has, where these differ.
    """
    names = {one.trainer: one.own for one in spelt}
    turned = []
    for one in renames:
        each = (shares or {}).get(one.count, (1,) * one.count)
        turned.append(
            Rename(
                names.get(one.trainer, re.sub(r"\(\?P<g\d>", "(", one.trainer_pattern)),
                one.template,
                swapped=one.swapped,
                piece=sum(each[: one.position]),
                pieces=sum(each),
                shares=each[one.position],
            )
        )
    return tuple(turned)


def subtrees(pairs: Pairs) -> tuple[Rename, ...]:
    """All layers whose name begins with the first of a pair, which the second replaces."""
    return tuple(Rename(f"{re.escape(own)}(.*)", rf"{trainer}\1") for own, trainer in pairs)


@dataclass(frozen=True)
class Spelling:
    """What another library's classes, or the files of a program, call the layers of a part.

    Attributes:
        renames: the first that speaks of a layer holds; those of a divided layer stand together.
    """

    renames: tuple[Rename, ...]

    @cached_property
    def flat(self) -> Spelling:
        """The same names with underscores for their dots."""
        return Spelling(tuple(map(_flat, self.renames)))

    @cached_property
    def _starts(self) -> tuple[str, ...]:
        """Of each: what its own names begin with, up to the first number; far cheaper to compare than expressions."""
        return tuple(re.sub(r"\\(.)", r"\1", re.split(r"[(\[]", one.own)[0]) for one in self.renames)

    @cached_property
    def _compiled(self) -> tuple[tuple[re.Pattern[str], re.Pattern[str], str], ...]:
        """Of each: expressions on its own name and on the trainer's; the trainer's for `str.format` with the match."""
        templates = (re.sub(r"\\(\d)", r"{\1}", one.trainer) for one in self.renames)
        return tuple(
            (re.compile(one.own), re.compile(one.trainer_pattern), template)
            for one, template in zip(self.renames, templates, strict=True)
        )

    @cached_property
    def _last(self) -> tuple[int, ...]:
        """Of each: where that stands whose rows are the last of the same divided layer."""
        last = [i for i, one in enumerate(self.renames) if one.piece + one.shares == one.pieces]
        return tuple(next(j for j in last if j >= i) for i in range(len(self.renames)))

    def of(self, name: str, bare: bool = False) -> tuple[Rename, ...]:
        """The trainer's layers behind a name, in the order of their rows, names filled in; () = not known here."""
        if not name.startswith(self._starts):
            return ()
        for i, (one, (own, _, _)) in enumerate(zip(self.renames, self._compiled, strict=True)):
            match = own.fullmatch(name) if one.bare == bare and name.startswith(self._starts[i]) else None
            if match:
                groups, stop = (match[0], *match.groups()), self._last[i] + 1
                names = [template.format(*groups) for _, _, template in self._compiled[i:stop]]
                return tuple(replace(r, trainer=n) for r, n in zip(self.renames[i:stop], names, strict=True))
        return ()

    def marks(self, name: str, bare: bool = False) -> bool:
        """Whether a name shows that names are spelt like this: it is one here, and not one of the trainer's, too."""
        if not self.of(name, bare):
            return False
        return not any(trainer.fullmatch(name) for _, trainer, _ in self._compiled)
