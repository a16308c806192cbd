"""Krea 2, under the trainer's classes and diffusers'. Every Linear is trained; the modulation is bare parameters."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Timestep
from .spellings import Rename, below

BLOCK = (
    Rename("attn.to_q", "attn.wq"),
    Rename("attn.to_k", "attn.wk"),
    Rename("attn.to_v", "attn.wv"),
    Rename("attn.to_gate", "attn.gate"),
    Rename("attn.to_out.0", "attn.wo"),
    Rename("ff.gate", "mlp.gate"),
    Rename("ff.up", "mlp.up"),
    Rename("ff.down", "mlp.down"),
    Rename("norm1", "prenorm"),
    Rename("norm2", "postnorm"),
    Rename("attn.norm_q", "attn.qknorm.qnorm"),
    Rename("attn.norm_k", "attn.qknorm.knorm"),
)
DIFFUSERS = (
    *below(r"transformer_blocks\.(\d+)\.", r"blocks.\1.", *BLOCK),
    *below(r"text_fusion\.(layerwise|refiner)_blocks\.(\d+)\.", r"txtfusion.\1_blocks.\2.", *BLOCK),
    *below(
        "",
        "",
        Rename("img_in", "first"),
        Rename("time_embed.linear_1", "tmlp.0"),
        Rename("time_embed.linear_2", "tmlp.2"),
        Rename("time_mod_proj", "tproj.1"),
        Rename("text_fusion.projector", "txtfusion.projector"),
        Rename("txt_in.linear_1", "txtmlp.1"),
        Rename("txt_in.linear_2", "txtmlp.3"),
        Rename("final_layer.linear", "last.linear"),
        Rename("txt_in.norm", "txtmlp.0"),
        Rename("final_layer.norm", "last.norm"),
    ),
)

KREA2 = ArchSpec(
    name="krea2",
    title="Krea 2",
    entry="lora_krea2",
    signatures=(Signature("SingleStreamDiT"), Signature("Krea2Transformer2DModel")),
    timestep=Timestep(("t", "timestep"), noise=1.0),
    denoiser=Part("dit", "lora_unet", ("SingleStreamDiT", "Krea2Transformer2DModel"), layouts=DIFFUSERS),
    axes=(BlockAxis("blocks."),),
    usual=frozenset({264}),
    kinds=frozenset({30}),
    releases=(Release("krea2", "Krea 2", "Krea2Transformer2DModel"),),
    start=Start(
        "--network_dim 32 --network_alpha 32 --learning_rate 1e-4 --timestep_sampling shift "
        "--discrete_flow_shift 2.5 --weighting_scheme none",
        "docs/krea2.md",
    ),
)
