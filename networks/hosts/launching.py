"""Running a trainer's script as `python SCRIPT` would, but with our modules before the trainer's own."""

from __future__ import annotations

import importlib
import logging
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from .._version import __version__
from ..args.coerce import nearest
from .checkouts import MUSUBI, SD_SCRIPTS
from .trainer_scripts import SCRIPTS

log = logging.getLogger(__name__)

OPTIONS = ("--allow_missing", "--replace_lycoris")  # before the script's name: ours
STARTERS = ("accelerate", "python", "python3", "torchrun")
# Modules of the trainers that merge adapter files into a model's weights by key names.
MERGERS = ("library.lora_utils", "musubi_tuner.utils.lora_utils")
READERS = "musubi_tuner.networks"  # its modules build the networks by which the other generators merge files
# Those that their trainer takes under this name alone: started here, it trains with ours.
PRESCRIBED = frozenset(script.module for script in SCRIPTS.values() if script.alone)
LYCORIS = "lycoris.kohya"  # LyCORIS' network module, as command lines and the trainers' generators name it


def find_script(name: str) -> Path:
    """The script which the user named.

    Raises:
        ValueError: there is none, with the nearest name.
    """
    if name.startswith("-"):
        hint = nearest(name.partition("=")[0], OPTIONS)
        raise ValueError(f"option {name} comes before the script: give the script first, its options after it{hint}")
    path = Path(name)
    if path.is_file():
        return path
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the path of the script, or change into its folder")
    if name in STARTERS:
        raise ValueError(f"{name} comes first, not last: write {name} ... launch.py SCRIPT ...")
    scripts = sorted(file.name for file in folder.glob("*.py"))
    inside = f"; it holds {', '.join(scripts[:5])}" if scripts else "; it holds no script"
    if path.is_dir():
        raise ValueError(f"{name} is a folder, not a script{inside}")
    raise ValueError(f"there is no script {path.name} in {folder.resolve()}{nearest(path.name, scripts) or inside}")


def arrange_path(script: Path, ours: Path) -> None:
    """Put our root first on sys.path and the script's folder second.

    The trainer's own packages come last, for a checkout that was never installed. Worker processes get the same list,
    also where they are spawned.
    """
    launcher = os.path.normcase(ours / "scripts")  # python put it first; there, too, are a train_network and a gen_img
    rest = [entry for entry in sys.path if os.path.normcase(os.path.abspath(entry or ".")) != launcher]
    home = script.resolve().parent
    own = [str(folder) for parent in (home, *home.parents[:2]) for folder in _sources(parent)]
    sys.path[:] = [str(ours), str(home), *rest, *own]


def _sources(checkout: Path) -> list[Path]:
    """Folders that a trainer's installation would put on sys.path: sd-scripts' root, musubi-tuner's src."""
    marks = {checkout: checkout / SD_SCRIPTS, checkout / MUSUBI.parent: checkout / MUSUBI}
    return [folder for folder, mark in marks.items() if mark.exists()]


def run(
    script: Path,
    arguments: Sequence[str],
    ours: Path,
    allow_missing: Sequence[str] = (),
    replace_lycoris: bool = False,
) -> None:
    """Run the script as `__main__`.

    Args:
        script: the trainer's.
        arguments: behind its name.
        ours: the folder that holds our packages.
        allow_missing: parts of adapter files that may be without a place, "" for all.
        replace_lycoris: whether `lycoris.kohya` is our networks.lycoris, installed or not.
    """
    arrange_path(script, ours)
    entries = sorted(file.stem for file in (ours / "networks").glob("lo*.py"))
    acts = dict.fromkeys(MERGERS, partial(_extend_merger, allow_missing=allow_missing)) | dict.fromkeys(
        [f"{READERS}.{e}" for e in entries], _lend_reader
    )
    sys.meta_path.insert(0, _AfterImport(acts))
    if replace_lycoris:
        sys.meta_path.insert(0, _InPlaceOfLycoris())
    sys.argv[:] = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _extend_merger(module: ModuleType, allow_missing: Sequence[str]) -> None:
    from ..files.places import Allowance
    from .key_merge import extend  # torch only comes in when the trainer has it, too

    extend(module, Allowance.given(allow_missing, "--allow_missing before the script's name"))


def _lend_reader(module: ModuleType) -> None:
    from .key_merge import lend

    ours = importlib.import_module(f"..{module.__name__.rpartition('.')[2]}", __package__)
    lend(module, ours)
    if module.__name__ in PRESCRIBED:
        for name in ("create_arch_network", "prepare_network"):
            setattr(module, name, getattr(ours, name))
        log.info("%s trains with %s of kohya-networks %s here", module.__name__, ours.__name__, __version__)


class _AfterImport(MetaPathFinder):
    """Calls a module's own `act(module)` right after it was executed, before its importer takes names from it."""

    def __init__(self, acts: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self.acts = acts

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.acts:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute, act = spec.loader.exec_module, self.acts[fullname]

            def exec_module(module: ModuleType) -> None:
                execute(module)
                act(module)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 - this one loader, not its class
        return spec


class _InPlaceOfLycoris(MetaPathFinder, Loader):
    """`lycoris.kohya` is our networks.lycoris; LyCORIS' other modules stay its own, where it is installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == LYCORIS:
            return ModuleSpec(fullname, self)
        package = LYCORIS.partition(".")[0]
        if fullname != package:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        # without LyCORIS: an empty package, since the trainers' generators ask first whether there is one
        return next((found for found in others if found is not None), ModuleSpec(package, None, is_package=True))

    def exec_module(self, module: ModuleType) -> None:
        ours = importlib.import_module("..lycoris", __package__)
        log.info("%s is networks.lycoris of kohya-networks %s here: %s", LYCORIS, __version__, ours.__file__)
        sys.modules[module.__name__] = ours  # an import returns what stands there after this call
