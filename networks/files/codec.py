"""Live layers <-> saved tensors. The portable form: plain alpha / rank is the right strength in every reader.

A key is `<saved name>.<suffix>`; the saved name has no dot. `.alpha` is 0-d and fp32 whatever the other tensors are:
effective scale x saved rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..algos import ALGOS, Adapter, make_adapter, recognise, unstarted
from ..layers.adapted import AdaptedLayer
from ..layers.magnitude import magnitude_shape
from ..records.lora import LORA
from ..tensors.geometry import Geometry
from . import dialects, dotted, twins

_PORTABLE = dialects.FileFormat()
BESIDE = ("diff", LORA.bias_key, dotted.MODULATION)  # what some programs write for every layer that has such a value


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
        raise ValueError(
            f"a DoRA magnitude {shape} fits neither the rows nor the columns of {geometry.weight_shape}: choose "
            "the model that the file was trained for"
        )

    def describe(self, geometry: Geometry) -> tuple[int, dict[str, Any]]:
        """(dim, options) for this layer's own shape; a form without rank takes its dim from alpha."""
        if self.algorithm.spec.family != geometry.family:
            raise ValueError(
                f"the file has {self.algorithm.spec.name}, which is not for a layer of this kind ({geometry.kind}): "
                "choose the model that it was trained for"
            )
        if self.magnitude is not None and not self.algorithm.magnitudes:
            raise ValueError(
                f"the file has DoRA magnitudes of a layer of {self.algorithm.spec.name}, which has none here: merge it "
                "into the base model in the program that trained it"
            )
        dim, options = self.algorithm.describe(geometry, self.tensors)
        if self.algorithm.spec.bias_key:
            options["bias"] = self._has_bias(geometry)
        if self.algorithm.spec.alpha_option:
            options[self.algorithm.spec.alpha_option] = self.alpha or 0.0
        return dim or (max(1, round(self.alpha)) if self.alpha and math.isfinite(self.alpha) else 1), options

    def _has_bias(self, geometry: Geometry) -> bool:
        """Whether it has a change of the bias.

        Raises:
            ValueError: which does not fit.
        """
        key, size = self.algorithm.spec.bias_key, math.prod(geometry.weight_shape[:1])
        if key in self.tensors and self.algorithm.spec.family == Geometry.family and self.tensors[key].numel() != size:
            raise ValueError(f"{key} {tuple(self.tensors[key].shape)} does not fit a weight of {geometry.weight_shape}")
        return key in self.tensors

    def without_values(self) -> SavedLayer:
        """On the meta device, but for what says how the others are to be read."""
        tensors = {suffix: t if t.numel() <= 1 else t.to("meta") for suffix, t in self.tensors.items()}
        return replace(self, tensors=tensors, magnitude=None if self.magnitude is None else self.magnitude.to("meta"))

    @property
    def bias_change(self) -> Tensor | None:
        """[O], what it adds to the layer's bias; None if that is nothing."""
        change = self.tensors.get(self.algorithm.spec.bias_key)
        return change if change is not None and (change.is_meta or bool(change.any())) else None

    @property
    def parts(self) -> tuple[int, ...] | None:
        """Output rows of parts with adapters of their own, () for none; None where the file does not show it."""
        return self.algorithm.rows_of_parts(self.tensors)

    def build(self, geometry: Geometry) -> Adapter:
        """The adapter of this layer with the file's values.

        Raises:
            ValueError: the tensors do not fit the geometry.
        """
        with unstarted():
            adapter = make_adapter(self.algorithm, geometry, *self.describe(geometry), self.parts or ())
        adapter.to(torch.float64 if self._wide() else torch.float32)
        adapter.unpack_(self.tensors)
        return adapter

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without alpha, with alpha 0, and for a form without rank."""
        rank = self.algorithm.spec.shown_rank(self.tensors)
        return self.alpha / rank if rank and self.alpha else 1.0

    def on_cpu(self) -> SavedLayer:
        tensors = {suffix: tensor.detach().cpu() for suffix, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, magnitude=None if self.magnitude is None else self.magnitude.cpu())

    def _wide(self) -> bool:
        return all(t.dtype == torch.float64 for t in self.tensors.values() if t.is_floating_point())


def assumptions(layers: Iterable[SavedLayer]) -> list[str]:
    """What is taken for granted of a file's layers, for the log."""
    counts = Counter(layer.algorithm.assumed(layer.tensors) for layer in layers)
    return [f"{text} ({count} layers)" for text, count in counts.items() if text]


