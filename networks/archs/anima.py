"""Anima, under the trainers' classes. The text encoder is Qwen3; an adapter between the two is trained on request."""

from __future__ import annotations

from .spec import ArchSpec, BlockAxis, Part, Signature, Switch

QWEN3 = ("Qwen3Attention", "Qwen3MLP", "Qwen3SdpaAttention", "Qwen3FlashAttention2")

ANIMA = ArchSpec(
    name="anima",
    title="Anima",
    entry="lora_anima",
    signatures=(Signature("Anima"),),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"),
        optional=(("train_llm_adapter", ("LLMAdapterTransformerBlock",)),),
    ),
    text_encoders=(Part("text_encoder", "lora_te", QWEN3),),
    axes=(BlockAxis("blocks."),),
    exclude=(r".*(_norm|_embedder|final_layer).*",),
    switches=(Switch("exclude_mod", r".*_modulation.*", trained_if=False),),
    usual=frozenset({280}),
)
