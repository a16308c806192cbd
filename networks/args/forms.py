"""Rows of the argument table that choose the form of an algorithm."""

from __future__ import annotations

from .spec import Arg

ALGOS = ("lora", "loha", "lokr", "dylora", "lora_fa", "glora", "tlora", "full", "norm", "diag-oft", "boft", "ia3")
ADDITIVE = ("lora", "loha", "lokr", "dylora", "lora_fa", "glora", "tlora")
FORM = "form of the factors"
# Entries whose defaults belong to their own algorithm: with another `algo=` they are as any entry. Their networks leave
# the text encoders alone.
OWN_STYLES = ("oft", "oft_flux")

FORMS: tuple[Arg, ...] = (
    Arg(
        "use_tucker",
        "bool",
        False,
        "Tucker form of convolutions with a kernel above 1x1: far fewer parameters",
        FORM,
        aliases=("use_cp", "use_conv_cp"),
        algos=("lora", "loha", "lokr", "lora_fa"),
    ),
    Arg(
        "use_dora",
        "bool",
        False,
        "DoRA (2402.09353): a learnt length for every row of the changed weight beside its direction; layers with "
        "dropout, rank_dropout or split_qkv stay plain",
        FORM,
        aliases=("dora", "dora_wd", "weight_decompose"),
        algos=ADDITIVE,
    ),
    Arg(
        "wd_on_output",
        "bool",
        True,
        "with use_dora: lengths of the output rows (exact in LyCORIS and PEFT); False: of the input columns (exact in "
        "ComfyUI, Forge, A1111, InvokeAI and LyCORIS)",
        FORM,
        algos=ADDITIVE,
    ),
    Arg(
        "split_qkv",
        "bool",
        False,
        "an adapter of its own for each projection of a fused layer (query, key, value, MLP); saved as one with a "
        "block-diagonal factor, at full strength in every reader; OFT as numbered tensors, for sd-scripts' oft_flux",
        FORM,
        algos=("lora", "loha", "dylora", "lora_fa", "diag-oft"),
        per_host=(("oft_flux", True),),
    ),
    Arg(
        "use_scalar",
        "bool",
        False,
        "a learnt factor in front of each update, from 0; the other factors then all start random",
        FORM,
        algos=("lora", "loha", "lokr", "lora_fa", "glora"),
    ),
    Arg(
        "init",
        "choice",
        "default",
        "start values: `default`; `orthogonal`: the random factors have orthonormal rows or columns, so that no two "
        "ranks start alike (not for loha and tlora); `pissa` (2404.02948): the principal part of each base weight, "
        "quantised ones too, which stays as it is: the start is subtracted, and files hold the difference with twice "
        "the dim (lora; lora_fa at its dim). The update starts at 0 in each",
        FORM,
        algos=ADDITIVE,
        choices=("default", "orthogonal", "pissa"),
    ),
    Arg(
        "init_seed",
        "int",
        None,
        "start values by this number and each layer's name alone, whichever and however many layers are trained; not "
        "given, the trainer's seed decides",
        FORM,
        algos=ADDITIVE,
        minimum=0,
    ),
    Arg(
        "factor",
        "int",
        -1,
        "upper bound of the smaller Kronecker factor; -1 splits next to the square root",
        FORM,
        algos=("lokr",),
        minimum=-1,
    ),
    Arg("decompose_both", "bool", False, "low rank for the smaller factor too", FORM, algos=("lokr",)),
    Arg(
        "full_matrix",
        "bool",
        False,
        "both factors whole, whatever the dim; the scale is then 1 and alpha has no effect",
        FORM,
        algos=("lokr",),
    ),
    Arg(
        "unbalanced_factorization",
        "bool",
        False,
        "swap the two factors of the output side",
        FORM,
        algos=("lokr",),
    ),
    Arg(
        "constraint",
        "float",
        0.0,
        "limit of a rotation: the norm of its generator over all blocks, in parts of the features that it turns; "
        "0 = none",
        FORM,
        aliases=("constrain",),
        algos=("diag-oft", "boft"),
        minimum=0,
        per_host=(("oft", "network_alpha"), ("oft_flux", "network_alpha")),
    ),
    Arg(
        "rescaled", "bool", False, "a learnt factor for every row after the rotation", FORM, algos=("diag-oft", "boft")
    ),
    Arg(
        "dim_is_count",
        "bool",
        False,
        "network_dim is the number of blocks (as in sd-scripts' oft) and not their largest size (as in LyCORIS); a "
        "layer whose width it does not divide gets the next smaller number that does",
        FORM,
        algos=("diag-oft",),
        per_host=(("oft", True), ("oft_flux", True)),
    ),
    Arg(
        "train_on_input",
        "bool",
        False,
        "act on the input features instead of the output's: the factors of IA3; the rotation of OFT, then as in OFT v2 "
        "(2506.19847). Quantised bases train either way without being decoded",
        FORM,
        algos=("ia3", "diag-oft"),
    ),
    Arg(
        "block_size",
        "int",
        1,
        "ranks that learn together; a file cut after any number of blocks, with the same alpha, is a good LoRA",
        FORM,
        aliases=("unit", "dyloRA"),
        algos=("dylora",),
        minimum=1,
        per_host=(("lycoris", 4),),
    ),
    Arg(
        "save_dims",
        "ints",
        (),
        "each save also writes files cut to these dims, `4,8`: name-0004.safetensors beside name.safetensors. "
        "scripts/resize.py cuts later. Trainers that remove old files do not know of these",
        FORM,
        algos=("dylora",),
        minimum=1,
    ),
    Arg(
        "sig_type",
        "choice",
        "principal",
        "T-LoRA starts from the first (`principal`), the `middle` or the `last` singular vectors",
        FORM,
        algos=("tlora",),
        choices=("principal", "last", "middle"),
    ),
    Arg(
        "use_data_init",
        "bool",
        True,
        "of the base weight; False: of a random matrix",
        FORM,
        algos=("tlora",),
    ),
    Arg(
        "min_rank",
        "int",
        1,
        "T-LoRA (2507.05964): ranks that act at the noisiest timestep; all of them act at the last one",
        FORM,
        aliases=("tlora_min_rank",),
        algos=("tlora",),
        minimum=1,
    ),
    Arg(
        "alpha_rank_scale",
        "float",
        1.0,
        "exponent of its schedule: ((T - t) / T)^x of the ranks above min_rank act at timestep t of T; 0: all "
        "ranks, always",
        FORM,
        aliases=("tlora_alpha", "tlora_alpha_rank_scale"),
        algos=("tlora",),
        minimum=0,
    ),
    Arg(
        "mask_group_id",
        "int",
        None,
        "networks of one number share the timestep, or the mask that `set_timestep_mask` sets; not given: each has its "
        "own",
        FORM,
        algos=("tlora",),
        neutral=(0,),
    ),
)
