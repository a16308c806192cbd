"""Values of which every thread has its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerThread(threading.local, Generic[T]):
    """An object for each thread, made when the thread first asks for it, and gone with it.

    A copy, and what comes out of a pickle, has this thread's in the thread which makes it, and nothing of the others'.

    Args:
        make: makes one.

    Attributes:
        mine: this thread's. A plain object, to be changed in place: torch.compile writes back what it changes of such
            an object, but not the attributes of a `threading.local`.
    """

    def __init__(self, make: Callable[[], T]) -> None:  # called again by every thread that asks
        self._make = make
        self.mine: T = make()

    def __reduce__(self) -> tuple[Any, ...]:
        return _with, (self._make, self.mine)


def _with(make: Callable[[], T], mine: T) -> PerThread[T]:
    made = PerThread(make)
    made.mine = mine
    return made
