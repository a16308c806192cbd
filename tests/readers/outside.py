"""Files read by a program in a Python of its own, see `inside`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from common import KINDS, Made, Trained, made, trained
from registry_archs import SPECS, data_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy_models import toy

from networks.files.readers.contract import STRENGTHS

HERE = Path(__file__).parent
Place = str  # `part|dotted name` in the program's models


@dataclass(frozen=True)
class Case:
    """A file that a program is to read.

    Attributes:
        way: which of the program's ways to read files.
        places: module of ours -> the program's layers that are it, in the order of its rows.
    """

    arch: str
    kind: str
    way: str
    trained: Trained
    places: Mapping[nn.Module, tuple[tuple[Place, int, int], ...]]


@lru_cache
def models_of(arch: str, encoders: bool = True) -> dict[str, nn.Module]:
    models = toy(arch, blocks=1, shrink=data_of(arch).shrink)
    models = {name: model for name, model in models.items() if encoders or name == SPECS[arch].denoiser.name}
    for model in models.values():
        model.eval().requires_grad_(False)
    return models


def own_places(arch: str, encoders: bool = True) -> dict[nn.Module, tuple[tuple[Place, int, int], ...]]:
    """Where a program has the trainer's own classes."""
    found = {}
    for part, model in models_of(arch, encoders).items():
        for name, module in model.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor):
                found[module] = ((f"{part}|{name}", 0, int(module.weight.shape[0])),)  # type: ignore[union-attr, arg-type]
    return found


def file_of(arch: str, kind: str, folder: Path, encoders: bool = True, **more: str) -> Trained:
    """A file of a kind for the small models of an architecture."""
    return trained(arch, models_of(arch, encoders), folder / f"{arch} {kind}.safetensors", **{**KINDS[kind], **more})


def run(program: str, environment: str, cases: Iterable[Case], folder: Path) -> list[Made]:
    """What a program makes of the files.

    Args:
        program: the driver's file name here.
        environment: name of the variable with the path of the program; with PYTHON for PATH, that of its Python.
    """
    cases, jobs = list(cases), dict[str, dict[str, object]]()
    for number, case in enumerate(cases):
        if case.arch not in jobs:
            base = {
                place: module.weight.detach()[start:stop].contiguous()  # type: ignore[index, union-attr, operator]
                for module, places in case.places.items()
                for place, start, stop in places
            }
            save_file(base, folder / f"{case.arch} base.safetensors")
            jobs[case.arch] = {"base": f"{case.arch} base.safetensors", "jobs": []}
        job = {"id": str(number), "arch": case.arch, "way": case.way, "file": str(case.trained.file)}
        jobs[case.arch]["jobs"].append({**job, "strengths": list(STRENGTHS)})  # type: ignore[attr-defined]
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    python = os.environ.get(environment.replace("PATH", "PYTHON"), sys.executable)
    surroundings = {**os.environ, "PYTHONPATH": os.environ[environment], "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [python, str(HERE / program), str(folder)], env=surroundings, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "weights.safetensors")
    return [_made(case, results[str(number)], str(number), weights) for number, case in enumerate(cases)]


def _made(case: Case, result: Mapping[str, object], number: str, weights: Mapping[str, Tensor]) -> Made:
    assert not result["absent"], f"{case.arch}: the program's own classes have no {result['absent']}"
    if result["refused"]:
        return Made(str(result["refused"]))

    def weight_at(module: nn.Module, strength: float) -> Tensor:
        whole: Tensor = module.weight.detach()  # type: ignore[union-attr, assignment, operator]
        rows = [
            weights.get(f"{number}|{strength}|{place}", whole[start:stop])
            for place, start, stop in case.places[module]
        ]
        return torch.cat(rows)

    return made(case.trained, weight_at)


ARCHS = tuple(SPECS)
