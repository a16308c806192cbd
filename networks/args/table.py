"""Every network argument: one row each. Parser, errors, documentation and tests derive from this table.

Rows of an argument which one algorithm brought stand in its record (`records`); which algorithms take an argument,
their records say, too.
"""

from __future__ import annotations

from dataclasses import replace

from ..records import ALGORITHMS, Arg
from ..records.arg import FACTORS, NOTHING, VALUES
from ..records.spec import OF_WEIGHT
from .coerce import Rates

_RANK = "rank and strength"
_DROP = "dropout"
_WHERE = "which layers"
_LR = "learning rates"
_KIND = "layers by kind, where an architecture has them"
_OTHER = "other"
STANDS_FOR = {"lycoris": "lycoris.kohya"}  # entry -> the module of another package that it takes the place of
SHOWN = (_RANK, _WHERE, _KIND)  # groups of arguments whose effect the tensors of a file show
# What arguments of a group change in the saved file, where their row does not say it.
FILES = {
    _RANK: "the rank of these layers",
    _DROP: VALUES,
    _WHERE: "which layers it has",
    _LR: VALUES,
    _KIND: "which layers it has, and their rank",
}
_PLUS = ", ".join(dict.fromkeys(key.removesuffix(".weight") for spec in ALGORITHMS.values() for key in spec.plus_keys))
_STARTS = [spec for spec in ALGORITHMS.values() if "init" in spec.features]
_NOT_ORTHOGONAL = " and ".join(spec.name for spec in _STARTS if "orthogonal" in spec.no_starts)
_NO_PLUS = ", ".join(spec.name for spec in ALGORITHMS.values() if not spec.plus)


def _pissa(keeps_start: bool) -> str:
    able = [spec for spec in _STARTS if "pissa" not in spec.no_starts]
    return ", ".join(spec.name for spec in able if spec.keeps_start == keeps_start)


# Arguments that speak of one kind of layer, with what it is; rows of the table are made of them.
LAYER_DIMS = {
    "img_attn_dim": "the image attention in double blocks",
    "txt_attn_dim": "the text attention in double blocks",
    "img_mlp_dim": "the image MLP in double blocks",
    "txt_mlp_dim": "the text MLP in double blocks",
    "img_mod_dim": "the image modulation in double blocks",
    "txt_mod_dim": "the text modulation in double blocks",
    "single_dim": "linear1 and linear2 in single blocks",
    "single_mod_dim": "the modulation in single blocks",
    "context_attn_dim": "the context attention",
    "context_mlp_dim": "the context MLP",
    "context_mod_dim": "the context modulation",
    "x_attn_dim": "the image attention, both of them",
    "x_mlp_dim": "the image MLP",
    "x_mod_dim": "the image modulation",
    "refiner_dim": "the two refiners",
    "attn_dim": "the attention",
    "mlp_dim": "the feed-forward layers",
    "mod_dim": "the modulation",
    "cross_modal_dim": "the attention between video and audio",
    "audio_dim": "the layers with audio, and of that attention, too, where cross_modal_dim is not given",
}
LAYER_ALPHAS = {name.replace("_dim", "_alpha"): LAYER_DIMS[name] for name in ("cross_modal_dim", "audio_dim")}
TARGET_PRESETS = (
    "t2v", "v2v", "video_sa", "video_sa_ff", "video_sa_ca_ff", "audio", "audio_v2a", "audio_ref_ic", "full",
)  # fmt: skip
DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
EXTRA_DIMS = {  # one number for each of these
    "in_dims": "img_in, time_in, vector_in, guidance_in, txt_in",
    "emb_dims": "context, t, x and y embedder, modulation and linear of the final layer",
    "embedder_dims": "x, t and caption embedder",
}
_EXTRA_EXAMPLES = {"in_dims": "4,4,4,4,4", "emb_dims": "4,4,4,4,4,4", "embedder_dims": "4,4,4"}
BLOCK_INDICES = {
    "train_double_block_indices": "double blocks",
    "train_single_block_indices": "single blocks, counted from 0",
    "train_block_indices": "joint blocks",
}

