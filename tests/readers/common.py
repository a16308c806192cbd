"""Files of every kind on every architecture, what is meant by them, and how what a program made of one is compared with
what its model says."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from registry_archs import SPECS, data_of
from safetensors.torch import save_file
from torch import Tensor, nn

from networks.archs.spec import ArchSpec
from networks.files.adapter_file import FileTensors, Naming, open_adapter
from networks.files.readers import Given, Reader
from networks.files.readers.contract import STRENGTHS
from networks.network.network import Network
from networks.plan.walk import candidates

# Kinds of file -> arguments of the network. Ranks and alphas differ from 1 and from each other.
KINDS: dict[str, dict[str, str]] = {
    "lora": {},
    "lora ranks": {"use_rslora": "True", "network_reg_dims": r".*(q|qkv|query|q_proj)=3"},
    "dora": {"use_dora": "True"},
    "dora input": {"use_dora": "True", "wd_on_output": "False"},
    "lokr": {"algo": "lokr", "factor": "2"},
    "lokr whole": {"algo": "lokr", "factor": "2", "full_matrix": "True"},
    "lokr dora": {"algo": "lokr", "factor": "2", "use_dora": "True"},
    "loha": {"algo": "loha"},
    "glora": {"algo": "glora"},
    "dylora": {"algo": "dylora"},
    "tlora": {"algo": "tlora"},
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft"},
    "oft rescaled": {"algo": "diag-oft", "rescaled": "True"},
    "oft limited": {"algo": "diag-oft", "constraint": "0.01"},
    "oft input": {"algo": "diag-oft", "train_on_input": "True"},
    "boft": {"algo": "boft", "dim": "64"},
    "ia3": {"algo": "ia3"},
    "norms": {"train_norm": "affine"},
}
WIDE = ("lora", "dora", "lokr")  # held to every architecture
DIM, ALPHA = 4, 2.0
PAIR = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


@dataclass(frozen=True)
class Target:
    """A module of the model, or some rows of one, that a layer of the file is for: W, and W' as it was trained."""

    module: nn.Module
    base: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Trained:
    """A file, what it is for, and what is meant by it.

    Attributes:
        targets: layer of the file, as in `Given.meant` -> what it is for.
    """

    file: Path
    given: Given
    targets: Mapping[str, tuple[Target, ...]]


@dataclass(frozen=True)
class Made:
    """What a program made of a file.

    Attributes:
        refused: its words, if it raised.
        errors: layer of the file -> at each of STRENGTHS; None = the layer is as it was.
    """

    refused: str = ""
    errors: Mapping[str, tuple[float, ...] | None] = field(default_factory=dict)

    @property
    def loaded(self) -> set[str]:
        return {name for name, errors in self.errors.items() if errors is not None}


def trained(arch: str, models: Mapping[str, nn.Module], file: Path, std: float = 0.1, **arguments: str) -> Trained:
    """A network of an architecture with random values, saved.

    Args:
        models: part name -> model; the denoiser's is there.
        std: of the values.
        arguments: of the network.
    """
    spec = SPECS[arch]
    encoders = [models[part.name] for part in spec.text_encoders if part.name in models]
    network = _network(arch, models[spec.denoiser.name], encoders, arguments)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std)
    network.save_weights(str(file), None, {})
    targets: dict[str, tuple[Target, ...]] = {}
    base = {}
    for layer in network.adapted_layers:
        whole = layer.whole_weight().detach().clone()  # programs merge into the model
        new = layer.new_weight(whole).detach()
        base[layer.lora_name] = whole
        pieces = [Target(site.module, site.select_rows(whole), site.select_rows(new)) for site in layer.sites]
        shares = ((share, one.name) for one in network.file_format.targets for share in one.shares)
        where = sorted((share.start, path) for share, path in shares if share.saved_name == layer.lora_name)
        if where:
            targets |= {path: (piece,) for (_, path), piece in zip(where, pieces, strict=True)}
        else:
            targets[layer.lora_name] = tuple(pieces)
    network.detach()
    return Trained(file, given_of(spec, models, file, base.__getitem__), targets)


