"""The argument table as Markdown, for the README."""

from __future__ import annotations

from .spec import Arg
from .table import ALGOS, TABLE

_TYPES = {
    "bool": "True / False",
    "int": "number",
    "float": "number",
    "choice": "",
    "word": "a name",
    "text": "a name or `file.toml`",
    "patterns": "`['regex', ...]`",
    "regex_int": "`{'regex': 8}`",
    "regex_float": "`{'regex': 1e-4}`",
    "blocks": "`0-7,20-24`",
    "ints": "`4,8,16`",
    "floats": "`1,0.5,1`",
    "rates": "`1,0.5,0` or `cosine+0.25`",
}

_TRAINERS = {"sd_scripts": "sd-scripts", "musubi": "musubi-tuner"}
_HOSTS = {
    **_TRAINERS,
    "preset": "with a preset that trains convolutions",
    **{name: f"networks.{name}" for name in ("lycoris", "oft", "oft_flux")},
}


def markdown() -> str:
    """One table, grouped; generated text, so edit the rows in table.py instead."""
    lines = ["| argument | value | default | effect |", "| --- | --- | --- | --- |"]
    group = None
    for arg in sorted(TABLE, key=lambda arg: list(dict.fromkeys(a.group for a in TABLE)).index(arg.group)):
        if arg.group != group:
            group = arg.group
            lines.append(f"| **{group}** | | | |")
        lines.append(f"| {_names(arg)} | {_type(arg)} | {_default(arg)} | {arg.help}{_only(arg)} |")
    return "\n".join(lines) + "\n"


def algorithms() -> str:
    """Which algorithm takes which argument, for those that not all of them take."""
    rows = [arg for arg in TABLE if arg.algos and set(arg.algos) != set(ALGOS)]
    lines = [f"| argument | {' | '.join(ALGOS)} |", f"| --- | {' | '.join('---' for _ in ALGOS)} |"]
    for arg in rows:
        cells = ["yes" if arg.algos and algo in arg.algos else "-" for algo in ALGOS]
        lines.append(f"| `{arg.name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _names(arg: Arg) -> str:
    also = f" ({', '.join(f'`{name}`' for name in arg.aliases)})" if arg.aliases else ""
    return f"`{arg.name}`{also}"


def _type(arg: Arg) -> str:
    if arg.choices:
        also = {choice: [f"`{word}`" for word, meant in arg.words if meant == choice] for choice in arg.choices}
        return " / ".join(" = ".join([f"`{choice}`", *also[choice]]) for choice in arg.choices)
    bounds = ""
    if arg.minimum is not None and arg.kind in ("int", "float"):
        bounds = f" >= {arg.minimum:g}" if arg.below is None else f" {arg.minimum:g} to below {arg.below:g}"
    return _TYPES[arg.kind] + bounds


def _default(arg: Arg) -> str:
    if arg.name == "algo":
        return "the entry's"
    plain = "-" if arg.default in (None, (), {}, "") or arg.kind == "rates" else str(arg.default)
    values = {host: f"`{value}`" if isinstance(value, str) else str(value) for host, value in arg.per_host}
    return "; ".join(
        [plain] * (not _TRAINERS.keys() <= values.keys()) + [f"{_HOSTS[host]}: {v}" for host, v in values.items()]
    )


def _only(arg: Arg) -> str:
    return f" ({', '.join(arg.algos)} only)" if arg.algos else ""
