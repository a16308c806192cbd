"""Sizes of released models: enough to build each of them without weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Module = tuple[str, tuple[int, ...]]  # a class, of torch if it has sizes, and its sizes


@dataclass(frozen=True)
class Encoder:
    """A text encoder: its class in transformers, the class of its configuration, and its sizes."""

    cls: str
    config: str
    sizes: dict[str, Any]


@dataclass(frozen=True)
class Release:
    """A released model.

    Attributes:
        denoiser: its class in diffusers.
        sizes: where they are not that class's defaults.
        text_encoders: those which trainers can train, in their order; None where the place stays empty.
        added: modules that the trainer's denoiser has and diffusers' has not: by dotted name.
    """

    title: str
    denoiser: str
    sizes: dict[str, Any] = field(default_factory=dict)
    text_encoders: tuple[Encoder | None, ...] = ()
    added: dict[str, Module] = field(default_factory=dict)


def _clip(width: int, layers: int, heads: int, cls: str = "CLIPTextModel") -> Encoder:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return Encoder(cls, "CLIPTextConfig", sizes | {"num_hidden_layers": layers, "num_attention_heads": heads})


_CLIP_L, _CLIP_H = _clip(768, 12, 12), _clip(1024, 23, 16)
_CLIP_L_PROJECTED = _clip(768, 12, 12, "CLIPTextModelWithProjection")
_CLIP_G = _clip(1280, 32, 20, "CLIPTextModelWithProjection")
_T5_XXL = Encoder(
    "T5EncoderModel",
    "T5Config",
    {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
)
_GEMMA2 = Encoder(
    "Gemma2Model",
    "Gemma2Config",
    {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 256},
)
_QWEN3 = Encoder(
    "Qwen3Model",
    "Qwen3Config",
    {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128},
)


def _llm_adapter(blocks: int = 6, width: int = 1024, head: int = 64) -> dict[str, Module]:
    """Between Anima's text encoder and its denoiser; in diffusers a model of its own."""
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


_SD = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
_SDXL = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

RELEASES: dict[str, Release] = {
    "sd15": Release(
        "Stable Diffusion 1.5",
        "UNet2DConditionModel",
        {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8},
        (_CLIP_L,),
    ),
    "sd21": Release(
        "Stable Diffusion 2.1",
        "UNet2DConditionModel",
        {**_SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        (_CLIP_H,),
    ),
    "sdxl": Release("Stable Diffusion XL", "UNet2DConditionModel", _SDXL, (_CLIP_L, _CLIP_G)),
    "flux": Release("FLUX.1 dev", "FluxTransformer2DModel", {"guidance_embeds": True}, (_CLIP_L, _T5_XXL)),
    "chroma": Release("Chroma", "ChromaTransformer2DModel", {}, (None, _T5_XXL)),
    "sd3": Release(
        "Stable Diffusion 3.5 medium",
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
        | {"dual_attention_layers": tuple(range(13))},
        (_CLIP_L_PROJECTED, _CLIP_G, _T5_XXL),
    ),
    "lumina": Release("Lumina Image 2.0", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, (_GEMMA2,)),
    "hunyuan_image": Release("HunyuanImage 2.1", "HunyuanImageTransformer2DModel", {"guidance_embeds": True}),
    "anima": Release(
        "Anima",
        "CosmosTransformer3DModel",
        {"in_channels": 16, "num_attention_heads": 16, "num_layers": 28, "text_embed_dim": 1024}
        | {"extra_pos_embed_type": None},
        (_QWEN3,),
        _llm_adapter(),
    ),
    "wan": Release(
        "Wan 2.1 image to video, 14B",
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "qwen_image": Release("Qwen-Image", "QwenImageTransformer2DModel"),
    "hunyuan_video": Release("HunyuanVideo", "HunyuanVideoTransformer3DModel"),
    "hv_1_5": Release("HunyuanVideo 1.5", "HunyuanVideo15Transformer3DModel"),
    "framepack": Release("FramePack", "HunyuanVideoFramepackTransformer3DModel"),
    "flux_2": Release("FLUX.2 dev", "Flux2Transformer2DModel"),
    "zimage": Release("Z-Image", "ZImageTransformer2DModel"),
    "kandinsky": Release(
        "Kandinsky 5 Pro",
        "Kandinsky5Transformer3DModel",
        {"model_dim": 4096, "ff_dim": 16384, "num_text_blocks": 4, "num_visual_blocks": 60, "time_dim": 1024},
    ),
    "krea2": Release("Krea 2", "Krea2Transformer2DModel"),
    "ideogram4": Release("Ideogram 4", "Ideogram4Transformer2DModel"),
    "ace_step": Release("ACE-Step 1.5", "AceStepTransformer1DModel"),
}
