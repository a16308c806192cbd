"""FLUX.2 dev and klein, under the trainer's classes and diffusers'. Their modulation stands outside the blocks."""

from __future__ import annotations

from .flux import IMAGE_QKV, QK_NORMS, SINGLE_QK_NORMS, TEXT_QKV
from .releases import Release
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature, Start, Timestep
from .spellings import Rename, Swap, below, fused

DIFFUSERS = (
    *below(
        r"transformer_blocks\.(\d+)\.",
        r"double_blocks.\1.",
        *fused(IMAGE_QKV, "img_attn.qkv"),
        *fused(TEXT_QKV, "txt_attn.qkv"),
        Rename("attn.to_out.0", "img_attn.proj"),
        Rename("attn.to_add_out", "txt_attn.proj"),
        Rename("ff.linear_in", "img_mlp.0"),
        Rename("ff.linear_out", "img_mlp.2"),
        Rename("ff_context.linear_in", "txt_mlp.0"),
        Rename("ff_context.linear_out", "txt_mlp.2"),
        Rename("norm1", "img_norm1"),
        Rename("norm1_context", "txt_norm1"),
        Rename("norm2", "img_norm2"),
        Rename("norm2_context", "txt_norm2"),
        *QK_NORMS,
    ),
    *below(
        r"single_transformer_blocks\.(\d+)\.",
        r"single_blocks.\1.",
        Rename("attn.to_qkv_mlp_proj", "linear1"),
        Rename("attn.to_out", "linear2"),
        Rename("norm", "pre_norm"),
        *SINGLE_QK_NORMS,
    ),
    *below(
        "",
        "",
        Rename("x_embedder", "img_in"),
        Rename("context_embedder", "txt_in"),
        Rename("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        Rename("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        Rename("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
        Rename("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
        Rename("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
        Rename("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
        Rename("single_stream_modulation.linear", "single_stream_modulation.lin"),
        Rename("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=Swap.ALWAYS),
        Rename("proj_out", "final_layer.linear"),
    ),
)

FLUX_2 = ArchSpec(
    name="flux_2",
    title="FLUX.2",
    entry="lora_flux_2",
    signatures=(Signature("Flux2"), Signature("Flux2Transformer2DModel")),
    timestep=Timestep(("timesteps", "timestep"), noise=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("DoubleStreamBlock", "SingleStreamBlock", "Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
        layouts=DIFFUSERS,
    ),
    axes=(BlockAxis("double_blocks."), BlockAxis("single_blocks.", None)),
    fused_rows=(FusedRows(r"double_blocks\..*\.qkv", 1, 2), FusedRows(r"single_blocks\..*\.linear1", 3, 1)),
    usual=frozenset({80, 112, 160}),
    kinds=frozenset({7}),
    releases=(
        Release("flux_2", "FLUX.2 dev", "Flux2Transformer2DModel"),
        Release(
            "flux_2_klein_4b",
            "FLUX.2 klein 4B",
            "Flux2Transformer2DModel",
            {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
            | {"guidance_embeds": False},
        ),
        Release(
            "flux_2_klein_9b",
            "FLUX.2 klein 9B",
            "Flux2Transformer2DModel",
            {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
            | {"guidance_embeds": False},
        ),
    ),
    start=Start(
        "--network_dim 32 --network_alpha 1 --learning_rate 1e-4 --timestep_sampling flux2_shift "
        "--weighting_scheme none",
        "docs/flux_2.md",
    ),
)
