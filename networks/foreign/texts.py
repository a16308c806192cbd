"""Text that others have written: what is shown of it, and how files of it are read.

Nothing of it comes to a terminal, a log or an error as it stands: it may hold escape codes, lines that look like ours,
or megabytes.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHOWN = 2000  # characters of a message
MOST = 1 << 20  # bytes of a text that people write: arguments, patterns, settings
MOST_OF_MODEL = 1 << 26  # of one that belongs to a model: an index of its files


def printable(text: object, most: int = SHOWN) -> str:
    """On one line, with escapes for all that a terminal obeys; without its middle where it is too long.

    Args:
        most: characters; 0 = any number.
    """
    shown = str(text)
    if 0 < most < len(shown):
        head = most // 2
        shown = f"{shown[:head]} ... ({len(shown) - most:,} more characters) ... {shown[head - most :]}"
    return shown if shown.isprintable() else "".join(map(_escaped, shown))


def _escaped(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":  # blanks, those of East Asia too
        return character
    return character.encode("unicode_escape").decode("ascii")


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is that of none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def exists(path: Path) -> bool:
    """The same of a file or a folder."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def user_path(text: str) -> Path:
    """A path as a user wrote it, with `~` for a home.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"names {printable(text, 200)!r}, and there is no such user: write the path in full") from None


def read_text(path: Path, most: int = MOST) -> str:
    """A text file, with or without the mark that some editors put before UTF-8.

    Args:
        most: bytes; what is larger is no such text.

    Raises:
        ValueError: it cannot be read, with its path.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({reason}): check the path") from None
    if len(data) > most:
        raise ValueError(f"{path} has more than {most >> 20} MiB, which no such text has: check the path")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def read_json(path: Path, most: int = MOST_OF_MODEL) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it cannot be read, or is not JSON, with its path.
    """
    text = read_text(path, most)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None


def parse_json(text: str | bytes, make: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON of others -> values.

    Args:
        make: of the pairs of an object; None = a dict.

    Raises:
        ValueError: it is not JSON, or is nested so deep that nobody means it.
    """
    try:
        return json.loads(text, object_pairs_hook=make)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
