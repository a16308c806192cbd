"""T-LoRA: from an orthogonal start, with fewer ranks the noisier the sample (2507.05964)."""

from __future__ import annotations

from dataclasses import replace

from .arg import FACTORS, NOTHING, VALUES, Arg
from .lora import LORA
from .spec import ALPHA_OVER_RANK, OF_WEIGHT, About

_OWN = dict.fromkeys(("orthogonal", *OF_WEIGHT), "it has start values of its own")
_OPTIONS = frozenset({"sig_type", "use_data_init", "mask_group_id", "min_rank", "alpha_rank_scale"})
# Another program's, which lack the start.
_KEYS = {"q": "q_layer.weight", "p": "p_layer.weight", "lam": "lambda_layer"}

TLORA = replace(
    LORA,
    name="tlora",
    order=70,
    saved_as=LORA.name,
    keys=_KEYS,
    bias_key="",
    required=(*LORA.required, frozenset(_KEYS.values())),
    kinds=(),  # of those keys; in its own files a layer is a LoRA
    axes=(*LORA.axes, {"q_layer.weight": "RI*", "p_layer.weight": "OR", "lambda_layer": "NR"}),
    rank_shows=(*LORA.rank_shows, ("q_layer.weight", 0)),
    options=_OPTIONS,
    unsaved=_OPTIONS,
    arguments=(
        Arg(
            "sig_type",
            "choice",
            "principal",
            "T-LoRA starts from the first (`principal`), the `middle` or the `last` singular vectors",
            FACTORS,
            choices=("principal", "last", "middle"),
            elsewhere=(("lycoris", "principal"),),
            file=VALUES,
            example=("sig_type=last", "use_data_init=False"),
        ),
        Arg(
            "use_data_init",
            "bool",
            True,
            "of the base weight; False: of a random matrix",
            FACTORS,
            elsewhere=(("lycoris", True),),
            file=VALUES,
            example=("use_data_init=False", "sig_type=last"),
        ),
        Arg(
            "min_rank",
            "int",
            1,
            "T-LoRA (2507.05964): ranks that act at the noisiest timestep; all of them act at the last one",
            FACTORS,
            aliases=("tlora_min_rank",),
            minimum=1,
            file=f"{NOTHING}; files have all ranks",
            example=("min_rank=4",),
        ),
        Arg(
            "alpha_rank_scale",
            "float",
            1.0,
            "exponent of its schedule: ((T - t) / T)^x of the ranks above min_rank act at timestep t of T; 0: all "
            "ranks, always",
            FACTORS,
            aliases=("tlora_alpha", "tlora_alpha_rank_scale"),
            minimum=0,
            file=f"{NOTHING}; files have all ranks",
            example=("alpha_rank_scale=2",),
        ),
        Arg(
            "mask_group_id",
            "int",
            None,
            "networks of one number share the timestep, or the mask that `set_timestep_mask` sets; not given: each has "
            "its own",
            FACTORS,
            neutral=(0,),
            file=NOTHING,
            example=("mask_group_id=1",),
        ),
    ),
    # A whole weight change has one mask, samples have many; in a stack of parts the ranks that belong together, and
    # those which a timestep masks, could not be told from the file.
    features=LORA.features - {"bypass_mode", "split_qkv"},
    no_starts=_OWN,
    elsewhere=tuple(
        (
            host,
            frozenset({"sig_type", "use_data_init"}),
            "starts from the principal part of each base weight, as in LyCORIS; the paper recommends sig_type=last "
            "use_data_init=False",
        )
        for host in ("sd_scripts", "musubi")
    ),
    plus=frozenset({"p"}),
    grows=frozenset({"p"}),  # see `grown` of its class
    timed=frozenset({"min_rank", "alpha_rank_scale", "mask_group_id"}),
    about=About(
        papers=(("2507.05964", "T-LoRA: Single Image Diffusion Model Customization Without Overfitting"),),
        scale=ALPHA_OVER_RANK,
        use=(
            "For one or few pictures of a subject: fewer ranks act where a sample is noisy, since the paper finds that "
            "these timesteps overfit first. It starts from singular vectors of the base weights. It needs a model "
            "whose record says how the timestep is told."
        ),
    ),
)
