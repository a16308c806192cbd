"""The rules of selection and the precedence of values as Markdown, for docs/plan.md."""

from __future__ import annotations

from collections.abc import Sequence

from .rules import ADMISSION, CHOICE, FILE, Rule
from .values import VALUES, Source


def markdown() -> str:
    """Two tables; generated text, so edit the rules and the sources instead."""
    lines = ["| | rule | a layer is left out unless it passes |", "| --- | --- | --- |"]
    lines += _rules("what can be trained: a later rule may take in what an earlier one left out", ADMISSION, 1)
    lines += _rules("what is trained of that: the first reason holds", (FILE, *CHOICE), 1 + len(ADMISSION))
    lines += ["", "| value | the first of these that says something |", "| --- | --- |"]
    lines += [f"| {name} | {' > '.join(map(_source, sources))} |" for name, sources in VALUES.items()]
    return "\n".join(lines) + "\n"


def _rules(title: str, rules: Sequence[Rule], start: int) -> list[str]:
    return [
        f"| | **{title}** | |",
        *(f"| {number} | {rule.name} | {rule.sentence} |" for number, rule in enumerate(rules, start)),
    ]


def _source(source: Source) -> str:
    return ", ".join(f"`{name}`" if name in source.arguments else name for name in source.name.split(", "))
