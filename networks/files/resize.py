"""Layers of files with another rank: cut to their first ranks, made smaller, or grown.

The scale stays, so that a higher rank changes nothing, and a lower one is the nearest update. First ranks keep their
alpha instead: a layer of DyLoRA then acts as it was trained at that dim.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .._errors import located
from ..algos import ALGOS, Adapter
from ..algos.saved import Count, wide_dtype
from ..foreign.texts import parse_json
from ..records import ALGORITHMS
from ..tensors.norms import weight_geometry
from ..tensors.seeding import seed_of, seeded
from . import dotted, joining
from .codec import SavedLayer

Shape = tuple[int, ...]


def trained_by(metadata: Mapping[str, str]) -> type[Adapter] | None:
    """The algorithm that metadata name; None = none that is known."""
    try:
        arguments = parse_json(metadata.get("ss_network_args", "{}"))
    except ValueError:
        arguments = None
    algo = arguments.get("algo") if isinstance(arguments, dict) else None
    name = str(algo or metadata.get("ss_network_module", "").rpartition(".")[2]).lower()
    return ALGOS[name] if name in ALGORITHMS else None


def ranks_of(saved: SavedLayer) -> int:
    """Of a layer, or of each part of a stack; 0 = it has none."""
    rank = saved.algorithm.spec.shown_rank(saved.tensors) if saved.algorithm.spec.grows else None
    return (rank or 0) // saved.algorithm.stacked(saved.tensors)


def cut(saved: SavedLayer, dim: int) -> SavedLayer:
    """A layer with its first `dim` ranks at most, and alpha as it is.

    Raises:
        ValueError: no ranks of its form stand alone.
    """
    with located(dotted.shown(saved.name)):
        tensors = saved.algorithm.first_ranks(saved.tensors, dim)
    rank = saved.algorithm.spec.shown_rank(saved.tensors)
    return replace(saved, tensors=tensors, alpha=saved.alpha or float(rank or 0))


def shrunk(saved: SavedLayer, count: Count) -> SavedLayer:
    """The nearest layer with fewer ranks.

    Args:
        count: how many of the singular values, the largest first, are kept; of a stack, of each part.

    Raises:
        ValueError: it has no ranks.
    """
    algorithm, spec = saved.algorithm, saved.algorithm.spec
    with located(dotted.shown(saved.name)):
        tensors = algorithm.nearest(saved.tensors, count, algorithm.stacked(saved.tensors))
    before, after = (spec.shown_rank(each) or 1 for each in (saved.tensors, tensors))
    return replace(saved, tensors=tensors, alpha=saved.alpha and saved.alpha * after / before)


def grown(
    saved: SavedLayer,
    dim: int,
    shape: Shape,
    algorithm: type[Adapter],
    seed: int,
    base: Callable[[], Tensor | None],
) -> SavedLayer:
    """A layer with `dim` ranks (in each part of a stack), the same update, and new ranks that learn.

    Args:
        saved: with fewer ranks.
        dim: of it then.
        shape: of its weight, [O, I, *kernel].
        algorithm: that trained it, whose files it has; as the new ranks begin.
        seed: of what is random about them.
        base: gives the weight, for algorithms which start from it; None = it is not known.

    Raises:
        ValueError: it has no ranks, or they start from the base weight, which is not given.
    """
    parts, geometry = saved.algorithm.stacked(saved.tensors), weight_geometry(shape)
    with located(dotted.shown(saved.name)), torch.device("cpu"), seeded(seed_of(saved.name, seed)):
        _, options = algorithm.describe(geometry, saved.tensors)
        rank = algorithm.whole_layout(geometry, 1, options).saved_rank or 1
        if dim * parts % rank:
            raise ValueError(f"files of {algorithm.spec.name} have {rank} ranks for each of its dim: {dim} is odd")
        adapter = algorithm(geometry, dim * parts // rank, options)
        if adapter.wants_base:
            weight = base()
            if weight is None:
                raise ValueError(
                    f"new ranks of {algorithm.spec.name} start from the weight below: give the model, --base "
                    "CHECKPOINT, or train on with resume_resize=True"
                )
            with torch.no_grad():
                adapter.init_from_base(weight)
        tensors = algorithm.grown(saved.tensors, adapter.pack(), parts)
    before, after = (saved.algorithm.spec.shown_rank(each) or 1 for each in (saved.tensors, tensors))
    return replace(saved, tensors=tensors, alpha=saved.alpha and saved.alpha * after / before)


def fitted(saved: SavedLayer, adapter: Adapter) -> SavedLayer:
    """A layer with the ranks of an adapter.

    Args:
        saved: of the same algorithm.
        adapter: a new one for the same weight, at its start; the layer is on its device.

    Raises:
        ValueError: it does not fit the weight, or its algorithm has no ranks.
    """
    saved.describe(adapter.geometry)
    wide = {suffix: t.to(wide_dtype(t)) if t.is_floating_point() else t for suffix, t in saved.tensors.items()}
    tensors, alpha = adapter.resized(wide, saved.alpha)
    return replace(saved, tensors=dict(tensors), alpha=alpha)


def distance(new: SavedLayer, old: SavedLayer, shape: Shape, base: Tensor | None = None) -> tuple[float, float]:
    """Lengths of the difference of two layers' updates, and of the old update.

    Args:
        new, old: of one layer. Without `base` magnitudes of DoRA, which are the same in both, are not looked at.
        shape: of the weight.
        base: the weight.

    Raises:
        NeedsBase: the updates depend on it, and it is not given.
    """
    if base is None:
        new, old = replace(new, magnitude=None), replace(old, magnitude=None)
    before, after = (joining.update_of(one, shape, base) for one in (old, new))
    return after.minus(before).norm(), before.norm()


def resized_metadata(metadata: Mapping[str, str], dim: int) -> dict[str, str]:
    """Metadata of a file with the first ranks."""
    changed = {"ss_network_dim": str(dim)} if "ss_network_dim" in metadata else {}
    return {**metadata, **changed, "networks_resized": f"first {dim}"}


def numbered(path: str | os.PathLike[str], dim: int) -> Path:
    """Where the file of another dim goes: `name-0004.safetensors`, as the trainers' own script calls it."""
    file = Path(path)
    return file.with_name(f"{file.stem}-{dim:04d}.safetensors")
