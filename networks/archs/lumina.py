"""Lumina Image 2.0, under the trainers' classes and diffusers'. The text encoder is Gemma 2."""

from __future__ import annotations

from .flux import IMAGE_QKV
from .releases import Encoder, Release
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature, Start, Switch, Timestep, Unread
from .spellings import Rename, below, fused

GEMMA2 = ("Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention", "Gemma2MLP")

DIFFUSERS = (
    *below(
        r"(layers|noise_refiner|context_refiner)\.(\d+)\.",
        r"\1.\2.",
        *fused(IMAGE_QKV, "attention.qkv"),
        Rename("attn.to_out.0", "attention.out"),
        Rename("feed_forward.linear_1", "feed_forward.w1"),
        Rename("feed_forward.linear_2", "feed_forward.w2"),
        Rename("feed_forward.linear_3", "feed_forward.w3"),
        Rename("norm1.linear", "adaLN_modulation.1"),
        Rename("norm1.norm", "attention_norm1"),
        Rename("norm1", "attention_norm1"),  # of the context refiner, which has no modulation
        Rename("norm2", "attention_norm2"),
        Rename("attn.norm_q", "attention.q_norm"),
        Rename("attn.norm_k", "attention.k_norm"),
    ),
    *below(
        "",
        "",
        Rename("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        Rename("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        Rename("time_caption_embed.caption_embedder.0", "cap_embedder.0"),
        Rename("time_caption_embed.caption_embedder.1", "cap_embedder.1"),
        Rename("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        Rename("norm_out.linear_2", "final_layer.linear"),
        Rename("norm_out.norm", "final_layer.norm_final"),
    ),
)

GEMMA2_2B = Encoder(
    "gemma2_2b",
    "Gemma2Model",
    "Gemma2Config",
    {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 256},
)

LUMINA = ArchSpec(
    name="lumina",
    title="Lumina Image 2.0",
    entry="lora_lumina",
    signatures=(Signature("NextDiT"), Signature("Lumina2Transformer2DModel")),
    timestep=Timestep(("t", "timestep"), noise=0.0, clean=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("JointTransformerBlock", "FinalLayer", "Lumina2TransformerBlock", "LuminaLayerNormContinuous"),
        layouts=DIFFUSERS,
    ),
    text_encoders=(
        Part(
            "text_encoder",
            "lora_te",
            GEMMA2,
            roots=("text_encoders.gemma2_2b.transformer.model.", "model.", ""),
            diffusers="",
            file_roots=(
                "lora_te.",
                "lora_te_model_",
                "lora_te1_",
                "lora_te1.",
                "text_encoder.",
                "text_encoder.model.",
                "gemma2_2b.",
                "gemma2_2b.transformer.model.",
                "text_encoders.gemma2_2b.",
            ),  # fmt: skip
            # What enters the last layer is read.
            unread=(Unread(r"layers\.(\d+)\..*"), Unread("norm")),
        ),
    ),
    axes=(BlockAxis("layers."),),
    switches=(Switch("exclude_mod", r".*adaLN_modulation\..*", trained_if=False, default=True),),
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
    kinds=frozenset({13}),
    releases=(
        Release("lumina", "Lumina Image 2.0", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, (GEMMA2_2B,)),
    ),
    start=Start(
        "--network_dim 8 --network_alpha 8 --learning_rate 1e-4 --timestep_sampling nextdit_shift "
        "--discrete_flow_shift 6.0 --model_prediction_type raw",
        "docs/lumina_train_network.md",
    ),
)
