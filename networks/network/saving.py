"""The files of a network: the one that a trainer asks for, and beside it those of lower dims and in other forms."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._version import __version__
from ..files import codec, peft_folder, resize, save_formats, writer
from ..files.codec import SavedLayer
from ..files.dialects import FileFormat
from ..layers.adapted import AdaptedLayer
from ..plan.plan import Plan, PlanRow
from .further import Further, beside

if TYPE_CHECKING:
    from ..files.verdicts import Verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """What a save writes: the layers with the values that they have meanwhile.

    Attributes:
        plan: of the network.
        layers: with the plan's row of each.
        form: of the file, with those that are written beside it.
        dtype: of its tensors; None = as they are in the layers. What half precision would spoil stays in fp32.
        metadata: of the host; ours is added.
        health: of the training, see Diagnosis.
    """

    plan: Plan
    layers: Sequence[tuple[PlanRow, AdaptedLayer]]
    form: FileFormat
    dtype: torch.dtype | None
    metadata: Mapping[str, str]
    health: Mapping[str, int]


class Saver:
    """Writes the files of a run, and removes those of which the trainer has removed the one that they stand beside."""

    def __init__(self) -> None:
        self._further = Further()
        self._forecasts: dict[tuple[int, str], Sequence[Verdict]] = {}

    def write(self, file: Path, of: Contents, suffix: str = "") -> None:
        """Write a file, and beside it those of its form. Each is written whole or not at all.

        Args:
            file: that the trainer asks for.
            of: what it holds.
            suffix: "" = it is written; "ema" = NAME-ema is, as a further one beside NAME, with those of its form.

        Raises:
            OSError: it cannot be written. What cannot be written of further ones is a warning.
            ValueError: a layer has no form that the program of the file's form computes.
        """
        self._further.remove_orphans()
        saved, form = [codec.saved_layer(layer) for _, layer in of.layers], of.form
        known = {**of.metadata, "networks_version": __version__} | _told_of_starts(of.layers)

        def write(path: Path, form: FileFormat, layers: Sequence[SavedLayer], known: Mapping[str, str]) -> str:
            named, told = translated(layers, form, [layer for _, layer in of.layers])
            known = {**known, "networks_dialect": form.dialect.name}
            if form.dialect.folder:
                peft_folder.write(path, named, form, of.dtype, known, of.health)
            else:
                writer.write_tensors(path, codec.written(named, form), of.dtype, known, of.health)
            return told

        path, make = file, functools.partial(write, layers=saved, known=known)
        if suffix:
            path = file.with_name(f"{file.stem}-{suffix}{file.suffix}")
            self._further.write(file, path, functools.partial(make, form=form))
        else:
            if told := make(file, form):
                log.info("%s: %s (%.1f MB)", file.name, told, file.stat().st_size / 1e6)
            self._tell_readers(file.name, of.plan, form)
        for dim in form.dims:
            smaller = [resize.cut(layer, dim) for layer in saved]
            write(resize.numbered(path, dim), form, smaller, resize.resized_metadata(known, dim))
        for one in form.also:
            self._further.write(file, beside(path, one.dialect), functools.partial(make, form=one))
            if not suffix:  # of the same layers in the same form
                self._tell_readers(f"{path.stem}-{one.dialect.name}", of.plan, one, one.dialect.name)

    def _tell_readers(self, name: str, plan: Plan, form: FileFormat, program: str = "") -> None:
        """What other programs make of a file, or one of them; once for each form, since no value decides it."""
        if not log.isEnabledFor(logging.INFO):
            return
        from ..plan.forecast import forecast  # not where a network is only used

        key = len(plan.trained), form.dialect.name
        if key not in self._forecasts:
            self._forecasts[key] = forecast(plan, form)
        shown = [one for one in self._forecasts[key] if one.name == program or (one.unasked and not program)]
        told = [verdict.short for verdict in shown]
        if told:
            log.info("%s: %s", name, "; ".join(told))


def translated(
    saved: Sequence[SavedLayer], form: FileFormat, layers: Sequence[AdaptedLayer]
) -> tuple[list[SavedLayer], str]:
    """Layers as a file in this form has them, and in words what some were converted to.

    Args:
        saved: what was made of the layers, in their order.
        form: of the file.
        layers: asked for norms and base weights on which its form depends.

    Raises:
        ValueError: one has no form that the program computes.
    """
    if form.dialect.fold_flag:
        saved = [
            one if one.magnitude is None else replace(one, magnitude=layer.folded(one.magnitude), folded=True)
            for one, layer in zip(saved, layers, strict=True)
        ]
    if form.dialect.program:
        saved = [one.on_cpu() for one in saved]
    cpu, named = torch.device("cpu"), {layer.lora_name: layer for layer in layers}
    with torch.no_grad():
        return save_formats.translated(saved, form, lambda name: named[name].whole_weight(cpu))


def start_sizes(layers: Sequence[tuple[PlanRow, AdaptedLayer]]) -> list[float]:
    """Of updates that have not started at 0."""
    return [layer.adapter.start_size for _, layer in layers if layer.adapter.start_size is not None]


def _told_of_starts(layers: Sequence[tuple[PlanRow, AdaptedLayer]]) -> dict[str, str]:
    """Metadata about start values, after the tensors of a file were made; {} with default ones by the host's seed."""
    sizes = start_sizes(layers)
    rows = [
        row for row, _ in layers if row.init != "default" or row.init_seed is not None or row.start_size is not None
    ]
    if not rows:
        return {}
    found: dict[str, object] = {"init": sorted({row.init for row in rows})}
    if sizes:
        found["largest_relative_start"] = max(sizes)
    if rows[0].init_seed is not None:
        found["init_seed"] = rows[0].init_seed
    errors = [layer.adapter.refactor_error for _, layer in layers if layer.adapter.refactor_error is not None]
    if errors:
        found |= {"ranks": "2 x dim", "refactored_layers": len(errors), "largest_relative_error": max(errors)}
        log.info(
            "%d layers saved as their difference from the start, at twice their dim (largest relative error %.1g)",
            len(errors), max(errors),
        )  # fmt: skip
    return {"networks_init": json.dumps(found)}
