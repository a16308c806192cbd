"""Merge adapter files into a checkpoint, from keys alone: no model is built, no trainer is needed.

    kohya-networks merge model.safetensors my-lora.safetensors my-lokr.safetensors=0.6 --out merged.safetensors

CHECKPOINT is one .safetensors file (a trainer's, or an original release) or the folder of one diffusers component
(unet, transformer, text_encoder), sharded or not. Every weight is computed in fp32 and rounded once; dtypes stay as
they are, fp8 with scale_weight included. Memory stays near the largest tensor. --dry_run checks and tells all that can
be known, and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..args.coerce import finite
from ..foreign.texts import exists, printable
from .command_line import add_allow_missing, add_overwrite, run_program, told_time
from .tool_options import tell, tool


def build_parser() -> argparse.ArgumentParser:
    parser = tool(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("adapters", metavar="FILE[=MULTIPLIER]", nargs="+", help="merged in this order; multiplier 1")
    parser.add_argument("--out", metavar="PATH", type=Path, required=True, help="a .safetensors file, or a new folder")
    add_overwrite(parser)
    parser.add_argument("--prefix", default="", help="lora_te1 or lora_te2: which text encoder a folder is")
    add_allow_missing(parser)
    parser.add_argument("--strict", action="store_true", help="a layer without a weight is an error")
    parser.add_argument("--dry_run", action="store_true", help="check all that can be known, and write nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, build_parser(), sys.argv[1:] if argv is None else list(argv))


def run(args: argparse.Namespace) -> int:
    from ..tools.merge import merge_checkpoint

    report = merge_checkpoint(
        args.checkpoint,
        [split_multiplier(item) for item in args.adapters],
        args.out,
        prefix=args.prefix,
        device=args.device,
        strict=args.strict,
        allow_missing=args.allow_missing or (),
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        progress=progress_bar,
    )
    return tell(report, args)


def split_multiplier(item: str) -> tuple[Path, float]:
    """`file` or `file=0.5`."""
    path, equals, number = item.rpartition("=")
    if (
        not equals or item.lower().endswith(".safetensors") or exists(Path(item))
    ):  # folders have "=" in their names, too
        return Path(item), 1.0
    try:
        return Path(path), finite(number)
    except ValueError:
        raise ValueError(f"{item}: '{printable(number, 100)}' is no multiplier; write FILE=0.8") from None


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """tqdm's where it is installed, otherwise a line with the time left at every tenth; what comes after it has a line
    of its own."""
    try:
        from tqdm import tqdm
    except ImportError:
        done, start = [0], time.monotonic()

        def step(key: str, size: int) -> None:
            before, done[0] = done[0], done[0] + size
            if done[0] * 10 // max(1, total) > before * 10 // max(1, total):
                left = (time.monotonic() - start) * (total - done[0]) / done[0]
                print(f"{done[0] * 100 // total} %, {told_time(left)} left", file=sys.stderr)

        yield step
        return
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def advance(key: str, size: int) -> None:
            bar.update(size)

        yield advance
