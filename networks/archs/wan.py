"""Wan 2.1 and 2.2, under the trainer's classes and diffusers'. The two experts of 2.2 are two models of this kind."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Timestep
from .spellings import Rename, Twins, below

BLOCK = below(
    r"blocks\.(\d+)\.",
    r"blocks.\1.",
    Rename("attn1.to_q", "self_attn.q"),
    Rename("attn1.to_k", "self_attn.k"),
    Rename("attn1.to_v", "self_attn.v"),
    Rename("attn1.to_out.0", "self_attn.o"),
    Rename("attn2.to_q", "cross_attn.q"),
    Rename("attn2.to_k", "cross_attn.k"),
    Rename("attn2.to_v", "cross_attn.v"),
    Rename("attn2.to_out.0", "cross_attn.o"),
    Rename("attn2.add_k_proj", "cross_attn.k_img"),
    Rename("attn2.add_v_proj", "cross_attn.v_img"),
    Rename("ffn.net.0.proj", "ffn.0"),
    Rename("ffn.net.2", "ffn.2"),
    Rename("norm2", "norm3"),  # the one with weight and bias, before cross attention
    Rename("norm3", "norm2"),
    Rename("attn1.norm_q", "self_attn.norm_q"),
    Rename("attn1.norm_k", "self_attn.norm_k"),
    Rename("attn2.norm_q", "cross_attn.norm_q"),
    Rename("attn2.norm_k", "cross_attn.norm_k"),
    Rename("attn2.norm_added_k", "cross_attn.norm_k_img"),
)
DIFFUSERS = (
    *BLOCK,
    *below(
        "",
        "",
        Rename("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        Rename("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        Rename("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        Rename("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        Rename("condition_embedder.time_proj", "time_projection.1"),
        Rename("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        Rename("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        Rename("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        Rename("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        Rename("proj_out", "head.head"),
    ),
)

WAN = ArchSpec(
    name="wan",
    title="Wan 2.1 / 2.2",
    entry="lora_wan",
    signatures=(Signature("WanModel"), Signature("WanTransformer3DModel")),
    timestep=Timestep(("t", "timestep")),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("WanAttentionBlock", "WanTransformerBlock"),
        layouts=DIFFUSERS,
        # LyCORIS names layers as the class at hand does, diffusers' too; in old files of this program those of the
        # trainer's class are swapped. Only norm3 has a weight, which others need and train.
        twins=(
            Twins(
                r"lora_unet_blocks_\d+_",
                "norm3",
                "norm2",
                "w_norm",
                "alpha",
                unless=r"lora_unet_blocks_\d+_(attn|mlp)_.*",
            ),
        ),
    ),
    axes=(BlockAxis("blocks."),),
    usual=frozenset({300, 360, 400, 480}),
    kinds=frozenset({9, 11}),
    releases=(
        Release(
            "wan",
            "Wan 2.1 image to video, 14B",
            "WanTransformer3DModel",
            {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
            also=("wan2.1-i2v-14b", "wan2.1-flf2v-14b"),
        ),
        Release(
            "wan_t2v_14b",
            "Wan 2.1 / 2.2 text to video, 14B",
            "WanTransformer3DModel",
            also=("wan2.1-t2v-14b", "wan2.2-t2v-a14b", "wan2.1", "wan2.2"),
        ),
        Release(
            "wan_t2v_1_3b",
            "Wan 2.1 text to video, 1.3B",
            "WanTransformer3DModel",
            {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
            also=("wan2.1-t2v-1.3b",),
        ),
        Release(
            "wan_fun_control_1_3b",
            "Wan 2.1 Fun Control, 1.3B",
            "WanTransformer3DModel",
            {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "in_channels": 48}
            | {"image_dim": 1280, "added_kv_proj_dim": 1536},
            also=("wan2.1-fun-1.3b-control",),
        ),
        Release(
            "wan22_i2v_14b",
            "Wan 2.2 image to video, 14B",
            "WanTransformer3DModel",
            {"in_channels": 36},
            also=("wan2.2-i2v-a14b",),
        ),
        Release(
            "wan22_ti2v_5b",
            "Wan 2.2 text and image to video, 5B",
            "WanTransformer3DModel",
            {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
            also=("wan2.2-ti2v-5b",),
        ),
    ),
    start=Start(
        "--network_dim 32 --network_alpha 1 --learning_rate 2e-4 --timestep_sampling shift --discrete_flow_shift 3.0",
        "docs/wan.md",
    ),
)
