"""An average over files that one training run saved, of any length, after it has ended.

    average = sum_i w_i value_i        of every saved value, the later files with more weight, the weights 1 in all

A file stands for the steps since the one before it, the first for all before. With `decay` that is the exponential
moving average (EMA) which `ema_decay` keeps in training; with `sigma_rel` the power function t^g of Karras et al. 2024
(arXiv 2312.02696), whose length grows with the run: sigma_rel = sqrt(g + 1) / ((g + 2) sqrt(g + 3)) is its width over
that of the run. Both at the files alone, so that many files are nearer to an average of all steps.

As in `ema_decay`, values are averaged as they are saved, factors by themselves. The average of the updates is another
one, mean(B A) = mean(B) mean(A) + their covariance; `combine` has it, with more ranks. The report says how far the two
are apart: little within a run, most of the update between files of two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import averages, dotted, outputs, writer
from ..files.adapter_file import FileTensors
from ..tensors.updates import distance, total
from . import metadata
from .convert import inputs
from .opened import Opened
from .report import Report, Row, Walk, silently

File = Path | str
WIDEST = 1 / math.sqrt(12)  # sigma_rel of the mean of all steps
APART = 0.5  # error above which factors do not belong together
_STEP = re.compile(r"-step(\d+)$")  # of the trainers' file names


def average(
    files: Sequence[File],
    out: File,
    *,
    decay: float | None = None,
    sigma_rel: float | None = None,
    steps: Sequence[int] = (),
    model: str = "",
    base: Sequence[File] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_error: float | None = None,
    overwrite: bool = False,
    walk: Walk = silently,
) -> Report:
    """Write the average of files of one run.

    Args:
        files: in any order; what they hold but for its values is the same.
        out: the file to write, under the keys of the files.
        decay: of an EMA, per optimizer step, in [0, 1).
        sigma_rel: in its place the width of a power-function average relative to the run, up to 0.288 (the mean of all
            steps); usual is 0.05 to 0.25. With neither the files count alike.
        steps: after how many each file was saved; () = as their metadata or names say.
        model, base: for the error of layers that depend on the weight, as for `convert`.
        dtype, device, max_error, overwrite, walk: as for `convert`.

    Returns:
        How far each layer is from the average of its updates.

    Raises:
        ValueError: the files are not of one run, do not say their steps, or the error is above the limit. Nothing is
            written then.
    """
    place = writer.checked_path(out)
    outputs.check_outputs([place], [one for file in files for one in inputs(file, base)], overwrite)
    how = {name: value for name, value in (("decay", decay), ("sigma_rel", sigma_rel)) if value is not None}
    opened = [Opened(file, model, base) for file in files]
    _check(opened, how)
    parts = _parts(opened, _steps(opened, steps) if how or steps else [0] * len(opened), how)
    report = Report("average", [part.file.path for part in parts])
    report.details = {**how, "files": [part.told for part in parts]}
    mean = _Mean(parts, torch.device(device))
    tensors = writer.cast(mean.tensors(), dtype)
    report.rows = [mean.row(name, tensors) for name in walk([*opened[0].own.layers])]
    report.notes = _notes(parts)
    _refuse_strangers(report)
    report.check(max_error=max_error)
    known = metadata.told(parts[-1].file.metadata, "average", report.details)
    known[averages.METADATA] = json.dumps({**how, "files": len(parts), "steps": parts[-1].step})
    writer.write_tensors(place, tensors, None, known)
    report.out = place
    return report


@dataclass(frozen=True)
class _Part:
    """A file of the average.

    Attributes:
        step: after which it was saved; 0 = nobody asked.
        weight: the weights of all are 1 together.
    """

    file: Opened
    step: int
    weight: float

    @property
    def told(self) -> dict[str, Any]:
        return {"file": self.file.path.name, "weight": self.weight, **({"step": self.step} if self.step else {})}


def _check(opened: Sequence[Opened], how: Mapping[str, float]) -> None:
    """
    Raises:
        ValueError: there is nothing to average, or not what was asked for; or the files differ in more than values.
    """
    if len(opened) < 2:
        raise ValueError("an average takes two files or more of one run: give those that it saved on the way")
    if len(how) > 1:
        raise ValueError("--decay and --sigma_rel are two kinds of average: give one of them")
    if not 0 <= how.get("decay", 0) < 1:
        raise ValueError(f"--decay {how['decay']:g} is no decay of an average: give one from 0 up to below 1, 0.999")
    if not 0.01 <= how.get("sigma_rel", WIDEST) <= WIDEST:
        raise ValueError(
            f"--sigma_rel {how['sigma_rel']:g} is no width: give one above 0, up to 0.288, the mean of all"
        )
    _check_alike(opened[0], opened[1:])
    if any(one.tensors.settings is not None for one in opened):
        raise ValueError(f"{opened[0].path} is of PEFT, with settings beside it: make files with `convert` first")


def _check_alike(first: Opened, others: Sequence[Opened]) -> None:
    """
    Raises:
        ValueError: one is damaged, or has not what the first has.
    """
    for file in (first, *others):
        for key in {**first.own.tensors, **file.own.tensors}:
            one, other = first.tensors.get(key), file.tensors.get(key)
            if one is None or other is None or one.shape != other.shape or not _may_differ(key, one, other):
                raise ValueError(
                    f"{first.path} and {file.path} differ in more than values, first in {key} ({_shown(one)} and "
                    f"{_shown(other)}): give files of one run; `combine` adds others"
                )


def _may_differ(key: str, one: Tensor, other: Tensor) -> bool:
    """Whether these may be averaged: strengths, and what is no number of a training, only if they are the same."""
    return (_is_value(key, one) and _is_value(key, other)) or bool((one == other).all())


def _shown(tensor: Tensor | None) -> str:
    if tensor is None:
        return "it is missing"
    return f"{tensor.item():g}" if tensor.numel() == 1 else " x ".join(map(str, tensor.shape))


def _steps(opened: Sequence[Opened], given: Sequence[int]) -> list[int]:
    """After how many each was saved.

    Raises:
        ValueError: one does not say, or two say the same.
    """
    if given and len(given) != len(opened):
        raise ValueError(f"--steps has {len(given)} numbers for {len(opened)} files: give one for each, in their order")
    found = list(given) or [_said(file) for file in opened]
    for i, step in enumerate(found):
        if step in found[:i]:
            both = f"{opened[found.index(step)].path} and {opened[i].path}"
            raise ValueError(f"{both} were both saved after {step} steps: give one of them")
        if step <= 0:
            raise ValueError(f"{opened[i].path}: a file is of step 1 or a later one, not of {step}")
    return found


def _said(file: Opened) -> int:
    text = file.metadata.get("ss_steps", "")
    named = _STEP.search(file.path.stem)
    if not text.isdigit() and named is None:
        raise ValueError(f"{file.path} does not say after how many steps it was saved: give --steps 100,200,300")
    return int(text) if text.isdigit() else int(named[1]) if named else 0


def _parts(opened: Sequence[Opened], steps: Sequence[int], how: Mapping[str, float]) -> list[_Part]:
    """The files in the order of their steps, each with the share of the average that the steps up to it have, without
    that of the steps up to the one before."""
    order = sorted(range(len(opened)), key=lambda i: steps[i])
    last = max(steps)
    if "decay" in how:
        until = [math.prod(averages.decay_at(how["decay"], n) for n in range(steps[i], last)) for i in order]
    elif "sigma_rel" in how:
        until = [(steps[i] / last) ** (_power(how["sigma_rel"]) + 1) for i in order]
    else:
        until = [(k + 1) / len(order) for k in range(len(order))]
    before = [0.0, *until[:-1]]
    return [_Part(opened[i], steps[i], share - others) for i, share, others in zip(order, until, before, strict=True)]


def _power(sigma_rel: float) -> float:
    """g of the profile t^g with this width, which shrinks as g grows."""
    low, high = 0.0, 4 / sigma_rel**2
    for _ in range(200):
        g = (low + high) / 2
        low, high = (g, high) if math.sqrt(g + 1) / ((g + 2) * math.sqrt(g + 3)) > sigma_rel else (low, g)
    return low


def _notes(parts: Sequence[_Part]) -> list[str]:
    told = [f"{part.file.path.name}{f' (step {part.step})' if part.step else ''} {part.weight:.1%}" for part in parts]
    notes = [f"weights: {', '.join(told)}", "errors are the distance from the average of the updates"]
    already = [part.file.path.name for part in parts if averages.METADATA in part.file.metadata]
    if already:
        notes.append(f"averages already, so that what they cover adds to it: {', '.join(already)}")
    return notes


def _refuse_strangers(report: Report) -> None:
    if report.error > APART:
        raise ValueError(
            f"the average of the factors is {report.error:.0%} off that of the updates, as between files of different "
            "runs, whose factors do not belong together: give files of one run, or average updates with `combine "
            "A=0.5 B=0.5`; nothing was written"
        )


@dataclass(frozen=True)
class _Mean:
    """The average of files that have the same keys."""

    parts: Sequence[_Part]
    device: torch.device

    def tensors(self) -> dict[str, Tensor]:
        """In the dtypes of the first file."""
        first = self.parts[0].file.tensors
        return {key: self._value(key, t) if _is_value(key, t) else t for key, t in first.items()}

    def _value(self, key: str, first: Tensor) -> Tensor:
        found = torch.zeros(first.shape, dtype=torch.float64, device=self.device)
        for part in self.parts:
            found.add_(part.file.tensors[key].to(found), alpha=part.weight)
        return found.to("cpu", first.dtype).contiguous()

    def row(self, name: str, tensors: Mapping[str, Tensor]) -> Row:
        """How far a layer is from the average of the updates; not known where these depend on a weight that is not
        given."""
        first = self.parts[0].file
        rank = first.own.layers[name].algorithm.spec.shown_rank(first.own.layers[name].tensors)
        made = FileTensors(tensors, str(first.path))
        made.metadata = dict(first.metadata)
        try:
            updates = [part.file.update(name).to(self.device) for part in self.parts]
            wanted = total(updates, [part.weight for part in self.parts])
            error = distance(first.with_tensors(made).update(name).to(self.device), wanted)
        except ValueError:
            return Row(dotted.shown(name), "averaged", rank, None)
        size = wanted.norm()
        return Row(dotted.shown(name), "averaged", rank, error / size if size else error, size, exact=False)


def _is_value(key: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not key.endswith("alpha")
