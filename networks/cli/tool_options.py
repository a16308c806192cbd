"""What the commands of `tools` share: the same options under the same names, progress, reports and exit codes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import add_overwrite, finite_number, program, say

if TYPE_CHECKING:
    import torch

    from ..tools.ranks import RankRule
    from ..tools.report import Report, Walk

DTYPES = ("float32", "float16", "bfloat16")


def tool(description: str | None) -> argparse.ArgumentParser:
    """The parser of a command that reads adapter files and says what it found, for people or as JSON."""
    parser = program(description)
    parser.add_argument("--json", action="store_true", help="the report as JSON, on stdout")
    parser.add_argument("--device", default="cpu", help="where it is computed; default: %(default)s")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """What a file is for: `--model` by name or shape, `--base` with its weights."""
    parser.add_argument("--model", default="", help="what it is for, where names and metadata leave that open: a name, "
                        "a diffusers folder or a checkpoint")  # fmt: skip
    add_base(parser)


def add_base(parser: argparse.ArgumentParser) -> None:
    """The weights that a file was trained on."""
    parser.add_argument("--base", action="append", default=[], metavar="CHECKPOINT", help="the weights that it was "
                        "trained on, where the result depends on them; may be repeated, for a text encoder in a file "
                        "of its own lora_te1=CHECKPOINT")  # fmt: skip


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where the result goes, in which dtype, and what may be missing there."""
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of its tensors; default: that of the input")
    parser.add_argument("--allow_dropped", action="store_true", help="go on where something of an input is lost")
    add_overwrite(parser)


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """The rank of the result, as one number or by a rule, see `tools.ranks`."""
    parser.add_argument("--dim", type=int, help="rank of each layer; with one of the rules, the highest")
    parser.add_argument("--conv_dim", type=int, help="the same of convolutions above 1x1; default: --dim")
    parser.add_argument("--energy", type=finite_number, help="keep this share of the squared singular values, 0.99")
    parser.add_argument("--sv_fro", type=finite_number, help="keep this share of the Frobenius norm")
    parser.add_argument("--sv_cumulative", type=finite_number, help="keep this share of the singular values' sum")
    parser.add_argument("--sv_ratio", type=finite_number, help="keep singular values down to the largest / this")


def add_form(parser: argparse.ArgumentParser) -> None:
    """What else is asked of layers that are made: `add_ranks`, the factor, how far they may be off, and how they are
    told."""
    add_ranks(parser)
    parser.add_argument("--factor", type=int, default=-1, help="of a LoKr; default: the most even split")
    parser.add_argument("--max_error", type=finite_number, help="write nothing if the whole is further off, 0.05")
    parser.add_argument("--layers", action="store_true", help="one line per layer, too")


def rule_of(args: argparse.Namespace) -> RankRule | None:
    """Of the options of `add_ranks`; None = none is given.

    Raises:
        ValueError: two rules are given, or a number is none that they take.
    """
    from ..tools.ranks import RankRule

    return RankRule.given(vars(args), args.dim, args.conv_dim)


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """That of `--dtype`; None = not given."""
    import torch

    found: torch.dtype | None = getattr(torch, args.dtype) if args.dtype else None
    return found


def tell(report: Report, args: argparse.Namespace) -> int:
    """Print a report; returns the exit code."""
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        for line in report.lines(getattr(args, "layers", False)):
            say(line)
        if report.out is not None:
            say(f"wrote {report.out} ({_size(report.out) / 2**20:.1f} MiB)")
    return 0


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def progress(title: str) -> Walk:
    """Walks over layers and says on stderr how long it will take: tqdm's bar, or a line at every tenth without it."""

    def walk(names: Sequence[str]) -> Iterator[str]:
        try:
            from tqdm import tqdm
        except ImportError:
            for i, name in enumerate(names):
                if i * 10 // len(names) > (i - 1) * 10 // len(names) >= 0:
                    print(f"{title} {i * 100 // len(names)} %", file=sys.stderr)
                yield name
            return
        yield from tqdm(names, desc=title, unit="layer", delay=1)

    return walk
