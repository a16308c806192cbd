"""Diagonal OFT: rotations of blocks of features (2306.07280), of the output, or the input as in OFT v2 (2506.19847)."""

from __future__ import annotations

from .arg import FACTORS, Arg
from .spec import NUMBER, About, AlgoSpec, FileKind

BLOCKS, RESCALE, CHANGE = "oft_blocks", "rescale", "rescale_change"
# Keys of the input side, see algos.oft_input.
FIELD, OWN = "oft_R.weight", "oft_R.turn"
PEFT = "oft_R.peft"  # FIELD in a file of PEFT, once it is known to be one
FORMS = (FIELD, PEFT, OWN)
TERMS = "oft_R.terms"  # k, 0 = C; also beside FIELD where alpha is a constraint, which no other program has there
SCALED = "oft_R.scaled_oft"  # G is divided by 2 sqrt(B - 1)
# Of the LTX-2 fork of musubi-tuner, whose alpha is the size of its blocks.
LIMITED, LIMIT = "oft_coft_metadata", "coft_eps_metadata"
BUFFERS = frozenset({LIMITED, LIMIT, "oft_block_size_metadata", "oft_block_share_metadata", "scaled_oft_metadata"})

ROTATIONS = (
    FileKind("rescaled rotation", frozenset({BLOCKS, RESCALE})),
    FileKind("constrained rotation", frozenset({BLOCKS}), constrained=True),
    FileKind("rotation", frozenset({BLOCKS})),
)


DIAG_OFT = AlgoSpec(
    "diag-oft",
    keys={"blocks": BLOCKS, CHANGE: RESCALE},
    kinds=(*ROTATIONS, *(FileKind("rotation of the input", frozenset({key})) for key in FORMS)),
    order=100,
    options=frozenset({"constraint", "rescaled", "dim_is_count", "train_on_input", "dim_is_size", "block_share"}),
    arguments=(
        Arg(
            "constraint",
            "float",
            0.0,
            "limit of a rotation: the norm of its generator over all blocks, in parts of the features that it turns; "
            "0 = none",
            FACTORS,
            aliases=("constrain",),
            minimum=0,
            per_host=(("oft", "network_alpha"), ("oft_flux", "network_alpha")),
            joined=("lycoris",),
            file="alpha is the limit",
            example=("constraint=1e-3",),
        ),
        Arg(
            "rescaled",
            "bool",
            False,
            "a learnt factor for every row after the rotation",
            FACTORS,
            per_host=(("boft", True),),
            file="`rescale` (boft-input: `boft_s`) beside the blocks",
        ),
        Arg(
            "dim_is_count",
            "bool",
            False,
            "network_dim is the number of blocks (as in sd-scripts' oft) and not their largest size (as in LyCORIS); a "
            "layer whose width it does not divide gets the next smaller number that does",
            FACTORS,
            per_host=(("oft", True), ("oft_flux", True)),
            file="the shape of `oft_blocks`",
        ),
        Arg(
            "train_on_input",
            "bool",
            False,
            "act on the input features instead of the output's: the factors of IA3; the rotation of OFT, then as in "
            "OFT v2 (2506.19847). Quantised bases train either way without being decoded",
            FACTORS,
            per_host=(("oft_v2", True),),
            elsewhere=(("lycoris", False),),
            file="OFT: `oft_R.weight` in place of `oft_blocks`; IA3: `on_input` is 1, `weight` as long as the input",
        ),
        Arg(
            "dim_is_size",
            "bool",
            False,
            "with train_on_input, network_dim is the size of a block of columns, channels times positions of a kernel "
            "(as in sd-scripts' oft_v2); a width which it does not divide gets the nearest size that does",
            FACTORS,
            per_host=(("oft_v2", True),),
            file="the shape of `oft_R.weight`",
            example=("dim_is_size=True", "train_on_input=True"),
        ),
        Arg(
            "block_share",
            "bool",
            False,
            "with train_on_input, one block for all of a layer",
            FACTORS,
            aliases=("oft_block_share",),
            file="`oft_R.weight` has one block",
            example=("block_share=True", "train_on_input=True"),
        ),
    ),
    features=frozenset({"split_qkv"}),
    required=tuple(frozenset({suffix}) for suffix in (BLOCKS, f"{BLOCKS}.0", *FORMS)),
    more_keys=frozenset({*FORMS, TERMS, SCALED}) | BUFFERS,
    numbered=frozenset({BLOCKS}),
    axes=(
        {BLOCKS: "NBB"},
        {RESCALE: "O"},
        *({key: "Nt"} for key in FORMS),  # a block of one feature has nothing above its diagonal
        *({key: NUMBER} for key in (TERMS, SCALED, *sorted(BUFFERS))),
    ),
    alpha_option="constraint",
    near_one=frozenset({CHANGE}),
    peft_type="OFT",
    peft_keys={FIELD: PEFT, "oft_R.default.weight": PEFT},
    relative=True,
    own_entries=("oft", "oft_flux", "oft_v2"),
    unet_entries=("oft", "oft_flux"),
    about=About(
        papers=(
            ("2306.07280", "Controlling Text-to-Image Diffusion by Orthogonal Finetuning"),
            ("2506.19847", "Orthogonal Finetuning Made Scalable"),
        ),
        scale="1: a rotation has no strength. alpha in a file is the `constraint`",
        use=(
            "Rotates blocks of features, so that lengths and angles within a block of the weight stay: the model "
            "changes without growing stronger, which the paper finds to keep what it knows. dim is the size of a "
            "block. `train_on_input=True` is OFT v2, on the side on which sd-scripts' `networks.oft_v2`, OneTrainer "
            "and PEFT rotate."
        ),
    ),
)