_ROWS: tuple[Arg, ...] = (
    Arg(
        "algo",
        "choice",
        None,
        "the algorithm; every entry takes every algorithm, its own name is only the default",
        FACTORS,
        choices=tuple(ALGORITHMS),
        words=(("locon", "lora"),),
        file="the names and shapes of all tensors, see algorithms.md",
        example=("algo=loha",),
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
        per_host=(("musubi", "network_dim"), ("preset", "network_dim")),
        file="convolutional layers, of this rank",
        example=("conv_dim=4",),
    ),
    Arg(
        "conv_alpha",
        "float",
        None,
        "alpha of those convolutions",
        _RANK,
        minimum=0,
        per_host=(
            ("sd_scripts", 1.0),
            ("musubi", "network_alpha"),
            ("api", "network_alpha"),
            ("preset", "network_alpha"),
        ),  # fmt: skip
        file="alpha of convolutions above 1x1",
        example=("conv_alpha=4", "conv_dim=4"),
    ),
    Arg(
        "rs_lora",
        "bool",
        False,
        "scale by alpha / sqrt(dim) instead of alpha / dim (2312.03732); files still load right in plain alpha / rank "
        "readers",
        _RANK,
        aliases=("use_rslora",),
        file="alpha: it is scale x rank, so alpha x sqrt(rank) here",
    ),
    Arg(
        "network_reg_dims",
        "regex_int",
        {},
        "dim by regular expression on the dotted layer name; the first match wins, 0 leaves the layer out",
        _RANK,
        minimum=0,
        example=("network_reg_dims={'.*attn2.*': 16}",),
    ),
    Arg(
        "network_reg_alphas",
        "regex_float",
        {},
        "alpha by regular expression; the first match wins",
        _RANK,
        minimum=0,
        file="alpha of these layers",
        example=("network_reg_alphas={'.*attn2.*': 8}",),
    ),
    Arg(
        "use_tucker",
        "bool",
        False,
        "Tucker form of convolutions with a kernel above 1x1: far fewer parameters",
        FACTORS,
        aliases=("use_cp", "use_conv_cp"),
        joined=("lycoris",),
        file="convolutions above 1x1 get a core: `lora_mid.weight`, `hada_t1` and `hada_t2`, or `lokr_t2`",
        example=("use_tucker=True", "conv_dim=4"),
    ),
    Arg(
        "use_dora",
        "bool",
        False,
        "DoRA (2402.09353): a learnt length for every row of the changed weight beside its direction; layers with "
        "dropout, rank_dropout or split_qkv stay plain",
        FACTORS,
        aliases=("dora", "dora_wd", "weight_decompose"),
        file="`dora_scale` in each layer, in fp32 always",
    ),
    Arg(
        "wd_on_output",
        "bool",
        True,
        "with use_dora: lengths of the output rows (exact in LyCORIS and PEFT); False: of the input columns (exact in "
        "ComfyUI, Forge, A1111, InvokeAI and LyCORIS)",
        FACTORS,
        file="the shape of `dora_scale`: one length for each output row, or each input column",
        example=("wd_on_output=False", "use_dora=True"),
    ),
    Arg(
        "split_qkv",
        "bool",
        False,
        "an adapter of its own for each projection of a fused layer (query, key, value, MLP); saved as one with a "
        "block-diagonal factor, at full strength in every reader; OFT as numbered tensors, for sd-scripts' oft_flux",
        FACTORS,
        per_host=(("oft_flux", True),),
        file="fused layers: the rank is that of all projections together, `lora_up` is block-diagonal; OFT: "
        "`oft_blocks.0` and so on",
    ),
    Arg(
        "use_scalar",
        "bool",
        False,
        "a learnt factor in front of each update, from 0; the other factors then all start random",
        FACTORS,
        file=f"{NOTHING}; the factor is multiplied into another one",
    ),
    Arg(
        "init",
        "choice",
        "default",
        "start values: `default`; `orthogonal`: the random factors have orthonormal rows or columns, so that no two "
        f"ranks start alike (not for {_NOT_ORTHOGONAL}); `pissa` (2404.02948): the principal part of each base "
        "weight, quantised ones too, which stays as it is: the start is subtracted, and files hold the difference with "
        f"twice the dim ({_pissa(keeps_start=True)}; {_pissa(keeps_start=False)} at its dim); `milora` (2406.09044): "
        "the same with its smallest singular values, so that what is trained hardly touches what the model does most. "
        "The update starts at 0 in each",
        FACTORS,
        choices=("default", "orthogonal", *OF_WEIGHT),
        words=(("urae", "milora"),),
        file="with `pissa` and `milora`: twice the rank of a LoRA, and `networks_init` in the metadata",
        example=("init=pissa",),
    ),
    Arg(
        "init_seed",
        "int",
        None,
        "start values by this number and each layer's name alone, whichever and however many layers are trained; not "
        "given, the trainer's seed decides",
        FACTORS,
        minimum=0,
        file=VALUES,
        example=("init_seed=7",),
    ),
    *(arg for spec in ALGORITHMS.values() for arg in spec.arguments),
    Arg(
        "dropout",
        "float",
        0.0,
        "probability of dropping an element of the rank activation; --network_dropout sets it too",
        _DROP,
        aliases=("neuron_dropout",),
        minimum=0,
        below=1,
        example=("dropout=0.1",),
    ),
    Arg(
        "rank_dropout",
        "float",
        0.0,
        "probability of dropping a rank index, per sample; kept ones are divided by 1 - p. LyCORIS itself drops output "
        "rows of the update, one choice for the whole batch (rank indices with bypass_mode=True alone)",
        _DROP,
        minimum=0,
        below=1,
        example=("rank_dropout=0.1",),
    ),
    Arg(
        "rank_dropout_scale",
        "bool",
        True,
        "whether the values that rank_dropout keeps are divided by 1 - p, so that the update keeps its mean; False: "
        "they stay as they are, and training sees an update weaker by 1 - p than the saved one",
        _DROP,
        per_host=(("lycoris", False),),
        elsewhere=(("lycoris", False),),
        example=("rank_dropout_scale=False", "rank_dropout=0.1"),
    ),
    Arg(
        "module_dropout",
        "float",
        0.0,
        "probability of leaving out a layer's whole update in a step",
        _DROP,
        minimum=0,
        below=1,
        example=("module_dropout=0.1",),
    ),
    *(
        Arg(
            f"network_reg_{name}s",
            "regex_float",
            {},
            f"{name} by regular expression on the dotted layer name; the first match wins, others have {name}",
            _DROP,
            minimum=0,
            below=1,
            example=(f"network_reg_{name}s={{'.*attn2.*': 0.1}}",),
        )
        for name in DROPOUTS
    ),
    Arg(
        "preset",
        "text",
        "",
        "which layers are trained, and with what: the name of a preset or a TOML file in LyCORIS' schema",
        _WHERE,
        per_host=(("lycoris", "full"),),
        file="which layers, and what of them",
        example=("preset=attn-only",),
    ),
    Arg(
        "train_norm",
        "choice",
        "false",
        "train the normalisation layers (LayerNorm, GroupNorm, RMSNorm), too: a change of weight and bias; `affine`: "
        "only those that have a weight, as no other can be merged, or loaded by other programs",
        _WHERE,
        choices=("true", "false", "affine"),
        words=(("1", "true"), ("yes", "true"), ("on", "true"), ("0", "false"), ("no", "false"), ("off", "false")),
        file="`w_norm` and `b_norm` of normalisation layers",
        example=("train_norm=True",),
    ),
    Arg(
        "exclude_patterns",
        "patterns",
        (),
        "layers to leave out, by regular expression on the whole dotted name",
        _WHERE,
        example=("exclude_patterns=['.*attn2[.]to_out.*', '.*[.]ff[.].*']",),
    ),
    Arg(
        "include_patterns",
        "patterns",
        (),
        "layers to keep although an exclude pattern (also a default one) matches",
        _WHERE,
        example=("include_patterns=['.*attn2[.]to_k']", "exclude_patterns=['.*attn2.*']"),
    ),
    Arg(
        "only_patterns",
        "patterns",
        (),
        "train only the layers that match one of these",
        _WHERE,
        example=("only_patterns=['.*attn2.*']",),
    ),
    Arg(
        "exclude_mod",
        "bool",
        None,
        "whether the modulation layers are left out; not given, it is as in the trainer",
        _WHERE,
        neutral=(True,),
        example=("exclude_mod=False",),
    ),
    Arg(
        "train_mlp",
        "bool",
        None,
        "whether the MLPs are trained beside the attention",
        _WHERE,
        neutral=(False,),
        example=("train_mlp=True",),
    ),
    Arg(
        "enable_all_linear",
        "bool",
        None,
        "False: only the attention of the transformer blocks is trained (where there are double and single ones, of "
        "the double ones); True: all that any entry trains",
        _WHERE,
        neutral=(True,),
        per_host=(("oft", False), ("oft_flux", False)),
        example=("enable_all_linear=False",),
    ),
    Arg(
        "enable_conv",
        "bool",
        None,
        "True: as conv_dim=network_dim, where no conv_dim is given",
        _WHERE,
        neutral=(False,),
        file="convolutional layers, of rank network_dim",
        example=("enable_conv=True",),
    ),
    Arg(
        "include_refiner",
        "bool",
        None,
        "whether the refiners, blocks beside the others, are trained, too",
        _WHERE,
        neutral=(False,),
        example=("include_refiner=True",),
    ),
    Arg(
        "blocks",
        "blocks",
        None,
        "train only these blocks of the denoiser, `0-7,20-24`, with the numbers that the table of models has",
        _WHERE,
        example=("blocks=4-8,13-18",),
    ),
    Arg(
        "network_reg_lrs",
        "regex_float",
        {},
        "learning rate by regular expression, in place of unet_lr and text_encoder_lr; the first match wins",
        _LR,
        minimum=0,
        example=("network_reg_lrs={'.*attn2.*': 5e-5}",),
    ),
    Arg(
        "loraplus_lr_ratio",
        "float",
        None,
        f"LoRA+ (2402.12354): learning rate of the plus factors ({_PLUS}) over that of the others; {_NO_PLUS} have no "
        "such pair and refuse it, beside others they are counted and stay at the one rate",
        _LR,
        neutral=(1,),
        minimum=0,
        example=("loraplus_lr_ratio=16",),
    ),
    Arg(
        "loraplus_mode",
        "choice",
        "lr",
        "how the ratio acts: `lr` by learning rates of their own; `reparam` with one learning rate, as a number in "
        "front of the plus factors, multiplied out in files: the same under Adam, AdamW, Lion and their like, and the "
        "way for Prodigy and D-Adaptation, which take one rate. Under SGD it acts as its square; Adafactor with "
        "scale_parameter cancels it; decoupled weight decay follows the one rate",
        _LR,
        choices=("lr", "reparam"),
        example=("loraplus_mode=reparam", "loraplus_lr_ratio=16"),
    ),
    Arg(
        "loraplus_unet_lr_ratio",
        "float",
        None,
        "the same for the UNet alone",
        _LR,
        neutral=(1,),
        minimum=0,
        example=("loraplus_unet_lr_ratio=16",),
    ),
    Arg(
        "loraplus_text_encoder_lr_ratio",
        "float",
        None,
        "the same for the text encoders alone",
        _LR,
        neutral=(1,),
        minimum=0,
        example=("loraplus_text_encoder_lr_ratio=4",),
    ),
    Arg(
        "dora_lr_ratio",
        "float",
        None,
        "with use_dora: learning rate of the magnitudes over that of their layer, as unet_lr, text_encoder_lr, "
        "network_reg_lrs and the blocks' factors have it; LoRA+ is for the factors alone. 0: the magnitudes stay",
        _LR,
        neutral=(1,),
        minimum=0,
        example=("dora_lr_ratio=10", "use_dora=True"),
    ),
    Arg(
        "block_dims",
        "ints",
        (),
        "dim of each block of the denoiser in place of network_dim, one number for every block, counted as `blocks` "
        "does; 0 leaves a block out",
        _RANK,
        minimum=0,
        example=("block_dims=2,2,2,2,2,2,2,2,2,2,4,4,4,2,2,2,2,2,2,2,2,2,2",),
    ),
    Arg(
        "block_alphas",
        "floats",
        (),
        "alpha of each block, with block_dims; an empty item means network_alpha",
        _RANK,
        minimum=0,
        file="alpha of these layers",
        example=(
            "block_alphas=1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
            "block_dims=2,2,2,2,2,2,2,2,2,2,4,4,4,2,2,2,2,2,2,2,2,2,2",
        ),
    ),
    Arg(
        "conv_block_dims",
        "ints",
        (),
        "dim of each block's convolutions with a kernel above 1x1, with block_dims",
        _RANK,
        minimum=0,
        example=(
            "conv_block_dims=2,2,2,2,2,2,2,2,2,2,4,4,4,2,2,2,2,2,2,2,2,2,2",
            "block_dims=2,2,2,2,2,2,2,2,2,2,4,4,4,2,2,2,2,2,2,2,2,2,2",
        ),
    ),
    Arg(
        "conv_block_alphas",
        "floats",
        (),
        "alpha of each block's convolutions, with conv_block_dims; an empty item means conv_alpha",
        _RANK,
        minimum=0,
        file="alpha of these layers",
        example=(
            "conv_block_alphas=2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2",
            "conv_block_dims=2,2,2,2,2,2,2,2,2,2,4,4,4,2,2,2,2,2,2,2,2,2,2",
            "block_dims=2,2,2,2,2,2,2,2,2,2,4,4,4,2,2,2,2,2,2,2,2,2,2",
        ),
    ),
    *(
        Arg(
            name,
            "int",
            None,
            f"dim of {what}, in place of network_dim; 0 leaves them out",
            _KIND,
            minimum=0,
            example=(f"{name}=4",),
        )
        for name, what in LAYER_DIMS.items()
    ),
    *(
        Arg(
            name,
            "ints",
            (),
            f"dims of layers outside the blocks: {what}; 0 = not trained",
            _KIND,
            minimum=0,
            example=(f"{name}={_EXTRA_EXAMPLES[name]}",),
        )
        for name, what in EXTRA_DIMS.items()
    ),
    Arg(
        "train_blocks",
        "word",
        "all",
        "which kind of blocks to train; `all` is one everywhere",
        _KIND,
        file=FILES[_WHERE],
        example=("train_blocks=double",),
    ),
    *(
        Arg(
            name,
            "blocks",
            None,
            f"train only these {what}; `all` or `none` are words, too",
            _KIND,
            file=FILES[_WHERE],
            example=(f"{name}=0-7,11",),
        )
        for name, what in BLOCK_INDICES.items()
    ),
    Arg("train_t5xxl", "bool", False, "train the T5 text encoder too", _KIND, file="the layers of that part"),
    Arg(
        "train_llm_adapter",
        "bool",
        False,
        "train the adapter behind the text encoder too",
        _KIND,
        file="the layers of that part",
    ),
    Arg(
        "lora_target_preset",
        "choice",
        None,
        "which kinds of layers to train; include_patterns, where they are given, are these layers instead; a preset "
        "says it without this argument, too",
        _KIND,
        neutral=("t2v",),
        choices=TARGET_PRESETS,
        words=(("lycoris", "t2v"), ("av_ic", "v2v"), ("video_ref_only_av", "v2v")),
        file=FILES[_WHERE],
        example=("lora_target_preset=v2v",),
    ),
    Arg(
        "connector_lora",
        "bool",
        False,
        "train the connectors behind the text encoder too",
        _KIND,
        file="the layers of that part",
        aliases=("train_connectors",),
    ),
    *(
        Arg(
            name,
            "float",
            None,
            f"alpha of {what}, in place of network_alpha",
            _KIND,
            minimum=0,
            file="alpha of these layers",
            example=(f"{name}=2", f"{name.replace('_alpha', '_dim')}=8"),
        )
        for name, what in LAYER_ALPHAS.items()
    ),
    Arg(
        "down_lr_weight",
        "rates",
        Rates(),
        "factor on the learning rate of each block on the way down, shallow to deep; or a "
        "curve: sine, cosine, linear, reverse_linear, zeros, with +x added; 0 leaves a block out",
        _LR,
        minimum=0,
        example=("down_lr_weight=cosine+0.25",),
    ),
    Arg(
        "mid_lr_weight", "rates", Rates(), "the same for the middle", _LR, minimum=0, example=("mid_lr_weight=1,0.5,1",)
    ),
    Arg(
        "up_lr_weight",
        "rates",
        Rates(),
        "the same on the way up, deep to shallow",
        _LR,
        minimum=0,
        example=("up_lr_weight=reverse_linear+0.25",),
    ),
    Arg(
        "block_lr_zero_threshold",
        "float",
        0.0,
        "factors of those lists up to this value count as 0",
        _LR,
        minimum=0,
        file="layers of blocks whose factor counts as 0 are not there",
        example=("block_lr_zero_threshold=0.1", "down_lr_weight=linear"),
    ),
    Arg(
        "ggpo_sigma",
        "float",
        None,
        "GGPO: noise on the weight in training, in proportion to the rows of the changed weight; with ggpo_beta",
        _OTHER,
        minimum=0,
        file=NOTHING,
        example=("ggpo_sigma=0.03", "ggpo_beta=0.01"),
    ),
    Arg(
        "ggpo_beta",
        "float",
        None,
        "GGPO: the same in proportion to the square of the update's gradient; with ggpo_sigma",
        _OTHER,
        minimum=0,
        file=NOTHING,
        example=("ggpo_beta=0.01", "ggpo_sigma=0.03"),
    ),
    Arg(
        "training_adapter",
        "files",
        (),
        "adapter files (those that undo a distillation, say) which act in training beside what is trained, at the "
        "strength that is given or 1: off in sample images, never in the files; `FILE=0.5`, `FILE:0.5` where a trainer "
        "takes one `=` alone, `FILE,FILE`, or `{'FILE': 0.5}` (there with / in a path, on Windows, too)",
        _OTHER,
        file=f"{NOTHING}; its name and checksum are in the metadata",
        example=("training_adapter=undo.safetensors=0.5",),
    ),
    Arg(
        "save_format",
        "choice",
        "portable",
        "how files are written: `portable` for every reader of alpha / rank; `comfyui`: with the names and forms that "
        "ComfyUI reads of every layer, and the magnitudes of use_dora multiplied by the norm of the base weight over "
        "that of the changed one, so that its formula gives what was trained; `diffusers` for its `load_lora_weights`: "
        "LoRA, DoRA and what is a LoRA of few ranks, under the names of PEFT and of diffusers' models, the scale in "
        "the second factor; `peft`: the folder NAME-peft for `PeftModel.from_pretrained` beside the file NAME, which "
        "stays portable, since trainers remove and upload files; `blissful` as DustyL's blissful-tuner "
        "does, for LoRA: alpha as given under RS-LoRA, `use_rslora_flag`, `use_dora_flag`, `dora_layer.weight`, and "
        "its errors and warnings when a file contradicts the arguments; "
        "`oft` and `oft_flux` as those modules of sd-scripts do (`oft_unet_...`). Each is read "
        "back, whatever this says",
        _OTHER,
        choices=("portable", "blissful", "comfyui", "diffusers", "peft", "oft", "oft_flux"),
        per_host=(("oft", "oft"), ("oft_flux", "oft_flux")),
        file="names and forms of the tensors, see files.md",
        example=("save_format=comfyui",),
    ),
    Arg(
        "save_also",
        "choices",
        ("auto",),
        "further files at each save, `comfyui,diffusers,peft`: NAME-comfyui.safetensors and so on, in those forms "
        "of save_format. `auto`: the one for ComfyUI on architectures of which it misses layers under the trainers' "
        "names, unless a save_format is given; `none`: no further files. They go when the trainer has removed NAME",
        _OTHER,
        neutral=(("none",),),
        choices=("auto", "none", "portable", "comfyui", "diffusers", "peft"),
        file=f"{NOTHING}; NAME stays; further files beside it",
        example=("save_also=comfyui,diffusers",),
    ),
    Arg(
        "ema_decay",
        "float",
        0.0,
        "keep an exponential moving average of what is trained, with this decay in each optimizer step (0.99 for short "
        "runs, 0.999, 0.9999 for long ones; less in the first steps): samples and files have the average in place of "
        "the newest values, states have both; 0 = none",
        _OTHER,
        minimum=0,
        below=1,
        file=VALUES,
        example=("ema_decay=0.999",),
    ),
    Arg(
        "ema_save",
        "choice",
        "only",
        "with ema_decay: files NAME hold the average (`only`), or the newest values with the average in "
        "NAME-ema.safetensors beside them (`also`), samples are drawn with the average; `off`: files and samples have "
        "the newest values, the average is in the states alone",
        _OTHER,
        choices=("only", "also", "off"),
        file=f"{VALUES} of NAME; with `also` NAME-ema.safetensors beside it",
        example=("ema_save=also", "ema_decay=0.999"),
    ),
    Arg(
        "ema_device",
        "choice",
        "adapter",
        "with ema_decay: where the average is kept, `adapter` = where the adapter is, or `cpu`, which saves 4 bytes "
        "a value there and costs a transfer in each step",
        _OTHER,
        choices=("adapter", "cpu"),
        file=NOTHING,
        example=("ema_device=cpu", "ema_decay=0.999"),
    ),
    Arg(
        "diagnose_steps",
        "int",
        100,
        "after so many optimizer steps, and at each save, name the layers without gradient, at their start values "
        "still, or not finite (that after the first step, too), and kinds of values that moved in none; 0 = do not "
        "watch",
        _OTHER,
        minimum=0,
        file=f"{NOTHING}; what it finds is in the metadata as `networks_health`",
        example=("diagnose_steps=20",),
    ),
    Arg(
        "bypass_mode",
        "bool",
        None,
        "True: updates act in their factored form, on every layer that has one; False: through the whole weight "
        "change; not given: whichever is cheaper. The same numbers either way, also with use_dora and on "
        "quantised layers",
        _OTHER,
        unasked=(("lycoris", False),),
        file=NOTHING,
        example=("bypass_mode=True",),
    ),
    Arg(
        "allow_missing",
        "bool",
        False,
        "go on although a whole part, a whole kind of layers or more than a tenth of the layers of a loaded file have "
        "no place in this network",
        _OTHER,
        file=NOTHING,
    ),
    Arg(
        "resume_resize",
        "bool",
        False,
        "layers of --network_weights with other dims than this network's are grown or made smaller as they are loaded: "
        "with more ranks the update stays and the new ones begin at their start, with fewer it is the nearest one, and "
        "the log says how near. States of a trainer (--resume) are not resized",
        _OTHER,
        file=NOTHING,
    ),
    Arg(
        "adapter_dtype",
        "choice",
        "host",
        "dtype of what is trained: `host`: as the trainer casts it (--full_bf16, --full_fp16), else fp32; `fp32`: kept "
        "in fp32 whatever the trainer casts, so that small steps are not rounded away (4 bytes a value instead of 2)",
        _OTHER,
        choices=("host", "fp32"),
        words=(("float32", "fp32"), ("float", "fp32")),
        file=f"{NOTHING}; --save_precision says in which dtype it is",
        example=("adapter_dtype=fp32",),
    ),
    Arg("verbose", "bool", False, "log the whole plan, one line per layer", _OTHER, file=NOTHING),
    Arg("allow_unknown", "bool", False, "log unknown arguments instead of stopping", _OTHER, file=NOTHING),
    Arg(
        "help",
        "bool",
        False,
        "list the arguments of this module on this model, with their defaults, and stop",
        _OTHER,
        file=f"{NOTHING}; none is written",
    ),
    Arg(
        "dry_run",
        "bool",
        False,
        "print the whole plan, its warnings and which programs will not read the files, and stop before anything is "
        "trained",
        _OTHER,
        file=f"{NOTHING}; none is written",
    ),
)


def _takers(name: str) -> tuple[str, ...] | None:
    return tuple(spec.name for spec in ALGORITHMS.values() if name in spec.takes) or None


def _in_file(arg: Arg) -> str:
    return arg.file or FILES[arg.group]


TABLE = tuple(replace(arg, algos=_takers(arg.name), file=_in_file(arg)) for arg in _ROWS)
BY_NAME: dict[str, Arg] = {name: arg for arg in TABLE for name in arg.names}
OWN_STYLES = tuple(entry for spec in ALGORITHMS.values() for entry in spec.own_entries)  # see AlgoSpec
UNET_STYLES = tuple(entry for spec in ALGORITHMS.values() for entry in spec.unet_entries)
