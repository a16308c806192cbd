"""Normalisation layers: the whole difference of weight and bias."""

from __future__ import annotations

from .spec import NO_ALPHA, About, AlgoSpec, FileKind

NORM = AlgoSpec(
    "norm",
    keys={"w_norm": "w_norm", "b_norm": "b_norm"},
    kinds=(
        FileKind("norm", frozenset({"w_norm", "b_norm"})),
        FileKind("norm without bias", frozenset({"w_norm"})),
    ),
    order=90,
    family="norm",
    features=frozenset(),
    required=(frozenset({"w_norm"}), frozenset({"diff"})),
    more_keys=frozenset({"diff", "diff_b"}),  # as some programs call them, which have one name for all layers
    axes=({"w_norm": "C", "b_norm": "C"}, {"w_norm": "C"}, {"diff": "C", "diff_b": "C"}, {"diff": "C"}),
    bias_key="b_norm",
    shifts=True,
    saves_alpha=False,
    about=About(
        papers=(),
        scale=NO_ALPHA,
        use=(
            "Weight and bias of normalisation layers, a few thousand values: seldom alone, mostly beside another "
            "algorithm with `train_norm=True`. Many DiTs have norms without a weight, which no other program can "
            "add to."
        ),
    ),
)
