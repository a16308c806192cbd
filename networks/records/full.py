"""Full fine-tuning as an adapter: the whole difference."""

from __future__ import annotations

from .spec import AlgoSpec, FileKind, Reads

FULL = AlgoSpec(
    "full",
    keys={"diff": "diff", "diff_b": "diff_b"},
    kinds=(
        FileKind(
            "whole difference",
            frozenset({"diff"}),
            Reads(comfyui="yes", a1111="yes", forge="yes", diffusers="refused", peft="no", invokeai="yes"),
        ),
    ),
    order=80,
    features=frozenset(),  # lengths of its own would say nothing that diff cannot
    required=(frozenset({"diff"}),),
    bias_key="diff_b",
)
