"""What networks.oft_v2 and networks.boft of sd-scripts call otherwise than all other modules: their words in ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..args.coerce import coerce, named, whole
from ..args.parse import Problems
from ..records import Arg

log = logging.getLogger("networks")


@dataclass(frozen=True)
class Words:
    """Of one module.

    Attributes:
        sizes: spellings of the size of a block, the first that is given; it goes before network_dim.
        renamed: spelling there -> here. It gives way to what a call has under the name here.
        nothing: switch -> the position in which it asks for what is done here anyway.
        beside: argument -> the switch without which it says nothing, or the end of its spellings.
    """

    sizes: tuple[str, ...]
    renamed: Mapping[str, str]
    nothing: Mapping[str, bool]
    beside: Mapping[str, str]


WORDS = {
    "oft_v2": Words(
        ("oft_block_size", "block_size"),
        {"dropout_probability": "dropout"},
        {"auto_adjust": True, "coft": False, "oft_coft": False},
        {"coft_eps": "coft"},
    ),
    "boft": Words(("boft_block_size", "block_size"), {"boft_dropout": "dropout"}, {"auto_adjust": True}, {}),
}


def in_our_words(
    module: str, raw: Mapping[str, Any], dim: int | None, problems: Problems
) -> tuple[dict[str, Any], int | None]:
    """(arguments, network_dim) of a call to an entry, as any other entry takes them.

    Args:
        module: whose words they are, a name in WORDS; any other has none of its own.
        raw: the network arguments.
        dim: --network_dim.
        problems: takes mistakes.
    """
    words = WORDS.get(module)
    if words is None:
        return dict(raw), dim
    given = {key.strip(): value for key, value in raw.items() if value is not None}
    try:
        dim = next((int(named(name, given.pop(name), 1, whole)) for name in words.sizes if name in given), dim)
    except ValueError as error:
        problems.add(str(error))
    _drop_idle(given, words)
    for there in words.renamed.keys() & given.keys():
        given.setdefault(words.renamed[there], given.pop(there))
    _only(given)
    return given, dim


def _drop_idle(given: dict[str, Any], words: Words) -> None:
    """Take out what asks for nothing."""
    for name, position in words.nothing.items():
        if _position(name, given.get(name)) is position:
            del given[name]
    for name, switch in words.beside.items():
        if name in given and not any(one.endswith(switch) for one in given):
            log.warning("%s=%s is not looked at: it says something beside %s=True", name, given.pop(name), switch)


def _position(name: str, value: Any) -> bool | None:
    """None if the value is no position of a switch, which is told where arguments are read."""
    try:
        return None if value is None else bool(coerce(Arg(name, "bool", None, "", ""), value))
    except ValueError:
        return None


def _only(given: dict[str, Any]) -> None:
    """There nothing is trained but what include_patterns matches, whatever is excluded."""
    include, only = "include_patterns", "only_patterns"
    if include not in given or only in given:
        return
    given[only] = given.pop(include)
    log.warning(
        "%s=%s: nothing else is trained, as by sd-scripts' module of this name, which does not look at "
        "exclude_patterns beside it; write %s, which says so everywhere",
        include, given[only], only,
    )  # fmt: skip
    given.pop("exclude_patterns", None)
