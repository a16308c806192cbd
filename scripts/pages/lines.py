"""Command lines of the trainers with a network, in three spellings, for the pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from networks.archs import ARCHS
from networks.archs.spec import ArchSpec
from networks.args.shells import CommandLine
from networks.hosts.trainer_scripts import MUSUBI, SCRIPTS, Script

# Scripts that train otherwise than by pictures with captions, and those whose record names no release.
_SPECIAL = ("train_leco.py", "sdxl_train_leco.py", "flux_2_train_network_self_flow.py")
_WITHOUT_RELEASE = {"hidream_o1_train_network.py": "hidream_o1"}
_LAUNCHER = "PATH_OF_THIS_CHECKOUT/scripts/launch.py"
TITLES = {"sd-scripts": "sd-scripts", MUSUBI: "musubi-tuner"}


@dataclass(frozen=True)
class Trained:
    """How a trainer trains an architecture.

    Attributes:
        name: of the script.
        script: what is known of it.
        choice: the options that say which model it is; "" = it is the script's usual one.
    """

    name: str
    script: Script
    choice: str = ""

    @property
    def start(self) -> str:
        """The beginning of a command line, up to the network's options."""
        path = f"src/musubi_tuner/{self.name}" if self.script.host == MUSUBI else self.name
        launcher = f"{_LAUNCHER} " if self.script.alone else ""
        return " ".join(["accelerate launch", f"{launcher}{path}", *([self.choice] if self.choice else []), "..."])

    def module(self, name: str) -> str:
        """--network_module for one of our modules, `lora_wan`: under a name that the script's own folder has not."""
        if self.script.alone:
            return self.script.module
        return f"{'kohya_networks' if self.script.host == MUSUBI else 'networks'}.{name}"


def trained_by(arch: ArchSpec) -> list[Trained]:
    """The trainers' scripts for an architecture, the first of them the usual one."""
    return [
        Trained(name, script, choice)
        for name, script in SCRIPTS.items()
        if name not in _SPECIAL and (choice := _choice(name, script, arch)) is not None
    ]


def _choice(name: str, script: Script, arch: ArchSpec) -> str | None:
    """The options that make a script train an architecture; None = it does not."""
    if name in _WITHOUT_RELEASE:
        return "" if _WITHOUT_RELEASE[name] == arch.name else None
    own = {release.name for release in arch.releases}
    for option, values in script.choices.items():
        for value, release in values.items():
            if release in own and (option == script.needs or script.release not in own):
                return f"--{option} {value}".strip()
    return "" if script.release in own else None


def any_model() -> ArchSpec:
    """The model of examples that fit all."""
    return next(arch for arch in ARCHS if arch.name == "sdxl")


@dataclass(frozen=True)
class Example:
    """A command line with a network.

    Attributes:
        start: what stands before the network's options.
        script: the name of the script, for its --config_file.
        line: the network's options.
    """

    start: str
    script: str
    line: CommandLine

    def bash(self) -> str:
        return _fenced("bash", _two_lines(self.start, self.line.bash(), " \\"))

    def powershell(self) -> str:
        return _fenced("powershell", _two_lines(self.start, self.line.powershell(), " `"))

    def toml(self) -> str:
        start = f"# settings.toml, for: {self.start} --config_file settings.toml"
        return _fenced("toml", f"{start}\n{self.line.toml()}")


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```\n"


def _two_lines(start: str, options: str, sign: str) -> str:
    """A command line with the network's arguments on a line of their own.

    Args:
        start: its beginning.
        options: one a line.
        sign: with which a line ends that goes on.
    """
    *first, last = options.split(f"{sign}\n")
    lines = (
        [" ".join([start, *first]), last] if last.startswith("--network_args") else [" ".join([start, *first, last])]
    )
    return f"{sign}\n    ".join(lines)


def example(arch: ArchSpec, module: str, args: Mapping[str, str]) -> Example:
    """A line for an architecture, with the script that trains it.

    Args:
        arch: the architecture.
        module: one of ours, `lokr`.
        args: network arguments.
    """
    found = trained_by(arch)
    if not found:
        start, name, shown = "python scripts/train_network.py ...", "scripts/train_network.py", f"networks.{module}"
    else:
        start, name, shown = found[0].start, found[0].name, found[0].module(module)
    return Example(start, name, CommandLine(shown, 8, 4.0, args))
