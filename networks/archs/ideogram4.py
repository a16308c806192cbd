"""Ideogram 4, under the trainer's classes and diffusers'."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature, Start, Switch, Timestep
from .spellings import Rename, below, fused

IDEOGRAM4 = ArchSpec(
    name="ideogram4",
    title="Ideogram 4",
    entry="lora_ideogram4",
    signatures=(Signature("Ideogram4Transformer"), Signature("Ideogram4Transformer2DModel")),
    timestep=Timestep(("t", "timestep"), noise=0.0, clean=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("Ideogram4TransformerBlock",),
        layouts=below(
            r"layers\.(\d+)\.attention\.",
            r"layers.\1.attention.",
            *fused(("to_q", "to_k", "to_v"), "qkv"),
            Rename("to_out.0", "o"),
        ),
    ),
    axes=(BlockAxis("layers."),),
    switches=(Switch("exclude_mod", r".*\.adaln_modulation", trained_if=False),),
    fused_rows=(FusedRows(r"layers\..*\.qkv", 1, 2),),
    usual=frozenset({170}),
    kinds=frozenset({3}),
    releases=(Release("ideogram4", "Ideogram 4", "Ideogram4Transformer2DModel"),),
    start=Start("--network_dim 32 --network_alpha 32 --learning_rate 1e-4"),
)
