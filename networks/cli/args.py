"""The arguments of a network module, each with its values, its default in both trainers, and its effect.

    kohya-networks args lokr
    kohya-networks args networks.lora --model sdxl
    kohya-networks args dropout

MODULE is a network module, or an algorithm. Without one, all arguments of all modules are listed; with the name of an
argument, or a part of one, those alone. No model is needed; `kohya-networks plan` shows what they do to one.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..archs import ARCHS
from ..args.render import as_json, plain
from ..args.table import BY_NAME, TABLE
from ..hosts.launching import LYCORIS
from ..hosts.stops import applies, listing
from ..models.releases import RELEASES, arch_of, hint, release_called
from ..records import Arg
from .command_line import nearest, program, run_program, say

STANDS_FOR = {LYCORIS: "networks.lycoris"}  # modules of others that we have, too
ENTRIES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Module:
    """A network module as its own file states it; reading that needs no torch.

    Attributes:
        title: its first line, or a name.
        algo: the algorithm when `algo=` is not given; "" = any.
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
        short = STANDS_FOR.get(name, name).rpartition(".")[2].lower()
        algos, words = BY_NAME["algo"].choices, dict(BY_NAME["algo"].words)
        entries = {file.stem: file for file in ENTRIES.glob("*.py")}
        found = cls._in(entries[short]) if short in entries else None
        if found is None and words.get(short, short) in algos:
            found = cls(f"algo={short}", words.get(short, short))
        if found is None:
            known = sorted({*algos, *(stem for stem, file in entries.items() if cls._in(file))})
            raise ValueError(
                f"{name} is neither a network module nor an algorithm, and no argument has it in its name."
                f"{nearest(short, [*known, *BY_NAME])} Modules and algorithms are {', '.join(known)}"
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
        return applies(arg, [self.algo] if self.algo else arg.algos or (), own)


def build_parser() -> argparse.ArgumentParser:
    parser = program(__doc__)
    parser.add_argument(
        "names", metavar="MODULE or ARGUMENT", nargs="*",
        help="networks.lokr, lokr, diag-oft, ...; factor, dropout, ...; default: all",
    )  # fmt: skip
    parser.add_argument("--model", help=f"leave out what is for other models than this: {', '.join(RELEASES)}")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(show, build_parser(), sys.argv[1:] if argv is None else list(argv))


def show(args: argparse.Namespace) -> int:
    module, words = _divided(args.names)
    if args.model:
        module = replace(module or Module("All algorithms", ""), archs=(_arch(args.model),))
    rows = [arg for arg in TABLE if (module is None or module.has(arg)) and _is_meant(arg, words)]
    if args.json:
        print(json.dumps([as_json(arg) for arg in rows], indent=1))
        return 0
    title = module.title if module else "All arguments; those of some algorithms or models alone say so."
    text = listing(title, rows, lambda arg, width: plain(arg, width, not (module and module.algo)), others=not words)
    for line in "\n".join(text).splitlines():
        say(line)
    return 0


def _divided(names: Sequence[str]) -> tuple[Module | None, list[str]]:
    """The module, and which arguments are asked for.

    Raises:
        ValueError: one of the names is neither.
    """
    if not names:
        return None, []
    if any(_is_meant(arg, names[:1]) for arg in TABLE) and names[0].lower() not in BY_NAME["algo"].choices:
        return None, list(names)
    unknown = next((name for name in names[1:] if not any(_is_meant(arg, [name]) for arg in TABLE)), None)
    if unknown:
        raise ValueError(f"no argument is called {unknown}, or in part.{nearest(unknown, BY_NAME)}")
    return Module.of(names[0]), list(names[1:])


def _is_meant(arg: Arg, words: Sequence[str]) -> bool:
    return not words or any(word.lower() in name for word in words for name in arg.names)


def _arch(model: str) -> str:
    """Name of the architecture of a released model.

    Raises:
        ValueError: there is no such model.
    """
    release = release_called(model)
    if release is None:
        raise ValueError(f"--model {model} is none of {', '.join(RELEASES)}{hint(model)}")
    return arch_of(release).name
