"""Kandinsky 5, under the trainer's classes and diffusers'; the names of the layers are the same."""

from __future__ import annotations

from .spec import ArchSpec, BlockAxis, Part, Signature, Switch, Timestep

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
)
