"""Where programs write: never over what they read, over other files only if told to, whole or not at all.

A file or folder NAME is made in a part, the folder `.NAME.part` beside its destination, and moved there in one step.
The lock in the part tells that its writer lives; what a dead one left is removed before the next write to that name.
Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

WINDOWS = os.name == "nt"
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\xb9\xb2\xb3]) *(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')  # in names; behind a colon is another stream of a file
_LONGEST = 259  # characters of a path, unless Windows and the program are set to allow more
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds
LONG = 24 * 3600  # seconds without a write, after which a part is taken for left where no lock can tell
_LARGE = 2000  # entries; a folder with more is looked through once in a process
_HALF = ".part"
_BEFORE = ".before"  # ending of a former folder, in the part, while the new one takes its place
_hidden: dict[Path, list[str]] = {}  # of large folders: names that begin with a dot


# -- before the work


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path] = (), overwrite: bool = False) -> None:
    """Whether a program may write all of these; files are compared, not names, so links and spellings do not matter.

    Args:
        inputs: files that it reads, or folders whose files it reads.
        overwrite: whether other files may be replaced.

    Raises:
        ValueError: an output is one of the inputs, or exists, or is a link that leads nowhere.
    """
    read = {_identity(file): file for each in inputs for file in _files_of(each)}
    taken = []
    for output in outputs:
        try:
            destination(output)
        except OSError as error:
            raise ValueError(error.strerror) from None
        if not output.exists():
            continue
        same = read.get(_identity(output))
        if same is not None:
            name = "" if same == output else f" (as {same})"
            raise ValueError(f"{output} is read{name}, and writing it would destroy it: choose another output")
        taken.append(output)
    if taken and not overwrite:
        more = f" and {len(taken) - 1} other outputs" if len(taken) > 1 else ""
        raise ValueError(f"{taken[0]}{more} would be replaced: choose another output, or add --overwrite")


def _files_of(path: Path) -> list[Path]:
    """An input and, of a folder, all that is in it; nothing of what does not exist, which its reader will tell."""
    return [path, *(path.rglob("*") if path.is_dir() else ())] if path.exists() else []


def _identity(path: Path) -> tuple[int, int] | str:
    """Equal for two names of one file, and for nothing else."""
    try:
        found = path.stat()
    except OSError:  # a link in a folder that leads nowhere
        return os.path.abspath(path)
    # some file systems do not number their files
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.normcase(path.resolve())


def destination(path: Path) -> Path:
    """Where a write to `path` goes: behind a link, to what it points to.

    Raises:
        OSError: the link leads in a circle, or into a folder that does not exist; or Windows has no such name.
    """
    if WINDOWS:
        _check_names(path)
    is_junction: Callable[[Path], bool] = getattr(os.path, "isjunction", lambda path: False)  # Python 3.12, Windows
    if not path.is_symlink() and not is_junction(path):
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink() or not target.parent.is_dir():
        raise OSError(
            errno.ENOENT, f"{path} is a link to {target}, where nothing can be written: mend or remove the link"
        )
    return target


def _check_names(path: Path) -> None:
    """
    Raises:
        OSError: what is written under this name goes elsewhere under Windows: to a device, or under another name.
    """
    for name in path.parts[1:] if path.anchor else path.parts:
        if name not in (".", "..") and (_DEVICES.fullmatch(name) or _FORBIDDEN.search(name)):
            what = (
                "is the name of a device" if _DEVICES.fullmatch(name) else "has a character that no name can have there"
            )
            raise OSError(
                errno.EINVAL, f"{path} cannot be written under Windows, as {name!r} {what}: choose another name"
            )


# -- the work


@contextlib.contextmanager
def whole(path: Path, size: int | None = None, ending: str = "") -> Iterator[Path]:
    """Where the block writes the file or the folder which then becomes `path`, in one step; or nothing is left.

    Args:
        size: in bytes, for the message when the disk is full.
        ending: of its name until then, so that programs which look for models do not find half of one.

    Raises:
        OSError: what was there before is untouched.
    """
    try:
        target = destination(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        with _part(target) as part:
            new = part / (target.name + ending)
            yield new
            _move(new, target)
    except OSError as error:
        raise OSError(error.errno, _explain(error, path, size)) from error


def replace(file: Path, chunks: Iterable[bytes | memoryview], size: int) -> None:
    """Write a file whole or not at all.

    Args:
        size: of all chunks together, for the message when the disk is full.

    Raises:
        OSError: what was there before is untouched.
    """
    with whole(file, size, _HALF) as part:
        write(part, chunks)


def write(file: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a new file, down to the disk."""
    with file.open("xb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            del chunk  # while the next one is made: they are large
        stream.flush()
        os.fsync(stream.fileno())


def write_atomically(path: Path, make: Callable[[Path], object]) -> None:
    """Let `make(part)` write a file of that name elsewhere, then put it in the place of `path` in one step.

    Raises:
        OSError: what was there before is untouched.
    """
    with whole(path) as part:  # the ending tells many programs what to write
        make(part)


def _move(new: Path, target: Path) -> None:
    """Put what was made into its place. A folder that is there already goes into the part first; should the new one
    not take its place, `_discard` puts it back."""
    if new.is_dir() and target.exists():
        _again(lambda: os.rename(target, new.with_name(new.name + _BEFORE)))
    _again(lambda: os.replace(new, target))


def _again(move: Callable[[], None]) -> None:
    """Move, under Windows more than once: virus scanners, previews and copies to a cloud open files for a moment."""
    for pause in _PAUSES if WINDOWS else ():
        try:
            return move()
        except PermissionError:
            time.sleep(pause)
    move()


def _explain(error: OSError, file: Path, size: int | None) -> str:
    kept = "the file that was there before is untouched" if file.exists() else "nothing was left behind"
    if error.errno == errno.ENOSPC:
        needed = "" if size is None else f" ({size / 2**20:.1f} MiB)"
        return f"no space for {file}{needed}: free some, or save elsewhere; {kept}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "close the programs that have it open, or " if WINDOWS and file.exists() else ""
        return f"not allowed to write {file}: {remedy}choose another output folder; {kept}"
    longest = len(os.path.abspath(file)) + len(file.name) + len("./.part.part")  # of the part in which it is made
    if WINDOWS and longest > _LONGEST:
        return f"{file} is {longest - _LONGEST} characters too long for Windows: choose a folder near the root; {kept}"
    return f"cannot write {file}: {error.strerror or error}; {kept}"


# -- parts


@contextlib.contextmanager
def _part(target: Path) -> Iterator[Path]:
    """A new part for `target`, locked by this process; several writers of one name have one each."""
    part, lock = _new_part(target)
    try:
        yield part
    finally:
        _discard(part, lock)


def _new_part(target: Path) -> tuple[Path, int]:
    """The part and the descriptor of its lock, which goes in before the host's name: a lock without one is not read."""
    for number in itertools.count(1):
        part, lock = target.with_name(f".{target.name}{f'.{number}' * (number > 1)}.part"), -1
        try:
            part.mkdir()
        except FileExistsError:  # another writer's
            continue
        try:
            lock = os.open(_lock_of(part), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            if _locked(lock) is not False:
                os.write(lock, _host())
                return part, lock
        except BaseException as error:
            _discard(part, lock)
            if not isinstance(error, FileNotFoundError):  # a former writer's late clean-up, below
                raise
            continue
        _discard(part, lock)  # another looks at it in this very moment
    raise AssertionError("numbers do not end")


def _lock_of(part: Path) -> Path:
    return part / f"{part.name}.lock"


def _host() -> bytes:
    """This machine: the locks of some network file systems are known on one machine alone."""
    return socket.gethostname().encode()


def _locked(lock: int) -> bool | None:
    """Lock a file for as long as this process lives; False if another has done so, None where there are no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK) else None
    return True


def _discard(part: Path, lock: int) -> bool:
    """Remove a part whose lock is ours; whether it is gone."""
    try:
        for kept in part.glob(f"*{_BEFORE}"):
            home = part.with_name(kept.name.removesuffix(_BEFORE))
            if not home.exists():  # ended between the two renames
                os.rename(kept, home)
        if lock >= 0 and sys.platform == "win32":  # an open file stays there, so another's part, too
            os.close(lock)
            _lock_of(part).unlink()
        shutil.rmtree(part, ignore_errors=True)
        return not part.exists()
    except OSError:
        return False
    finally:
        if lock >= 0 and sys.platform != "win32":
            left = part.exists()
            os.close(lock)
            if left:  # network file systems keep what is open under another name
                with contextlib.suppress(OSError):
                    part.rmdir()


def _sweep(target: Path) -> None:
    """Remove what dead writers of `target` left beside it, and say so in one line."""
    name, stem, suffix = map(re.escape, (target.name, target.stem, target.suffix))
    # earlier versions named theirs by random letters, or by the process's number before the ending
    folders = re.compile(rf"\.{name}((\.\d+)?\.part|\.[a-z0-9_]{{8}})")
    files = re.compile(rf"\.{name}\.[a-z0-9_]{{8}}\.part|\.{stem}\.\d+{suffix}")
    gone, total = [], 0
    for found in {f".{target.name}.part", *_hidden_names(target.parent)}:
        if not folders.fullmatch(found) and not files.fullmatch(found):
            continue
        with contextlib.suppress(OSError):  # what goes at this moment was no dead one's
            left = target.with_name(found)
            size = sum(file.lstat().st_size for file in _inside(left))
            if _remove_folder(left, target.name) if folders.fullmatch(found) else _remove_file(left):
                gone.append(found)
                total += size
    if gone:
        where = f"{', '.join(sorted(gone))} in {target.parent}"
        log.warning("removed %s (%.1f MiB), left there by a program that was ended as it wrote", where, total / 2**20)


def _hidden_names(folder: Path) -> list[str]:
    """Names that begin with a dot."""
    folder = Path(os.path.abspath(folder))
    if folder in _hidden:
        return _hidden[folder]
    try:
        everything = os.listdir(folder)
    except OSError:  # it may be written to, and not listed
        return []
    names = [name for name in everything if name.startswith(".")]
    if len(everything) > _LARGE:
        _hidden[folder] = names
    return names


def _remove_folder(left: Path, name: str) -> bool:
    """Remove a part if its writer is dead; whether that was done."""
    if left.is_symlink() or not left.is_dir():
        return False
    try:
        lock = os.open(_lock_of(left), os.O_RDWR)
    except OSError:  # an earlier version's, or its writer ended before it had a lock
        return all(child.name == name for child in left.iterdir()) and _untouched(left) and _discard(left, -1)
    if _is_dead(left, lock):
        return _discard(left, lock)
    os.close(lock)
    return False


def _is_dead(left: Path, lock: int) -> bool:
    """Whether a part has no writer any more; its lock is ours then."""
    free = _locked(lock)
    if free is False:
        return False
    try:
        if not os.path.samestat(os.fstat(lock), _lock_of(left).stat()):
            return False  # a new part has come in under the same name
        return _untouched(left) or (bool(free) and os.read(lock, 300) == _host())
    except OSError:
        return False


def _remove_file(left: Path) -> bool:
    """Remove an earlier version's part if its writer is dead; whether that was done."""
    if left.is_symlink() or not left.is_file() or not _untouched(left):
        return False
    left.unlink()
    return True


def _inside(path: Path) -> list[Path]:
    """A part and all that is in it."""
    return [path, *path.rglob("*")]


def _untouched(part: Path) -> bool:
    """Whether nothing was written there for so long that its writer must be dead."""
    return max(each.lstat().st_mtime for each in _inside(part)) < time.time() - LONG
