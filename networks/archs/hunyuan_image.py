"""HunyuanImage 2.1, under the trainers' classes. Its text encoders are never trained."""

from __future__ import annotations

from .spec import ArchSpec, BlockAxis, FusedRows, Part, Signature

DOUBLE_BLOCKS = 20

HUNYUAN_IMAGE = ArchSpec(
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    entry="lora_hunyuan_image",
    signatures=(Signature("HYImageDiffusionTransformer"),),
    denoiser=Part("dit", "lora_unet", ("MMDoubleStreamBlock", "MMSingleStreamBlock")),
    axes=(BlockAxis("double_blocks."), BlockAxis("single_blocks.", DOUBLE_BLOCKS)),
    block_sets=(("double", r"double_blocks\..*"), ("single", r"single_blocks\..*")),
    fused_rows=(FusedRows(r"double_blocks\..*_qkv", 1, 2), FusedRows(r"single_blocks\..*\.linear1", 3, 1)),
    usual=frozenset({320}),
)
