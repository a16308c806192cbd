"""The options that make the network of a file again: what its tensors show, and what its metadata say beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..archs.detect import detect
from ..args.coerce import coerce
from ..args.shells import CommandLine
from ..args.table import BY_NAME, SHOWN
from ..files.adapter_file import FileTensors
from ..files.explain import trained_by
from ..foreign.texts import parse_json
from ..plan.plan import Plan
from ..plan.recover import (
    ENCODERS_ONLY,
    UNET_ONLY,
    Recovered,
    before_differences,
    recover,
)
from .caller import Caller
from .contract import TextEncoders

ENTRY_ALGO = "lora"  # of the modules that stand for an architecture
_STARTS = "networks_init"


def arguments_of(file: FileTensors, text_encoder: TextEncoders, unet: nn.Module, host: str) -> Recovered:
    """The options under which a trainer makes the network of a file.

    Args:
        file: the file.
        text_encoder, unet: models of its architecture and size; the meta device will do.
        host: whose defaults count.

    Raises:
        ValueError: the file does not fit these models, or no network of ours is like it.
    """
    arch = detect(unet)
    known = _said(file.metadata)
    caller = Caller(f"networks.{arch.entry}", ENTRY_ALGO)
    form = {name: known.get(name) for name in ("algo", "split_qkv")}
    wanted = caller.plan_from_weights(file, text_encoder, unet, host, **form)

    def plan(line: CommandLine) -> Plan:
        args = {name: value for name, value in line.args.items() if BY_NAME[name].kind != "files"}  # not at hand
        found = caller.plan(line.dim, line.alpha, text_encoder, unet, host, **args)
        encoders = {part.name for part in arch.text_encoders}
        kept = {UNET_ONLY: {arch.denoiser.name}, ENCODERS_ONLY: encoders}.get(line.only)
        return found if kept is None else found.keep([*kept])

    if "ranks" in _json(file.metadata.get(_STARTS)):
        wanted = before_differences(wanted)
    return recover(wanted, arch, ENTRY_ALGO, {name: v for name, v in known.items() if name != "algo"}, plan)


def _said(metadata: Mapping[str, str]) -> dict[str, str]:
    """The network arguments of which metadata tell; but for the algorithm, those that choose no layer, dim or alpha."""
    given: dict[str, Any] = {
        "dropout": metadata.get("ss_network_dropout"), "save_format": metadata.get("networks_dialect")
    }  # fmt: skip
    starts = _json(metadata.get(_STARTS))
    given |= {"init": next(iter(starts.get("init", ())), None), "init_seed": starts.get("init_seed")}
    given |= trained_by(metadata)
    found: dict[str, str] = {}
    for key, value in given.items():
        arg = BY_NAME.get(key)
        if arg is None or value is None or (arg.group in SHOWN and arg.name != "algo"):
            continue
        try:
            found |= {} if arg.is_neutral(coerce(arg, value)) else {arg.name: str(value)}
        except ValueError:  # a word of another program
            continue
    return found


def _json(text: str | None) -> dict[str, Any]:
    """The object that a value of metadata is; {} if it is none."""
    try:
        found = parse_json(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
