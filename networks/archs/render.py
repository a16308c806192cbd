"""The records in words, for docs/architectures.md."""

from __future__ import annotations

from collections.abc import Sequence

from . import ARCHS
from .spec import ArchSpec

_LEVELS = {"down_lr_weight": "down", "mid_lr_weight": "mid", "up_lr_weight": "up"}
_TRAINED = {True: "trained", False: "left out"}


def markdown() -> str:
    """One line per architecture; generated text, so edit the records instead."""
    lines = [
        "| model | entry | layers trained by default | text encoders | blocks of `blocks=` | arguments of its own |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arch in ARCHS:
        usual = " / ".join(map(str, sorted(arch.usual))) or "-"
        own = ", ".join(f"`{name}`" for name in sorted(arch.arguments)) or "-"
        cells = f"{arch.title} ({_classes(arch)})", f"`{arch.entry}`", usual, _encoders(arch), _blocks(arch), own
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def owners() -> dict[str, str]:
    """Argument -> the models that have it, and what it means there where that differs."""
    names = sorted({name for arch in ARCHS for name in arch.arguments})
    return {name: _owners(name, [arch for arch in ARCHS if name in arch.arguments]) for name in names}


def _owners(argument: str, archs: Sequence[ArchSpec]) -> str:
    meanings: dict[str, list[str]] = {}
    for arch in archs:
        meanings.setdefault(_meaning(argument, arch), []).append(arch.title)
    return "; ".join(", ".join(titles) + meaning for meaning, titles in meanings.items())


def _meaning(argument: str, arch: ArchSpec) -> str:
    if argument == "train_blocks":
        return f": {', '.join(name for name, _ in arch.block_sets)}"
    if argument == "lora_target_preset":
        names = [name for name, _ in arch.target_presets]
        return f": {', '.join(names)}; {names[0]} if not given"
    if argument in _LEVELS and arch.levels:
        return f": {getattr(arch.levels, _LEVELS[argument])}"
    switch = next((one for one in arch.switches if one.argument == argument), None)
    if switch is None:
        return ""
    hosts = "".join(f", under {host} {_TRAINED[trained]}" for host, trained in switch.per_host)
    return f": {_TRAINED[switch.default]} if not given{hosts}"


def _classes(arch: ArchSpec) -> str:
    return ", ".join(dict.fromkeys(f"`{signature.cls}`" for signature in arch.signatures))


def _encoders(arch: ArchSpec) -> str:
    return (
        ", ".join(part.prefix + (f" with `{part.argument}`" if part.argument else "") for part in arch.text_encoders)
        or "-"
    )


def _blocks(arch: ArchSpec) -> str:
    if arch.block_count is not None:
        return f"0-{arch.block_count - 1}"
    starts = ["behind them" if axis.first is None else f"from {axis.first}" for axis in arch.axes]
    return ", ".join(f"{axis.prefix.rstrip('.')} {start}" for axis, start in zip(arch.axes, starts, strict=True)) or "-"
