"""What an adapter file is: its layers, ranks and real strengths, where it comes from, and which programs read it right.

    kohya-networks show my-lora.safetensors
    kohya-networks show my-lora.safetensors --layers

Only what the file itself says; no model is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command_line import program, run_program


def build_parser() -> argparse.ArgumentParser:
    parser = program(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--layers", action="store_true", help="one line per layer, too")
    parser.add_argument("--metadata", action="store_true", help="all metadata, too")
    parser.add_argument("--json", action="store_true", help="machine-readable, everything")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(show, build_parser(), sys.argv[1:] if argv is None else list(argv))


def show(args: argparse.Namespace) -> int:
    from ..files.explain import explain

    found = explain(args.file)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print("\n".join(lines(found, args.layers, args.metadata)))
    return 0


def lines(found: dict[str, Any], layers: bool, metadata: bool) -> list[str]:
    """The same for people.

    Args:
        found: what `explain` says of the file.
        layers, metadata: whether each layer and all metadata are shown, too.
    """
    text = [
        f"{found['file']}: {found['bytes'] / 2**20:.1f} MiB, {', '.join(found['dtypes'])}, form {found['dialect']}",
        *(f"  {name}: {value}" for name, value in found["origin"].items()),
        f"{len(found['layers'])} layers, {found['parameters']:,} values",
        *_kinds(found["layers"]),
        f"  strength by {found['strength']}",
        *(f"  {line}" for line in found["warnings"]),
        *(f"  not read: {key}" for key in found["unknown"]),
    ]
    if layers:
        text += _layers(found["layers"])
    text += _readers(found)
    if metadata:
        text += ["metadata", *(f"  {key}: {value}" for key, value in sorted(found["metadata"].items()))]
    return text


def _kinds(layers: Sequence[dict[str, Any]]) -> list[str]:
    """One line for all layers that differ in nothing but their names and shapes."""
    groups = Counter((row["part"], row["kind"], row["dim"], row["scale"], row["dora"]) for row in layers)
    text = []
    for (prefix, kind, dim, scale, dora), count in groups.items():
        rank = "" if dim is None else f", dim {dim}"
        text.append(f"  {prefix}: {count} x {kind}{rank}, scale {scale:g}" + (f", DoRA ({dora})" if dora else ""))
    return text


def _layers(layers: Sequence[dict[str, Any]]) -> list[str]:
    width = max(len(row["name"]) for row in layers)
    text = []
    for row in layers:
        alpha = "-" if row["alpha"] is None else f"{row['alpha']:g}"
        rank = "-" if row["dim"] is None else row["dim"]
        shapes = ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in row["shapes"].items())
        text.append(f"  {row['name']:{width}}  dim {rank}  alpha {alpha}  scale {row['scale']:g}  {shapes}")
    return text


def _readers(found: dict[str, Any]) -> list[str]:
    text = ["read by", f"  this package, and the trainers with it: {found['verdict']}"]
    text += [f"  {found['note']}"] if found["note"] else []
    for reader, (verdict, kind) in found["readers"].items():
        text.append(f"  {reader}: {verdict}" + (f" ({kind})" if kind else ""))
    text += ["  (where the program knows the model, and layers under these names)"] if found["readers"] else []
    return text
