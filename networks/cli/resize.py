"""Make smaller adapter files: cut a DyLoRA to some of its dims, or any LoRA to the nearest one of a lower dim.

    kohya-networks resize my-dylora.safetensors --dims 4,8,16
    kohya-networks resize my-lora.safetensors --dims 8 --way nearest

Writes my-dylora-0004.safetensors and so on beside the file, in its precision. LoRA, DyLoRA and LoRA-FA files have ranks
that can go; DoRA magnitudes and everything else in a file stay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .command_line import add_overwrite, check_outputs, program, run_program, say

WAYS = ("first", "nearest")


def build_parser() -> argparse.ArgumentParser:
    parser = program(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--dims", required=True, type=whole_numbers, help="4,8,16: a file for each of them")
    parser.add_argument(
        "--way",
        choices=WAYS,
        help="first: the first ranks with alpha as it is, for DyLoRA, its default; nearest: the nearest update of "
        "that rank at the same strength, by SVD; the default for all others",
    )
    parser.add_argument("--out_dir", metavar="FOLDER", type=Path, help="default: beside FILE")
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
    from ..files import writer
    from ..files.adapter_file import Naming, open_adapter
    from ..files.resize import is_nested, numbered, resize, resized_metadata

    outs = {dim: numbered((args.out_dir or args.file.parent) / args.file.name, dim) for dim in args.dims}
    check_outputs(outs.values(), [args.file], args.overwrite)
    file = open_adapter(args.file, Naming())
    nested = is_nested(file.metadata)
    way = args.way or ("first" if nested else "nearest")
    if way == "first" and not nested:
        say(f"warning: {args.file.name} does not say that DyLoRA trained it; cut ranks of others are lost", error=True)
    for dim, out in outs.items():
        smaller, lost = resize(file, dim, way)
        writer.write_tensors(out, smaller, metadata=resized_metadata(file.metadata, dim, way))
        say(f"wrote {out}: dim {dim}" + (f", {lost:.1%} of the update lost" if way == "nearest" else ""))
    return 0
