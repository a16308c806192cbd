"""Merging into weights that a trainer loads one by one, found by their key: no model object exists yet.

`merge_weights_to_tensor` is what a trainer calls that knows LoHa and LoKr; `extend` teaches a trainer that does not
(scripts/launch.py calls it). Both compute in fp32 and round once, to the dtype of the weight. `lend` is for generators
that build a network for a file, on a whole model.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableSet, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._errors import located
from .._version import __version__
from ..args.coerce import named
from ..files import dotted, reader, twins, weight_names
from ..files.adapter_file import AdapterFile, FileTensors, Naming, open_adapter
from ..files.codec import SavedLayer
from ..files.joining import rows_of
from ..files.merge import naming_for
from ..files.merged import merged_bias, merged_weight
from ..files.places import Allowance, find_missing, part_of
from ..files.weight_names import PREFIXES as PARTS
from ..files.weight_names import Piece, stem_of

log = logging.getLogger(__name__)

LOADER, READER = "load_safetensors_with_lora_and_fp8", "load_safetensors_with_fp8_optimization_and_hook"
PREFIXES = ("lora_unet_", "")  # of a saved name, before the weight's key; text encoders come renamed, without one
FROM_WEIGHTS = "create_arch_network_from_weights"
WRAPPED = "model_diffusion_model_"  # before the keys of some checkpoints; the trainers strip it after they merged
_NOTHING = Allowance(remedy="--allow_missing before the script's name")
_PART_OF = re.compile(r"(.*)(\d{5})(-of-)(\d{5})(.*)", re.DOTALL)
_MOST_FILES = 16  # of which it is known which keys a layer has
Fingerprint = tuple[tuple[str, float], ...]
Shapes = Mapping[str, tuple[int, ...]]
_merged_by_key: set[Fingerprint] = set()  # files, in this process


def merge_weights_to_tensor(
    model_weight: Tensor,
    lora_name: str,
    lora_sd: Mapping[str, Tensor],
    lora_weight_keys: MutableSet[str],
    multiplier: float,
    calc_device: torch.device | str,
) -> Tensor:
    """W' for one weight; the weight itself if the file has nothing for it.

    The host hands over a whole file with every weight: each call opens the layer of that weight alone, so that every
    tensor is opened once.

    Args:
        model_weight: W [O, I, *kernel], of any dtype, fp8 included.
        lora_name: the saved name of its layer.
        lora_sd: all tensors of the file.
        lora_weight_keys: keys that were not used yet; those used here leave it.
        multiplier: strength of the update.
        calc_device: where it is computed; the result is where the weight is.

    Raises:
        ValueError: the file's tensors do not fit, or are of a form that we do not know; or the multiplier is no number.
    """
    named("multiplier", multiplier)
    written = twins.name_in(lora_sd, lora_name)
    layers = _by_layer(lora_sd)
    keys = [key for key in layers.get(written, ()) if key in lora_weight_keys]
    if not keys:
        return model_weight
    flags = {key: lora_sd[key] for key in layers.get("", ())}  # of the whole file
    own = {lora_name + key.removeprefix(written): lora_sd[key] for key in keys}
    part = FileTensors(flags | own, "the file").opened(Naming())
    layer = part.layers.get(lora_name)
    if part.unread:
        part.all_read()
    if layer is None:
        return model_weight
    for key in keys:
        lora_weight_keys.discard(key)

    def new(weight: Tensor) -> Tensor:
        with located(f"{part.source}: {layer.name}"):
            return merged_weight(layer, weight, multiplier, in_place=True)

    return _rounded(model_weight, [f"{part.source}: {layer.name}"], new, calc_device).to(model_weight.device)


_files: dict[int, tuple[weakref.ref[Tensor], int, dict[str, list[str]]]] = {}  # by identity, see `_by_layer`


def _by_layer(tensors: Mapping[str, Tensor]) -> Mapping[str, list[str]]:
    """Layer -> its keys, "" -> those of no layer; found once for a file, which hosts hand over with every weight."""
    first = next(iter(tensors.values()), None)
    found = _files.get(id(tensors))
    if found is not None and found[0]() is first and found[1] == len(tensors):
        return found[2]
    layers: dict[str, list[str]] = {}
    for key in tensors:
        layers.setdefault(key.partition(".")[0] if "." in key else "", []).append(key)
    if len(_files) > _MOST_FILES:
        _files.clear()
    if first is not None:
        _files[id(tensors)] = weakref.ref(first), len(tensors), layers
    return layers


def _rounded(
    weight: Tensor, names: Sequence[str], new: Callable[[Tensor], Tensor], device: torch.device | str
) -> Tensor:
    """What `new` makes of a weight, or of a bias, in memory of its own, fp32 or wider; on `device`, in the weight's
    dtype."""
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.itemsize > 1 else torch.float32
    wide, limit = new(weight.to(device, dtype, copy=True)), torch.finfo(weight.dtype).max
    if weight.itemsize == 1:  # depending on torch and kind, a cast to fp8 makes inf or NaN of what is too large
        wide.clamp_(-limit, limit)
    if not all(abs(value.item()) <= limit for value in wide.aminmax()):
        raise ValueError(
            f"{', '.join(names)}: the merged values are NaN, or too large for {weight.dtype}: lower the multiplier, or "
            "choose an earlier file"
        )
    return wide.to(weight.dtype)


@dataclass(frozen=True)
class _Rows:
    """A weight or a bias, or a share of one, as rows of a layer of the file; stop None = all of them."""

    piece: Piece
    start: int = 0
    stop: int | None = None


@dataclass
class _File:
    """An adapter file, and which of its layers found their weight.

    Attributes:
        places: key of a tensor that is read -> (saved name, its rows) of the file's layers there.
        shapes: saved name -> shape of the whole layer, as far as the headers tell it.
    """

    file: AdapterFile
    multiplier: float
    allowance: Allowance
    places: dict[str, list[tuple[str, _Rows]]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    shifted: set[str] = field(default_factory=set)

    def find(self, known: Shapes) -> None:
        """Find its layers among the tensors that will be read, by key and shape."""
        for name, target in weight_names.find(known, self.file.families).items():
            self.shapes[name], start = target.shape(known), 0
            for piece in (piece.of(known) for piece in target.pieces):
                shape = known[piece.key]
                stop = start + (shape[-1] if piece.transposed else shape[0]) // piece.count * piece.shares
                self.places.setdefault(piece.key, []).append((name, _Rows(piece, start, stop)))
                self.places.setdefault(piece.bias_key, []).append((name, _Rows(piece.of_bias(), start, stop)))
                start = stop

    def layers_for(self, key: str) -> list[tuple[str, _Rows]]:
        """(saved name, rows) of its layers in a tensor; of one that is renamed as it is read, by the trainer's name."""
        if key in self.places:
            return self.places[key]
        flat = (key.removesuffix(".bias") if key.endswith(".bias") else stem_of(key)).replace(".", "_")
        names = [prefix + one for one in (flat, flat.removeprefix(WRAPPED)) for prefix in PREFIXES]
        return [(name, _Rows(Piece(key))) for name in names if name in self.file.families][:1]

    def merged(self, key: str, tensor: Tensor, start: Tensor) -> Tensor:
        """A weight, or a bias, with the file's change of it.

        Args:
            key: its own.
            tensor: fp32 or wider; written over.
            start: the same before other files were merged.

        Raises:
            ValueError: the file's tensors do not fit.
        """
        result, bias = tensor, key.endswith(".bias")
        for name, rows in self.layers_for(key):
            with located(f"{self.file.source}: {dotted.shown(name)}"):
                own = rows.piece.cut(result)
                saved = self._layer(name, rows, own, bias)
                if bias and saved.bias_change is None:
                    continue
                if bias:
                    new = merged_bias(saved, own, self.multiplier)
                else:
                    before = functools.partial(rows.piece.cut, start)
                    new = merged_weight(saved, own, self.multiplier, before, bias_too=True, in_place=True)
            result = rows.piece.put(result, new)
            (self.shifted if bias else self.used).add(name)
        return result

    def _layer(self, name: str, rows: _Rows, own: Tensor, bias: bool) -> SavedLayer:
        """The file's layer for the rows of a tensor.

        Args:
            own: those rows, as they are.
        """
        shapes = {**self.shapes, name: self.shapes.get(name, tuple(own.shape))}
        whole = rows.stop is None or rows.stop - rows.start == shapes[name][0]
        saved = self.file.layers.get(name)
        if saved is None:
            base = {name: own}.__getitem__ if whole and not bias else None
            saved, _ = self.file.layer_of(name, shapes[name], base)
        if whole:
            return saved
        assert rows.stop is not None
        return rows_of(saved, name, rows.start, rows.stop, None, shapes[name])[0]

    def report(self) -> None:
        """Say what was merged.

        Raises:
            ValueError: nothing was.
        """
        families, source = self.file.families, self.file.source
        missed = sorted(families.keys() - self.used)
        if families and not self.used:
            raise ValueError(
                f"{source}: no weight of this model belongs to its {len(families)} layers, e.g. "
                f"{dotted.shown(missed[0])}; choose a file that was trained on this model"
            )
        parts = {part_of(name) for name in self.used}
        missing = find_missing(families, self.used, parts, PARTS, (), self.allowance, source)
        for line in filter(None, (missing.warning(), missing.counted())):
            log.warning("%s: %s", source, line)
        lost = sorted(name for name in self.used - self.shifted if self.file.changes_bias(name))
        if lost:
            raise ValueError(
                f"{source}: {len(lost)} of its layers change a bias which this model has not, e.g. "
                f"{dotted.shown(lost[0])}: choose a file that was trained on this model"
            )
        if self.used:
            kinds = sorted({saved.algorithm.spec.name for name in self.used for saved in self.file.of(name)})
            log.info(
                "%s: %d layers (%s) merged at %g by kohya-networks %s",
                source, len(self.used), ", ".join(kinds), self.multiplier, __version__,
            )  # fmt: skip


