"""Regular expressions on the names of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..archs.spec import ArchSpec
from ..args.expressions import part_of
from .walk import Candidate


@dataclass(frozen=True)
class Pattern:
    """One expression.

    Attributes:
        text: as the user wrote it.
        part: the part that it names; "" = it means all.
        regex: on names in that part.
    """

    text: str
    part: str
    regex: re.Pattern[str]

    @classmethod
    def of(cls, text: str, arch: ArchSpec) -> Pattern:
        part, expression = part_of(text, arch.part_names)
        return cls(text, part, re.compile(expression))

    def means(self, c: Candidate) -> bool:
        """Whether it matches the whole of one of the layer's dotted names."""
        return self.part in ("", c.part.name) and any(map(self.regex.fullmatch, c.names))

    def is_found_in(self, c: Candidate, names: Iterable[str]) -> bool:
        """Whether it stands somewhere in one of these names of the layer."""
        return self.part in ("", c.part.name) and any(map(self.regex.search, names))


class Patterns:
    """Regular expressions of one argument.

    Args:
        argument: its name.
        patterns: as the user wrote them; each must match the whole dotted name, see `Candidate.names`.
        arch: whose parts they may name.
    """

    def __init__(self, argument: str, patterns: Iterable[str], arch: ArchSpec) -> None:
        self.argument, self.arch = argument, arch
        self.patterns = [Pattern.of(text, arch) for text in patterns]

    def __bool__(self) -> bool:
        return bool(self.patterns)

    @property
    def quoted(self) -> str:
        """As the user wrote them."""
        return ", ".join(repr(pattern.text) for pattern in self.patterns)

    def first(self, candidate: Candidate) -> str | None:
        """The first pattern that matches."""
        return next((pattern.text for pattern in self.patterns if pattern.means(candidate)), None)
