"""Several adapter files as one: the sum of what each adds, at a strength of its own.

As a LoRA the sum is exact without any limit on the rank: the factors of all stand side by side. With a limit, or as
another algorithm, it is the nearest one, with its error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..algos.lora import LoRA
from ..archs.places import Layer
from ..archs.spec import ArchSpec
from ..args.coerce import coerce, finite, nearest
from ..args.expressions import checked, part_of
from ..args.table import BY_NAME
from ..files import codec, dotted, outputs, writer
from ..files.codec import SavedLayer
from ..tensors.updates import Update, total
from . import metadata
from .convert import FILE_ALGOS, inputs, plain_dtype, targets, written_as
from .forms import FORMS, Form, Shape, row_of
from .opened import Opened
from .ranks import RankRule
from .report import Report, Walk, silently
from .together import Together

File = Path | str
Files = Mapping[File, float] | Mapping[Path, float] | Mapping[str, float] | Sequence[File]  # each with its strength


def combine(
    files: Files,
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
            `dit`, `text_encoder1`), blocks by their numbers (`blocks.0-7,12` counted as the argument `blocks` does,
            `single_blocks.0-7` by the model's own), or a regular expression on dotted names; of several that mean a
            layer the last one counts.
        model, base, rule, factor, dtype, device, max_error, allow_dropped, overwrite, walk: as for `convert`. Of
            algorithms whose change depends on the weight, and of DoRA, what each adds to the base alone is summed. As
            LoRA without a rule nothing is lost: the factors of all stand side by side; where these are more ranks than
            the layer can have, it has all of those.

    Returns:
        What each layer became, and how far it is from the sum.

    Raises:
        ValueError: the files are not of one model, something would be lost, or the error is above the limit. Nothing
            is written then.
    """
    algo, dialect = targets(to)
    place = Path(out) if dialect is not None and dialect.folder else writer.checked_path(out)
    strengths = _strengths(files)
    outputs.check_outputs([place], [one for file in strengths for one in inputs(file, base)], overwrite)
    together = Together.of([Opened(path, model, base) for path in strengths])
    form = Form(algo or "lora", rule, factor)
    summed = _Sum(together, _Strengths.of(together, [*strengths.values()], blocks), form, dtype, torch.device(device))
    report = Report("combine", [*strengths])
    told = [{"file": Path(file).name, "strength": value} for file, value in strengths.items()]
    report.details = {"strengths": told, "blocks": [*blocks]}
    report.dropped = [one for file in together.files for one in together.lost(file)]
    report.notes = [*filter(None, map(together.order, together.files))] if len(strengths) > 1 else []
    report.check(allow_dropped)
    written_as(
        place,
        dialect,
        lambda path: summed.write(path, report, walk, allow_dropped, max_error),
        report,
        model=model,
        base=base,
        max_error=max_error,
        allow_dropped=allow_dropped,
    )
    return report


def _strengths(files: Files) -> dict[File, float]:
    """
    Raises:
        ValueError: one is no number, or a file is there twice.
    """
    pairs = files.items() if isinstance(files, Mapping) else [(file, 1.0) for file in files]
    found: dict[File, float] = {file: strength for file, strength in pairs}
    if len({Path(file) for file in found}) < len(files):
        raise ValueError("a file is given twice: give it once, with the sum of its strengths")
    for file, value in found.items():
        if not math.isfinite(value):
            raise ValueError(f"{file}: the strength {value} is no finite number")
    return found


@dataclass(frozen=True)
class _Place:
    """Where a layer is.

    Attributes:
        part: of the architecture; "" = not known.
        name: dotted.
        numbers: of its block, as `blocks` counts and below the name of its row of blocks.
    """

    part: str
    name: str
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Strength:
    """Of some layers of a file: those of a part, with these numbers of blocks, whose names match.

    Attributes:
        part: "" = all.
        row: by which count the numbers are; "" = there are none.
    """

    part: str
    pattern: re.Pattern[str]
    value: float
    row: str = ""
    numbers: frozenset[int] = frozenset()

    def means(self, place: _Place) -> bool:
        numbered = not self.row or place.numbers.get(self.row) in self.numbers
        return self.part in ("", place.part) and numbered and self.pattern.fullmatch(place.name) is not None


_ALL = re.compile(".*")


