"""Names with dots: as PEFT and diffusers, and programs after them, write an adapter; to and from the trainers' keys.

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight

A component or a prefix comes first, then the name of a layer in diffusers' model or in the trainer's. Where the trainer
has one layer for several of diffusers', their adapters become one: side by side if they share their first factor,
block-diagonal if not. PEFT's magnitude of DoRA is a vector; with `.weight` behind its name, transformers 5
finds it too. Its files have no alpha unless their metadata say one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..algos import recognise
from ..archs.names import PEFT
from ..archs.places import Place
from ..records import ALGORITHMS
from ..records.lora import LORA

DOWN, UP, MAGNITUDE, ALPHA = LORA.keys["down"], LORA.keys["up"], "dora_scale", "alpha"
VECTOR = "lora_magnitude_vector"
SUFFIXES = {  # as others write them -> ours
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_A.default.weight": DOWN,
    "lora_B.default.weight": UP,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    VECTOR: MAGNITUDE,
    f"{VECTOR}.weight": MAGNITUDE,
    f"{VECTOR}.default.weight": MAGNITUDE,
    **{suffix: suffix for spec in ALGORITHMS.values() for suffix in spec.keys.values() if suffix != "weight"},
    "magnitude": MAGNITUDE,  # ai-toolkit's
    **{suffix: own for spec in ALGORITHMS.values() for suffix, own in spec.peft_keys.items()},
    **{suffix: suffix for spec in ALGORITHMS.values() for suffix in spec.more_keys},
    MAGNITUDE: MAGNITUDE,
    ALPHA: ALPHA,
}
OF_PEFT = {suffix: own for spec in ALGORITHMS.values() for suffix, own in spec.peft_keys.items()}
_LONGEST_FIRST = sorted(SUFFIXES, key=len, reverse=True)
_ENDING = re.compile(rf"\.({'|'.join(map(re.escape, _LONGEST_FIRST))})$")


def write(tensors: Mapping[str, Tensor], places: Mapping[str, Sequence[Place]]) -> dict[str, Tensor]:
    """Plain LoRA layers, with or without magnitude, as diffusers reads them; alpha / rank goes into the second factor.

    Args:
        tensors: in the portable form.
        places: saved name -> diffusers' layers.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        layers.setdefault(name, {})[suffix] = tensor
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        where, up = places[name], _scaled_up(layer)
        pair = {DOWN: layer[DOWN], UP: up}
        own = recognise(pair)
        assert own is not None
        try:  # an adapter of its own for each projection, or one for all
            pairs = own.unstack(pair, [place.stop - place.start for place in where])
        except ValueError:
            pairs = [{DOWN: layer[DOWN], UP: up[place.start : place.stop]} for place in where]
        for place, one in zip(where, pairs, strict=True):
            found[f"{place.path}.lora_A.weight"] = one[DOWN].contiguous().clone()  # files hold no shared tensors
            found[f"{place.path}.lora_B.weight"] = _turn(one[UP], place).contiguous()
            if MAGNITUDE in layer:
                vector = _turn(layer[MAGNITUDE][place.start : place.stop], place).flatten()
                found[f"{place.path}.{VECTOR}.weight"] = vector if up.dim() == 2 else vector.view(1, -1, *up.shape[2:])
    return found


def _turn(rows: Tensor, place: Place) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows


def has_dots(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has names of this kind."""
    return any("." in divide(key)[0] for key in tensors)


def divide(key: str) -> tuple[str, str]:
    """(name of the layer, suffix); a suffix that nobody knows is "", and the name what stands before the first dot."""
    match = _ENDING.search(key)
    return (key[: match.start()], match[1]) if match else (key.partition(".")[0], "")


def layers(keys: Iterable[str]) -> list[str]:
    """The names of the layers of which some key has a suffix that is known."""
    return list(dict.fromkeys(path for path, suffix in map(divide, keys) if suffix))


def divided(keys: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(key, name of the layer, suffix) of each. A suffix that nobody knows belongs to the layer which others name."""
    known = {key: divide(key) for key in keys}
    layers = {path for path, suffix in known.values() if suffix}
    for key, (path, suffix) in known.items():
        cuts = [at for at, letter in enumerate(key) if letter == "."] if not suffix else []
        at = next((at for at in reversed(cuts) if key[:at] in layers), None)
        if at is not None:
            path, suffix = key[:at], key[at + 1 :]
        yield key, path, suffix or key[len(path) + 1 :]


def own_suffix(path: str, suffix: str) -> str:
    """Our suffix for that of a layer with this name; some mean something else in a file of PEFT."""
    own = SUFFIXES.get(suffix, suffix)
    return OF_PEFT.get(suffix, own) if PEFT in path else own


def _scaled_up(tensors: Mapping[str, Tensor]) -> Tensor:
    """The second factor times alpha / rank."""
    up, alpha = tensors[UP], tensors.get(ALPHA)
    if alpha is None or not float(alpha):
        return up
    return up.to(torch.promote_types(up.dtype, torch.float32)) * (float(alpha) / tensors[DOWN].shape[0])
