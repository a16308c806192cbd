"""An adapter file as the tools have it: under its own names or the trainer's, with the weights on which it acts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .._errors import located
from ..archs.detect import detect
from ..archs.names import Share, row_sizes
from ..archs.places import Layer
from ..archs.spec import ArchSpec
from ..files import dotted, weight_names
from ..files.adapter_file import AdapterFile, FileTensors, Naming
from ..files.base_weights import BaseWeights, divided
from ..files.checkpoint import Checkpoint
from ..files.codec import SavedLayer
from ..files.joining import NeedsBase, update_of
from ..files.merge import naming_for
from ..models.adapters import arch_of, layers_of_model, model_of
from ..models.skeleton import Skeleton, skeleton
from ..tensors.updates import Update


class Opened:
    """A file, read whole; what is asked of its model is looked up then.

    Args:
        path: of the file, or of the folder of one that PEFT wrote.
        model: what it is for, where names and metadata leave that open: as for `skeleton`, or one; "" = as they say.
        base: checkpoints with the weights, as for BaseWeights.
        tensors: what is to count as the file, where that is not what stands there.

    Raises:
        ValueError: it is no adapter file, or not sound.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: str | Skeleton = "",
        base: Sequence[Path | str] = (),
        tensors: FileTensors | None = None,
    ) -> None:
        self.path, self.tensors = Path(path), FileTensors(path) if tensors is None else tensors
        self._model, self._base = model, base

    def with_tensors(self, tensors: FileTensors) -> Opened:
        """These as the file, for the same model."""
        found = Opened(self.path, self._model, self._base, tensors)
        vars(found).update({name: one for name, one in vars(self).items() if name in ("model", "arch")})
        return found

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.tensors.metadata

    @functools.cached_property
    def own(self) -> AdapterFile:
        """Under its own names.

        Raises:
            ValueError: it is no adapter, or a layer has a form that is not known.
        """
        return self.tensors.opened(Naming()).all_read()

    # -- the model

    @functools.cached_property
    def model(self) -> Skeleton:
        """That it is for, without weights.

        Raises:
            ValueError: it is not known, or several models have such layers.
        """
        if isinstance(self._model, Skeleton):
            return self._model
        return skeleton(self._model) if self._model else model_of(self.tensors)

    def on(self, model: Skeleton) -> Opened:
        """The same file, for this model."""
        return Opened(self.path, model, self._base, self.tensors)

    @functools.cached_property
    def arch(self) -> ArchSpec:
        """Of the model, which checkpoints show, too. Raises ValueError as `model`."""
        of_base = self._naming.arch if self._base else None
        return of_base or detect(self.model.unet)

    @functools.cached_property
    def model_layers(self) -> dict[str, Layer]:
        """Saved name -> every layer of the model that has a weight; trained where the file has it.

        Raises:
            ValueError: the model is not known, and no checkpoint is given.
        """
        if not self._base or self._model:
            found = layers_of_model(self.arch, self.model)
        else:  # encoders have the same names at every size
            found = layers_of_model(self.arch, skeleton(self.arch.releases[0].name))
            found = {name: one for name, one in found.items() if one.part is not self.arch.denoiser}
        for shapes in (Checkpoint(divided(given)[1]).shapes for given in self._base if not divided(given)[0]):
            for name, (trainer_name, target) in weight_names.layers(shapes, self.arch.denoiser).items():
                found[name] = Layer(self.arch.denoiser, trainer_name, name, target.shape(shapes))
        there = self.tensors.opened(Naming(self.arch)).families
        return {name: replace(layer, trained=name in there) for name, layer in found.items()}

    @functools.cached_property
    def _layers_if_known(self) -> dict[str, Layer]:
        """The same; none of a model that is not known."""
        try:
            return self.model_layers
        except ValueError:
            return {}

    @functools.cached_property
    def on_model(self) -> AdapterFile:
        """Under the trainer's names, joined and divided as the trainer's model is.

        Raises:
            ValueError: the model is not known, or the rows of a layer cannot be made of what the file has.
        """
        layers = self.model_layers
        file = self.tensors.opened(Naming(self.arch)).all_read()
        return file.on(lambda name: layers[name].shape if name in layers else None, self._base_or_none())

    # -- base weights

    @functools.cached_property
    def _naming(self) -> Naming:
        """Of the model: the one that was said, or by the names in the checkpoints, or by those in the file."""
        if not self._base or self._model:
            return Naming(detect(self.model.unet)) if self._model or self._layers_if_known else Naming()
        keys = {key for given in self._base for key in Checkpoint(divided(given)[1]).shapes}
        arch = arch_of(self.tensors, keys)
        return naming_for(self.tensors, keys) if arch is None else Naming(arch)

    @functools.cached_property
    def _shares(self) -> dict[str, tuple[Share, ...]]:
        """Own name of a layer -> the trainer's layers that it is, or rows of one."""
        found = self._naming.shares(dotted.layers(self.tensors))
        return {path.replace(".", "/"): shares for path, shares in found.items()}

    @functools.cached_property
    def base(self) -> BaseWeights | None:
        """The weights under the trainer's names; None = no checkpoint is given.

        Raises:
            ValueError: one of them has none of the layers.
        """
        if not self._base:
            return None
        names = {share.name for shares in self._shares.values() for share in shares}
        if self._naming.arch is not None:  # what is a part of one layer elsewhere may be untrained
            names |= {name for name, one in self.model_layers.items() if one.part is self.arch.denoiser}
        return BaseWeights(self._base, names)

    def _base_or_none(self) -> BaseWeights | None:
        return self.base if self._base else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the weight of a layer by its own name: as the checkpoints have it, or its tensors, or the model; None =
        nothing tells. A form which shows only how many positions a kernel has is looked up in the model."""
        if self.base is not None:
            return self._rows_shape(name, self.base.shape)
        saved = self.own.layers[name]
        shown = saved.algorithm.shown_shape(saved.tensors)
        if shown is not None and not saved.algorithm.spec.hides_kernel(saved.tensors):
            return shown
        layers = self._layers_if_known
        return self._rows_shape(name, lambda one: layers[one].shape if one in layers else None) or shown

    def weight(self, name: str) -> Tensor | None:
        """The weight of a layer by its own name, in fp32 or wider; None = no checkpoint is given.

        Raises:
            ValueError: the checkpoints have no such layer.
        """
        if self.base is None:
            return None
        rows = [self._rows(share, self.base(share.name)) for share in self._shares[name]]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def update(self, name: str) -> Update:
        """What a layer, by its own name, adds to its weight at strength 1, in float64.

        Raises:
            ValueError: it depends on the base weight, which is not given.
        """
        saved = self.own.layers[name]  # as a matrix it needs no kernel, for which a model would be looked up
        shape = saved.algorithm.shown_shape(saved.tensors) or self.shape(name) or ()
        return self._update(name, saved, shape, self.weight)

    def _update(
        self, name: str, saved: SavedLayer, shape: tuple[int, ...], weight: Callable[[str], Tensor | None]
    ) -> Update:
        with located(f"{self.path}: {dotted.shown(name)}"):
            try:
                return update_of(saved, shape)
            except NeedsBase:
                found = weight(name)
            if found is None:
                kind = saved.algorithm.spec.name + (" with DoRA magnitudes" if saved.magnitude is not None else "")
                raise ValueError(f"what {kind} adds depends on the weight below it: give the model, --base CHECKPOINT")
            return update_of(saved, shape, found)

    # -- the same under the trainer's names

    def model_shape(self, name: str) -> tuple[int, ...]:
        """Of the weight of one of the trainer's layers that the file has; () = nothing tells."""
        layer, saved = self.model_layers.get(name), self.on_model.layers[name]
        shown = (None if self.base is None else self.base.shape(name)) or saved.algorithm.shown_shape(saved.tensors)
        if layer is None or (self._base and layer.part is not self.arch.denoiser):  # encoders come in several sizes
            return shown or (() if layer is None else layer.shape)
        return layer.shape

    def model_weight(self, name: str) -> Tensor | None:
        """The weight of one of the trainer's layers, in fp32 or wider; None = no checkpoint is given."""
        return None if self.base is None else self.base(name)

    def model_update(self, name: str) -> Update:
        """What one of the trainer's layers adds to its weight at strength 1, in float64. Raises as `update`."""
        return self._update(name, self.on_model.layers[name], self.model_shape(name), self.model_weight)

    def _rows_shape(self, name: str, shape: Callable[[str], tuple[int, ...] | None]) -> tuple[int, ...] | None:
        found = [shape(share.name) for share in self._shares[name]]
        empty = [torch.empty(one, device="meta") for one in found if one is not None]
        if len(empty) < len(found):
            return None
        rows = [self._rows(share, one) for share, one in zip(self._shares[name], empty, strict=True)]
        return (sum(map(len, rows)), *rows[0].shape[1:])

    def _rows(self, share: Share, weight: Tensor) -> Tensor:
        """Those of a trainer's layer that are this one, in its order."""
        arch = self._naming.arch
        if share.count > 1 and arch is not None:
            columns = weight.shape[1] if weight.dim() > 1 else 1
            sizes = row_sizes(arch, share.name, len(weight), columns, share.count)
            start = sum(sizes[: share.position])
            weight = weight[start : start + sum(sizes[share.position : share.position + share.span])]
        return torch.cat(weight.chunk(2)[::-1]) if share.swapped.at(weight.shape) else weight
