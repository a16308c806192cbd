"""BOFT: a butterfly of rotations (2311.06243), so that every output feature meets every other in log2 steps."""

from __future__ import annotations

from .oft import BLOCKS, DIAG_OFT, RESCALE, ROTATIONS
from .spec import About, AlgoSpec

BOFT = AlgoSpec(
    "boft",
    keys=DIAG_OFT.keys,
    kinds=ROTATIONS,
    order=110,
    options=frozenset({"constraint", "rescaled"}),
    features=frozenset(),
    required=(frozenset({BLOCKS}),),
    axes=({BLOCKS: "SNBB"}, {RESCALE: "O"}),
    alpha_option=DIAG_OFT.alpha_option,
    near_one=DIAG_OFT.near_one,
    relative=True,
    about=About(
        papers=(("2311.06243", "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization"),),
        scale="1: a rotation has no strength. alpha in a file is the `constraint`",
        use=(
            "As diag-oft, where every output feature should meet every other: stages of small rotations do it "
            "with fewer values than one large block. A width must be an even block size up to dim, times a power "
            "of 2 (1280 = 10 x 128: dim 10 or more)."
        ),
    ),
)
