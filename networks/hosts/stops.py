"""What ends a call before a network is made: `help=True` and `dry_run=True`. And which arguments apply where."""

from __future__ import annotations

import logging
import os
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..archs import ARCHS
from ..archs.spec import ArchSpec
from ..args.parse import NetArgs, Problems, parse
from ..args.render import described, shown
from ..args.table import BY_NAME, TABLE
from ..records import Arg

if TYPE_CHECKING:
    from ..plan.plan import Plan

log = logging.getLogger("networks")

STOPS = ("help", "dry_run")
_FIRST = ("algo", "preset", "enable_conv")  # on which defaults of others depend


def applies(arg: Arg, algos: Iterable[str], archs: Iterable[ArchSpec]) -> bool:
    """Whether an argument does something with one of these algorithms, on one of these architectures."""
    special = any(arg.name in arch.arguments for arch in ARCHS)
    on_model = not special or any(arg.name in arch.arguments for arch in archs)
    return on_model and (arg.algos is None or not set(algos).isdisjoint(arg.algos))


def listing(title: str, rows: Sequence[Arg], described: Callable[[Arg, int], str], others: bool = True) -> list[str]:
    """Lines for a terminal: these arguments by group, and the names of all others.

    Args:
        title: the first line.
        rows: the arguments that apply.
        described: an argument in so many columns.
        others: whether the rest is named.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [title]
    for group in dict.fromkeys(arg.group for arg in rows):
        lines += ["", group, *(described(arg, width) for arg in rows if arg.group == group)]
    rest = ", ".join(arg.name for arg in TABLE if arg not in rows)
    if others and rest:
        lines += ["", *textwrap.wrap(f"With another algorithm, or on other models: {rest}", width)]
    return lines


def show_help(
    module: str, algo: str, raw: Mapping[str, Any], args: NetArgs, options: Mapping[str, Any], arch: ArchSpec | None
) -> NoReturn:
    """Print the arguments of a call, and leave; what else is wrong with them does not matter.

    Args:
        module: as the user typed it, `networks.lokr`.
        algo: its own algorithm.
        raw, args: the arguments as they were written, and as they were read.
        options: network_dim and network_alpha.
        arch: of the model; None = of none that we know.

    Raises:
        SystemExit: always, with the exit status 0.
    """
    algos = {args.algo, *(args.preset.algos if args.preset else ())}
    rows = [arg for arg in TABLE if applies(arg, algos, ARCHS if arch is None else [arch])]
    first = {key: text for key, text in raw.items() if key.strip() in _FIRST}
    defaults = parse(first, algo, Problems(module), args.host, options, args.style).values

    def here(arg: Arg, width: int) -> str:
        switch = next((one for one in arch.switches if one.argument == arg.name), None) if arch else None
        if switch is not None:
            return described(arg, str(switch.trained_if is switch.trains(None, args.host)), width)
        return described(
            arg, shown(arg, BY_NAME[arg.name].default if arg.name in _FIRST[1:] else defaults[arg.name]), width
        )

    where = f" on {arch.title}" if arch else ""
    title = f"{module}{where}, algo={args.algo}: the arguments for --network_args, their values, and the default here"
    _leave(listing(title, rows, here))


def stop_for_dry_run(args: NetArgs, plan: Plan) -> None:
    """Print what would be trained, and leave, if the arguments say so.

    Raises:
        SystemExit: with the exit status 0.
    """
    if not args.dry_run:
        return
    lines = [*told(plan), "", "dry_run=True: nothing is trained, and no weights were touched"]
    if any(row.part.startswith("text_encoder") for row in plan.trained):
        lines.append(
            "(--network_train_unet_only and --network_train_text_encoder_only leave out the rows of the other part; a "
            "network is told of them later, `kohya-networks plan` knows them)"
        )
    _leave(lines)


def told(plan: Plan) -> list[str]:
    """The whole plan for people: table, summary, warnings, and which programs will not read its files."""
    return [plan.to_text().rstrip("\n"), *(f"warning: {text}" for text in plan.warnings), *plan.readers()]


def without_stops(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a network that only draws pictures, which nothing stops."""
    asked = [key for key in raw if key.strip() in (*STOPS, "training_adapter")]
    if asked:
        log.warning("%s: no effect on a network which a file decides and which is not trained", ", ".join(asked))
    return {key: value for key, value in raw.items() if key not in asked}


def _leave(lines: Sequence[str]) -> NoReturn:
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":  # one of several processes is enough
        print("\n".join(lines), flush=True)
    raise SystemExit(0)
