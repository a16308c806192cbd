"""stable-diffusion-webui (AUTOMATIC1111): Stable Diffusion alone, a class for every form of layer.

What stands under a name that it does not know is left out. A layer that it knows in a form that it does not know stops
it: no part of the file is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ...archs.places import DIFFUSERS
from ...records.glora import GLORA
from ...records.ia3 import IA3
from .patcher import (
    BESIDE,
    FACTORS,
    ROTATIONS,
    SCALES,
    STAYS,
    UNREAD,
    UNREAD_MAGNITUDE,
    Encoder,
    Form,
    Layer,
    Model,
    Names,
    Patcher,
    update,
)  # fmt: skip

_CLIP = r"text_model\.encoder\.layers\.\d+\..*"
PATHS = ("lora_unet_", "oft_unet_")
UNET = (Names(("lora_unet_",), DIFFUSERS),)
MODELS: Mapping[str, Model] = {
    "sd": Model(UNET, (Encoder("", ("lora_te_", "lora_te1_"), _CLIP),), paths=PATHS),
    "sdxl": Model(UNET, (Encoder("", ("lora_te1_",), _CLIP), Encoder("", ("lora_te2_",), _CLIP)), paths=PATHS),
}
SUFFIXES = (
    {suffix for suffix in FACTORS if not suffix.startswith(("lora.", "lora_linear_layer", "lora_A", "lora_B"))}
    | {"lora_A.weight", "lora_B.weight", "weight", "on_input"}
    | ROTATIONS
    | BESIDE
) - {"reshape_weight", "set_weight"}


def _by_columns(layer: Layer, base: Tensor, strength: float) -> Tensor:
    """m (W + dW) / ||W + dW|| with the norm of columns, whatever the side of m."""
    assert layer.saved.magnitude is not None
    new = base + update(layer.saved, base)
    norms = new.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (base.dim() - 2))
    return base + strength * (new * (layer.saved.magnitude.to(base) / norms) - base)


def _is_kernel_of_rows(layer: Layer) -> bool:
    on_input = layer.saved.tensors.get("on_input")
    return layer.algo == IA3.name and layer.kernel > 0 and (on_input is None or not bool(on_input))


FORMS = (
    replace(UNREAD, reason="a layer in a form that it does not know stops it", stops=True),
    Form(
        "it takes the change of a normalisation layer's weight with that of its bias alone, and stops",
        lambda layer: layer.has("w_norm") and not layer.has("b_norm"),
        stops=True,
    ),
    UNREAD_MAGNITUDE,
    Form(f"it knows GLoRA of 2023 alone{STAYS}", lambda layer: layer.algo == GLORA.name, loaded=False),
    Form(f"factors of a convolution's rows are computed with an error{STAYS}", _is_kernel_of_rows, loaded=False),
    Form(
        "DoRA on the output side: it divides by the norms of the columns",
        lambda layer: layer.saved.magnitude is not None and layer.saved.magnitude.shape[0] == layer.slot.shape[0],
        _by_columns,
    ),
    *SCALES,
)
READERS = (Patcher("a1111", "A1111 1.10 (names read)", 50, MODELS, frozenset(SUFFIXES), FORMS),)
