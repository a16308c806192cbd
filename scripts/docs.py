"""Write what is generated from the records and the code: pages of docs/, parts of README.md and CONTRIBUTING.md, and
the types of networks.api's keywords. With --check, only say whether they are up to date.

    python scripts/docs.py [--check]

A generated part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; a file without these
lines has no such part.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's networks, whatever is installed

import compared_table  # noqa: E402
import imports  # noqa: E402
import readers_table  # noqa: E402
from pages import algorithms, architectures, arguments, plan, presets  # noqa: E402

from networks.args.render import typed  # noqa: E402

PARTS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"readers": readers_table.worst},
    ROOT / "docs" / "which-algorithm.md": compared_table.PARTS,
    ROOT / "CONTRIBUTING.md": {"imports": lambda: f"```mermaid\n{imports.mermaid()}\n```\n"},
}
WHOLE: dict[Path, Callable[[], str]] = {
    ROOT / "docs" / "arguments.md": arguments.page,
    ROOT / "docs" / "algorithms.md": algorithms.page,
    ROOT / "docs" / "architectures.md": architectures.page,
    ROOT / "docs" / "presets.md": presets.page,
    ROOT / "docs" / "plan.md": plan.page,
    ROOT / "docs" / "readers.md": readers_table.document,
    ROOT / "networks" / "args" / "options.py": typed,
}


def rendered(file: Path) -> str:
    """The text of a generated file, or of a file with every generated part made anew."""
    if file in WHOLE:
        return WHOLE[file]().rstrip("\n") + "\n"
    text = file.read_text(encoding="utf-8")
    for name, make in PARTS[file].items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if pattern.search(text):
            text = pattern.sub((begin + make() + end).replace("\\", r"\\"), text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    args = parser.parse_args(argv)
    fresh = {file: rendered(file) for file in (*PARTS, *WHOLE)}
    old = [file for file, text in fresh.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    if not old:
        print("generated documentation is up to date")
        return 0
    names = ", ".join(file.name for file in old)
    if args.check:
        print(f"{names}: out of date; run python scripts/docs.py", file=sys.stderr)
        return 1
    for file in old:
        file.parent.mkdir(exist_ok=True)
        file.write_text(fresh[file], encoding="utf-8", newline="\n")
    print(f"{names} updated")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
