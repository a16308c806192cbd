"""`networks` under a name that no trainer owns: `--network_module kohya_networks.lora_wan`.

Its modules are the files of the folder `networks` beside this one; there is no second copy of the code. A file that a
process imports under both names is one module: the name that comes second is given the module of the first, so classes
are the same in either order. Where a trainer's folder owns `networks`, its modules stay what they are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType

# Not resolved: an installation may link this file from elsewhere, and the folders are neighbours where the link is.
_HOME = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "networks")
_OTHER_NAME = {"networks": __name__, __name__: "networks"}


class _SameModule(SourceFileLoader):
    """Hands out `module` in place of a new one."""

    def __init__(self, fullname: str, path: str, module: ModuleType) -> None:
        super().__init__(fullname, path)
        self.module = module

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = self.module  # an import returns what stands there after this call


class _OtherName(MetaPathFinder):
    """Finds modules whose file is loaded already under the other name; all others are left to the usual finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, inner = fullname.partition(".")
        module = sys.modules.get(f"{_OTHER_NAME.get(package)}.{inner}")
        if module is None:
            return None
        usual = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in usual if found is not None), None)
        if spec is None or spec.origin is None or not _is_file_of(module, spec.origin):
            return None
        spec.loader = _SameModule(fullname, spec.origin, module)
        return spec


def _is_file_of(module: ModuleType, origin: str) -> bool:
    own = getattr(module, "__file__", None)
    return own is not None and os.path.exists(origin) and os.path.samefile(own, origin)


if not os.path.isfile(os.path.join(_HOME, "_version.py")):
    raise ImportError(
        f"kohya_networks is without its modules: {_HOME} is no folder of kohya-networks; install the package again, or "
        "put both folders side by side"
    )
__path__ = [_HOME]
sys.meta_path.insert(0, _OtherName())

from ._version import __version__ as __version__  # noqa: E402
