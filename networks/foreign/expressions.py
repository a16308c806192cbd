"""Regular expressions that others have written: one may take longer than the world has existed.

Python's matching cannot be stopped, so what may be slow is tried by another process that ends itself in time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

SECONDS = 3.0  # for all names of a model together
# What may multiply the ways to match: a repeated group, several repetitions, or many choices, one after the other.
_GROUP = re.compile(r"\)\s*[*+{]")
_REPETITION = re.compile(r"[*+{]")
_CHOICE = re.compile(r"\(|(?<!\()\?")
TOO_SLOW = (
    f"takes more than {SECONDS:g} seconds on the names of this model, since its repetitions can share a name in too "
    "many ways: put none inside another, and write few of them, as in '.*attn.*'"
)
_TRIAL = """
import faulthandler, json, os, re, sys
patterns, names, seconds = json.load(sys.stdin)
faulthandler.dump_traceback_later(seconds, exit=True, file=open(os.devnull, "w"))
for pattern in patterns:
    os.write(1, b".")
    found = re.compile(pattern)
    for name in names:
        found.fullmatch(name), found.match(name), found.search(name)
os.write(1, b".")
"""


def compiled(pattern: str) -> re.Pattern[str]:
    """As `re.compile`, which has other errors for expressions that are too much for it.

    Raises:
        ValueError: it is no regular expression, with the reason.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(str(error)) from None
    except (RecursionError, OverflowError, MemoryError):
        raise ValueError("it is too large or nested too deep") from None


def slow(patterns: Sequence[str], names: Iterable[str]) -> str | None:
    """The first of these expressions that takes too long on these names, if one does.

    Args:
        patterns: which can be compiled.
        names: on which they will be tried.
    """
    doubtful = [pattern for pattern in dict.fromkeys(patterns) if _may_be_slow(pattern)]
    if not doubtful or not sys.executable or getattr(sys, "frozen", False):
        return None
    given = json.dumps([doubtful, sorted(set(names)), SECONDS]).encode()
    flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL], input=given, capture_output=True, timeout=60 + SECONDS,
            creationflags=flags,
        ).stdout  # fmt: skip
    except OSError:  # no process can be started here
        return None
    except subprocess.TimeoutExpired as late:
        tried = late.stdout or b"."
    return None if not tried or len(tried) > len(doubtful) else doubtful[len(tried) - 1]


def _may_be_slow(pattern: str) -> bool:
    return bool(_GROUP.search(pattern) or len(_REPETITION.findall(pattern)) > 3 or len(_CHOICE.findall(pattern)) > 12)
