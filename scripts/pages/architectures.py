"""docs/architectures.md, from the records of the architectures and the outlines of released models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from networks.archs import ARCHS
from networks.archs.render import markdown
from networks.archs.spec import ArchSpec
from networks.hosts.caller import Caller
from networks.models.skeleton import skeleton
from networks.plan.plan import PlanRow

from .lines import TITLES, trained_by

_BY_OUR_TRAINER = ("ace_step",)  # of those for which no other trainer has a script
_HEAD = """# Architectures

Made by `python scripts/docs.py` from the records in `networks/archs/` and from outlines of the released models.
Every algorithm and every argument is offered on every one of them, and what cannot act on a model is refused with
the reason; the last column holds the arguments that speak of layers which others do not have.

"""
_NOTES = """
A model that is not in the table is trained all the same (`networks.lora`, `lokr` and so on, in both trainers and
in Python): every Linear in its repeated blocks, with `conv_dim` every convolution, named as its modules are. The
log says which blocks these are; a preset with `unet_target_module` or `unet_target_name` chooses others. Its
files load again here by themselves, in musubi-tuner's `networks.lora`, and in ComfyUI where its class has the
same names. Only `algo=tlora`, which must know the timestep, waits for a record.

Below, *layers* are those that are trained when no argument says otherwise; N stands for numbers. The command
lines hold values to start from, for a LoRA, of the trainer's own documents where these have some; `...` stands
for the trainer's arguments for models, data and output. `kohya-networks plan MODEL` shows every layer.
"""


def page() -> str:
    """docs/architectures.md."""
    return "\n".join([_HEAD + markdown() + _NOTES, *("\n".join(_section(arch)) for arch in ARCHS)])


def _section(arch: ArchSpec) -> Iterator[str]:
    yield from (f"## {arch.title}", "")
    names = ", ".join(f"`{release.name}`" for release in arch.releases)
    yield f"Module `networks.{arch.entry}`" + (f"; models of `kohya-networks plan`: {names}." if names else ".")
    if arch.arguments:
        own = ", ".join(f"[`{name}`](arguments.md#{name})" for name in sorted(arch.arguments))
        yield f"Arguments of its own: {own}."
    yield ""
    yield from _layers(arch)
    yield from _recipe(arch)


def _layers(arch: ArchSpec) -> Iterator[str]:
    """Kinds of layers of the first release, with numbers, and one of them by name."""
    if not arch.releases:
        return
    release = arch.releases[0]
    model = skeleton(release.name)
    rows = Caller(f"networks.{arch.entry}", "lora").plan(4, 1.0, model.text_encoders, model.unet).trained
    counts, blocks = Counter(map(_kind, rows)), {row.block for row in rows if row.block is not None}
    yield from (
        f"Layers of {release.title}, by kind:",
        "",
        "| part | layers | kind | shape |",
        "| --- | --- | --- | --- |",
    )
    for (part, kind, shape), count in counts.items():
        yield f"| {part} | {count} | `{kind}` | {' x '.join(map(str, shape))} |"
    one = next(row for row in rows if row.part == arch.denoiser.name)
    yield from ("", f"For example `{one.trainer_name}`, saved as `{one.saved_name}`.", "")
    if blocks:
        yield from (f"`blocks=` counts from {min(blocks)} to {max(blocks)} here.", "")


def _kind(row: PlanRow) -> tuple[str, str, tuple[int, ...]]:
    return row.part, re.sub(r"\d+", "N", row.trainer_name), row.shape


def _recipe(arch: ArchSpec) -> Iterator[str]:
    """The line of the trainer that trains it."""
    found = trained_by(arch)
    if not found and arch.name not in _BY_OUR_TRAINER:
        yield from ("No trainer has a script for it: a loop of your own trains it, see [api.md](api.md).", "")
        return
    options = (arch.start.options if arch.start else "--network_dim 16 --network_alpha 16").split(" --")
    options = [options[0], *(f"--{one}" for one in options[1:])]
    if not found:
        line = ["python scripts/train_network.py ...", f"--network_module networks.{arch.entry}", *options]
        yield "No trainer has a script for it; [that of this package](reference-trainer.md) trains it:"
    else:
        line = [found[0].start, f"--network_module {found[0].module(arch.entry)}", *options]
        scripts = ", ".join(f"`{one.name}` ({TITLES[one.script.host]})" for one in found)
        yield f"Trained by {scripts}:"
    yield from ("", "```bash", _wrapped(line), "```", "", _source(arch), "")


def _wrapped(words: list[str]) -> str:
    """A command line, at most about a hundred columns wide."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > 110:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n    ".join(lines)


def _source(arch: ArchSpec) -> str:
    source = arch.start.source if arch.start else ""
    if not source:
        return "No document has values for it: these are a first try."
    where = f"the trainer's own document, `{source}`" if source.endswith(".md") else source
    return f"The values are those of {where}; alpha 1 where it names none, as the trainer has it."
