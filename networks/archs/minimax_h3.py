"""MiniMax-H3, video with sound, under the trainer's classes, which are ComfyUI's and the release's, and diffusers'."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, ByHead, FusedRows, Part, Signature, Start, Switch, Timestep
from .spellings import Rename, Swap, below, fused

BLOCK = (
    *fused(("attn.to_q", "attn.to_k", "attn.to_v"), "attn.qkv_proj"),
    Rename("attn.to_out.0", "attn.out_proj"),
    Rename("ff.net.0.proj", "mlp.fc1", swapped=Swap.ALWAYS),  # gate and value
    Rename("ff.net.2", "mlp.fc2"),
    Rename("attn.norm_q", "attn.q_norm"),
    Rename("attn.norm_k", "attn.k_norm"),
)
DIFFUSERS = (
    *below(
        r"transformer_blocks\.(\d+)\.",
        r"blocks.\1.",
        *BLOCK,
        *(Rename(name, name) for name in ("adaln_proj.linear", "norm1", "norm2")),
    ),
    *below(
        r"token_refiner\.refiner_blocks\.(\d+)\.",
        r"token_refiner.blocks.\1.",
        *BLOCK,
        *(Rename(name, name) for name in ("norm1", "norm2")),
    ),
    *below(
        "",
        "",
        Rename("proj_in", "video_patch_proj"),
        Rename("audio_proj_in", "audio_patch_proj"),
        Rename("context_embedder", "condition_proj"),
        Rename("time_embedder.linear_1", "time_embedder.proj_in"),
        Rename("time_embedder.linear_2", "time_embedder.proj_out"),
        Rename("norm_out.norm", "final_layer.norm"),
        Rename("norm_out.linear", "final_layer.adaln_proj.linear"),
        Rename("proj_out", "final_layer.video_out"),
        Rename("audio_proj_out", "final_layer.audio_out"),
    ),
)

MINIMAX_H3 = ArchSpec(
    name="minimax_h3",
    title="MiniMax-H3",
    entry="lora_minimax_h3",
    signatures=(Signature("MiniMaxH3Model"), Signature("MiniMaxH3Transformer3DModel")),
    # diffusers' class is given the distinct times of a pass: of video, sound, what they are made from.
    timestep=Timestep(("model_t_video", "timestep"), noise=0.0, clean=1.0, shared=True),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("DiTBlock", "MiniMaxH3TransformerBlock"),
        layouts=DIFFUSERS,
        optional=(("include_refiner", ("RefinerBlock", "MiniMaxH3TokenRefinerBlock")),),
    ),
    axes=(BlockAxis("blocks."),),
    switches=(Switch("exclude_mod", r".*\.adaln_proj\..*", trained_if=False),),
    fused_rows=(FusedRows(r"(token_refiner\.)?blocks\..*\.qkv_proj", 0, 3),),
    # DiffSynth trains the rows as the released shards have them, which all others put in order while they load them.
    by_head=(ByHead(r"\.lora_[AB]\.default\.weight$", r"lora_unet_(token_refiner_)?blocks_\d+_attn_qkv_proj", 3, 128),),
    usual=frozenset({200}),
    kinds=frozenset({3}),
    releases=(
        Release(
            "minimax_h3",
            "MiniMax-H3",
            "MiniMaxH3Transformer3DModel",
            also=("minimax-h3-t2va", "minimax-h3-fl2va", "minimax-h3-ref2va"),
        ),
    ),
    start=Start("--network_dim 16 --network_alpha 16 --learning_rate 1e-4", "docs/minimax_h3.md"),
)
