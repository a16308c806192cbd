"""Raw keyword arguments of a trainer -> typed NetArgs; all mistakes of a call in one message."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .._errors import ITEM
from ..foreign.texts import printable
from ..records import Arg
from ..records.arg import NUMBERS
from . import hints, presets
from .coerce import NOT_GIVEN, coerce, nearest
from .table import BY_NAME, OWN_STYLES, TABLE

log = logging.getLogger(__name__)


@dataclass
class Problems:
    """Collects what is wrong with one call, so that the user reads all of it at once.

    Args:
        where: the entry as the user typed it, `networks.lokr`.
        documented: arguments which the documents of the host, or of what the entry stands for, list for this call:
            working command lines have them, so that without effect they are told, while others are mistakes.
        spelled: name of an argument -> what it is called in this call.
    """

    where: str
    documented: Collection[str] = ()
    mistakes: list[str] = field(default_factory=list)
    spelled: Mapping[str, str] = field(default_factory=dict)
    without_effect: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, message: str) -> None:
        message = printable(message)
        if message not in self.mistakes:
            self.mistakes.append(message)

    def idle(self, name: str, why: str, shown: str = "") -> None:
        """An argument that was given acts on nothing.

        Args:
            name: of the argument, as the table has it.
            why: how "... has no effect" goes on, with what stands between: `: this model has no such layer`.
            shown: as the user wrote it; "" = the name of the two that the call has.
        """
        self.without_effect.setdefault(name, (shown or self.spelled.get(name, name), why))

    @property
    def messages(self) -> list[str]:
        """All mistakes, one sentence each."""
        idle = (one for name, one in self.without_effect.items() if name not in self.documented)
        return [*self.mistakes, *(f"{shown} has no effect{why}" for shown, why in idle)]

    def warnings(self) -> list[str]:
        """One sentence about all documented arguments without effect, if there are any."""
        idle = [one for name, one in self.without_effect.items() if name in self.documented]
        if not idle:
            return []
        told = ", ".join(f"{shown} ({why.strip(': ')})" for shown, why in idle)
        return [f"{self.where}: without effect here, so not used: {told}"]

    def raise_if_any(self) -> None:
        """Raise what was collected.

        Raises:
            ValueError: if there is anything.
        """
        messages = self.messages
        if not messages:
            return
        if len(messages) == 1:
            raise ValueError(f"{self.where}: {messages[0]}")
        lines = "".join(f"{ITEM}{message}" for message in messages)
        raise ValueError(f"{self.where}: {len(messages)} problems:{lines}")


@dataclass(frozen=True)
class NetArgs:
    """Typed arguments, one attribute per row of the table. It notes which of them were read.

    Attributes:
        values: name -> value, defaults filled in; looking here is no reading.
        given: names that the user wrote (and that did not mean "not given").
        host: whose defaults apply where they are not the table's but an architecture's.
        style: the entry whose defaults went before; "" = nobody's.
        usual: name -> default of a call to an entry with such defaults: written out, it asks for nothing.
        read: names that some code asked for; shared by what `dataclasses.replace` makes.
    """

    values: Mapping[str, Any]
    given: frozenset[str] = frozenset()
    host: str = "sd_scripts"
    style: str = ""
    usual: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    read: set[str] = field(default_factory=set, compare=False, repr=False)

    def __getattr__(self, name: str) -> Any:
        try:
            value = self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None
        self.__dict__["read"].add(name)
        return value

    def pick(self, names: Iterable[str]) -> dict[str, Any]:
        """The chosen arguments as keywords."""
        values = {name: self.values[name] for name in names}
        self.read.update(values)
        return values

    def asks(self, name: str) -> bool:
        """Whether the user wrote this argument, and with a value that wants something."""
        value = self.values[name]
        return name in self.given and not BY_NAME[name].is_neutral(value) and value != self.usual.get(name)


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
        problems: takes the mistakes.
        host: whose defaults apply.
        options: network_dim and network_alpha of the call, which some defaults follow.
        style: an entry whose defaults go before the host's, `lycoris`; those of OWN_STYLES for default_algo alone.
    """
    if style in OWN_STYLES and _early(raw, "algo") not in (None, default_algo):
        style = ""
    preset = _preset(raw, BY_NAME["preset"].default_at((style,), {}), problems)
    convolutions = _early(raw, "enable_conv")
    if convolutions is None:
        convolutions = preset is not None and preset.enable_conv
    hosts = (style, "preset" if convolutions else "", host)
    values = {arg.name: arg.default_at(hosts, options or {}) for arg in TABLE}
    usual = dict(values) if style else {}
    spelled, unknown = _read(raw, values, style, problems)
    values["algo"], values["preset"] = values["algo"] or default_algo, preset
    args, problems.spelled = NetArgs(values, frozenset(spelled), host, style, usual), spelled
    _unknown(unknown, args, problems)
    _inapplicable(args, spelled, problems)
    return args


