"""Findings about the environment that trains: its python, torch and libraries; and what a finding is."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hosts.checkouts import Checkout

OK, NOTE, PROBLEM = "ok", "note", "problem"
TORCH = (2, 5)  # the least that setup.cfg asks for
PYTHON = (3, 10)
OF_THE_TRAINERS = ("accelerate", "diffusers", "transformers")  # which every script of theirs imports
FOR_WHAT = {
    "bitsandbytes": "8-bit optimizers such as AdamW8bit, base models in its 8 and 4 bits",
    "torchao": "base models that it has quantised",
    "lycoris-lora": "nothing here: networks.lycoris does without it",
}
WINDOWS = os.name == "nt"
LIBRARIES = ("torch", "safetensors", *OF_THE_TRAINERS, *FOR_WHAT)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        mark: OK, NOTE or PROBLEM.
        about: what it is about, one word.
        text: what was found.
        lines: what to write or to run for it.
    """

    mark: str
    about: str
    text: str
    lines: tuple[str, ...] = ()

    def written(self, width: int) -> str:
        """For people; what is to be copied stands on lines of its own."""
        start = f"{self.mark:8} {self.about:9} "
        text = textwrap.wrap(self.text, width - len(start), break_long_words=False, break_on_hyphens=False)
        return "\n".join([start + text[0], *(" " * len(start) + line for line in (*text[1:], *self.lines))])


