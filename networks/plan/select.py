"""Which layers of a model are trained, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..archs.detect import unwrap
from ..archs.spec import Part
from ..args.parse import Problems
from ..tensors.geometry import Geometry, Pieces
from ..tensors.norms import NormGeometry

Bases = tuple[tuple[nn.Module, "Pieces | None"], ...]

_WRAPPER = re.compile(r"(?:^|\.)_orig_mod(?=\.|$)")


@dataclass(frozen=True)
class Candidate:
    """A Linear, a convolution or, where such layers are asked for, a normalisation layer of a model.

    Attributes:
        dotted_name: its path in this model, without wrapper levels.
        trainer_name: its path in the trainer's own model; the same unless the classes are another library's.
        bases: the modules it stands for, each with the rows of the layer that it computes (None = all).
        reason: why the architecture leaves it out; "" if it can be trained.
        by_conv_dim: only a dim for larger kernels lets it in.
        default: trained when no argument says otherwise (an exclude pattern of the architecture apart).
        path_classes: class names of the modules above it, the outermost first, and its own.
    """

    part: Part
    dotted_name: str
    trainer_name: str
    saved_name: str
    bases: Bases
    geometry: Geometry
    reason: str
    by_conv_dim: bool
    default: bool
    own_names: tuple[str, ...] = ()
    path_classes: tuple[str, ...] = ()

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(self.path_classes)

    @property
    def names(self) -> tuple[str, ...]:
        """Every dotted name by which a user may speak of it."""
        return (*(self.own_names or (self.dotted_name,)), self.trainer_name)

    @property
    def own_saved_name(self) -> str:
        """The saved name that this model's own path would give: files under such names load too."""
        if self.own_names:
            return self.saved_name
        return f"{self.part.prefix}_{self.dotted_name}".replace(".", "_")


def candidates(
    part: Part, model: nn.Module, convolutions: bool, switched_on: Collection[str] = (), norms: bool = False
) -> Iterator[Candidate]:
    """All Linears and convolutions of a model, each once, in module order.

    Args:
        convolutions: whether kernels above 1x1 have a dim; the part's conv_containers join then.
        switched_on: names of the boolean arguments that are True; the part may wait for one of them.
        norms: normalisation layers, too.
    """
    waiting: dict[str, dict[int, Candidate]] = {}
    root = unwrap(model)
    named = part.among(_names(root))
    always = part.containers + tuple(
        c for n, value, more in part.tasks if getattr(root, n, None) == value for c in more
    )
    containers = always + tuple(c for name, more in part.optional if name in switched_on for c in more)
    for path, module, above in _walk(root, "", ()):
        classes = frozenset(above)
        geometry = Geometry.of(module) or (NormGeometry.of(module) if norms else None)
        if geometry is None:
            continue
        dotted = _dotted(path)
        reason, by_conv_dim = "", False
        if part.argument and part.argument not in switched_on:
            reason = f"give {part.argument}=True to train it"
        elif classes.isdisjoint(containers):
            switch = next((name for name, more in part.optional if not classes.isdisjoint(more)), "")
            if switch:
                reason = f"give {switch}=True to train it"
            elif classes.isdisjoint(part.conv_containers):
                reason = f"outside {', '.join((*containers, *part.conv_containers))}"
            else:
                reason, by_conv_dim = "in a convolutional block: give conv_dim to train it", True
        elif geometry.has_kernel:
            reason, by_conv_dim = "kernel above 1x1: give conv_dim to train it", True
        if by_conv_dim and convolutions:
            reason = ""
        inner = (*above, type(module).__name__)
        names = dotted, named.trainer_name(dotted), named.saved_name(dotted)
        usual = geometry.family == Geometry.family and not geometry.has_kernel
        default = usual and not part.argument and not classes.isdisjoint(always)
        layout = named.layout_of(dotted)
        bases: Bases = ((module, None),)
        half = geometry.out_features // 2
        if layout is not None and layout.swapped and half == geometry.in_features:
            bases = ((module, ((half, 2 * half), (0, half))),)
        found = Candidate(part, *names, bases, geometry, reason, by_conv_dim, default, (), inner)
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


class Patterns:
    """Regular expressions of one argument; each must match the whole dotted name, this model's or the trainer's."""

    def __init__(self, argument: str, patterns: Iterable[str]) -> None:
        self.argument = argument
        self.compiled = [re.compile(pattern) for pattern in patterns]

    def __bool__(self) -> bool:
        return bool(self.compiled)

    def first(self, candidate: Candidate) -> str | None:
        """The first pattern that matches."""
        for pattern in self.compiled:
            if any(pattern.fullmatch(name) for name in candidate.names):
                return pattern.pattern
        return None

    def check(self, trainable: Sequence[Candidate], others: Sequence[Candidate], problems: Problems) -> set[str]:
        """Report every pattern that matches no layer which can be trained; returns those patterns."""
        reported: set[str] = set()
        for pattern in self.compiled:
            single = Patterns(self.argument, [pattern.pattern])
            if any(single.first(c) for c in trainable):
                continue
            reported.add(pattern.pattern)
            outside = next((c for c in others if single.first(c)), None)
            if outside is not None:
                problems.add(
                    f"{self.argument}: {pattern.pattern!r} matches only layers that are not trained, "
                    f"such as {outside.dotted_name} ({outside.reason})"
                )
                continue
            partly = next((c for c in trainable if pattern.search(c.dotted_name) or pattern.search(c.saved_name)), None)
            if partly is not None:
                hint = f"a pattern must match the whole dotted name, such as {partly.dotted_name!r}: write '.*...*'"
                if pattern.search(partly.dotted_name):
                    hint = f"it must match the whole name {partly.dotted_name!r}: write '.*{pattern.pattern}.*'"
            else:
                example = trainable[0].dotted_name if trainable else "-"
                hint = f"layer names look like {example!r}; scripts/plan.py lists them all"
            problems.add(f"{self.argument}: {pattern.pattern!r} matches no layer; {hint}")
        return reported
