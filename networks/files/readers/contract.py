"""What a model of a reader is given, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ...archs.spec import ArchSpec, Part
from ..codec import SavedLayer

STRENGTHS = (1.0, 0.7)  # at which errors are stated


@dataclass(frozen=True)
class Given:
    """An adapter file as a reader meets it, beside the model on which it is loaded.

    Attributes:
        tensors: key -> tensor, as they stand in the file; on the meta device before anything is trained.
        metadata: of its header.
        arch: of the model.
        shapes: part name -> trainer's dotted name of every layer there that has a weight -> shape of that weight.
        meant: key's layer (what stands before the suffix) -> the layer as it is meant; what readers make of it is
            compared with this.
        base: saved name -> the base weight [O, I, *kernel]; None without the model: an error that depends on it is
            then not known.
        folder: the file stands in a folder of PEFT's form, beside adapter_config.json: its settings; None without.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    arch: ArchSpec
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    meant: Mapping[str, SavedLayer]
    base: Callable[[str], Tensor] | None = None
    folder: Mapping[str, object] | None = None

    def part(self, name: str) -> Part:
        return next(part for part in self.arch.parts if part.name == name)


@dataclass(frozen=True)
class Fate:
    """What becomes of one layer of the file.

    Attributes:
        loaded: whether it changes the model at all.
        reason: why it is not loaded, or not exact, in a few words; "" = exactly.
        errors: ||W'_reader - W'|| / ||W' - W|| at each of STRENGTHS; None = it depends on the base weights, which are
            not known, or on values which training has still to find.
    """

    loaded: bool = True
    reason: str = ""
    errors: tuple[float | None, float | None] = (0.0, 0.0)


@dataclass(frozen=True)
class Reading:
    """What a program makes of a file.

    Attributes:
        fates: layer of the file, as in `Given.meant` -> what becomes of it; all of them.
        refused: the program's own words where it takes no part of the file; "" = it loads.
        notes: what else a user should know, one sentence each.
        failed: why the model itself has no answer; never of a model's own making.
    """

    fates: Mapping[str, Fate] = field(default_factory=dict)
    refused: str = ""
    notes: tuple[str, ...] = ()
    failed: str = ""

    @property
    def loaded(self) -> int:
        return 0 if self.refused else sum(fate.loaded for fate in self.fates.values())

    @property
    def exact(self) -> bool:
        """Whether the whole update arrives, in proportion to the strength."""
        return (
            not self.refused
            and not self.failed
            and all(fate.loaded and not fate.reason for fate in self.fates.values())
        )

    @property
    def errors(self) -> tuple[float | None, float | None]:
        """The largest of all loaded layers; None where one of them is not known."""
        loaded = [fate.errors for fate in self.fates.values() if fate.loaded]
        columns = [[pair[i] for pair in loaded] for i in range(2)]
        first, second = (
            None if None in column else max((value for value in column if value is not None), default=0.0)
            for column in columns
        )
        return first, second


class Reader(Protocol):
    """A program, or one of its ways to read an adapter.

    Attributes:
        name: for machines: `comfyui`.
        title: with the version that was run: `ComfyUI 0.19.3`.
        order: its place in lists.
        unasked: it is spoken of at creation and at saves, too; few people need to know of the others.
    """

    name: str
    title: str
    order: int
    unasked: bool

    def read(self, given: Given) -> Reading | None:
        """What it makes of a file; None where it has no such model at all, so that the file is none of its business."""
