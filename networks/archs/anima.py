"""Anima, under the trainers' classes and diffusers'. The text encoder is Qwen3.

The adapter between the two is trained on request; in diffusers it is a model of its own, which is not trained.
"""

from __future__ import annotations

from .spec import ArchSpec, BlockAxis, Part, Rename, Signature, Switch, Timestep, below

QWEN3 = ("Qwen3Attention", "Qwen3MLP", "Qwen3SdpaAttention", "Qwen3FlashAttention2")

DIFFUSERS = below(
    r"transformer_blocks\.(\d+)\.",
    r"blocks.\1.",
    Rename("attn1.to_q", "self_attn.q_proj"),
    Rename("attn1.to_k", "self_attn.k_proj"),
    Rename("attn1.to_v", "self_attn.v_proj"),
    Rename("attn1.to_out.0", "self_attn.output_proj"),
    Rename("attn2.to_q", "cross_attn.q_proj"),
    Rename("attn2.to_k", "cross_attn.k_proj"),
    Rename("attn2.to_v", "cross_attn.v_proj"),
    Rename("attn2.to_out.0", "cross_attn.output_proj"),
    Rename("ff.net.0.proj", "mlp.layer1"),
    Rename("ff.net.2", "mlp.layer2"),
    Rename("norm1.linear_1", "adaln_modulation_self_attn.1"),
    Rename("norm1.linear_2", "adaln_modulation_self_attn.2"),
    Rename("norm2.linear_1", "adaln_modulation_cross_attn.1"),
    Rename("norm2.linear_2", "adaln_modulation_cross_attn.2"),
    Rename("norm3.linear_1", "adaln_modulation_mlp.1"),
    Rename("norm3.linear_2", "adaln_modulation_mlp.2"),
    Rename("norm1.norm", "layer_norm_self_attn"),
    Rename("norm2.norm", "layer_norm_cross_attn"),
    Rename("norm3.norm", "layer_norm_mlp"),
    Rename("attn1.norm_q", "self_attn.q_norm"),
    Rename("attn1.norm_k", "self_attn.k_norm"),
    Rename("attn2.norm_q", "cross_attn.q_norm"),
    Rename("attn2.norm_k", "cross_attn.k_norm"),
)

ANIMA = ArchSpec(
    name="anima",
    title="Anima",
    entry="lora_anima",
    signatures=(Signature("Anima"), Signature("CosmosTransformer3DModel")),
    timestep=Timestep(("timesteps", "timestep"), noise=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer", "CosmosTransformerBlock"),
        layouts=DIFFUSERS,
        optional=(("train_llm_adapter", ("LLMAdapterTransformerBlock",)),),
    ),
    text_encoders=(
        Part(
            "text_encoder",
            "lora_te",
            QWEN3,
            roots=("text_encoders.qwen3_06b.transformer.model.", "model.", ""),
            diffusers="",
        ),
    ),
    axes=(BlockAxis("blocks."),),
    exclude=(r".*(_norm|_embedder|final_layer).*",),
    switches=(Switch("exclude_mod", r".*_modulation.*", trained_if=False),),
    usual=frozenset({280}),
)
