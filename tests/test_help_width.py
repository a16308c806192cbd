"""What --help prints fits the terminal, and holds no escape codes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from networks.cli.commands import COMMANDS
from networks.cli.terminal import fitted


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(command: str) -> None:
    call = [sys.executable, "-m", "networks.cli", *([command] if command else []), "--help"]
    done = subprocess.run(call, capture_output=True, encoding="utf-8", env={**os.environ, "COLUMNS": "80"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert "\x1b" not in done.stdout


def test_fitted_keeps_commands_and_words() -> None:
    command = "    tool FILE --first one --second two --third three   # why"
    text = f"Words that are\nwritten in lines which are wider than they may be here.\n\n{command}\n    short  --x   y\n"
    lines = fitted(text, 40).splitlines()
    assert max(map(len, lines)) <= 40
    assert " ".join(" ".join(lines).replace("\\", "").split()) == " ".join(text.split())
    assert lines[-1] == "    short  --x   y"
    assert "    tool FILE --first one --second two \\" in lines
    assert lines[lines.index("    tool FILE --first one --second two \\") + 2] == "        # why"
    assert fitted(text, 200) == text.rstrip("\n")
