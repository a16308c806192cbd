"""A weight of a checkpoint in the form in which it is stored there: plain numbers, or float8 with or without a scale.

    W = weight * scale

The scale has a tensor of its own beside the weight: one number, one per output row, or one per block. Programs name it
`scale_weight` (the trainers; ComfyUI's older files, with the marker `scaled_fp8`), `weight_scale` (ComfyUI's newer
ones, which name the format in `comfy_quant`, a JSON text, or in the header) or `weight_scale_inv` (transformers).
Scales of a layer's inputs stand there, too; they stay as they are, like everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..archs.spec import DENOISER_ROOTS
from ..foreign.texts import parse_json, printable
from ..tensors.blocks import block_of_scale
from .checkpoint import Checkpoint
from .weight_names import stem_of

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_OF_INPUTS = ("scale_input", "input_scale", "activation_scale", "pre_quant_scale")
_PLAIN, _FLOAT8 = ("F64", "F32", "F16", "BF16"), ("F8_E4M3", "F8_E5M2")  # as safetensors spells them
_FORMATS = ("float8_e4m3fn", "float8_e5m2")  # as ComfyUI spells those of them which can be written again
_IN_HEADER = "_quantization_metadata"
REMEDY = "merge into the checkpoint in bf16, fp16 or scaled fp8, then quantise that"


class Stored(nn.Module):
    """A weight, or a bias, with its scale under the name by which `tensors.base_weight` knows it."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        if scale is not None:
            self.register_buffer(SCALES[0], scale.reshape(_as_column(scale.shape)))

    @property
    def scale(self) -> Tensor | None:
        return self._buffers.get(SCALES[0])


def load(checkpoint: Checkpoint, key: str) -> Stored:
    """The tensors of a weight, in memory of their own."""
    scale = scale_key(checkpoint, key)
    return Stored(checkpoint.tensor(key), checkpoint.tensor(scale) if scale else None)


def scale_key(checkpoint: Checkpoint, key: str) -> str:
    """Of the tensor which scales a weight; "" for a weight without one."""
    stem = "" if checkpoint.dtype(key) in _PLAIN else stem_of(key)  # beside those `check` has seen that it is 1
    return next((f"{stem}.{name}" for name in SCALES if stem and f"{stem}.{name}" in checkpoint.shapes), "")


def is_of_storage(key: str) -> bool:
    """Whether a tensor says how another one is stored, as scales and the names of formats do."""
    return key.rpartition(".")[2] in (*SCALES, *_OF_INPUTS, "comfy_quant", "scaled_fp8")


def check(
    checkpoint: Checkpoint,
    keys: Iterable[str],
    wanted: str = "to be changed cannot be written again",
    way: str = REMEDY,
) -> None:
    """Whether the weights can be read and written again, found out before anything is.

    Args:
        keys: of the weights.
        wanted: what cannot be done with other forms, for the message.
        way: what to do then.

    Raises:
        ValueError: with the form in which they are stored, and what to do.
    """
    formats = _formats(checkpoint)
    found: dict[str, list[str]] = {}
    for key in keys:
        problem = _problem(checkpoint, key, formats)
        if problem:
            found.setdefault(problem, []).append(key)
    if found:
        told = (f"{len(group)} stored as {form}, e.g. {group[0]}" for form, group in found.items())
        raise ValueError(f"{checkpoint.path}: weights {wanted}: {'; '.join(told)}: {way}")


def _problem(checkpoint: Checkpoint, key: str, formats: Mapping[str, str]) -> str:
    """The form in which a weight is stored, if it cannot be written again; otherwise ""."""
    dtype, stem, shape = checkpoint.dtype(key), stem_of(key), checkpoint.shapes[key]
    if not shape or 0 in shape:
        raise ValueError(f"{checkpoint.path}: {key} of shape {list(shape)} is no weight: the checkpoint is damaged")
    form = formats.get(stem, _FORMATS[0])
    if form not in _FORMATS:
        return form
    scales = _scales_beside(checkpoint, key, stem)
    if dtype not in (*_PLAIN, *_FLOAT8):
        beside = scales or checkpoint.beside(f"{key}.quant_state")  # bitsandbytes__nf4
        return f"{dtype} with {' and '.join(beside)}" if beside else dtype
    return _problem_of_scales(checkpoint, key, scales) if scales else ""


def _problem_of_scales(checkpoint: Checkpoint, key: str, scales: list[str]) -> str:
    """The same for floating-point numbers with such tensors beside them."""
    dtype, scale = checkpoint.dtype(key), f"{stem_of(key)}.{scales[0]}"
    form = f"{dtype} with {' and '.join(scales)}"
    if len(scales) > 1 or scales[0] not in SCALES:
        return form
    if checkpoint.dtype(scale) not in _PLAIN:  # powers of two, one per 32 columns
        return f"mxfp8 ({form} in {checkpoint.dtype(scale)})"
    if dtype in _PLAIN:
        return form if bool((checkpoint.tensor(scale) != 1).any()) else ""
    shape = _as_column(checkpoint.shapes[scale])
    return "" if block_of_scale(checkpoint.shapes[key], shape) else f"{form} of shape {list(shape)}"


def _as_column(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a scale as `tensors.blocks` knows it: none for one number, [O, 1] for one per row."""
    return () if math.prod(shape) == 1 else (shape[0], 1) if len(shape) == 1 else tuple(shape)


def _scales_beside(checkpoint: Checkpoint, key: str, stem: str) -> list[str]:
    """Names of the tensors which scale a weight. A normalisation layer's weight may itself be called `scale`."""
    beside = checkpoint.beside(stem) if stem else []
    return [name for name in beside if "scale" in name and f"{stem}.{name}" != key and name not in _OF_INPUTS]


def _formats(checkpoint: Checkpoint) -> dict[str, str]:
    """Layer -> the format which the checkpoint itself names.

    Raises:
        ValueError: what it says cannot be read.
    """
    said: dict[str, Any] = {}
    try:
        for header in checkpoint.headers.values():
            said |= _by_whole_name(
                checkpoint, dict(parse_json(header.metadata.get(_IN_HEADER) or "{}").get("layers", {}))
            )
        for key in checkpoint.shapes:
            layer, _, last = key.rpartition(".")
            if last == "comfy_quant":
                said[layer] = parse_json(bytes(checkpoint.tensor(key).flatten().tolist()))
        return {layer: str(one["format"] if isinstance(one, dict) else one) for layer, one in said.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint.path}: what it says of its quantisation cannot be read ({printable(error, 200)})"
        ) from None


def _by_whole_name(checkpoint: Checkpoint, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Some programs leave out the prefix of the model in the header."""
    names = ((f"{root}{layer}", one) for layer, one in layers.items() for root in DENOISER_ROOTS)
    return {name: one for name, one in names if f"{name}.weight" in checkpoint.shapes}
