"""Modules of a trainer's checkout, whatever else is installed.

Its package of networks has the name of ours, so its files are loaded under another. A library that a trainer imports
and this machine lacks (torchvision, OpenCV), or has in a version without some name, is an empty stand-in meanwhile:
nothing of it is called here.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

OWN = {"library", "networks", "musubi_tuner"}  # which no stand-in may replace


class Checkout:
    """A trainer's folder.

    Attributes:
        root: the folder.
    """

    def __init__(self, root: Path, source: str, networks: str, alias: str) -> None:
        """Args:
        root: the folder.
        source: in it, what its files expect on the path.
        networks: in it, the folder of network modules.
        alias: the package as which that is loaded.
        """
        self.root, self._alias = root, alias
        if str(root / source) not in sys.path:
            sys.path.append(str(root / source))  # behind everything else
        package = sys.modules.setdefault(alias, types.ModuleType(alias))
        package.__path__ = [str(root / networks)]

    def network_module(self, name: str) -> Any:
        """A file of its networks folder.

        Raises:
            ImportError: there is no such file.
        """
        return imported(f"{self._alias}.{name}")


def sd_scripts(root: Path) -> Checkout:
    return Checkout(root, ".", "networks", "sd_scripts_networks")


def musubi(root: Path) -> Checkout:
    return Checkout(root, "src", "src/musubi_tuner/networks", "musubi_networks")


def imported(name: str) -> Any:
    """A module of a trainer.

    Raises:
        ImportError: it is not there.
    """
    missing: set[str] = set()
    for _ in range(30):
        try:
            with _stand_ins(missing), _without_gpu():
                return importlib.import_module(name)
        except ImportError as error:
            lacking = _lacking(error)
            if not lacking or lacking in missing or lacking.partition(".")[0] in OWN | {name.partition(".")[0]}:
                raise
            missing.add(lacking)
    raise ImportError(f"{name} needs too much that is not here: {', '.join(sorted(missing))}")


def _lacking(error: ImportError) -> str:
    """The library that is not there, or `library.name` of what another version of it does not have."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").partition(".")[0]
    found = re.search(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
    return f"{found[2]}.{found[1]}" if found else ""


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        here = fullname.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if here else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def _stand_ins(names: set[str]) -> Iterator[None]:
    """Gone afterwards: other libraries look whether the true ones are there."""
    finder = _Finder({name for name in names if "." not in name})
    sys.meta_path.append(finder)
    dropped = [name.rpartition(".") for name in names if "." in name]
    for module, _, name in dropped:
        setattr(sys.modules[module], name, type(name, (), {}))
    try:
        yield
    finally:
        for module, _, name in dropped:
            delattr(sys.modules[module], name)
        sys.meta_path.remove(finder)
        for name in [each for each, module in sys.modules.items() if isinstance(module, _Empty)]:
            del sys.modules[name]


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Some files ask for the GPU's number as they are imported."""
    if torch.cuda.is_available():
        yield
        return
    with mock.patch("torch.cuda.current_device", lambda: "cpu"):
        yield
