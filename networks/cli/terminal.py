"""Text as wide as the terminal that it is read on."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import textwrap


def width() -> int:
    """Columns of the terminal, or those that COLUMNS gives; 80 where neither is known."""
    return shutil.get_terminal_size().columns


def columns_of_output() -> int:
    """How wide a line of stdout may be; 0 = as wide as it is, since it goes to a file or a program."""
    return width() - 1 if sys.stdout.isatty() else 0


def fitted(text: str, columns: int | None = None) -> str:
    """A help text in which no line is too wide.

    Paragraphs are filled anew. A wide command, which is indented, goes on in the next line behind a backslash; a
    remark beside it, two spaces away, goes below it.

    Args:
        text: paragraphs, and indented lines of commands.
        columns: how wide a line may be; default: one less than the terminal.
    """
    columns = max(40, width() - 1 if columns is None else columns)
    lines: list[str] = []
    for command, block in itertools.groupby(text.splitlines(), key=lambda line: line[:1].isspace() or not line):
        part = list(block)
        if all(len(line) <= columns for line in part):
            lines += part
        elif command:
            lines += [piece for line in part for piece in _command(line, columns)]
        else:
            lines += _filled(" ".join(part), columns)
    return "\n".join(lines)


def folded(line: str, columns: int | None = None) -> list[str]:
    """A line of output in as many as it needs; those after the first stand further in.

    Args:
        line: with its indentation.
        columns: how wide a line may be; default: one less than the terminal.
    """
    columns = max(40, width() - 1 if columns is None else columns)
    if len(line) <= columns:
        return [line]
    first = line[: len(line) - len(line.lstrip())]
    return _filled(line.strip(), columns, first, f"{first}    ")


def _command(line: str, columns: int) -> list[str]:
    """One indented line in as many as it needs."""
    if len(line) <= columns:
        return [line]
    first = line[: len(line) - len(line.lstrip())]
    command, *remark = re.split(r"\s{2,}", line.strip(), maxsplit=1)
    pieces = _filled(command, columns - 2, first, f"{first}    ")  # two less: room for the backslash
    below = _filled(remark[0], columns, f"{first}    ", f"{first}    ") if remark else []
    return [f"{piece} \\" for piece in pieces[:-1]] + pieces[-1:] + below


def _filled(text: str, columns: int, first: str = "", rest: str = "") -> list[str]:
    """Lines of whole words: a path or an option is not taken apart."""
    return textwrap.wrap(
        text, columns, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
