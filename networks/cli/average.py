"""Average adapter files of one training run: an EMA of any length, after the run.

    kohya-networks average run-step*.safetensors --decay 0.999 --out run-ema.safetensors
    kohya-networks average run-0000*.safetensors run.safetensors --sigma_rel 0.15 --out run-ema.safetensors
    kohya-networks average run-step00004000.safetensors run.safetensors --out mean.safetensors

Each file stands for the steps since the one before it; --decay is per optimizer step, --sigma_rel the width of a
power-function average (Karras et al. 2024) relative to the run. With neither the files count alike. Values are averaged
as they are saved, factors by themselves, as `ema_decay` does it in training; the error that is printed is the distance
from the average of the updates, for which see combine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .command_line import add_overwrite, finite_number, run_program
from .tool_options import DTYPES, add_model, dtype_of, progress, tell, tool


def build_parser() -> argparse.ArgumentParser:
    parser = tool(__doc__)
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="saved by one run, in any order")
    parser.add_argument("--decay", type=finite_number, help="of an EMA, per optimizer step: 0.999")
    parser.add_argument(
        "--sigma_rel", type=finite_number, help="width of a power-function average, relative to the run: 0.05 to 0.25"
    )
    parser.add_argument(
        "--steps", type=_numbers, default=[], metavar="N,N,...",
        help="after how many steps each file was saved; default: as their metadata or names say",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of its tensors; default: that of the files")
    parser.add_argument("--max_error", type=finite_number, help="write nothing that is further off, 0.05")
    parser.add_argument("--layers", action="store_true", help="one line per layer, too")
    add_model(parser)
    add_overwrite(parser)
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of steps; write 100,200,300") from None


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, build_parser(), sys.argv[1:] if argv is None else list(argv))


def run(args: argparse.Namespace) -> int:
    from ..tools.average import average

    report = average(
        args.files,
        args.out,
        decay=args.decay,
        sigma_rel=args.sigma_rel,
        steps=args.steps,
        model=args.model,
        base=args.base,
        dtype=dtype_of(args),
        device=args.device,
        max_error=args.max_error,
        overwrite=args.overwrite,
        walk=progress("averaging"),
    )
    return tell(report, args)