def renamed(source: Trained, models: Mapping[str, nn.Module], file: Path, root: str, peft: bool) -> Trained:
    """The same, as other programs write it: the trainer's own dotted names of the denoiser's layers behind a root.

    Args:
        models: as for `trained`; the denoiser alone.
        peft: LoRA with PEFT's names of factors, its strength in the second.
    """
    spec, tensors = source.given.arch, source.given.tensors
    saved = {f"{spec.denoiser.prefix}_{one}".replace(".", "_"): one for one in source.given.shapes[spec.denoiser.name]}
    names = {name: f"{root}{one}" for name, one in saved.items()}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        if peft and suffix == "lora_up.weight":
            tensor = tensor * (float(tensors[f"{name}.alpha"]) / tensor.shape[1])
        if not peft or suffix != "alpha":
            found[f"{names[name]}.{PAIR.get(suffix, suffix) if peft else suffix}"] = tensor.contiguous()
    save_file(found, file)
    base = source.given.base
    return Trained(
        file, given_of(spec, models, file, base), {names[name]: targets for name, targets in source.targets.items()}
    )


def _network(arch: str, denoiser: nn.Module, encoders: list[nn.Module], arguments: Mapping[str, str]) -> Network:
    entry: Any = importlib.import_module(f"networks.{SPECS[arch].entry}")
    create = entry.create_arch_network if data_of(arch).host == "musubi" else entry.create_network
    more = {name: value for name, value in arguments.items() if name != "dim"}
    dim = int(arguments.get("dim", DIM))
    network = create(1.0, dim, ALPHA, None, encoders, denoiser, neuron_dropout=None, **more)
    network.apply_to(encoders, denoiser, bool(encoders), True)
    found: Network = network
    return found


def given_of(
    spec: ArchSpec, models: Mapping[str, nn.Module], file: Path, base: Callable[[str], Tensor] | None = None
) -> Given:
    """A file as readers are given it, beside these models."""
    tensors, shapes = FileTensors(file), {}
    for part in spec.parts:
        if part.name in models:
            found = candidates(part, models[part.name], norms=True)
            shapes[part.name] = {one.trainer_name: tuple(one.geometry.weight_shape) for one in found}
    opened = open_adapter(tensors, Naming()).all_read()
    meant = {name.replace("/", "."): layer for name, layer in opened.layers.items()}
    return Given(dict(tensors), tensors.metadata, spec, shapes, meant, base, tensors.settings)


def made(trained: Trained, weight_at: Callable[[nn.Module, float], Tensor]) -> Made:
    """What a program made of a file's layers.

    Args:
        weight_at: of a module of the model, at a strength.
    """
    return Made("", {name: _errors(targets, weight_at) for name, targets in trained.targets.items()})


def _errors(targets: Iterable[Target], weight_at: Callable[[nn.Module, float], Tensor]) -> tuple[float, ...] | None:
    found, changed = [], False
    for strength in STRENGTHS:
        off = size = 0.0
        for target in targets:
            new = weight_at(target.module, strength).double().reshape(target.base.shape)
            base, wanted = target.base.double(), target.wanted.double()
            changed |= bool((new - base).norm() > 1e-6 * base.norm())
            off += float((new - base - strength * (wanted - base)).square().sum())
            size += float((wanted - base).square().sum())
        found.append((off / size) ** 0.5 / strength if size else off**0.5)
    return tuple(found) if changed else None


def assert_model(reader: Reader, trained: Trained, real: Made, exact: float = 1e-4) -> None:
    """A reader's model says of a file what the program itself made of it.

    Args:
        exact: an error that is rounding.
    """
    reading = reader.read(trained.given)
    assert reading is not None
    assert reading.fates.keys() == trained.given.meant.keys() == trained.targets.keys()
    if real.refused or reading.refused:
        assert reading.refused and reading.refused in real.refused, (reading.refused, real.refused)
        return
    said = {name for name, fate in reading.fates.items() if fate.loaded}
    assert said == real.loaded, sorted(said ^ real.loaded)
    for name, fate in reading.fates.items():
        found = real.errors[name]
        assert bool(fate.reason) != (found is not None and max(found) < exact), (name, fate, found)
        for told, one in zip(fate.errors, found or (), strict=False):
            assert told is not None and abs(told - one) < max(exact, 0.01 * one), (name, fate, found)  # two digits
    blind = reader.read(replace(trained.given, base=None))
    assert blind is not None and {n for n, fate in blind.fates.items() if fate.loaded} == said
