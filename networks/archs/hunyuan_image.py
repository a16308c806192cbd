"""HunyuanImage 2.1, under the trainers' classes and diffusers'. Its text encoders are never trained."""

from __future__ import annotations

from .flux import IMAGE_QKV, NORMS, SINGLE_QKV_MLP, TEXT_QKV
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Rename, Signature, Switch, Timestep, below, fused

DOUBLE_BLOCKS = 20

# Normalisation of queries and keys in a double block.
QK_NORMS = (
    Rename("attn.norm_q", "img_attn_q_norm"),
    Rename("attn.norm_k", "img_attn_k_norm"),
    Rename("attn.norm_added_q", "txt_attn_q_norm"),
    Rename("attn.norm_added_k", "txt_attn_k_norm"),
)

DIFFUSERS = (
    *below(
        r"transformer_blocks\.(\d+)\.",
        r"double_blocks.\1.",
        *fused(IMAGE_QKV, "img_attn_qkv"),
        *fused(TEXT_QKV, "txt_attn_qkv"),
        Rename("attn.to_out.0", "img_attn_proj"),
        Rename("attn.to_add_out", "txt_attn_proj"),
        Rename("ff.net.0.proj", "img_mlp.fc1"),
        Rename("ff.net.2", "img_mlp.fc2"),
        Rename("ff_context.net.0.proj", "txt_mlp.fc1"),
        Rename("ff_context.net.2", "txt_mlp.fc2"),
        Rename("norm1.linear", "img_mod.linear"),
        Rename("norm1_context.linear", "txt_mod.linear"),
        *NORMS,
        *QK_NORMS,
    ),
    *below(
        r"single_transformer_blocks\.(\d+)\.",
        r"single_blocks.\1.",
        *fused(SINGLE_QKV_MLP, "linear1"),
        Rename("proj_out", "linear2"),
        Rename("norm.linear", "modulation.linear"),
        Rename("norm.norm", "pre_norm"),
        Rename("attn.norm_q", "q_norm"),
        Rename("attn.norm_k", "k_norm"),
    ),
)

HUNYUAN_IMAGE = ArchSpec(
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    entry="lora_hunyuan_image",
    signatures=(Signature("HYImageDiffusionTransformer"), Signature("HunyuanImageTransformer2DModel")),
    timestep=Timestep(("timestep",)),
    denoiser=Part(
        "dit",
        "lora_unet",
        (
            "MMDoubleStreamBlock",
            "MMSingleStreamBlock",
            "HunyuanImageTransformerBlock",
            "HunyuanImageSingleTransformerBlock",
        ),
        layouts=DIFFUSERS,
    ),
    axes=(BlockAxis("double_blocks."), BlockAxis("single_blocks.", DOUBLE_BLOCKS)),
    switches=(Switch("exclude_mod", r".*\.(img_mod|txt_mod|modulation)\..*", trained_if=False, default=True),),
    block_sets=(("double", r"double_blocks\..*"), ("single", r"single_blocks\..*")),
    fused_rows=(FusedRows(r"double_blocks\..*_qkv", 1, 2), FusedRows(r"single_blocks\..*\.linear1", 3, 1)),
    usual=frozenset({320}),
)
