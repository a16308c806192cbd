"""LoKr: the Kronecker product of a small and a larger matrix (2309.14859)."""

from __future__ import annotations

from .arg import FACTORS, NOTHING, Arg
from .spec import ADDITIVE, ALPHA_OVER_RANK, BIAS, LYCORIS, NO_KERNEL, OF_WEIGHT, About, AlgoSpec, FileKind

LOKR = AlgoSpec(
    "lokr",
    keys={**{name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}, **BIAS},
    kinds=(
        FileKind("LoKr in Tucker form", frozenset({"lokr_t2"})),
        FileKind("LoKr", frozenset({"lokr_w1"})),
        FileKind("LoKr", frozenset({"lokr_w1_a"})),
    ),
    order=30,
    options=frozenset(
        {"use_tucker", "use_scalar", "factor", "decompose_both", "full_matrix", "unbalanced_factorization"}
    ),
    arguments=(
        Arg(
            "factor",
            "int",
            -1,
            "upper bound of the smaller Kronecker factor; -1 splits next to the square root",
            FACTORS,
            minimum=-1,
            file="the sizes of `lokr_w1` and `lokr_w2`, and which of them is whole",
            example=("factor=8",),
        ),
        Arg(
            "decompose_both",
            "bool",
            False,
            "low rank for the smaller factor too",
            FACTORS,
            elsewhere=(("lycoris", True),),
            file="`lokr_w1_a` and `lokr_w1_b` in place of `lokr_w1`",
        ),
        Arg(
            "full_matrix",
            "bool",
            False,
            "both factors whole, whatever the dim; the scale is then 1 and alpha has no effect",
            FACTORS,
            file="`lokr_w2` in place of `lokr_w2_a` and `lokr_w2_b`",
        ),
        Arg(
            "unbalanced_factorization",
            "bool",
            False,
            "swap the two factors of the output side",
            FACTORS,
            file="the sizes of both factors",
        ),
        Arg(
            "init_lokr_norm",
            "float",
            None,
            "SimpleTuner's start: the second factor is this (1e-3 is usual) times normal numbers with the mean and the "
            "deviation of the base weight, the first one is 1. The update starts at that size, not at 0, and the log "
            "says so; for whole factors (full_matrix=True)",
            FACTORS,
            minimum=0,
            file=f"{NOTHING}; names and shapes stay; `networks_init` in the metadata has the size",
            example=("init_lokr_norm=1e-3", "full_matrix=True"),
        ),
    ),
    features=ADDITIVE | {"init_lokr_norm"},
    acts_on={
        "use_tucker": ("t2", NO_KERNEL),
        "decompose_both": ("w1_a", "no first factor is larger than twice the dim; lower network_dim"),
    },
    no_starts=dict.fromkeys(OF_WEIGHT, "the difference of two Kronecker products is none, so no file could hold it"),
    plus=frozenset({"w1", "w1_a", "w1_b"}),
    grows=frozenset({"w1_a", "w2_b"}),
    required=tuple(
        frozenset(one | two)
        for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for two in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    ),
    axes=(
        {"lokr_w1": "AC"},
        {"lokr_w1_a": "AR", "lokr_w1_b": "RC"},
        {"lokr_w2": "BD*"},
        {"lokr_t2": "RR*", "lokr_w2_a": "RB", "lokr_w2_b": "RD"},
        {"lokr_w2_a": "BR", "lokr_w2_b": "RE"},
    ),
    bias_key="diff_b",
    fold=("w1", "w1_a"),
    rank_shows=(("lokr_w1_b", 0), ("lokr_w2_b", 0)),
    about=About(
        papers=(LYCORIS,),
        scale=ALPHA_OVER_RANK + "; 1, whatever alpha is, where both factors are whole",
        use=(
            "The smallest files of those with a rank. The larger `factor`, up to the root of a width, the fewer "
            "values. With `full_matrix=True` both factors are whole and the change can have full rank: then dim and "
            "alpha have no effect, and the learning rate alone says how strong it gets."
        ),
    ),
)
