"""Raw keyword arguments of a trainer -> typed NetArgs; all mistakes of a call in one message."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..records import Arg
from ..records.arg import NUMBERS
from . import presets
from .coerce import NOT_GIVEN, coerce, nearest
from .table import BY_NAME, OWN_STYLES, TABLE

log = logging.getLogger(__name__)


@dataclass
class Problems:
    """Collects what is wrong with one call, so that the user reads all of it at once.

    Args:
        where: the entry as the user typed it, `networks.lokr`.
    """

    where: str
    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)

    def stop(self) -> None:
        """Raise what was collected.

        Raises:
            ValueError: if there is anything.
        """
        if not self.messages:
            return
        if len(self.messages) == 1:
            raise ValueError(f"{self.where}: {self.messages[0]}")
        lines = "".join(f"\n  - {message}" for message in self.messages)
        raise ValueError(f"{self.where}: {len(self.messages)} problems:{lines}")


@dataclass(frozen=True)
class NetArgs:
    """Typed arguments, one attribute per row of the table.

    Attributes:
        values: name -> value, defaults filled in.
        given: names that the user wrote (and that did not mean "not given").
        host: whose defaults apply where they are not the table's but an architecture's.
        style: the entry whose defaults went before; "" = nobody's.
    """

    values: Mapping[str, Any]
    given: frozenset[str] = frozenset()
    host: str = "sd_scripts"
    style: str = ""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def pick(self, names: Iterable[str]) -> dict[str, Any]:
        """The chosen arguments as keywords."""
        return {name: self.values[name] for name in names}


def parse(
    raw: Mapping[str, Any],
    default_algo: str,
    problems: Problems,
    host: str = "sd_scripts",
    options: Mapping[str, Any] | None = None,
    style: str = "",
) -> NetArgs:
    """Read all arguments; mistakes go to `problems` and leave the default behind.

    Args:
        raw: spelling -> text or typed value; None = not given (trainers pass options through that way).
        default_algo: the algorithm if no `algo` is given.
        host: whose defaults apply.
        style: an entry whose defaults go before the host's, `lycoris`; those of OWN_STYLES for default_algo alone.
        options: network_dim and network_alpha of the call, which some defaults follow.
    """
    if style in OWN_STYLES and _early(raw, "algo") not in (None, default_algo):
        style = ""
    preset = _preset(raw, BY_NAME["preset"].default_at((style,), {}), problems)
    hosts = (style, "preset" if _convolutions(raw, preset) else "", host)
    values = {arg.name: arg.default_at(hosts, options or {}) for arg in TABLE}
    spelled: dict[str, str] = {}
    unknown: list[str] = []
    for key, text in ((key.strip(), text) for key, text in raw.items()):  # hosts cut at "=" and ";", blanks stay
        if text is not None and key in BY_NAME:
            _read(BY_NAME[key], key, text, values, spelled, problems)
        elif text is not None:
            unknown.append(key)
    values["algo"], values["preset"] = values["algo"] or default_algo, preset
    _unknown(unknown, values["allow_unknown"], problems)
    _inapplicable(values, spelled, problems)
    return NetArgs(values, frozenset(spelled), host, style)


def _read(arg: Arg, key: str, text: Any, values: dict[str, Any], spelled: dict[str, str], problems: Problems) -> None:
    """Put the value of one argument into `values`, and how it was spelt into `spelled`."""
    if arg.kind in NUMBERS and isinstance(text, str) and text.strip().lower() in NOT_GIVEN:
        log.warning("%s=%s: taken as not given", key, text)
        return
    try:
        value = coerce(arg, text)
    except ValueError as error:
        problems.add(f"{key}={text} {error}")
        return
    if arg.name in spelled and values[arg.name] != value:
        problems.add(f"{key}={text} contradicts {spelled[arg.name]}={values[arg.name]}: both are the same argument")
        return
    values[arg.name], spelled[arg.name] = value, key


def _convolutions(raw: Mapping[str, Any], preset: presets.Preset | None) -> bool:
    """Whether kernels above 1x1 are trained without a conv_dim."""
    asked = _early(raw, "enable_conv")
    return bool(preset and preset.enable_conv) if asked is None else asked


def _early(raw: Mapping[str, Any], name: str) -> Any:
    """An argument on which defaults of others depend; None if it is not given, or wrong, which is told later."""
    text = next((text for key, text in raw.items() if key.strip() == name), None)
    try:
        return None if text is None else coerce(BY_NAME[name], text)
    except ValueError:
        return None


def _preset(raw: Mapping[str, Any], default: str, problems: Problems) -> presets.Preset | None:
    given = next((text for key, text in raw.items() if key.strip() == "preset" and text is not None), default)
    text = coerce(BY_NAME["preset"], given) or default
    try:
        return presets.load(text) if text else None
    except ValueError as error:
        problems.add(f"preset={text} {error}")
        return None


def _unknown(keys: list[str], allowed: bool, problems: Problems) -> None:
    for key in keys:
        if allowed:
            log.warning("unknown argument %s: ignored, because allow_unknown=True", key)
        else:
            hint = nearest(key, BY_NAME) or "; the README lists all arguments"
            problems.add(f"no argument is called {key}{hint}")


def _inapplicable(values: Mapping[str, Any], spelled: Mapping[str, str], problems: Problems) -> None:
    algos = {values["algo"], *(values["preset"].algos if values["preset"] else ())}
    for name, key in spelled.items():
        arg: Arg = BY_NAME[name]
        if not arg.acts(values[name], algos):
            takers = ", ".join(arg.algos or ())
            problems.add(f"{key}={values[name]} has no effect with algo={values['algo']}; it works with {takers}")
    if values["enable_conv"] is False and values["conv_dim"]:
        problems.add(f"enable_conv=False contradicts conv_dim={values['conv_dim']}: leave one of the two out")
    if "conv_alpha" in spelled and values["conv_alpha"] not in (0.0, 1.0) and not values["conv_dim"]:
        problems.add("conv_alpha is given without conv_dim: give both, or neither")
