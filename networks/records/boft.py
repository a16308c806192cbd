"""BOFT: a butterfly of rotations (2311.06243), so that every output feature meets every other in log2 steps."""

from __future__ import annotations

from .oft import BLOCKS, DIAG_OFT, RESCALE, ROTATIONS
from .spec import AlgoSpec

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
)
