"""Extract an adapter from a tuned model: what it has learnt beyond the one that it was tuned from.

    kohya-networks extract my-model.safetensors sdxl.safetensors --dim 32 --out my-lora.safetensors
    kohya-networks extract my-model/ flux1-dev.safetensors --energy 0.9 --dim 64 --out my-lora.safetensors
    kohya-networks extract my-model.safetensors sdxl.safetensors --to lokr --factor 8 --out my-lokr.safetensors

Both are .safetensors files (the trainers', original releases, fp8 with scales), folders of one diffusers component or
whole pipelines; one may be stored in another way than the other. Everything that has changed and has a form is
extracted: all Linears and convolutions, text encoders included, biases and normalisation layers as they are. What has
none, such as embeddings and a VAE, is told, and stops it unless --allow_dropped is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .command_line import finite_number, run_program
from .tool_options import add_form, add_output, dtype_of, progress, rule_of, tell, tool


def build_parser() -> argparse.ArgumentParser:
    parser = tool(__doc__)
    parser.add_argument("tuned", metavar="TUNED", help="the model that has learnt something")
    parser.add_argument("base", metavar="BASE", help="the model that it was tuned from")
    parser.add_argument("--to", metavar="TARGET", action="append", help="lora (default), lokr, loha or diff (the whole "
                        "difference); and the form of a program as for convert, --to twice")  # fmt: skip
    add_output(parser)
    add_form(parser)
    parser.add_argument("--clamp_quantile", type=finite_number, help="cut values beyond this quantile of a layer's "
                        "factors; 0.99 is what the trainers' own scripts do")  # fmt: skip
    parser.add_argument("--model", default="", help="what both are, where the names of their layers leave that open: a "
                        "name, a diffusers folder or a checkpoint")  # fmt: skip
    parser.add_argument("--text_encoder", nargs=3, action="append", default=[], metavar=("NAME", "TUNED", "BASE"),
                        help="one in files of its own: lora_te1 my-clip_l.safetensors clip_l.safetensors")  # fmt: skip
    parser.add_argument("--exclude_patterns", nargs="+", default=[], metavar="REGEX", help="leave out layers whose "
                        "dotted names match as a whole, as in training: 'text_encoder:.*'")  # fmt: skip
    parser.add_argument(
        "--include_patterns",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="take these in again",
    )
    parser.add_argument("--trained_only", action="store_true", help="only layers which a training takes without "
                        "further arguments: no other ones, no biases and norms")  # fmt: skip
    parser.add_argument("--min_diff", type=finite_number, default=0.0, help="layers of which no value has changed by "
                        "more count as unchanged; default: 0")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, build_parser(), sys.argv[1:] if argv is None else list(argv))


def run(args: argparse.Namespace) -> int:
    from ..tools.extract import extract

    report = extract(
        [args.tuned, *(f"{name}={tuned}" for name, tuned, _ in args.text_encoder)],
        [args.base, *(f"{name}={base}" for name, _, base in args.text_encoder)],
        args.out,
        to=args.to or "lora",
        rule=rule_of(args),
        factor=args.factor,
        clamp_quantile=args.clamp_quantile,
        model=args.model,
        include_patterns=args.include_patterns,
        exclude_patterns=args.exclude_patterns,
        trained_only=args.trained_only,
        min_diff=args.min_diff,
        dtype=dtype_of(args),
        device=args.device,
        max_error=args.max_error,
        allow_dropped=args.allow_dropped,
        overwrite=args.overwrite,
        walk=progress("extracting"),
    )
    return tell(report, args)
