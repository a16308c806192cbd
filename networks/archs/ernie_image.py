"""ERNIE-Image; the trainer's classes have diffusers' names. One modulation layer serves all blocks."""

from __future__ import annotations

from .releases import Release
from .spec import ArchSpec, BlockAxis, Part, Signature, Start, Switch, Timestep

ERNIE_IMAGE = ArchSpec(
    name="ernie_image",
    title="ERNIE-Image",
    entry="lora_ernie_image",
    signatures=(Signature("ErnieImageTransformer2DModel"),),
    timestep=Timestep(("timestep",)),
    denoiser=Part(
        "dit",
        "lora_unet",
        ("ErnieImageSharedAdaLNBlock", "ErnieImageAdaLNModulation", "ErnieImageAdaLNContinuous"),
        loose=("adaLN_modulation.1",),  # below ErnieImageAdaLNModulation in the trainer's model alone
    ),
    axes=(BlockAxis("layers."),),
    # The trainer's module for LoRA trains both; those for LoHa and LoKr leave them out.
    switches=(Switch("exclude_mod", r"adaLN_modulation\.1|final_norm\.linear", trained_if=False, default=True),),
    usual=frozenset({254}),
    kinds=frozenset({9}),
    releases=(
        Release(
            "ernie_image",
            "ERNIE-Image",
            "ErnieImageTransformer2DModel",
            {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288}
            | {"text_in_dim": 3072},
            also=("ernie-image-turbo",),
        ),
    ),
    start=Start(
        "--network_dim 32 --network_alpha 1 --learning_rate 1e-4 --timestep_sampling shift "
        "--discrete_flow_shift 4.0 --weighting_scheme none",
        "docs/ernie_image.md",
    ),
)
