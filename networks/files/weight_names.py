"""Which weights of a checkpoint a saved name speaks of, from keys alone: no model is built.

A checkpoint may spell its layers as the trainer does, as diffusers, as the original release or as ComfyUI, below one of
several prefixes; the architecture records know all of that. Several architectures have the same prefix of saved names:
the one holds by which most of an adapter's layers find their weights. Names of no record are looked for as they stand.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from ..archs import ARCHS
from ..archs.spec import Part
from ..archs.spellings import Rename, Spelling, Swap

_PARTS: tuple[Part, ...] = tuple(dict.fromkeys(part for arch in ARCHS for part in arch.parts))
PREFIXES = tuple(dict.fromkeys(part.prefix for part in _PARTS))
# Below these are models that are no denoiser, whatever they are called there.
OTHERS = ("conditioner.", "cond_stage_model.", "text_encoders.", "text_encoder.", "text_encoder_2.", "te1.", "te2.")


def held(keys: Collection[str]) -> set[str]:
    """Prefixes of the saved names of all that a checkpoint may hold beside what is found in it: its encoders, whichever
    names they have there."""
    encoders = any(key.startswith(OTHERS) for key in keys)
    return {part.prefix for arch in ARCHS for part in arch.text_encoders} if encoders else set()


def is_own(keys: Iterable[str]) -> bool:
    """Whether a checkpoint has the trainer's names, where that decides how some of them are read."""
    stems = [stem_of(key) for key in keys]
    return all(
        part.is_own({stem[len(root) :] for root in part.roots for stem in stems if stem.startswith(root)})
        for part in _PARTS
        if part.swaps
    )


@dataclass(frozen=True)
class Piece:
    """A weight of a checkpoint, or a share of its output rows, as a layer of an adapter or a part of one.

    Attributes:
        number, count: the first of its rows, in `count` equal shares from the first row down; count 1 = all rows.
        shares: how many of them it is.
        swapped: whether its halves of rows are in the other order; see `of` for where that depends on its shape.
        transposed: it is stored as [I, O].
    """

    key: str
    number: int = 0
    count: int = 1
    shares: int = 1
    swapped: Swap = Swap.NEVER
    transposed: bool = False

    @property
    def bias_key(self) -> str:
        """`X.bias`; `in_proj_bias` beside `in_proj_weight`."""
        stem = stem_of(self.key)
        return f"{stem}.bias" if stem or not self.key.endswith("weight") else f"{self.key.removesuffix('weight')}bias"

    def of(self, shapes: Mapping[str, Sequence[int]]) -> Piece:
        """The same for the weights of a checkpoint."""
        return replace(self, swapped=Swap.ALWAYS if self.swapped.at(shapes[self.key]) else Swap.NEVER)

    def of_bias(self) -> Piece:
        """The same rows of the bias."""
        return replace(self, key=self.bias_key, transposed=False)

    def cut(self, whole: Tensor) -> Tensor:
        """The rows in the order of the adapter's layer.

        Raises:
            ValueError: the rows do not divide into so many shares.
        """
        return self._turned(self._share(whole))

    def put(self, whole: Tensor, rows: Tensor) -> Tensor:
        """The inverse of `cut`: the weight with these rows, itself where it has others.

        Args:
            whole: what was cut; a share of it is written over.
            rows: what became of the cut, in the same memory or in another.
        """
        rows = self._turned(rows)
        if self.count == 1:
            return rows.T if self.transposed and rows.dim() == 2 else rows
        own = self._share(whole)
        if own.data_ptr() != rows.data_ptr() or own.stride() != rows.stride():
            own.copy_(rows)
        return whole

    def _turned(self, rows: Tensor) -> Tensor:
        return torch.cat(rows.chunk(2)[::-1]) if self.swapped is Swap.ALWAYS else rows

    def _share(self, whole: Tensor) -> Tensor:
        whole = whole.T if self.transposed and whole.dim() == 2 else whole
        if not whole.dim() or len(whole) % self.count:
            raise ValueError(f"{tuple(whole.shape)} cannot be divided into {self.count} equal shares of rows")
        size = len(whole) // self.count
        return whole[self.number * size : (self.number + self.shares) * size]


