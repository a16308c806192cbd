"""Names with dots: as PEFT and diffusers, and programs after them, write an adapter; to and from the trainers' keys.

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight

A component or a prefix comes first, then the name of a layer in diffusers' model or in the trainer's. Where the trainer
has one layer for several of diffusers', their adapters become one: side by side if they share their first factor,
block-diagonal if not. PEFT's magnitude of DoRA is a vector; with `.weight` behind its name, transformers 5
finds it too. Its files have no alpha unless their metadata say one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..archs.names import PEFT
from ..records import ALGORITHMS
from ..records.lora import LORA

if TYPE_CHECKING:
    from .codec import SavedLayer

DOWN, UP, MAGNITUDE, ALPHA = LORA.keys["down"], LORA.keys["up"], "dora_scale", "alpha"
VECTOR = "lora_magnitude_vector"
SCALED_BIAS = ("lora_B.bias", "lora_B.default.bias", "lora_up.bias")  # changes of biases that alpha / rank multiplies
MODULATION = "diff_m"  # the change of a block's own `modulation`, which is no layer
UNREAD = (  # what other programs have for a layer and no algorithm here: it is told, and not taken for no adapter
    MODULATION, "set_weight", "reshape_weight", "lora_embedding_A", "lora_embedding_B", "lora_E", "vera_lambda_b",
    "vera_lambda_d", "oft_r", "hra_u", "bone_block", "miss_block", "fourierft_spectrum",
    "shira_weight", "c3a_kernel", "delora_lambda", "randlora_lambda", "randlora_gamma", "road_theta", "road_alpha",
)  # fmt: skip
SUFFIXES = {  # as others write them -> ours
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_A.default.weight": DOWN,
    "lora_B.default.weight": UP,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "lora_linear_layer.down.weight": DOWN,  # of older diffusers
    "lora_linear_layer.up.weight": UP,
    "down.weight": DOWN,  # behind XLabs' names and those of older diffusers
    "up.weight": UP,
    **dict.fromkeys(SCALED_BIAS, LORA.bias_key),
    VECTOR: MAGNITUDE,
    f"{VECTOR}.weight": MAGNITUDE,
    f"{VECTOR}.default.weight": MAGNITUDE,
    **{suffix: suffix for spec in ALGORITHMS.values() for suffix in spec.keys.values() if suffix != "weight"},
    "magnitude": MAGNITUDE,  # ai-toolkit's
    **{suffix: own for spec in ALGORITHMS.values() for suffix, own in spec.peft_keys.items()},
    **{suffix: suffix for spec in ALGORITHMS.values() for suffix in spec.more_keys},
    MAGNITUDE: MAGNITUDE,
    ALPHA: ALPHA,
    **{suffix: suffix for suffix in UNREAD},
}
OF_PEFT = {suffix: own for spec in ALGORITHMS.values() for suffix, own in spec.peft_keys.items()}
_LONGEST_FIRST = sorted(SUFFIXES, key=len, reverse=True)

# Stand-In's `q_loras.down.weight` acts on other tokens than the layer's: it is no adapter of that.
_ENDING = rf"(?<!_loras)\.({'|'.join(map(re.escape, _LONGEST_FIRST))})$"
# An adapter's name between the parts of a suffix, as PEFT saves those which are not called `default`.
_OF_ADAPTER = (
    rf"\.(lora_[AB]|oft_R|boft_[Rs]|ia3_l|lora_magnitude_vector|hada_\w+|lokr_\w+|{'|'.join(UNREAD)})"
    r"\.[^.]+(\.weight|\.bias)?$"
)
# Some converters turn dots which they do not know into underscores.
_FLAT = rf"_({'|'.join(re.escape(suffix.replace('.', '_')) for suffix in _LONGEST_FIRST)})$"
_OF_FLAT = {suffix.replace(".", "_"): suffix for suffix in _LONGEST_FIRST}
_TO_PEFT = {DOWN: "lora_A.weight", UP: "lora_B.weight", LORA.bias_key: "lora_B.bias"}


@functools.cache
def _endings() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Of known suffixes, of those with an adapter's name in them, and of flat ones: compiled where a file is opened."""
    return re.compile(_ENDING), re.compile(_OF_ADAPTER), re.compile(_FLAT)


def write(layers: Iterable[SavedLayer]) -> dict[str, Tensor]:
    """PEFT's keys of layers, named as in the file, whose scale goes into a factor: the file alone says it all.

    Args:
        layers: of algorithms that PEFT has, flat.
    """
    found: dict[str, Tensor] = {}
    for layer in layers:
        tensors = layer.algorithm.settled(layer.tensors, layer.alpha)
        assert tensors is not None, f"{layer.name}: no factor takes up its scale"
        for suffix, tensor in tensors.items():  # files hold no shared tensors
            found[f"{layer.name}.{_TO_PEFT.get(suffix, suffix)}"] = tensor.contiguous().clone()
        if layer.magnitude is not None:
            vector, axes = layer.magnitude.flatten(), tensors[UP].dim() - 2
            found[f"{layer.name}.{VECTOR}.weight"] = vector.view(1, -1, *[1] * axes) if axes else vector
    return found


def has_dots(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has names of this kind."""
    return any("." in divide(key)[0] for key in tensors)


@functools.lru_cache(maxsize=1 << 15)  # a file is read in several passes
def divide(key: str) -> tuple[str, str]:
    """(name of the layer, suffix); a suffix that nobody knows is "", and the name what stands before the first dot."""
    ending, of_adapter, flat = _endings()
    if (match := ending.search(key)) is not None:
        return key[: match.start()], match[1]
    if (match := of_adapter.search(key)) is not None and (suffix := match[1] + (match[2] or "")) in SUFFIXES:
        return key[: match.start()], suffix
    if "." not in key and (match := flat.search(key)) is not None:
        return key[: match.start()], _OF_FLAT[match[1]]
    return key.partition(".")[0], ""


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


def shown(name: str) -> str:
    """The name of a layer for people, as its file has it: it may have slashes for dots, see adapter_file.Naming."""
    return name.lstrip("/").replace("/", ".")


def as_in(written: str, suffix: str) -> str:
    """Our suffix as a file with these has it."""
    peft = _TO_PEFT.get(suffix, suffix)
    return peft if any(other in written for other in _TO_PEFT.values()) else suffix


def _scaled_up(tensors: Mapping[str, Tensor]) -> Tensor:
    """The second factor times alpha / rank."""
    up, alpha = tensors[UP], tensors.get(ALPHA)
    if alpha is None or not float(alpha):
        return up
    return up.to(torch.promote_types(up.dtype, torch.float32)) * (float(alpha) / tensors[DOWN].shape[0])
