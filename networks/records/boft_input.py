"""BOFT on the input side, in the form that PEFT gave it: any number of stages, over all columns of a weight."""

from __future__ import annotations

from .arg import FACTORS, Arg
from .oft import CHANGE
from .spec import About, AlgoSpec

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
            file="the first axis of `boft_R`",
            example=("butterflies=2",),
        ),
    ),
    required=(frozenset({TURNS}),),
    axes=({TURNS: "SNBB"}, {SCALES: "O*"}),
    saves_alpha=False,
    near_one=frozenset({CHANGE}),
    peft_type="BOFT",
    relative=True,
    own_entries=("boft",),
    about=About(
        papers=(("2311.06243", "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization"),),
        scale="1: a rotation has no strength, and files hold no alpha",
        use=(
            "BOFT on the columns of a weight, in the files of sd-scripts' `networks.boft` and of PEFT: to train "
            "on from theirs, or for these programs. `butterflies=1` is one stage of blocks."
        ),
    ),
)
