"""Stable Diffusion 3 and 3.5, under the trainers' classes."""

from __future__ import annotations

from .flux import t5
from .sd import clip
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature

SD3 = ArchSpec(
    name="sd3",
    title="Stable Diffusion 3 / 3.5",
    entry="lora_sd3",
    signatures=(Signature("MMDiT"),),
    denoiser=Part("dit", "lora_unet", ("SingleDiTBlock",)),
    text_encoders=(clip(1), clip(2), t5()),
    axes=(BlockAxis("joint_blocks.", 0, "train_block_indices"),),
    layer_dims=(
        ("context_attn_dim", r".*\.context_block\.attn\..*"),
        ("context_mlp_dim", r".*\.context_block\.mlp\..*"),
        ("context_mod_dim", r".*\.context_block\.adaLN_modulation\..*"),
        ("x_attn_dim", r".*\.x_block\.attn2?\..*"),
        ("x_mlp_dim", r".*\.x_block\.mlp\..*"),
        ("x_mod_dim", r".*\.x_block\.adaLN_modulation\..*"),
    ),
    extra_dims=(
        (
            "emb_dims",
            (
                "context_embedder",
                r"t_embedder\..*",
                r"x_embedder\..*",
                r"y_embedder\..*",
                r"final_layer\.adaLN_modulation\..*",
                r"final_layer\.linear",
            ),
        ),
    ),
    fused_rows=(FusedRows(r"joint_blocks\..*\.qkv", 1, 2),),
    usual=frozenset({237, 263, 377}),
)
