"""An adapter file, opened once: named, grouped into layers, its strengths found, and checked. Every program of ours
that is given a file starts here, so that all of them come to the same verdict.

    open_file(path, Naming(arch))          metadata and what stands beside the file count, too
    of_tensors(tensors, Naming(arch))      what a host hands over
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..archs.spec import ArchSpec
from . import codec, dialects, dotted, reader, strengths
from .codec import SavedLayer
from .dialects import Dialect, Flags
from .weight_names import PREFIXES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds.

    Attributes:
        source: its name, for messages.
        layers: by saved name, as the naming has it.
        flags: what its keys say of the whole.
        metadata: {} where a host handed over tensors alone.
        unread: layer -> its suffixes that no algorithm of ours has.
        stray: keys of what is no adapter.
        strength: where the strengths stand, for people.
        dotted: its names have dots.
    """

    source: str
    layers: Mapping[str, SavedLayer]
    flags: Flags
    metadata: Mapping[str, str]
    unread: Mapping[str, str]
    stray: tuple[str, ...]
    strength: str
    dotted: bool

    def all_read(self) -> AdapterFile:
        """Itself, if it is an adapter of which everything is understood.

        Raises:
            ValueError: it is none, or a layer has a value which no algorithm of ours knows.
        """
        for name, suffix in self.unread.items():
            raise ValueError(codec.unknown_form(self.source, name, suffix))
        if not self.layers:
            first = next(iter(self.stray), "nothing")
            raise ValueError(f"{self.source} has no adapter that we know; its keys look like {first}")
        return self


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

    def apply(self, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """The tensors under these names.

        Raises:
            ValueError: what is one layer here cannot be made of what the file has for it.
        """
        if self.arch is None:
            return dotted.flattened(tensors)
        return self.dialect.own_names(dotted.read(tensors, self.arch, source), self.arch)


class FileTensors(dict[str, Tensor]):
    """The tensors of a file as hosts want them. Handed back, they are known with all that the file says of them.

    Args:
        path: of the file, or the folder of one that PEFT wrote.

    Raises:
        ValueError: it is no complete safetensors file, or what stands beside it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = reader.check(path)
        tensors, self.metadata = reader.read_tensors(file)
        super().__init__(tensors)
        self.source, self.settings = str(path), strengths.beside(file)
        self._named: tuple[Naming, AdapterFile, list[Tensor]] | None = None

    def opened(self, naming: Naming) -> AdapterFile:
        """The file under these names; done once, unless the host changes something."""
        known = self._named
        if known is None or known[0] != naming or not _same(known[2], self.values()):
            file = _open(self, self.metadata, self.settings, naming, self.source)
            known = self._named = naming, file, [*self.values()]
        return known[1]


def _same(some: Collection[Tensor], others: Collection[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def open_file(path: str | os.PathLike[str], naming: Naming) -> AdapterFile:
    """Open a file, or the folder of one that PEFT wrote.

    Raises:
        ValueError: it is no complete safetensors file, its values are not finite, or what it says of its strength
            cannot be read or disagrees.
    """
    return FileTensors(path).opened(naming)


def of_tensors(
    tensors: Mapping[str, Tensor], naming: Naming, source: str = "the file", tell: bool = True
) -> AdapterFile:
    """The same for tensors that a host has read; what the file's metadata said is lost, unless we read it for the host.

    Args:
        tell: warn where the strength can only be guessed; False for a part of a file.

    Raises:
        ValueError: values are not finite.
    """
    if isinstance(tensors, FileTensors):
        return tensors.opened(naming)
    opened = _open(tensors, {}, None, naming, source)
    if tell and opened.strength == strengths.SAID[strengths.NOTHING]:
        log.warning(
            "%s: no layer has an alpha, so its strength is read as 1; the tensors were handed over alone, and what "
            "metadata or an %s say is not known here",
            source, strengths.CONFIG,
        )  # fmt: skip
    return opened


def as_encoded(tensors: Mapping[str, Tensor]) -> AdapterFile:
    """The same for tensors that a network was just made into: broken ones are told where they are written."""
    return _grouped(tensors, {}, None, Naming(), "the network")


def _open(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    naming: Naming,
    source: str,
) -> AdapterFile:
    _check_values(tensors, source)
    return _grouped(tensors, metadata, config, naming, source)


def _grouped(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    naming: Naming,
    source: str,
) -> AdapterFile:
    has_dots = dotted.has_dots(tensors)
    known = dotted.with_strengths(tensors, metadata, config if has_dots else None, source)
    named = naming.apply(known.tensors, source)
    layers, unknown = codec.decode(named, naming.own_class)
    unread, stray = _told_apart(unknown)
    return AdapterFile(source, layers, Flags.of(named), metadata, unread, stray, known.told, has_dots)


def _told_apart(keys: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Values of layers, and keys of what is no adapter, among those which no algorithm knows."""
    unread, stray = dict[str, list[str]](), list[str]()
    for key in keys:
        name, _, suffix = key.partition(".")
        if suffix and (name.startswith(tuple(f"{prefix}_" for prefix in PREFIXES)) or "/" in name):
            unread.setdefault(name, []).append(suffix)
        else:
            stray.append(key)
    return {name: ", ".join(suffixes) for name, suffixes in unread.items()}, tuple(stray)


def _check_values(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError for the first tensor that is not finite."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no such operations
        if not bool(torch.isfinite(wide).all()):
            layer, suffix = dotted.divide(key)
            where = f"{layer}: {suffix}" if suffix else key
            raise ValueError(f"{source}: {where} has NaN or infinite values: the file is broken, use an earlier save")
