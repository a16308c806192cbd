"""Adapter files merged into a checkpoint: each weight is read and written once, however many files there are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from ..files import outputs
from ..files.checkpoint import Checkpoint, check_free
from ..files.merge import CheckpointMerge, MergeInput
from ..files.places import Allowance
from .report import Report, Row

File = Path | str
Given = File | tuple[File, float]
Step = Callable[[str, int], None]  # told each tensor and its bytes
Progress = Callable[[int], AbstractContextManager[Step]]  # of the bytes in all


@contextmanager
def unseen(total: int) -> Iterator[Step]:
    """The `Progress` that shows nothing."""
    yield lambda key, size: None


def merge_checkpoint(
    checkpoint: File,
    files: Mapping[File, float] | Sequence[Given],
    out: File,
    *,
    prefix: str = "",
    device: torch.device | str = "cpu",
    strict: bool = False,
    allow_missing: bool | Collection[str] = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = unseen,
) -> Report:
    """Write a copy of a checkpoint with adapter files in its weights, in their order: what DoRA does depends on the
    weight that it finds, so that the order counts there.

    Computed in fp32 and rounded once, to the dtype and form of each weight. No model is built, and memory stays near
    the largest weight.

    Args:
        checkpoint: one .safetensors file, or the folder of a diffusers component.
        files: each with its multiplier; alone = 1.
        out: a .safetensors file, or a folder where the checkpoint is one.
        prefix: `lora_te1` or `lora_te2`, where the keys of a text encoder fit several.
        device: where it is computed.
        strict: a layer without a weight is an error.
        allow_missing: leave for many layers without a weight: all, or those of some parts.
        overwrite: what is at `out` may be replaced.
        dry_run: check all that can be known, and write nothing.
        progress: shows how far it is.

    Raises:
        ValueError: a file or the checkpoint is broken, they do not belong together, or the output is in the way.
        OSError: it cannot be written; nothing is left behind.
    """
    base, target, given = Checkpoint(Path(checkpoint)), Path(out), _pairs(files)
    check_free(base, target)
    outputs.check_outputs(_replaced(target), [base.path, *(path for path, _ in given)], overwrite)
    _check_space(target, base.size)
    adapters = [MergeInput.open(path, multiplier, base.shapes, prefix) for path, multiplier in given]
    plan = CheckpointMerge(base, adapters, prefix, torch.device(device))
    report = Report("merge", [base.path, *(path for path, _ in given)])
    for adapter in adapters:
        _describe(plan, adapter, _allowance(allow_missing), strict, report)
    plan.check()
    changed = len(plan.changed)
    report.details = {"dry_run": dry_run, "weights_changed": changed, "weights": len(base.shapes), "bytes": base.size}
    if dry_run:
        some = f"{changed} of {len(base.shapes)} tensors would change, {base.size / 2**20:.1f} MiB go to {target}"
        report.notes.append(f"dry run, nothing was written: {some}")
        return report
    with progress(base.size) as step:
        warning = plan.write(target, step)
    report.out = target
    report.notes += [f"{text} ({count} layers)" for text, count in plan.conversions.items()]
    report.notes += [f"warning: {warning}"] if warning else []
    return report


def _pairs(files: Mapping[File, float] | Sequence[Given]) -> list[tuple[Path, float]]:
    if isinstance(files, Mapping):
        return [(Path(file), multiplier) for file, multiplier in files.items()]
    pairs = [each if isinstance(each, tuple) else (each, 1.0) for each in files]
    return [(Path(file), multiplier) for file, multiplier in pairs]


def _allowance(allow_missing: bool | Collection[str]) -> Allowance:
    parts = [*allow_missing] if not isinstance(allow_missing, bool) else [""] if allow_missing else []
    return Allowance.given(parts, "--allow_missing")


def _describe(plan: CheckpointMerge, adapter: MergeInput, allowance: Allowance, strict: bool, report: Report) -> None:
    """Say what of a file is merged, and what is left out.

    Raises:
        ValueError: too much is.
    """
    matched, unmatched = plan.matched(adapter), plan.unmatched(adapter)
    if unmatched and strict:
        raise ValueError(f"{adapter.path}: {len(unmatched)} layers have no weight here, and --strict was given")
    missing = plan.missing(adapter, allowance)
    lines = [*adapter.assumed, missing.counted(), missing.warning(), f"strength by {adapter.file.strength}"]
    if adapter.file.stray:
        lines.append(f"{len(adapter.file.stray)} keys are no adapter, e.g. {adapter.file.stray[0]}")
    report.notes.append(f"{adapter.path} at {adapter.multiplier:g}: {len(matched)} layers matched")
    report.notes += [f"  {line}" for line in lines if line]
    report.dropped += [(name, f"{adapter.path.name} has it, the checkpoint has no such weight") for name in unmatched]
    report.dropped += [(key, f"{adapter.path.name} has it, no adapter") for key in adapter.file.stray]
    became = f"{adapter.path.name} at {adapter.multiplier:g}"
    for name in matched:
        saved = adapter.file.layers.get(name)
        rank = None if saved is None else saved.algorithm.spec.shown_rank(saved.tensors)
        report.rows.append(Row(name, became, rank, error=None))


def _replaced(out: Path) -> list[Path]:
    """What must not be replaced unasked: an empty folder is nothing."""
    return [] if out.is_dir() and not any(out.iterdir()) else [out]


def _check_space(out: Path, size: int) -> None:
    """Whether the disk has room for it, beside what it replaces.

    Raises:
        ValueError: it has not, or nothing can be written there.
    """
    folder = Path(os.path.abspath(outputs.destination(out))).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} is no folder in which {out} could be written: choose another output")
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"no space for {out}: it takes {size / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free: free some, or "
            "save elsewhere"
        )
