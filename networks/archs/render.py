"""The records as a Markdown table, for the README."""

from __future__ import annotations

from . import ARCHS
from .spec import ArchSpec


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
