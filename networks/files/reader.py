"""Opening adapter files, with an answer for everything that can be wrong with a path."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..foreign.texts import exists, is_file, parse_json, printable

_LONGEST = 100_000_000  # bytes of a header; safetensors has the same bound
_NAME = 1000  # characters
_MOST_TENSORS = 30_000  # several times what the largest models need; each is looked at in many ways
PEFT_FILE = "adapter_model.safetensors"  # in a folder with its settings


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself, read without touching the tensors.

    Attributes:
        shapes: key -> shape.
        metadata: text to text.
        entries: key -> dtype, shape, data_offsets, as they stand there.
        start: position of the first tensor's first byte; the offsets count from it.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    entries: dict[str, Any]
    start: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read names, shapes and metadata only: milliseconds for a checkpoint of any size.

    Raises:
        ValueError: the path is no complete safetensors file.
    """
    file = checked_path(path)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(file.stat().st_size, _LONGEST):
            raise ValueError(_damaged(file, "its first bytes are no safetensors header"))
        try:
            entries: dict[str, Any] = parse_json(stream.read(length))
            metadata = dict(entries.pop("__metadata__", None) or {})
            needed = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
            shapes = {key: _shape(entry["shape"]) for key, entry in entries.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise ValueError(_damaged(file, f"its header is unreadable ({printable(error, 200)})")) from None
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(_damaged(file, "its metadata are not text"))
    check_names(entries, str(file))
    if file.stat().st_size < needed:
        raise ValueError(_damaged(file, f"it should have {needed} bytes but has {file.stat().st_size}"))
    return Header(shapes, metadata, entries, 8 + length)


def _shape(found: list[Any]) -> tuple[int, ...]:
    """Raises ValueError for what is none."""
    if not all(type(side) is int and 0 <= side < 1 << 60 for side in found):
        raise ValueError("a shape is no list of numbers")
    return tuple(found)


def check_names(names: Iterable[object], source: str) -> None:
    """Whether tensors have names which can be shown: they stand in logs, errors and reports of every program.

    Raises:
        ValueError: one is not text, is very long, or has characters that a terminal obeys.
    """
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= _NAME or not name.isprintable():
            raise ValueError(
                f"{source} is broken, as no program writes '{printable(name, 200)}' as the name of a tensor: copy or "
                "download it again, from where you trust it"
            )


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (CPU, their own dtype) and the metadata of a safetensors file.

    Raises:
        ValueError: the path is no complete safetensors file, or has more tensors than an adapter can have.
    """
    file = checked_path(path)
    count = len(read_header(file).shapes)
    if count > _MOST_TENSORS:
        raise ValueError(
            f"{file} has {count:,} tensors, and no adapter has more than {_MOST_TENSORS:,}: give another file"
        )
    try:
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(_damaged(file, printable(error, 200))) from None


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of an existing .safetensors file, also given as the folder which PEFT wrote it to.

    Raises:
        ValueError: with the nearest thing that would work.
    """
    file = Path(path)
    if is_file(file / PEFT_FILE):
        return file / PEFT_FILE
    if exists(file) and file.is_dir():
        inside = sorted(p.name for p in file.glob("*.safetensors"))
        hint = f"; it holds {', '.join(inside[:5])}" if inside else "; it holds no .safetensors file"
        raise ValueError(f"{file} is a folder, not a weight file{hint}")
    if not exists(file):
        near = (
            sorted(p.name for p in file.parent.glob("*.safetensors"))[:5]
            if exists(file.parent) and file.parent.is_dir()
            else []
        )
        hint = f"; beside it: {', '.join(near)}" if near else ""
        raise ValueError(f"there is no file {file}{hint}")
    if file.suffix.lower() != ".safetensors":
        raise ValueError(
            f"{file.name} is not a .safetensors file: pickled files (.pt, .ckpt, .bin) can run code when opened; "
            "convert it to safetensors first"
        )
    return file


def _damaged(file: Path, why: str) -> str:
    return f"{file} is damaged or incomplete: {why}; copy or download it again"
