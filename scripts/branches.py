"""How much a reader must hold in his head: branches plus boolean operators of each function, at most MOST.

Run by scripts/check.py. A function that reads better whole stands in EXCEPTIONS, with the reason.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("networks", "kohya_networks", "kohya_trainer", "scripts")
MOST = 12
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.match_case, ast.comprehension)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

EXCEPTIONS: dict[str, str] = {}  # path:Class.name -> why it must stay whole


def count(function: ast.AST) -> int:
    """Branches and boolean operators of a function, without those of functions and classes inside it."""
    total, waiting = 0, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        total += isinstance(node, BRANCHES)
        total += len(node.ifs) if isinstance(node, ast.comprehension) else 0
        total += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        waiting += ast.iter_child_nodes(node)
    return total


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """(path:Class.name, count) of every function in a file."""
    where = file.relative_to(ROOT).as_posix()

    def walk(node: ast.AST, above: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            name = f"{above}{child.name}" if isinstance(child, (*FUNCTIONS, ast.ClassDef)) else above
            if isinstance(child, FUNCTIONS):
                yield f"{where}:{name}", count(child)
            yield from walk(child, f"{name}." if name != above else above)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), "")


def problems() -> list[str]:
    """One line for each function above its limit, and for each exception that is not needed any more."""
    counts = dict(
        found for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")) for found in functions(file)
    )
    return [
        f"{name} has {number} branches and boolean operators, at most {MOST}: divide it"
        for name, number in counts.items()
        if number > MOST and name not in EXCEPTIONS
    ] + [f"{name} needs no exception: take it out" for name in EXCEPTIONS if counts.get(name, 0) <= MOST]


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or f"no function has more than {MOST} branches and boolean operators")
    sys.exit(1 if found else 0)
