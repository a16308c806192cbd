"""Lumina Image 2.0, under the trainers' classes. The text encoder is Gemma 2."""

from __future__ import annotations

from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature

GEMMA2 = ("Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention", "Gemma2MLP")

LUMINA = ArchSpec(
    name="lumina",
    title="Lumina Image 2.0",
    entry="lora_lumina",
    signatures=(Signature("NextDiT"),),
    denoiser=Part("dit", "lora_unet", ("JointTransformerBlock", "FinalLayer")),
    text_encoders=(Part("text_encoder", "lora_te", GEMMA2),),
    axes=(BlockAxis("layers."),),
    # A refiner is told apart first: its layers have the names of the others'.
    layer_dims=(
        ("refiner_dim", r"(noise|context)_refiner\..*"),
        ("attn_dim", r".*\.attention\..*"),
        ("mlp_dim", r".*\.feed_forward\..*"),
        ("mod_dim", r".*adaLN_modulation\..*"),
    ),
    extra_dims=(("embedder_dims", ("x_embedder", r"t_embedder\..*", r"cap_embedder\..*")),),
    block_sets=(
        ("transformer", r"layers\..*"),
        ("refiners", r"(noise|context)_refiner\..*"),
        ("noise_refiner", r"noise_refiner\..*"),
        ("context_refiner", r"context_refiner\..*"),
    ),
    fused_rows=(FusedRows(r".*\.attention\.qkv", 1, 2),),
    usual=frozenset({180}),
)
