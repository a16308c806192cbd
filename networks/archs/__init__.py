"""Architectures as data: one file for each, or for some that share their blocks. Standard library only.

Every file here that holds an ArchSpec adds an architecture. Its `entry` is a module beside this folder, written as
`lora_wan` is; what tests must know of it they say; scripts/names.py records the layers of its classes.
"""

from __future__ import annotations

import importlib
import pkgutil

from .spec import ArchSpec

_OTHERS = {"detect", "generic", "names", "places", "releases", "render", "spec", "spellings"}  # files without a record
_NAMES = [file.name for file in pkgutil.iter_modules(__path__) if file.name not in _OTHERS]
_FILES = [importlib.import_module(f".{name}", __name__) for name in _NAMES]
# A record may be built upon that of another file, which then has it by import: it counts once.
ARCHS: tuple[ArchSpec, ...] = tuple(
    dict.fromkeys(record for file in _FILES for record in vars(file).values() if isinstance(record, ArchSpec))
)

__all__ = ["ARCHS", "ArchSpec"]
