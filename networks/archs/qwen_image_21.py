"""Qwen-Image 2.1; the trainer's classes have diffusers' names. It has one stream, and one modulation for all blocks."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Timestep
from .spellings import below, divided

COMFYUI = below(
    r"transformer_blocks\.(\d+)\.img_mlp\.",
    r"transformer_blocks.\1.img_mlp.",
    *divided("gate_up", ("gate_layer", "proj")),
)

QWEN_IMAGE_21 = ArchSpec(
    name="qwen_image_21",
    title="Qwen-Image 2.1",
    entry="lora_qwen_image_21",
    signatures=(Signature("QwenImage21Transformer2DModel"),),
    timestep=Timestep(("timestep",), noise=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("QwenImage21TransformerBlock",),
        comfyui=COMFYUI,
        comfyui_divides=True,
        comfyui_root="transformer.",  # behind the other root it knows only its own layers
    ),
    axes=(BlockAxis("transformer_blocks."),),
    usual=frozenset({224}),
    kinds=frozenset({7}),
    releases=(Release("qwen_image_21", "Qwen-Image 2.1", "QwenImage21Transformer2DModel", also=("qwen-image-2.1",)),),
    start=Start(
        "--network_dim 16 --network_alpha 16 --learning_rate 1e-4 --timestep_sampling shift "
        "--discrete_flow_shift 3.0 --weighting_scheme none",
        "docs/qwen_image_21.md",
    ),
)
