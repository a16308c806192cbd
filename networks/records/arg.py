"""The record of one network argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NUMBERS = ("int", "float")
LISTS = ("patterns", "regex_int", "regex_float", "ints", "floats", "rates", "files")
NOTHING = "nothing"
VALUES = "nothing but the values"
FACTORS = "form of the factors"  # the group of arguments that choose the form of an algorithm


@dataclass(frozen=True)
class Arg:
    """One network argument.

    Attributes:
        kind: name of its coercer in args.coerce.KINDS.
        default: the value when it is not given; also its neutral value unless `neutral` says more.
        help: one sentence for people; the generated documentation prints it.
        group: heading in the documentation.
        aliases: other spellings, of the trainers and of LyCORIS.
        algos: algorithms on which it has an effect, filled in by the table from their records; None = all.
        neutral: further values that ask for nothing, accepted where the argument cannot apply.
        minimum, below: bounds of a number: minimum <= value < below.
        choices: of an enumeration.
        words: (other spelling, choice).
        per_host: (host, default there) where hosts differ; the name of a trainer's option stands for its value. The
            entry `lycoris` and a call with a `preset` that trains convolutions count as hosts, too.
        unasked: (entry, value which the command lines for it have without asking for it): as if it were not given.
        joined: entries under which it is enough that one of several spellings in a call asks for something.
        elsewhere: (entry, value which the module that it stands for takes whatever a command line says).
        file: what it changes in the saved file, a clause; "" = what its group does (table.FILES). It begins with
            `NOTHING` where names, shapes and alphas are the same.
        example: what the documentation writes: it and what it needs beside; () = the other value of a switch.
    """

    name: str
    kind: str
    default: Any
    help: str
    group: str
    aliases: tuple[str, ...] = ()
    algos: tuple[str, ...] | None = None
    neutral: tuple[Any, ...] = ()
    minimum: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    words: tuple[tuple[str, str], ...] = ()
    per_host: tuple[tuple[str, Any], ...] = ()
    unasked: tuple[tuple[str, Any], ...] = ()
    joined: tuple[str, ...] = ()
    elsewhere: tuple[tuple[str, Any], ...] = ()
    file: str = ""
    example: tuple[str, ...] = ()

    @property
    def written(self) -> tuple[str, ...]:
        """Its example, as it stands among the network arguments."""
        return self.example or (f"{self.name}={not self.default}",)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def default_at(self, hosts: Iterable[str], options: Mapping[str, Any]) -> Any:
        """The default under the first of these hosts that has its own, with the values of the trainer's options."""
        own = dict(self.per_host)
        value = next((own[host] for host in hosts if host in own), self.default)
        return options.get(value, self.default) if isinstance(value, str) and self.kind in NUMBERS else value

    def acts(self, value: Any, algos: Iterable[str]) -> bool:
        """Whether the value asks for nothing, or for something that one of these algorithms has."""
        return self.algos is None or self.is_neutral(value) or not set(algos).isdisjoint(self.algos)

    def is_neutral(self, value: Any) -> bool:
        return value == self.default or value in self.neutral or (self.kind in LISTS and not value)
