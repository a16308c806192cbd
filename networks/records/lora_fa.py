"""LoRA-FA: LoRA whose down factor keeps its random start (2308.03303)."""

from __future__ import annotations

from dataclasses import replace

from .lora import LORA
from .spec import ALPHA_OVER_RANK, About

LORA_FA = replace(
    LORA,
    name="lora_fa",
    order=50,
    saved_as=LORA.name,
    frozen=frozenset({"down"}),
    keeps_start=False,  # (up - up0) . down is of its own form: with up from 0 it is the same, of rank R
    about=About(
        papers=(("2308.03303", "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning"),),
        scale=ALPHA_OVER_RANK,
        use=(
            "A LoRA for less memory: `lora_down` keeps its random start, so it has no gradient and no optimizer "
            "state, and the input of a layer is not kept for the backward pass. Files are those of a LoRA. What "
            "it can learn is bound to the directions that were drawn."
        ),
    ),
)
