"""Adapter files of a lower dim: the first ranks of nested ones (DyLoRA), or the nearest update of that rank."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import codec, dialects

WAYS = ("first", "nearest")


def is_nested(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata say that it was trained by DyLoRA."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        arguments = None
    algo = arguments.get("algo") if isinstance(arguments, dict) else None
    return str(algo or metadata.get("ss_network_module", "").rpartition(".")[2]).lower() == "dylora"


def resize(tensors: Mapping[str, Tensor], dim: int, way: str) -> tuple[dict[str, Tensor], float]:
    """A file's tensors with at most `dim` ranks in every layer, in the same dialect and dtype.

    Args:
        way: "first" keeps the first ranks and alpha as it is: a file of DyLoRA then acts as it was trained at that dim.
            "nearest" keeps the nearest update of that rank at the same strength.

    Returns:
        The tensors, and what is lost of all updates together, as a part of their length (0 for "first").

    Raises:
        ValueError: the form of a layer has no such ranks, or none has more than `dim`.
    """
    layers, unknown = codec.decode(tensors)
    if unknown or not layers:
        raise ValueError(f"no adapter that we know: {unknown[0] if unknown else 'it has no layers'}")
    flags = dialects.Flags.of(tensors)
    if flags.dialect.fold_flag:
        raise ValueError(
            "its DoRA magnitudes hold for the whole update alone (save_format=comfyui): resize another form"
        )
    form = dialects.Form(flags.dialect, bool(flags.rs_lora))
    result, lost, whole, changed = dict(tensors), 0.0, 0.0, False
    for name, saved in layers.items():
        try:
            new = (saved.algorithm.first_ranks if way == "first" else saved.algorithm.nearest)(saved.tensors, dim)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        before, after = new.ranks
        alpha = float(before) if not saved.alpha else saved.alpha
        if way == "nearest":
            alpha *= after / before
        for suffix in saved.tensors:
            del result[f"{name}.{suffix}"]
        result |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in new.tensors.items()}
        result[f"{name}.alpha"] = torch.tensor(form.alpha(alpha, after), dtype=torch.float32)
        scale_sq = (alpha / after) ** 2
        lost, whole, changed = lost + scale_sq * new.lost, whole + scale_sq * new.whole, changed or after < before
    if not changed:
        raise ValueError(f"no layer has more than {dim} ranks")
    return result, (lost / whole) ** 0.5 if whole else 0.0


def told(metadata: Mapping[str, str], dim: int, way: str) -> dict[str, str]:
    """Metadata of the smaller file."""
    changed = {"ss_network_dim": str(dim)} if "ss_network_dim" in metadata else {}
    return {**metadata, **changed, "networks_resized": f"{way} {dim}"}


def numbered(path: str | os.PathLike[str], dim: int) -> Path:
    """Where the file of a lower dim goes: `name-0004.safetensors`, as the trainers' own script calls it."""
    file = Path(path)
    return file.with_name(f"{file.stem}-{dim:04d}.safetensors")
