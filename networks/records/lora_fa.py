"""LoRA-FA: LoRA whose down factor keeps its random start (2308.03303)."""

from __future__ import annotations

from dataclasses import replace

from .lora import LORA

LORA_FA = replace(
    LORA,
    name="lora_fa",
    order=50,
    saved_as=LORA.name,
    frozen=frozenset({"down"}),
    keeps_start=False,  # (up - up0) . down is of its own form: with up from 0 it is the same, of rank R
)
