"""The words of command lines that are written for a shell: bash, PowerShell or cmd.exe.

What decides about words is understood: quotes, escapes, lines that go on, comments, redirections, and variables that
the text itself sets or the environment has. Nothing is run; what another program would have to compute stays as it is
written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

_TARGET = r"\s*(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s;&|\"']+)?"  # where the output goes
_SINGLE, _DOUBLE = "'‘’‚‛", '"“”„'  # PowerShell takes all of them


@dataclass(frozen=True)
class Shell:
    """How a shell divides a text into words.

    Attributes:
        name: for people.
        sign: at the end of a line that goes on.
        goes_on: that with the end of the line, regular expression.
        comment: from its sign to the end of the line, where a word may begin.
        literal: a quotation in which nothing has a meaning; group 1 is what it says.
        quoted: a quotation with escapes and variables.
        escapes: (regular expression, what it stands for) inside `quoted`.
        escaped: a character that loses its meaning, outside quotations.
        variable: its groups hold the name.
        quotes: characters that open a quotation.
        ends: characters that end a command.
    """

    name: str
    sign: str
    goes_on: str
    comment: str
    literal: str
    quoted: str
    escapes: tuple[tuple[str, str], ...]
    escaped: str
    variable: str
    quotes: str
    ends: str = r"\n;&|"

    @property
    def tokens(self) -> re.Pattern[str]:
        kinds = {
            "goes_on": self.goes_on,
            "comment": self.comment,
            "redirected": rf"(?:(?<=\s)\d|&)?(?:>>|>|<)&?{_TARGET}",
            "end": f"[{self.ends}]+",
            "blank": r"[ \t\r\f]+",
            "literal": self.literal,
            "quoted": self.quoted,
            "variable": self.variable,
            "escaped": self.escaped,
            "plain": rf"[\w./:=,@+-]+|[^\n{self.quotes}]",
        }
        return re.compile("|".join(f"(?P<{kind}>{regex})" for kind, regex in kinds.items()), re.DOTALL)


BASH = Shell(
    "bash",
    "\\",
    goes_on=r"\\\r?\n",
    comment=r"(?:(?<=\s)|(?<=\A))#[^\n]*",
    literal=r"'[^']*'",
    quoted=r'"(?:[^"\\]|\\.)*"',
    escapes=((r"\\\n", ""), (r'\\([$`"\\])', r"\1")),
    escaped=r"\\.",
    variable=r"\$\{\w+\}|\$\w+",
    quotes="\"'",
)
POWERSHELL = Shell(
    "PowerShell",
    "`",
    goes_on=r"`\r?\n",
    comment=r"<#.*?#>|(?:(?<=\s)|(?<=\A))#[^\n]*",
    literal=f"[{_SINGLE}](?:[^{_SINGLE}]|[{_SINGLE}]{{2}})*[{_SINGLE}]",
    quoted=f"[{_DOUBLE}](?:[^{_DOUBLE}`]|`.|[{_DOUBLE}]{{2}})*[{_DOUBLE}]",
    escapes=((f"[{_DOUBLE}]([{_DOUBLE}])", r"\1"), (r"`(.)", r"\1")),
    escaped=r"`.",
    variable=r"\$\{(?:env:)?\w+\}|\$(?:env:)?\w+",
    quotes=_SINGLE + _DOUBLE,
)
CMD = Shell(
    "cmd.exe",
    "^",
    goes_on=r"\^\r?\n",
    comment=r"(?:(?<=\n)|(?<=\A))[ \t@]*(?:(?i:rem)\b|::)[^\n]*",
    literal=r"(?!)",
    quoted=r'"(?:\\"|[^"\n])*(?:"|(?=\n)|\Z)',
    escapes=((r'\\"', '"'),),
    escaped=r"\^.|\\\"",
    variable=r"%\w+%",
    quotes='"',
    ends=r"\n&|",
)
_NAME = re.compile(r"\w+")


@dataclass
class Command:
    """One command of a text.

    Attributes:
        line: number of the line on which it begins, from 1.
        words: it and its arguments.
    """

    line: int
    words: list[str] = field(default_factory=list)


def shell_of(text: str, file_name: str = "", windows: bool = False) -> Shell:
    """The shell for which a text is written, by the name of its file, by how its lines go on, or by its paths.

    Args:
        windows: whether bash is unlikely where nothing tells.
    """
    suffix = PurePath(file_name).suffix.lower()
    by_suffix = {".ps1": POWERSHELL, ".bat": CMD, ".cmd": CMD, ".sh": BASH, ".bash": BASH}
    if suffix in by_suffix:
        return by_suffix[suffix]
    marks = ((r"\\\r?\n", BASH), (r"`\r?\n|\$env:", POWERSHELL), (r"\^\r?\n|%\w+%", CMD))
    found = next((shell for regex, shell in marks if re.search(regex, text)), None)
    if found is None and (windows or re.search(r"(?<![\w\"'])(?:[A-Za-z]:|\.{1,2})\\\w", text)):
        found = POWERSHELL if "'" in text else CMD
    return found or BASH


def commands(text: str, shell: Shell, environment: Mapping[str, str]) -> Iterator[Command]:
    """The commands of a text, in their order.

    Args:
        environment: variables that are set before.

    Raises:
        ValueError: a quotation is never closed.
    """
    scan = _Scan(shell, dict(environment))
    position, tokens = 0, shell.tokens
    while position < len(text):
        token = tokens.match(text, position)
        if token is None:
            raise ValueError(f"line {scan.line}: the quotation that begins with {text[position]} is never closed")
        assert token.lastgroup is not None
        yield from getattr(scan, token.lastgroup)(token.group())
        scan.line += token.group().count("\n")
        position = token.end()
    yield from scan.end("")


class _Scan:
    """What has been read of a text; a method for each kind of token, which yields commands that are complete."""

    def __init__(self, shell: Shell, known: dict[str, str]) -> None:
        self.shell, self.known, self.line = shell, known, 1
        self.command = Command(1)
        self.pieces: list[str] | None = None  # of the word that is being read, which may be empty; None = there is none

    def _add(self, text: str) -> tuple[Command, ...]:
        if not self.command.words and self.pieces is None:
            self.command.line = self.line
        self.pieces = [] if self.pieces is None else self.pieces
        self.pieces.append(text)
        return ()

    def goes_on(self, text: str) -> tuple[Command, ...]:
        return ()

    comment = redirected = goes_on

    def blank(self, text: str) -> tuple[Command, ...]:
        if self.pieces is not None:
            self.command.words.append("".join(self.pieces))
        self.pieces = None
        return ()

    def end(self, text: str) -> tuple[Command, ...]:
        self.blank(text)
        complete, self.command = self.command, Command(self.line)
        self.known |= _assigned(complete.words)
        return (complete,) if complete.words else ()

    def literal(self, text: str) -> tuple[Command, ...]:
        inner = text[1:-1]
        return self._add(re.sub(f"[{_SINGLE}]([{_SINGLE}])", r"\1", inner) if self.shell is POWERSHELL else inner)

    def quoted(self, text: str) -> tuple[Command, ...]:
        inner = text[1:-1] if len(text) > 1 and text[-1] in self.shell.quotes else text[1:]
        escapes = [f"(?:{regex})" for regex, _ in self.shell.escapes]
        return self._add(re.sub("|".join([*escapes, self.shell.variable]), self._meaning, inner, flags=re.DOTALL))

    def _meaning(self, found: re.Match[str]) -> str:
        """Of an escape or a variable inside a quotation."""
        for regex, meaning in self.shell.escapes:
            escape = re.fullmatch(regex, found[0], re.DOTALL)
            if escape:
                return escape.expand(meaning)
        return self._value(found[0])

    def variable(self, text: str) -> tuple[Command, ...]:
        first, *others = re.split(r"[ \t\n]+", self._value(text)) if self.shell is BASH else [self._value(text)]
        self._add(first)
        for word in others:
            self.blank("")
            self._add(word)
        return ()

    def _value(self, text: str) -> str:
        name = _NAME.findall(text.replace("env:", ""))[0]
        return self.known.get(name, text)

    def escaped(self, text: str) -> tuple[Command, ...]:
        return self._add(text[1:])

    def plain(self, text: str) -> tuple[Command, ...]:
        return self._add(text)


def _assigned(words: list[str]) -> dict[str, str]:
    """What a command that does nothing but set variables sets."""
    text = " ".join(words)
    single = re.fullmatch(r"(?:set\s+|\$(?:env:)?)(\w+)\s*=\s*(.*)", text, re.IGNORECASE | re.DOTALL)
    if single:
        return {single[1]: single[2]}
    own = words[1:] if words[:1] == ["export"] else words
    pairs = [re.fullmatch(r"(\w+)=(.*)", word, re.DOTALL) for word in own]
    return {pair[1]: pair[2] for pair in pairs if pair} if all(pairs) else {}
