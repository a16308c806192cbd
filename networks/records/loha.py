"""LoHa: the Hadamard product of two low-rank matrices (2108.06098, 2309.14859)."""

from __future__ import annotations

from .spec import ADDITIVE, ALPHA_OVER_RANK, BIAS, LYCORIS, NO_KERNEL, OF_WEIGHT, About, AlgoSpec, FileKind

LOHA = AlgoSpec(
    "loha",
    keys={**{name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}, **BIAS},
    kinds=(FileKind("LoHa", frozenset({"hada_w1_a"})),),
    order=20,
    options=frozenset({"use_tucker", "use_scalar"}),
    features=ADDITIVE | {"split_qkv"},
    acts_on={"use_tucker": ("t1", NO_KERNEL)},
    no_starts={
        "orthogonal": "a Hadamard product has no orthogonal rows, whatever its factors have",
        **dict.fromkeys(OF_WEIGHT, "the difference of two Hadamard products is none, so no file could hold it"),
    },
    plus=frozenset({"w2_a"}),
    grows=frozenset({"w1_a", "w2_a"}),  # each learns by what the other half has
    required=(frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
    axes=(
        {
            **{f"hada_t{n}": "RR*" for n in (1, 2)},
            **{f"hada_w{n}_{side}": axes for n in (1, 2) for side, axes in (("a", "RO"), ("b", "RI"))},
        },
        {f"hada_w{n}_{side}": axes for n in (1, 2) for side, axes in (("a", "OR"), ("b", "RJ"))},
    ),
    bias_key="diff_b",
    fold=("w1_a",),
    rank_shows=(("hada_w1_b", 0),),
    about=About(
        papers=(
            ("2108.06098", "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning"),
            LYCORIS,
        ),
        scale=ALPHA_OVER_RANK,
        use=(
            "A change of rank up to dim^2 from twice the values of a LoRA of that dim: at dim 8 up to rank 64. A step "
            "costs dim times the products of that LoRA, at most about those of a whole weight. From dim 36 on the rank "
            "can be full on a layer of 1280 features, so larger dims only cost."
        ),
    ),
)
