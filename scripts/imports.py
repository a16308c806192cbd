"""Who imports whom, drawn from the code: folders from the lowest to the highest, each below all that import it.

    python scripts/imports.py               the folders as text
    python scripts/imports.py --mermaid     the same as a Mermaid drawing, for a page of documentation

Imports inside functions and for type checkers only are left out: they do not decide what can be imported first.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("networks", "kohya_trainer")
Graph = dict[str, set[str]]  # name -> what it imports


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.Try):
            yield from statements(node.body)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from statements([*node.body, *node.orelse])


def imported(module: str, file: Path, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Dotted names that a statement may mean: modules, or names in them."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (file.name == "__init__.py")] if node.level else []
    source = ".".join([*base, *([node.module] if node.module else [])])
    yield source
    yield from (f"{source}.{alias.name}" for alias in node.names)


def module_graph() -> Graph:
    """Of modules. A package's own file counts as one of its modules."""
    known, graph = modules(), Graph()
    for module, file in known.items():
        found = statements(ast.parse(file.read_text(encoding="utf-8")).body)
        graph[module] = {name for node in found for name in imported(module, file, node) if name in known} - {module}
        if file.name != "__init__.py":  # from . import a: of the package, only `a` is meant
            graph[module] -= {module.rpartition(".")[0]}
    return graph


def folder_of(module: str, known: Mapping[str, Path]) -> str:
    """`networks.files`, `kohya_trainer`; `networks` for the entries."""
    folder = known[module].parent.relative_to(ROOT).parts
    return ".".join(folder[:2] if folder[0] == "networks" else folder[:1])


def folder_graph() -> Graph:
    """Of folders, without the arrows inside one."""
    known, graph = modules(), Graph()
    for module, targets in module_graph().items():
        folder = folder_of(module, known)
        graph.setdefault(folder, set()).update(folder_of(target, known) for target in targets)
    return {folder: targets - {folder, "networks"} for folder, targets in graph.items()}


def circle(graph: Graph) -> list[str]:
    """The names of a circle of imports; [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def layers(graph: Graph) -> list[list[str]]:
    """Rows of folders: each imports from the rows above it only."""
    sorter, rows = TopologicalSorter(graph), []
    sorter.prepare()
    while sorter.is_active():
        rows.append(sorted(sorter.get_ready()))
        sorter.done(*rows[-1])
    return rows


def reduced(graph: Graph) -> Graph:
    """Without the arrows that follow from others."""
    reach: Graph = {}
    for name in TopologicalSorter(graph).static_order():
        reach[name] = set(graph[name]).union(*(reach[target] for target in graph[name]))
    return {
        name: {target for target in targets if not any(target in reach[other] for other in targets - {target})}
        for name, targets in graph.items()
    }


def mermaid() -> str:
    """The folders as a Mermaid drawing, the lowest at the bottom."""
    arrows = (
        f"  {name} --> {target}" for name, targets in reduced(folder_graph()).items() for target in sorted(targets)
    )
    return "\n".join(["graph TD", *arrows])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there is a circle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mermaid", action="store_true", help="as a drawing")
    args = parser.parse_args(argv)
    for graph in (module_graph(), folder_graph()):
        if found := circle(graph):
            print(f"a circle of imports: {' -> '.join(found)}", file=sys.stderr)
            return 1
    if args.mermaid:
        print(mermaid())
        return 0
    graph = folder_graph()
    for row in layers(graph):
        for name in row:
            print(f"{name:24} {', '.join(sorted(target.removeprefix('networks.') for target in graph[name])) or '-'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
