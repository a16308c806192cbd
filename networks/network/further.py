"""Further files beside those that a trainer asks for: in the forms of other programs, of averages, and gone when those
are gone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from ..files.dialects import Dialect

log = logging.getLogger(__name__)

Stamps = dict[Path, tuple[int, int]]  # file -> when it was written, in ns, and how long it is


def beside(file: Path, dialect: Dialect) -> Path:
    """Where the further file, or folder, of a dialect goes: `name-comfyui.safetensors`, `name-peft`."""
    return file.with_name(f"{file.stem}-{dialect.name}{'' if dialect.folder else file.suffix}")


class Further:
    """The further files of a run. A trainer that keeps the newest alone removes its files by their names: what stands
    beside them goes at the next save, if this run wrote it and nobody has changed it since; nothing else ever."""

    def __init__(self) -> None:
        self._written: dict[Path, dict[Path, Stamps]] = {}

    def write(self, file: Path, path: Path, make: Callable[[Path], str]) -> None:
        """Write one. It does not matter as much as the training: what goes wrong is a warning.

        Args:
            file: beside which it stands, and with which it goes.
            path: of the further one.
            make: writes it, and says in words what layers were converted to.
        """
        try:
            told = make(path)
            stamps = _stamps(path)
            self._written.setdefault(file.absolute(), {})[path.absolute()] = stamps
            size = sum(size for _, size in stamps.values()) / 1e6
            log.info("saved %s, too (%.1f MB%s)", path.name, size, f": {told}" if told else "")
        except Exception as error:
            log.warning("%s is saved, but not %s beside it: %s", file.name, path.name, error)

    def remove_orphans(self) -> None:
        """Remove those whose file the trainer has removed."""
        for file, further in [*self._written.items()]:
            if file.exists() or not file.parent.is_dir():  # a drive that is away for a moment removes nothing
                continue
            left = {path: stamps for path, stamps in further.items() if not _remove(path, stamps)}
            if left:  # open in another program: at the next save
                self._written[file] = left
            else:
                del self._written[file]
            gone = further.keys() - left.keys()
            if gone:
                log.info("removed %s with %s", ", ".join(sorted(path.name for path in gone)), file.name)


def _stamps(path: Path) -> Stamps:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {file.absolute(): (file.stat().st_mtime_ns, file.stat().st_size) for file in files}


def _remove(path: Path, stamps: Stamps) -> bool:
    """Remove the files that are as they were written; whether none of them is left."""
    for file in [file for file, stamp in stamps.items() if _is_unchanged(file, stamp)]:
        with contextlib.suppress(OSError):
            file.unlink()
    folders = {parent for file in stamps for parent in file.parents if parent.is_relative_to(path)}
    for folder in sorted(folders, reverse=True):
        with contextlib.suppress(OSError):  # there is something else in it
            folder.rmdir()
    return not any(_is_unchanged(file, stamp) for file, stamp in stamps.items())


def _is_unchanged(file: Path, stamp: tuple[int, int]) -> bool:
    try:
        return (file.stat().st_mtime_ns, file.stat().st_size) == stamp
    except OSError:
        return False
