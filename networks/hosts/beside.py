"""Modules that only a trainer's folder of our name has: they stay importable, and the log says where they come from."""

from __future__ import annotations

import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from .._version import __version__

log = logging.getLogger(__name__)


class Observer(MetaPathFinder):
    """Finds nothing itself: it looks before the other finders do, and reports.

    Args:
        package: our import name.
        home: our folder.
    """

    def __init__(self, package: str, home: str) -> None:
        self.package, self.home = package, os.path.join(os.path.normcase(home), "")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.rpartition(".")[0] != self.package or not isinstance(path, list):
            return None
        path[:] = pkgutil.extend_path(path, self.package)  # musubi-tuner adds its folder to sys.path late
        spec = PathFinder.find_spec(fullname, path)
        origin = spec.origin if spec else None
        if origin and not os.path.normcase(origin).startswith(self.home):
            log.info("%s is not part of kohya-networks %s: taken from %s", fullname, __version__, origin)
        return None


def watch(package: str, path: list[str]) -> list[str]:
    """Start to observe; returns the package's search path with the folders that sys.path has now."""
    sys.meta_path.insert(0, Observer(package, path[0]))
    return pkgutil.extend_path(path, package)


def claim() -> None:
    """Make `networks` this package for the rest of the process: for our own programs.

    Raises:
        ImportError: a trainer's folder has the name already.
    """
    init = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "__init__.py")
    loaded = sys.modules.get("networks")
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
        if file is None or not os.path.samefile(file, init):
            raise ImportError(
                f"networks is a trainer's folder here ({file or [*loaded.__path__][0]}), and this program needs ours: "
                "start it in a process of its own, with kohya-networks or python -m kohya_networks.cli"
            )
        return
    spec = spec_from_file_location("networks", init)
    assert spec is not None and spec.loader is not None
    module = sys.modules["networks"] = module_from_spec(spec)
    spec.loader.exec_module(module)


def origin(module: str) -> str:
    """The file of a module of ours. Where the package around it is the trainer's, a warning says what that means."""
    package = module.rpartition(".")[0]
    if package in sys.modules and not hasattr(sys.modules[package], "__version__"):
        log.warning(
            "%s is the trainer's own folder, so its modules are used for all names that both have, and ours only for "
            "the rest: install kohya-networks without -e, or start the trainer with scripts/launch.py",
            package,
        )
    return getattr(sys.modules.get(module), "__file__", None) or module
