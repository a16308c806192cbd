"""What an adapter file says of itself: layers, ranks, real strengths, origin, and who reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import codec, dialects, dotted, reader, readers
from .codec import SavedLayer
from .weight_names import PREFIXES

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


RANKS = (  # where a layer shows its rank: suffix, axis
    ("lora_down.weight", 0),
    ("hada_w1_b", 0),
    ("lokr_w2_b", 0),
    ("lokr_w1_b", 0),
    ("a2.weight", 0),
)


def explain(path: Path) -> dict[str, Any]:
    """Plain values only, for printing and for JSON.

    Raises:
        ValueError: the file is unreadable, or no adapter that we know.
    """
    tensors, metadata = reader.read_tensors(path)
    keys = dotted.flattened(dotted.with_alphas(tensors, metadata))
    layers, unknown = codec.decode(keys)
    if not layers:
        raise ValueError(f"{path} has no adapter that we know; its keys look like {next(iter(tensors), 'nothing')}")
    dialect = dialects.DIFFUSERS if dotted.has_dots(tensors) else dialects.detect(keys)
    reading = readers.reading(layers.values()) if dialect is dialects.PORTABLE else {}
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for key, t in tensors.items() if key[-5:] != "alpha"}),
        "dialect": dialect.name,
        "origin": {
            title: metadata[key] for key, title in ORIGIN.items() if metadata.get(key) not in (None, "", "None")
        },
        "parameters": sum(t.numel() for saved in layers.values() for t in saved.tensors.values()),
        "layers": [_row(saved) for saved in layers.values()],
        "unknown": unknown,
        "readers": {name: (readers.VERDICTS[verdict], kind) for name, (verdict, kind) in reading.items()},
        "note": readers.OTHER_FORMS.get(dialect.name, ""),
        "metadata": metadata,
    }


def _row(saved: SavedLayer) -> dict[str, Any]:
    dim = next((saved.tensors[suffix].shape[axis] for suffix, axis in RANKS if suffix in saved.tensors), None)
    return {
        "name": saved.name.replace("/", "."),
        "part": _part(saved.name),
        "kind": readers.kind_of(saved).title,
        "dim": dim,
        "alpha": saved.alpha,
        "scale": saved.scale(dim),
        "dora": readers.side_of(saved),
        "shapes": {suffix: list(t.shape) for suffix, t in saved.tensors.items()},
    }


def _part(name: str) -> str:
    """`lora_unet`, `lora_te1`, or the component that a dotted name starts with."""
    if "/" in name:
        return name.partition("/")[0]
    return next(
        (p for p in sorted(PREFIXES, key=len, reverse=True) if name.startswith(f"{p}_")), name.partition("_")[0]
    )
