"""Wan 2.1 and 2.2, under the trainer's classes and diffusers'. The two experts of 2.2 are two models of this kind."""

from __future__ import annotations

from .spec import ArchSpec, BlockAxis, Part, Rename, Signature

BLOCK = r"(blocks\.\d+)\."

WAN = ArchSpec(
    name="wan",
    title="Wan 2.1 / 2.2",
    entry="lora_wan",
    signatures=(Signature("WanModel"), Signature("WanTransformer3DModel")),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("WanAttentionBlock", "WanTransformerBlock"),
        layouts=(
            Rename(BLOCK + r"attn1\.to_([qkv])", r"\1.self_attn.\2"),
            Rename(BLOCK + r"attn1\.to_out\.0", r"\1.self_attn.o"),
            Rename(BLOCK + r"attn2\.to_([qkv])", r"\1.cross_attn.\2"),
            Rename(BLOCK + r"attn2\.to_out\.0", r"\1.cross_attn.o"),
            Rename(BLOCK + r"attn2\.add_([kv])_proj", r"\1.cross_attn.\2_img"),
            Rename(BLOCK + r"ffn\.net\.0\.proj", r"\1.ffn.0"),
            Rename(BLOCK + r"ffn\.net\.2", r"\1.ffn.2"),
        ),
    ),
    axes=(BlockAxis("blocks."),),
    usual=frozenset({300, 400, 480}),
)
