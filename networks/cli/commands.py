"""The one program in front of all others: `kohya-networks COMMAND ...`, also as `python -m kohya_networks.cli`."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .._version import __version__
from ..hosts.beside import claim
from .command_line import USER_ERROR, error_text, nearest
from .terminal import width


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: what it does, for the list.
        module: where its `main(argv) -> int` is; imported when it is called, so that the others start at once.
    """

    summary: str
    module: str


COMMANDS = {
    "plan": Command("what would be trained, layer by layer, before anything is loaded or paid for", ".plan"),
    "args": Command("the arguments of a network module", ".args"),
    "show": Command("what an adapter file is, and which programs read it right", ".show"),
    "convert": Command("an adapter file in the form of another program, or as another algorithm", ".convert"),
    "combine": Command("several adapter files as one", ".combine"),
    "average": Command("files of one training run as their average (EMA)", ".average"),
    "merge": Command("merge adapter files into a checkpoint", ".merge"),
    "extract": Command("an adapter out of a tuned model and the one that it was tuned from", ".extract"),
    "resize": Command("make smaller adapter files", ".resize"),
    "rescue": Command("what is wrong with an adapter file that does not work elsewhere, and the good one", ".rescue"),
    "doctor": Command(
        "whether a trainer finds these modules, what is missing, and the --network_module to write", ".doctor"
    ),
    "launch": Command("run a script of sd-scripts or musubi-tuner with these network modules first", ".launch"),
    "train": Command("train an adapter with the reference trainer", "kohya_trainer.train"),
    "generate": Command("draw pictures with adapters", "kohya_trainer.generate"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 for a name that is none."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"kohya-networks {__version__} from {Path(__file__).parents[1]}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        problem = f"error: there is no command {name}.{nearest(name, COMMANDS)}" if name else "error: give a command."
        print(f"{problem} Commands: {', '.join(COMMANDS)}; --help explains them", file=sys.stderr)
        return USER_ERROR
    called, sys.argv[0] = sys.argv[0], f"kohya-networks {name}"  # the name by which its --help calls it
    try:
        claim()
        code: int = importlib.import_module(command.module, __package__).main(rest)
        return code
    except ImportError as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        return USER_ERROR
    finally:
        sys.argv[0] = called


def _usage() -> str:
    gap = " " * 12
    lines = [
        textwrap.fill(command.summary, max(40, width() - 1), initial_indent=f"  {name:10}", subsequent_indent=gap)
        for name, command in COMMANDS.items()
    ]
    return "\n".join(
        ["usage: kohya-networks COMMAND ...", "", *lines, "", "kohya-networks COMMAND --help explains a command."]
    )
