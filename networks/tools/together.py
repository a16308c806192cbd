"""Several adapter files under one set of names: those of their model, or their own where no model is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..archs.spec import ArchSpec
from ..files import dotted
from ..files.codec import SavedLayer
from ..models.skeleton import Skeleton
from ..tensors.updates import Update
from .opened import Opened


@dataclass(frozen=True)
class Together:
    """Files whose layers have the same names for the same weights.

    Attributes:
        files: opened.
        arch: of their model; None = nothing says, and the names are the files' own.
    """

    files: tuple[Opened, ...]
    arch: ArchSpec | None

    @classmethod
    def of(cls, files: Sequence[Opened]) -> Together:
        """
        Raises:
            ValueError: they are for different models, or where none is known have no layer in common.
        """
        files, archs = _of_one_model(files, [_arch_of(file) for file in files])
        known = {arch.name: (arch, file) for arch, file in zip(archs, files, strict=True) if arch is not None}
        if len(known) > 1:
            (one, first), (other, second), *_ = known.values()
            raise ValueError(
                f"{first.path} is for {one.title}, {second.path} for {other.title}: give files of one model"
            )
        found = cls(tuple(files), next((arch for arch, _ in known.values()), None) if None not in archs else None)
        for file in files[1:] if found.arch is None else ():
            if found.layers(file).keys().isdisjoint(found.layers(files[0])):
                names = [dotted.shown(next(iter(found.layers(one)), "none")) for one in (files[0], file)]
                raise ValueError(
                    f"{files[0].path} and {file.path} have no layer in common (like {' and '.join(names)}): give files "
                    "of one model, or say which with --model"
                )
        return found

    @property
    def names(self) -> list[str]:
        """Of all layers, in the order of the files."""
        return [*dict.fromkeys(name for file in self.files for name in self.layers(file))]

    def layers(self, file: Opened) -> Mapping[str, SavedLayer]:
        return file.own.layers if self.arch is None else file.on_model.layers

    def shape(self, file: Opened, name: str) -> tuple[int, ...]:
        return (file.shape(name) or ()) if self.arch is None else file.model_shape(name)

    def weight(self, file: Opened, name: str) -> Tensor | None:
        return file.weight(name) if self.arch is None else file.model_weight(name)

    def update(self, file: Opened, name: str) -> Update:
        """What a layer adds at strength 1. Raises ValueError as `Opened.update`."""
        return file.update(name) if self.arch is None else file.model_update(name)

    def order(self, file: Opened) -> str:
        """A sentence on what a sum with this file means where merging one after another is something else; "" = it is
        the same."""
        layers = self.layers(file).values()
        count = sum(one.algorithm.spec.relative or one.magnitude is not None for one in layers)
        return (
            f"{file.path}: {count} layers act on the weight that they find (DoRA, rotations, factors of the weight); "
            "what is summed is what they add to the base alone, so merging the files one after another differs in "
            "products of two changes"
            if count
            else ""
        )

    def lost(self, file: Opened) -> list[tuple[str, str]]:
        """(key or layer, why) of what a file has besides its layers."""
        opened = file.own if self.arch is None else file.on_model
        return [
            *((key, "is no adapter") for key in opened.stray),
            *((name, "has no place") for name in opened.portions),
        ]


def _of_one_model(
    files: Sequence[Opened], archs: Sequence[ArchSpec | None]
) -> tuple[list[Opened], list[ArchSpec | None]]:
    """Files, and what they are for: where that is open, the model of another, if it has all layers of the file."""
    if None not in archs:
        return [*files], [*archs]
    model = next(filter(None, map(_model_of, files)), None)
    if model is None:
        return [*files], [*archs]
    found: list[tuple[Opened, ArchSpec | None]] = []
    for file, arch in zip(files, archs, strict=True):
        other = file if arch is not None else file.on(model)
        found.append((other, other.arch) if _has_all(other) else (file, arch))
    return [file for file, _ in found], [arch for _, arch in found]


def _has_all(file: Opened) -> bool:
    """Whether its model has all layers of a file."""
    try:
        layers = file.on_model
    except ValueError:
        return False
    return not layers.portions and layers.layers.keys() <= file.model_layers.keys()


def _model_of(file: Opened) -> Skeleton | None:
    try:
        return file.model
    except ValueError:
        return None


def _arch_of(file: Opened) -> ArchSpec | None:
    try:
        return file.arch
    except ValueError:
        return None
