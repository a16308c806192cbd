"""A model's weights on disk, seen as keys: one safetensors file, or the folder of a diffusers component.

A copy with some tensors changed is written in the order of the file, one tensor after the other, so that memory stays
near the largest of them; dtypes, shapes and all other bytes are the same.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from . import reader, writer

_CHUNK = 1 << 24  # bytes that are copied at once
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of tensors that have changed


class Checkpoint:
    """Keys and shapes of all files, read from their headers; tensors are read when they are asked for.

    Raises:
        ValueError: the path is neither a safetensors file nor a folder of them, or one of them is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _files_of(path)
        self.headers = {file: reader.read_header(file) for file in self.files}
        self.where = {key: file for file, header in self.headers.items() for key in header.shapes}
        self.shapes = {key: shape for header in self.headers.values() for key, shape in header.shapes.items()}

    def tensor(self, key: str) -> Tensor:
        """One tensor, in memory of its own."""
        with safe_open(str(self.where[key]), framework="pt", device="cpu") as opened:
            return opened.get_tensor(key).clone()

    def write(
        self,
        out: Path,
        changed: Callable[[str], Tensor | None],
        metadata: Mapping[str, str],
        progress: Callable[[str, int], None],
    ) -> None:
        """Write a copy; a folder appears whole or not at all, like a file.

        Args:
            changed: key -> its new tensor, of the same shape and dtype, or None where it stays; asked once per key.
            metadata: added to that of each file.
            progress: told each key and its bytes, when it has been written.

        Raises:
            ValueError: `out` is in the way, or the checkpoint itself.
            OSError: it cannot be written; nothing is left behind.
        """
        check_free(self, out)
        if not self.path.is_dir():
            self._copy(self.files[0], out, changed, metadata, progress)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            whole = Path(temporary) / out.name
            names = {file.name for file in self.files}
            shutil.copytree(self.path, whole, ignore=lambda folder, found: names & set(found))
            for file in self.files:
                self._copy(file, whole / file.name, changed, metadata, progress)
            if out.exists():
                out.rmdir()  # empty, as was checked
            whole.rename(out)

    def _copy(
        self,
        file: Path,
        out: Path,
        changed: Callable[[str], Tensor | None],
        metadata: Mapping[str, str],
        progress: Callable[[str, int], None],
    ) -> None:
        header = self.headers[file]
        kept = {key: value for key, value in header.metadata.items() if key not in _STALE}
        ordered = sorted(header.entries, key=lambda key: header.entries[key]["data_offsets"])
        size = max((header.entries[key]["data_offsets"][1] for key in ordered), default=0)

        def chunks() -> Iterator[bytes | memoryview]:
            yield writer.safetensors_header(header.entries, {**kept, **metadata})
            with file.open("rb") as stream:
                for key in ordered:
                    start, end = header.entries[key]["data_offsets"]
                    tensor = changed(key)
                    if tensor is None:
                        stream.seek(header.start + start)
                        for at in range(start, end, _CHUNK):
                            yield stream.read(min(_CHUNK, end - at))
                    else:
                        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                        assert data.numel() == end - start, key
                        yield data.numpy().data
                    progress(key, end - start)

        writer.replace(out, chunks(), size)


def check_free(checkpoint: Checkpoint, out: Path) -> None:
    """Whether the copy may be written there: a merge over its own input could not be told from a second one.

    Raises:
        ValueError: with what is in the way.
    """
    if out.exists() and out.samefile(checkpoint.path):
        raise ValueError(f"{out} is the checkpoint itself: choose another output, the merge cannot be taken back")
    if checkpoint.path.is_dir():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and is not an empty folder: choose another output for a folder of weights")
    elif out.is_dir() or out.suffix.lower() != ".safetensors":
        raise ValueError(f"{out} is no file name of weights: give one that ends in .safetensors")


def _files_of(path: Path) -> list[Path]:
    """All weight files of a component's folder, by its index where it has one, or the one file."""
    if not path.is_dir():
        return [reader.check(path)]
    if (path / "model_index.json").is_file():
        parts = sorted(p.name for p in path.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
        raise ValueError(f"{path} is a whole pipeline: give the folder of one component, {', '.join(parts) or '-'}")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        return [reader.check(path / name) for name in names]
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        inside = ", ".join(file.name for file in files) or "no .safetensors file"
        raise ValueError(f"{path} holds {inside}: give one file, or a folder with one file or one index")
    return files
