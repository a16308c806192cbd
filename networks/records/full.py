"""Full fine-tuning as an adapter: the whole difference."""

from __future__ import annotations

from .spec import BIAS, NO_ALPHA, About, AlgoSpec, FileKind

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
    about=About(
        papers=(),
        scale=NO_ALPHA,
        use=(
            "Everything that fine-tuning of these layers can do, as a file of differences, with as many values as "
            "the layers have: memory and file are many times those of a LoRA. For few layers (`only_patterns`, "
            "`blocks`), or to be made into a LoRA afterwards by `kohya-networks convert --to lora`."
        ),
    ),
)
