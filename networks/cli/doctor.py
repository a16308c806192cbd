"""Whether a trainer will find these network modules, and what to write for it. Run it in the trainer's folder.

    kohya-networks doctor
    python PATH_OF_THE_CHECKOUT/scripts/doctor.py PATH_OF_THE_TRAINER

It says whose `networks` a script there imports and why, which copy of ours that is, the --network_module to write, the
trainer's version, what torch can compute on, and what is missing. It asks a process that is started as a script of the
trainer would be, with the python that runs it: use the one of the trainer's environment. Exit status 1: a problem.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._version import __version__
from ..hosts.checkouts import Checkout, Layout, find_checkout
from .command_line import program, run_program
from .environment import (
    LIBRARIES,
    NOTE,
    OK,
    PROBLEM,
    Finding,
    library_findings,
    numbers,
    pip,
    python_findings,
    quoted,
    same,
    torch_finding,
)  # fmt: skip

HOME = Path(__file__).resolve().parents[1]  # the folder `networks` that this is part of
PROBE = HOME / "hosts" / "probe.py"
ENTRIES = sorted(file.stem for file in HOME.glob("*.py") if not file.stem.startswith("_") and file.stem != "api")
GUI = 'for its LyCORIS types the GUI writes lycoris.kohya; for ours, write into its "Additional parameters"'
TIMEOUT = 120  # seconds, of which torch may take most where a disk is slow


def build_parser() -> argparse.ArgumentParser:
    parser = program(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=Path(), help="default: this one")
    parser.add_argument("--json", action="store_true", help="machine-readable, with all that the findings rest on")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(doctor, build_parser(), sys.argv[1:] if argv is None else list(argv))


def doctor(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise ValueError(f"there is no folder {args.folder}: give the trainer's, or change into it")
    folder = args.folder.resolve()
    checkout = find_checkout(folder)
    facts = gather(checkout, folder)
    findings = list(dict.fromkeys(examine(checkout, folder, facts)))  # what holds for several layouts is said once
    count = Counter(finding.mark for finding in findings)
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "facts": facts}, indent=1))
    else:
        width = max(60, min(shutil.get_terminal_size().columns, 120))
        print("\n".join(finding.written(width) for finding in findings))
        print(f"problems: {count[PROBLEM]}, notes: {count[NOTE]}")
    return int(count[PROBLEM] > 0)


# -- what there is


def layouts_of(checkout: Checkout | None, folder: Path) -> tuple[Layout, ...]:
    """How scripts are started there; any folder can hold one."""
    return checkout.layouts if checkout else (Layout(folder, folder, "lokr"),)


def gather(checkout: Checkout | None, folder: Path) -> dict[str, Any]:
    """What a script finds in each layout, by its folder, and what torch says."""
    layouts = layouts_of(checkout, folder)
    names = [f"{package}.{entry}" for package in ("networks", "kohya_networks") for entry in ENTRIES]
    libraries = list(LIBRARIES)
    if checkout:
        names += [checkout.package] if checkout.package else []
        libraries += checkout.needs
    found = {
        str(each.folder): _ask(each.folder, str(each.late), ",".join(libraries), *names) for each in layouts
    }  # fmt: skip
    return {"layouts": found, "torch": _ask(layouts[0].folder, "torch")}


def _ask(folder: Path, *arguments: str) -> dict[str, Any]:
    """The probe's answer for a script in a folder; `error` if there is none."""
    command = [sys.executable, str(PROBE), str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TIMEOUT} s"}
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]}
    return answer


# -- what it means


