"""A folder as PEFT writes it: adapter_model.safetensors beside adapter_config.json, which `from_pretrained` loads.

The scale is in the factors and alpha is the rank, so that programs which look at the tensors alone read it right, too.
PEFT has one kind of adapter in a folder, and a folder for each model: those of text encoders are below the denoiser's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..records import AlgoSpec
from ..tensors.factor import factorization
from ..tensors.geometry import Geometry
from . import dotted, outputs, writer
from .codec import SavedLayer
from .dialects import Dialect, FileFormat
from .strengths import ALPHAS, CONFIG

TENSORS = "adapter_model.safetensors"
Shapes = Mapping[str, tuple[int, ...]]
Settings = tuple[tuple[str, Any], ...]
_LYCORIS = {"init_weights": True, "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False}


@dataclass(frozen=True)
class Kind:
    """A kind of adapter of PEFT.

    Attributes:
        peft_type: in its settings.
        rank: of a layer, from which PEFT makes its shapes.
        settings: beside those that all kinds have.
        common: further ones, which all layers of a network share, by geometry and shapes of the parameters of each, and
            by whether its layers are whole ones there; None = some cannot be of this kind.
        axes: of the largest kernel that it is for.
        dora: whether layers may have magnitudes.
    """

    peft_type: str
    rank: Callable[[SavedLayer], int]
    settings: Mapping[str, Any]
    common: Callable[[Sequence[tuple[Geometry, Shapes]], bool], Settings | None]
    axes: int = 2
    dora: bool = False

    def takes(self, geometry: Geometry, dora: str) -> bool:
        """Whether it is for a layer like this, and for the side of its magnitudes; "" = none."""
        return (self.dora or not dora) and (not geometry.has_kernel or len(geometry.kernel) <= self.axes)


def _rank(layer: SavedLayer) -> int:
    rank = layer.algorithm.spec.shown_rank(layer.tensors)
    assert rank is not None, f"{layer.name} has no rank"
    return rank


def _lokr_rank(layer: SavedLayer) -> int:
    """With half of its larger side, PEFT has the second factor whole."""
    whole = layer.tensors.get("lokr_w2")
    return _rank(layer) if whole is None else (max(whole.shape[:2]) + 1) // 2


def _nothing(layouts: Sequence[tuple[Geometry, Shapes]], whole: bool) -> Settings:
    return ()


def _flat(layouts: Sequence[tuple[Geometry, Shapes]], whole: bool) -> Settings | None:
    """PEFT has cores in all layers or in none."""
    return None if any("t1" in shapes for _, shapes in layouts) else ()


def _factor(layouts: Sequence[tuple[Geometry, Shapes]], whole: bool) -> Settings | None:
    """PEFT finds the shapes of all factors from one number and the rank."""
    sizes = set()
    for geometry, shapes in layouts:
        A, C = shapes["w1"] if "w1" in shapes else (shapes["w1_a"][0], shapes["w1_b"][1])
        B, D = geometry.out_features // A, geometry.in_features // C
        sizes |= {(A, B), (C, D)}
        if "t2" in shapes or ("w2_b" in shapes and shapes["w2_b"][0] >= max(B, D) / 2):
            return None
    factors = (-1, *sorted({factor for pair in sizes for factor in pair}))
    found = next((f for f in factors if all(factorization(a * b, f) == (a, b) for a, b in sizes)), None)
    return None if found is None or not whole else (("decompose_factor", found),)


_LORA = {"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False}
KINDS = {
    "lora": Kind("LORA", _rank, _LORA, _nothing, axes=3, dora=True),
    "loha": Kind("LOHA", _rank, _LYCORIS, _flat),
    "lokr": Kind("LOKR", _lokr_rank, {**_LYCORIS, "decompose_both": False}, _factor),
}


def fitting(form: FileFormat, layers: Sequence[tuple[AlgoSpec, Geometry, Shapes, str]]) -> Dialect:
    """The dialect of a form with the kind of adapter that all layers can be: their own, or LoRA.

    Args:
        form: of the network's files, with its targets.
        layers: algorithm, geometry, shapes of the parameters, and the side of the magnitudes ("" = none) of each.
    """
    algos = {spec.file_algo for spec, *_ in layers}
    kind = KINDS.get(next(iter(algos))) if len(algos) == 1 else None
    if kind is None or not all(kind.takes(geometry, dora) for _, geometry, _, dora in layers):
        return form.dialect
    whole = all(share.is_all for target in form.targets for share in target.shares)
    settings = kind.common([(geometry, shapes) for _, geometry, shapes, _ in layers], whole)
    return form.dialect if settings is None else replace(form.dialect, algos=tuple(algos), settings=settings)


def write(
    path: Path,
    layers: Iterable[SavedLayer],
    form: FileFormat,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    health: Mapping[str, int] | None = None,
) -> None:
    """Write the folder, whole or not at all.

    Args:
        path: of the folder.
        layers: of one algorithm, named as in diffusers' pipelines.
        form: of the network's files.
        dtype, metadata, health: as for `writer.write_tensors`.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    files: dict[str, Sequence[bytes | memoryview]] = {}
    for component, (group, settings) in contents(layers, form).items():
        stem = f"{component}/" if component else ""
        tensors = tensors_of(group)
        files[stem + TENSORS] = writer.content(tensors, dtype, {**(metadata or {}), "format": "pt"}, health)
        files[stem + CONFIG] = (json.dumps(settings, indent=2).encode(),)
    with outputs.whole(path, sum(len(chunk) for chunks in files.values() for chunk in chunks)) as folder:
        for name, chunks in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            outputs.write(file, chunks)


