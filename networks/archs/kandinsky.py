"""Kandinsky 5, under the trainer's classes and diffusers'; the names of the layers are the same."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Switch, Timestep

_LATENTS = {"in_visual_dim": 16, "out_visual_dim": 16}

KANDINSKY = ArchSpec(
    name="kandinsky",
    title="Kandinsky 5",
    entry="lora_kandinsky",
    signatures=(Signature("DiffusionTransformer3D"), Signature("Kandinsky5Transformer3DModel")),
    timestep=Timestep(("time", "timestep")),
    denoiser=Part(
        "dit",
        "lora_unet",
        (
            "TransformerEncoderBlock",
            "TransformerDecoderBlock",
            "Kandinsky5TransformerEncoderBlock",
            "Kandinsky5TransformerDecoderBlock",
        ),
    ),
    axes=(BlockAxis("text_transformer_blocks."), BlockAxis("visual_transformer_blocks.", None)),
    switches=(Switch("exclude_mod", r".*\.(text|visual)_modulation\..*", trained_if=False),),
    usual=frozenset({332, 512, 624}),
    kinds=frozenset({16}),
    releases=(
        Release(
            "kandinsky",
            "Kandinsky 5 Pro",
            "Kandinsky5Transformer3DModel",
            {**_LATENTS, "model_dim": 4096, "ff_dim": 16384, "time_dim": 1024, "visual_cond": True}
            | {"num_text_blocks": 4, "num_visual_blocks": 60},
        ),
        Release(
            "kandinsky_lite",
            "Kandinsky 5 Lite, video",
            "Kandinsky5Transformer3DModel",
            {**_LATENTS, "model_dim": 1792, "ff_dim": 7168, "visual_cond": True},
        ),
        Release(
            "kandinsky_lite_image",
            "Kandinsky 5 Lite, image",
            "Kandinsky5Transformer3DModel",
            {**_LATENTS, "model_dim": 2560, "ff_dim": 10240, "num_visual_blocks": 50},
        ),
    ),
    start=Start(
        "--network_dim 32 --network_alpha 32 --learning_rate 1e-4 --timestep_sampling shift --discrete_flow_shift 5.0",
        "docs/kandinsky5.md",
    ),
)
