"""Files with fewer ranks, or with more that change nothing yet and learn; in their own names, way and precision."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .._errors import located
from ..files import dotted, writer
from ..files.codec import SavedLayer
from ..files.joining import NeedsBase
from ..files.keys import FileKeys
from ..files.outputs import check_outputs
from ..files.resize import cut, distance, grown, ranks_of, shrunk, trained_by
from .metadata import told
from .opened import Opened
from .ranks import RankRule
from .report import Report, Row, Walk, silently

WAYS = ("first", "nearest")


def resize(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rule: RankRule,
    way: str = "",
    seed: int = 0,
    model: str = "",
    base: Sequence[Path | str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_error: float | None = None,
    overwrite: bool = False,
    walk: Walk = silently,
) -> Report:
    """Write a file with other ranks. Layers that have none, and all else, stay as they are.

    Args:
        file: of any program.
        out: the .safetensors file to write.
        rule: how many ranks a layer keeps at most; of a stack (split_qkv), each part. A dim above the ranks of all
            layers grows them: the update stays, and the new ranks are as at the start of a training.
        way: "first", the first ranks with alpha as it is; "nearest", the nearest update of that rank at the same
            scale; "" = "first" with a dim alone where metadata say that the first ranks stand alone (DyLoRA).
        seed: of new ranks.
        model, base: as for `Opened`; needed where the model tells kernels above 1x1, and where new ranks or errors
            depend on the weights.
        dtype: of the tensors; None = as they are.
        device: where it is computed.
        max_error: the highest relative error of the whole update.
        overwrite: whether `out` may exist.
        walk: goes over the layers, and may show how far it is.

    Raises:
        ValueError: it is no adapter file, has no ranks, or would stay as it is; nothing was written.
    """
    target = writer.checked_path(out)
    check_outputs([target], [Path(file), *(Path(str(one).rpartition("=")[2]) for one in base)], overwrite)
    opened, metadata, alphas = Opened(file, model, base), dict[str, str](), set[float]()
    keys, report = FileKeys(opened.own), Report("resize", [Path(file)])
    with located(str(file)):
        job = _Job(opened, rule, way, seed, dtype, torch.device(device))
    with writer.streamed(target, dtype, metadata) as stream:
        for name in walk([*opened.own.layers]):
            layer, row = job.resized(name)
            report.rows.append(row)
            alphas |= {layer.alpha} if row.rank and layer.alpha is not None else set()
            stream.add(keys.of(layer))
        stream.add(keys.rest())
        with located(str(file)):
            report.check(max_error=max_error)
        ranks = [row.rank for row in report.rows if row.rank]
        metadata |= told(opened.metadata, "resize", {"to": str(rule), "way": job.way}, ranks=ranks)
        if len(alphas) == 1:
            metadata["ss_network_alpha"] = f"{alphas.pop():g}"
    report.out, report.notes = target, job.notes
    return report


class _Job:
    """What is done with the layers of one file.

    Args:
        opened: the file.
        rule, way, seed, dtype, device: as for `resize`.

    Attributes:
        way: that is taken, "first", "nearest" or "grow".
        notes: for the user.

    Raises:
        ValueError: the file has no ranks, or would stay as it is.
    """

    def __init__(
        self, opened: Opened, rule: RankRule, way: str, seed: int, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        self.opened, self.rule, self.seed, self.dtype, self.device = opened, rule, seed, dtype, device
        self.trained_by, self.notes = trained_by(opened.metadata), list[str]()
        nested = self.trained_by is not None and self.trained_by.spec.nested
        self.way = way or ("first" if nested and not rule.rule else "nearest")
        if way == "first" and not nested:
            self.notes.append("it does not say that DyLoRA trained it: the cut ranks are lost")
        layers = [*opened.own.layers.values()]
        self.largest: dict[bool, int] = {}
        for saved in layers:
            kernel = self._kernel(saved.name)
            self.largest[kernel] = max(self.largest.get(kernel, 0), ranks_of(saved))
        self._check(layers)
        if any(self._changes(saved) and self._grows(self._kernel(saved.name)) for saved in layers):
            self.way = "grow"

    def resized(self, name: str) -> tuple[SavedLayer, Row]:
        """A layer as the file has it, and what it became."""
        own = self.opened.own.layers[name]
        saved = self._here(own)
        if not self._changes(own):
            return own, self._row(saved, saved, exact=True)
        dim = self.rule.most(self._kernel(name))
        if self._grows(self._kernel(name)):
            new = self._grown(saved, dim or 1)
            return new, self._row(new, saved, exact=True)
        if self.way == "first":
            new = cut(saved, dim or 1)
            return new, self._row(new, saved)
        new = shrunk(saved, functools.partial(self.rule.count, kernel=self._kernel(name)))
        return new, self._row(new, saved)

    # -- which

    def _check(self, layers: Sequence[SavedLayer]) -> None:
        """Whether there is something to do."""
        if self.way == "first" and self.rule.rule:
            raise ValueError(
                f"the first ranks stand alone at a dim, not at {self.rule.rule}: give --dim, or --way nearest"
            )
        if not any(self.largest.values()):
            algos = ", ".join({saved.algorithm.spec.name: None for saved in layers})
            raise ValueError(
                f"its layers ({algos}) have no ranks: kohya-networks convert --to lora makes a LoRA of them"
            )
        if not any(map(self._changes, layers)):
            raise ValueError(
                f"no layer has more than {self.rule.dim or self.rule.conv_dim} ranks, and some have as many: give a "
                "lower dim, or a higher one to grow"
            )

    def _kernel(self, name: str) -> bool:
        """Whether a layer is one of those that `conv_dim` is for."""
        return self.rule.conv_dim is not None and math.prod((self.opened.shape(name) or ())[2:]) > 1

    def _grows(self, kernel: bool) -> bool:
        """Whether layers get more ranks than any of them has."""
        return not self.rule.rule and (self.rule.most(kernel) or 0) > self.largest.get(kernel, 0)

    def _changes(self, saved: SavedLayer) -> bool:
        rank, kernel = ranks_of(saved), self._kernel(saved.name)
        most = self.rule.most(kernel)
        return rank > 0 and (bool(self.rule.rule) or self._grows(kernel) or (most is not None and most < rank))

    # -- layers

    def _grown(self, saved: SavedLayer, dim: int) -> SavedLayer:
        name, algorithm = saved.name, self.trained_by
        if algorithm is None or algorithm.spec.file_algo != saved.algorithm.spec.name:
            algorithm = saved.algorithm
        shape = saved.algorithm.shown_shape(saved.tensors) or ()
        return grown(saved, dim, shape, algorithm, self.seed, functools.partial(self.opened.weight, name))

    def _here(self, saved: SavedLayer) -> SavedLayer:
        tensors = {suffix: t.to(self.device) for suffix, t in saved.tensors.items()}
        magnitude = None if saved.magnitude is None else saved.magnitude.to(self.device)
        return replace(saved, tensors=tensors, magnitude=magnitude)

    def _row(self, new: SavedLayer, old: SavedLayer, exact: bool = False) -> Row:
        """With the error of what stands in the file.

        Args:
            new, old: the layer.
            exact: the algebra is.
        """
        before, rank = (one.algorithm.spec.shown_rank(one.tensors) or 0 for one in (old, new))
        became = "" if rank == before else f"{'fewer' if rank < before else 'more'} ranks"
        row, dtype = Row(dotted.shown(old.name), became, rank or None, None, exact=exact), self.dtype
        if dtype is not None:
            new = replace(new, tensors={suffix: t.to(dtype) for suffix, t in new.tensors.items()})
        if self.way == "first":  # what it was trained to be at that dim is not known
            return row
        try:
            error, size = self._distance(new, old)
        except NeedsBase:
            return replace(row, error=0.0 if new is old else None)
        return replace(row, error=0.0 if new is old else error / size if size else error, size=size)

    def _distance(self, new: SavedLayer, old: SavedLayer) -> tuple[float, float]:
        """As `distance`; of layers with magnitudes, and of those whose change depends on it, with the weight if there
        is one."""
        wants = old.magnitude is not None or old.algorithm.spec.relative
        weight = self.opened.weight(old.name) if wants else None
        if old.magnitude is not None and weight is None and not any("DoRA" in note for note in self.notes):
            self.notes.append("errors of DoRA layers are of the change without magnitudes; --base has theirs")
        return distance(new, old, () if weight is None else tuple(weight.shape), weight)
