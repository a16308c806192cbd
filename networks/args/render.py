"""The argument table for people and programs: text, JSON, and Python's types; scripts/pages has the page."""

from __future__ import annotations

import textwrap
from typing import Any

from ..records import Arg
from .table import STANDS_FOR, TABLE

_TYPES = {
    "bool": "True / False",
    "int": "number",
    "float": "number",
    "choice": "",
    "word": "a name",
    "text": "a name or `file.toml`",
    "files": "`FILE=0.5`",
    "patterns": "`['regex', ...]`",
    "regex_int": "`{'regex': 8}`",
    "regex_float": "`{'regex': 1e-4}`",
    "blocks": "`0-7,20-24`",
    "ints": "`4,8,16`",
    "floats": "`1,0.5,1`",
    "rates": "`1,0.5,0` or `cosine+0.25`",
}

_PYTHON = {  # besides the text that command lines have
    "bool": "bool",
    "int": "int",
    "float": "float",
    "word": "str",
    "text": "str",
    "files": "str | Sequence[str] | Mapping[str, float]",
    "patterns": "str | Sequence[str]",
    "choices": "str | Sequence[str]",
    "regex_int": "str | Mapping[str, int]",
    "regex_float": "str | Mapping[str, float]",
    "blocks": "str | Sequence[int]",
    "ints": "str | int | Sequence[int | None]",
    "floats": "str | float | Sequence[float | None]",
    "rates": "str | Sequence[float]",
}

_TRAINERS = {"sd_scripts": "sd-scripts", "musubi": "musubi-tuner"}
_HOSTS = {
    **_TRAINERS,
    "preset": "with a preset that trains convolutions",
    **{name: f"networks.{name}" for name in ("api", "lycoris", "oft", "oft_flux", "oft_v2", "boft")},
}


def accepted(arg: Arg) -> str:
    """The values that it takes."""
    if arg.choices:
        also = {choice: [f"`{word}`" for word, meant in arg.words if meant == choice] for choice in arg.choices}
        return " / ".join(" = ".join([f"`{choice}`", *also[choice]]) for choice in arg.choices)
    bounds = ""
    if arg.minimum is not None and arg.kind in ("int", "float"):
        bounds = f" >= {arg.minimum:g}" if arg.below is None else f" {arg.minimum:g} to below {arg.below:g}"
    return (_TYPES[arg.kind] if arg.below is None else _TYPES[arg.kind].replace("1e-4", "0.1")) + bounds


def default_text(arg: Arg) -> str:
    """Its default, and those of the hosts that have another."""
    if arg.name == "algo":
        return "the entry's"
    plain = shown(arg, arg.default)
    values = {host: f"`{value}`" if isinstance(value, str) else str(value) for host, value in arg.per_host}
    return "; ".join(
        [plain] * (not _TRAINERS.keys() <= values.keys()) + [f"{_HOSTS[host]}: {v}" for host, v in values.items()]
    )


def shown(arg: Arg, value: Any) -> str:
    """A value of an argument; "-" where it asks for nothing."""
    listed = ",".join(value) if arg.kind == "choices" else value
    return "-" if listed in (None, (), {}, "") or arg.kind == "rates" else str(listed)


def _only(arg: Arg) -> str:
    return f" ({', '.join(arg.algos)} only)" if arg.algos else ""


def elsewhere(arg: Arg) -> str:
    """Where an entry takes its place otherwise than the module that it stands for."""
    joined = [f"networks.{entry}: one of its names that asks for it is enough" for entry in arg.joined]
    fixed = [
        f"networks.{entry}: as written; {STANDS_FOR[entry]} takes {value} whatever is written"
        for entry, value in arg.elsewhere
    ]
    unasked = [f"networks.{entry}: {value} is as not given" for entry, value in arg.unasked]
    return "".join(f" ({one})" for one in (*unasked, *joined, *fixed))


def plain(arg: Arg, width: int, algos: bool) -> str:
    """One argument for a terminal of this width; `algos`: with the algorithms that take it."""
    return described(arg, default_text(arg), width, (_only(arg) if algos else "") + elsewhere(arg))


def described(arg: Arg, default: str, width: int, more: str = "") -> str:
    """One argument for a terminal.

    Args:
        default: as it is to be read.
        width: columns.
        more: stands behind its effect.
    """
    head = f"{', '.join(arg.names)}: {accepted(arg)} (default {default})".replace("`", "")
    body = textwrap.wrap(arg.help + more, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([*textwrap.wrap(head, width, initial_indent="  ", subsequent_indent="      "), *body])


def as_json(arg: Arg) -> dict[str, Any]:
    """One argument for programs; `per_host` has the defaults that differ: a value, or the option whose value it is."""
    default = arg.default if arg.kind != "rates" else None
    return {
        "name": arg.name, "aliases": arg.aliases, "kind": arg.kind, "choices": arg.choices, "default": default,
        "per_host": dict(arg.per_host), "minimum": arg.minimum, "below": arg.below, "algos": arg.algos,
        "group": arg.group, "help": arg.help, "file": arg.file, "example": arg.written,
    }  # fmt: skip


def typed() -> str:
    """Every argument but `algo` as a keyword of networks.api, with its type: the source of options.py."""
    algo, rows = next(arg for arg in TABLE if arg.name == "algo"), [arg for arg in TABLE if arg.name != "algo"]
    lines = [
        '"""The network arguments as keywords with types. scripts/docs.py writes this: edit the rows in table.py."""',
        "",
        "from __future__ import annotations",
        "",
        "from collections.abc import Mapping, Sequence",
        "from typing import Literal, TypedDict",
        "",
        "Algo = Literal[",
        *(f'    "{word}",' for word in algo.choices),
        "]",
        "",
        "",
        "class Options(TypedDict, total=False):",
        '    """What the table says of each is printed by `kohya-networks args`."""',
        "",
    ]
    return "\n".join([*lines, *(_declared(arg) for arg in rows)]) + "\n"


def _declared(arg: Arg) -> str:
    """Its line, or three where one would be too long."""
    line = f"    {arg.name}: {_annotation(arg)}"
    head, _, words = line.partition("Literal[")
    return line if len(line) <= 120 else f"{head}Literal[\n        {words[:-1]}\n    ]"


def _annotation(arg: Arg) -> str:
    if not arg.choices or arg.kind in _PYTHON:
        return _PYTHON[arg.kind]
    return ("bool | " if "true" in arg.choices else "") + _literal(arg)


def _literal(arg: Arg) -> str:
    words = ", ".join(f'"{word}"' for word in arg.choices)
    return f"Literal[{words}]"
