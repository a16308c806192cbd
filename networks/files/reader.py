"""Opening adapter files, with an answer for everything that can be wrong with a path."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
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


@dataclass(frozen=True)
class Remains:
    """What can be read of a file, damaged or not.

    Attributes:
        tensors: those that are complete, key -> tensor on the CPU.
        metadata: of the header, as text.
        lost: (key, why) of the others.
        damage: what is wrong with the file as a whole; "" = it is a sound safetensors file.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    lost: tuple[tuple[str, str], ...] = ()
    damage: str = ""


# First bytes -> what people have under the name of a .safetensors file.
_OTHERS = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file: download the file itself (git lfs pull)",
    b"<": "it is a web page, not the file: download the file itself, logged in where the site asks for it",
    **dict.fromkeys(
        (b"PK\x03\x04", b"\x80\x02"),
        "it is a pickled file under another name: rename it to .pt and convert it in a program that you trust",
    ),
    b"GGUF": "it is a GGUF file under another name: convert it with the program that made it",
}


def read_remains(path: str | os.PathLike[str]) -> Remains:
    """All that can be read of a safetensors file, tensor by tensor, by what its header says of each.

    Raises:
        ValueError: its header cannot be read, so that nobody knows what its bytes are.
    """
    file = checked_path(path)
    try:
        return Remains(*read_tensors(file))
    except ValueError as error:
        damage = str(error)
    with file.open("rb") as stream:
        first = stream.read(32)
        for start, what in _OTHERS.items():
            if first.startswith(start):
                raise ValueError(f"nothing can be read of {file}: {what}")
        length, size = int.from_bytes(first[:8], "little"), file.stat().st_size
        stream.seek(8)
        try:
            if not 0 < length <= min(size - 8, _LONGEST):
                raise ValueError("its first bytes are no safetensors header")
            entries = dict(parse_json(stream.read(length)))
            metadata = {str(key): str(text) for key, text in dict(entries.pop("__metadata__", None) or {}).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"nothing can be read of {file}: its header, which says what its bytes are, is lost "
                f"({printable(error, 200)}); download or copy it again"
            ) from None
        if len(entries) > _MOST_TENSORS:
            raise ValueError(damage)
        tensors, lost = dict[str, Tensor](), list[tuple[str, str]]()
        for key, entry in entries.items():
            try:
                check_names([key], "it")
                tensors[key] = _one_tensor(stream, entry, 8 + length, size)
            except (ValueError, TypeError, KeyError, OverflowError, SafetensorError) as error:
                lost.append((printable(key, 200), str(error) if type(error) is _Cut else "its entry is broken"))
    return Remains(tensors, metadata, tuple(lost), damage)


class _Cut(ValueError):
    """The file ends before a tensor does."""


def _one_tensor(stream: BinaryIO, entry: dict[str, Any], start: int, size: int) -> Tensor:
    """Raises one of several errors for an entry that is none."""
    first, last = (int(offset) for offset in entry["data_offsets"])
    if start + last > size:
        raise _Cut("the file ends before it does")
    stream.seek(start + first)
    data = stream.read(last - first)
    shape = list(_shape(entry["shape"]))
    header = json.dumps({"x": {"dtype": entry["dtype"], "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return load(len(header).to_bytes(8, "little") + header + data)["x"]


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
