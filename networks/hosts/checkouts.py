"""A trainer's checkout as it lies on the disk: which one, which version, how its scripts start, what it asks for.

Files are read as text: nothing of the trainer is imported, and git is not called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SD_SCRIPTS = Path("library", "train_util.py")  # what a checkout of each trainer has
MUSUBI = Path("src", "musubi_tuner")
_REQUIREMENT = re.compile(
    r"""^\s*["']?([A-Za-z][\w.-]*)(?:\[[^]]*\])?\s*(?:==\s*([\w.+!-]+))?(?:[<>=!~,;\s].*)?["',]*$"""
)


@dataclass(frozen=True)
class Layout:
    """One folder from which a trainer's scripts are started.

    Attributes:
        folder: python puts it first on sys.path.
        late: what the trainer puts last there, before it imports the network module.
        entry: a network module of ours that its documents would name without the package.
    """

    folder: Path
    late: Path
    entry: str


@dataclass(frozen=True)
class Checkout:
    """A trainer.

    Attributes:
        name: of the trainer.
        root: of the checkout.
        layouts: the ways to start its scripts.
        version: that its setup files state; "" = none.
        commit: with branch and short hash, as .git has them; "" = no git checkout.
        package: which its scripts import by name, and which must be installed for that; "" = none.
        setup: the file of its requirements.
        needs: libraries that it lists, each with the version that it pins ("" = any).
    """

    name: str
    root: Path
    layouts: tuple[Layout, ...]
    version: str
    commit: str
    package: str
    setup: Path
    needs: Mapping[str, str]


def find_checkout(folder: Path) -> Checkout | None:
    """The trainer's checkout that holds a folder, or the only one among its sub-folders (a GUI has it there)."""
    folder = folder.resolve()
    for each in (folder, *folder.parents[:2]):
        found = _at(each, folder)
        if found is not None:
            return found
    below = [found for each in _folders(folder) if (found := _at(each, each)) is not None]
    return below[0] if len(below) == 1 else None


def _folders(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(each for each in folder.iterdir() if each.is_dir())
    except OSError:  # a folder that may not be read holds nothing for us
        return


def _at(root: Path, asked: Path) -> Checkout | None:
    """The checkout whose root this is.

    Args:
        root: the folder.
        asked: what the user named, in it: of several layouts, the one there is meant.
    """
    layouts: tuple[Layout, ...]
    if (root / SD_SCRIPTS).is_file():
        name, package, setup = "sd-scripts", "", root / "requirements.txt"
        layouts = (Layout(root, root, "lokr"),)
    elif (home := root / MUSUBI).is_dir():
        name, package, setup = "musubi-tuner", home.name, root / "pyproject.toml"
        inside = Layout(home, home, "lora_wan")
        layouts = (inside,) if asked == home else (Layout(root, home, "lora_wan"), inside)
    else:
        return None
    return Checkout(name, root, layouts, _version(root), _commit(root), package, setup, _requirements(setup))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(root: Path) -> str:
    """What `[project]` of pyproject.toml says."""
    project = re.search(r"^\[project\]$(.*?)(?=^\[|\Z)", _text(root / "pyproject.toml"), re.M | re.S)
    found = re.search(r"""^version\s*=\s*["']([^"']+)""", project[1], re.M) if project else None
    return found[1] if found else ""


def _commit(root: Path) -> str:
    """Branch and short hash of HEAD; `.git` may be a file that says where the folder is (a submodule, a work tree)."""
    git = root / ".git"
    pointer = re.match(r"gitdir:\s*(.+)", _text(git)) if git.is_file() else None
    git = root / pointer[1].strip() if pointer else git
    head = _text(git / "HEAD").strip()
    if not head.startswith("ref:"):
        return head[:9]
    ref = head.partition(":")[2].strip()
    common = git / (_text(git / "commondir").strip() or ".")
    hashes = [_text(each / ref).strip() for each in (git, common)]
    packed = re.search(rf"^([0-9a-f]+) {re.escape(ref)}$", _text(common / "packed-refs"), re.M)
    found = next((each for each in [*hashes, packed[1] if packed else ""] if each), "")
    return f"{ref.removeprefix('refs/heads/')} {found[:9]}".strip()


def _requirements(file: Path) -> dict[str, str]:
    """Libraries that requirements.txt, or `dependencies` of pyproject.toml, lists, with the versions it pins."""
    text = _text(file)
    if file.suffix == ".toml":
        listed = re.search(r"^dependencies\s*=\s*\[$(.*?)^\]", text, re.M | re.S)
        text = listed[1] if listed else ""
    lines = [line.partition("#")[0].rstrip() for line in text.splitlines()]
    found = [match for line in lines if line.strip() and (match := _REQUIREMENT.match(line))]
    return {match[1].lower().replace("_", "-"): match[2] or "" for match in found}
