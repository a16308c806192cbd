"""What an adapter file says of itself: layers, ranks, real strengths, origin, and where it contradicts itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..foreign.texts import parse_json
from ..records import ALGORITHMS
from ..tensors.geometry import Geometry
from . import averages, dialects, dotted, reader
from .adapter_file import FileTensors, Naming, open_adapter
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
    "networks_training_adapter": "trained beside",
    "networks_resized": "resized",
    averages.METADATA: "average of the training (EMA)",
    "networks_health": "health at the last save",
}

DORA = ("use_dora", "dora", "dora_wd", "weight_decompose")  # the trainers' words for it
_ON = ("true", "1", "yes", "on")


def explain(given: Path | FileTensors) -> dict[str, Any]:
    """Plain values only, for printing and for JSON.

    Args:
        given: path of the file, or what was read of it.

    Raises:
        ValueError: the file is unreadable, or no adapter that we know.
    """
    file = open_adapter(given, Naming())
    path = file.source
    tensors, layers, metadata = file.tensors, file.layers, file.metadata
    if not layers:
        raise ValueError(file.problem)
    dialect = dialects.DIFFUSERS if file.dotted else file.flags.dialect
    return {
        "file": str(path),
        "bytes": reader.checked_path(path).stat().st_size,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for key, t in tensors.items() if key[-5:] != "alpha"}),
        "warnings": [*_rounded(tensors), *contradictions(layers.values(), metadata)],
        "dialect": dialect.name,
        "origin": {
            title: _dated(key, metadata[key])
            for key, title in ORIGIN.items()
            if metadata.get(key) not in (None, "", "None")
        },
        "parameters": sum(t.numel() for saved in layers.values() for t in saved.tensors.values()),
        "layers": [_row(saved) for saved in layers.values()],
        "strength": file.strength,
        "unknown": [*(f"{dotted.shown(name)}.{suffix}" for name, suffix in file.unread.items()), *file.stray],
        "verdict": f"no: {file.problem}" if file.problem else "exactly",
        "metadata": metadata,
    }


def _dated(key: str, text: str) -> str:
    """A time is in seconds since 1970, where a trainer wrote it."""
    if not key.endswith("_at"):
        return text
    try:
        return datetime.fromtimestamp(float(text), timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return text


def _rounded(tensors: Mapping[str, Tensor]) -> list[str]:
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
        "name": dotted.shown(saved.name),
        "part": part_of(saved.name),
        "kind": kind_of(saved),
        "dim": saved.algorithm.spec.shown_rank(saved.tensors),
        "alpha": saved.alpha,
        "scale": saved.scale,
        "dora": side_of(saved),
        "shapes": {suffix: list(t.shape) for suffix, t in saved.tensors.items()},
    }


def kind_of(saved: SavedLayer) -> str:
    """What a layer is, for people."""
    spec = saved.algorithm.spec
    limited = bool(spec.alpha_option and saved.alpha)
    own = (kind for kind in spec.kinds if kind.marks <= saved.tensors.keys() and (limited or not kind.constrained))
    return next((kind.title for kind in own), spec.name)


def side_of(saved: SavedLayer) -> str:
    """Of its DoRA magnitude, "output" or "input" by the shape alone; "" without one."""
    if saved.magnitude is None:
        return ""
    shape = saved.magnitude.shape
    return "input" if len(shape) > 1 and shape[0] == 1 and saved.magnitude.numel() > 1 else "output"


def contradictions(layers: Iterable[SavedLayer], metadata: Mapping[str, str]) -> list[str]:
    """What the metadata say of the training and the tensors do not bear out, one sentence each."""
    found = [saved for saved in layers if saved.algorithm.spec.family == Geometry.family]
    said = trained_by(metadata)
    checks = (_of_algorithm(found, said), _of_magnitudes(found, said), _of_dim(found, said), _of_alpha(found, said))
    return [text for text in checks if text] if found else []


def trained_by(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The network arguments of which metadata tell, by their names in the table, with network_dim and network_alpha."""
    try:
        given = parse_json(metadata.get("ss_network_args") or "{}")
    except ValueError:
        given = {}
    module = metadata.get("ss_network_module", "").rpartition(".")[2]
    found: dict[str, Any] = {"algo": module if module in ALGORITHMS else None}
    found |= given if isinstance(given, dict) else {}
    return found | {name: metadata.get(f"ss_{name}") for name in ("network_dim", "network_alpha")}


def _of_algorithm(layers: Sequence[SavedLayer], said: Mapping[str, Any]) -> str:
    algo = str(said["algo"] or "").lower()
    forms = {saved.algorithm.spec.file_algo for saved in layers}
    if algo not in ALGORITHMS or ALGORITHMS[algo].file_algo in forms:
        return ""
    return f"the metadata say it was trained as {algo}, and its tensors are those of {', '.join(sorted(forms))}"


def _of_magnitudes(layers: Sequence[SavedLayer], said: Mapping[str, Any]) -> str:
    on = any(str(said.get(name)).lower() in _ON for name in DORA)
    if not on or any(saved.magnitude is not None for saved in layers):
        return ""
    return "the metadata say use_dora, and it has no magnitudes: they are lost, and a part of the update with them"


def _of_dim(layers: Sequence[SavedLayer], said: Mapping[str, Any]) -> str:
    dim, ranks = _number(said["network_dim"]), {rank for saved in layers if (rank := _rank(saved))}
    if not dim or not ranks or any(rank % dim == 0 for rank in ranks):  # stacks and differences have several times it
        return ""
    return f"the metadata say network_dim={dim:g}, and its layers have {', '.join(map(str, sorted(ranks)))}"


def _of_alpha(layers: Sequence[SavedLayer], said: Mapping[str, Any]) -> str:
    alpha, dim = _number(said["network_alpha"]), _number(said["network_dim"])
    scales = {saved.scale for saved in layers if _rank(saved)}
    if not alpha or not dim or not scales:
        return ""
    if any(math.isclose(scale, alpha / one, rel_tol=0.01) for scale in scales for one in (dim, math.sqrt(dim))):
        return ""
    found = ", ".join(f"{scale:g}" for scale in sorted(scales)[:4])
    return (
        f"the metadata say network_alpha={alpha:g} of network_dim={dim:g}, a strength of {alpha / dim:g}, and its "
        f"tensors have {found}, which counts"
    )


def _rank(saved: SavedLayer) -> int | None:
    return saved.algorithm.spec.shown_rank(saved.tensors)


def _number(text: object) -> float:
    """Of metadata; 0 for what is none."""
    try:
        number = float(str(text))
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0