@dataclass(frozen=True)
class Target:
    """What is one layer for an adapter.

    Attributes:
        pieces: in the order of the layer's output rows; several where a checkpoint divides what the trainer has fused.
    """

    pieces: tuple[Piece, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(piece.key for piece in self.pieces)

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """Of the layer's weight, from those of the checkpoint's."""
        own = [shapes[piece.key][::-1] if piece.transposed else shapes[piece.key] for piece in self.pieces]
        if not all(own):  # a single number is no layer's weight
            return ()
        rows = (one[0] // piece.count * piece.shares for one, piece in zip(own, self.pieces, strict=True))
        return (sum(rows), *own[0][1:])


def stem_of(key: str) -> str:
    """The layer of a weight's key; "" for keys of anything else. Some RMSNorms call their weight `scale`."""
    stem, _, last = key.rpartition(".")
    return stem if last in ("weight", "scale") else ""


def find(keys: Iterable[str], names: Collection[str], prefix: str = "") -> dict[str, Target]:
    """Saved name -> weights, for those of `names` that the keys of a checkpoint have.

    Args:
        prefix: only names with this prefix, where the keys of a text encoder fit several.

    Raises:
        ValueError: a weight fits the names of several models, and no prefix says which.
    """
    index, found = _index(tuple(keys)), dict[str, Target]()
    owner: dict[str, str] = {}
    for model in PREFIXES:
        wanted = {name for name in names if name.startswith(f"{model}_") and name.startswith(prefix)}
        targets = index.best(model, wanted) if wanted else {}
        for key in chain.from_iterable(target.keys for target in targets.values()):
            other = owner.setdefault(key, model)
            if other != model:
                first, second = sorted((model, other))
                raise ValueError(
                    f"{key} may belong to {first} or {second}: say which model this checkpoint is, "
                    f"with --prefix {first}"
                )
        found |= targets
    return found


def all_names(keys: Iterable[str]) -> set[str]:
    """Every saved name that some adapter may have for these weights, to look for near ones."""
    index = _index(tuple(keys))
    readings = chain.from_iterable(index.readings(model) for model in PREFIXES)
    return {name for reading in readings for name in reading.places if name in reading}


def layers(keys: Iterable[str], part: Part) -> dict[str, tuple[str, Target]]:
    """Saved name -> (trainer's dotted name, weights) of every layer of a model in a checkpoint, whatever its keys."""
    reading = _index(tuple(keys)).of_part(part)
    found = {name: places[min(places)][0].trainer for name, places in reading.places.items() if name in reading}
    return {name: (trainer_name, reading.target(name)) for name, trainer_name in found.items()}


@dataclass(frozen=True)
class _Reading:
    """The keys of a checkpoint as the layers of one part.

    Attributes:
        places: saved name -> position among the weights that are this layer -> (record of the name, key).
        recognised: how many keys a spelling explains which only that part has.
    """

    places: Mapping[str, Mapping[int, tuple[Rename, str]]]
    recognised: int = 0

    def __contains__(self, name: str) -> bool:
        """Whether all weights of a layer are there."""
        own = self.places.get(name)
        return own is not None and len(own) == next(iter(own.values()))[0].count

    def target(self, name: str) -> Target:
        ordered = [self.places[name][position] for position in sorted(self.places[name])]
        return Target(tuple(Piece(key, r.piece, r.pieces, r.shares, r.swapped, r.transposed) for r, key in ordered))


class _Index:
    """The keys of a checkpoint, read by the records, each prefix of saved names when it is asked for."""

    def __init__(self, keys: Sequence[str]) -> None:
        stems = [(stem_of(key), key) for key in keys]
        weights = {stem for stem, key in stems if key.endswith(".weight")}  # beside one, `scale` is something else
        self.stems = [
            (stem or key, not stem, key) for stem, key in stems if stem not in weights or key.endswith(".weight")
        ]
        self._below = functools.cache(self._names_below)
        self._readings: dict[str, list[_Reading]] = {}

    def readings(self, model: str) -> list[_Reading]:
        """The keys as each part with this prefix of saved names would have them, and as they stand."""
        if model not in self._readings:
            parts = [part for part in _PARTS if part.prefix == model]
            used = {part: self._used(part) for part in parts}
            readings = [self._read(model, part.roots, used[part]) for part in parts if used[part]]
            roots = tuple(dict.fromkeys(root for part in parts for root in part.roots))
            self._readings[model] = [*readings, self._read(model, roots, ())]
        return self._readings[model]

    def of_part(self, part: Part) -> _Reading:
        """The keys as one part would have them."""
        return self._read(part.prefix, part.roots, self._used(part))

    def best(self, model: str, wanted: set[str]) -> dict[str, Target]:
        """Those of the names that are there, by the reading which has most of them."""
        reading = max(self.readings(model), key=lambda one: (sum(name in one for name in wanted), one.recognised))
        return {name: reading.target(name) for name in wanted if name in reading}

    def _used(self, part: Part) -> tuple[Spelling, ...]:
        """The spellings of a part which some key shows to be those of this checkpoint."""
        names = self._below(part.roots)
        return tuple(one for one in part.spellings if any(one.marks(dotted, bare) for dotted, bare, _ in names))

    def _read(self, prefix: str, roots: tuple[str, ...], spellings: Sequence[Spelling]) -> _Reading:
        places: dict[str, dict[int, tuple[Rename, str]]] = {}
        recognised = 0
        for dotted, bare, key in self._below(roots):
            found = next((renames for one in spellings if (renames := one.of(dotted, bare))), ())
            recognised += bool(found)
            for rename in found or (() if bare else (Rename(dotted, dotted),)):
                name = f"{prefix}_{rename.trainer}".replace(".", "_")
                places.setdefault(name, {}).setdefault(rename.position, (rename, key))
        return _Reading(places, recognised)

    def _names_below(self, roots: tuple[str, ...]) -> list[tuple[str, bool, str]]:
        """(dotted name, whether it is a tensor's own, key), below each of a key's roots, the longest first."""
        return [
            (stem[len(root) :], bare, key)
            for root in sorted(roots, key=len, reverse=True)
            for stem, bare, key in self.stems
            if stem.startswith(root)
        ]


@functools.lru_cache(maxsize=2)
def _index(keys: tuple[str, ...]) -> _Index:
    """Kept, since an adapter's names are looked up by many records one after the other."""
    return _Index(keys)
