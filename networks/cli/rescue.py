"""What is wrong with an adapter file that does not work elsewhere, and the good file where there can be one.

    kohya-networks rescue broken.safetensors
    kohya-networks rescue broken.safetensors --for comfyui --out good.safetensors

Without --out it is only looked at: exit code 0 for a file with which nothing is wrong, 1 for one that has to be mended.
Names of another program, strength beside the tensors, half layers, lost or rounded DoRA magnitudes, broken values,
damaged files: what can be mended is, what cannot is said. What is lost with it must be allowed: --allow_dropped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .command_line import add_overwrite, finite_number, run_program, say
from .tool_options import DTYPES, add_model, dtype_of, progress, tell, tool

TARGETS = ("portable", "blissful", "comfyui", "diffusers", "oft", "oft_flux")


def build_parser() -> argparse.ArgumentParser:
    parser = tool(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path)
    add_model(parser)
    parser.add_argument("--for", dest="to", choices=TARGETS, default="", metavar="TARGET",
                        help=f"the program or form that it is for: {', '.join(TARGETS)}; "
                        "default: portable, which most programs read")  # fmt: skip
    parser.add_argument("--strength", type=finite_number, help="of layers that do not say it themselves, alpha / dim")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of its tensors; default: as they are")
    parser.add_argument("--allow_dropped", action="store_true", help="write it although something of FILE is lost")
    parser.add_argument("--layers", action="store_true", help="one line per layer, too")
    add_overwrite(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, build_parser(), sys.argv[1:] if argv is None else list(argv))


def run(args: argparse.Namespace) -> int:
    from ..tools.rescue import rescue

    report = rescue(
        args.file,
        args.out,
        to=args.to,
        model=args.model,
        base=args.base,
        strength=args.strength,
        dtype=dtype_of(args),
        device=args.device,
        allow_dropped=args.allow_dropped,
        overwrite=args.overwrite,
        walk=progress("rescue"),
    )
    if not args.json:
        say(f"{args.file}: " + ("nothing is wrong with it" if report.details["sound"] else "what is wrong with it"))
        for found in report.details["findings"]:
            say(f"  - {found['sentence']}")
        for one in report.details["readers"]:
            say(f"  {one['program']}: {one['before']} before, {one['after']} after")
    tell(report, args)
    return 0 if args.out or report.details["sound"] else 1
