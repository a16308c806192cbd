"""The arguments of a network module, each with its values, its default in both trainers, and its effect.

    kohya-networks args lokr
    kohya-networks args networks.lora_flux --json

MODULE is a network module, or an algorithm. Without one, all arguments of all modules are listed. No model is needed;
`kohya-networks plan` shows what they do to one.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..archs import ARCHS
from ..args.render import as_json, plain
from ..args.table import BY_NAME, TABLE
from ..hosts.stops import applies, listing
from ..records import Arg
from .command_line import nearest, program, run_program

ENTRIES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Module:
    """A network module as its own file states it; reading that needs no torch.

    Attributes:
        title: its first line, or a name.
        algo: the algorithm when `algo=` is not given.
        archs: architectures that it insists on; () = every one.
    """

    title: str
    algo: str
    archs: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str) -> Module:
        """By its name, with or without the package, or an algorithm.

        Raises:
            ValueError: there is none of this name.
        """
        short, algos = name.rpartition(".")[2], BY_NAME["algo"].choices
        entries = {file.stem: file for file in ENTRIES.glob("*.py")}
        found = cls._in(entries[short]) if short in entries else None
        if found is None and short in algos:
            found = cls(f"algo={short}", short)
        if found is None:
            known = sorted({*algos, *(stem for stem, file in entries.items() if cls._in(file))})
            raise ValueError(
                f"{name} is neither a network module nor an algorithm.{nearest(short, known)} "
                f"There are {', '.join(known)}"
            )
        return found

    @classmethod
    def _in(cls, file: Path) -> Module | None:
        """What the call of `Entry` in this file says; None without one."""
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        entry = next((call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Entry"), None)
        if entry is None:
            return None
        _, algo, *archs = entry.args
        title = (ast.get_docstring(tree) or file.stem).partition("\n")[0].replace("`", "")
        return cls(title, ast.literal_eval(algo), ast.literal_eval(archs[0]) if archs else ())

    def has(self, arg: Arg) -> bool:
        """Whether the argument does something there, with its own algorithm, on a model for which it is."""
        own = [arch for arch in ARCHS if not self.archs or arch.name in self.archs]
        return applies(arg, [self.algo], own)


def build_parser() -> argparse.ArgumentParser:
    parser = program(__doc__)
    parser.add_argument("module", metavar="MODULE", nargs="?", help="networks.lokr, lokr, diag-oft, ...; default: all")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(show, build_parser(), sys.argv[1:] if argv is None else list(argv))


def show(args: argparse.Namespace) -> int:
    module = Module.of(args.module) if args.module else None
    rows = [arg for arg in TABLE if module is None or module.has(arg)]
    if args.json:
        print(json.dumps([as_json(arg) for arg in rows], indent=1))
        return 0
    title = module.title if module else "All arguments; those of some algorithms or models alone say so."
    print("\n".join(listing(title, rows, lambda arg, width: plain(arg, width, module is None))))
    return 0
