"""Merging straight from files: no trainer and no model object needed, only weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers.adapted import AdaptedLayer
from ..tensors import base_weight
from ..tensors.geometry import Geometry
from . import codec, reader, weight_names
from .checkpoint import Checkpoint, check_free
from .codec import SavedLayer
from .weight_names import Target

SCALES = ("scale_weight", "weight_scale")  # beside a weight in fp8: the trainers' name, and another program's
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # as safetensors spells them


def merged_weight(saved: SavedLayer, weight: Tensor, multiplier: float = 1.0) -> Tensor:
    """W' of one layer, by the formula of the forward pass.

    Args:
        saved: the layer as `codec.decode` found it.
        weight: base weight [O, I, *kernel], fp32 or wider.

    Raises:
        ValueError: the file's tensors do not fit the weight.
    """
    bias = saved.tensors.get("diff_b")
    if bias is not None and bool(bias.any()):
        raise ValueError(
            f"{saved.name} changes a bias (diff_b), which cannot be merged from the weight alone: apply the network to "
            "its model and merge there"
        )
    geometry = Geometry.of_weight(weight.shape)
    adapter, base = saved.build(geometry).to(weight.device), nn.Identity()
    base.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    scale = saved.scale(adapter.record.saved_rank)
    layer = AdaptedLayer(saved.name, base, adapter, scale, dora=saved.side(geometry))
    layer.take_magnitude(saved.magnitude)
    return layer.new_weight(weight, multiplier).detach()


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file to be merged, and how strongly.

    Attributes:
        layers: saved name -> layer.
    """

    path: Path
    multiplier: float
    layers: dict[str, SavedLayer]

    @classmethod
    def open(cls, path: Path, multiplier: float) -> AdapterFile:
        """Read it.

        Raises:
            ValueError: it is no adapter, or has a form that we do not know.
        """
        layers, unknown = codec.decode(reader.read_tensors(path)[0])
        if not layers:
            raise ValueError(f"{path} has no adapter that we know; its keys look like {next(iter(unknown), 'nothing')}")
        if unknown:
            name, _, suffix = unknown[0].partition(".")
            raise ValueError(codec.unknown_form(str(path), name, suffix))
        return cls(path, multiplier, layers)


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
    adapters: Sequence[AdapterFile]
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

    def matched(self, adapter: AdapterFile) -> list[str]:
        """Its layers that the checkpoint has."""
        return [name for name in adapter.layers if name in self.targets]

    def unmatched(self, adapter: AdapterFile) -> list[str]:
        """Its layers that the checkpoint has not."""
        return [name for name in adapter.layers if name not in self.targets]

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
        whole = torch.cat([_swap(old) if swapped else old for old in olds])
        for adapter in self.adapters:
            if name in adapter.layers:
                whole = merged_weight(adapter.layers[name], whole, adapter.multiplier)
        changed: dict[str, Tensor] = {}
        parts = whole.split([len(old) for old in olds])
        for key, store, old, part in zip(target.keys, stores, olds, parts, strict=True):
            self.roundings.append(base_weight.change(store, old, _swap(part) if swapped else part))
            changed[key] = store.weight.detach()
            for scale in self._scales(key):
                changed[scale] = store.get_buffer(SCALES[0]).reshape(self.checkpoint.shapes[scale])
        return changed

    def _load(self, key: str) -> _Stored:
        store = _Stored(self.checkpoint.tensor(key))
        for name in self._scales(key):
            scale = self.checkpoint.tensor(name)
            store.register_buffer(SCALES[0], scale.reshape(-1, 1) if scale.dim() == 1 and len(scale) > 1 else scale)
        return store

    def _scales(self, key: str) -> list[str]:
        stem = key.removesuffix("weight")
        return [stem + name for name in SCALES if stem + name in self.checkpoint.shapes][:1]

    def _nothing(self, adapter: AdapterFile) -> str:
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