def _read(
    raw: Mapping[str, Any], values: dict[str, Any], style: str, problems: Problems
) -> tuple[dict[str, str], dict[str, Any]]:
    """Put what was given into `values`; name -> its spelling, and what no argument is called, with its value."""
    spelled: dict[str, str] = {}
    unknown: dict[str, Any] = {}
    for key, text in ((key.strip(), text) for key, text in raw.items()):  # hosts cut at "=" and ";", blanks stay
        if text is None:
            continue
        shown = f"{printable(key, 100)}={printable(text, 200)}"
        arg = BY_NAME.get(key)
        if arg is None:
            unknown[key] = text
            continue
        if arg.kind in NUMBERS and isinstance(text, str) and text.strip().lower() in NOT_GIVEN:
            log.warning("%s: taken as not given", shown)
            continue
        try:
            value = coerce(arg, text)
        except ValueError as error:
            problems.add(f"{shown} {hints.of_value(arg.name, text) or error}")
            continue
        if (style, value) not in arg.unasked and _counts(arg, (key, value), values, spelled, style, problems):
            values[arg.name], spelled[arg.name] = value, key
    return spelled, unknown


def _counts(
    arg: Arg,
    one: tuple[str, Any],
    values: Mapping[str, Any],
    spelled: Mapping[str, str],
    style: str,
    problems: Problems,
) -> bool:
    """Whether this (spelling, value) of an argument counts, beside another that the call may have."""
    before = (spelled[arg.name], values[arg.name]) if arg.name in spelled else one
    if before[1] == one[1]:
        return True
    asking = [value for _, value in (before, one) if not arg.is_neutral(value)]
    first, second = (f"{key}={printable(value, 200)}" for key, value in (before, one))
    if style not in arg.joined or len(asking) > 1:
        problems.add(f"{second} contradicts {first}: both are the same argument")
        return False
    log.info("%s, %s: both are the same argument, %s counts", first, second, asking[0])
    return bool(asking[0] == one[1])


def _early(raw: Mapping[str, Any], name: str) -> Any:
    """An argument on which defaults of others depend; None if it is not given, or wrong, which is told later."""
    text = next((text for key, text in raw.items() if key.strip() == name), None)
    try:
        return None if text is None else coerce(BY_NAME[name], text)
    except ValueError:
        return None


def _preset(raw: Mapping[str, Any], default: str, problems: Problems) -> presets.Preset | None:
    given = next((text for key, text in raw.items() if key.strip() == "preset" and text is not None), default)
    try:
        text = coerce(BY_NAME["preset"], given) or default
        return presets.load(text) if text else None
    except ValueError as error:
        problems.add(f"preset={printable(given, 200)} {error}")
        return None


def _unknown(unknown: Mapping[str, Any], args: NetArgs, problems: Problems) -> None:
    allowed = args.allow_unknown
    for key, value in unknown.items():
        if allowed:
            log.warning("unknown argument %s: ignored, because allow_unknown=True", printable(key, 100))
        else:
            known = hints.of_name(key, value, in_trainer=args.host != "api")
            hint = f": {known}" if known else nearest(key, BY_NAME) or "; kohya-networks args lists all arguments"
            problems.add(f"no argument is called {printable(key, 100)}{hint}")


def _inapplicable(args: NetArgs, spelled: Mapping[str, str], problems: Problems) -> None:
    algos = {args.algo, *(args.preset.algos if args.preset else ())}
    for name, key in spelled.items():
        arg: Arg = BY_NAME[name]
        if arg.algos is not None and algos.isdisjoint(arg.algos) and args.asks(name):
            why = f" with algo={args.algo}; it works with {', '.join(arg.algos)}"
            problems.idle(name, why, f"{key}={args.values[name]}")
    if args.enable_conv is False and args.conv_dim:
        problems.add(f"enable_conv=False contradicts conv_dim={args.conv_dim}: leave one of the two out")
    if "conv_alpha" in spelled and args.values["conv_alpha"] not in (0.0, 1.0) and not args.conv_dim:
        problems.idle("conv_alpha", " without conv_dim: give both, or neither")
