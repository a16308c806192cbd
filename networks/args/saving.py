"""The row of the argument table that chooses how files are written."""

from __future__ import annotations

from .spec import Arg

OTHER = "other"

SAVE_FORMAT = Arg(
    "save_format",
    "choice",
    "portable",
    "how files are written: `portable` for every reader of alpha / rank; `blissful` as DustyL's blissful-tuner "
    "does, for LoRA: alpha as given under RS-LoRA, `use_rslora_flag`, `use_dora_flag`, `dora_layer.weight`, and "
    "its errors and warnings when a file contradicts the arguments; `diffusers` for its `load_lora_weights`, for "
    "LoRA: the names of PEFT and of diffusers' models, the scale in the second factor, with DoRA "
    "`lora_magnitude_vector`; `comfyui` with the magnitudes of use_dora multiplied by the norm of the base weight "
    "over that of the changed one, so that its formula gives what was trained; "
    "`oft` and `oft_flux` as those modules of sd-scripts do (`oft_unet_...`). Each is read "
    "back, whatever this says",
    OTHER,
    choices=("portable", "blissful", "comfyui", "diffusers", "oft", "oft_flux"),
    per_host=(("oft", "oft"), ("oft_flux", "oft_flux")),
)
