"""LyCORIS: `create_network_from_weights` and `apply_to` of its kohya side, or of its wrapper.

It looks for the names of the class at hand, the trainer's own; names without a layer are left out without a word, and
one layer that it cannot make ends in an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ...records.boft import BOFT
from ...records.ia3 import IA3
from ...records.loha import LOHA
from ...records.lokr import LOKR
from ...records.norm import NORM
from ...records.oft import BLOCKS, DIAG_OFT, FORMS, RESCALE
from ...records.tlora import TLORA
from ...tensors.factor import factorization
from ...tensors.rotation import butterfly_chain, rotation_less_identity
from ..codec import SavedLayer
from ..merged import merged_weight
from .contract import Fate, Given, Reading
from .diffusers import kronecker
from .errors import UNKNOWN, Errors, errors, plain

# What it says of every file on these architectures: its targets name a layer twice.
NEVER = {"sd": "AssertionError: duplicated lora name: lora_unet_time_embedding_linear_1"}
WRAPPER = "lycoris_"  # before the names of the wrapper's files
SCALED = ("lora", "loha", "lokr", "glora", DIAG_OFT.name, BOFT.name, TLORA.name)  # it wants an alpha
MERGED_TWICE = (LOHA.name, LOKR.name)  # by alpha / rank, see TWICE
NO_CLASS = "'NoneType' object has no attribute 'make_module_from_state_dict'"
TWICE = (
    "merged into the weights (merge_to, as --base_weights and musubi-tuner's --lycoris do) it takes alpha / rank of "
    "LoHa and LoKr twice"
)
FLATTENED = "with transformers 5 it finds no layer of a CLIP text encoder, whose names have become shorter there"


@dataclass(frozen=True)
class Lycoris:
    name: str = "lycoris"
    title: str = "LyCORIS 4.1.3"
    order: int = 60
    unasked: bool = True

    def read(self, given: Given) -> Reading | None:
        """What it makes of a file on the trainer's class."""
        here = set(_names(given))
        found = {name: saved for name, saved in given.meant.items() if name in here}
        refused = NEVER.get(given.arch.name, "") or next(filter(None, map(_refused, found.values())), "")
        if refused:
            return Reading({name: Fate(False, "the file is refused") for name in given.meant}, refused)
        fates = {
            name: _fate(given, saved) if name in found else Fate(False, "the model has no such name")
            for name, saved in given.meant.items()
        }
        return Reading(fates, notes=tuple(_notes(given)))


def _names(given: Given) -> Iterator[str]:
    """Of layers which it finds. Text encoders are numbered as they are handed over."""
    for part in given.arch.parts:
        prefix = part.prefix
        if part in given.arch.text_encoders and len(given.arch.text_encoders) > 1:
            prefix = f"lora_te{given.arch.text_encoders.index(part) + 1}"
        for trainer_name in given.shapes.get(part.name, {}):
            yield f"{prefix}_{trainer_name}".replace(".", "_")
            if part is given.arch.denoiser:
                yield WRAPPER + trainer_name.replace(".", "_")


def _refused(saved: SavedLayer) -> str:
    """Its words about a layer; "" = it makes one."""
    spec, tensors = saved.algorithm.spec, saved.tensors
    words = {
        "IA3Module.make_module_from_state_dict() takes 4 positional arguments but 5 were given": spec.name == IA3.name,
        "'NormModule' object has no attribute 'w_norm'": spec.name == NORM.name and "b_norm" not in tensors,
        NO_CLASS: any(suffix in FORMS or suffix.startswith(f"{BLOCKS}.") for suffix in tensors),
        "float() argument must be a string or a real number, not 'NoneType'": spec.name in SCALED
        and saved.alpha is None,
        "doesn't match the broadcast shape": _is_input_side(saved),
    }
    told = next((text for text, true in words.items() if true), "")
    return told or (_refused_kronecker(tensors) if spec.name == LOKR.name else "")


def _is_input_side(saved: SavedLayer) -> bool:
    shape = () if saved.magnitude is None else tuple(saved.magnitude.shape)
    return len(shape) > 1 and shape[0] == 1 < max(shape)


