"""Merging into weights that a trainer loads one by one, found by their key: no model object exists yet.

`merge_weights_to_tensor` is what a trainer calls that knows LoHa and LoKr; `extend` teaches a trainer that does not
(scripts/launch.py calls it). Both compute in fp32 and round once, to the dtype of the weight. `lend` is for generators
that build a network for a file, on a whole model.
"""

from __future__ import annotations

import functools
import inspect
import logging
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
from ..files import codec, twins
from ..files.adapter_file import FileTensors, Naming, open_adapter
from ..files.codec import SavedLayer
from ..files.merged import merged_bias, merged_weight
from ..files.places import Allowance, find_missing, part_of
from ..files.weight_names import PREFIXES as PARTS
from ..files.weight_names import stem_of

log = logging.getLogger(__name__)

LOADER, READER = "load_safetensors_with_lora_and_fp8", "load_safetensors_with_fp8_optimization_and_hook"
PREFIXES = ("lora_unet_", "")  # of a saved name, before the weight's key; text encoders come renamed, without one
FROM_WEIGHTS = "create_arch_network_from_weights"
WRAPPED = "model_diffusion_model_"  # before the keys of some checkpoints; the trainers strip it after they merged
_NOTHING = Allowance(remedy="--allow_missing before the script's name")
Fingerprint = tuple[tuple[str, float], ...]
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
    keys = [key for key in lora_weight_keys if key.startswith(f"{written}.")]
    flags = {key: tensor for key, tensor in lora_sd.items() if "." not in key}  # of the whole file
    own = {lora_name + key.removeprefix(written): lora_sd[key] for key in keys}
    part = FileTensors(flags | own, "the file").opened(Naming())
    layer = part.layers.get(lora_name)
    if part.unread:
        part.all_read()
    if layer is None:
        return model_weight
    for key in keys:
        lora_weight_keys.discard(key)
    return _merge(model_weight, [(layer, multiplier)], calc_device).to(model_weight.device)


def _merge(
    weight: Tensor,
    layers: Sequence[tuple[SavedLayer, float]],
    device: torch.device | str,
    merged: Callable[[SavedLayer, Tensor, float, Tensor], Tensor] = merged_weight,
) -> Tensor:
    """W' on `device`, in the weight's dtype; or the bias."""
    wide = weight.to(device, torch.promote_types(weight.dtype, torch.float32) if weight.itemsize > 1 else torch.float32)
    start = wide
    for layer, multiplier in layers:
        with located(layer.name):
            wide = merged(layer, wide, multiplier, start)
    limit = torch.finfo(weight.dtype).max
    if weight.itemsize == 1:  # depending on torch and kind, a cast to fp8 makes inf or NaN of what is too large
        wide = wide.clamp(-limit, limit)
    if not bool((wide.abs() <= limit).all()):
        raise ValueError(
            f"{', '.join(layer.name for layer, _ in layers)}: the merged values are NaN, or too large for "
            f"{weight.dtype}: lower the multiplier, or choose an earlier file"
        )
    return wide.to(weight.dtype)


def _of_bias(layer: SavedLayer, bias: Tensor, multiplier: float, start: Tensor) -> Tensor:
    return merged_bias(layer, bias, multiplier)


@dataclass
class _File:
    """The layers of one adapter file, and which of them found their weight."""

    source: str
    layers: Mapping[str, SavedLayer]
    multiplier: float
    allowance: Allowance
    used: set[str] = field(default_factory=set)
    shifted: set[str] = field(default_factory=set)

    def layer_for(self, flat_key: str, bias: bool = False) -> SavedLayer | None:
        """Its layer of this name, if it has something for the weight, or for the bias."""
        for name in (prefix + key for key in (flat_key, flat_key.removeprefix(WRAPPED)) for prefix in PREFIXES):
            layer = self.layers.get(name)
            if layer is not None and (not bias or layer.bias_change is not None):
                (self.shifted if bias else self.used).add(layer.name)
                return layer
        return None

    def report(self) -> None:
        """Say what was merged.

        Raises:
            ValueError: nothing was.
        """
        missed = sorted(self.layers.keys() - self.used)
        if self.layers and not self.used:
            raise ValueError(
                f"{self.source}: no weight of this model belongs to its {len(self.layers)} layers, e.g. {missed[0]}; "
                "choose a file that was trained on this model"
            )
        families = {name: saved.algorithm.spec.family for name, saved in self.layers.items()}
        parts = {part_of(name) for name in self.used}
        missing = find_missing(families, self.used, parts, PARTS, (), self.allowance, self.source)
        for line in filter(None, (missing.warning(), missing.counted())):
            log.warning("%s: %s", self.source, line)
        lost = sorted(n for n in self.used - self.shifted if self.layers[n].bias_change is not None)
        if lost:
            raise ValueError(
                f"{self.source}: {len(lost)} of its layers change a bias which this model has not, e.g. {lost[0]}: "
                "choose a file that was trained on this model"
            )
        if self.used:
            kinds = sorted({self.layers[name].algorithm.spec.name for name in self.used})
            log.info(
                "%s: %d layers (%s) merged at %g by kohya-networks %s",
                self.source, len(self.used), ", ".join(kinds), self.multiplier, __version__,
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
        files = self._open(given, call.arguments.get("lora_multipliers"))
        call.arguments.update(lora_weights_list=None, lora_multipliers=None)
        with self._merging(files, call.arguments["calc_device"]):
            result = self.load(*call.args, **call.kwargs)
        for file in files:
            file.report()
        _merged_by_key.update(map(_fingerprint, given))
        return result

    def _open(self, given: Sequence[Mapping[str, Tensor]], multipliers: float | Sequence[float] | None) -> list[_File]:
        files = []
        strengths = _strengths(multipliers, len(given))
        for number, (tensors, strength) in enumerate(zip(given, strengths, strict=True), start=1):
            source = f"adapter file {number} of {len(given)}"
            layers = open_adapter(tensors, Naming(), source).all_read().layers
            for text in codec.assumptions(layers.values()):
                log.info("%s: %s", source, text)
            files.append(_File(source, layers, strength, self.allowance))
        return files

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


def _hook(theirs: Callable[..., Tensor] | None, files: Sequence[_File], device: torch.device) -> Callable[..., Tensor]:
    """The trainer's hook on each weight that it reads, followed by ours."""

    def merge(key: str, weight: Tensor, keep_on_calc_device: bool = False) -> Tensor:
        if theirs is not None:
            weight = theirs(key, weight, keep_on_calc_device=keep_on_calc_device)
        bias = key.endswith(".bias")
        flat = (key.removesuffix(".bias") if bias else stem_of(key)).replace(".", "_")
        found = [(layer, file.multiplier) for file in files if (layer := file.layer_for(flat, bias)) is not None]
        if not found:
            return weight
        merged = _merge(weight, found, device, _of_bias if bias else functools.partial(merged_weight, bias_too=True))
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
    return tuple(sorted((key, float(tensor.float().sum())) for key, tensor in tensors.items()))
