"""What the drivers of other programs share. They run in the program's own Python, with the program alone on the path:
its folder `networks` and ours would be one import name.

A driver is called with a folder: jobs.json says which files to read on which models, the results go beside it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Models = Mapping[str, nn.Module]


class _Empty(type):
    """A class whose names are such classes, too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _empty(name)
        setattr(cls, name, found)
        return found


def _empty(name: str) -> _Empty:
    members = {"__class_getitem__": classmethod(lambda cls, key: cls), "__init__": lambda self, *args, **kwargs: None}
    return _Empty(name, (), members)


class _Stub(types.ModuleType):
    """A module of which only names are wanted."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _empty(name)
        setattr(self, name, found)
        return found


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages which the program imports on its way and which play no part here."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = name.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stub(*names: str) -> None:
    """Whatever of these packages is not installed is an empty one from now on."""
    import diffusers  # noqa: F401  (they look for optional packages while they are imported)
    import transformers  # noqa: F401

    sys.meta_path.append(_Stubs(names))


def main(build: Callable[[str], Models], read: Callable[[dict[str, Any], Models, float], None]) -> None:
    """Read all files.

    Args:
        build: the models of an architecture, part name -> the program's own class on the meta device.
        read: apply the file of a job to them at a strength; whatever it raises refuses the file.
    """
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    folder = Path(sys.argv[1])
    results: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    for arch, work in json.loads((folder / "jobs.json").read_text(encoding="utf-8")).items():
        base = load_file(folder / work["base"])
        models = build(arch)
        absent = [key for key in base if not _has(models, key)]
        for job in work["jobs"]:
            said, off = "", {}
            for strength in job["strengths"]:
                put(models, base)
                try:
                    read(job, models, strength)
                except Exception as error:  # whatever the program says of the file
                    said = f"{type(error).__name__}: {error}"
                    break
                off |= {f"{job['id']}|{strength}|{key}": _changed(models, key, old) for key, old in base.items()}
            results[job["id"]] = {"refused": said, "absent": absent}
            weights |= {} if said else {key: new for key, new in off.items() if new is not None}
    save_file(weights, folder / "weights.safetensors")
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def _has(models: Models, key: str) -> bool:
    part, _, path = key.partition("|")
    return part in models and path in dict(models[part].named_modules())


def put(models: Models, base: Mapping[str, Tensor]) -> None:
    """Give the layers these small weights; all others stay on the meta device."""
    for key, weight in base.items():
        if not _has(models, key):
            continue
        part, _, path = key.partition("|")
        module: Any = models[part].get_submodule(path)
        module.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(torch.zeros(weight.shape[0]), requires_grad=False)
        names = ("out_channels", "in_channels") if weight.dim() > 2 else ("out_features", "in_features")
        for name, size in zip(names, weight.shape[:2], strict=False):
            setattr(module, name, size)


def _changed(models: Models, key: str, old: Tensor) -> Tensor | None:
    if not _has(models, key):
        return None
    part, _, path = key.partition("|")
    new: Any = models[part].get_submodule(path).weight.detach().float()
    return None if torch.equal(new, old) else new.contiguous().clone()
