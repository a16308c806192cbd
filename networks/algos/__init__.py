"""The algorithms: one file of mathematics each, in two families. Order = order of detection in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .additive import Additive
from .base import Adapter
from .boft import BOFT
from .dylora import DyLoRA
from .full import Full
from .glora import GLoRA
from .ia3 import IA3
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .lora_fa import LoRAFA
from .multiplicative import Multiplicative
from .norm import Norm
from .oft import DiagOFT
from .parts import layout_of, make_adapter
from .saved import Layout
from .tlora import TLoRA

ALGOS: dict[str, type[Adapter]] = {
    cls.algo: cls for cls in (LoRA, LoHa, LoKr, DyLoRA, LoRAFA, GLoRA, TLoRA, Full, Norm, DiagOFT, BOFT, IA3)
}


def suited(algo: str, family: str) -> type[Adapter] | None:
    """The algorithm itself if it is for such layers, else the one that there is for them alone; None = no other."""
    own = ALGOS[algo]
    if own.family == family:
        return own
    return next((cls for cls in ALGOS.values() if cls.family == family != Adapter.family), None)


def recognise(suffixes: Iterable[str]) -> type[Adapter] | None:
    """The algorithm whose saved keys these are (`lora_up.weight`, `hada_w1_a`, ...), or None.

    Args:
        suffixes: names alone, or with their tensors, which tell apart what has the same names.
    """
    present = set(suffixes)
    named = [cls for cls in ALGOS.values() if cls.recognises(present)]
    if isinstance(suffixes, Mapping):
        named = [cls for cls in named if cls.accepts(suffixes)]
    return named[0] if named else None


__all__ = [
    "ALGOS",
    "Adapter",
    "Additive",
    "Layout",
    "Multiplicative",
    "layout_of",
    "make_adapter",
    "recognise",
    "suited",
]
