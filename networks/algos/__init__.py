"""The algorithms: one file of mathematics each. Order = order of detection in a file."""

from __future__ import annotations

from collections.abc import Iterable

from .base import Adapter, Layout
from .dylora import DyLoRA
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .lora_fa import LoRAFA

ALGOS: dict[str, type[Adapter]] = {cls.algo: cls for cls in (LoRA, LoHa, LoKr, DyLoRA, LoRAFA)}


def recognise(suffixes: Iterable[str]) -> type[Adapter] | None:
    """The algorithm whose saved keys these are (`lora_up.weight`, `hada_w1_a`, ...), or None."""
    present = set(suffixes)
    return next((cls for cls in ALGOS.values() if cls.recognises(present)), None)


__all__ = ["ALGOS", "Adapter", "Layout", "recognise"]
