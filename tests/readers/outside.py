"""Files read by a program in a Python of its own, see `inside`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from common import KINDS, Made, Target, Trained, trained
from registry_archs import SPECS, data_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy_models import toy

from networks.archs.places import places
from networks.files.adapter_file import Naming, open_adapter
from networks.files.codec import SavedLayer
from networks.files.readers import Given, Reading
from networks.files.readers.contract import STRENGTHS
from networks.files.readers.trainers import saved_names

HERE = Path(__file__).parent
Place = str  # `part|dotted name` in the program's models
Places = dict[nn.Module, tuple[tuple[Place, int, int], ...]]  # a layer's, each with its rows, in their order


@dataclass(frozen=True)
class Case:
    """A file that a program is to read.

    Attributes:
        way: which of the program's ways to read files.
        places: module of ours -> the program's layers that are it.
    """

    arch: str
    kind: str
    way: str
    trained: Trained
    places: Places

    def names(self, module: nn.Module) -> set[Place]:
        return {place for place, _, _ in self.places[module]}


@lru_cache
def models_of(arch: str, encoders: bool) -> dict[str, nn.Module]:
    models = toy(arch, blocks=1, shrink=data_of(arch).shrink)
    models = {name: model for name, model in models.items() if encoders or name == SPECS[arch].denoiser.name}
    for model in models.values():
        model.eval().requires_grad_(False)
        for module in model.modules():
            module.bias = None  # type: ignore[assignment]  # not all layers have one in the programs' classes
    return models


def own_places(arch: str, encoders: bool = True) -> Places:
    """Where a program has the trainer's own classes."""
    found = {}
    for part, model in models_of(arch, encoders).items():
        for name, module in model.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor):
                found[module] = ((f"{part}|{name}", 0, int(module.weight.shape[0])),)  # type: ignore[union-attr, arg-type]
    return found


def diffusers_places(arch: str, own: frozenset[str] = frozenset(), root: str = "", encoders: bool = True) -> Places:
    """Where a program has diffusers' classes.

    Args:
        own: architectures of whose denoiser it has the trainer's class.
        root: before the trainer's names of its text encoders.
    """
    spec, found = SPECS[arch], own_places(arch, encoders)
    for part in spec.text_encoders:
        for module, ((place, start, stop),) in list(found.items()):
            if place.startswith(f"{part.name}|"):
                found[module] = ((place.replace("|", f"|{root}"), start, stop),)
    if arch in own:
        return found
    part = spec.denoiser
    for name, module in models_of(arch, encoders)[part.name].named_modules():
        if module in found:
            rows, columns = module.weight.shape[:2]  # type: ignore[union-attr, misc]
            there = places(spec, part, name, rows, columns)
            found[module] = tuple(
                (f"{part.name}|{one.path.removeprefix(part.diffusers + '.')}", one.start, one.stop) for one in there
            )
    return found


def file_of(arch: str, kind: str, folder: Path, encoders: bool = True, **more: str) -> Trained:
    """A file of a kind for the small models of an architecture."""
    name = " ".join((arch, kind, *more, *([] if encoders else ["denoiser"])))
    file = folder / f"{name}.safetensors"
    return trained(arch, models_of(arch, encoders), file, **{**KINDS[kind], **more})


def renamed(before: Trained, form: str, folder: Path, peft: bool = False) -> Trained:
    """The same file under other names.

    Args:
        form: what stands before the names: dotted ones if it ends with a dot.
        peft: lora_A and lora_B, the strength in the factors.
    """
    given, new = before.given, {}
    names = {
        name: form + (path if form.endswith(".") else path.replace(".", "_"))
        for name, (_, path) in saved_names(given.arch, given.shapes).items()
        if name in given.meant
    }
    for key, tensor in given.tensors.items():
        name, _, suffix = key.partition(".")
        if peft and suffix == "lora_up.weight":
            tensor = tensor * given.meant[name].scale
        if not peft or suffix != "alpha":
            suffix = suffix.replace("lora_down", "lora_A").replace("lora_up", "lora_B") if peft else suffix
            new[f"{names[name]}.{suffix}"] = tensor.contiguous()
    ordered = dict(sorted(new.items()))
    file = folder / f"{before.file.stem} {form}{peft}.safetensors"
    save_file(ordered, file)
    said = {names[name]: saved for name, saved in given.meant.items()}
    targets = {names[name]: found for name, found in before.targets.items()}
    return Trained(file, replace(given, tensors=ordered, meant=said, metadata={}), targets)


