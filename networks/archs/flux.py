"""FLUX.1 and Chroma, under the trainers' classes. Chroma has the same blocks without their modulation layers."""

from __future__ import annotations

from dataclasses import replace

from .sd import clip
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature

T5 = ("T5Attention", "T5DenseGatedActDense")
DOUBLE_BLOCKS = 19


def t5(argument: str = "train_t5xxl") -> Part:
    """The T5 text encoder: large, so it is trained only on request."""
    return Part("text_encoder3", "lora_te3", T5, argument=argument)


FLUX = ArchSpec(
    name="flux",
    title="FLUX.1",
    entry="lora_flux",
    signatures=(Signature("Flux"),),
    denoiser=Part("dit", "lora_unet", ("DoubleStreamBlock", "SingleStreamBlock")),
    text_encoders=(clip(1), t5()),
    axes=(
        BlockAxis("double_blocks.", 0, "train_double_block_indices"),
        BlockAxis("single_blocks.", DOUBLE_BLOCKS, "train_single_block_indices"),
    ),
    layer_dims=(
        ("img_attn_dim", r"double_blocks\..*\.img_attn\..*"),
        ("txt_attn_dim", r"double_blocks\..*\.txt_attn\..*"),
        ("img_mlp_dim", r"double_blocks\..*\.img_mlp\..*"),
        ("txt_mlp_dim", r"double_blocks\..*\.txt_mlp\..*"),
        ("img_mod_dim", r"double_blocks\..*\.img_mod\..*"),
        ("txt_mod_dim", r"double_blocks\..*\.txt_mod\..*"),
        ("single_dim", r"single_blocks\..*\.linear[12]"),
        ("single_mod_dim", r"single_blocks\..*\.modulation\..*"),
    ),
    extra_dims=(("in_dims", ("img_in", r"time_in\..*", r"vector_in\..*", r"guidance_in\..*", "txt_in")),),
    block_sets=(("double", r"double_blocks\..*"), ("single", r"single_blocks\..*")),
    fused_rows=(FusedRows(r"double_blocks\..*\.qkv", 1, 2), FusedRows(r"single_blocks\..*\.linear1", 3, 1)),
    usual=frozenset({304}),
)

CHROMA = replace(
    FLUX,
    name="chroma",
    title="Chroma",
    signatures=(Signature("Chroma"),),
    layer_dims=tuple((name, regex) for name, regex in FLUX.layer_dims if "mod" not in name),
    usual=frozenset({228}),
)