class _Strengths:
    """How strong each layer of each file is.

    Args:
        together: the files.
        values: of each.
    """

    def __init__(self, together: Together, values: Sequence[float]) -> None:
        self.values = dict(zip(together.files, values, strict=True))
        self.own: dict[Opened, list[_Strength]] = {file: [] for file in together.files}
        self.together = together
        self.rows: dict[str, int] = {}  # name of a count of blocks -> the last number that the model has
        self.places = {file: self._places_of(file) for file in together.files}

    @classmethod
    def of(cls, together: Together, values: Sequence[float], blocks: Sequence[str]) -> _Strengths:
        """With those of `blocks`, see `combine`.

        Raises:
            ValueError: one names no file, means no layer, or has no strength.
        """
        found = cls(together, values)
        for text in blocks:
            file, what, value = found._divided(text)
            one = found._read(text, what, value)
            if not any(map(one.means, found.places[file].values())):
                raise ValueError(f"--blocks {text}: {what} means no layer of {file.path}{found._hint(what, file)}")
            found.own[file].append(one)
        return found

    def __call__(self, file: Opened, name: str) -> float:
        """Of one layer of a file; the last that means it counts."""
        own = (one.value for one in reversed(self.own[file]) if one.means(self.places[file][name]))
        return next(own, self.values[file])

    def _divided(self, text: str) -> tuple[Opened, str, float]:
        """The file, what of it, and the strength. A path may have colons and equals signs."""
        head, equals, number = text.rpartition("=")
        names = [(name, file) for file in self.values for name in {str(file.path), file.path.name, file.path.stem}]
        longest = max((len(name) for name, _ in names if head.startswith(f"{name}:")), default=0)
        meant = [file for name, file in names if len(name) == longest and head.startswith(f"{name}:")]
        if len(meant) > 1:
            raise ValueError(
                f"--blocks {text}: {head[:longest]} is the name of {len(meant)} files; write the path of one"
            )
        if not meant or not equals:
            hint = nearest(head.partition(":")[0], [name for name, _ in names])
            raise ValueError(f"--blocks {text}: write FILE:WHAT=0.5 with one of the files{hint}")
        try:
            return meant[0], head[longest + 1 :], finite(number)
        except ValueError:
            raise ValueError(f"--blocks {text}: {number!r} is no strength; write FILE:WHAT=0.5") from None

    def _read(self, text: str, what: str, value: float) -> _Strength:
        arch = self.together.arch
        parts = arch.part_names if arch is not None else ()
        if what in parts:
            return _Strength(what, _ALL, value)
        row = next((row for row in self.rows if re.fullmatch(rf"{re.escape(row)}\.[\d,\- ]+", what)), "")
        if not row:
            part, expression = part_of(checked(what), parts)
            return _Strength(part, re.compile(expression), value)
        numbers = frozenset(coerce(BY_NAME["blocks"], what[len(row) + 1 :]))
        if max(numbers, default=0) > self.rows[row]:
            raise ValueError(f"--blocks {text}: this model has {row}.0 to {self.rows[row]}")
        return _Strength("", _ALL, value, row, numbers)

    def _places_of(self, file: Opened) -> Mapping[str, _Place]:
        """Of all layers of a file."""
        arch, layers = self.together.arch, self.together.layers(file)
        if arch is None:
            return {name: _Place("", dotted.shown(name)) for name in layers}
        model = file.model_layers
        arch = arch.fit([one.trainer_name for one in model.values() if one.part is arch.denoiser])
        places = {name: _place(arch, one) for name, one in model.items()}
        for place in places.values():
            self.rows |= {row: max(number, self.rows.get(row, 0)) for row, number in place.numbers.items()}
        return {name: places.get(name) or _Place("", dotted.shown(name)) for name in layers}

    def _hint(self, what: str, file: Opened) -> str:
        """What there is, for a message."""
        arch, names = self.together.arch, [place.name for place in self.places[file].values()]
        if arch is None:
            known = "parts and numbers of blocks are known of a model alone, say it with --model"
        else:
            known = f"parts are {', '.join(arch.part_names)}"
        return f"{nearest(what, [*(arch.part_names if arch else ()), *names])}; names are like {names[0]}, {known}"


def _place(arch: ArchSpec, layer: Layer) -> _Place:
    """Of a layer of a model to which this record is fitted."""
    if layer.part.name != arch.denoiser.name:
        return _Place(layer.part.name, layer.trainer_name)
    own = {axis.prefix.rstrip("."): axis.index(layer.trainer_name) for axis in arch.axes}
    numbers = {**own, "blocks": arch.block_of(layer.trainer_name)}
    return _Place(layer.part.name, layer.trainer_name, {row: n for row, n in numbers.items() if n is not None})


