"""Merging straight from files: no trainer and no model object needed, only weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from ..archs import ARCHS
from ..layers.adapted import AdaptedLayer
from ..tensors import base_weight
from ..tensors.norms import weight_geometry
from . import dialects, dotted, weight_names
from .adapter_file import AdapterFile, FileTensors, Naming
from .checkpoint import Checkpoint, check_free
from .codec import SavedLayer
from .places import Allowance, Missing, find_missing, part_of
from .weight_names import Target

SCALES = ("scale_weight", "weight_scale")  # beside a weight in fp8: the trainers' name, and another program's
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # as safetensors spells them


def merged_weight(
    saved: SavedLayer, weight: Tensor, multiplier: float = 1.0, start: Tensor | None = None, bias_too: bool = False
) -> Tensor:
    """W' of one layer, by the formula of the forward pass.

    Args:
        saved: the layer as `codec.decode` found it.
        weight: base weight [O, I, *kernel], or [C] of a normalisation layer; fp32 or wider.
        start: the same before other files were merged into it, where the adapter's start values come from.
        bias_too: the caller sees to the bias (`merged_bias`).

    Raises:
        ValueError: the file's tensors do not fit the weight, or would change a bias that is not merged.
    """
    if saved.bias_change is not None and not bias_too:
        raise ValueError(
            f"{saved.name} changes a bias ({saved.algorithm.bias_key}), which cannot be merged from the weight alone: "
            "apply the network to its model and merge there, or merge the file into the checkpoint (scripts/merge.py)"
        )
    geometry = weight_geometry(weight.shape)
    adapter, base = saved.build(geometry).to(weight.device), nn.Identity()
    base.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    layer = AdaptedLayer(saved.name, base, adapter, saved.scale, dora=saved.side(geometry))
    if start is not None and adapter.wants_base:
        with torch.no_grad():
            adapter.see_base(start)
    layer.see_base()
    layer.take_magnitude(saved.magnitude, saved.folded)
    return layer.new_weight(weight, multiplier).detach()


def merged_bias(saved: SavedLayer, bias: Tensor, multiplier: float = 1.0) -> Tensor:
    """The bias of one layer with the file's change of it.

    Args:
        bias: base bias [O], fp32 or wider.

    Raises:
        ValueError: the change does not fit the bias.
    """
    change = saved.bias_change
    if change is None or multiplier == 0:
        return bias
    if change.shape != bias.shape:
        raise ValueError(f"{saved.algorithm.bias_key} {tuple(change.shape)} does not fit a bias of {tuple(bias.shape)}")
    return bias + multiplier * change.to(bias)


@dataclass(frozen=True)
class MergeInput:
    """An adapter file to be merged, and how strongly.

    Attributes:
        layers: saved name -> layer.
    """

    path: Path
    multiplier: float
    file: AdapterFile

    @property
    def layers(self) -> Mapping[str, SavedLayer]:
        return self.file.layers

    @classmethod
    def open(cls, path: Path, multiplier: float, keys: Collection[str] = ()) -> MergeInput:
        """Read it.

        Args:
            keys: of the checkpoint, by which names in diffusers' spelling are understood.

        Raises:
            ValueError: it is no adapter, is broken, or has a form that we do not know.
        """
        tensors = FileTensors(path)
        return cls(path, multiplier, tensors.opened(_naming(tensors, keys)).all_read())


def _naming(tensors: FileTensors, keys: Collection[str]) -> Naming:
    """Keys with dots, or with the prefix of LyCORIS' own wrapper, by the architecture of which the checkpoint has the
    most layers; the first if it has none."""
    if not dotted.has_dots(tensors) and not any(key.startswith(dialects.WRAPPER) for key in tensors):
        return Naming()
    best, most, problem = Naming(), -1, None
    for arch in ARCHS:
        naming = Naming(arch)
        try:
            names = {key.partition(".")[0] for key in naming.apply(tensors, tensors.source)}
            count = len(weight_names.find(keys, names))
        except ValueError as error:
            problem = problem or error
            continue
        if count > most:
            best, most = naming, count
    if most < 0 and problem:
        raise problem
    return best


@dataclass
class CheckpointMerge:
    """Adapter files on the weights of a checkpoint: planned from keys, then written in one pass.

    Args:
        prefix: only layers with this prefix, where a text encoder's keys fit those of several.
        device: where it is computed.

    Raises:
        ValueError: a file has nothing for this checkpoint, or a weight cannot be merged into.
    """

    checkpoint: Checkpoint
    adapters: Sequence[MergeInput]
    prefix: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        names = {name for adapter in self.adapters for name in adapter.layers}
        self.targets = weight_names.find(self.checkpoint.shapes, names, self.prefix)
        self.roundings: list[base_weight.Rounding] = []
        self._layer_of = {key: name for name, target in self.targets.items() for key in target.keys}
        self._ready: dict[str, Tensor] = {}
        for adapter in self.adapters:
            if not self.matched(adapter):
                raise ValueError(self._nothing(adapter))
        for key in list(self._layer_of):
            entry = self.checkpoint.headers[self.checkpoint.where[key]].entries[key]
            if entry["dtype"] not in _FLOATS:
                raise ValueError(
                    f"{key} is stored as {entry['dtype']}: merge into the checkpoint in bf16, fp16 or fp8, then "
                    "quantise that"
                )
            self._layer_of.update({scale: self._layer_of[key] for scale in self._scales(key)})
        for name, target in self.targets.items():
            if self._shifted(name):
                lacking = [key for key in target.bias_keys if key not in self.checkpoint.shapes]
                if lacking:
                    raise ValueError(f"{name} changes a bias, but {self.checkpoint.path} has no {lacking[0]}")
                self._layer_of.update(dict.fromkeys(target.bias_keys, name))

    def matched(self, adapter: MergeInput) -> list[str]:
        """Its layers that the checkpoint has."""
        return [name for name in adapter.layers if name in self.targets]

    def unmatched(self, adapter: MergeInput) -> list[str]:
        """Its layers that the checkpoint has not."""
        return [name for name in adapter.layers if name not in self.targets]

    def missing(self, adapter: MergeInput, allowance: Allowance) -> Missing:
        """What of a file finds no weight.

        Raises:
            ValueError: that is too much.
        """
        families = {name: saved.algorithm.family for name, saved in adapter.layers.items()}
        placed = self.matched(adapter)
        held = weight_names.held(self.checkpoint.shapes) | {part_of(name) for name in placed}
        if self.prefix:
            held = {self.prefix}
        return find_missing(families, placed, held, weight_names.PREFIXES, (), allowance, str(adapter.path))

    def write(self, out: Path, progress: Callable[[str, int], None] = lambda key, size: None) -> str:
        """Write the merged checkpoint, atomically.

        Returns:
            A warning about strength that was lost in fp8, or "".

        Raises:
            ValueError: tensors do not fit, or the output is in the way; nothing is left behind.
        """
        check_free(self.checkpoint, out)
        told = [{"file": a.path.name, "multiplier": a.multiplier} for a in self.adapters]
        self.checkpoint.write(out, self._changed, {"networks_merged": json.dumps(told)}, progress)
        return base_weight.told(self.roundings)

    def _changed(self, key: str) -> Tensor | None:
        name = self._layer_of.get(key)
        if name is not None and key not in self._ready:
            try:
                self._ready.update(self._merge(name, self.targets[name]))
            except ValueError as error:
                raise ValueError(f"{name} and {key}: {error}") from None
        return self._ready.pop(key, None)

    @torch.no_grad()
    def _merge(self, name: str, target: Target) -> dict[str, Tensor]:
        """New tensors of all keys of one layer, scales included."""
        stores = [self._load(key) for key in target.keys]
        olds = [base_weight.read(store, self.device) for store in stores]
        swapped = target.swapped and olds[0].shape[0] == 2 * olds[0].shape[1]
        whole = start = torch.cat([_swap(old) if swapped else old for old in olds])
        for adapter in self.adapters:
            if name in adapter.layers:
                whole = merged_weight(adapter.layers[name], whole, adapter.multiplier, start, bias_too=True)
        changed: dict[str, Tensor] = {}
        parts = whole.split([len(old) for old in olds])
        for key, store, old, part in zip(target.keys, stores, olds, parts, strict=True):
            self.roundings.append(base_weight.change(store, old, _swap(part) if swapped else part))
            changed[key] = store.weight.detach()
            for scale in self._scales(key):
                changed[scale] = store.get_buffer(SCALES[0]).reshape(self.checkpoint.shapes[scale])
        if shifted := self._shifted(name):
            stored = [self.checkpoint.tensor(key) for key in target.bias_keys]
            wide = [t.to(self.device, torch.promote_types(t.dtype, torch.float32)) for t in stored]
            bias = torch.cat([_swap(t) if swapped else t for t in wide])
            for adapter in shifted:
                bias = merged_bias(adapter.layers[name], bias, adapter.multiplier)
            biases = zip(target.bias_keys, stored, bias.split([len(t) for t in stored]), strict=True)
            changed |= {key: (_swap(part) if swapped else part).to(old.dtype) for key, old, part in biases}
        return changed

    def _shifted(self, name: str) -> list[MergeInput]:
        """The files that change the bias of a layer."""
        found = [a for a in self.adapters if name in a.layers and a.multiplier != 0]
        return [a for a in found if a.layers[name].bias_change is not None]

    def _load(self, key: str) -> _Stored:
        store = _Stored(self.checkpoint.tensor(key))
        for name in self._scales(key):
            scale = self.checkpoint.tensor(name)
            store.register_buffer(SCALES[0], scale.reshape(-1, 1) if scale.dim() == 1 and len(scale) > 1 else scale)
        return store

    def _scales(self, key: str) -> list[str]:
        stem = key.removesuffix("weight")
        return [stem + name for name in SCALES if stem + name in self.checkpoint.shapes][:1]

    def _nothing(self, adapter: MergeInput) -> str:
        names = sorted(weight_names.all_names(self.checkpoint.shapes))
        first = next(iter(adapter.layers))
        near = get_close_matches(first, names, n=3, cutoff=0.3) or names[:3]
        return (
            f"{adapter.path}: none of its {len(adapter.layers)} layers, such as {first}, is in {self.checkpoint.path}; "
            f"names there look like {', '.join(near) or 'nothing that is trained'}: choose the model it was trained for"
        )


class _Stored(nn.Module):
    """A weight of a checkpoint, in the form in which it is stored."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def _swap(rows: Tensor) -> Tensor:
    """The two halves of the rows in the other order."""
    return torch.cat(rows.chunk(2)[::-1])
