"""Convert an adapter file: to the form of another program, to another algorithm, or to both.

    kohya-networks convert my-lokr.safetensors --to comfyui --out my-lokr-comfyui.safetensors
    kohya-networks convert my-loha.safetensors --to lora --out my-lora.safetensors
    kohya-networks convert my-oft.safetensors --to lora --dim 32 --base sdxl.safetensors --out my-lora.safetensors
    kohya-networks convert my-lokr.safetensors --to lora --to diffusers --out for-diffusers.safetensors

Exact where algebra allows, without --dim or one of the rules for it; otherwise the nearest of that rank. What it costs
is printed, measured on the values as they stand in the new file. --base is asked for where the result depends on the
weights of the model: OFT, BOFT, IA3, GLoRA and DoRA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .command_line import run_program
from .tool_options import add_form, add_model, add_output, dtype_of, progress, rule_of, tell, tool


def build_parser() -> argparse.ArgumentParser:
    parser = tool(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="of any form, or a folder which PEFT wrote")
    parser.add_argument(
        "--to", metavar="TARGET", action="append", required=True,
        help="lora, lokr, loha or diff; or portable, comfyui, diffusers, peft (a folder), blissful, oft, oft_flux; or "
        "one of each, --to twice",
    )  # fmt: skip
    add_output(parser)
    add_model(parser)
    add_form(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, build_parser(), sys.argv[1:] if argv is None else list(argv))


def run(args: argparse.Namespace) -> int:
    from ..tools.convert import convert

    report = convert(
        args.file,
        args.out,
        to=args.to,
        model=args.model,
        base=args.base,
        rule=rule_of(args),
        factor=args.factor,
        dtype=dtype_of(args),
        device=args.device,
        max_error=args.max_error,
        allow_dropped=args.allow_dropped,
        overwrite=args.overwrite,
        walk=progress("converting"),
    )
    return tell(report, args)