def contents(
    layers: Iterable[SavedLayer], form: FileFormat
) -> dict[str, tuple[Sequence[SavedLayer], Mapping[str, Any]]]:
    """Component of the pipeline, "" for the denoiser -> its layers under the names in its own model, and the settings.

    Args:
        layers, form: as for `write`.
    """
    assert form.arch is not None
    components: dict[str, list[SavedLayer]] = {}
    for layer in layers:
        component, _, name = layer.name.partition(".")
        own = "" if component == form.arch.denoiser.diffusers else component
        components.setdefault(own, []).append(replace(_one_first_factor(layer), name=name))
    settings = dict(form.dialect.settings)
    return {component: (group, {**_settings(group), **settings}) for component, group in components.items()}


def tensors_of(layers: Iterable[SavedLayer]) -> dict[str, Tensor]:
    """Those of one component by their keys."""
    return {f"{dotted.PEFT}{key}": tensor for key, tensor in dotted.write(layers).items()}


def _settings(layers: Sequence[SavedLayer]) -> dict[str, Any]:
    """Of the adapter of one model. Its layers are told by expressions: a name in a list stands for all which end so."""
    kind = KINDS[layers[0].algorithm.spec.file_algo]
    ranks = {re.escape(layer.name): kind.rank(layer) for layer in layers}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    dora = {"use_dora": any(layer.magnitude is not None for layer in layers)} if kind.dora else {}
    dora |= {"lora_bias": any(layer.bias_change is not None for layer in layers)} if kind.dora else {}
    return {
        "peft_type": kind.peft_type,
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": usual,
        ALPHAS[kind.peft_type]: usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": "|".join(ranks),
        **kind.settings,
        **dora,
    }


def _one_first_factor(layer: SavedLayer) -> SavedLayer:
    """A Kronecker product whose first factor is whole, since PEFT has one rank for both."""
    tensors = dict(layer.tensors)
    left, right = tensors.pop("lokr_w1_a", None), tensors.pop("lokr_w1_b", None)
    if left is None or right is None:
        return layer
    return replace(layer, tensors={**tensors, "lokr_w1": left @ right * layer.scale}, alpha=None)
