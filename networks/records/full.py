"""Full fine-tuning as an adapter: the whole difference."""

from __future__ import annotations

from .spec import BIAS, AlgoSpec, FileKind

FULL = AlgoSpec(
    "full",
    keys={"diff": "diff", **BIAS},
    kinds=(FileKind("whole difference", frozenset({"diff"})),),
    order=80,
    features=frozenset(),  # lengths of its own would say nothing that diff cannot
    required=(frozenset({"diff"}),),
    axes=({"diff": "OI*"},),
    bias_key="diff_b",
    shifts=True,
)
