"""BOFT on the input side, in the form that PEFT gave it: any number of stages, over all columns of a weight."""

from __future__ import annotations

from .arg import FACTORS, Arg
from .oft import CHANGE
from .spec import AlgoSpec

TURNS, SCALES = "boft_R", "boft_s"

BOFT_INPUT = AlgoSpec(
    "boft-input",
    keys={"blocks": TURNS, CHANGE: SCALES},
    kinds=(),
    order=115,
    options=frozenset({"butterflies", "rescaled"}),
    features=frozenset(),
    arguments=(
        Arg(
            "butterflies",
            "int",
            1,
            "stages of rotations, each of blocks from twice as far apart as the one before",
            FACTORS,
            aliases=("boft_n_butterfly_factor",),
            minimum=1,
        ),
    ),
    required=(frozenset({TURNS}),),
    axes=({TURNS: "SNBB"}, {SCALES: "O*"}),
    saves_alpha=False,
    near_one=frozenset({CHANGE}),
    peft_type="BOFT",
    relative=True,
    own_entries=("boft",),
)
