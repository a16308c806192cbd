"""Adapter files with other ranks: fewer, by a number or by what each layer needs, or more, which change nothing yet.

    kohya-networks resize my-lora.safetensors --dims 4,8,16
    kohya-networks resize my-lora.safetensors --energy 0.99 --dim 32 --out small.safetensors
    kohya-networks resize my-lora.safetensors --dims 32        # above its rank: grow, to train on

--dims writes my-lora-0004.safetensors and so on beside the file. Names, way and precision are those of the file, and
what has no ranks stays as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import check_outputs, finite_number, run_program
from .tool_options import DTYPES, add_model, add_overwrite, add_ranks, progress, rule_of, tell, tool

if TYPE_CHECKING:
    from ..tools.ranks import RankRule

WAYS = ("first", "nearest")


def build_parser() -> argparse.ArgumentParser:
    parser = tool(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--dims", type=whole_numbers, help="4,8,16: a file for each of them")
    add_ranks(parser)
    parser.add_argument(
        "--way",
        choices=WAYS,
        help="first: the first ranks with alpha as it is, for DyLoRA, its default; nearest: the nearest update of "
        "that rank at the same strength, by SVD; the default for all others",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: beside FILE, with the dim in its name")
    parser.add_argument("--out_dir", metavar="FOLDER", type=Path, help="default: beside FILE")
    parser.add_argument("--seed", type=int, default=0, help="of new ranks, which begin at random; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="of its tensors; default: that of FILE")
    parser.add_argument("--max_error", type=finite_number, help="write nothing that is further off, 0.05")
    parser.add_argument("--layers", action="store_true", help="one line per layer, too")
    add_model(parser)
    add_overwrite(parser)
    return parser


def whole_numbers(text: str) -> list[int]:
    """`4,8,16`."""
    numbers = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not numbers or min(numbers) < 1 or len(numbers) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of dims; write 4,8,16")
    return sorted(set(numbers))


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, build_parser(), sys.argv[1:] if argv is None else list(argv))


def run(args: argparse.Namespace) -> int:
    import torch

    from ..tools.resize import resize

    rules = _rules(args)
    outs = [_out(args, rule) for rule in rules]
    check_outputs(outs, [args.file], args.overwrite)
    reports = [
        resize(
            args.file,
            out,
            rule=rule,
            way=args.way or "",
            seed=args.seed,
            model=args.model,
            base=args.base,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            device=args.device,
            max_error=args.max_error,
            overwrite=args.overwrite,
            walk=progress("resize"),
        )
        for rule, out in zip(rules, outs, strict=True)
    ]
    if args.json and len(reports) > 1:
        print(json.dumps([report.to_dict() for report in reports], indent=1))
        return 0
    return max(tell(report, args) for report in reports)


def _rules(args: argparse.Namespace) -> list[RankRule]:
    """One for each file to write."""
    from ..tools.ranks import RankRule

    rule = rule_of(args)
    if args.dims is None:
        if rule is None:
            raise ValueError("say how many ranks are to stay: --dims 4,8, or a rule such as --energy 0.99")
        return [rule]
    if rule is not None and (rule.rule or rule.dim is not None):
        raise ValueError(
            f"--dims and --{rule.rule or 'dim'} say the same thing twice: with a rule, --dim N is the most"
        )
    if args.out is not None and len(args.dims) > 1:
        raise ValueError("--out is one file, and --dims asks for several: give --out_dir, or one dim")
    return [RankRule(dim, conv_dim=args.conv_dim) for dim in args.dims]


def _out(args: argparse.Namespace, rule: RankRule) -> Path:
    """Where its file goes."""
    from ..files.resize import numbered

    if args.out is not None:
        return Path(args.out)
    beside = (args.out_dir or args.file.parent) / args.file.name
    if rule.rule:
        return Path(beside.with_name(f"{beside.stem}-{rule.rule}-{rule.value:g}.safetensors"))
    return numbered(beside, rule.dim or rule.conv_dim or 0)
