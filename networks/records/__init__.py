"""Records of the algorithms, one file each, and what a network argument is. Standard library only.

Every file here that holds an AlgoSpec adds an algorithm; its class stands in `algos`, in a file of the same name.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .arg import Arg
from .spec import AlgoSpec, FileKind


def _found() -> dict[str, AlgoSpec]:
    found: dict[str, AlgoSpec] = {}
    for module in sorted(info.name for info in iter_modules(__path__)):
        for value in vars(import_module(f".{module}", __name__)).values():
            if isinstance(value, AlgoSpec):
                assert found.setdefault(value.name, value) is value, (
                    f"networks/records/{module}.py: another record has the name {value.name}, choose one of its own"
                )
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


ALGORITHMS = _found()  # by `algo=`, in the order of lists

__all__ = ["ALGORITHMS", "AlgoSpec", "Arg", "FileKind"]