def _strengths(given: float | Sequence[float] | None, count: int) -> list[float]:
    """One per file, 1 where none is given. A bare number is the default of an option that takes a list."""
    values = [given] * count if isinstance(given, (int, float)) else [*(given or ())]
    return [named("lora_multiplier", value) for value in [*values, *[1.0] * count][:count]]


def extend(lora_utils: ModuleType, allowance: Allowance = _NOTHING) -> None:
    """Let the module's loader merge what it does not know: LoHa, LoKr, Tucker forms, DoRA.

    All files are merged here, in their order: what DoRA does depends on the weight that it finds. The trainer's code
    stays as it is: the functions are wrapped in memory.

    Args:
        allowance: what of a file may be without a place.
    """
    load: Callable[..., Any] | None = getattr(lora_utils, LOADER, None)
    read: Callable[..., Any] | None = getattr(lora_utils, READER, None)
    if load is None or read is None:
        log.warning("%s has changed: it merges plain LoRA only, as it comes", lora_utils.__name__)
        return
    loader = _Loader(lora_utils, load, read, allowance)

    @functools.wraps(load)
    def load_and_merge(*args: Any, **kwargs: Any) -> Any:
        return loader.load_and_merge(*args, **kwargs)

    setattr(lora_utils, LOADER, load_and_merge)


