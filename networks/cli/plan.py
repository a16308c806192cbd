"""What would be trained: one row per layer of a model, before anything is loaded or paid for.

    kohya-networks plan sdxl --network_module networks.lokr --network_dim 8 --network_args factor=8 conv_dim=4
    kohya-networks plan wan --host musubi --network_module networks.lora_wan

MODEL is a released model by name (sdxl, flux, wan, ...; --help lists them), a diffusers folder, or a checkpoint, of
which only the header is read. No weights are needed.
With --why NAME (a dotted or saved name, a part of one, or a regular expression) it says for each such layer what every
rule of selection answers, and which argument gives its dim, alpha and learning rate.
The options are the trainer's; where the two trainers differ in their defaults, --host says whose are meant, and
musubi-tuner trains no text encoder. Rows that begin with a reason are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ..models.releases import RELEASES
from .command_line import finite_number, import_network_module, parse_network_args, program, run_program, set_log_level

HOSTS = {"sd-scripts": "sd_scripts", "musubi": "musubi"}


def build_parser() -> argparse.ArgumentParser:
    parser = program(__doc__)
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(RELEASES)}; a diffusers folder; a checkpoint")
    parser.add_argument("--host", choices=HOSTS, default="sd-scripts", help="the trainer; default: %(default)s")
    parser.add_argument("--network_module", default="networks.lora", help="default: %(default)s")
    parser.add_argument("--network_dim", type=int, help="rank; the module's default is 4")
    parser.add_argument(
        "--network_alpha", type=finite_number, default=1.0, help="default: %(default)s, as in the trainers"
    )
    parser.add_argument("--network_dropout", type=finite_number)
    parser.add_argument("--network_args", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--network_train_unet_only", action="store_true")
    parser.add_argument("--network_train_text_encoder_only", action="store_true")
    parser.add_argument("--trained", action="store_true", help="leave out the rows of layers that are not trained")
    parser.add_argument("--why", metavar="NAME", help="explain these layers instead: every rule, every value")
    parser.add_argument(
        "--readers", action="store_true", help="also which programs will not read the files whole and exactly"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    collects = gc.isenabled()
    gc.disable()  # looking for garbage while torch is imported would be a seventh of the time that a plan takes
    try:
        return run_program(show, build_parser(), sys.argv[1:] if argv is None else list(argv))
    finally:
        if collects:
            gc.enable()


def explained(layers: Sequence[Any], as_json: bool) -> str:
    """What --why prints of the answers of `Plan.why`."""
    return json.dumps([layer.to_json() for layer in layers], indent=1) if as_json else "\n\n".join(map(str, layers))


def _printed(plan: Any, readers: bool, as_json: bool) -> str:
    lines = plan.readers() if readers else []
    if as_json:
        return json.dumps(plan.to_json() | ({"readers": lines} if readers else {}), indent=1)
    return "".join([plan.to_text(), *(f"{line}\n" for line in lines)])


def show(args: argparse.Namespace) -> int:
    set_log_level(logging.WARNING)  # the plan says it all, and stdout may be JSON
    module = import_network_module(args.network_module)
    network_args = parse_network_args(args.network_args)
    from ..models.skeleton import skeleton

    model = skeleton(args.model)
    encoders = model.text_encoders if args.host == "sd-scripts" else []
    if args.network_train_text_encoder_only and not encoders:
        raise ValueError(f"--network_train_text_encoder_only: nothing is left, {args.host} trains no text encoder here")
    plan = module.plan(
        args.network_dim,
        args.network_alpha,
        encoders,
        model.unet,
        host=HOSTS[args.host],
        neuron_dropout=args.network_dropout,
        **network_args,
    )
    if args.network_train_unet_only:
        plan = plan.keep([row.part for row in plan.rows if not row.part.startswith("text_encoder")])
    if args.network_train_text_encoder_only:
        plan = plan.keep([row.part for row in plan.rows if row.part.startswith("text_encoder")])
    if args.why is not None:
        print(explained(plan.why(args.why), args.json))
        return 0
    if args.trained:
        plan = plan.only_trained()
    print(_printed(plan, args.readers, args.json), end="")
    return 0
