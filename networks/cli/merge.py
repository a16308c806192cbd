"""Merge adapter files into a checkpoint, from keys alone: no model is built, no trainer is needed.

    kohya-networks merge model.safetensors my-lora.safetensors my-lokr.safetensors=0.6 --out merged.safetensors

CHECKPOINT is one .safetensors file (a trainer's, or an original release) or the folder of one diffusers component
(unet, transformer, text_encoder), sharded or not. Every weight is computed in fp32 and rounded once; dtypes stay as
they are, fp8 with scale_weight included. Memory stays near the largest tensor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..args.coerce import finite
from ..foreign.texts import exists, printable
from .command_line import add_allow_missing, add_overwrite, check_outputs, program, run_program, say

if TYPE_CHECKING:
    from ..files.merge import CheckpointMerge, MergeInput
    from ..files.places import Allowance

SHOWN = 10  # names of layers that found no weight


def build_parser() -> argparse.ArgumentParser:
    parser = program(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("adapters", metavar="FILE[=MULTIPLIER]", nargs="+", help="merged in this order; multiplier 1")
    parser.add_argument("--out", metavar="PATH", type=Path, required=True, help="a .safetensors file, or a new folder")
    add_overwrite(parser)
    parser.add_argument("--prefix", default="", help="lora_te1 or lora_te2: which text encoder a folder is")
    parser.add_argument("--device", default="cpu", help="where it is computed; default: %(default)s")
    add_allow_missing(parser)
    parser.add_argument("--strict", action="store_true", help="a layer without a weight is an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(merge, build_parser(), sys.argv[1:] if argv is None else list(argv))


def merge(args: argparse.Namespace) -> int:
    import torch

    from ..files.checkpoint import Checkpoint, check_free
    from ..files.merge import CheckpointMerge, MergeInput
    from ..files.places import Allowance

    files = [split_multiplier(item) for item in args.adapters]
    checkpoint = Checkpoint(args.checkpoint)
    check_free(checkpoint, args.out)
    check_outputs(lost_with(args.out), [args.checkpoint, *(path for path, _ in files)], args.overwrite)
    adapters = [MergeInput.open(path, multiplier, checkpoint.shapes, args.prefix) for path, multiplier in files]
    plan = CheckpointMerge(checkpoint, adapters, args.prefix, torch.device(args.device))
    allowance = Allowance.given(args.allow_missing, "--allow_missing")
    for adapter in adapters:
        say(f"{adapter.path} at {adapter.multiplier:g}: {len(plan.matched(adapter))} layers matched")
        for text in adapter.assumed:
            say(f"  {text}")
        report(plan, adapter, plan.unmatched(adapter), allowance, args.strict)
    sizes = [entry["data_offsets"] for header in checkpoint.headers.values() for entry in header.entries.values()]
    with progress_bar(sum(end - start for start, end in sizes)) as step:
        warning = plan.write(args.out, step)
    for text, count in plan.conversions.items():
        say(f"  {text} ({count} layers)")
    if warning:
        say(f"warning: {warning}", error=True)
    say(f"wrote {args.out}")
    return 0


def report(
    plan: CheckpointMerge, adapter: MergeInput, unmatched: list[str], allowance: Allowance, strict: bool
) -> None:
    """Say what of a file is left out.

    Args:
        plan: the whole merge.
        adapter: the file.
        unmatched: its layers without a weight.
        allowance: what the user allows to be left out.
        strict: one of them is too much.

    Raises:
        ValueError: too much is left out.
    """
    if unmatched and strict:
        raise ValueError(f"{adapter.path}: {len(unmatched)} layers have no weight here, and --strict was given")
    missing = plan.missing(adapter, allowance)
    for line in filter(None, (missing.counted(), missing.warning())):
        say(f"  {line}")
    if missing.names:
        more = f" and {len(missing.names) - SHOWN} more" if len(missing.names) > SHOWN else ""
        say(f"warning: left out: {', '.join(missing.names[:SHOWN])}{more}", error=True)
    if adapter.file.stray:
        say(f"  {len(adapter.file.stray)} keys are no adapter, e.g. {adapter.file.stray[0]}")
    say(f"  strength by {adapter.file.strength}")


def lost_with(out: Path) -> list[Path]:
    """What must not be replaced unasked: an empty folder is nothing."""
    return [] if out.is_dir() and not any(out.iterdir()) else [out]


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
    """tqdm's where it is installed, otherwise a line at every tenth; what comes after it has a line of its own."""
    try:
        from tqdm import tqdm
    except ImportError:
        done = [0]

        def step(key: str, size: int) -> None:
            before, done[0] = done[0], done[0] + size
            if done[0] * 10 // max(1, total) > before * 10 // max(1, total):
                print(f"{done[0] * 100 // total} %", file=sys.stderr)

        yield step
        return
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def advance(key: str, size: int) -> None:
            bar.update(size)

        yield advance
