"""FLUX.1 and Chroma, under the trainers' classes and diffusers'. Chroma has the same blocks, without modulation."""

from __future__ import annotations

from dataclasses import replace

from .releases import Encoder, Release
from .sd import CLIP_L, clip
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature, Start, Switch, Timestep
from .spellings import Rename, Swap, below, fused, numbered

T5 = ("T5Attention", "T5DenseGatedActDense")
DOUBLE_BLOCKS = 19

# Names that diffusers' double-stream models share: image, text, single blocks.
IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
SINGLE_QKV_MLP = (*IMAGE_QKV, "proj_mlp")

# The normalisation layers of a double block, and of queries and keys.
NORMS = (
    Rename("norm1.norm", "img_norm1"),
    Rename("norm1_context.norm", "txt_norm1"),
    Rename("norm2", "img_norm2"),
    Rename("norm2_context", "txt_norm2"),
)
QK_NORMS = (
    Rename("attn.norm_q", "img_attn.norm.query_norm"),
    Rename("attn.norm_k", "img_attn.norm.key_norm"),
    Rename("attn.norm_added_q", "txt_attn.norm.query_norm"),
    Rename("attn.norm_added_k", "txt_attn.norm.key_norm"),
)
SINGLE_QK_NORMS = (Rename("attn.norm_q", "norm.query_norm"), Rename("attn.norm_k", "norm.key_norm"))

