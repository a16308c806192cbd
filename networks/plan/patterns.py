"""Regular expressions on the names of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..archs.spec import ArchSpec
from ..args.expressions import part_of, quoted
from .groups import Layer
from .walk import Candidate


@dataclass(frozen=True)
class Pattern:
    """One expression.

    Attributes:
        text: as the user wrote it.
        part: the part that it names; "" = it means all.
        regex: on names in that part.
        own: it is on any name of a layer, not on the trainer's alone.
    """

    text: str
    part: str
    regex: re.Pattern[str]
    own: bool = False

    @classmethod
    def of(cls, text: str, arch: ArchSpec) -> Pattern:
        part, expression = part_of(text, arch.part_names)
        return cls(text, part, re.compile(expression))

    def means(self, c: Candidate) -> bool:
        """Whether it matches the whole of the layer's dotted name."""
        return self.matches(c, c.names if self.own else (c.trainer_name,))

    def matches(self, c: Candidate, names: Iterable[str]) -> bool:
        """Whether it matches the whole of one of these names of the layer."""
        return self.part in ("", c.part.name) and any(map(self.regex.fullmatch, names))

    def is_found_in(self, c: Candidate, names: Iterable[str]) -> bool:
        """Whether it stands somewhere in one of these names of the layer."""
        return self.part in ("", c.part.name) and any(map(self.regex.search, names))


class Patterns:
    """Regular expressions of one argument.

    Args:
        argument: its name.
        patterns: as the user wrote them; each must match the whole dotted name.
        arch: whose parts they may name.
        named: (part, trainer's dotted name) of all layers. An expression that matches one of them is on these names
            alone, so that it means the same layers whichever library the classes are of; another is on every name
            that a layer has, see `Candidate.names`. None = all are on the trainer's names.
    """

    def __init__(
        self, argument: str, patterns: Iterable[str], arch: ArchSpec, named: Sequence[Layer] | None = None
    ) -> None:
        self.argument, self.arch, self.named = argument, arch, named
        self.patterns = [self.read(text) for text in patterns]

    def read(self, text: str) -> Pattern:
        """One expression, as all of these are read.

        Raises:
            re.error: it is none.
        """
        pattern = Pattern.of(text, self.arch)
        if self.named is None:
            return pattern
        own = {name for part, name in self.named if pattern.part in ("", part)}
        return replace(pattern, own=not any(map(pattern.regex.fullmatch, own)))

    def __bool__(self) -> bool:
        return bool(self.patterns)

    @property
    def quoted(self) -> str:
        """As the user wrote them."""
        return ", ".join(quoted(pattern.text) for pattern in self.patterns)

    def first(self, candidate: Candidate) -> str | None:
        """The first pattern that matches."""
        if not self.patterns:  # most arguments have none, and every layer asks several of them
            return None
        return next((pattern.text for pattern in self.patterns if pattern.means(candidate)), None)
