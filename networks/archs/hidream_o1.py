"""HiDream-O1: a language model that draws pixels. Its trainer marks the model with the task; diffusers has no class.

ComfyUI's names begin below `model`.
"""

from __future__ import annotations

from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature, Start, Timestep
from .spellings import subtrees

VISION = ("Qwen3VLVisionPatchEmbed", "Qwen3VLVisionBlock", "Qwen3VLVisionPatchMerger")

HIDREAM_O1 = ArchSpec(
    name="hidream_o1",
    title="HiDream-O1",
    entry="lora_hidream_o1",
    # The language model alone has the same class.
    signatures=(Signature("Qwen3VLForConditionalGeneration", has=("model.x_embedder",)),),
    timestep=Timestep(("timestep",), noise=0.0, clean=1.0),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("Qwen3VLTextDecoderLayer", "BottleneckPatchEmbed", "FinalLayer"),
        tasks=(("hidream_o1_task", "i2i", VISION),),
        comfyui=subtrees(
            tuple(
                (top, f"model.{top}")
                for top in ("language_model.", "visual.", "x_embedder.", "t_embedder1.", "final_layer2.")
            )
        ),
        diffusers="",
    ),
    axes=(BlockAxis("model.language_model.layers."), BlockAxis("model.visual.blocks.", None)),
    fused_rows=(FusedRows(r"model\.visual\..*\.qkv", 1, 2),),
    usual=frozenset({255, 365, 371}),  # a single file lacks the six layers of deepstack_merger_list
    kinds=frozenset({9, 13, 14}),
    start=Start(
        "--network_dim 32 --network_alpha 1 --learning_rate 4e-5 --timestep_sampling uniform "
        "--weighting_scheme none --noise_scale_start 8.0 --noise_scale_end 8.0 --noise_clip_std 0.0",
        "docs/hidream_o1.md",
    ),
)
