"""Saving tensors: cast, checked for what is broken or lost, with the hashes that web UIs index by."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from . import outputs
from .dialects import is_magnitude

log = logging.getLogger(__name__)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    health: Mapping[str, int] | None = None,
) -> Path:
    """Write a safetensors file atomically, with the model hashes that web UIs index by.

    Args:
        path: with another ending than .safetensors, that ending is appended (pickled files are not written).
        dtype: of the saved tensors; None keeps each. `.alpha`, magnitudes and factors near 1 are in fp32 at least.
        metadata: text to text; not changed.
        health: what is known of the run that made them; with what shows here it is saved as `networks_health`.

    Returns:
        The path written.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    file = checked_path(path)
    chunks = content(tensors, dtype, metadata, health)
    outputs.replace(file, chunks, sum(map(len, chunks)))
    return file


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Where a file goes that is to be saved there: pickled files are not written."""
    file = Path(path)
    if file.suffix.lower() == ".safetensors":
        return file
    log.warning("%s: saved as .safetensors instead, which every program reads", file.name)
    return file.with_name(file.name + ".safetensors")


def content(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    health: Mapping[str, int] | None = None,
) -> tuple[bytes, memoryview]:
    """What `write_tensors` writes: header and payload.

    Args:
        tensors, dtype, metadata, health: as there.
    """
    cast, losses = _cast(tensors, dtype)
    data = serialize(cast)
    length = int.from_bytes(data[:8], "little")
    entries, payload = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
    known = dict(metadata or {})
    if health:
        known["networks_health"] = json.dumps({**health, **losses})
    training = {key: value for key, value in known.items() if key.startswith("ss_")}
    known["sshs_model_hash"] = hashlib.sha256(payload).hexdigest()
    known["sshs_legacy_hash"] = _legacy_hash(safetensors_header(entries, training), payload)
    header = safetensors_header(entries, known)
    return header, payload


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors as they are saved, and how many are broken or lost; one warning for each of these kinds.

    Extremes say it all in one pass over the data: NaN and infinity show in them, overflow and underflow follow.
    """
    cast: dict[str, Tensor] = {}
    broken, vanished = [], []
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # fp8 has no extremes
        counts = tensor.is_floating_point() and tensor.numel()
        low, high = (value.item() for value in wide.aminmax()) if counts else (0, 0)
        largest = max(abs(low), abs(high))
        if not math.isfinite(low + high):
            broken.append(key)
        chosen = _chosen(key, tensor.dtype, dtype)
        # A value outside the range of fp16 would come back as infinity: such a tensor keeps its dtype.
        if chosen != tensor.dtype and not torch.finfo(chosen).max < largest < math.inf:
            tensor = tensor.to(chosen)
            if largest and not torch.tensor(largest, dtype=chosen).item():
                vanished.append(key)
        cast[key] = tensor
    if broken:
        log.warning("saved %d tensors with NaN or infinite values, e.g. %s", len(broken), ", ".join(broken[:3]))
    if vanished:
        names = ", ".join(vanished[:3])
        log.warning("%d tensors are all 0 in the save precision, e.g. %s: save in fp32", len(vanished), names)
    return cast, {"non_finite_tensors": len(broken), "underflow_tensors": len(vanished)}


def _chosen(key: str, own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype in which a file has a tensor, for the one that was asked for."""
    if not own.is_floating_point or key.endswith(".alpha"):
        return own
    chosen = wanted or own
    return torch.float32 if is_magnitude(key) and chosen.itemsize < torch.float32.itemsize else chosen


def safetensors_header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON, padded so that the tensors stay aligned to 8 bytes."""
    whole = {"__metadata__": dict(metadata), **entries} if metadata else dict(entries)
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _legacy_hash(header: bytes, payload: memoryview) -> str:
    """First digits of SHA-256 over 64 KiB at 1 MiB of the file with the ss_ metadata alone."""
    start, size = 0x100000, 0x10000
    window = header[start : start + size]
    window += bytes(payload[max(0, start - len(header)) :][: size - len(window)])
    return hashlib.sha256(window).hexdigest()[:8]
