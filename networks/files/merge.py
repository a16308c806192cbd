"""Merging straight from files: no trainer and no model object needed, only weights."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import located
from ..archs import ARCHS
from ..foreign.texts import parse_json
from ..tensors import base_weight
from ..tensors.norms import weight_geometry
from . import dotted, stored, weight_names
from .adapter_file import AdapterFile, FileTensors, Naming
from .checkpoint import Checkpoint, check_free
from .codec import SavedLayer
from .merged import merged_bias, merged_weight
from .places import Allowance, Missing, find_missing, part_of
from .weight_names import Piece

MERGED = "networks_merged"  # list of (file, multiplier) in the metadata of a checkpoint, the newest last


@dataclass(frozen=True)
class MergeInput:
    """An adapter file to be merged, and how strongly."""

    path: Path
    multiplier: float
    file: AdapterFile

    @property
    def families(self) -> Mapping[str, str]:
        """Saved name of each of its layers, parts of layers included -> the kind of layer that it is for."""
        return self.file.families

    def changes_bias(self, name: str) -> bool:
        return self.multiplier != 0 and self.file.changes_bias(name)

    @classmethod
    def open(cls, path: Path, multiplier: float, keys: Collection[str] = (), prefix: str = "") -> MergeInput:
        """Read it.

        Args:
            path: of the file.
            multiplier: how strongly it is merged.
            keys: of the checkpoint, by which names in other programs' spelling are understood.
            prefix: of saved names, where a text encoder's keys fit several.

        Raises:
            ValueError: it is no adapter, is broken, or has a form that we do not know.
        """
        tensors = FileTensors(path)
        return cls(path, multiplier, tensors.opened(naming_for(tensors, keys, prefix)).all_read())

    @property
    def assumed(self) -> list[str]:
        """What is taken for granted of its layers."""
        return self.file.assumed


def naming_for(tensors: Mapping[str, Tensor], keys: Collection[str], prefix: str = "") -> Naming:
    """By the names of which architecture the layers of a file are in a checkpoint: that of the largest share of them,
    not of the largest number, since architectures join different layers; the file's own names where they do.

    Args:
        tensors: of the file.
        keys: of the checkpoint.
        prefix: of saved names, where a text encoder's keys fit several.

    Raises:
        ValueError: a weight fits the names of several models, and no prefix says which.
    """
    own_class, paths = weight_names.is_own(keys), dotted.layers(tensors)
    best, most, problem = Naming(own_class=own_class), 0.0, None
    for arch in (None, *ARCHS):
        naming = Naming(arch, own_class=own_class)
        names = [{share.name for share in found} for found in naming.shares(paths).values()]
        try:
            there = weight_names.find(keys, set().union(*names), prefix).keys()
        except ValueError as error:
            if arch is None:
                raise
            problem = problem or error
            continue
        share = sum(one <= there for one in names) / len(names) if names else 1.0
        if share > most:
            best, most = naming, share
        if most == 1.0:
            break
    if problem and not most:
        raise problem
    return best


@dataclass
class _Group:
    """Layers that share weights, and the keys of these."""

    names: list[str]
    keys: list[str]


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
        names = {name for adapter in self.adapters for name in adapter.families}
        self.conversions: dict[str, int] = {}  # what layers of files had to become, and how often
        self.targets = weight_names.find(self.checkpoint.shapes, names, self.prefix)
        self.roundings: list[base_weight.Rounding] = []
        self._careful = False
        for adapter in self.adapters:
            if not self.matched(adapter):
                raise ValueError(self._nothing(adapter))
        self._groups: dict[str, _Group] = {}  # key of a tensor that changes -> what changes with it
        for name, target in self.targets.items():
            group = _Group([name], [*target.keys, *self._bias_keys(name)])
            others = {id(other): other for key in group.keys if (other := self._groups.get(key))}
            for other in others.values():
                group.names[:0], group.keys[:0] = other.names, other.keys
            self._groups |= dict.fromkeys(group.keys, group)
        stored.check(self.checkpoint, self._groups)
        scales = {stored.scale_key(self.checkpoint, key): group for key, group in self._groups.items()}
        self._groups |= {scale: group for scale, group in scales.items() if scale}

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
        return [name for name in adapter.families if name in self.targets]

    def unmatched(self, adapter: MergeInput) -> list[str]:
        """Its layers that the checkpoint has not."""
        return [name for name in adapter.families if name not in self.targets]

    def missing(self, adapter: MergeInput, allowance: Allowance) -> Missing:
        """What of a file finds no weight.

        Raises:
            ValueError: that is too much.
        """
        families = adapter.families
        placed = self.matched(adapter)
        held = weight_names.held(self.checkpoint.shapes) | {part_of(name) for name in placed}
        if self.prefix:
            held = {self.prefix}
        names = weight_names.all_names(self.checkpoint.shapes)
        return find_missing(families, placed, held, weight_names.PREFIXES, (), allowance, str(adapter.path), names)

    @property
    def changed(self) -> Collection[str]:
        """Keys of the tensors that are written anew."""
        return self._groups.keys()

    def check(self) -> None:
        """Whether every layer fits its weight, found out before anything is computed.

        Raises:
            ValueError: with the file, the layer and the weight.
        """
        for adapter in self.adapters:
            for name in self.matched(adapter):
                target, shape = self.targets[name], self._shape(name)
                with located(f"{adapter.path}: {name} and {target.keys[0]}"):
                    for piece in target.pieces:
                        piece.cut(torch.empty(self.checkpoint.shapes[piece.key], device="meta"))
                    saved = adapter.file.layers.get(name)
                    if saved is not None:
                        geometry = weight_geometry(shape)
                        saved.describe(geometry)
                        saved.side(geometry)
                        merged_bias(saved, torch.empty(shape[0], device="meta"))

    def write(self, out: Path, progress: Callable[[str, int], None] = lambda key, size: None) -> str:
        """Write the merged checkpoint, atomically.

        Returns:
            A warning about strength that was lost in fp8, or "".

        Raises:
            ValueError: tensors do not fit, or the output is in the way; nothing is left behind.
        """
        check_free(self.checkpoint, out)
        told = [{"file": a.path.name, "multiplier": a.multiplier} for a in self.adapters]
        self.checkpoint.write(out, self._changed, {MERGED: json.dumps([*self._earlier(), *told])}, progress)
        return base_weight.rounding_warning(self.roundings)

    def _earlier(self) -> list[Any]:
        """What was merged into the checkpoint before, where it says so."""
        said = (header.metadata.get(MERGED, "[]") for header in self.checkpoint.headers.values())
        try:
            found = parse_json(next(said, "[]"))
        except ValueError:
            return []
        return found if isinstance(found, list) else []

    def _changed(self, key: str) -> dict[str, Tensor]:
        group = self._groups.get(key)
        if group is None:
            return {}
        try:
            return self._merge(group.names)
        except base_weight.NotFinite:
            self._careful = True  # once more, to find out whose values those are
            return self._merge(group.names)

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
        stores: dict[str, stored.Stored] = {}
        wholes: dict[str, Tensor] = {}

        def read(piece: Piece) -> Tensor:
            """Rows of a weight as they are by now; it is kept where others of its rows may be wanted, too."""
            whole = wholes.get(piece.key)
            if whole is None:
                stores[piece.key] = stored.load(self.checkpoint, piece.key)
                whole = self._read(piece.key, stores[piece.key])
            if piece.count > 1:
                wholes[piece.key] = whole
            with located(f"{self.checkpoint.path}: {piece.key}"):
                return piece.cut(whole)

        for name, pieces in layers.items():
            rows = new(name, self._joined(name, pieces, read))
            for piece, part in zip(pieces, rows.split([self._rows(piece) for piece in pieces]), strict=True):
                wholes[piece.key] = piece.put(wholes.get(piece.key, part), part)
        changed: dict[str, Tensor] = {}
        for key, store in stores.items():
            changed |= self._written(key, store, wholes.pop(key))
        return changed

    def _written(self, key: str, store: stored.Stored, new: Tensor) -> dict[str, Tensor]:
        """The tensors of one weight, with the new value in the form in which the old one was stored."""
        with located(f"{self.checkpoint.path}: {key}"):
            self.roundings.append(base_weight.change(store, new))
        if store.scale is None:
            return {key: store.weight.detach()}
        scale = stored.scale_key(self.checkpoint, key)
        return {key: store.weight.detach(), scale: store.scale.reshape(self.checkpoint.shapes[scale])}

    def _read(self, key: str, store: stored.Stored) -> Tensor:
        with located(f"{self.checkpoint.path}: {key}"):
            weight = base_weight.read(store, self.device)
            if self._careful and not _is_finite(weight):
                raise ValueError("it has NaN or infinite values: download or make the checkpoint again")
        return weight

    def _rows(self, piece: Piece) -> int:
        """How many a layer has of a weight or of a bias."""
        shape = self.checkpoint.shapes[piece.key]
        return (shape[-1] if piece.transposed else shape[0]) // piece.count * piece.shares

    def _new_weight(self, name: str, weight: Tensor) -> Tensor:
        for adapter in self.adapters:
            if name in adapter.families:
                with located(f"{adapter.path}: {name} and {self.targets[name].keys[0]}"):
                    saved = self._layer(adapter, name)
                    start = functools.partial(self._base, name)
                    weight = merged_weight(saved, weight, adapter.multiplier, start, bias_too=True, in_place=True)
                    self._check_finite(weight, "weight")
        return weight

    def _layer(self, adapter: MergeInput, name: str) -> SavedLayer:
        """A layer of the file, put together for this checkpoint if need be."""
        file = adapter.file
        if name in file.layers:
            return file.layers[name]
        saved, text = file.layer_of(name, self._shape(name), self._base)
        if text:
            self.conversions[text] = self.conversions.get(text, 0) + 1
        return saved

    def _base(self, name: str) -> Tensor:
        """The weight of a layer as the checkpoint has it."""

        def read(piece: Piece) -> Tensor:
            return piece.cut(self._read(piece.key, stored.load(self.checkpoint, piece.key)))

        return self._joined(name, [piece.of(self.checkpoint.shapes) for piece in self.targets[name].pieces], read)

    def _joined(self, name: str, pieces: Sequence[Piece], read: Callable[[Piece], Tensor]) -> Tensor:
        """All rows of a layer, in memory of their own where it has several pieces; one after the other is read."""
        if len(pieces) == 1:
            return read(pieces[0])
        whole, first = torch.empty(0), 0
        for piece in pieces:
            rows = read(piece)
            if not first:
                whole = rows.new_empty(self._shape(name)[0], *rows.shape[1:])
            whole[first : first + len(rows)] = rows
            first += len(rows)
        return whole

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.targets[name].shape(self.checkpoint.shapes)

    def _new_bias(self, name: str, bias: Tensor) -> Tensor:
        for adapter in self._shifted(name):
            with located(f"{adapter.path}: {name} and {self.targets[name].pieces[0].bias_key}"):
                bias = merged_bias(self._layer(adapter, name), bias, adapter.multiplier)
                self._check_finite(bias, "bias")
        return bias

    def _check_finite(self, merged: Tensor, kind: str) -> None:
        if self._careful and not _is_finite(merged):
            raise ValueError(
                f"the merged {kind} has NaN or infinite values: lower the multiplier, or choose an earlier file"
            )

    def _shifted(self, name: str) -> list[MergeInput]:
        """The files that change the bias of a layer."""
        return [adapter for adapter in self.adapters if adapter.changes_bias(name)]

    def _nothing(self, adapter: MergeInput) -> str:
        keys = [key for key, shape in self.checkpoint.shapes.items() if len(shape) > 1]
        some = dict.fromkeys(keys[len(keys) * i // 3] for i in range(3) if keys)
        count, first = len(adapter.families), next(iter(adapter.families))
        return (
            f"{adapter.path}: none of its {count} layers, such as {first}, is in {self.checkpoint.path}, whose weights "
            f"are called like {', '.join(some) or 'nothing that is trained'}: choose the model it was trained for"
        )


def _is_finite(tensor: Tensor) -> bool:
    """By its extremes: a mask would need as much memory again."""
    return all(math.isfinite(value.item()) for value in tensor.aminmax())