def unknown_form(source: str, name: str, suffix: str) -> str:
    """Message: half a layer read as plain LoRA would have another strength, so it is refused.

    Args:
        source: name of the file.
        name: of the layer.
        suffix: of its tensors which nobody knows, or of all that it has.
    """
    where = f"{source}: {dotted.shown(name)} has {suffix}"
    own = {dotted.SUFFIXES.get(one, one) for one in suffix.split(", ")}
    factors = own - {dotted.MAGNITUDE}
    if not factors:
        return f"{where} alone, without factors: the file is incomplete, download or save it again"
    lacking = min(filter(None, (cls.spec.lacks(factors) for cls in ALGOS.values())), key=len, default=frozenset())
    if lacking:
        missing = " and ".join(dotted.as_in(suffix, one) for one in sorted(lacking))
        return f"{where} without {missing}: the layer is incomplete, download or save the file again"
    return f"{where}, a form which this version does not know; convert the file to a plain one"


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether these are the keys of an adapter file (any program's), not of a model."""
    endings = {key.partition(".")[2] for key in keys}
    return recognise(endings) is not None or any(key.endswith((".lora_A.weight", f".{dotted.DOWN}")) for key in keys)


def decode(
    tensors: Mapping[str, Tensor], own_class: bool = True, flags: dialects.Flags | None = None
) -> tuple[dict[str, SavedLayer], list[str]]:
    """Group a file's tensors into layers, whatever its dialect. `adapter_file` does it once for each file.

    Args:
        tensors: saved name and suffix -> tensor.
        own_class: see twins.right_names.
        flags: of the same tensors, where they are known.

    Returns:
        Saved name -> layer, and the keys of layers with a value that no algorithm knows.
    """
    flags = flags or dialects.Flags.of(tensors)
    layers: dict[str, SavedLayer] = {}
    unknown: list[str] = []
    for name, group in twins.rightly_named(_groups(tensors, flags.dialect), own_class).items():
        alpha = group.pop("alpha", None)
        algorithm = recognise(group)
        magnitude = None if algorithm is None else group.pop(flags.dialect.magnitude, None)
        strange = _strange(group, algorithm)
        if algorithm is None or strange:
            alone = strange or [dotted.ALPHA]
            unknown += [f"{name}.{suffix}" if suffix else name for suffix in alone]
            continue
        values, portable_alpha = _portable(algorithm, group, None if alpha is None else float(alpha), flags)
        folded = magnitude is not None and bool(flags.dialect.fold_flag)
        layers[name] = SavedLayer(name, algorithm, values, portable_alpha, magnitude, folded)
    return layers, unknown


def _strange(suffixes: Iterable[str], algorithm: type[Adapter] | None) -> list[str]:
    """Those which the algorithm does not know; all of them without one."""
    return [suffix for suffix in suffixes if algorithm is None or not algorithm.spec.knows(suffix)]


def _without_nothing(group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without changes of biases, norms and the like which are 0 throughout. A whole difference of a matrix keeps its
    own."""
    if "diff" in group and group["diff"].dim() != 1:
        return group
    kept = {suffix: t for suffix, t in group.items() if suffix not in BESIDE or t.is_meta or bool(t.any())}
    return {} if kept.keys() == {dotted.ALPHA} != group.keys() else kept


def _groups(tensors: Mapping[str, Tensor], dialect: dialects.Dialect) -> dict[str, dict[str, Tensor]]:
    """Saved name -> our suffix -> tensor, without what is said of the whole file, and layers of which nothing is
    changed."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key not in dialect.flags and key != dialect.whole[0]:
            name, _, suffix = key.partition(".")
            groups.setdefault(dialects.own_name(name), {})[suffix] = tensor
    found = {name: _without_nothing(dialects.own_suffixes(group)) for name, group in groups.items()}
    return {name: group for name, group in found.items() if group}


def _portable(
    algorithm: type[Adapter], group: dict[str, Tensor], alpha: float | None, flags: dialects.Flags
) -> tuple[dict[str, Tensor], float | None]:
    """Tensors and alpha of a layer as the portable form has them: its scale is alpha / rank."""
    if alpha is not None:
        suffix, axis = flags.dialect.rank
        if flags.rs_lora and suffix in group:
            alpha *= math.sqrt(group[suffix].shape[axis])
        if flags.whole:
            group = flags.dialect.scaled(group, alpha)
    values, alpha = algorithm.portable(group, alpha)
    return dict(values), alpha


def saved_layer(layer: AdaptedLayer) -> SavedLayer:
    """A live layer as a file would have it; tensors on their device and in their dtype."""
    magnitude = None if layer.magnitude is None else layer.magnitude.detach()
    return saved_adapter(layer.lora_name, layer.adapter, layer.scale, magnitude)


def saved_adapter(name: str, adapter: Adapter, scale: float, magnitude: Tensor | None = None) -> SavedLayer:
    """An adapter as a file would have it.

    Args:
        name: saved name of its layer.
        adapter: on any device, the meta device too.
        scale: of the layer.
        magnitude: of DoRA.
    """
    values, alpha = adapter.pack(), None
    if adapter.saves_alpha or twins.is_marked(name, values):
        alpha = adapter.alpha_at(scale, adapter.spec.shown_rank(values) or adapter.laid_out.saved_rank)
    return SavedLayer(name, ALGOS[adapter.spec.file_algo], values, alpha, magnitude)


def written(layers: Iterable[SavedLayer], file_format: dialects.FileFormat) -> dict[str, Tensor]:
    """The tensors of a file of layers that are named and formed as its dialect has them."""
    return dotted.write(layers) if file_format.dialect.peft else write(layers, file_format)


def write(layers: Iterable[SavedLayer], file_format: dialects.FileFormat = _PORTABLE) -> dict[str, Tensor]:
    """The tensors of a file of these layers, the inverse of `decode`; alpha in fp32."""
    tensors: dict[str, Tensor] = {}
    dialect, magnitudes = file_format.dialect, False
    for layer in layers:
        name = dialect.written_name(layer.name)
        for suffix, tensor in layer.tensors.items():
            tensors[f"{name}.{dialect.written_suffix(suffix)}"] = tensor
        if layer.magnitude is not None:
            magnitudes = True
            tensors[f"{name}.{dialect.magnitude}"] = layer.magnitude.flatten() if dialect.flat else layer.magnitude
        if layer.alpha is not None:
            alpha = file_format.alpha(layer.alpha, layer.algorithm.spec.shown_rank(layer.tensors))
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors | file_format.network_keys(magnitudes)


def encode(layers: Sequence[AdaptedLayer], file_format: dialects.FileFormat = _PORTABLE) -> dict[str, Tensor]:
    """The tensors of a file of live layers, on their device and in their dtype; alpha in fp32."""
    return write([saved_layer(layer) for layer in layers], file_format)
