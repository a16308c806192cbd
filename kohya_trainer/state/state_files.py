"""The files of a training state, of which there is a whole one at every instant.

    NAME-state/train_state.json             what the state is, with the names and checksums of its other files
    NAME-state/adapter-3.safetensors        each kind with the number of the save
    NAME-state/optimizer-3.safetensors

A save writes its files beside those of the one before, and then train_state.json over the former one in one step: until
then the folder is the earlier state, from then on the new one, on every system. Files without a place in it are what a
writer that was ended has left; they go before the next save. Nothing of it is a pickle, and none is opened.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from networks.files.outputs import replace
from networks.foreign.texts import read_json

STATE_FILE = "train_state.json"
LAYOUT = 2
KINDS = ("adapter", "optimizer")
SERIES = r"(?:-interrupted|-step\d+)?"  # what a run puts behind its name
# ours, finished or not, with the number of their save
_OURS = re.compile(rf"\.?(?:(?:{'|'.join(KINDS)})-(?P<number>\d+)\.safetensors|{re.escape(STATE_FILE)})(?:\..*)?")
# accelerate's, of a state of the first layout
FIRST_ADAPTER, FIRST_OPTIMIZER, FIRST_SCALER = "model.safetensors", "optimizer.bin", "scaler.pt"
_FIRST = re.compile(
    "|".join(re.escape(name) for name in (FIRST_ADAPTER, FIRST_OPTIMIZER, FIRST_SCALER))
    + r"|custom_checkpoint_0\.pkl|random_states_\d+\.pkl"
)
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF)  # of file systems, for folders


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """What a state says of itself, and its files by kind, unharmed.

    Raises:
        ValueError: it is none, is damaged, or holds files which can run code when they are opened.
    """
    content = _content(folder)
    if content is None:
        raise ValueError(f"{folder}: {STATE_FILE} is missing or damaged. Give a NAME-...-state, or an earlier one.")
    if content.get("layout", LAYOUT) != LAYOUT:
        raise ValueError(f"{folder} was written by a later version of this trainer. Go on with that one.")
    _refuse_pickles(folder)
    if "layout" in content:
        return content, {kind: _unharmed(folder, *found) for kind, found in _files_of(content, folder).items()}
    paths = dict(zip(KINDS, (folder / FIRST_ADAPTER, folder / FIRST_OPTIMIZER), strict=True))
    for path in paths.values():
        if not path.is_file():
            raise ValueError(f"{folder}: {path.name} is missing. Take another state.")
    return content, paths


def _content(folder: Path) -> dict[str, Any] | None:
    """None where train_state.json is missing, or not as it was written."""
    try:
        content = read_json(folder / STATE_FILE)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    checksum = content.pop("checksum", None)
    expected = _checksum(content) if "layout" in content else None  # the first layout has none
    return content if checksum == expected else None


def _files_of(content: Mapping[str, Any], folder: Path) -> dict[str, tuple[str, str]]:
    """Kind -> name and checksum of its file. Raises ValueError where that is not what is written there."""
    try:
        found = {kind: (str(name), str(digest)) for kind, (name, digest) in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        found = {}
    if found.keys() != set(KINDS) or not all(_OURS.fullmatch(name) for name, _ in found.values()):
        raise ValueError(f"{folder}: {STATE_FILE} does not name the files of a state. Take another state.")
    return found


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse_pickles(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _PICKLES and not (path.parent == folder and _FIRST.fullmatch(path.name)):
            raise ValueError(
                f"{folder} holds {path.relative_to(folder)}: such files can run code when they are opened, and a state "
                "of this trainer has none (those which DeepSpeed wrote for earlier versions had). Take another state, "
                "or go on from the .safetensors beside it with --network_weights."
            )


def _unharmed(folder: Path, name: str, digest: str) -> Path:
    """The path of one of the state's files. Raises ValueError when it is not as it was written."""
    path, found = folder / name, hashlib.sha256()
    if not path.is_file():
        raise ValueError(f"{folder}: {name} is missing. Take another state.")
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    if found.hexdigest() != digest:
        raise ValueError(f"{folder}: {name} is damaged (it has another checksum). Take another state.")
    return path


def write(folder: Path, content: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Make `folder` this state; until the new one is complete, it is what it was before.

    Args:
        content: JSON.
        files: by kind.

    Raises:
        OSError: it cannot be written, and is what it was before.
    """
    number = 1 + max((_number(path) for path in _ours(folder)), default=0)
    named = {kind: [f"{kind}-{number}.safetensors", hashlib.sha256(data).hexdigest()] for kind, data in files.items()}
    whole = json.loads(json.dumps({"layout": LAYOUT, **content, "files": named}))
    text = json.dumps({**whole, "checksum": _checksum(whole)}, indent=1) + "\n"
    complete = False
    try:
        for kind, data in files.items():
            replace(folder / named[kind][0], (data,), len(data))
        _sync(folder)
        replace(folder / STATE_FILE, (text.encode(),), len(text))
        complete = True
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the state {folder} is as it was before") from error
    finally:
        if not complete:
            clean(folder)
    _sync(folder)
    _sync(folder.parent)
    clean(folder)  # the earlier one, now that no power failure brings it back


def clean(folder: Path) -> list[str]:
    """Remove what is not part of the state in `folder`: of saves before it, or that were ended. Returns the names."""
    content = _content(folder)
    if content is None and (folder / STATE_FILE).exists():
        return []  # damaged: nobody knows what belongs to it
    surplus = _surplus(folder, content or {})
    for path in surplus:
        with contextlib.suppress(OSError):  # somebody has it open: it goes before the next save
            if path.is_dir():  # a file that was being written; the folder is one run's
                shutil.rmtree(path)
            else:
                path.unlink()
    if surplus:
        with contextlib.suppress(OSError):  # there is something in it
            folder.rmdir()
    return [path.name for path in surplus if not path.exists()]


def _surplus(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    layout = content.get("layout")
    if layout not in (None, LAYOUT):
        return []
    try:
        files = _files_of(content, folder) if layout == LAYOUT else {}
    except ValueError:  # nobody knows what belongs to it
        return []
    kept = {STATE_FILE, *(name for name, _ in files.values())}
    first = [path for path in _entries(folder) if layout == LAYOUT and _FIRST.fullmatch(path.name)]
    return [path for path in _ours(folder) if path.name not in kept] + first


def clean_series(folder: Path, name: str) -> list[str]:
    """The same for all states of the runs of a name in `folder`."""
    states = re.compile(rf"{re.escape(name)}{SERIES}-state")
    found = [path for path in _entries(folder) if path.is_dir() and states.fullmatch(path.name)]
    return [f"{state.name}/{left}" for state in found for left in clean(state)]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _ours(folder: Path) -> Iterator[Path]:
    return (path for path in _entries(folder) if _OURS.fullmatch(path.name))


def _number(path: Path) -> int:
    found = _OURS.fullmatch(path.name)
    return int(found["number"] or 0) if found else 0


def _sync(folder: Path) -> None:
    """Have the names in a folder written, where a system knows such a thing."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)
