"""Every network argument: one row each. Parser, errors, documentation and tests derive from this table."""

from __future__ import annotations

from .spec import Arg

ALGOS = ("lora", "loha", "lokr")
_RANK = "rank and strength"
_FORM = "form of the factors"
_DROP = "dropout"
_WHERE = "which layers"
_LR = "learning rates"
_OTHER = "other"

TABLE: tuple[Arg, ...] = (
    Arg(
        "algo",
        "choice",
        None,
        "the algorithm; every entry takes every algorithm, its own name is only the default",
        _FORM,
        choices=ALGOS,
    ),
    Arg(
        "conv_dim",
        "int",
        None,
        "dim of convolutions with a kernel above 1x1; given, the convolutional blocks join the trained layers "
        "(their Linear and 1x1 layers with network_dim)",
        _RANK,
        neutral=(0,),
        minimum=0,
    ),
    Arg("conv_alpha", "float", None, "alpha of those convolutions; 1 if only conv_dim is given", _RANK, minimum=0),
    Arg(
        "rs_lora",
        "bool",
        False,
        "scale by alpha / sqrt(dim) instead of alpha / dim (2312.03732); files still load right in plain alpha / rank "
        "readers",
        _RANK,
        aliases=("use_rslora",),
    ),
    Arg(
        "network_reg_dims",
        "regex_int",
        {},
        "dim by regular expression on the dotted layer name; the first match wins, 0 leaves the layer out",
        _RANK,
        minimum=0,
    ),
    Arg("network_reg_alphas", "regex_float", {}, "alpha by regular expression; the first match wins", _RANK, minimum=0),
    Arg(
        "use_tucker",
        "bool",
        False,
        "Tucker form of convolutions with a kernel above 1x1: far fewer parameters",
        _FORM,
        aliases=("use_cp", "use_conv_cp"),
    ),
    Arg(
        "use_scalar",
        "bool",
        False,
        "a learnt factor in front of each update, from 0; the other factors then all start random",
        _FORM,
    ),
    Arg(
        "factor",
        "int",
        -1,
        "upper bound of the smaller Kronecker factor; -1 splits next to the square root",
        _FORM,
        algos=("lokr",),
        minimum=-1,
    ),
    Arg("decompose_both", "bool", False, "low rank for the smaller factor too", _FORM, algos=("lokr",)),
    Arg(
        "full_matrix",
        "bool",
        False,
        "both factors whole, whatever the dim; the scale is then 1 and alpha has no effect",
        _FORM,
        algos=("lokr",),
    ),
    Arg(
        "unbalanced_factorization",
        "bool",
        False,
        "swap the two factors of the output side",
        _FORM,
        algos=("lokr",),
    ),
    Arg(
        "dropout",
        "float",
        0.0,
        "probability of dropping an element of the rank activation; --network_dropout sets it too",
        _DROP,
        aliases=("neuron_dropout",),
        minimum=0,
        below=1,
    ),
    Arg(
        "rank_dropout",
        "float",
        0.0,
        "probability of dropping a rank index, per sample; kept ones are divided by 1 - p",
        _DROP,
        minimum=0,
        below=1,
    ),
    Arg(
        "module_dropout",
        "float",
        0.0,
        "probability of leaving out a layer's whole update in a step",
        _DROP,
        minimum=0,
        below=1,
    ),
    Arg(
        "exclude_patterns",
        "patterns",
        (),
        "layers to leave out, by regular expression on the whole dotted name",
        _WHERE,
    ),
    Arg(
        "include_patterns",
        "patterns",
        (),
        "layers to keep although an exclude pattern (also a default one) matches",
        _WHERE,
    ),
    Arg("only_patterns", "patterns", (), "train only the layers that match one of these", _WHERE),
    Arg(
        "blocks",
        "blocks",
        None,
        "train only these blocks of the denoiser, `0-7,20-24`; SD has 25 and SDXL 23 of them",
        _WHERE,
    ),
    Arg(
        "network_reg_lrs",
        "regex_float",
        {},
        "learning rate by regular expression, in place of unet_lr and text_encoder_lr; the first match wins",
        _LR,
        minimum=0,
    ),
    Arg(
        "loraplus_lr_ratio",
        "float",
        None,
        "LoRA+ (2402.12354): learning rate of the plus factors (up, hada_w2_a, lokr_w1) over that of the others",
        _LR,
        neutral=(1,),
        minimum=0,
    ),
    Arg("loraplus_unet_lr_ratio", "float", None, "the same for the UNet alone", _LR, neutral=(1,), minimum=0),
    Arg(
        "loraplus_text_encoder_lr_ratio",
        "float",
        None,
        "the same for the text encoders alone",
        _LR,
        neutral=(1,),
        minimum=0,
    ),
    Arg("verbose", "bool", False, "log the whole plan at creation, one line per layer", _OTHER),
    Arg("allow_unknown", "bool", False, "log unknown arguments instead of stopping", _OTHER),
)

BY_NAME: dict[str, Arg] = {name: arg for arg in TABLE for name in arg.names}
