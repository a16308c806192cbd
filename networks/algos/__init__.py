"""The algorithms: one file of mathematics each, in two families, with its record (`records`) as `spec`.

A file here with a class that has a `spec` of its own is all that it takes: the registry is the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules

from ..records import ALGORITHMS, AlgoSpec
from ..records.spec import OF_WEIGHT
from .additive import Additive
from .base import Adapter, unstarted
from .multiplicative import Multiplicative
from .parts import layout_of, make_adapter
from .saved import Layout


def _classes() -> Iterator[type[Adapter]]:
    for module in sorted(info.name for info in iter_modules(__path__)):
        for value in vars(import_module(f".{module}", __name__)).values():
            if isinstance(value, type) and issubclass(value, Adapter) and "spec" in vars(value):
                yield value


def _of(spec: AlgoSpec) -> type[Adapter]:
    own = [cls for cls in _CLASSES if cls.spec is spec]
    names = " and ".join(cls.__name__ for cls in own) or "none yet"
    assert len(own) == 1, (
        f"networks/records has an algorithm {spec.name}, which wants one class in a file of networks/algos with this "
        f"record as its `spec`; it has {names}"
    )
    return own[0]


_CLASSES = tuple(dict.fromkeys(_classes()))
ALGOS: dict[str, type[Adapter]] = {name: _of(spec) for name, spec in ALGORITHMS.items()}


def suited(algo: str, family: str) -> type[Adapter] | None:
    """The algorithm itself if it is for such layers, else the one that there is for them alone; None = no other."""
    own = ALGOS[algo]
    if own.spec.family == family:
        return own
    return next((cls for cls in ALGOS.values() if cls.spec.family == family != AlgoSpec.family), None)


def recognise(suffixes: Iterable[str]) -> type[Adapter] | None:
    """The algorithm whose saved keys these are (`lora_up.weight`, `hada_w1_a`, ...), or None.

    Args:
        suffixes: names alone, or with their tensors, which tell apart what has the same names.
    """
    named = _named(frozenset(suffixes))
    if isinstance(suffixes, Mapping):
        named = tuple(cls for cls in named if cls.accepts(suffixes))
    return named[0] if named else None


@lru_cache(maxsize=1000)
def _named(suffixes: frozenset[str]) -> tuple[type[Adapter], ...]:
    """The algorithms that have such names; most layers of a file have the same ones."""
    return tuple(cls for cls in ALGOS.values() if cls.spec.recognises(suffixes))


__all__ = [
    "ALGOS",
    "OF_WEIGHT",
    "Adapter",
    "Additive",
    "Layout",
    "Multiplicative",
    "layout_of",
    "make_adapter",
    "recognise",
    "suited",
    "unstarted",
]
