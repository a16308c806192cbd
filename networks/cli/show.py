"""What an adapter file is: its layers, ranks and real strengths, where it comes from, and which programs read it right.

    kohya-networks show my-lora.safetensors
    kohya-networks show my-lora.safetensors --layers

Names, shapes and metadata say which model it is for; --model CHECKPOINT gives the errors that depend on its weights.

    kohya-networks show my-lora.safetensors --as_args

prints the options that make this network again, for new weights: layers, dims, strengths and form as in the file, in
bash, PowerShell and TOML. What no tensor shows (dropout, start values, learning rates) is there if metadata tell it.

    kohya-networks show my-lora.safetensors --plot my-lora.png
    kohya-networks show first.safetensors second.safetensors

draws where its updates are and what each dim would keep, for resize; and says how alike two files are, layer by layer.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..foreign.texts import SHOWN, printable
from ..models.releases import RELEASES
from .command_line import add_overwrite, check_outputs, program, run_program, say, set_log_level
from .plan import HOSTS
from .tool_options import add_base, progress

if TYPE_CHECKING:
    from ..files.adapter_file import FileTensors


def build_parser() -> argparse.ArgumentParser:
    parser = program(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument(
        "other", metavar="OTHER", nargs="?", type=Path, help="the cosine of FILE with this one, instead"
    )
    parser.add_argument("--plot", metavar="PNG", type=Path, help="draw updates, singular values and what a dim keeps")
    add_base(parser)
    add_overwrite(parser)
    parser.add_argument("--layers", action="store_true", help="one line per layer, too")
    parser.add_argument("--metadata", action="store_true", help="all metadata, too")
    parser.add_argument("--as_args", action="store_true", help="the trainer's options for such a network, instead")
    parser.add_argument(
        "--model",
        help=f"what it is for, where names and metadata leave that open: {', '.join(RELEASES)}; a diffusers folder; a "
        "checkpoint",
    )
    parser.add_argument(
        "--host", choices=HOSTS, default="sd-scripts", help="whose defaults count for --as_args; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, everything")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(show, build_parser(), sys.argv[1:] if argv is None else list(argv))


def show(args: argparse.Namespace) -> int:
    if args.other is not None:
        alone = [name for name in ("plot", "as_args", "metadata") if getattr(args, name)]
        if alone:
            raise ValueError(f"--{alone[0]} is of one file: leave out {args.other}, or the option")
        return _compared(args)
    if args.plot is not None:
        return _drawn(args)
    if args.as_args:
        for line in _as_args(args):
            say(line)
        return 0
    from ..files.adapter_file import FileTensors
    from ..files.explain import explain

    file = FileTensors(args.file)
    found = explain(file)
    found["model"], found["readers"] = _readers(file, args)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for line in lines(found, args.layers, args.metadata):
        say(line)
    return 0


def _compared(args: argparse.Namespace) -> int:
    from ..tools.compare import compare

    found = compare(args.file, args.other, model=args.model or "", base=args.base, walk=progress("comparing"))
    if args.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    for line in found.lines(args.layers):
        say(line)
    return 0


def _drawn(args: argparse.Namespace) -> int:
    from ..tools.plots import draw
    from ..tools.spectra import spectra

    check_outputs([args.plot], [args.file], args.overwrite)
    found = spectra(args.file, model=args.model or "", base=args.base, walk=progress("looking"))
    draw(found, args.plot)
    if args.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    for line in filter(None, found.lines()):
        say(line)
    say(f"wrote {args.plot}")
    return 0


def _as_args(args: argparse.Namespace) -> list[str]:
    """The options of a trainer, in each way to write them."""
    from ..files.adapter_file import FileTensors
    from ..hosts.file_arguments import arguments_of
    from ..models.adapters import model_of
    from ..models.skeleton import skeleton

    set_log_level(logging.ERROR)  # it is the user's model that is planned, not a network to train
    file = FileTensors(args.file)
    model = skeleton(args.model) if args.model else model_of(file)
    encoders = model.text_encoders if args.host == "sd-scripts" else None
    try:
        found = arguments_of(file, encoders, model.unet, HOSTS[args.host])
    except ValueError as error:
        raise ValueError(str(error) if str(args.file) in str(error) else f"{args.file}: {error}") from None
    if args.json:
        return json.dumps({"model": model.title, **asdict(found)}, indent=1).splitlines()
    remarks = [f"# not alike: {text}" for text in found.differences]
    ways = {"bash": found.line.bash, "PowerShell": found.line.powershell, "TOML": found.line.toml}
    text = [f"# {model.title}, {args.host}", *remarks]
    return [*text, *(line for name, write in ways.items() for line in ("", f"# {name}", *write().splitlines()))]


def lines(found: dict[str, Any], layers: bool, metadata: bool) -> list[str]:
    """The same for people.

    Args:
        found: what `explain` says of the file.
        layers, metadata: whether each layer and all metadata are shown, too.
    """
    text = [
        f"{found['file']}: {found['bytes'] / 2**20:.1f} MiB, {', '.join(found['dtypes'])}, form {found['dialect']}",
        *(f"  {name}: {printable(value, SHOWN)}" for name, value in found["origin"].items()),
        f"{len(found['layers'])} layers, {found['parameters']:,} values",
        *_kinds(found["layers"]),
        f"  strength by {found['strength']}",
        *(f"  {line}" for line in found["warnings"]),
        *(f"  not read: {key}" for key in found["unknown"]),
    ]
    if layers:
        text += _layers(found["layers"])
    text += _read_by(found)
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


def _readers(file: FileTensors, args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """The model that a file is for, and what other programs make of it there; "" and [] where it is not known."""
    from ..files.verdicts import verdicts
    from ..models.adapters import given_of, model_of
    from ..models.skeleton import skeleton

    try:
        model = skeleton(args.model) if args.model else model_of(file)
    except ValueError:
        if args.model:
            raise
        return "", []
    checkpoint = Path(args.model) if args.model and Path(args.model).is_file() else None
    return model.title, [verdict.to_json() for verdict in verdicts(given_of(file, model, checkpoint))]


def _read_by(found: dict[str, Any]) -> list[str]:
    text = [f"this package, and the trainers with it: {found['verdict']}"]
    if not found["model"]:
        text.append(
            "other programs: not known, since names and metadata leave open what it is for; say it with --model"
        )
        return ["read by", *(f"  {line}" for line in text)]
    text += [reader["sentence"] for reader in found["readers"]]
    return [f"read by, on {found['model']}", *(f"  {line}" for line in text)]