def python_findings(root: Path, again: str) -> Iterator[Finding]:
    """The python that asks, and whether it is the one that trains.

    Args:
        root: the trainer's folder.
        again: what asks once more, behind the name of another python.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= PYTHON
    advice = "" if enough else f"; these modules need {PYTHON[0]}.{PYTHON[1]} or newer"
    yield Finding(OK if enough else PROBLEM, "python", f"{version} in {sys.prefix}{advice}")
    for home in (each / name for each in (root, root.parent) for name in ("venv", ".venv")):
        pythons = (home / "Scripts" / "python.exe", home / "bin" / "python")
        python = next((file for file in pythons if file.exists()), None)
        if python and not same(home, sys.prefix):
            text = f"the trainer has an environment of its own, {home}: if it trains in that one, ask there"
            yield Finding(NOTE, "python", text, (f"{runnable(python)} {again}",))
    starter = shutil.which("accelerate")
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    own = (sysconfig.get_path("scripts"), Path(sys.executable).parent, user)
    if starter and not any(same(Path(starter).parent, each) for each in own):
        text = f"the command accelerate here is another environment's, {starter}; this one's is"
        yield Finding(NOTE, "python", text, (f"{runnable(sys.executable)} -m accelerate.commands.launch SCRIPT ...",))


def torch_finding(torch: Mapping[str, Any], found: Mapping[str, Any]) -> Finding:
    """Whether torch is there, starts, is new enough, and what it can compute on.

    Args:
        torch: the probe's answer about it.
        found: its answer about the path.
    """
    if "torch" not in found["libraries"]:
        text = "not installed; pytorch.org has the line for your GPU, for a CPU it is"
        return Finding(PROBLEM, "torch", text, (f"{pip(found)} torch",))
    if "error" in torch:
        return Finding(PROBLEM, "torch", f"{found['libraries']['torch']} does not start: {torch['error']}")
    if numbers(torch["version"])[:2] < TORCH:
        return Finding(PROBLEM, "torch", f"{torch['version']} is too old", (f'{pip(found)} "torch>={_dotted(TORCH)}"',))
    devices = "; ".join(torch["devices"])
    build = torch["build"] or ("" if devices else "built for the CPU alone")
    text = ", ".join(part for part in (torch["version"], build, devices or "no GPU that it can use") if part)
    return Finding(OK if devices else NOTE, "torch", text)


def library_findings(checkout: Checkout | None, found: Mapping[str, Any]) -> Iterator[Finding]:
    """What is there, and what is missing for what."""
    versions = found["libraries"]
    have = [f"{name} {versions[name]}" for name in LIBRARIES[1:] if name in versions]
    yield Finding(OK, "libraries", ", ".join(have) or "none of those that are looked for")
    if "safetensors" not in versions:
        yield Finding(PROBLEM, "libraries", "safetensors is missing, for every file", (f"{pip(found)} safetensors",))
    if checkout is not None:
        yield from _requirements(checkout, found)


def _requirements(checkout: Checkout, found: Mapping[str, Any]) -> Iterator[Finding]:
    """What the trainer asks for, against what is there."""
    versions, setup = found["libraries"], checkout.setup.name
    install = (f"cd {quoted(checkout.root)}", f"{pip(found)} {f'-r {setup}' if setup.endswith('.txt') else '-e .'}")
    yield from _package(checkout, found, install)
    lacking = {
        name: name in OF_THE_TRAINERS
        for name in checkout.needs
        if not any(f"{each}-".startswith(f"{name}-") for each in versions)  # opencv-python-headless is one
    }
    vital = ", ".join(name for name, is_vital in lacking.items() if is_vital)
    if vital:
        yield Finding(PROBLEM, "libraries", f"missing for every script of the trainer: {vital}", install)
    lesser = [_with_use(name) for name, is_vital in lacking.items() if not is_vital and name not in LIBRARIES[:2]]
    if lesser:
        lines = () if vital else install
        yield Finding(NOTE, "libraries", f"missing of what {setup} lists: {', '.join(lesser)}", lines)
    yield from _pins(checkout, versions)


def _package(checkout: Checkout, found: Mapping[str, Any], install: tuple[str, ...]) -> Iterator[Finding]:
    """Whether the package which the trainer's scripts import by its name is there, and is this checkout's.

    Args:
        checkout: the trainer.
        found: the probe's answer about the path.
        install: what to run where it is not.
    """
    origin = found["modules"].get(checkout.package)
    if checkout.package and origin is None:
        text = f"{checkout.package} is not installed, and the trainer's scripts import it"
        yield Finding(PROBLEM, "libraries", text, install)
    elif checkout.package and checkout.root not in Path(origin).resolve().parents:
        text = f"the trainer's scripts import {checkout.package} of another folder, {Path(origin).parent}"
        yield Finding(PROBLEM, "libraries", text, install)


def _pins(checkout: Checkout, versions: Mapping[str, str]) -> Iterator[Finding]:
    others = [
        f"{name} {versions[name]} ({pin})" for name, pin in checkout.needs.items() if _differs(name, pin, versions)
    ]
    if others:
        text = f"other versions than {checkout.setup.name} pins, in brackets: {', '.join(others)}"
        yield Finding(NOTE, "libraries", text)


def _with_use(name: str) -> str:
    return f"{name} ({FOR_WHAT[name]})" if name in FOR_WHAT else name


def _differs(name: str, pin: str, versions: Mapping[str, str]) -> bool:
    """Whether an installed library is not of the pinned version; builds of the same one (`2.5.1+cu124`) are."""
    return bool(pin) and versions.get(name, pin).partition("+")[0] != pin.partition("+")[0]


def pip(found: Mapping[str, Any]) -> str:
    """What installs into the environment that asks."""
    if found["pip"]:
        return f"{runnable(sys.executable)} -m pip install"
    return f"uv pip install --python {quoted(sys.executable)}"


def quoted(path: Path | str) -> str:
    """As every shell takes it."""
    return f'"{path}"' if " " in str(path) else str(path)


def runnable(program: Path | str) -> str:
    """A program at the beginning of a line: PowerShell takes a quoted one for a text unless it is told to run it."""
    return f"{'& ' * (WINDOWS and ' ' in str(program))}{quoted(program)}"


def same(one: Path | str, other: Path | str) -> bool:
    """Whether two names are of one file or folder that exists."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def numbers(version: str) -> tuple[int, ...]:
    """The version as numbers, without what stands behind `+`."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
