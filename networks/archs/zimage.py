"""Z-Image; the trainer's classes have diffusers' names."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Switch, Timestep
from .spellings import Rename, below, divided

COMFYUI = (
    *below(
        r"(layers|noise_refiner|context_refiner)\.(\d+)\.attention\.",
        r"\1.\2.attention.",
        *divided("qkv", ("to_q", "to_k", "to_v")),
        Rename("out", "to_out.0"),
        Rename("q_norm", "norm_q"),
        Rename("k_norm", "norm_k"),
    ),
    *below(
        "",
        "",
        Rename("x_embedder", "all_x_embedder.2-1"),
        Rename("final_layer.linear", "all_final_layer.2-1.linear"),
        Rename("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    ),
)

ZIMAGE = ArchSpec(
    name="zimage",
    title="Z-Image",
    entry="lora_zimage",
    signatures=(Signature("ZImageTransformer2DModel"),),
    timestep=Timestep(("t",), noise=0.0, clean=1.0),
    denoiser=Part("dit", "lora_unet", ("ZImageTransformerBlock",), comfyui=COMFYUI, comfyui_divides=True),
    axes=(BlockAxis("layers."),),
    switches=(
        Switch("exclude_mod", r".*\.adaLN_modulation\..*", trained_if=False),
        Switch("include_refiner", r"(noise|context)_refiner\..*", trained_if=True),
    ),
    usual=frozenset({210}),
    kinds=frozenset({5}),
    releases=(Release("zimage", "Z-Image", "ZImageTransformer2DModel", also=("z-image-turbo", "z-image-base")),),
    start=Start(
        "--network_dim 32 --network_alpha 1 --learning_rate 1e-4 --timestep_sampling shift "
        "--discrete_flow_shift 2.0 --weighting_scheme none",
        "docs/zimage.md",
    ),
)
