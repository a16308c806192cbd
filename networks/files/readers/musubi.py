"""musubi-tuner: its modules know LoRA; scripts that merge while they load the model know LoHa and LoKr, too."""

from __future__ import annotations

from .trainers import LOHA, LOKR, LORA, Route, Trainer

_MODULES = Route(alpha=True, outside=False)
_LOADING = Route((LORA, LOHA, LOKR), one_form=True)
# Whose scripts make a network of the file.
_MERGED = ("hunyuan_video", "flux", "kandinsky", "hidream_o1")
_LOADED = ("wan", "hv_1_5", "flux_2", "qwen_image", "qwen_image_21", "zimage", "framepack", "krea2")

READERS = (
    Trainer(
        "musubi",
        "musubi-tuner 2026-08, its network modules",
        80,
        dict.fromkeys((*_MERGED, *_LOADED, "ideogram4", "minimax_h3"), _MODULES),
    ),
    Trainer(
        "musubi_generate",
        "musubi-tuner 2026-08, its generation scripts",
        81,
        dict.fromkeys(_MERGED, _MODULES)
        | dict.fromkeys(_LOADED, _LOADING)
        | {
            "ideogram4": Route(alpha=True, strict=True, nothing="No LoRA modules found", outside=False),
            "minimax_h3": _MODULES,
        },
    ),
)
