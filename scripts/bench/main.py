"""The command line of scripts/benchmark.py."""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from . import bases, hosts, layers, nets, steps, sweep
from .cases import FULL, QUICK, Sizes
from .peers import peers_of
from .report import Progress, Table, draw, machine
from .setting import Setting

TABLES: dict[str, Callable[[Setting], Iterator[Table]]] = {
    "counts": layers.counts,
    "times": layers.times,
    "python": layers.python,
    "steps": steps.steps,
    "networks": nets.networks,
    "merging": nets.merging,
    "sweep": sweep.sweep,
    "compile": bases.compiled,
    "bases": bases.quantised,
    "swap": bases.swapped,
    "memory": bases.memory,
}
# What a run takes by itself: on a CPU a compiler takes minutes, and networks are made on the CPU.
DEFAULT = {
    "cpu": ["counts", "times", "python", "steps", "networks", "merging", "sweep", "bases", "swap"],
    "cuda": ["sweep", "bases", "swap", "memory", "times", "python", "steps", "merging", "counts", "compile"],
}
GPU_SECONDS = 0.15  # of each candidate, in which a GPU takes many samples
GPU_LIMIT = 400.0  # seconds after which no other table begins there, as a machine with a GPU is often lent for minutes


def main(about: str | None = None, argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    """Run what the command line asks for.

    Args:
        about: the text of --help.
        argv: None = the process's own.
        sizes: of the run; None = those that the command line asks for.
    """
    args = _parser(about).parse_args(argv)
    begun, tables = time.process_time(), list[Table]()
    with _quiet():
        setting = open_setting(args, sizes or (QUICK if args.quick else FULL))
        for name in args.tables or DEFAULT[args.device]:
            if args.device == "cuda" and time.monotonic() - setting.progress.begun > GPU_LIMIT:
                setting.lines.append(
                    f"no {name}: the run had taken {GPU_LIMIT:.0f} s before it; ask for it by --tables"
                )
                continue
            tables += TABLES[name](setting)
            setting.progress.table()
    setting.progress.end()
    picture = _picture(args)
    drawn = picture is not None and draw(tables, picture)
    text = page(setting, tables, picture.name if picture is not None and drawn else "")
    wall, cpu = time.monotonic() - setting.progress.begun, time.process_time() - begun
    text += f"\nThe run took {wall:.0f} s, {cpu:.0f} s of the CPU.\n"
    if args.docs:
        Path(args.docs).write_text(text, encoding="utf-8", newline="\n")
    print(text)
    return 0


def _picture(args: argparse.Namespace) -> Path | None:
    if args.docs:
        return Path(args.docs).with_suffix(".png")
    return Path(args.chart) if args.chart else None


def open_setting(args: argparse.Namespace, sizes: Sizes) -> Setting:
    """What the tables share, by the arguments."""
    device, lines = torch.device(args.device), []
    if device.type == "cuda" and not torch.cuda.is_available():
        device, lines = torch.device("cpu"), ["no GPU was seen: everything ran on the CPU"]
    elif device.type == "cuda":
        sizes = replace(sizes, seconds=min(sizes.seconds, GPU_SECONDS))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    given = {"sds": (args.sd_scripts, hosts.sd_scripts), "mus": (args.musubi, hosts.musubi)}
    checkouts = {name: open_(root) for name, (root, open_) in given.items() if root is not None}
    peers, left_out = peers_of(checkouts)
    progress = Progress(len(args.tables or DEFAULT[args.device]))
    return Setting(device, sizes, peers, checkouts, progress, [*lines, *left_out])


def page(setting: Setting, tables: Sequence[Table], picture: str) -> str:
    """The whole output.

    Args:
        setting: of the run.
        tables: what it measured.
        picture: the chart's file beside the page; "" = none.
    """
    today, where = datetime.date.today(), machine(setting.device)
    head = [
        "# What an adapter costs",
        "",
        f"Written by `scripts/benchmark.py`, which says how it measures. {today}, {where}.",
        "",
        *(f"* {peer.title}" for peer in setting.peers),
        *(f"* {line}" for line in setting.lines),
        "",
        *([f"![Times over the frozen layer]({picture})", ""] if picture else []),
    ]
    return "\n".join([*head, *(table.text() for table in tables)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Peers tell much while they are made; what matters here is in the tables."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _parser(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmark.py", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sd_scripts", type=_folder, metavar="PATH", help="a checkout of sd-scripts")
    parser.add_argument("--musubi", type=_folder, metavar="PATH", help="a checkout of musubi-tuner")
    parser.add_argument("--tables", type=_tables, metavar="NAME,NAME", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--quick", action="store_true", help="a small part of each table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where it runs")
    parser.add_argument("--docs", metavar="FILE.md", help="write the page there, and its chart beside it")
    parser.add_argument("--chart", metavar="FILE.png", help="draw the chart there")
    return parser


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder: give the root of the trainer's checkout")
    return path


def _tables(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in TABLES]:
        raise argparse.ArgumentTypeError(f"there is no table {', '.join(unknown)}: choose of {', '.join(TABLES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
