"""Adapter files of a lower dim: the first ranks of nested ones (DyLoRA), or the nearest update of that rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .._errors import located
from ..algos.saved import Resized
from ..foreign.texts import parse_json
from ..records import ALGORITHMS
from . import dialects, dotted
from .adapter_file import AdapterFile
from .codec import SavedLayer

WAYS = ("first", "nearest")


def is_nested(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata say that it was trained so that its first ranks stand alone."""
    try:
        arguments = parse_json(metadata.get("ss_network_args", "{}"))
    except ValueError:
        arguments = None
    algo = arguments.get("algo") if isinstance(arguments, dict) else None
    trained_by = str(algo or metadata.get("ss_network_module", "").rpartition(".")[2]).lower()
    return trained_by in ALGORITHMS and ALGORITHMS[trained_by].nested


def cut(saved: SavedLayer, dim: int, way: str) -> tuple[SavedLayer, Resized]:
    """A layer with at most `dim` ranks.

    Args:
        way: "first" keeps the first ranks and alpha as it is: a layer of DyLoRA then acts as it was trained at that
            dim. "nearest" keeps the nearest update of that rank at the same strength.

    Returns:
        The layer, and what became of its tensors.

    Raises:
        ValueError: its form has no such ranks.
    """
    with located(dotted.shown(saved.name)):
        resized = (saved.algorithm.first_ranks if way == "first" else saved.algorithm.nearest)(saved.tensors, dim)
    before, after = resized.ranks
    alpha = (saved.alpha or float(before)) * (after / before if way == "nearest" else 1.0)
    key = saved.algorithm.spec.bias_key
    bias = {key: saved.tensors[key]} if key in saved.tensors else {}
    return replace(saved, tensors={**resized.tensors, **bias}, alpha=alpha), resized


def resize(file: AdapterFile, dim: int, way: str) -> tuple[dict[str, Tensor], float]:
    """A file's tensors with at most `dim` ranks in every layer, in the same dialect and dtype, under the same names.

    Args:
        file: opened without an architecture.
        way: as for `cut`.

    Returns:
        The tensors, and what is lost of all updates together, as a part of their length (0 for "first").

    Raises:
        ValueError: the form of a layer has no such ranks, or none has more than `dim`.
    """
    file.all_read()
    with located(file.source):
        return _resized(file, dim, way)


def _resized(file: AdapterFile, dim: int, way: str) -> tuple[dict[str, Tensor], float]:
    """Raises ValueError without the name of the file."""
    if file.flags.dialect.fold_flag:
        raise ValueError(
            "its DoRA magnitudes hold for the whole update alone (save_format=comfyui): resize another form"
        )
    file_format = dialects.FileFormat(file.flags.dialect, bool(file.flags.rs_lora))
    keys = {(path, dotted.SUFFIXES.get(suffix, suffix)): key for key, path, suffix in dotted.divided(file.tensors)}
    result, lost, whole, changed = dict(file.tensors), 0.0, 0.0, False
    for name, saved in file.layers.items():
        smaller, resized = cut(saved, dim, way)
        before, after = resized.ranks
        assert smaller.alpha is not None
        bias_key = saved.algorithm.spec.bias_key  # which stays as it stands there
        written = {
            **{suffix: tensor for suffix, tensor in smaller.tensors.items() if suffix != bias_key},
            "alpha": torch.tensor(file_format.alpha(smaller.alpha, after), dtype=torch.float32),
        }
        path = dotted.shown(name)
        for suffix in saved.tensors.keys() - {bias_key}:
            result.pop(keys.get((path, suffix), f"{path}.{suffix}"), None)
        for suffix, tensor in written.items():
            result[keys.get((path, suffix), f"{path}.{suffix}")] = tensor.contiguous()
        scale_sq = (smaller.alpha / after) ** 2
        lost, whole, changed = (
            lost + scale_sq * resized.lost,
            whole + scale_sq * resized.whole,
            changed or after < before,
        )
    if not changed:
        raise ValueError(f"no layer has more than {dim} ranks: give a lower dim")
    return result, (lost / whole) ** 0.5 if whole else 0.0


def resized_metadata(metadata: Mapping[str, str], dim: int, way: str) -> dict[str, str]:
    """Metadata of the smaller file."""
    changed = {"ss_network_dim": str(dim)} if "ss_network_dim" in metadata else {}
    return {**metadata, **changed, "networks_resized": f"{way} {dim}"}


def numbered(path: str | os.PathLike[str], dim: int) -> Path:
    """Where the file of a lower dim goes: `name-0004.safetensors`, as the trainers' own script calls it."""
    file = Path(path)
    return file.with_name(f"{file.stem}-{dim:04d}.safetensors")
