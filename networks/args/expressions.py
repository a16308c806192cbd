"""Regular expressions on the names of layers, which may begin with the one part they mean: `text_encoder1:.*mlp.*`."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..foreign.expressions import compiled
from ..foreign.texts import printable


class Repeated(ValueError):
    """An expression stands there twice, of which the second decides nothing."""


def part_of(text: str, parts: Collection[str]) -> tuple[str, str]:
    """The part that an expression names, and the expression on the names there; "" = it means all parts.

    Args:
        text: the expression as the user wrote it.
        parts: names of parts; what else stands before a colon belongs to the expression.
    """
    head, colon, rest = text.partition(":")
    return (head.strip(), rest.strip()) if colon and head.strip() in parts else ("", text)


def would_be_part(text: str) -> str:
    """The word before the colon with which an expression begins; "" = it begins otherwise, as `(?:a|b)` does."""
    head, colon, _ = text.partition(":")
    return head.strip() if colon and head.strip().isidentifier() else ""


def quoted(text: str) -> str:
    """As the user wrote it, and may write it again: backslashes stay single. Of text out of a file its place."""
    return getattr(text, "where", "") or f"'{printable(text)}'"


def as_list(texts: Collection[str]) -> str:
    """The value of an argument that takes several: a list in Python, raw where a backslash wants that."""
    return f"[{', '.join(('r' if chr(92) in text else '') + quoted(text) for text in texts)}]"


def flaw(text: str) -> str:
    """What is wrong with an expression, as a clause; "" = nothing."""
    head = would_be_part(text)
    expression = part_of(text, [head])[1]
    if not expression.strip():
        every = f"'{head}:.*' for all layers of {head}" if head else "'.*' for all layers"
        return f"the regular expression {quoted(text)} is empty: leave it out, or write {every}"
    for one in (text, expression):
        try:
            compiled(one)
        except ValueError as error:
            return f"the regular expression {quoted(text)} is wrong: {error}"
    return ""


def checked(text: str) -> str:
    """The same text.

    Raises:
        ValueError: it is no regular expression.
    """
    if found := flaw(text):
        raise ValueError(f"cannot be used: {found}")
    return text


def check_repeated(texts: Iterable[str]) -> None:
    """
    Raises:
        Repeated: one of them stands there twice.
    """
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise Repeated(f"has the regular expression {quoted(text)} twice; leave one of the two out")
        seen.add(text)
