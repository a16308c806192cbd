"""Anima, under the trainers' classes and diffusers'. The text encoder is Qwen3.

The adapter between the two is trained on request; in diffusers it is a model of its own, which is not trained.
"""

from __future__ import annotations

from .releases import Encoder, Module, Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Switch, Timestep
from .spellings import Rename, below, subtrees

QWEN3 = ("Qwen3Attention", "Qwen3MLP", "Qwen3SdpaAttention", "Qwen3FlashAttention2")

BLOCK = below(
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
DIFFUSERS = (
    *BLOCK,
    *below(
        "",
        "",
        Rename("patch_embed.proj", "x_embedder.proj.1"),
        Rename("time_embed.t_embedder.linear_1", "t_embedder.1.linear_1"),
        Rename("time_embed.t_embedder.linear_2", "t_embedder.1.linear_2"),
        Rename("time_embed.norm", "t_embedding_norm"),
        Rename("norm_out.linear_1", "final_layer.adaln_modulation.1"),
        Rename("norm_out.linear_2", "final_layer.adaln_modulation.2"),
        Rename("proj_out", "final_layer.linear"),
    ),
)

QWEN3_06B = Encoder(
    "qwen3_06b",
    "Qwen3Model",
    "Qwen3Config",
    {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128},
)


def _llm_adapter(blocks: int = 6, width: int = 1024, head: int = 64) -> dict[str, Module]:
    """Between the text encoder and the denoiser; in diffusers a model of its own."""
    attention: dict[str, Module] = {f"{name}_proj": ("Linear", (width, width)) for name in "qkvo"}
    attention |= {f"{name}_norm": ("RMSNorm", (head,)) for name in "qk"}
    block: dict[str, Module] = {
        f"{kind}_attn.{name}": module for kind in ("self", "cross") for name, module in attention.items()
    }
    block |= {"mlp.0": ("Linear", (width, 4 * width)), "mlp.2": ("Linear", (4 * width, width))}
    block |= {f"norm_{name}": ("RMSNorm", (width,)) for name in ("self_attn", "cross_attn", "mlp")}
    modules: dict[str, Module] = {}
    for i in range(blocks):
        modules[f"blocks.{i}"] = "LLMAdapterTransformerBlock", ()
        modules |= {f"blocks.{i}.{name}": module for name, module in block.items()}
    modules |= {"out_proj": ("Linear", (width, width)), "norm": ("RMSNorm", (width,))}
    return {f"llm_adapter.{name}": module for name, module in modules.items()}


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
        # diffusers' pipeline has that adapter as a model of its own, under this name.
        others=(("diffusers, its text conditioner", subtrees((("text_conditioner.", "llm_adapter."),))),),
        optional=(("train_llm_adapter", ("LLMAdapterTransformerBlock",)),),
        # Below PatchEmbed, TimestepEmbedding and FinalLayer in the trainer's model alone.
        loose=(
            "x_embedder.proj.1",
            "t_embedder.1.linear_1",
            "t_embedder.1.linear_2",
            "final_layer.linear",
            "final_layer.adaln_modulation.1",
            "final_layer.adaln_modulation.2",
        ),
    ),
    text_encoders=(
        Part(
            "text_encoder",
            "lora_te",
            QWEN3,
            roots=("text_encoders.qwen3_06b.transformer.model.", "model.", ""),
            diffusers="",
            file_roots=(
                "lora_te.",
                "lora_te_model_",
                "lora_te1_",
                "lora_te1.",
                "text_encoder.",
                "text_encoder.model.",
                "qwen3_06b.",
                "qwen3_06b.transformer.model.",
                "text_encoders.qwen3_06b.",
            ),  # fmt: skip
        ),
    ),
    axes=(BlockAxis("blocks."),),
    exclude=(r".*(_norm|_embedder|final_layer).*",),
    switches=(Switch("exclude_mod", r".*_modulation.*", trained_if=False),),
    usual=frozenset({280}),
    kinds=frozenset({9}),
    releases=(
        Release(
            "anima",
            "Anima",
            "CosmosTransformer3DModel",
            {"in_channels": 16, "num_attention_heads": 16, "num_layers": 28, "text_embed_dim": 1024}
            | {"extra_pos_embed_type": None},
            (QWEN3_06B,),
            _llm_adapter(),
        ),
    ),
    start=Start(
        "--network_dim 8 --network_alpha 1 --learning_rate 1e-4 --timestep_sampling sigmoid --discrete_flow_shift 1.0",
        "docs/anima_train_network.md",
    ),
)
