"""The network arguments as keywords with types. scripts/docs.py writes this: edit the rows in table.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

Algo = Literal[
    "lora",
    "loha",
    "lokr",
    "dylora",
    "lora_fa",
    "glora",
    "tlora",
    "full",
    "norm",
    "diag-oft",
    "boft",
    "boft-input",
    "ia3",
]


class Options(TypedDict, total=False):
    """What the table says of each is printed by `kohya-networks args`."""

    conv_dim: int
    conv_alpha: float
    rs_lora: bool
    network_reg_dims: str | Mapping[str, int]
    network_reg_alphas: str | Mapping[str, float]
    use_tucker: bool
    use_dora: bool
    wd_on_output: bool
    split_qkv: bool
    use_scalar: bool
    init: Literal["default", "orthogonal", "pissa", "milora"]
    init_seed: int
    factor: int
    decompose_both: bool
    full_matrix: bool
    unbalanced_factorization: bool
    init_lokr_norm: float
    block_size: int
    save_dims: str | int | Sequence[int | None]
    sig_type: Literal["principal", "last", "middle"]
    use_data_init: bool
    min_rank: int
    alpha_rank_scale: float
    mask_group_id: int
    constraint: float
    rescaled: bool
    dim_is_count: bool
    train_on_input: bool
    dim_is_size: bool
    block_share: bool
    butterflies: int
    dropout: float
    rank_dropout: float
    rank_dropout_scale: bool
    module_dropout: float
    network_reg_dropouts: str | Mapping[str, float]
    network_reg_rank_dropouts: str | Mapping[str, float]
    network_reg_module_dropouts: str | Mapping[str, float]
    preset: str
    train_norm: bool | Literal["true", "false", "affine"]
    exclude_patterns: str | Sequence[str]
    include_patterns: str | Sequence[str]
    only_patterns: str | Sequence[str]
    exclude_mod: bool
    train_mlp: bool
    enable_all_linear: bool
    enable_conv: bool
    include_refiner: bool
    blocks: str | Sequence[int]
    network_reg_lrs: str | Mapping[str, float]
    loraplus_lr_ratio: float
    loraplus_mode: Literal["lr", "reparam"]
    loraplus_unet_lr_ratio: float
    loraplus_text_encoder_lr_ratio: float
    dora_lr_ratio: float
    block_dims: str | int | Sequence[int | None]
    block_alphas: str | float | Sequence[float | None]
    conv_block_dims: str | int | Sequence[int | None]
    conv_block_alphas: str | float | Sequence[float | None]
    img_attn_dim: int
    txt_attn_dim: int
    img_mlp_dim: int
    txt_mlp_dim: int
    img_mod_dim: int
    txt_mod_dim: int
    single_dim: int
    single_mod_dim: int
    context_attn_dim: int
    context_mlp_dim: int
    context_mod_dim: int
    x_attn_dim: int
    x_mlp_dim: int
    x_mod_dim: int
    refiner_dim: int
    attn_dim: int
    mlp_dim: int
    mod_dim: int
    cross_modal_dim: int
    audio_dim: int
    in_dims: str | int | Sequence[int | None]
    emb_dims: str | int | Sequence[int | None]
    embedder_dims: str | int | Sequence[int | None]
    train_blocks: str
    train_double_block_indices: str | Sequence[int]
    train_single_block_indices: str | Sequence[int]
    train_block_indices: str | Sequence[int]
    train_t5xxl: bool
    train_llm_adapter: bool
    lora_target_preset: Literal[
        "t2v", "v2v", "video_sa", "video_sa_ff", "video_sa_ca_ff", "audio", "audio_v2a", "audio_ref_ic", "full"
    ]
    connector_lora: bool
    cross_modal_alpha: float
    audio_alpha: float
    down_lr_weight: str | Sequence[float]
    mid_lr_weight: str | Sequence[float]
    up_lr_weight: str | Sequence[float]
    block_lr_zero_threshold: float
    ggpo_sigma: float
    ggpo_beta: float
    training_adapter: str | Sequence[str] | Mapping[str, float]
    save_format: Literal["portable", "blissful", "comfyui", "diffusers", "peft", "oft", "oft_flux"]
    save_also: str | Sequence[str]
    ema_decay: float
    ema_save: Literal["only", "also", "off"]
    ema_device: Literal["adapter", "cpu"]
    diagnose_steps: int
    bypass_mode: bool
    allow_missing: bool
    resume_resize: bool
    adapter_dtype: Literal["host", "fp32"]
    verbose: bool
    allow_unknown: bool
    help: bool
    dry_run: bool
