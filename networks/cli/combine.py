"""Combine adapter files: one file that adds what all of them add, each at a strength of its own.

    kohya-networks combine style.safetensors person.safetensors=0.7 --out both.safetensors
    kohya-networks combine a.safetensors b.safetensors=-0.3 --dim 32 --out c.safetensors
    kohya-networks combine a.safetensors b.safetensors --blocks a:blocks.0-7=0.5 --blocks b:unet=0.2 --out c.safetensors

Any algorithms, ranks, alphas, dtypes and layouts. As a LoRA without --dim the sum is exact: the factors of all stand
side by side, and the ranks add up. With --dim or a rule it is the nearest of that rank, and the error is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .command_line import run_program
from .merge import split_multiplier
from .tool_options import add_form, add_model, add_output, dtype_of, progress, rule_of, tell, tool


def build_parser() -> argparse.ArgumentParser:
    parser = tool(__doc__)
    parser.add_argument("files", metavar="FILE[=STRENGTH]", nargs="+", help="strength 1 where none is given")
    parser.add_argument(
        "--to", metavar="TARGET", action="append",
        help="lora (default), lokr, loha or diff; and the form of a program as for convert, --to twice",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", metavar="FILE:WHAT=STRENGTH", action="append", default=[],
        help="another strength for some layers of a file (its path, name or stem): a part (unet, dit, text_encoder1), "
        "blocks by their numbers (blocks.0-7,12; double_blocks.0-7 by the model's own), or a regular expression on "
        "dotted names; may be repeated, and the last that means a layer counts",
    )  # fmt: skip
    add_output(parser)
    add_model(parser)
    add_form(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, build_parser(), sys.argv[1:] if argv is None else list(argv))


def run(args: argparse.Namespace) -> int:
    from ..tools.combine import combine

    files: dict[Path | str, float] = dict(split_multiplier(item) for item in args.files)
    if len(files) < len(args.files):  # of one file the last strength would count
        raise ValueError("a file is given twice: give it once, with the sum of its strengths")
    report = combine(
        files,
        args.out,
        to=args.to or "lora",
        blocks=args.blocks,
        model=args.model,
        base=args.base,
        rule=rule_of(args),
        factor=args.factor,
        dtype=dtype_of(args),
        device=args.device,
        max_error=args.max_error,
        allow_dropped=args.allow_dropped,
        overwrite=args.overwrite,
        walk=progress("combining"),
    )
    return tell(report, args)
