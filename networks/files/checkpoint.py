"""A model's weights on disk, seen as keys: one safetensors file, or the folder of a diffusers component.

A copy with some tensors changed is written in the order of the file, one tensor after the other, so that memory stays
near the largest of them; dtypes, shapes and all other bytes are the same.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..foreign.texts import read_json
from . import outputs, reader, writer

log = logging.getLogger(__name__)

_CHUNK = 1 << 24  # bytes that are copied at once
_DTYPES = {  # by safetensors' names: of weights, of what may stand beside them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_WEIGHTS = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".index.json")


# Bytes per element; the names of other dtypes, of packed ones among them, say nothing here.
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class Checkpoint:
    """Keys and shapes of all files, read from their headers; tensors are read when they are asked for.

    Raises:
        ValueError: the path is neither a safetensors file nor a folder of them, or one of them is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._streams: dict[Path, RawIOBase] = {}
        self.files, self.index = _files_of(path)
        self.headers = {file: _whole(file, reader.read_header(file)) for file in self.files}
        self.where: dict[str, Path] = {}
        for file, header in self.headers.items():
            for key in header.shapes:
                if key in self.where:
                    raise ValueError(f"{key} is in {self.where[key]} and in {file}, too: remove it from one of them")
                self.where[key] = file
        if self.index is not None:
            _check_index(self.index, self.where)
        self.shapes = {key: shape for header in self.headers.values() for key, shape in header.shapes.items()}

    def tensor(self, key: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            ValueError: its dtype is not one that is read.
        """
        header, dtype, shape = self.headers[self.where[key]], self.dtype(key), self.shapes[key]
        if dtype not in _DTYPES:
            raise ValueError(f"{self.where[key]}: {key} is stored as {dtype}, which is not read here")
        start, end = header.entries[key]["data_offsets"]
        data = torch.empty(end - start, dtype=torch.uint8)
        stream = self._stream(self.where[key])
        stream.seek(header.start + start)
        if stream.readinto(data.numpy().data) != len(data):
            raise ValueError(f"{self.where[key]} has become shorter since it was opened: copy or download it again")
        return data.view(_DTYPES[dtype]).reshape(shape) if len(data) else torch.empty(shape)

    def _stream(self, file: Path) -> RawIOBase:
        """One for each file, for as long as this object lives: to open it anew costs more than a small tensor."""
        if file not in self._streams:
            self._streams[file] = file.open("rb", buffering=0)
            weakref.finalize(self, self._streams[file].close)
        return self._streams[file]

    def dtype(self, key: str) -> str:
        """As the file's header has it: F32, BF16, F8_E4M3 ..."""
        return str(self.headers[self.where[key]].entries[key]["dtype"])

    def beside(self, stem: str) -> list[str]:
        """The names of the tensors of one layer."""
        return self._layers.get(stem, [])

    @functools.cached_property
    def _layers(self) -> dict[str, list[str]]:
        layers: dict[str, list[str]] = {}
        for key in self.shapes:
            stem, _, name = key.rpartition(".")
            layers.setdefault(stem, []).append(name)
        return layers

    def write(
        self,
        out: Path,
        changed: Callable[[str], Mapping[str, Tensor]],
        metadata: Mapping[str, str],
        progress: Callable[[str, int], None],
    ) -> None:
        """Write a copy; a folder appears whole or not at all, like a file. What is there already is replaced.

        Args:
            changed: key -> the new tensors of all that change with it, itself among them, of the same shapes and
                dtypes; {} where it stays. Asked once for each of these.
            metadata: added to that of each file.
            progress: told each key and its bytes, when it has been written.

        Raises:
            ValueError: `out` is in the way, or the checkpoint itself.
            OSError: it cannot be written; nothing is left behind.
        """
        check_free(self, out)
        whole_folder = self.path.is_dir()
        with outputs.whole(out, self.size, "" if whole_folder else ".part") as part, contextlib.ExitStack() as opened:
            if whole_folder:
                shutil.copytree(self.path, part, ignore=self._not_copied)
            places = {file: part / file.relative_to(self.path) if whole_folder else part for file in self.files}
            copies = {file: _Copy(self.headers[file], metadata) for file in self.files}
            for file, copy in copies.items():
                copy.begin(opened.enter_context(places[file].open("x+b")))
            self._fill(copies, changed, progress)
            for copy in copies.values():
                copy.finish()
        if self.other_weights:
            names = ", ".join(str(file.relative_to(self.path)) for file in self.other_weights)
            log.warning("not in %s: %s, which would be weights without the change", out, names)

    def _fill(
        self,
        copies: Mapping[Path, _Copy],
        changed: Callable[[str], Mapping[str, Tensor]],
        progress: Callable[[str, int], None],
    ) -> None:
        """Write all tensors, in the order of the files; what changes together at once, wherever it stands, so that none
        of it waits in memory."""
        written = set[str]()
        for file, header in self.headers.items():
            for key in sorted(header.entries, key=lambda key: tuple(header.entries[key]["data_offsets"])):
                if key in written:
                    continue
                new = {**changed(key)}
                if not new:
                    copies[file].keep(key, self._stream(file))
                assert not new or key in new, key
                for each in [*new] or [key]:
                    home = self.where[each]
                    if new:
                        copies[home].put(each, new.pop(each))
                    start, end = self.headers[home].entries[each]["data_offsets"]
                    written.add(each)
                    progress(each, end - start)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(self._end(file) for file in self.files)

    @cached_property
    def other_weights(self) -> list[Path]:
        """Files of weights in the folder which are not the checkpoint's: in a copy they would stay as they are."""
        inside = sorted(self.path.rglob("*")) if self.path.is_dir() else []
        return [file for file in inside if self._is_weights(file) and file not in self.files]

    def _is_weights(self, file: Path) -> bool:
        return file.name.lower().endswith(_WEIGHTS) and file != self.index

    def _not_copied(self, folder: str, names: list[str]) -> set[str]:
        """Of the files in a folder: weights are written by us, or left out."""
        return {name for name in names if self._is_weights(Path(folder, name))}

    def _end(self, file: Path) -> int:
        """Bytes of a file's tensors."""
        return max((entry["data_offsets"][1] for entry in self.headers[file].entries.values()), default=0)


class _Copy:
    """The copy of one file in the making: its header, then its tensors in any order, then the hashes that it had.

    Args:
        header: of the file.
        metadata: added to its own.
    """

    def __init__(self, header: reader.Header, metadata: Mapping[str, str]) -> None:
        self._header = header
        kept = {key: text for key, text in header.metadata.items() if key not in writer.HASHES}
        self._metadata = {**kept, **metadata}
        self._hashed = [key for key in writer.HASHES if key in header.metadata]

    def begin(self, stream: BinaryIO) -> None:
        """
        Args:
            stream: of the new file, empty.
        """
        self._stream, begin = stream, self._begin(writer.HASHES)
        self._start = len(begin)
        stream.write(begin)

    def _begin(self, hashes: Mapping[str, str]) -> bytes:
        found = {key: hashes[key] for key in self._hashed}
        return writer.safetensors_header(self._header.entries, {**self._metadata, **found})

    def put(self, key: str, tensor: Tensor) -> None:
        """A new tensor, of the old shape and dtype."""
        start, end = self._header.entries[key]["data_offsets"]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert data.numel() == end - start, key
        self._stream.seek(self._start + start)
        self._stream.write(data.numpy().data)

    def keep(self, key: str, source: RawIOBase) -> None:
        """The bytes that are in the old file."""
        start, end = self._header.entries[key]["data_offsets"]
        source.seek(self._header.start + start)
        self._stream.seek(self._start + start)
        buffer = memoryview(bytearray(min(_CHUNK, end - start)))
        while start < end:
            size = source.readinto(buffer[: end - start]) or 0
            if not size:
                raise ValueError(f"{key} has become shorter since the checkpoint was opened: copy or download it again")
            self._stream.write(buffer[:size])
            start += size

    def finish(self) -> None:
        """The hashes of the new tensors, where the old file told those of its own; all of it down to the disk."""
        if self._hashed:
            self._stream.seek(self._start)
            payload = iter(functools.partial(self._stream.read, _CHUNK), b"")
            begin = self._begin(writer.hashes(self._header.entries, self._metadata, payload))
            self._stream.seek(0)
            self._stream.write(begin)
        self._stream.flush()
        os.fsync(self._stream.fileno())


def check_free(checkpoint: Checkpoint, out: Path) -> None:
    """Whether a copy may stand there: not over what is read, and a folder only over an earlier copy.

    Raises:
        ValueError: with what is in the way.
    """
    outputs.check_outputs([out], [checkpoint.path], overwrite=True)
    if not checkpoint.path.is_dir():
        if out.is_dir() or out.suffix.lower() != ".safetensors":
            raise ValueError(f"{out} is no file name of weights: give one that ends in .safetensors")
        return
    if any(above.exists() and above.samefile(checkpoint.path) for above in Path(os.path.realpath(out)).parents):
        raise ValueError(f"{out} lies in the folder of the checkpoint itself: choose another output")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, and the copy of a folder is a folder: choose another output")
    _check_earlier(checkpoint, out)


def _check_earlier(checkpoint: Checkpoint, out: Path) -> None:
    """A folder is replaced as a whole, so it may hold only what the new one has, too."""
    copied = {file.relative_to(checkpoint.path) for file in checkpoint.path.rglob("*")}
    copied -= {file.relative_to(checkpoint.path) for file in checkpoint.other_weights}
    others = [name for file in sorted(out.rglob("*")) if (name := file.relative_to(out)) not in copied]
    if others:
        raise ValueError(
            f"{out} is not an empty folder and no earlier copy, as it holds {others[0]}: choose another output"
        )


def _files_of(path: Path) -> tuple[list[Path], Path | None]:
    """All weight files of a component's folder, and its index where it has one; or the one file."""
    if not path.is_dir():
        return [reader.checked_path(path)], None
    if (path / "model_index.json").is_file():
        parts = sorted(p.name for p in path.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
        raise ValueError(f"{path} is a whole pipeline: give the folder of one component, {', '.join(parts) or '-'}")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return [reader.checked_path(path / name) for name in _names_in(indices[0])], indices[0]
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        inside = ", ".join(file.name for file in files) or "no .safetensors file"
        raise ValueError(f"{path} holds {inside}: give one file, or a folder with one file or one index")
    return files, None


def _whole(file: Path, header: reader.Header) -> reader.Header:
    """A header whose tensors follow each other, each as long as its shape says: a copy can be written in their order.

    Raises:
        ValueError: they do not.
    """
    end = 0
    try:
        for key in sorted(header.entries, key=lambda key: tuple(header.entries[key]["data_offsets"])):
            entry = header.entries[key]
            start, stop = entry["data_offsets"]
            numbers = (start, stop, *entry["shape"])
            if start != end or stop < start or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"the bytes of {key} do not follow those before it")
            if not isinstance(entry["dtype"], str):
                raise ValueError(f"{key} has no dtype")
            size = _SIZES.get(entry["dtype"])
            if size is not None and stop - start != size * math.prod(entry["shape"]):
                raise ValueError(f"{key}, {entry['dtype']} of {entry['shape']}, has {stop - start} bytes")
            end = stop
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}; copy or download it again") from None
    return header


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> the name of its file; {} where the index does not say."""
    try:
        found = dict(read_json(index)["weight_map"])
    except (ValueError, TypeError, KeyError):
        return {}
    return found if all(isinstance(name, str) for name in found.values()) else {}


def _check_index(index: Path, where: Mapping[str, Path]) -> None:
    """Whether each key is in the file that an index names: what reads the index would not find the others."""
    for key, name in _weight_map(index).items():
        if where.get(key) != index.parent / name:
            found = f"it is in {where[key].name}" if key in where else "no file of it has that"
            raise ValueError(f"{index} says that {name} has {key}, but {found}: copy or download the folder again")


def _names_in(index: Path) -> list[str]:
    """The files that an index names, which must be in its folder or below it."""
    names = sorted(set(_weight_map(index).values()))
    steps = {name: name.replace("\\", "/").split("/") for name in names}
    if not names:
        raise ValueError(f"{index} is damaged, as it names no files of weights: copy or download it again")
    outside = [name for name, parts in steps.items() if {"", ".", ".."} & {*parts} or ":" in name]
    if outside:
        raise ValueError(
            f"{index} names {outside[0]}, which is outside its folder and would stay without the change: put all files "
            "of weights beside their index"
        )
    return names
