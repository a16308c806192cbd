"""Lens, under the one class that all programs have."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature, Start, Switch, Timestep, Unread

LENS = ArchSpec(
    name="lens",
    title="Lens",
    entry="lora_lens",
    signatures=(Signature("LensTransformer2DModel"),),
    timestep=Timestep(("timestep",), noise=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("LensTransformerBlock",),
        diffusers="",
        # Behind the last block the picture goes on alone; of its txt_qkv, keys and values are read.
        unread=(Unread(r"transformer_blocks\.(\d+)\.(attn\.(to_add_out|norm_added_q)|txt_norm2|txt_mlp\..*)"),),
    ),
    axes=(BlockAxis("transformer_blocks."),),
    switches=(Switch("exclude_mod", r".*\.(img|txt)_mod\..*", trained_if=False),),
    fused_rows=(FusedRows(r"transformer_blocks\..*_qkv", 1, 2),),
    usual=frozenset({480}),
    kinds=frozenset({6}),
    releases=(Release("lens", "Lens", "", also=("lens-turbo",)),),
    start=Start("--network_dim 16 --network_alpha 16 --learning_rate 1e-4", "docs/lens.md"),
)
