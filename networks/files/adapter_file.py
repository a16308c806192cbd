"""An adapter file, opened once: named, grouped into layers, its strengths found, and checked. Every program of ours
that is given a file starts here, so that all of them come to the same verdict.

    open_adapter(path, Naming(arch))         metadata and what stands beside the file count, too
    open_adapter(tensors, Naming(arch))      what a host hands over
    file.on(shape, base)                     with its layers as a model has them: joined, divided, in its order of rows
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..archs import ARCHS
from ..archs.names import Share, nearest_layout, row_sizes, shares
from ..archs.spec import ArchSpec
from . import by_head, codec, dialects, dotted, joining, reader, soundness, strengths
from .codec import SavedLayer
from .dialects import Dialect, Flags
from .weight_names import PREFIXES

log = logging.getLogger(__name__)

Path = str | os.PathLike[str]


Shape = Callable[[str], "tuple[int, ...] | None"]
Base = Callable[[str], Tensor]


@dataclass(frozen=True)
class Portion:
    """A layer of the file that is some of the rows of one of the model's layers, or the other way about.

    Attributes:
        saved: the layer of the file.
        share: where it belongs.
        others: saved names of all layers of the model that are in `saved`, in the order of its rows.
    """

    saved: SavedLayer
    share: Share
    others: tuple[str, ...]

    def rows(self, wanted: tuple[int, ...], base: Base | None) -> tuple[SavedLayer, str]:
        """The rows of the file's layer for this place, in its order, and what they had to become.

        Args:
            wanted: shape of the weight of these rows.
            base: as for `AdapterFile.on`.
        """
        share, saved = self.share, self.saved
        if share.pieces > 1:
            unit = wanted[0] // share.shares
            start, whole = unit * share.piece, (unit * share.pieces, *wanted[1:])
            weights = None if base is None else lambda: torch.cat([base(name) for name in self.others])
            return _made(lambda w: joining.rows_of(saved, share.name, start, start + wanted[0], w, whole), weights)
        if share.swapped.at(wanted):
            return _made(lambda w: self._turned(wanted, w), None if base is None else lambda: base(share.name))
        return saved, ""

    def _turned(self, wanted: tuple[int, ...], weight: Tensor | None) -> tuple[SavedLayer, str]:
        """With its halves in the other order."""
        half, name = wanted[0] // 2, self.share.name
        theirs = None if weight is None else torch.cat(weight.chunk(2)[::-1])
        halves = [joining.rows_of(self.saved, name, at, at + half, theirs, wanted)[0] for at in (half, 0)]
        return joining.joined(name, halves, (half, half), wanted[1:], weight)


def _made(
    make: Callable[[Tensor | None], tuple[SavedLayer, str]], base: Callable[[], Tensor] | None
) -> tuple[SavedLayer, str]:
    """What `make` makes, with the base weight only if it needs it: to read one may be expensive."""
    try:
        return make(None)
    except ValueError:
        if base is None:
            raise
    return make(base())


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds.

    Attributes:
        source: its name, for messages.
        tensors: as they stand in it, under its own keys.
        layers: by saved name, as the naming has it.
        portions: by saved name, what is not a whole layer of the trainer's class; `on` makes layers of them.
        flags: what its keys say of the whole.
        metadata: {} where a host handed over tensors alone.
        unread: layer -> its suffixes that no algorithm of ours has.
        stray: keys of what is no adapter.
        strength: where the strengths stand, for people.
        dotted: its names have dots.
        arch: by whose names it was read; None = by its own.
        conversions: what layers had to become, for people; one entry a layer.
    """

    source: str
    tensors: Mapping[str, Tensor]
    layers: Mapping[str, SavedLayer]
    portions: Mapping[str, tuple[Portion, ...]]
    flags: Flags
    metadata: Mapping[str, str]
    unread: Mapping[str, str]
    stray: tuple[str, ...]
    strength: str
    dotted: bool
    arch: ArchSpec | None = None
    conversions: tuple[str, ...] = field(default=())

    @property
    def problem(self) -> str:
        """Why it is not read: a layer has a value which no algorithm of ours knows, or there is none; "" = it is."""
        if self.unread:
            name, suffix = next(iter(self.unread.items()))
            return codec.unknown_form(self.source, name, suffix)
        first = next(iter(self.stray), "nothing")
        return "" if self.families else f"{self.source} has no adapter that we know; its keys look like {first}"

    @functools.cached_property
    def families(self) -> dict[str, str]:
        """Saved name of each layer -> the kind of layer that it is for, "unknown" for what is not read."""
        known = {name: self.of(name)[0].algorithm.spec.family for name in (*self.layers, *self.portions)}
        return {**known, **dict.fromkeys(self.unread, "unknown")}

    @property
    def names_like(self) -> str:
        """One of its names, and whose they are if that is known: for messages where none belongs to a model."""
        names = dotted.layers(self.tensors)
        layout = nearest_layout(names, ARCHS)
        return next(iter([*names, *self.stray]), "no tensor") + (f" ({layout})" if layout else "")

    def of(self, name: str) -> tuple[SavedLayer, ...]:
        """What it has for a layer, whole or in parts."""
        whole = (self.layers[name],) if name in self.layers else ()
        return (*whole, *(portion.saved for portion in self.portions.get(name, ())))

    def changes_bias(self, name: str) -> bool:
        """Whether it adds something to the bias of a layer."""
        return any(saved.bias_change is not None for saved in self.of(name))

    def all_read(self) -> AdapterFile:
        """Itself, if it is an adapter of which everything is understood.

        Raises:
            ValueError: with its problem.
        """
        if self.problem:
            raise ValueError(self.problem)
        return self

    def is_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether it was made of these very tensors, not only of equal ones."""
        return self.tensors.keys() == tensors.keys() and all(tensors[key] is t for key, t in self.tensors.items())

    @property
    def assumed(self) -> list[str]:
        """What was taken for granted of its layers, and what they had to become, for the log."""
        converted = [f"{text} ({count} layers)" for text, count in Counter(self.conversions).items()]
        return codec.assumptions(self.layers.values()) + converted

    def on(self, shape: Shape, base: Base | None = None) -> AdapterFile:
        """With its layers as a model has them.

        Args:
            shape: saved name -> shape of the layer's weight [O, I, *kernel]; None for what the model has not.
            base: saved name -> that weight, for conversions which need it; None = they are refused.

        Raises:
            ValueError: the rows of a layer cannot be made of what the file has for it.
        """
        if not self.portions:
            return self
        layers, left, conversions = dict(self.layers), dict(self.portions), list(self.conversions)
        for name in self.portions:
            wanted = shape(name)
            if wanted is not None:
                try:
                    layers[name], text = self.layer_of(name, wanted, base)
                except ValueError as error:
                    raise ValueError(f"{self.source}: {error}") from None
                conversions += [text] if text else []
                del left[name]
        return replace(self, layers=layers, portions=left, conversions=tuple(conversions))

    def layer_of(self, name: str, wanted: tuple[int, ...], base: Base | None = None) -> tuple[SavedLayer, str]:
        """One layer that its portions are, with what it had to become; "" = nothing.

        Args:
            name: of the layer.
            wanted: shape of its weight.
            base: as for `on`.

        Raises:
            ValueError: the rows cannot be made of what the file has for it.
        """
        portions = {portion.share.position: portion for portion in self.portions[name]}
        count = self.portions[name][0].share.count
        assert self.arch is not None
        sizes = row_sizes(self.arch, name, wanted[0], wanted[1] if len(wanted) > 1 else 1, count)
        pieces, rows, texts, at = list[SavedLayer | None](), list[int](), list[str](), 0
        while at < count:
            portion = portions.get(at)
            span = portion.share.span if portion else 1
            rows.append(sum(sizes[at : at + span]))
            saved, text = (None, "") if portion is None else portion.rows((rows[-1], *wanted[1:]), base)
            pieces.append(saved)
            texts.append(text)
            at += span
        if len(pieces) > 1:
            saved, text = _made(
                lambda w: joining.joined(name, pieces, rows, wanted[1:], w),
                None if base is None else lambda: base(name),
            )
            texts.append(text)
        else:
            assert pieces[0] is not None
            saved = replace(pieces[0], name=name)
        return saved, next(filter(None, texts), "")


@dataclass(frozen=True)
class Naming:
    """The saved names of an architecture; a dialect's own beginnings of names are known, too. Without an architecture
    layers keep the file's own names, with slashes for their dots.

    Attributes:
        own_class: the model is of the trainer's class, see `twins`.
    """

    arch: ArchSpec | None = None
    dialect: Dialect = dialects.PORTABLE
    own_class: bool = True

    def shares(self, paths: Sequence[str]) -> dict[str, tuple[Share, ...]]:
        """What each name of a layer in a file stands for."""
        own = {path: self.dialect.own_name(dialects.own_name(path)) for path in paths}
        if self.arch is None:
            return {path: (Share(name.replace(".", "/")),) for path, name in own.items()}
        found = shares([*own.values()], self.arch)
        return {path: found[name] for path, name in own.items()}


class FileTensors(dict[str, Tensor]):
    """The tensors of a file as hosts want them, with all else that the file says. Handed back, they are not opened a
    second time.

    Args:
        given: the path of a file, or of the folder of one that PEFT wrote; or what a host has read, key -> tensor.
        source: name of the latter, for messages.

    Attributes:
        metadata: of its header; {} of tensors alone.
        settings: PEFT's, which stand beside it; None without any.

    Raises:
        ValueError: it is no complete safetensors file, or what stands beside it cannot be read.
    """

    def __init__(self, given: Path | Mapping[str, Tensor], source: str = "the file") -> None:
        self.metadata: dict[str, str] = {}
        self.settings: Mapping[str, Any] | None = None
        self._opened: tuple[Naming, AdapterFile] | None = None
        if isinstance(given, Mapping):
            reader.check_names(given, source)
            super().__init__(given)
            self.source = source
        else:
            file = reader.checked_path(given)
            tensors, self.metadata = reader.read_tensors(file)
            super().__init__(tensors)
            self.source, self.settings = str(given), strengths.beside(file)

    def opened(self, naming: Naming) -> AdapterFile:
        """The file under these names; done once, unless the host changes something.

        Raises:
            ValueError: as `open_adapter`.
        """
        if self._opened is None or self._opened[0] != naming or not self._opened[1].is_of(self):
            self._opened = naming, _open(self, naming)
        return self._opened[1]


def open_adapter(given: Path | Mapping[str, Tensor], naming: Naming, source: str = "the file") -> AdapterFile:
    """Open a file, or the tensors of one that a host has read: what its metadata said is lost then, unless we read it
    for the host (`FileTensors`).

    Args:
        given: as for FileTensors, or one.
        naming: under which names.
        source: of tensors, for messages.

    Raises:
        ValueError: it is no complete safetensors file, its values are not finite, or what it says of its strength
            cannot be read or disagrees.
    """
    if isinstance(given, FileTensors):
        return given.opened(naming)
    opened = FileTensors(given, source).opened(naming)
    if isinstance(given, Mapping) and opened.strength == strengths.SAID[strengths.NOTHING]:
        log.warning(
            "%s: no layer has an alpha, so its strength is read as 1; the tensors were handed over alone, and what "
            "metadata or an %s say is not known here",
            source, strengths.CONFIG,
        )  # fmt: skip
    return opened


def _open(given: FileTensors, naming: Naming) -> AdapterFile:
    sound = soundness.readable(given, given.source)
    tensors, strength = strengths.with_strengths(sound, given.metadata, given.settings, given.source)
    spoken = naming.shares(dotted.layers(tensors))
    names = {path: _whole(found) or f"{_PART}{path.replace('.', '/')}" for path, found in spoken.items()}
    moved = by_head.ordered(tensors, names, naming.arch, given.source)
    named, suffixes = _named({**tensors, **moved}, names, given.source)
    flags = Flags.of(named)
    found, unknown = codec.decode(named, naming.own_class, flags)
    parts = {names[path]: shares for path, shares in spoken.items() if names[path].startswith(_PART)}
    layers = {name: saved for name, saved in found.items() if name not in parts}
    portions = _portions({name: saved for name, saved in found.items() if name in parts}, parts, layers, given.source)
    unread, stray = _told_apart({key: suffixes.get(key, key.partition(".")[2]) for key in unknown}, parts)
    with_dots = dotted.has_dots(given)
    return AdapterFile(
        given.source, dict(given), layers, portions, flags, given.metadata, unread, stray, strength, with_dots,
        naming.arch, ("its rows put in order, which the file has head by head",) * len(moved),
    )  # fmt: skip


def _named(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], source: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file under our names and suffixes, and the suffix that each has there.

    Raises:
        ValueError: two would have one name.
    """
    named, suffixes = dict[str, Tensor](), dict[str, str]()
    for key, path, suffix in dotted.divided(tensors):
        own = f"{names[path]}.{dotted.own_suffix(path, suffix)}" if path in names else key
        if own in named:
            raise ValueError(f"{source}: {key} is there twice, under other names for one layer: remove one")
        named[own] = tensors[key].flatten() if dotted.VECTOR in suffix else tensors[key]
        suffixes[own] = suffix
    return named, suffixes