@dataclass(frozen=True)
class _Loader:
    """A trainer's function that loads weights and merges adapter files into them, with ours in the place of its merge.

    Attributes:
        load: the function itself, without files to merge.
        read: what it calls by its global name to read weights, with a hook on each.
    """

    module: ModuleType
    load: Callable[..., Any]
    read: Callable[..., Any]
    allowance: Allowance

    def load_and_merge(self, *args: Any, **kwargs: Any) -> Any:
        """Called as `load`."""
        call = inspect.signature(self.load).bind(*args, **kwargs)
        given = call.arguments.get("lora_weights_list")
        if not given:
            return self.load(*args, **kwargs)
        strengths = _strengths(call.arguments.get("lora_multipliers"), len(given))
        known = _shapes(call.arguments.get("model_files"))
        sources = [f"adapter file {number} of {len(given)}" for number in range(1, len(given) + 1)]
        files = [self._open(*one, known) for one in zip(given, strengths, sources, strict=True)]
        call.arguments.update(lora_weights_list=None, lora_multipliers=None)
        with self._merging(files, call.arguments["calc_device"]):
            result = self.load(*call.args, **call.kwargs)
        for file in files:
            file.report()
        _merged_by_key.update(map(_fingerprint, given))
        return result

    def _open(self, tensors: Mapping[str, Tensor], strength: float, source: str, known: Shapes) -> _File:
        """A file, by the names of the model that has these tensors."""
        opened = open_adapter(tensors, naming_for(tensors, known), source).all_read()
        for text in opened.assumed:
            log.info("%s: %s", source, text)
        file = _File(opened, strength, self.allowance)
        file.find(known)
        return file

    @contextmanager
    def _merging(self, files: Sequence[_File], device: torch.device) -> Iterator[None]:
        """In here, what `load` reads is merged."""

        @functools.wraps(self.read)
        def read_and_merge(*args: Any, **kwargs: Any) -> Any:
            call = inspect.signature(self.read).bind(*args, **kwargs)
            call.arguments["weight_hook"] = _hook(call.arguments.get("weight_hook"), files, device)
            return self.read(*call.args, **call.kwargs)

        setattr(self.module, READER, read_and_merge)
        try:
            yield
        finally:
            setattr(self.module, READER, self.read)


