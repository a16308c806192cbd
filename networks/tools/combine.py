"""Several adapter files as one: the sum of what each adds, at a strength of its own.

As a LoRA the sum is exact without any limit on the rank: the factors of all stand side by side. With a limit, or as
another algorithm, it is the nearest one, with its error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..args.coerce import coerce, finite, nearest
from ..args.expressions import checked, part_of
from ..args.table import BY_NAME
from ..files import codec, dotted, outputs, writer
from ..files.codec import SavedLayer
from ..tensors.updates import Update, total
from . import metadata
from .convert import FILE_ALGOS, convert, inputs, plain_dtype, targets
from .forms import Form, Shape, row_of, side_by_side
from .opened import Opened
from .ranks import RankRule
from .report import Report, Walk, silently
from .together import Together

File = Path | str


def combine(
    files: Mapping[File, float] | Sequence[File],
    out: File,
    *,
    to: str | Sequence[str] = "lora",
    blocks: Sequence[str] = (),
    model: str = "",
    base: Sequence[File] = (),
    rule: RankRule | None = None,
    factor: int = -1,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_error: float | None = None,
    allow_dropped: bool = False,
    overwrite: bool = False,
    walk: Walk = silently,
) -> Report:
    """Write the sum of adapter files, of any algorithms, ranks, dtypes and layouts.

    Args:
        files: each with its strength, which may be negative; a list = 1 each.
        out: the file to write.
        to: an algorithm (lora, lokr, loha, diff), and if it is to have another form than the trainers', that too.
        blocks: strengths of some layers of a file in place of its own, `FILE:WHAT=0.5`; WHAT is a part (`unet`,
            `text_encoder1`), blocks by their numbers (`blocks.0-7`), or a regular expression on dotted names; of
            several that mean a layer the last one counts.
        model, base, rule, factor, dtype, device, max_error, allow_dropped, overwrite, walk: as for `convert`. Of
            algorithms whose change depends on the weight, and of DoRA, what each adds to the base alone is summed.

    Returns:
        What each layer became, and how far it is from the sum.

    Raises:
        ValueError: the files are not of one model, something would be lost, or the error is above the limit. Nothing
            is written then.
    """
    algo, dialect = targets(to)
    place = Path(out) if dialect is not None and dialect.folder else writer.checked_path(out)
    strengths = dict(files) if isinstance(files, Mapping) else dict.fromkeys(files, 1.0)
    outputs.check_outputs([place], [one for file in strengths for one in inputs(file, base)], overwrite)
    together = Together.of([Opened(path, model, base) for path in strengths])
    form = Form(algo or "lora", rule, factor)
    summed = _Sum(together, _Strengths.of(together, [*strengths.values()], blocks), form, dtype, torch.device(device))
    report = Report("combine", [*strengths])
    report.details = {"strengths": {Path(path).name: value for path, value in strengths.items()}, "blocks": [*blocks]}
    report.dropped = [one for file in together.files for one in together.lost(file)]
    report.check(allow_dropped)
    if dialect is None:
        summed.write(place, report, walk, allow_dropped, max_error)
    else:  # in the trainers' form first, inside the place where the other is made
        with outputs.whole(place) as part:
            plain = part.with_name("combined.safetensors")
            summed.write(plain, report, walk, allow_dropped, max_error)
            made = convert(plain, part, to=dialect.name, model=model, base=base, allow_dropped=allow_dropped)
            report.dropped += made.dropped
    report.out = place
    return report


@dataclass(frozen=True)
class _Strength:
    """Of some layers of a file: those of a part, with these block numbers, whose names match."""

    part: str
    numbers: frozenset[int] | None
    pattern: re.Pattern[str]
    value: float


class _Strengths:
    """How strong each layer of each file is.

    Args:
        together: the files.
        values: of each.
        places: file -> saved name -> (part, dotted name, block number).
    """

    def __init__(self, together: Together, values: Sequence[float]) -> None:
        self.values = dict(zip(together.files, values, strict=True))
        self.own: dict[Opened, list[_Strength]] = {file: [] for file in together.files}
        self.together = together

    @classmethod
    def of(cls, together: Together, values: Sequence[float], blocks: Sequence[str]) -> _Strengths:
        """With those of `blocks`, see `combine`.

        Raises:
            ValueError: one names no file, means no layer, or has no strength.
        """
        found = cls(together, values)
        for text in blocks:
            file, what, value = found._divided(text)
            one = found._read(what, value)
            if not any(found._means(one, file, name) for name in together.layers(file)):
                raise ValueError(f"--blocks {text}: {what} means no layer of {file.path}{found._hint(what, file)}")
            found.own[file].append(one)
        return found

    def __call__(self, file: Opened, name: str) -> float:
        """Of one layer of a file; the last that means it counts."""
        own = (one.value for one in reversed(self.own[file]) if self._means(one, file, name))
        return next(own, self.values[file])

    def _divided(self, text: str) -> tuple[Opened, str, float]:
        head, equals, number = text.rpartition("=")
        names = {spelled: file for file in self.values for spelled in (str(file.path), file.path.name, file.path.stem)}
        spelled = max((name for name in names if head.startswith(f"{name}:")), key=len, default=None)
        if spelled is None or not equals:
            given = head.partition(":")[0]
            raise ValueError(f"--blocks {text}: write FILE:WHAT=0.5 with one of the files{nearest(given, names)}")
        try:
            return names[spelled], head[len(spelled) + 1 :], finite(number)
        except ValueError:
            raise ValueError(f"--blocks {text}: {number!r} is no strength; write FILE:WHAT=0.5") from None

    def _read(self, what: str, value: float) -> _Strength:
        parts = self.together.arch.part_names if self.together.arch is not None else ()
        if what in parts:
            return _Strength(what, None, re.compile(".*"), value)
        head, dot, numbers = what.partition(".")
        if head == "blocks" and dot and re.fullmatch(r"[\d,\- ]+", numbers):
            chosen = coerce(BY_NAME["blocks"], numbers)
            return _Strength("", frozenset(chosen), re.compile(".*"), value)
        part, expression = part_of(checked(what), parts)
        return _Strength(part, None, re.compile(expression), value)

    def _means(self, one: _Strength, file: Opened, name: str) -> bool:
        part, dotted_name, block = self._place(file, name)
        numbered = one.numbers is None or block in one.numbers
        return one.part in ("", part) and numbered and one.pattern.fullmatch(dotted_name) is not None

    def _place(self, file: Opened, name: str) -> tuple[str, str, int | None]:
        """(part, dotted name, block number) of a layer."""
        arch = self.together.arch
        layer = file.model_layers.get(name) if arch is not None else None
        if arch is None or layer is None:
            return "", dotted.shown(name), None
        fitted = arch.fit([one.trainer_name for one in file.model_layers.values() if one.part is arch.denoiser])
        block = fitted.block_of(layer.trainer_name) if layer.part is arch.denoiser else None
        return layer.part.name, layer.trainer_name, block

    def _hint(self, what: str, file: Opened) -> str:
        names = [self._place(file, name)[1] for name in self.together.layers(file)]
        return f", whose layers have names like {names[0]}{nearest(what, names)}" if names else ""


@dataclass(frozen=True)
class _Sum:
    """The layers of the sum."""

    together: Together
    strength: _Strengths
    form: Form
    dtype: torch.dtype | None
    device: torch.device

    def write(self, out: Path, report: Report, walk: Walk, allow_dropped: bool, max_error: float | None) -> None:
        """Write the file in the trainers' form."""
        known = dict[str, str]()
        with writer.streamed(out, self.dtype, known) as stream:
            for name in walk(self.together.names):
                for layer in self._layers(name, report):
                    stream.add({key: t.contiguous() for key, t in codec.write([layer]).items()})
            if not report.rows:
                raise ValueError("every strength is 0, so there is nothing to write")
            report.check(allow_dropped, max_error)
            known |= self._metadata(report)

    def _layers(self, name: str, report: Report) -> list[SavedLayer]:
        """The layer of the sum; none where nothing is added."""
        having = [file for file in self.together.files if name in self.together.layers(file)]
        parts = [(file, strength) for file in having if (strength := self.strength(file, name))]
        if not parts:
            return []
        saved = [self.together.layers(file)[name] for file, _ in parts]
        updates = [self.together.update(file, name).times(strength).to(self.device) for file, strength in parts]
        self._check_shapes(name, parts, updates)
        whole = total(updates)
        shape = next(filter(None, (self.together.shape(file, name) for file, _ in parts)), whole.shape)
        form = replace(self.form, dtype=self.dtype or max(map(plain_dtype, saved), key=lambda dtype: dtype.itemsize))
        made = self._made(name, form, whole, shape)
        report.rows.append(row_of(made, shape, whole, form.rule is None and form.algo != "lokr"))
        return [_with_bias(made, saved, [strength for _, strength in parts], form.dtype)]

    @staticmethod
    def _made(name: str, form: Form, whole: Update, shape: Shape) -> SavedLayer:
        if form.rule is None and form.algo == "lora" and whole.right is not None:
            return side_by_side(name, whole, shape, form.dtype)
        return form.layer(name, whole, shape)

    def _check_shapes(self, name: str, parts: Sequence[tuple[Opened, float]], updates: Sequence[Update]) -> None:
        """
        Raises:
            ValueError: the files have layers of different shapes under one name.
        """
        for (file, _), update in zip(parts, updates, strict=True):
            if update.shape != updates[0].shape:
                first, other = updates[0].shape, update.shape
                raise ValueError(
                    f"{dotted.shown(name)} is {first[0]} x {first[1]} in {parts[0][0].path} and {other[0]} x "
                    f"{other[1]} in {file.path}: give files of one model"
                )

    def _metadata(self, report: Report) -> dict[str, str]:
        """What the files agree on, and what was done."""
        first, *others = (file.metadata for file in self.together.files)
        shared = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
        ranks = [row.rank for row in report.rows if row.rank is not None]
        algo = FILE_ALGOS.get(self.form.algo, self.form.algo)
        found = metadata.told(shared, "combine", {**report.details, "error": report.error}, algo, ranks)
        return {**found, "networks_dialect": "portable"}


def _with_bias(
    made: SavedLayer, saved: Sequence[SavedLayer], strengths: Sequence[float], dtype: torch.dtype
) -> SavedLayer:
    """With the sum of what the layers add to the bias."""
    found = list[Tensor]()
    for one, strength in zip(saved, strengths, strict=True):
        key = one.algorithm.spec.bias_key
        if key in one.tensors:
            found.append(one.tensors[key].double() * strength)
    if not found:
        return made
    return replace(made, tensors={**made.tensors, made.algorithm.spec.bias_key: sum(found[1:], found[0]).to(dtype)})
