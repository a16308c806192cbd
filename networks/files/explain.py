"""What an adapter file says of itself: layers, ranks, real strengths, origin, and who reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import dialects, kinds, reader
from .adapter_file import AdapterFile, Naming, open_adapter
from .codec import SavedLayer
from .places import part_of

ORIGIN = {  # metadata -> what it tells
    "networks_version": "written by this package, version",
    "ss_network_module": "network module",
    "ss_network_args": "network arguments",
    "ss_base_model_version": "trained for",
    "modelspec.architecture": "architecture",
    "ss_sd_model_name": "base model",
    "ss_training_finished_at": "finished at",
    "ss_steps": "steps",
    "networks_resized": "resized",
    "networks_health": "health at the last save",
}


def explain(path: Path) -> dict[str, Any]:
    """Plain values only, for printing and for JSON.

    Raises:
        ValueError: the file is unreadable, or no adapter that we know.
    """
    file = open_adapter(path, Naming())
    tensors, layers, metadata = file.tensors, file.layers, file.metadata
    if not layers:
        raise ValueError(file.problem)
    dialect = dialects.DIFFUSERS if file.dotted else file.flags.dialect
    return {
        "file": str(path),
        "bytes": reader.checked_path(path).stat().st_size,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for key, t in tensors.items() if key[-5:] != "alpha"}),
        "warnings": _warnings(tensors),
        "dialect": dialect.name,
        "origin": {
            title: metadata[key] for key, title in ORIGIN.items() if metadata.get(key) not in (None, "", "None")
        },
        "parameters": sum(t.numel() for saved in layers.values() for t in saved.tensors.values()),
        "layers": [_row(saved) for saved in layers.values()],
        "strength": file.strength,
        "unknown": [*(f"{name.replace('/', '.')}.{suffix}" for name, suffix in file.unread.items()), *file.stray],
        "verdict": f"no: {file.problem}" if file.problem else "exactly",
        "readers": _readers(file, dialect),
        "note": kinds.OTHER_FORMS.get(dialect.name, ""),
        "metadata": metadata,
    }


def _readers(file: AdapterFile, dialect: dialects.Dialect) -> dict[str, tuple[str, str]]:
    """Program -> its verdict and a word on it, where the form of the file is one that they share."""
    reading = kinds.reading(file.layers.values()) if dialect is dialects.PORTABLE and not file.problem else {}
    return {name: (kinds.VERDICTS[verdict], kind) for name, (verdict, kind) in reading.items()}


def _warnings(tensors: Mapping[str, Tensor]) -> list[str]:
    """What is lost of values of which a small part was learnt, where they are stored with few bits."""
    own = [t.dtype for key, t in tensors.items() if dialects.is_magnitude(key) and t.dtype.itemsize < 4]
    if not own:
        return []
    error = max(torch.finfo(dtype).eps / 2 for dtype in own)
    names = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in own}))
    return [
        f"{len(own)} magnitudes are in {names}, rounded by up to {error:.2%}: where training changed one by 1 %, that "
        f"change is off by up to {100 * error:.0%} (files of this package have them in fp32)"
    ]


def _row(saved: SavedLayer) -> dict[str, Any]:
    return {
        "name": saved.name.replace("/", "."),
        "part": part_of(saved.name),
        "kind": kinds.kind_of(saved).title,
        "dim": saved.algorithm.spec.shown_rank(saved.tensors),
        "alpha": saved.alpha,
        "scale": saved.scale,
        "dora": kinds.side_of(saved),
        "shapes": {suffix: list(t.shape) for suffix, t in saved.tensors.items()},
    }