DIFFUSERS = (
    *below(
        r"transformer_blocks\.(\d+)\.",
        r"double_blocks.\1.",
        *fused(IMAGE_QKV, "img_attn.qkv"),
        *fused(TEXT_QKV, "txt_attn.qkv"),
        Rename("attn.to_out.0", "img_attn.proj"),
        Rename("attn.to_add_out", "txt_attn.proj"),
        Rename("ff.net.0.proj", "img_mlp.0"),
        Rename("ff.net.2", "img_mlp.2"),
        Rename("ff_context.net.0.proj", "txt_mlp.0"),
        Rename("ff_context.net.2", "txt_mlp.2"),
        Rename("norm1.linear", "img_mod.lin"),
        Rename("norm1_context.linear", "txt_mod.lin"),
        *NORMS,
        *QK_NORMS,
    ),
    *below(
        r"single_transformer_blocks\.(\d+)\.",
        r"single_blocks.\1.",
        *fused(SINGLE_QKV_MLP, "linear1"),
        Rename("proj_out", "linear2"),
        Rename("norm.linear", "modulation.lin"),
        Rename("norm.norm", "pre_norm"),
        *SINGLE_QK_NORMS,
    ),
    *below(
        "",
        "",
        Rename("x_embedder", "img_in"),
        Rename("context_embedder", "txt_in"),
        Rename("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        Rename("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        Rename("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
        Rename("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
        Rename("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
        Rename("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
        Rename("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=Swap.ALWAYS),
        Rename("proj_out", "final_layer.linear"),
    ),
)


# Names which only adapter files have: XLabs'; the Open Model Initiative's, written by OneTrainer, with projections by
# number; those of DiffSynth's own classes.
XLABS = (
    *below(
        r"double_blocks\.(\d+)\.processor\.",
        r"double_blocks.\1.",
        Rename("qkv_lora1", "img_attn.qkv"),
        Rename("qkv_lora2", "txt_attn.qkv"),
        Rename("proj_lora1", "img_attn.proj"),
        Rename("proj_lora2", "txt_attn.proj"),
    ),
    *below(
        r"single_blocks\.(\d+)\.processor\.",
        r"single_blocks.\1.",
        Rename("qkv_lora", "linear1", count=4, span=3),
        Rename("proj_lora", "linear2"),
    ),
)
OMI = (
    *below(
        r"double_blocks\.(\d+)\.",
        r"double_blocks.\1.",
        *numbered("img_attn.qkv", 3),
        *numbered("txt_attn.qkv", 3),
    ),
    *below(r"single_blocks\.(\d+)\.", r"single_blocks.\1.", *numbered("linear1", 4)),
    *below("", "", Rename("img_in.proj", "img_in")),
)
DIFFSYNTH = (
    *below(
        r"blocks\.(\d+)\.",
        r"double_blocks.\1.",
        Rename("norm1_a.linear", "img_mod.lin"),
        Rename("norm1_b.linear", "txt_mod.lin"),
        Rename("attn.a_to_qkv", "img_attn.qkv"),
        Rename("attn.b_to_qkv", "txt_attn.qkv"),
        Rename("attn.a_to_out", "img_attn.proj"),
        Rename("attn.b_to_out", "txt_attn.proj"),
        Rename("ff_a.0", "img_mlp.0"),
        Rename("ff_a.2", "img_mlp.2"),
        Rename("ff_b.0", "txt_mlp.0"),
        Rename("ff_b.2", "txt_mlp.2"),
    ),
    *below(
        r"single_blocks\.(\d+)\.",
        r"single_blocks.\1.",
        Rename("norm.linear", "modulation.lin"),
        Rename("to_qkv_mlp", "linear1"),
        Rename("proj_out", "linear2"),
    ),
)


# What sd-scripts' networks.oft_flux trains beside the attention of the double blocks on request.
NO_ATTENTION = Switch(
    "enable_all_linear", r"double_blocks\.\d+\.(img|txt)_(mlp|mod)\..*|single_blocks\..*", True, default=True
)


def t5(*file_roots: str) -> Part:
    """The T5 text encoder: large, so it is trained only on request.

    Args:
        file_roots: what programs that count the encoders of this architecture call it.
    """
    return Part(
        "text_encoder3",
        "lora_te3",
        T5,
        roots=("text_encoders.t5xxl.transformer.", ""),
        argument="train_t5xxl",
        diffusers="",
        file_roots=("lora_te3.", "t5.", "t5xxl.", "t5xxl.transformer.", *file_roots),
    )


T5_XXL = Encoder(
    "t5_xxl",
    "T5EncoderModel",
    "T5Config",
    {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
)

FLUX = ArchSpec(
    name="flux",
    title="FLUX.1",
    entry="lora_flux",
    signatures=(Signature("Flux"), Signature("FluxTransformer2DModel")),
    timestep=Timestep(("timesteps", "timestep"), noise=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("DoubleStreamBlock", "SingleStreamBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"),
        layouts=DIFFUSERS,
        others=(("XLabs", XLABS), ("OMI", OMI), ("DiffSynth", DIFFSYNTH)),
    ),
    text_encoders=(clip(1), t5("lora_te2_", "lora_te2.", "text_encoder_2.")),
    axes=(
        BlockAxis("double_blocks.", 0, "train_double_block_indices"),
        BlockAxis("single_blocks.", DOUBLE_BLOCKS, "train_single_block_indices"),
    ),
    # musubi-tuner trains FLUX.1 Kontext without them; this model is of the same classes in both trainers.
    switches=(
        Switch(
            "exclude_mod", r".*\.(img_mod|txt_mod|modulation)\.lin", False, default=True, per_host=(("musubi", False),)
        ),
        NO_ATTENTION,
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
    usual=frozenset({304, 228}),
    kinds=frozenset({7, 10}),
    releases=(
        Release(
            "flux",
            "FLUX.1 dev",
            "FluxTransformer2DModel",
            {"guidance_embeds": True},
            (CLIP_L, T5_XXL),
            also=("flux.1", "flux.1-kontext-dev"),
        ),
        Release("flux_schnell", "FLUX.1 schnell", "FluxTransformer2DModel", {}, (CLIP_L, T5_XXL)),
    ),
    start=Start(
        "--network_dim 16 --network_alpha 1 --learning_rate 1e-4 --timestep_sampling flux_shift "
        "--model_prediction_type raw --guidance_scale 1.0",
        "docs/flux_train_network.md",
    ),
)

# Chroma's in place of the modulation layers.
GUIDANCE = below(
    r"distilled_guidance_layer\.layers\.(\d+)\.",
    r"distilled_guidance_layer.layers.\1.",
    Rename("linear_1", "in_layer"),
    Rename("linear_2", "out_layer"),
)

CHROMA = replace(
    FLUX,
    name="chroma",
    title="Chroma",
    signatures=(Signature("Chroma"), Signature("ChromaTransformer2DModel")),
    denoiser=replace(
        FLUX.denoiser,
        containers=(
            "DoubleStreamBlock",
            "SingleStreamBlock",
            "ChromaTransformerBlock",
            "ChromaSingleTransformerBlock",
        ),
        layouts=(*DIFFUSERS, *GUIDANCE),
    ),
    text_encoders=(clip(1), t5("lora_te_", "lora_te.", "text_encoder.")),
    switches=(NO_ATTENTION,),
    layer_dims=tuple((name, regex) for name, regex in FLUX.layer_dims if "mod" not in name),
    usual=frozenset({228}),
    kinds=frozenset({7}),
    releases=(Release("chroma", "Chroma", "ChromaTransformer2DModel", {}, (None, T5_XXL), also=("chroma1-hd",)),),
    start=Start(
        "--network_dim 16 --network_alpha 1 --learning_rate 1e-4 --timestep_sampling sigmoid "
        "--model_prediction_type raw --guidance_scale 0.0 --apply_t5_attn_mask",
        "docs/flux_train_network.md",
    ),
)
