"""Command lines are divided into words as their shells do it."""

from __future__ import annotations

import random
import shlex

import pytest

from networks.cli.shell_text import BASH, CMD, POWERSHELL, Shell, commands, shell_of


def words(text: str, shell: Shell, **environment: str) -> list[list[str]]:
    return [command.words for command in commands(text, shell, environment)]


# the text; its commands, their words between |
ROWS: list[tuple[Shell, str, list[str]]] = [
    (BASH, "a 'b  c' \"d 'e'\" f\\ g ''", ["a|b  c|d 'e'|f g|"]),
    (BASH, "a \\\n  --b=1\\\n2", ["a|--b=12"]),
    (BASH, "a # b 'c\nd#e --f '#g'", ["a", "d#e|--f|#g"]),
    (BASH, 'x=1 y="2 3"\na $x "$y" $y \'$x\' "\\$x" ${x}4 $z', ["x=1|y=2 3", "a|1|2 3|2|3|$x|$x|14|$z"]),
    (BASH, "export x=1; cd /a && a --b $x | tee -a log", ["export|x=1", "cd|/a", "a|--b|1", "tee|-a|log"]),
    (BASH, "a --b 8 > 'log file' 2>&1 &\nc", ["a|--b|8", "c"]),
    (BASH, "A=$HOME/x b", ["A=/home/me/x|b"]),
    (POWERSHELL, '& a `\n  --b="c`"d" "e""f" \'g\'\'h\' C:\\i\\j', ['a|--b=c"d|e"f|g\'h|C:\\i\\j']),
    (POWERSHELL, '$x = "1 2"\n$env:Y="z"\na $x "$x $env:Y" \'$x\' # $x', ["$x|=|1 2", "$env:Y=z", "a|1 2|1 2 z|$x"]),
    (POWERSHELL, "a “b c” ‘d’; <# e\n f #> g", ["a|b c|d", "g"]),
    (
        CMD,
        'rem "\n@echo off\nset X=1 2\ncall a ^\n --b "%X%" "c\\"d" \'e f\' g^&h %NO%',
        ["@echo|off", "set|X=1|2", "call|a|--b|1 2|c\"d|'e|f'|g&h|%NO%"],
    ),
    (CMD, 'a "C:\\x y\\z" > log.txt && b', ["a|C:\\x y\\z", "b"]),
]


def test_words() -> None:
    for shell, text, wanted in ROWS:
        found = words(text, shell, HOME="/home/me")
        assert found == [one.split("|") for one in wanted], (shell.name, text)


def test_bash_is_divided_as_by_shlex() -> None:
    """3,000 random lines of what has a meaning, without the sign of comments."""
    draw, compared = random.Random(0), 0
    for _ in range(3000):
        text = "".join(draw.choice("ab \t\"'\\={}[].*") for _ in range(draw.randint(1, 16)))
        try:
            wanted = shlex.split(text)
        except ValueError as error:
            if "quotation" in str(error):
                with pytest.raises(ValueError, match="never closed"):
                    words(text, BASH)
            continue
        compared += 1
        assert words(text, BASH) == ([wanted] if wanted else []), repr(text)
    assert compared > 1000


def test_lines_are_counted_and_open_quotations_told() -> None:
    found = list(commands("# x\n\na \\\n b\n\nc", BASH, {}))
    assert [(command.line, command.words) for command in found] == [(3, ["a", "b"]), (6, ["c"])]
    for shell, text in ((BASH, "a\nb 'c"), (POWERSHELL, 'a\n"b`"'), (BASH, 'a\n"')):
        with pytest.raises(ValueError, match="line 2: the quotation that begins with .* is never closed"):
            words(text, shell)


def test_the_shell_is_known_by_file_lines_and_paths() -> None:
    rows = [
        ("a.ps1", "a", POWERSHELL), ("a.BAT", "a", CMD), ("a.sh", "a `\n", BASH), ("", "a \\\n b", BASH),
        ("", "a `\n b", POWERSHELL), ("", "a ^\r\n b", CMD), ("", "a --b C:\\m\\x.safetensors", CMD),
        ("", "a --b C:\\m\\x 'c'", POWERSHELL), ("", "a --b /m/x 'c'", BASH), ("", "a $env:X", POWERSHELL),
        ("", "a %X%", CMD), ("", "a '.*\\.to_q'", BASH),
    ]  # fmt: skip
    for name, text, wanted in rows:
        assert shell_of(text, name) is wanted, (name, text)
    assert shell_of("a b", windows=True) is CMD