_PART = "/"  # before the name of a layer of the file that is none of the trainer's


def _whole(found: Sequence[Share]) -> str:
    """The saved name, if a layer of the file is one of the trainer's."""
    one = found[0]
    return one.name if len(found) == 1 and one.whole else ""


def _portions(
    found: Mapping[str, SavedLayer],
    shares: Mapping[str, Sequence[Share]],
    layers: Mapping[str, SavedLayer],
    source: str,
) -> dict[str, tuple[Portion, ...]]:
    """Saved name -> what the file has for some of its rows, or with others together.

    Raises:
        ValueError: it has two layers for the same rows.
    """
    portions: dict[str, dict[int, Portion]] = {}
    for part, saved in found.items():
        others = tuple(share.name for share in shares[part])
        for share in shares[part]:
            there = portions.setdefault(share.name, {})
            taken = {i for one in there.values() for i in one.share.places} if there else set()
            counts = {one.share.count for one in there.values()} - {share.count}
            if share.name in layers or counts or not taken.isdisjoint(share.places):
                raise ValueError(
                    f"{source}: it has {dotted.shown(part)} and another layer for the same "
                    f"rows of {share.name}: remove one of them"
                )
            there[share.position] = Portion(saved, share, others)
    return {name: tuple(there.values()) for name, there in portions.items()}


def _told_apart(
    unknown: Mapping[str, str], parts: Mapping[str, Sequence[Share]]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Values of layers, and keys of what is no adapter, among those which no algorithm knows.

    Args:
        unknown: key -> its suffix in the file.
        parts: what layers stand for that are none of the trainer's.
    """
    unread, stray = dict[str, list[str]](), list[str]()
    for key, suffix in unknown.items():
        name = key.partition(".")[0]
        names = [share.name for share in parts.get(name, ())] or [name]
        if suffix not in ("", dotted.ALPHA) and (
            names[0].startswith(tuple(f"{prefix}_" for prefix in PREFIXES)) or "/" in names[0]
        ):
            for one in names:
                unread.setdefault(one, []).append(suffix)
        else:
            stray.append(key)
    return {name: ", ".join(suffixes) for name, suffixes in unread.items()}, tuple(stray)
