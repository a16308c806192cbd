"""Saving tensors: cast, checked for what is broken or lost, with the hashes that web UIs index by."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from . import outputs
from .dialects import is_magnitude

log = logging.getLogger(__name__)

_CHUNK = 1 << 24  # bytes that are copied at once
_HASHED = slice(0x100000, 0x110000)  # the bytes by which older web UIs know a file

# Of a file's tensors, in its metadata: before they are known, in their length.
HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x" + "0" * 64}


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


class Stream:
    """A file in the making, one tensor after the other: memory stays near the largest of them.

    Its bytes wait in a file for each size of element: readers want the widest first, so that all are aligned.

    Args:
        part: beside which they wait.
        dtype: as for `write_tensors`.
    """

    def __init__(self, part: Path, dtype: torch.dtype | None) -> None:
        self._part, self._dtype = part, dtype
        self._waiting: dict[int, BinaryIO] = {}
        self._entries: dict[int, dict[str, dict[str, Any]]] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write tensors.

        Returns:
            Them as they stand in the file.
        """
        written = cast(tensors, self._dtype)
        for key, tensor in written.items():
            assert all(key not in entries for entries in self._entries.values()), key
            data, size = serialize({key: tensor}), tensor.itemsize
            length = int.from_bytes(data[:8], "little")
            if size not in self._waiting:
                self._waiting[size] = self._part.with_name(f"{self._part.name}.{size}").open("x+b")
            start = self._waiting[size].tell()
            stop = start + self._waiting[size].write(memoryview(data)[8 + length :])
            entry = {**json.loads(data[8 : 8 + length])[key], "data_offsets": [start, stop]}
            self._entries.setdefault(size, {})[key] = entry
        return written

    def chunks(self, metadata: Mapping[str, str]) -> Iterator[bytes]:
        """The whole file, with the hashes that web UIs index by."""
        entries, at = dict[str, dict[str, Any]](), 0
        for size in sorted(self._entries, reverse=True):
            for key, entry in self._entries[size].items():
                entries[key] = {**entry, "data_offsets": [at + offset for offset in entry["data_offsets"]]}
            at += self._waiting[size].tell()
        found = hashes(entries, metadata, self._payload())
        del found["modelspec.hash_sha256"]
        yield safetensors_header(entries, {**metadata, **found})
        yield from self._payload()

    def _payload(self) -> Iterator[bytes]:
        for size in sorted(self._waiting, reverse=True):
            self._waiting[size].seek(0)
            yield from iter(functools.partial(self._waiting[size].read, _CHUNK), b"")

    def close(self) -> None:
        for file in self._waiting.values():
            file.close()


@contextlib.contextmanager
def streamed(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> Iterator[Stream]:
    """Write a safetensors file piece by piece, whole or not at all; otherwise as `write_tensors`.

    Args:
        path, dtype: as there.
        metadata: read when the block has ended, so that it may say what was found there.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    with outputs.whole(checked_path(path), None, ".part") as part:
        with contextlib.closing(Stream(part, dtype)) as stream:
            yield stream
            outputs.write(part, stream.chunks(metadata or {}))


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
    entries, payload = _laid_out(cast)
    known = dict(metadata or {})
    if health:
        known["networks_health"] = json.dumps({**health, **losses})
    training = {key: value for key, value in known.items() if key.startswith("ss_")}
    known["sshs_model_hash"] = hashlib.sha256(payload).hexdigest()
    short = safetensors_header(entries, training)
    at = max(0, _HASHED.start - len(short)), max(0, _HASHED.stop - len(short))
    known["sshs_legacy_hash"] = _legacy_hash(short[_HASHED] + bytes(payload[slice(*at)]))
    header = safetensors_header(entries, known)
    return header, payload


def _laid_out(tensors: Mapping[str, _Kept]) -> tuple[dict[str, dict[str, Any]], memoryview]:
    """Entries of the header, and the bytes of all tensors, in the order of safetensors: each is copied once, into its
    dtype, and its bytes are not looked at by any Python of that library."""
    kinds = list(dict.fromkeys(dtype for _, dtype in tensors.values()))
    data = serialize({str(i): torch.empty(0, dtype=dtype) for i, dtype in enumerate(kinds)})
    order = {
        kinds[int(i)]: entry["dtype"] for i, entry in json.loads(data[8:]).items()
    }  # widest first: all are aligned
    of_kind: dict[torch.dtype, list[str]] = {dtype: [] for dtype in order}
    for key in sorted(tensors):
        of_kind[tensors[key][1]].append(key)
    entries, at = dict[str, dict[str, Any]](), 0
    for dtype, keys in of_kind.items():
        for key in keys:
            tensor = tensors[key][0]
            start, at = at, at + tensor.numel() * dtype.itemsize
            entries[key] = {"dtype": order[dtype], "shape": list(tensor.shape), "data_offsets": [start, at]}
    payload = bytearray(at)
    whole = torch.frombuffer(payload, dtype=torch.uint8) if at else torch.empty(0, dtype=torch.uint8)
    for key, entry in entries.items():
        tensor, dtype = tensors[key]
        if tensor.numel():
            whole[slice(*entry["data_offsets"])].view(dtype).copy_(tensor.flatten())
    return entries, memoryview(payload)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors as they will stand in a file.

    Args:
        tensors, dtype: as for `write_tensors`.
    """
    return {key: tensor.to(chosen) for key, (tensor, chosen) in _cast(tensors, dtype)[0].items()}


_Kept = tuple[Tensor, torch.dtype]  # a tensor, and the dtype in which a file has it


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[dict[str, _Kept], dict[str, int]]:
    """What is saved, and how many are broken or lost; one warning for each of these kinds.

    Extremes say it all in one pass over the data: NaN and infinity show in them, overflow and underflow follow.
    """
    cast: dict[str, _Kept] = {}
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
            if 0 < largest < torch.finfo(chosen).tiny and not torch.tensor(largest, dtype=chosen).item():
                vanished.append(key)
        else:
            chosen = tensor.dtype
        cast[key] = tensor, chosen
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


def hashes(entries: Mapping[str, object], metadata: Mapping[str, str], payload: Iterable[bytes]) -> dict[str, str]:
    """What a file may tell of its tensors, see HASHES.

    Args:
        entries, metadata: of its header.
        payload: all that follows it.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    short = safetensors_header(entries, training)
    digest, window, start = hashlib.sha256(), short[_HASHED], len(short)
    for chunk in payload:
        digest.update(chunk)
        window += chunk[max(0, _HASHED.start - start) : max(0, _HASHED.stop - start)]
        start += len(chunk)
    whole = digest.hexdigest()
    return dict(zip(HASHES, (whole, _legacy_hash(window), f"0x{whole}"), strict=True))


def safetensors_header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON, padded so that the tensors stay aligned to 8 bytes."""
    whole = {"__metadata__": dict(metadata), **entries} if metadata else dict(entries)
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _legacy_hash(window: bytes) -> str:
    """First digits of SHA-256 over 64 KiB at 1 MiB of the file with the ss_ metadata alone."""
    return hashlib.sha256(window).hexdigest()[:8]
