"""stable-diffusion-webui-forge: the loader of an earlier ComfyUI.

It has no rotations, stops where that goes on without a layer, and takes nothing of a file with more than twelve keys
that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...archs.places import DIFFUSERS
from .comfyui import CLIP, FLUX_BLOCKS, UNET
from .patcher import (
    BESIDE,
    BIAS,
    DORA,
    FACTORS,
    KERNEL,
    LOKR_TUCKER,
    MISFIT,
    SCALES,
    SWAPPED,
    TUCKER,
    UNREAD,
    UNREAD_MAGNITUDE,
    Encoder,
    Model,
    Names,
    Patcher,
)  # fmt: skip

CLIP_L = Encoder("", ("lora_te_", "lora_te1_", "text_encoder."), CLIP)
CLIP_G = Encoder("", ("lora_te2_", "text_encoder_2."), CLIP)
T5 = Encoder("", ("lora_te1_", "lora_te2_", "lora_te3_"))
_NORMS = r".*\.norm\.(query|key)_norm"  # whose tensors are called scale
MODELS: Mapping[str, Model] = {
    "sd": Model(UNET, (CLIP_L,)),
    "sdxl": Model(UNET, (CLIP_L, CLIP_G)),
    "flux": Model(
        (Names(("transformer.", "lycoris_", "lora_transformer_"), DIFFUSERS, FLUX_BLOCKS),), (CLIP_L, T5), _NORMS
    ),
    "chroma": Model((), (None, T5), _NORMS),
    "sd3": Model((), (CLIP_L, CLIP_G, T5)),
}
# Of LoRA it does not know all names of its factors.
SUFFIXES = (FACTORS | BESIDE) - {
    *(f"lora_{letter}" for letter in "AB"),
    *(f"lora_{letter}.default.weight" for letter in "AB"),
    "reshape_weight",
}
STOPPING = tuple(replace(form, stops=True) for form in (LOKR_TUCKER, MISFIT))
FORMS = (UNREAD, UNREAD_MAGNITUDE, TUCKER, *STOPPING, SWAPPED, KERNEL, DORA, *SCALES, BIAS)
READERS = (Patcher("forge", "Forge 2025-06", 40, MODELS, SUFFIXES, FORMS, unmatched=12),)
