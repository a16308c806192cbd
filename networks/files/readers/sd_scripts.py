"""sd-scripts, as kohya-ss has it: its modules know LoRA, two of them LoHa and LoKr, under its own names alone."""

from __future__ import annotations

from ...tensors.factor import factorization
from ..codec import SavedLayer
from .trainers import LOHA, LOKR, LORA, Route, Trainer

_LORA_FLUX = ("flux", "chroma", "sd3", "lumina")  # whose modules raise for a layer without alpha, as the next two do
_LOADED = ("hunyuan_image", "anima")  # which its inference scripts merge while they load the model


def _guessed_scale(saved: SavedLayer, shape: tuple[int, ...]) -> float:
    """It makes the layers anew with `factor` as it is given to it, -1 if it is not; where their second factors would be
    whole then, their strength is 1 whatever the file has."""
    rank = saved.algorithm.spec.shown_rank(saved.tensors)
    if rank is None or "lokr_w1" not in saved.tensors:
        return 1.0
    whole = 2 * rank >= max(factorization(shape[0])[1], factorization(shape[1])[1])
    return 1 / saved.scale if whole else 1.0


_FACTOR = "A LoKr file needs --network_args factor=N in sd-scripts, with the N that it was trained with."
_OWN = dict.fromkeys(("sdxl", "anima"), Route((LOHA, LOKR), one_form=True, scale=_guessed_scale, notes=(_FACTOR,)))
_STRICT = "With --merge_lora_weights the script merges instead, and leaves out what it does not know."

READERS = (
    Trainer(
        "sd_scripts",
        "sd-scripts 0.11.1, its network modules",
        70,
        dict.fromkeys(("sd", "sdxl"), Route()) | dict.fromkeys((*_LORA_FLUX, *_LOADED), Route(alpha=True)),
    ),
    Trainer(
        "sd_scripts_inference",
        "sd-scripts 0.11.1, its inference scripts",
        71,
        dict.fromkeys(("sd", "sdxl"), Route())
        | dict.fromkeys(_LORA_FLUX, Route(alpha=True, strict=True, notes=(_STRICT,)))
        | dict.fromkeys(_LOADED, Route((LORA, LOHA, LOKR), one_form=True)),
    ),
    Trainer("sd_scripts_lokr", "sd-scripts 0.11.1, its modules for LoHa and LoKr", 72, _OWN, False),
)