def _refused_kronecker(tensors: dict[str, Tensor]) -> str:
    """It guesses the factor from the shapes, and of which form the layer then is."""
    if LOKR.keys["t2"] in tensors:
        return "'LokrModule' object has no attribute 'lokr_w2_a'"
    sides = kronecker(tensors)
    near_square = all(left == factorization(left * right)[0] for left, right in sides)
    factor = -1 if near_square else _guess(*zip(*sides, strict=True))
    if any(factorization(left * right, factor) != (left, right) for left, right in sides):
        return "RuntimeError: The size of tensor a"
    return ""


def _guess(first: tuple[int, int], second: tuple[int, int]) -> int:
    """The longer side of either that divides both features and is a side of both divisions."""
    features = [one * two for one, two in zip(first, second, strict=True)]
    for side in (max(first), max(second)):
        sides = zip(features, first, second, strict=True)
        if all(rows % side == 0 and side in (one, two) for rows, one, two in sides):
            return side
    return min(max(first), max(second))


def _fate(given: Given, saved: SavedLayer) -> Fate:
    spec = saved.algorithm.spec.name
    if spec == TLORA.name and "lora_up.weight" not in saved.tensors:
        return Fate(True, "it works out the start of T-LoRA again, from the weights at hand", UNKNOWN)
    if saved.magnitude is not None:
        reason = "the strength multiplies the magnitude alone, not the change of direction"
        if saved.folded:
            return Fate(True, "it reads magnitudes that are folded for ComfyUI as they stand", _off(given, saved))
        return Fate(True, reason, (0.0, _off(given, saved)[1]))
    if RESCALE in saved.tensors:
        return Fate(True, "its factors by row act whole at every strength", (0.0, _off(given, saved)[1]))
    if spec == BOFT.name and len(saved.tensors[BLOCKS]) > 1:
        return Fate(True, "the strength acts in every stage", (0.0, _off(given, saved)[1]))
    return Fate()


def _off(given: Given, saved: SavedLayer) -> Errors:
    acts = _magnitude_alone if saved.magnitude is not None else _stages if _is_boft(saved) else _whole_rows
    return errors(saved, None if given.base is None else given.base(saved.name), acts)


def _is_boft(saved: SavedLayer) -> bool:
    return saved.algorithm.spec.name == BOFT.name


def _magnitude_alone(saved: SavedLayer, base: Tensor, strength: float) -> Tensor:
    """V (1 + strength (m / ||V|| - 1)), V = W + s dW."""
    whole = plain(saved, base, 1.0)
    assert saved.magnitude is not None
    norms = whole.flatten(1).norm(dim=1).reshape(-1, *[1] * (base.dim() - 1))
    ratio = saved.magnitude.to(base).reshape(norms.shape) / norms
    return whole * (1 + strength * (ratio - 1))


def _whole_rows(saved: SavedLayer, base: Tensor, strength: float) -> Tensor:
    """The factors by row are not moderated."""
    turned = merged_weight(replace(saved, tensors={BLOCKS: saved.tensors[BLOCKS]}), base, strength)
    return turned * _rows(saved, base)


def _stages(saved: SavedLayer, base: Tensor, strength: float) -> Tensor:
    """T of stages 1 + strength (R - 1), with the factors by row whole."""
    stages, _, size, _ = saved.tensors[BLOCKS].shape
    limit = (saved.alpha or 0.0) * len(base)
    less = rotation_less_identity(saved.tensors[BLOCKS].flatten(0, 1), limit).unflatten(0, (stages, -1))
    distances = tuple(2**i * (size // 2) for i in range(stages))
    turned = base + butterfly_chain(base, (strength * less).to(base.dtype), 0, distances)
    return turned * _rows(saved, base) if RESCALE in saved.tensors else turned


def _rows(saved: SavedLayer, base: Tensor) -> Tensor:
    return saved.tensors[RESCALE].to(base).reshape(-1, *[1] * (base.dim() - 1))


def _notes(given: Given) -> Iterator[str]:
    if any(saved.algorithm.spec.name in MERGED_TWICE and saved.scale != 1 for saved in given.meant.values()):
        yield TWICE
    if any(name.startswith("lora_te") and "text_model" in name for name in given.meant):
        yield FLATTENED


READERS = (Lycoris(),)
