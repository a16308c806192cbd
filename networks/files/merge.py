"""Merging straight from files: no trainer and no model object needed, only weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from .._errors import located
from ..archs import ARCHS
from ..tensors import base_weight
from . import codec, dialects, dotted, stored, weight_names
from .adapter_file import AdapterFile, FileTensors, Naming
from .checkpoint import Checkpoint, check_free
from .codec import SavedLayer
from .merged import merged_bias, merged_weight
from .places import Allowance, Missing, find_missing, part_of
from .weight_names import Piece


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

    @property
    def assumed(self) -> list[str]:
        """What is taken for granted of its layers."""
        return codec.assumptions(self.layers.values())


def _naming(tensors: FileTensors, keys: Collection[str]) -> Naming:
    """Keys with dots, or with the prefix of LyCORIS' own wrapper, by the architecture under whose names the largest
    share of the file's layers is in the checkpoint; the first if none is. Not by their number: architectures join
    different layers."""
    own_class = weight_names.is_own(keys)
    if not dotted.has_dots(tensors) and not any(key.startswith(dialects.WRAPPER) for key in tensors):
        return Naming(own_class=own_class)
    best, most, problem = Naming(own_class=own_class), -1.0, None
    for arch in ARCHS:
        naming = Naming(arch, own_class=own_class)
        try:
            names = {key.partition(".")[0] for key in naming.apply(tensors, tensors.source)}
            share = len(weight_names.find(keys, names)) / len(names)
        except ValueError as error:
            problem = problem or error
            continue
        if share > most:
            best, most = naming, share
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
        ValueError: a file has nothing for this checkpoint or is broken, or a weight cannot be merged into.
    """

    checkpoint: Checkpoint
    adapters: Sequence[MergeInput]
    prefix: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        names = {name for adapter in self.adapters for name in adapter.layers}
        self.targets = weight_names.find(self.checkpoint.shapes, names, self.prefix)
        self.roundings: list[base_weight.Rounding] = []
        self._ready: dict[str, Tensor] = {}
        for adapter in self.adapters:
            if not self.matched(adapter):
                raise ValueError(self._nothing(adapter))
        self._names: dict[str, list[str]] = {}  # of the layers that a weight holds
        self._owner: dict[str, str] = {}  # key of a tensor that changes -> the weight with which it is computed
        for name, target in self.targets.items():
            for key in target.keys:
                self._names.setdefault(key, []).append(name)
            self._owner |= dict.fromkeys((*target.keys, *self._bias_keys(name)), target.keys[0])
        stored.check(self.checkpoint, self._owner)
        scales = {stored.scale_key(self.checkpoint, key): owner for key, owner in self._owner.items()}
        self._owner |= {scale: owner for scale, owner in scales.items() if scale}

    def _bias_keys(self, name: str) -> list[str]:
        """Of the biases that change with a layer."""
        shifting = self._shifted(name)
        keys = [piece.bias_key for piece in self.targets[name].pieces if shifting]
        lacking = [key for key in keys if key not in self.checkpoint.shapes]
        if lacking:
            raise ValueError(
                f"{shifting[0].path}: {name} changes a bias, but {self.checkpoint.path} has no {lacking[0]}: choose "
                "the model that it was trained for"
            )
        return keys

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
        families = {name: saved.algorithm.spec.family for name, saved in adapter.layers.items()}
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
        return base_weight.rounding_warning(self.roundings)

    def _changed(self, key: str) -> Tensor | None:
        owner = self._owner.get(key)
        if owner is not None and key not in self._ready:
            self._ready.update(self._merge(self._names[owner]))
        return self._ready.pop(key, None)

    @torch.no_grad()
    def _merge(self, names: Sequence[str]) -> dict[str, Tensor]:
        """New tensors of all keys of the layers that share weights, scales included."""
        pieces = {name: [piece.of(self.checkpoint.shapes) for piece in self.targets[name].pieces] for name in names}
        biases = {name: [piece.of_bias() for piece in pieces[name]] for name in names if self._shifted(name)}
        return self._rewritten(pieces, self._new_weight) | self._rewritten(biases, self._new_bias)

    def _rewritten(
        self, layers: Mapping[str, Sequence[Piece]], new: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """New tensors of all keys in these layers, with what `new` makes of the rows of each."""
        keys = dict.fromkeys(piece.key for pieces in layers.values() for piece in pieces)
        stores = {key: stored.load(self.checkpoint, key) for key in keys}
        olds = {key: self._read(key, store) for key, store in stores.items()}
        news = dict(olds)
        for name, pieces in layers.items():
            with located(f"{self.checkpoint.path}: {pieces[0].key}"):
                rows = [piece.cut(olds[piece.key]) for piece in pieces]
            parts = new(name, torch.cat(rows) if len(rows) > 1 else rows[0]).split([len(part) for part in rows])
            for piece, part in zip(pieces, parts, strict=True):
                news[piece.key] = piece.put(news[piece.key], part, olds[piece.key])
        changed: dict[str, Tensor] = {}
        for key, store in stores.items():
            changed |= self._written(key, store, olds.pop(key), news.pop(key))
        return changed

    def _written(self, key: str, store: stored.Stored, old: Tensor, new: Tensor) -> dict[str, Tensor]:
        """The tensors of one weight, with the new value in the form in which the old one was stored."""
        with located(f"{self.checkpoint.path}: {key}"):
            self.roundings.append(base_weight.change(store, old, new))
        if store.scale is None:
            return {key: store.weight.detach()}
        scale = stored.scale_key(self.checkpoint, key)
        return {key: store.weight.detach(), scale: store.scale.reshape(self.checkpoint.shapes[scale])}

    def _read(self, key: str, store: stored.Stored) -> Tensor:
        with located(f"{self.checkpoint.path}: {key}"):
            weight = base_weight.read(store, self.device)
            if not _is_finite(weight):
                raise ValueError("it has NaN or infinite values: download or make the checkpoint again")
        return weight

    def _new_weight(self, name: str, weight: Tensor) -> Tensor:
        start = weight
        for adapter in self.adapters:
            if name in adapter.layers:
                with located(f"{adapter.path}: {name} and {self.targets[name].keys[0]}"):
                    weight = merged_weight(adapter.layers[name], weight, adapter.multiplier, start, bias_too=True)
                    _check_finite(weight, "weight")
        return weight

    def _new_bias(self, name: str, bias: Tensor) -> Tensor:
        for adapter in self._shifted(name):
            with located(f"{adapter.path}: {name} and {self.targets[name].pieces[0].bias_key}"):
                bias = merged_bias(adapter.layers[name], bias, adapter.multiplier)
                _check_finite(bias, "bias")
        return bias

    def _shifted(self, name: str) -> list[MergeInput]:
        """The files that change the bias of a layer."""
        found = [a for a in self.adapters if name in a.layers and a.multiplier != 0]
        return [a for a in found if a.layers[name].bias_change is not None]

    def _nothing(self, adapter: MergeInput) -> str:
        names = sorted(weight_names.all_names(self.checkpoint.shapes))
        first = next(iter(adapter.layers))
        near = get_close_matches(first, names, n=3, cutoff=0.3) or names[:3]
        return (
            f"{adapter.path}: none of its {len(adapter.layers)} layers, such as {first}, is in {self.checkpoint.path}; "
            f"names there look like {', '.join(near) or 'nothing that is trained'}: choose the model it was trained for"
        )


def _is_finite(tensor: Tensor) -> bool:
    """By its extremes: a mask would need as much memory again."""
    return all(math.isfinite(value.item()) for value in tensor.aminmax())


def _check_finite(merged: Tensor, kind: str) -> None:
    if not _is_finite(merged):
        raise ValueError(
            f"the merged {kind} has NaN or infinite values: lower the multiplier, or choose an earlier file"
        )
