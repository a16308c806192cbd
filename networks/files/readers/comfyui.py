"""ComfyUI: layers by the names of its own classes and, on some architectures, of diffusers'."""

from __future__ import annotations

from collections.abc import Mapping

from ...archs.places import DIFFUSERS
from .patcher import (
    BESIDE,
    BIAS,
    DORA,
    FACTORS,
    KERNEL,
    LOKR_TUCKER,
    MISFIT,
    ROTATIONS,
    SCALES,
    SWAPPED,
    TUCKER,
    TURNS,
    UNREAD,
    UNREAD_MAGNITUDE,
    Encoder,
    Model,
    Names,
    Patcher,
)  # fmt: skip

CLIP = r"text_model\.encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(q|k|v|out)_proj)"
CLIP_L = Encoder("clip_l.transformer.", ("lora_te_", "lora_te1_", "text_encoder."), CLIP)
CLIP_G = Encoder("clip_g.transformer.", ("lora_te2_", "text_encoder_2."), CLIP)
UNET = (
    Names(("lora_unet_", "lycoris_"), DIFFUSERS),
    Names(("", "unet."), DIFFUSERS, change=((r"\.to_", ".processor.to_"), (r"(\.to_out)\.0$", r"\1"))),
)


def t5(*forms: str) -> Encoder:
    return Encoder("t5xxl.transformer.", forms)


_ANY = ("diffusion_model.", "transformer.", "lycoris_", "")
_DIT = ("transformer.", "lycoris_", "lora_transformer_", "")
FLUX_BLOCKS = (
    r"(single_)?transformer_blocks\..*|x_embedder|context_embedder|proj_out|norm_out\.linear|time_text_embed\..*"
)
_LUMINA_BLOCKS = (
    r"((layers|context_refiner|noise_refiner)\.\d+\.(attention_norm[12]|ffn_norm[12]|feed_forward\.w[123])"
    r"|cap_embedder\.[01]|t_embedder\.mlp\.[02])"
)
_PIPE = Names(
    ("transformer.", "diffusion_model."),
    change=(
        (r"_mod\.lin$", "_mod.linear"),
        (r"_attn\.(qkv|proj)$", r"_attn_\1"),
        (r"mlp\.0$", "mlp.fc1"),
        (r"mlp\.2$", "mlp.fc2"),
        (r"\.modulation\.lin$", ".modulation.linear"),
    ),
)
MODELS: Mapping[str, Model] = {
    "sd": Model(UNET, (CLIP_L,)),
    "sdxl": Model(UNET, (CLIP_L, CLIP_G)),
    "flux": Model((Names(_DIT, DIFFUSERS, FLUX_BLOCKS),), (CLIP_L, t5("lora_te2_", "lora_te3_"))),
    "chroma": Model((Names(_DIT, DIFFUSERS, FLUX_BLOCKS),), (None, t5("lora_te1_"))),
    "flux_2": Model((Names(_DIT, DIFFUSERS, FLUX_BLOCKS),)),
    "sd3": Model(
        (Names(("transformer.", "base_model.model.", "lora_transformer_", "lycoris_"), DIFFUSERS),),
        (CLIP_L, CLIP_G, t5("lora_te3_")),
    ),
    "qwen_image": Model((Names(("", "transformer.", "lycoris_")),)),
    "qwen_image_21": Model((Names(("", "transformer.", "lycoris_"), DIFFUSERS),)),
    "minimax_h3": Model((Names(("",)),)),
    "mage_flow": Model((Names(("", "transformer.", "lycoris_")),)),
    "lens": Model(),
    "wan": Model(),
    "hunyuan_video": Model((_PIPE,)),
    "hv_1_5": Model((_PIPE,)),
    "hunyuan_image": Model(),
    # It has no model of FramePack; files are used with HunyuanVideo's, which has no layers for frames and images.
    "framepack": Model((_PIPE,), hidden=r"(image_projection|clean_x_embedder)\..*"),
    "lumina": Model(
        (Names(("transformer.", "lycoris_", ""), only=_LUMINA_BLOCKS),),
        (Encoder("gemma2_2b.transformer.model.", ("lora_te_",)),),
    ),
    "zimage": Model((Names(_ANY, DIFFUSERS),)),
    "anima": Model((), (Encoder("qwen3_06b.transformer.model.", ("lora_te_",)),)),
    "ace_step": Model((Names(("base_model.model.", "lycoris_"), change=((r"^decoder\.", ""),)),)),
    "ernie_image": Model((Names(("transformer.",)),)),
    "kandinsky": Model((Names(("", "transformer.")),)),
    "krea2": Model(
        (
            Names(_ANY, DIFFUSERS),
            Names(_ANY, DIFFUSERS, r".*\.to_out\.0", ((r"\.0$", ""),)),
        ),
        hidden=r".*\.(prenorm|postnorm|qnorm|knorm)|txtmlp\.0|last\.norm",
    ),
    "ideogram4": Model(),
    "ltx_video": Model((Names(("",)),)),
    "ltx2": Model((Names(("",)),)),
    "hidream_o1": Model(hidden=r"visual\.deepstack_merger_list\..*|lm_head"),
}

FORMS = (
    UNREAD, UNREAD_MAGNITUDE, TUCKER, LOKR_TUCKER, MISFIT, SWAPPED, KERNEL, DORA, *TURNS, *SCALES, BIAS,
)  # fmt: skip
READERS = (Patcher("comfyui", "ComfyUI 0.29.0", 10, MODELS, FACTORS | ROTATIONS | BESIDE, FORMS),)
