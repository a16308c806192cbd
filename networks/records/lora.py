"""LoRA and its convolutional form LoCon (2106.09685, 2309.14859)."""

from __future__ import annotations

from .spec import ADDITIVE, ALPHA_OVER_RANK, BIAS, LYCORIS, NO_KERNEL, About, AlgoSpec, FileKind

LORA = AlgoSpec(
    "lora",
    keys={"down": "lora_down.weight", "mid": "lora_mid.weight", "up": "lora_up.weight", **BIAS},
    kinds=(
        FileKind("LoRA in Tucker form", frozenset({"lora_mid.weight"})),
        FileKind("LoRA", frozenset({"lora_up.weight"})),
    ),
    order=10,
    options=frozenset({"use_tucker", "use_scalar"}),
    features=ADDITIVE | {"split_qkv"},
    no_starts={},
    acts_on={"use_tucker": ("mid", NO_KERNEL)},
    keeps_start=True,
    plus=frozenset({"up"}),
    grows=frozenset({"up"}),
    required=(frozenset({"lora_up.weight", "lora_down.weight"}),),
    axes=(
        {"lora_mid.weight": "RR*", "lora_down.weight": "RI", "lora_up.weight": "OR"},
        {"lora_down.weight": "RI*", "lora_up.weight": "OR"},
    ),
    bias_key="diff_b",
    fold=("up",),
    rank_shows=(("lora_down.weight", 0),),
    about=About(
        papers=(("2106.09685", "LoRA: Low-Rank Adaptation of Large Language Models"), LYCORIS),
        scale=ALPHA_OVER_RANK,
        use=(
            "The first choice: more programs read it than any other form, and every general option acts on it. "
            "Others are worth a try where files should be smaller (lokr), where its rank is not enough (loha, "
            "glora, full), or where the model should keep what it knows (diag-oft)."
        ),
    ),
)
