"""Diagonal OFT: rotations of blocks of features (2306.07280), of the output, or the input as in OFT v2 (2506.19847)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arg import FACTORS, Arg
from .spec import AlgoSpec, FileKind, Reads

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

_ROTATION = Reads(comfyui="strength 1", a1111="yes", forge="no", diffusers="refused", peft="no", invokeai="refused")
_LIMITED = Reads(comfyui="wrong", a1111="yes", forge="no", diffusers="refused", peft="no", invokeai="refused")
_NOBODY = Reads(comfyui="no", a1111="no", forge="no", diffusers="no", peft="no", invokeai="no")
ROTATIONS = (
    FileKind("rescaled rotation", frozenset({BLOCKS, RESCALE}), _LIMITED),
    FileKind("constrained rotation", frozenset({BLOCKS}), _LIMITED, constrained=True),
    FileKind("rotation", frozenset({BLOCKS}), _ROTATION),
)


def rotation_note(algo: str, options: Mapping[str, Any], proportional: bool) -> str:
    """Who reads a rotation of the output side.

    Args:
        proportional: whether LyCORIS takes it in proportion to the strength.
    """
    own = [name for name in ("constraint", "rescaled") if options.get(name)]
    comfy = f"ComfyUI ignores its {' and '.join(own)}" if own else "ComfyUI does at strength 1"
    lycoris = "" if proportional and not options.get("rescaled") else ", LyCORIS at strength 1 alone"
    return f"{algo} files: LyCORIS and A1111 read them exactly{lycoris}; {comfy}; Forge and diffusers read none"


def _note(options: Mapping[str, Any]) -> str:
    if options.get("split_qkv"):
        return "OFT of split projections: sd-scripts' oft_flux alone reads it, from files of save_format=oft_flux"
    if not options.get("train_on_input"):
        return rotation_note("diag-oft", options, proportional=True)
    if options.get("kernel"):
        return (
            "OFT on the input side of convolutions with a kernel: other programs turn it alike where dim is small; "
            "where their form would take more room than the weight it is saved for this package alone (oft_R.turn)"
        )
    return (
        "OFT on the input side: sd-scripts' networks.oft_v2 (SD 1.x, 2.x, SDXL) and OneTrainer turn its files "
        "(oft_R.weight) alike; ComfyUI, A1111, Forge and diffusers read none: merge it into the base model for them"
    )


DIAG_OFT = AlgoSpec(
    "diag-oft",
    keys={"blocks": BLOCKS, CHANGE: RESCALE},
    kinds=(*ROTATIONS, *(FileKind("rotation of the input", frozenset({key}), _NOBODY) for key in FORMS)),
    order=100,
    options=frozenset({"constraint", "rescaled", "dim_is_count", "train_on_input"}),
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
        ),
        Arg("rescaled", "bool", False, "a learnt factor for every row after the rotation", FACTORS),
        Arg(
            "dim_is_count",
            "bool",
            False,
            "network_dim is the number of blocks (as in sd-scripts' oft) and not their largest size (as in LyCORIS); a "
            "layer whose width it does not divide gets the next smaller number that does",
            FACTORS,
            per_host=(("oft", True), ("oft_flux", True)),
        ),
        Arg(
            "train_on_input",
            "bool",
            False,
            "act on the input features instead of the output's: the factors of IA3; the rotation of OFT, then as in "
            "OFT v2 (2506.19847). Quantised bases train either way without being decoded",
            FACTORS,
        ),
    ),
    features=frozenset({"split_qkv"}),
    required=tuple(frozenset({suffix}) for suffix in (BLOCKS, f"{BLOCKS}.0", *FORMS)),
    more_keys=frozenset({*FORMS, TERMS, SCALED}) | BUFFERS,
    numbered=frozenset({BLOCKS}),
    alpha_option="constraint",
    near_one=frozenset({CHANGE}),
    peft_type="OFT",
    peft_keys={FIELD: PEFT, "oft_R.default.weight": PEFT},
    note=_note,
    relative=True,
    own_entries=("oft", "oft_flux"),
)