def examine(checkout: Checkout | None, folder: Path, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """The findings, in the order in which a user needs them."""
    yield _trainer(checkout, folder)
    script = HOME.parent / "scripts" / "doctor.py"
    again = quoted(script) if script.is_file() else "-m kohya_networks.cli doctor"
    yield from python_findings(checkout.root if checkout else folder, f"{again} {quoted(folder)}")
    yield Finding(OK, "ours", f"kohya-networks {__version__} in {HOME.parent} says this")
    for layout in layouts_of(checkout, folder):
        found = facts["layouts"][str(layout.folder)]
        if "error" in found:
            yield Finding(PROBLEM, "networks", f"python does not start for {layout.folder}: {found['error']}")
            return
        yield _whose(layout, found)
        yield from _copies(found)
    if checkout and (checkout.root.parent / "kohya_gui.py").is_file():
        yield Finding(NOTE, "gui", GUI, ("--network_module networks.lycoris",))
    yield torch_finding(facts["torch"], found)
    yield from library_findings(checkout, found)


def _trainer(checkout: Checkout | None, folder: Path) -> Finding:
    if checkout is None:
        return Finding(NOTE, "trainer", f"none in {folder}: give its folder; what follows is for a script in this one")
    known = ", ".join(text for text in (checkout.version, checkout.commit) if text) or "of no known version"
    return Finding(OK, "trainer", f"{checkout.name} ({known}) in {checkout.root}")


def _whose(layout: Layout, found: Mapping[str, Any]) -> Finding:
    """Whose `networks` the scripts of a folder import, why, and what to write."""
    modules = found["modules"]
    ours = [entry for entry in ENTRIES if _is_ours(modules[f"networks.{entry}"])]
    theirs = [entry for entry in ENTRIES if modules[f"networks.{entry}"] and entry not in ours]
    where, owner = f"scripts in {layout.folder}", _owner(layout, found)
    if len(ours) == len(ENTRIES):
        text = f"{where} import ours: {owner}; write"
        return Finding(OK, "networks", text, (f"--network_module networks.{layout.entry}",))
    also = _is_ours(modules[f"kohya_networks.{layout.entry}"])
    ways = (*([f"--network_module kohya_networks.{layout.entry}"] if also else []), launcher())
    install = f"{pip(found)} {quoted(HOME.parent)}"
    if ours:
        text = (
            f"{where} import the trainer's {', '.join(theirs)} and ours of the other names, since a bare pip install "
            "-e comes behind the trainer's folder; install without -e, or write, or start with"
        )
        return Finding(PROBLEM, "networks", text, (install, *ways))
    if also:
        return Finding(NOTE, "networks", f"{where} do not import ours: {owner}; write, or start with", ways)
    text = f"{where} find no module of ours: {owner}; install it, or start with"
    return Finding(PROBLEM, "networks", text, (install, *ways))


def _owner(layout: Layout, found: Mapping[str, Any]) -> str:
    """Which folder `networks` it is, and how it came on the path."""
    package = found["package"]
    if package is None:
        first = next((file for file in found["modules"].values() if file), None)
        return f"{Path(first).parent}, the only one on the path" if first else "no folder networks is on the path"
    if Path(package).name != "__init__.py":
        return f"{package}, which hides every folder networks ({_source(Path(package).parent, layout, found)})"
    folder = Path(package).parent
    return f"{folder}, the first on the path with an __init__.py ({_source(folder.parent, layout, found)})"


def _source(entry: Path, layout: Layout, found: Mapping[str, Any]) -> str:
    """Why a folder is on sys.path."""
    if same(entry, layout.folder):
        return "a script's own folder comes first"
    if any(same(entry, each) for each in found["pythonpath"]):
        return "by PYTHONPATH"
    if any(same(entry, each) for each in found["site"]):
        return "installed"
    if same(entry, layout.late):
        return "the trainer puts it last"
    file = next((name for each, name in found["pth"].items() if same(entry, each)), None)
    return f"by {file}" if file else "by sys.path"


def _copies(found: Mapping[str, Any]) -> Iterator[Finding]:
    """Copies of ours on the path other than the one that asks; the used one, if any, comes first."""
    used = next((Path(file).parent for file in found["modules"].values() if _is_ours(file)), None)
    others = [Path(entry) / "networks" for entry in found["path"]]
    seen = [HOME]
    for folder in [*([used] if used else []), *others]:
        if _is_ours(str(folder / "__init__.py")) and not any(same(folder, each) for each in seen):
            seen.append(folder)
            yield _copy(folder, folder == used)


def _copy(folder: Path, is_used: bool) -> Finding:
    found = re.search(r'^__version__ = "(.+)"', (folder / "_version.py").read_text(encoding="utf-8"), re.M)
    version = found[1] if found else "0"
    state = "used" if is_used else "not used"
    if version == __version__:
        return Finding(NOTE, "ours", f"a copy of the same version in {folder.parent} is {state}")
    relation = "older" if numbers(version) < numbers(__version__) else "newer"
    text = f"a copy of the {relation} version {version} in {folder.parent} is {state}: remove one of the two"
    return Finding(PROBLEM if is_used else NOTE, "ours", text)


def launcher() -> str:
    """How to start a script so that ours come first, in any layout."""
    script = HOME.parent / "scripts" / "launch.py"
    return f"accelerate launch {quoted(script) if script.is_file() else '-m kohya_networks.cli launch'} SCRIPT ..."


def _is_ours(module: str | None) -> bool:
    """Whether a file is a module of a copy of ours: its folder holds what no other `networks` has."""
    folder = Path(module or os.devnull).parent
    return (folder / "_version.py").is_file() and (folder / "hosts" / "beside.py").is_file()
