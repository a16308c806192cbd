"""Mage-Flow and Mage-Flow-Edit, under the trainer's class and those of other programs, whose blocks are the same.

musubi-tuner's own module refuses files with more layers than are trained here by default.
"""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Switch, Timestep, Unread

MAGE_FLOW = ArchSpec(
    name="mage_flow",
    title="Mage-Flow",
    entry="lora_mage_flow",
    signatures=(Signature("MageFlow"), Signature("MageFlowTransformer2DModel")),
    timestep=Timestep(("packed.timesteps", "timesteps", "timestep"), noise=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("MageFlowTransformerBlock",),
        diffusers="",
        # As in Qwen-Image, whose blocks these are.
        unread=(
            Unread(r"transformer_blocks\.(\d+)\.(attn\.(add_q_proj|to_add_out|norm_added_q)|txt_norm2|txt_mlp\..*)"),
        ),
    ),
    axes=(BlockAxis("transformer_blocks."),),
    switches=(Switch("exclude_mod", r".*\.(img|txt)_mod\..*", trained_if=False),),
    usual=frozenset({144}),
    kinds=frozenset({12}),
    releases=(
        Release("mage_flow", "Mage-Flow", "", also=("mage-flow-edit", "mage-flow-turbo", "mage-flow-edit-turbo")),
    ),
    start=Start(
        "--network_dim 32 --network_alpha 32 --learning_rate 1e-4 --timestep_sampling uniform_shift "
        "--discrete_flow_shift 6 --weighting_scheme none",
        "docs/mage_flow.md",
    ),
)