@dataclass(frozen=True)
class _Part:
    """What one file adds to a layer.

    Attributes:
        update: at its strength.
        shape: of the weight; () = nothing tells.
    """

    file: Opened
    saved: SavedLayer
    strength: float
    update: Update
    shape: Shape


@dataclass(frozen=True)
class _Sum:
    """The layers of the sum."""

    together: Together
    strength: _Strengths
    form: Form
    dtype: torch.dtype | None
    device: torch.device
    alphas: set[float | None] = field(default_factory=set)  # of the layers made

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
        parts = [one for file in self.together.files if (one := self._part(file, name)) is not None]
        if not parts:
            return []
        self._check_shapes(name, parts)
        updates = [part.update for part in parts]
        whole, shape = total(updates), next((part.shape for part in parts if part.shape), updates[0].shape)
        dtype = self.dtype or max((plain_dtype(part.saved) for part in parts), key=lambda dtype: dtype.itemsize)
        form, scale = replace(self.form, dtype=dtype), max(abs(part.saved.scale * part.strength) for part in parts)
        made = self._side_by_side(name, updates, shape, scale, dtype) or form.layer(name, whole, shape)
        report.rows.append(row_of(made, shape, whole, form.exact))
        self.alphas.add(made.alpha)
        return [_with_bias(made, parts, dtype)]

    def _part(self, file: Opened, name: str) -> _Part | None:
        """What a file adds to a layer; None = nothing."""
        saved = self.together.layers(file).get(name)
        strength = self.strength(file, name) if saved is not None else 0.0
        if saved is None or not strength:
            return None
        update = self.together.update(file, name).times(strength).to(self.device)
        return _Part(file, saved, strength, update, self.together.shape(file, name))

    def _side_by_side(
        self, name: str, updates: Sequence[Update], shape: Shape, scale: float, dtype: torch.dtype
    ) -> SavedLayer | None:
        """A LoRA of the very factors of all updates; None where something else is wanted, or one has none.

        Args:
            name, shape: of the layer.
            updates: of one weight.
            scale: alpha / rank of the LoRA, so that factors of an update with this scale keep their values.
            dtype: of the tensors.
        """
        rights = [one.right for one in updates if one.right is not None]
        by_factors = FORMS[self.form.algo].by_factors and self.form.rule is None
        if not by_factors or len(rights) < len(updates):
            return None
        ranks, most = sum(map(len, rights)), min(updates[0].shape)
        if ranks > most:
            return replace(self.form, rule=RankRule(most), dtype=dtype).layer(name, total(updates), shape)
        left = torch.cat([one.left for one in updates], 1) / scale
        down = torch.cat(rights).reshape(ranks, *shape[1:])
        up = left.reshape(*left.shape, *[1] * (len(shape) - 2))
        tensors = {LoRA.spec.keys["down"]: down.to(dtype), LoRA.spec.keys["up"]: up.to(dtype)}
        return SavedLayer(name, LoRA, tensors, scale * ranks)

    @staticmethod
    def _check_shapes(name: str, parts: Sequence[_Part]) -> None:
        """
        Raises:
            ValueError: the files have layers of different shapes under one name.
        """
        first = parts[0]
        for part in parts:
            if part.update.shape != first.update.shape:
                sizes = [" x ".join(map(str, one.update.shape)) for one in (first, part)]
                raise ValueError(
                    f"{dotted.shown(name)} is {sizes[0]} in {first.file.path} and {sizes[1]} in {part.file.path}: give "
                    "files of one model"
                )

    def _metadata(self, report: Report) -> dict[str, str]:
        """What the files agree on, and what was done."""
        first, *others = (file.metadata for file in self.together.files)
        shared = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
        ranks = [row.rank for row in report.rows if row.rank is not None]
        algo = FILE_ALGOS.get(self.form.algo, self.form.algo)
        found = metadata.told(shared, "combine", {**report.details, "error": report.error}, algo, ranks)
        if "ss_network_alpha" in found:
            alphas = {alpha for alpha in self.alphas if alpha is not None}
            found["ss_network_alpha"] = f"{min(alphas):g}" if len(alphas) == 1 else "Dynamic"
        return {**found, "networks_dialect": "portable"}


def _with_bias(made: SavedLayer, parts: Sequence[_Part], dtype: torch.dtype) -> SavedLayer:
    """With the sum of what the parts add to the bias."""
    found = [
        part.saved.tensors[key].double() * part.strength
        for part in parts
        if (key := part.saved.algorithm.spec.bias_key) in part.saved.tensors
    ]
    if not found:
        return made
    return replace(made, tensors={**made.tensors, made.algorithm.spec.bias_key: sum(found[1:], found[0]).to(dtype)})
