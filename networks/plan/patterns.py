"""Regular expressions on the names of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..args.parse import Problems
from .walk import Candidate


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

    def report_unmatched(
        self, trainable: Sequence[Candidate], others: Sequence[tuple[Candidate, str]], problems: Problems
    ) -> set[str]:
        """Report every pattern that matches no layer which can be trained.

        Args:
            trainable: layers that can be.
            others: the rest, each with the reason.
            problems: takes the reports.

        Returns:
            Those patterns.
        """
        reported: set[str] = set()
        for pattern in self.compiled:
            single = Patterns(self.argument, [pattern.pattern])
            if any(single.first(c) for c in trainable):
                continue
            reported.add(pattern.pattern)
            outside = next((pair for pair in others if single.first(pair[0])), None)
            if outside is not None:
                problems.add(
                    f"{self.argument}: {pattern.pattern!r} matches only layers that are not trained, "
                    f"such as {outside[0].dotted_name} ({outside[1]})"
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
