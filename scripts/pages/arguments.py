"""docs/arguments.md, from the argument table."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

from networks.archs import ARCHS
from networks.archs.render import owners
from networks.archs.spec import ArchSpec
from networks.args.render import accepted, default_text, elsewhere
from networks.args.table import TABLE
from networks.records import ALGORITHMS, Arg

from .lines import Example, any_model, example

_QUOTED = ("regex_int", "regex_float", "patterns", "files")  # kinds whose spelling shells and TOML do not share
_FIRST = next(iter(ALGORITHMS))  # what the modules of architectures stand for
_HEAD = """# Network arguments

Made by `python scripts/docs.py` from the argument table (`networks/args/table.py` and `networks/records/`). In a
terminal, `kohya-networks args NAME` prints the same of one argument or of one module, and `--network_args
help=True` in the trainer lists those that apply to the module and the model of that run.

[How to write them](#how-to-write-them) · {groups}

## How to write them

Each argument is one word `name=value` behind `--network_args`. `...` stands for the trainer's own arguments:
models, data, optimizer, output. In bash, PowerShell and a trainer's TOML file:

{general} Rank and alpha are options of the trainer: `--network_dim` (default 4), `--network_alpha` (default 1; 0
means the dim), `--network_dropout` (the argument [`dropout`](#dropout)). What multiplies an update is alpha /
rank; [the page of the algorithms](algorithms.md) says it of each.

- **Switches** are true/false, 1/0, yes/no, on/off.
- **Regular expressions** match the whole dotted name of a layer: the trainer's, as plans and logs print it; where
  one matches none of these, this model's own (in Python, either). `text_encoder1:.*mlp.*` means one part alone,
  as the plan names it (`unet` or `dit` for the denoiser, whose names are printed without it); without a part an
  expression means all.
- **Lists and mappings** may be written as Python, as JSON, as `regex=8,regex=4`, or as `@file`: .json, .toml
  (`'regex' = 8` lines, or `patterns = [...]`), or one item per line.
- **musubi-tuner** splits each argument at every `=`: write mappings as `{{'regex': 8}}` or `@file.toml` there,
  and a `=` inside an expression, `(?=...)`, as `\\x3d` in quotes. Its scripts find their own folder `networks`
  first, so the examples have `kohya_networks.NAME`, the same modules under a name that no trainer owns.

An argument that is unknown, misspelt or decides nothing stops the run, with the nearest valid name or the reason;
one that cannot apply passes if its value is neutral. `kohya-networks plan` says it before a model is loaded.

What an argument needs of the algorithm stands at *algorithms*; the arguments that only some of them take are also
in [one table](#which-algorithm-takes-which).
"""


def page() -> str:
    """docs/arguments.md."""
    models = owners()
    groups = list(dict.fromkeys(arg.group for arg in TABLE))
    links = [*(f"[{group}](#{_anchor(group)})" for group in groups)]
    links.append("[which algorithm takes which](#which-algorithm-takes-which)")
    parts = [_HEAD.format(groups=" · ".join(links), general=_general())]
    for group in groups:
        rows = [arg for arg in TABLE if arg.group == group]
        parts += [f"## {group.capitalize()}\n", _overview(rows), *(_section(arg, models) for arg in rows)]
    parts += ["## Which algorithm takes which\n", "All arguments that are not here act with all of them.\n", by_algo()]
    return "\n".join(parts)


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _general() -> str:
    line = example(any_model(), "lokr", {"factor": "8", "conv_dim": "4", "network_reg_dims": "{'.*attn2.*': 16}"})
    return "\n".join([line.bash(), line.powershell(), line.toml()])


def _overview(rows: list[Arg]) -> str:
    lines = ["| argument | value | default |", "| --- | --- | --- |"]
    lines += [f"| [`{arg.name}`](#{_anchor(arg.name)}) | {accepted(arg)} | {default_text(arg)} |" for arg in rows]
    return "\n".join(lines) + "\n"


def _section(arg: Arg, models: dict[str, str]) -> str:
    """One argument: its effect, its facts, an example."""
    also = f"Also `{'`, `'.join(arg.aliases)}`. " if arg.aliases else ""
    effect = f"{also}{arg.help[0].upper()}{arg.help[1:]}{elsewhere(arg)}."
    facts = {
        "value": accepted(arg),
        "default": re.sub(r"^-(?!\d)", "none", default_text(arg)),
        "algorithms": ", ".join(arg.algos) if arg.algos else "all",
        "models": models.get(arg.name, "all"),
        "in the file": re.sub(r"(\w+)\.md", r"[\1.md](\1.md)", arg.file),
    }
    lines = [f"### `{arg.name}`", "", effect, "", *(f"- {name}: {text}" for name, text in facts.items()), ""]
    return "\n".join([*lines, *_spellings(arg)])


def _spellings(arg: Arg) -> Iterator[str]:
    shown = shown_on(arg)
    yield shown.bash()
    if arg.kind in _QUOTED:
        yield shown.powershell()
        yield shown.toml()


def shown_on(arg: Arg) -> Example:
    """The example of an argument, on a model and with an algorithm that have it."""
    args = dict(word.split("=", 1) for word in arg.written)
    arch = _arch_of(arg)
    if arg.algos is None or _FIRST in arg.algos or (set(args) & {"algo"}):
        return example(arch, arch.entry, args)
    algo = arg.algos[0]
    if importlib.util.find_spec(f"networks.{algo}"):
        return example(arch, algo, args)
    return example(arch, arch.entry, {"algo": algo, **args})


def _arch_of(arg: Arg) -> ArchSpec:
    """The usual one where it has the argument, else the first that has it."""
    own = [arch for arch in ARCHS if arg.name in arch.arguments]
    return any_model() if not own or any_model() in own else own[0]


def by_algo() -> str:
    """Which algorithm takes which argument, of those that not all of them take."""
    rows = [arg for arg in TABLE if arg.algos and set(arg.algos) != set(ALGORITHMS)]
    lines = [f"| argument | {' | '.join(ALGORITHMS)} |", f"| --- | {' | '.join('---' for _ in ALGORITHMS)} |"]
    for arg in rows:
        cells = ["yes" if arg.algos and algo in arg.algos else "-" for algo in ALGORITHMS]
        lines.append(f"| [`{arg.name}`](#{_anchor(arg.name)}) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
