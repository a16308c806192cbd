"""The options that make a network, in the shells' spellings and as a trainer's TOML file has them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_BARE = re.compile(r"[A-Za-z0-9_./:+=-]+")
# Between double quotes these mean something in bash or in PowerShell; all else is written alike for both.
_SPECIAL = re.compile(r'["$`\\!“”„]')
_SINGLE = re.compile("(['‘’‚‛])")  # PowerShell ends a single-quoted string at each of them


@dataclass(frozen=True)
class CommandLine:
    """What makes a network.

    Attributes:
        module: of --network_module.
        dim, alpha: --network_dim, --network_alpha.
        args: --network_args.
        only: the switch that leaves out the text encoders or the denoiser, without dashes; "" = none.
    """

    module: str
    dim: int
    alpha: float
    args: Mapping[str, str] = field(default_factory=dict)
    only: str = ""

    @property
    def network_args(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.args.items()]

    def bash(self) -> str:
        return " \\\n".join(self._options(_bash))

    def powershell(self) -> str:
        return " `\n".join(self._options(_powershell))

    def toml(self) -> str:
        lines = [
            f"network_module = {_toml(self.module)}",
            f"network_dim = {self.dim}",
            f"network_alpha = {self.alpha!r}",
        ]
        lines += [f"{self.only} = true"] if self.only else []
        lines += [f"network_args = [{', '.join(map(_toml, self.network_args))}]"] if self.args else []
        return "\n".join(lines)

    def _options(self, quoted: Callable[[str], str]) -> list[str]:
        """One option a line."""
        lines = [f"--network_module {quoted(self.module)}", f"--network_dim {self.dim}"]
        lines += [f"--network_alpha {self.alpha:.9g}"]
        lines += [f"--{self.only}"] if self.only else []
        lines += [" ".join(["--network_args", *map(quoted, self.network_args)])] if self.args else []
        return lines


def _bash(word: str) -> str:
    if _BARE.fullmatch(word):
        return word
    return shlex.quote(word) if _SPECIAL.search(word) else f'"{word}"'


def _powershell(word: str) -> str:
    if _BARE.fullmatch(word):
        return word
    if not _SPECIAL.search(word):
        return f'"{word}"'
    return "'{}'".format(_SINGLE.sub(r"\1\1", word))


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
