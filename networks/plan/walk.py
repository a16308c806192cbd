"""Every layer of a model that an adapter could sit on, with where it stands: what the rules look at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from ..archs.detect import unwrap
from ..archs.spec import Part, Rename
from ..tensors.geometry import Geometry, RowRanges
from ..tensors.norms import NormGeometry

Bases = tuple[tuple[nn.Module, "RowRanges | None"], ...]

_WRAPPER = re.compile(r"(?:^|\.)_orig_mod(?=\.|$)")


@dataclass(frozen=True)
class Candidate:
    """A Linear, a convolution or, where such layers are asked for, a normalisation layer of a model.

    Attributes:
        part: which of the architecture's models it belongs to.
        dotted_name: its path in this model, without wrapper levels.
        trainer_name: its path in the trainer's own model; the same unless the classes are another library's.
        saved_name: its name in files.
        bases: the modules it stands for, each with the rows of the layer that it computes (None = all).
        geometry: its shape and operation.
        containers: class names below which layers of this model are trained without being asked for.
        path_classes: class names of the modules above it, the outermost first, and its own.
        own_names: dotted names of the modules, where they are several.
    """

    part: Part
    dotted_name: str
    trainer_name: str
    saved_name: str
    bases: Bases
    geometry: Geometry
    containers: tuple[str, ...]
    path_classes: tuple[str, ...]
    own_names: tuple[str, ...] = ()

    @cached_property
    def above(self) -> frozenset[str]:
        """Class names of the modules above it."""
        return frozenset(self.path_classes[:-1])

    @cached_property
    def classes(self) -> frozenset[str]:
        """The same, with its own."""
        return frozenset(self.path_classes)

    @property
    def inside(self) -> bool:
        """Whether it is below such a container."""
        return not self.above.isdisjoint(self.containers) or self.trainer_name in self.part.loose

    @property
    def switches(self) -> tuple[str, ...]:
        """Arguments that take in what is below some class which it is below."""
        above = self.above
        return tuple(argument for argument, classes in self.part.optional if not above.isdisjoint(classes))

    @property
    def in_convolutional_block(self) -> bool:
        return not self.above.isdisjoint(self.part.conv_containers)

    @property
    def default(self) -> bool:
        """Whether it is trained when no argument says otherwise, the architecture's exclude patterns apart."""
        usual = self.geometry.family == Geometry.family and not self.geometry.has_kernel
        return usual and not self.part.argument and self.inside

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every dotted name by which a user may speak of it, the trainer's first: those of this model's classes, and
        those of all versions of a library, whichever is installed."""
        own = self.own_names or (self.dotted_name,)
        return tuple(dict.fromkeys((*self.trainer_names, *own)))

    @property
    def trainer_names(self) -> tuple[str, ...]:
        """Those among them which it has in the trainer's own model, too, with any version of a library."""
        return (self.trainer_name, *self.part.version_names(self.trainer_name))

    @property
    def own_saved_name(self) -> str:
        """The saved name that this model's own path would give: files under such names load too."""
        if self.own_names:
            return self.saved_name
        return f"{self.part.prefix}_{self.dotted_name}".replace(".", "_")


def candidates(part: Part, model: nn.Module, norms: bool = False) -> Iterator[Candidate]:
    """All Linears and convolutions of a model, each once, in module order.

    Args:
        part: which of the architecture's models it is.
        model: of the trainer's class or another library's, wrapped or not; the meta device will do.
        norms: normalisation layers, too.

    Raises:
        ValueError: a layer that the trainer has as one is there in part only.
    """
    waiting: dict[str, dict[int, Candidate]] = {}
    root = unwrap(model)
    named = part.among(_names(root))
    containers = _containers(part, root)
    for path, module, above in _walk(root, "", ()):
        geometry = Geometry.of(module) or (NormGeometry.of(module) if norms else None)
        if geometry is None:
            continue
        dotted = _dotted(path)
        layout = named.layout_of(dotted)
        names = dotted, named.trainer_name(dotted), named.saved_name(dotted)
        inside = (*above, type(module).__name__)
        found = Candidate(part, *names, _bases(module, geometry, layout), geometry, containers, inside)
        if layout is None or layout.count == 1:
            yield found
            continue
        group = waiting.setdefault(layout.trainer, {})
        group[layout.position] = found
        if len(group) == layout.count:
            yield _join([group[i] for i in range(layout.count)])
            del waiting[layout.trainer]
    if waiting:
        name, group = next(iter(waiting.items()))
        raise ValueError(
            f"this model lacks a projection of {name}: it has only {[c.dotted_name for c in group.values()]}"
        )


def _containers(part: Part, root: nn.Module) -> tuple[str, ...]:
    """Class names below which layers of this model are trained without being asked for."""
    joining = (classes for name, value, classes in part.tasks if getattr(root, name, None) == value)
    return sum(joining, part.containers)


def _bases(module: nn.Module, geometry: Geometry, layout: Rename | None) -> Bases:
    """The module, with its halves in the trainer's order."""
    half = geometry.out_features // 2
    if layout is not None and layout.swapped.at((geometry.out_features, geometry.in_features)):
        return ((module, ((half, 2 * half), (0, half))),)
    return ((module, None),)


def is_own(part: Part, model: nn.Module) -> bool:
    """Whether a model is of the trainer's class, where that decides how names are read."""
    return part.is_own(_names(unwrap(model)))


def _names(model: nn.Module) -> Iterator[str]:
    return (_dotted(path) for path, _ in model.named_modules())


def _dotted(path: str) -> str:
    """The path of a module without wrapper levels."""
    return _WRAPPER.sub("", path).lstrip(".")


def _join(parts: Sequence[Candidate]) -> Candidate:
    """The one layer that several modules make together, as the trainer has it."""
    bases, start = [], 0
    for part in parts:
        stop = start + part.geometry.out_features
        bases.append((part.bases[0][0], ((start, stop),)))
        start = stop
    names = tuple(part.dotted_name for part in parts)
    head = names[0].rpartition(".")[0]
    tails = ", ".join(name.removeprefix(f"{head}.") for name in names)
    return replace(
        parts[0],
        dotted_name=f"{head}.({tails})",
        bases=tuple(bases),
        geometry=replace(parts[0].geometry, out_features=start),
        own_names=names,
    )


def _walk(module: nn.Module, path: str, classes: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """(path, module, class names of all ancestors), depth first."""
    inside = (*classes, type(module).__name__)
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        yield below, child, inside
        yield from _walk(child, below, inside)
