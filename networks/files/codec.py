"""Live layers <-> saved tensors. The portable form: plain alpha / rank is the right strength in every reader.

A key is `<saved name>.<suffix>`; the saved name has no dot. `.alpha` is 0-d and fp32 whatever the other tensors are:
effective scale x saved rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algos import Adapter, make_adapter, recognise
from ..layers.adapted import AdaptedLayer
from ..layers.magnitude import magnitude_shape
from ..tensors.geometry import Geometry
from . import dialects, twins

_PORTABLE = dialects.Form()


@dataclass(frozen=True)
class SavedLayer:
    """One layer of a file.

    Attributes:
        algorithm: the class whose keys it has.
        tensors: suffix -> tensor, without alpha.
        alpha: None if the file has none (scale 1).
        magnitude: of DoRA, [O, 1, ..] or [1, I, ..]; None for plain layers.
        folded: it is as dialects with a fold_flag have it.
    """

    name: str
    algorithm: type[Adapter]
    tensors: dict[str, Tensor]
    alpha: float | None
    magnitude: Tensor | None = None
    folded: bool = False

    def side(self, geometry: Geometry) -> str:
        """Where the magnitude sits, "output" or "input"; "" without one.

        Raises:
            ValueError: it fits neither side.
        """
        if self.magnitude is None:
            return ""
        shape = tuple(self.magnitude.shape)
        for side in ("output", "input"):
            wanted = magnitude_shape(geometry, side == "output")
            if shape == wanted or shape == wanted[:2]:
                return side
        if shape == (geometry.out_features,):  # PEFT's form
            return "output"
        raise ValueError(f"a DoRA magnitude {shape} fits neither the rows nor the columns of {geometry.weight_shape}")

    def describe(self, geometry: Geometry) -> tuple[int, dict[str, Any]]:
        """(dim, options) for this layer's own shape; a form without rank takes its dim from alpha."""
        if self.algorithm.family != geometry.family:
            raise ValueError(
                f"the file has {self.algorithm.algo}, which is not for a layer of this kind ({geometry.kind})"
            )
        if self.magnitude is not None and not self.algorithm.magnitudes:
            raise ValueError(
                f"the file has DoRA magnitudes of a layer of {self.algorithm.algo}, which has none here: merge it into "
                "the base model in the program that trained it"
            )
        dim, options = self.algorithm.describe(geometry, self.tensors)
        if self.algorithm.alpha_option:
            options[self.algorithm.alpha_option] = self.alpha or 0.0
        return dim or (max(1, round(self.alpha)) if self.alpha and math.isfinite(self.alpha) else 1), options

    @property
    def bias_change(self) -> Tensor | None:
        """[O], what it adds to the layer's bias; None if that is nothing."""
        change = self.tensors.get(self.algorithm.bias_key)
        return change if change is not None and bool(change.any()) else None

    @property
    def parts(self) -> tuple[int, ...] | None:
        """Output rows of parts with adapters of their own, () for none; None where the file does not show it."""
        return self.algorithm.rows_of_parts(self.tensors)

    def build(self, geometry: Geometry) -> Adapter:
        """The adapter of this layer with the file's values.

        Raises:
            ValueError: the tensors do not fit the geometry.
        """
        adapter = make_adapter(self.algorithm, geometry, *self.describe(geometry), self.parts or ())
        adapter.to(torch.float64 if self._wide() else torch.float32)
        adapter.unpack_(self.tensors)
        return adapter

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without alpha, with alpha 0, and for a form without rank."""
        rank = self.algorithm.shown_rank(self.tensors)
        return self.alpha / rank if rank and self.alpha else 1.0

    def _wide(self) -> bool:
        return all(t.dtype == torch.float64 for t in self.tensors.values() if t.is_floating_point())


def assumptions(layers: Iterable[SavedLayer]) -> list[str]:
    """What is taken for granted of a file's layers, for the log."""
    counts = Counter(layer.algorithm.assumed(layer.tensors) for layer in layers)
    return [f"{text} ({count} layers)" for text, count in counts.items() if text]


def unknown_form(source: str, name: str, suffix: str) -> str:
    """Message: half a layer read as plain LoRA would have another strength, so it is refused."""
    return f"{source}: {name} has {suffix}, a form which this version does not know; convert the file to a plain one"


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether these are the keys of an adapter file (any program's), not of a model."""
    endings = {key.partition(".")[2] for key in keys}
    return recognise(endings) is not None or any(key.endswith((".lora_A.weight", ".lora_down.weight")) for key in keys)


def decode(tensors: Mapping[str, Tensor], own_class: bool = True) -> tuple[dict[str, SavedLayer], list[str]]:
    """Group a file's tensors into layers, whatever its dialect; the second list holds keys that no algorithm knows.

    Args:
        own_class: see twins.right_names.
    """
    flags = dialects.Flags.of(tensors)
    dialect = flags.dialect
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key not in dialect.flags and key != dialect.whole[0]:
            name, _, suffix = key.partition(".")
            groups.setdefault(dialects.own_name(name), {})[suffix] = tensor
    layers, unknown = {}, []
    for name, written in twins.rightly_named(groups, own_class).items():
        group = dialects.own_suffixes(written)
        alpha = group.pop("alpha", None)
        algorithm = recognise(group)
        magnitude = group.pop(dialect.magnitude, None) if algorithm is not None else None
        if algorithm is None or not all(map(algorithm.knows, group)):
            unknown += [f"{name}.{suffix}" for suffix in group if algorithm is None or not algorithm.knows(suffix)]
            continue
        value = None if alpha is None else float(alpha)
        suffix, axis = dialect.rank
        if value is not None and flags.rs_lora and suffix in group:
            value *= math.sqrt(group[suffix].shape[axis])
        if value is not None and dialect.whole[0] in tensors:
            group = dialect.scaled(group, value)
        own, value = algorithm.portable(group, value)
        folded = magnitude is not None and bool(dialect.fold_flag)
        layers[name] = SavedLayer(name, algorithm, dict(own), value, magnitude, folded)
    return layers, unknown


def encode(layers: Sequence[AdaptedLayer], form: dialects.Form = _PORTABLE) -> dict[str, Tensor]:
    """Saved tensors of live layers, on their device and in their dtype; alpha in fp32."""
    tensors: dict[str, Tensor] = {}
    dialect = form.dialect
    for layer in layers:
        name, packed = dialect.written_name(layer.lora_name), layer.adapter.pack()
        for suffix, tensor in packed.items():
            tensors[f"{name}.{dialect.written_suffix(suffix)}"] = tensor
        if layer.magnitude is not None:
            magnitude = layer.folded(layer.magnitude.detach()) if dialect.fold_flag else layer.magnitude.detach()
            tensors[f"{name}.{dialect.magnitude}"] = magnitude.flatten() if dialect.flat else magnitude
        if layer.adapter.saves_alpha or twins.is_marked(layer.lora_name, packed):
            rank = layer.adapter.shown_rank(packed) or layer.adapter.record.saved_rank
            alpha = form.alpha(layer.alpha_at(rank), rank)
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors | form.network_keys(any(layer.magnitude is not None for layer in layers))
