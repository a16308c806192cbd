"""Why each layer gets what it gets: the word of every rule, and what every source of a value says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..args.coerce import nearest
from ..args.expressions import part_of, quoted
from ..foreign.expressions import TOO_SLOW, compiled, slow
from .rules import RULES, Rule, Word
from .values import VALUES, Found, Source

if TYPE_CHECKING:
    from .call import Call
    from .plan import PlanRow
    from .walk import Candidate


@dataclass(frozen=True)
class Why:
    """One layer, explained.

    Attributes:
        row: of the plan.
        words: every rule, in the order in which they are asked, with its word; None = nothing against the layer.
        values: name of a value -> its sources, in order of precedence, with what they say; None = nothing. The first
            that says something decides, in a layer that is trained.
    """

    row: PlanRow
    words: tuple[tuple[Rule, Word | None], ...]
    values: Mapping[str, tuple[tuple[Source, Found | None], ...]]

    def __str__(self) -> str:
        row = self.row
        told = "; ".join((f"{row.algo}, dim {row.dim}, alpha {row.alpha:g}, scale {row.scale:.6g}", *_rates(row)))
        lines = [
            f"{row.shown_name} ({row.saved_name}, {row.kind})",
            f"  {'trained: ' + told if row.trained else 'left out: ' + row.reason}",
        ]
        width = max(len(rule.name) for rule, _ in self.words)
        lines += [f"    {rule.name.ljust(width)}  {saying(rule, word)}" for rule, word in self.words]
        lines += [f"    {name}: {_precedence(sources)}" for name, sources in self.values.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form: names, the rules' words as text, and the sources' values."""
        return {
            "name": self.row.shown_name,
            "part": self.row.part,
            "dotted_name": self.row.dotted_name,
            "saved_name": self.row.saved_name,
            "trained": self.row.trained,
            "reason": self.row.reason,
            "rules": [{"rule": rule.name, "word": saying(rule, word)} for rule, word in self.words],
            "values": {
                name: [{"source": s.name, "value": found.value if found else None} for s, found in sources]
                for name, sources in self.values.items()
            },
        }


@dataclass(frozen=True)
class Explainer:
    """What a plan keeps to answer why: the call, and the layers without their modules."""

    call: Call
    layers: tuple[Candidate, ...]

    def explain(self, name: str, rows: Sequence[PlanRow]) -> tuple[Why, ...]:
        """All layers that a name means.

        Args:
            name: a dotted or a saved name; else a part of one, or a regular expression that is found in one; either
                may begin with the part that it means, `text_encoder1:mlp`.
            rows: of the plan.

        Raises:
            ValueError: there is no such layer.
        """
        by_name = {(row.part, row.dotted_name): row for row in rows}
        layers = [c for c in self.layers if (c.part.name, c.dotted_name) in by_name]
        found = [c for c in layers if name in self._names(c)] or self._matching(name, layers)
        if not found:
            known = [one for c in layers for one in self._names(c)]
            like = f"; names look like {known[0]}" if known else ""
            raise ValueError(f"no layer of this model has {name!r} in its name{nearest(name, known) or like}")
        return tuple(self._why(c, by_name[c.part.name, c.dotted_name]) for c in found)

    def _matching(self, name: str, layers: Sequence[Candidate]) -> list[Candidate]:
        """Those in whose names it is found, as a regular expression or as it stands."""
        part, expression = part_of(name, self.call.arch.part_names)
        try:
            pattern = compiled(expression)
        except ValueError:
            pattern = re.compile(re.escape(expression))
        if slow([pattern.pattern], (one for c in layers for one in self._names(c))):
            raise ValueError(f"{name!r} {TOO_SLOW}")
        return [c for c in layers if part in ("", c.part.name) and any(map(pattern.search, self._names(c)))]

    def _names(self, c: Candidate) -> tuple[str, ...]:
        return (self.call.shown_name(c), c.dotted_name, *c.names, c.saved_name)

    def _why(self, c: Candidate, row: PlanRow) -> Why:
        words = tuple((rule, rule.ask(c, self.call)) for rule in RULES)
        values = {
            name: tuple((source, source.find(c, self.call)) for source in sources) for name, sources in VALUES.items()
        }
        return Why(row, words, values)


def saying(rule: Rule, word: Word | None) -> str:
    """A rule's word on a layer, as a person would say it."""
    if word is None:
        return "passes"
    named = word.by and word.by[0] not in rule.name and word.by[0] not in word.out
    by = f" ({' '.join(filter(None, word.by or ()))})" if named else ""
    if word.out:
        return f"leaves it out: {word.out}{by}"
    return f"{'takes it in' if word.takes_in else 'passes'}{by}{': ' if word.note else ''}{word.note}"


def _precedence(sources: Sequence[tuple[Source, Found | None]]) -> str:
    """What sources say, the first of which decides; `>` = goes before."""
    return " > ".join(_claim(source, found) for source, found in sources if found is not None)


def _claim(source: Source, found: Found) -> str:
    argument, expression = found.by or (source.name, "")
    where = f"{argument} {quoted(expression)}" if expression else argument
    return where if found.value is None else f"{found.value:g} by {where}"


def _rates(row: PlanRow) -> list[str]:
    """What is unusual about its learning rates, and its dropouts."""
    shown = {"learning rate": row.lr, "factor of its block": row.block_rate}
    ratios = {"LoRA+ ratio": row.plus_ratio * row.plus_unit, "ratio of the magnitudes": row.dora_ratio}
    shown |= {name: ratio for name, ratio in ratios.items() if ratio != 1} | row.dropouts.given
    return [f"{name} {value:g}" for name, value in shown.items() if value is not None]
