"""What all errors for users have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

ITEM = "\n  - "  # between the mistakes of one call


class Told(ValueError):
    """An error of a class by which callers know it, also when it has been located."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """A user's mistake that shows in here is told with its place: a file, a layer, a key.

    Raises:
        ValueError: `where: ` and the mistake.
    """
    try:
        yield
    except ValueError as error:
        raise (type(error) if isinstance(error, Told) else ValueError)(f"{where}: {error}") from None
