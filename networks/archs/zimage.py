"""Z-Image; the trainer's classes have diffusers' names."""

from __future__ import annotations

from .spec import ArchSpec, BlockAxis, Part, Signature, Switch, Timestep

ZIMAGE = ArchSpec(
    name="zimage",
    title="Z-Image",
    entry="lora_zimage",
    signatures=(Signature("ZImageTransformer2DModel"),),
    timestep=Timestep(("t",), noise=0.0, clean=1.0),
    denoiser=Part("dit", "lora_unet", ("ZImageTransformerBlock",)),
    axes=(BlockAxis("layers."),),
    switches=(
        Switch("exclude_mod", r".*\.adaLN_modulation\..*", trained_if=False),
        Switch("include_refiner", r"(noise|context)_refiner\..*", trained_if=True),
    ),
    usual=frozenset({210}),
)
