"""Stable Diffusion 3 and 3.5, under the trainers' classes and diffusers'."""

from __future__ import annotations

from .flux import IMAGE_QKV, T5_XXL, TEXT_QKV, t5
from .releases import Release
from .sd import CLIP_G, CLIP_L_PROJECTED, clip
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature, Start, Switch, Timestep, Unread
from .spellings import Rename, Swap, below, fused, numbered

DIFFUSERS = (
    *below(
        r"transformer_blocks\.(\d+)\.",
        r"joint_blocks.\1.",
        *fused(IMAGE_QKV, "x_block.attn.qkv"),
        *fused(TEXT_QKV, "context_block.attn.qkv"),
        *fused(("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.qkv"),
        Rename("attn.to_out.0", "x_block.attn.proj"),
        Rename("attn.to_add_out", "context_block.attn.proj"),
        Rename("attn2.to_out.0", "x_block.attn2.proj"),
        Rename("ff.net.0.proj", "x_block.mlp.fc1"),
        Rename("ff.net.2", "x_block.mlp.fc2"),
        Rename("ff_context.net.0.proj", "context_block.mlp.fc1"),
        Rename("ff_context.net.2", "context_block.mlp.fc2"),
        Rename("norm1.linear", "x_block.adaLN_modulation.1"),
        Rename("norm1_context.linear", "context_block.adaLN_modulation.1", swapped=Swap.DOUBLE),  # of the last block
        Rename("norm1.norm", "x_block.norm1"),
        Rename("norm1_context.norm", "context_block.norm1"),
        Rename("norm2", "x_block.norm2"),
        Rename("norm2_context", "context_block.norm2"),
        Rename("attn.norm_q", "x_block.attn.ln_q"),
        Rename("attn.norm_k", "x_block.attn.ln_k"),
        Rename("attn.norm_added_q", "context_block.attn.ln_q"),
        Rename("attn.norm_added_k", "context_block.attn.ln_k"),
        Rename("attn2.norm_q", "x_block.attn2.ln_q"),
        Rename("attn2.norm_k", "x_block.attn2.ln_k"),
    ),
    *below(
        "",
        "",
        Rename("pos_embed.proj", "x_embedder.proj"),
        Rename("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        Rename("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        Rename("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        Rename("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        Rename("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=Swap.ALWAYS),
        Rename("proj_out", "final_layer.linear"),
    ),
)

# The Open Model Initiative's standard, which OneTrainer writes: projections by number.
OMI = below(
    r"joint_blocks\.(\d+)\.",
    r"joint_blocks.\1.",
    *numbered("x_block.attn.qkv", 3),
    *numbered("context_block.attn.qkv", 3),
    *numbered("x_block.attn2.qkv", 3),
)

_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
_ENCODERS = (CLIP_L_PROJECTED, CLIP_G, T5_XXL)

SD3 = ArchSpec(
    name="sd3",
    title="Stable Diffusion 3 / 3.5",
    entry="lora_sd3",
    signatures=(Signature("MMDiT"), Signature("SD3Transformer2DModel")),
    timestep=Timestep(("t", "timestep")),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("SingleDiTBlock", "JointTransformerBlock"),
        layouts=DIFFUSERS,
        others=(("OMI", OMI),),
        # Behind the last block the picture goes on alone, so that nothing asks for the text's own view of it.
        unread=(Unread(r"joint_blocks\.(\d+)\.context_block\.attn\.ln_q"),),
    ),
    text_encoders=(clip(1), clip(2), t5("text_encoder_3.")),
    axes=(BlockAxis("joint_blocks.", 0, "train_block_indices"),),
    switches=(Switch("exclude_mod", r"joint_blocks\..*\.adaLN_modulation\..*", trained_if=False, default=True),),
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
    kinds=frozenset({8, 10}),
    releases=(
        Release(
            "sd3",
            "Stable Diffusion 3.5 medium",
            "SD3Transformer2DModel",
            {**_MEDIUM, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
            _ENCODERS,
            also=("sd3.5", "sd3.5-medium"),
        ),
        Release(
            "sd3_medium",
            "Stable Diffusion 3 medium",
            "SD3Transformer2DModel",
            {**_MEDIUM, "pos_embed_max_size": 192},
            _ENCODERS,
        ),
        Release(
            "sd35_large",
            "Stable Diffusion 3.5 large",
            "SD3Transformer2DModel",
            {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
            | {"qk_norm": "rms_norm"},
            _ENCODERS,
            also=("stable-diffusion-3.5-large",),
        ),
    ),
    start=Start(
        "--network_dim 16 --network_alpha 1 --learning_rate 1e-4 --weighting_scheme uniform",
        "docs/sd3_train_network.md",
    ),
)
