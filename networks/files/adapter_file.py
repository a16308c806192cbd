"""An adapter file, opened once: named, grouped into layers, its strengths found, and checked. Every program of ours
that is given a file starts here, so that all of them come to the same verdict.

    open_adapter(path, Naming(arch))         metadata and what stands beside the file count, too
    open_adapter(tensors, Naming(arch))      what a host hands over
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
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

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds.

    Attributes:
        source: its name, for messages.
        tensors: as they stand in it, under its own keys.
        layers: by saved name, as the naming has it.
        flags: what its keys say of the whole.
        metadata: {} where a host handed over tensors alone.
        unread: layer -> its suffixes that no algorithm of ours has.
        stray: keys of what is no adapter.
        strength: where the strengths stand, for people.
        dotted: its names have dots.
    """

    source: str
    tensors: Mapping[str, Tensor]
    layers: Mapping[str, SavedLayer]
    flags: Flags
    metadata: Mapping[str, str]
    unread: Mapping[str, str]
    stray: tuple[str, ...]
    strength: str
    dotted: bool

    @property
    def problem(self) -> str:
        """Why it is not read: a layer has a value which no algorithm of ours knows, or there is none; "" = it is."""
        if self.unread:
            name, suffix = next(iter(self.unread.items()))
            return codec.unknown_form(self.source, name, suffix)
        first = next(iter(self.stray), "nothing")
        return "" if self.layers else f"{self.source} has no adapter that we know; its keys look like {first}"

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
    _check_values(given)
    tensors, strength = strengths.with_strengths(given, given.metadata, given.settings, given.source)
    named = naming.apply(tensors, given.source)
    flags = Flags.of(named)
    layers, unknown = codec.decode(named, naming.own_class, flags)
    unread, stray = _told_apart(unknown)
    with_dots = dotted.has_dots(given)
    return AdapterFile(given.source, dict(given), layers, flags, given.metadata, unread, stray, strength, with_dots)


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


def _check_values(given: FileTensors) -> None:
    """Raises ValueError for the first tensor that is not finite."""
    for key, tensor in given.items():
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no such operations
        if not bool(torch.isfinite(wide).all()):
            layer, suffix = dotted.divide(key)
            where = f"{layer}: {suffix}" if suffix else key
            raise ValueError(
                f"{given.source}: {where} has NaN or infinite values: the file is broken, use an earlier save"
            )
