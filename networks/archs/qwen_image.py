"""Qwen-Image with its Edit and Layered models; the trainer's classes have diffusers' names."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Switch, Timestep, Unread

QWEN_IMAGE = ArchSpec(
    name="qwen_image",
    title="Qwen-Image",
    entry="lora_qwen_image",
    signatures=(Signature("QwenImageTransformer2DModel"),),
    timestep=Timestep(("timestep",), noise=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("QwenImageTransformerBlock",),
        # Behind the last block the picture goes on alone: the text of that block ends as keys and values.
        unread=(
            Unread(
                r"transformer_blocks\.(\d+)\.(attn\.(add_q_proj|to_add_out|norm_added_q)|txt_norm2|txt_mlp\..*)",
            ),
        ),
    ),
    axes=(BlockAxis("transformer_blocks."),),
    # The trainer's own default pattern, .*(_mod_).*, is tested on img_mod.1 and matches nothing, so that its files
    # have these layers; they load whole, since a file decides its layers.
    switches=(Switch("exclude_mod", r".*\.(img|txt)_mod\..*", trained_if=False),),
    usual=frozenset({720}),
    kinds=frozenset({12}),
    releases=(
        Release(
            "qwen_image", "Qwen-Image", "QwenImageTransformer2DModel", also=("qwen-image-edit", "qwen-image-layered")
        ),
    ),
    start=Start(
        "--network_dim 16 --network_alpha 1 --learning_rate 5e-5 --timestep_sampling shift "
        "--discrete_flow_shift 2.2 --weighting_scheme none",
        "docs/qwen_image.md",
    ),
)
