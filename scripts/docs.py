"""Write what is generated from the records and the code: parts of README.md and CONTRIBUTING.md, docs/readers.md, and
the types of networks.api's keywords. With --check, only say whether they are up to date.

    python scripts/docs.py [--check]

A generated part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
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

from networks.archs.render import markdown as architectures  # noqa: E402
from networks.archs.render import owners  # noqa: E402
from networks.args.presets import markdown as presets  # noqa: E402
from networks.args.render import algorithms, markdown, typed  # noqa: E402
from networks.plan.render import markdown as selection  # noqa: E402

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PARTS: dict[Path, dict[str, Callable[[], str]]] = {
    README: {
        "presets": presets,
        "arguments": lambda: markdown(owners()),
        "architectures": architectures,
        "algorithms": algorithms,
        "selection": selection,
        "readers": readers_table.worst,
    },
    ROOT / "docs" / "which-algorithm.md": compared_table.PARTS,
    CONTRIBUTING: {"imports": lambda: f"```mermaid\n{imports.mermaid()}\n```\n"},
}
TYPES = ROOT / "networks" / "args" / "options.py"
READERS = ROOT / "docs" / "readers.md"


def rendered(file: Path) -> str:
    """The text of a file with every generated part made anew.

    Raises:
        ValueError: a part's markers are missing.
    """
    text = file.read_text(encoding="utf-8")
    for name, make in PARTS[file].items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{file.name} lacks the lines {begin.strip()} and {end}")
        text = pattern.sub((begin + make() + end).replace("\\", r"\\"), text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    args = parser.parse_args(argv)
    fresh = {**{file: rendered(file) for file in PARTS}, TYPES: typed(), READERS: readers_table.document()}
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
