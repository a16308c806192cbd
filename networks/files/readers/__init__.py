"""Models of the programs that read adapter files: one module each, found by listing.

    for reader in READERS: reader.read(given)

A model is compared with the program itself, run on real classes (tests/readers/): it holds facts, no opinions.
"""

from __future__ import annotations

import importlib
import pkgutil

from .contract import Fate, Given, Reader, Reading

_OTHERS = {"contract", "errors", "patcher", "trainers"}  # modules without a reader


def _found() -> tuple[Reader, ...]:
    names = sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name not in _OTHERS)
    readers = [reader for name in names for reader in importlib.import_module(f".{name}", __name__).READERS]
    return tuple(sorted(readers, key=lambda reader: (reader.order, reader.name)))


READERS = _found()

__all__ = ["READERS", "Fate", "Given", "Reader", "Reading"]