def assert_equal(reading: Reading, real: Made, given: Given, exact: float = 1e-4) -> None:
    """A model of a program says of a file what the program made of it: the layers which load, by name; its words where
    it refuses the file; the errors to two digits.

    Args:
        exact: an error that is rounding.
    """
    if real.refused or reading.refused:
        assert reading.refused and reading.refused in real.refused, (reading.refused, real.refused)
        return
    assert reading.fates.keys() == given.meant.keys()
    told = {name for name, fate in reading.fates.items() if fate.loaded}
    assert told == real.loaded, sorted(told ^ real.loaded)
    for name in told:
        fate, errors = reading.fates[name], real.errors[name]
        assert errors is not None
        for one, other in zip(fate.errors, errors, strict=True):
            assert one is not None and abs(one - other) < max(exact, 0.01 * other), (name, fate, errors)
        assert bool(fate.reason) == (max(errors) > exact), (name, fate, errors)


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
                place: module.weight.detach()[start:stop].clone()  # type: ignore[index, union-attr, operator]
                for module, where in case.places.items()
                for place, start, stop in where
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
    wanted = {place for targets in case.trained.targets.values() for one in targets for place in case.names(one.module)}
    absent = sorted(wanted & set(result["absent"]))  # type: ignore[call-overload]
    assert not absent, f"{case.arch}: the program's own classes have no {absent}"
    if result["refused"]:
        return Made(str(result["refused"]))

    def weight_at(module: nn.Module, strength: float) -> Tensor:
        whole: Tensor = module.weight.detach()  # type: ignore[union-attr, assignment, operator]
        rows = [
            weights.get(f"{number}|{strength}|{place}", whole[start:stop]) for place, start, stop in case.places[module]
        ]
        return torch.cat(rows)

    return Made("", {name: _errors(targets, weight_at) for name, targets in case.trained.targets.items()})


def _errors(targets: Sequence[Target], weight_at: Callable[[nn.Module, float], Tensor]) -> tuple[float, ...] | None:
    """||W' as read - W' as meant|| / ||W' as meant - W|| at each strength; None = nothing has changed."""
    found, changed = [], False
    for strength in STRENGTHS:
        off = size = 0.0
        for target in targets:
            new = weight_at(target.module, strength).double().reshape(target.base.shape)
            base = target.base.double()
            change = strength * (target.wanted.double() - base)
            changed |= bool((new - base).norm() > 1e-6 * base.norm())
            off += float((new - base - change).square().sum())
            size += float(change.square().sum())
        found.append((off / size) ** 0.5)
    return tuple(found) if changed else None


# -- files written by hand

_FACTORS: dict[str, dict[str, tuple[object, ...]]] = {
    "lora": {"lora_down.weight": (2, "I"), "lora_up.weight": ("O", 2), "alpha": ()},
    "lora without alpha": {"lora_down.weight": (2, "I"), "lora_up.weight": ("O", 2)},
    "peft": {"lora_A.weight": (2, "I"), "lora_B.weight": ("O", 2)},
    "peft with alpha": {"lora_A.weight": (2, "I"), "lora_B.weight": ("O", 2), "alpha": ()},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": ("O/2", 2), "lokr_w2_b": (2, "I/2"), "alpha": ()},
    "lokr whole": {"lokr_w1": (2, 2), "lokr_w2": ("O/2", "I/2"), "alpha": ()},
    "lokr both": {
        "lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": ("O/2", 1), "lokr_w2_b": (1, "I/2"), "alpha": (),
    },
    "loha": {"hada_w1_a": ("O", 2), "hada_w1_b": (2, "I"), "hada_w2_a": ("O", 2), "hada_w2_b": (2, "I"), "alpha": ()},
    "glora": {"a1.weight": ("I", 2), "a2.weight": (2, "I"), "b1.weight": ("O", 2), "b2.weight": (2, "I"), "alpha": ()},
    "full": {"diff": ("O", "I")},
    "diag-oft": {"oft_blocks": ("O/4", 4, 4), "alpha": ()},
    "ia3": {"weight": ("O",), "on_input": ()},
}  # fmt: skip
_FACTORS |= {
    "dora": {**_FACTORS["lora"], "dora_scale": ("O", 1)},
    "dora input": {**_FACTORS["lora"], "dora_scale": (1, "I")},
    "lokr dora": {**_FACTORS["lokr"], "dora_scale": ("O", 1)},
}
BY_HAND = tuple(_FACTORS)


def meant(tensors: Mapping[str, Tensor]) -> dict[str, SavedLayer]:
    """Layer of a file, with the dots of its name -> what it is."""
    layers = open_adapter(tensors, Naming()).all_read().layers
    return {name.replace("/", "."): layer for name, layer in layers.items()}


def by_hand(arch: str, kind: str, layers: Mapping[str, tuple[str, str, tuple[int, ...]]]) -> Given:
    """A file of a kind, without values.

    Args:
        layers: name in the file -> part, trainer's dotted name and shape of the weight.
    """
    tensors, shapes = dict[str, Tensor](), dict[str, dict[str, tuple[int, ...]]]()
    for name, (part, path, (out, features, *_)) in layers.items():
        shapes.setdefault(part, {})[path] = layers[name][2]
        sizes = {"O": out, "I": features, "O/2": out // 2, "I/2": features // 2, "O/4": out // 4}
        for suffix, shape in _FACTORS[kind].items():
            size = [sizes.get(one, one) for one in shape]  # type: ignore[call-overload]
            tensors[f"{name}.{suffix}"] = torch.ones(()) if not size else torch.empty(size, device="meta")
    return Given(dict(sorted(tensors.items())), {}, SPECS[arch], shapes, meant(tensors))