def _shapes(paths: Any) -> dict[str, tuple[int, ...]]:
    """Key -> shape of what a trainer is about to read; {} where it does not say, or reads something else."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths or ():
            for part in _parts(str(path)):
                found |= reader.read_header(part).shapes
    except (ValueError, OSError):
        return {}
    return found


def _parts(path: str) -> list[str]:
    """All files of one that is divided: `model-00001-of-00003.safetensors` stands for three."""
    match = _PART_OF.fullmatch(path)
    if match is None:
        return [path]
    start, number, middle, count, end = match.groups()
    return [f"{start}{i:0{len(number)}}{middle}{count}{end}" for i in range(1, int(count) + 1)]


def _hook(theirs: Callable[..., Tensor] | None, files: Sequence[_File], device: torch.device) -> Callable[..., Tensor]:
    """The trainer's hook on each weight that it reads, followed by ours."""

    def merge(key: str, weight: Tensor, keep_on_calc_device: bool = False) -> Tensor:
        if theirs is not None:
            weight = theirs(key, weight, keep_on_calc_device=keep_on_calc_device)
        names = [f"{file.file.source}: {dotted.shown(name)}" for file in files for name, _ in file.layers_for(key)]
        if not names:
            return weight

        def new(wide: Tensor) -> Tensor:
            start = wide.clone() if len(files) > 1 else wide  # which the first file changes
            for file in files:
                wide = file.merged(key, wide, start)
            return wide

        merged = _rounded(weight, names, new, device)
        return merged if keep_on_calc_device else merged.to(weight.device)

    return merge


def lend(module: ModuleType, ours: ModuleType) -> None:
    """Let a generator build our network for a file: theirs skips magnitudes, flags, LoHa and LoKr without a word.

    Args:
        module: of the trainer, musubi_tuner.networks.lora_flux.
        ours: the entry of the same name.
    """
    create: Callable[..., Any] = getattr(ours, FROM_WEIGHTS)

    @functools.wraps(create)
    def from_weights(multiplier: float, weights_sd: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if _fingerprint(weights_sd) in _merged_by_key:  # FLUX.2 with --from_file
            log.warning("this file is in the weights since they were loaded: it is not merged a second time")
            multiplier = 0.0
        return create(multiplier, weights_sd, *args, **kwargs)

    setattr(module, FROM_WEIGHTS, from_weights)


def _fingerprint(tensors: Mapping[str, Tensor]) -> Fingerprint:
    return tuple(sorted((key, float(tensor.real.float().sum())) for key, tensor in tensors.items()))
