"""What --help prints fits the terminal, and holds no escape codes."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest

from networks.cli.commands import COMMANDS
from networks.cli.terminal import fitted

if sys.platform != "win32":
    import fcntl
    import termios


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


def on_a_terminal(*words: str, columns: int = 80) -> list[str]:
    """The lines that a command prints on a terminal of so many columns."""
    import pty  # systems without it have none of these tests

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    call = [sys.executable, "-m", "networks.cli", *words]
    process = subprocess.Popen(call, stdin=theirs, stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    found = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # what Linux says at the end
            break
        if not part:
            break
        found += part
    os.close(ours)
    assert process.wait() in (0, 2)
    text = found.decode()
    assert "\x1b" not in text
    return [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty on Windows")
@pytest.mark.parametrize("words", [
    ("plan", "sdxl", "--network_module", "networks.lokr", "--network_args", "factor=8", "dropout=0.1"),
    ("plan", "sdxl", "--network_module", "networks.lora", "--why", "attn1.to_k"),
    ("args", "lokr"),
    ("show", "a file that is not there and has a name as long as people give them.safetensors"),
])  # fmt: skip
def test_output_fits_a_terminal_of_80_columns(words: tuple[str, ...]) -> None:
    lines = on_a_terminal(*words)
    assert len("".join(lines)) > 80
    assert [line for line in lines if len(line) > 80] == []


def test_a_plan_that_is_piped_has_a_line_for_each_layer() -> None:
    call = [sys.executable, "-m", "networks.cli", "plan", "sdxl", "--network_module", "networks.lora"]
    done = subprocess.run(call, capture_output=True, encoding="utf-8", env={**os.environ, "COLUMNS": "80"}, timeout=120)
    lines = done.stdout.splitlines()
    assert lines[1].split()[:3] == ["layer", "saved", "name"]
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_k" in done.stdout
    assert "\x1b" not in done.stdout
