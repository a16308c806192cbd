"""What a name or a value means that no argument has: options of the trainers, words of other tools and of papers.

Read after the table has said no, so nothing here can hide an argument.
"""

from __future__ import annotations

import re

_RANK = "the rank of all layers is the trainer's option: write --network_dim {value} outside --network_args"
_ALPHA = "alpha is the trainer's option: write --network_alpha {value} outside --network_args"
_OWN = "this is the trainer's own option: write {option} outside --network_args"
_CONV = "write conv_dim={value}"
_CONV_ALPHA = "write conv_alpha={value}"
_LAYERS = "which layers are trained is said by only_patterns, exclude_patterns and include_patterns, or by a preset"
_USE_ALGO = "the algorithm is chosen by algo={value}"

_NAMES: dict[str, str] = {
    **dict.fromkeys(("rank", "dim", "r", "lora_rank", "lora_dim", "lora_r", "network_rank", "linear"), _RANK),
    **dict.fromkeys(("alpha", "lora_alpha", "linear_alpha", "alphas"), _ALPHA),
    **dict.fromkeys(("conv", "conv_rank", "conv_lora_dim", "conv2d_dim", "rank_conv", "dim_conv"), _CONV),
    **dict.fromkeys(("alpha_conv", "conv_lora_alpha"), _CONV_ALPHA),
    **dict.fromkeys(("type", "method", "network_type", "lycoris_type", "adapter_type", "algorithm"), _USE_ALGO),
    **dict.fromkeys(
        ("target_modules", "modules", "layers", "target_layers", "lora_target_modules", "layer_filter"), _LAYERS
    ),
    **dict.fromkeys(("exclude_modules", "exclude", "exclude_name"), "write exclude_patterns="),
    **dict.fromkeys(("include", "include_name"), "write include_patterns="),
    **dict.fromkeys(("only", "only_name"), "write only_patterns="),
    **dict.fromkeys(("rank_pattern", "reg_dims", "regex_dims"), "write network_reg_dims={{'regex': 8}}"),
    **dict.fromkeys(("alpha_pattern", "reg_alphas", "regex_alphas"), "write network_reg_alphas={{'regex': 4}}"),
    **dict.fromkeys(("reg_lrs", "regex_lrs"), "write network_reg_lrs={{'regex': 1e-4}}"),
    **dict.fromkeys(
        ("dropout_pattern", "reg_dropouts", "regex_dropouts", "audio_dropout", "video_dropout", "cross_modal_dropout"),
        "write network_reg_dropouts={{'regex': 0.1}}",
    ),
    **dict.fromkeys(("layers_to_transform", "block_indices", "train_blocks_indices"), "write blocks=0-7,20"),
    **dict.fromkeys(
        ("init_lora_weights", "init_weights", "initialization", "initialize"),
        "write init=pissa, init=milora or init=orthogonal",
    ),
    **dict.fromkeys(("lokr_factor", "decompose_factor"), "write factor={value}, with algo=lokr"),
    **dict.fromkeys(("lokr_norm", "perturbed_normal"), "write init_lokr_norm={value}, with algo=lokr"),
    **dict.fromkeys(("lokr_full_rank", "full_rank"), "write full_matrix=True, with algo=lokr"),
    **dict.fromkeys(("use_rs", "rank_stabilized", "rslora"), "write rs_lora={value}"),
    **dict.fromkeys(("lora_plus", "loraplus", "loraplus_ratio", "lr_ratio"), "write loraplus_lr_ratio={value}"),
    **dict.fromkeys(
        ("dora_lr", "dora_plus", "dora_scale_lr", "magnitude_lr", "magnitude_lr_ratio", "magnitude_lr_scale"),
        "write dora_lr_ratio={value}, the rate of the magnitudes over that of their layer",
    ),
    **dict.fromkeys(("coft", "use_coft", "coft_eps", "oft_coft", "eps"), "write constraint=1e-3, with algo=diag-oft"),
    **dict.fromkeys(("oft_block_size", "num_blocks"), "the block size of OFT is --network_dim, see dim_is_count"),
    **dict.fromkeys(("boft_block_size", "block_num", "boft_block_num"), "the size of a block is --network_dim"),
    "auto_adjust": "a size that does not divide a width is adjusted always, and dry_run=True lists them: leave it out",
    "extra_unet_targets": "the blocks of this model are found without it; other classes are named by a preset's "
    "unet_target_module",
    **dict.fromkeys(("weight_norm", "max_norm"), "the trainer limits norms: write --scale_weight_norms {value}"),
    **dict.fromkeys(("lr", "learning_rates"), "rates are the trainer's: write --learning_rate {value}"),
    **dict.fromkeys(("network_dropout",), "write dropout={value}, or --network_dropout {value} outside --network_args"),
    **dict.fromkeys(("lora_dropout", "p_dropout"), "write dropout={value}"),
    **dict.fromkeys(("train_unet", "unet_only"), "write --network_train_unet_only outside --network_args"),
    **dict.fromkeys(
        ("train_text_encoder", "text_encoder_only", "train_te"),
        "text encoders are trained unless --network_train_unet_only says no; their rate is --text_encoder_lr",
    ),
    **dict.fromkeys(
        ("multiplier", "strength", "lora_multiplier", "scale", "weight"),
        "training is at strength 1; the strength of a file is given where it is used",
    ),
}  # fmt: skip
# The trainers' options that are written among the network's by mistake.
_OPTIONS = frozenset(
    "network_dim network_alpha network_module network_weights dim_from_weights network_train_unet_only "
    "network_train_text_encoder_only base_weights base_weights_multiplier scale_weight_norms learning_rate unet_lr "
    "text_encoder_lr optimizer_type optimizer_args lr_scheduler gradient_checkpointing mixed_precision full_bf16 "
    "full_fp16 fp8_base seed max_train_steps max_train_epochs save_precision output_dir output_name resolution "
    "clip_skip train_batch_size gradient_accumulation_steps min_snr_gamma noise_offset network_args training_comment "
    "cache_latents blocks_to_swap sdpa xformers".split()
)
_FLAGS = frozenset(
    "dim_from_weights network_train_unet_only network_train_text_encoder_only gradient_checkpointing full_bf16 "
    "full_fp16 fp8_base cache_latents sdpa xformers".split()
)
_VALUES: dict[tuple[str, str], str] = {
    ("algo", "oft"): "is two things: algo=diag-oft is LyCORIS', --network_module networks.oft that of sd-scripts",
    ("algo", "diag_oft"): "is written algo=diag-oft",
    ("algo", "dora"): "is no algorithm of its own: write use_dora=True, with algo=lora, loha, lokr or another",
    ("algo", "rslora"): "is no algorithm of its own: write rs_lora=True",
    ("algo", "rs-lora"): "is no algorithm of its own: write rs_lora=True",
    ("algo", "pissa"): "is a way to start: write init=pissa",
    ("algo", "milora"): "is a way to start: write init=milora",
    ("algo", "lora+"): "is a choice of learning rates: write loraplus_lr_ratio=16",
    ("algo", "loraplus"): "is a choice of learning rates: write loraplus_lr_ratio=16",
    ("algo", "lora-fa"): "is written algo=lora_fa",
    ("algo", "t-lora"): "is written algo=tlora",
    ("algo", "(ia)^3"): "is written algo=ia3",
    ("algo", "ia^3"): "is written algo=ia3",
    ("algo", "lycoris"): "is the name of a library: write the algorithm, such as algo=locon or algo=lokr",
    ("algo", "native"): "is written algo=full",
    ("algo", "fft"): "is written algo=full",
    ("algo", "loka"): "was replaced by LoKr: write algo=lokr",
    ("algo", "cp"): "is a form of convolutions: write use_tucker=True",
    ("init", "gaussian"): "is no start of ours: leave init out, the usual one has a random and a zero factor",
    ("init", "true"): "is the default: leave init out",
}


_KEYWORDS = {_RANK: "write dim={value}", _ALPHA: "write alpha={value}"}


def of_name(name: str, value: object, in_trainer: bool = True) -> str:
    """What to do about a name that no argument has; "" if nothing is known of it.

    Args:
        name: as written.
        value: behind it.
        in_trainer: whether there are options of a trainer to write in its place, or keywords of a Python function.
    """
    plain = re.sub(r"[\s-]+", "_", name.strip().lstrip("-").lower())
    if not in_trainer:
        known = _NAMES.get(plain, "")
        return _KEYWORDS.get(known, "" if "--" in known else known).format(value=_short(value))
    if plain in _OPTIONS:
        return _OWN.format(option=f"--{plain}" + ("" if plain in _FLAGS else f" {_short(value)}"))
    return _NAMES.get(plain, "").format(value=_short(value))


def of_value(argument: str, value: object) -> str:
    """How a sentence goes on that begins with `argument=value`, a value which the argument has not; or ""."""
    return _VALUES.get((argument, str(value).strip().lower()), "")


def _short(value: object) -> str:
    text = str(value).strip()
    return text if 0 < len(text) <= 20 else "N"
