"""What an adapter file is: its layers, ranks and real strengths, where it comes from, and which programs read it right.

    python scripts/show.py my-lora.safetensors
    python scripts/show.py my-lora.safetensors --layers

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's networks, whatever is installed

from networks.cli.command_line import run_program  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--layers", action="store_true", help="one line per layer, too")
    parser.add_argument("--metadata", action="store_true", help="all metadata, too")
    parser.add_argument("--json", action="store_true", help="machine-readable, everything")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(show, build_parser(), sys.argv[1:] if argv is None else list(argv))


def show(args: argparse.Namespace) -> int:
    from networks.files.explain import explain

    found = explain(args.file)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print("\n".join(lines(found, args.layers, args.metadata)))
    return 0


def lines(found: dict[str, Any], layers: bool, metadata: bool) -> list[str]:
    """The same for people."""
    size = f"{found['bytes'] / 2**20:.1f} MiB"
    text = [f"{found['file']}: {size}, {', '.join(found['dtypes'])}, form {found['dialect']}"]
    text += [f"  {name}: {value}" for name, value in found["origin"].items()]
    groups = Counter((row["part"], row["kind"], row["dim"], row["scale"], row["dora"]) for row in found["layers"])
    text.append(f"{len(found['layers'])} layers, {found['parameters']:,} values")
    for (prefix, kind, dim, scale, dora), count in groups.items():
        rank = "" if dim is None else f", dim {dim}"
        text.append(f"  {prefix}: {count} x {kind}{rank}, scale {scale:g}" + (f", DoRA ({dora})" if dora else ""))
    text.append(f"  strength by {found['strength']}")
    text += [f"  {line}" for line in (*found["warnings"], *map("not read: {}".format, found["unknown"]))]
    if layers:
        width = max(len(row["name"]) for row in found["layers"])
        for row in found["layers"]:
            alpha = "-" if row["alpha"] is None else f"{row['alpha']:g}"
            rank = "-" if row["dim"] is None else row["dim"]
            shapes = ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in row["shapes"].items())
            text.append(f"  {row['name']:{width}}  dim {rank}  alpha {alpha}  scale {row['scale']:g}  {shapes}")
    text.append("read by")
    text.append(f"  this package, and the trainers with it: {found['verdict']}")
    text += [f"  {found['note']}"] if found["note"] else []
    for reader, (verdict, kind) in found["readers"].items():
        text.append(f"  {reader}: {verdict}" + (f" ({kind})" if kind else ""))
    text += ["  (where the program knows the model, and layers under these names)"] if found["readers"] else []
    if metadata:
        text += ["metadata", *(f"  {key}: {value}" for key, value in sorted(found["metadata"].items()))]
    return text


if __name__ == "__main__":
    raise SystemExit(main())
