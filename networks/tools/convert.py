"""Convert an adapter file: to the form of another program, to another algorithm, or to both.

Exact where algebra allows: LoHa, LoKr and GLoRA are LoRAs of more ranks, every algorithm is a difference of weights,
DoRA has a form for ComfyUI. Otherwise the nearest of the rank that is asked for, with the error as it stands in the
file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import located
from ..args.coerce import nearest
from ..files import dotted, writer
from ..files.adapter_file import FileTensors, Naming
from ..files.codec import SavedLayer
from ..files.dialects import DIALECTS, PORTABLE, Dialect
from ..files.joining import NeedsBase, update_of
from ..files.keys import FileKeys
from ..files.outputs import check_outputs, whole
from ..files.strengths import CONFIG
from . import metadata
from .forms import FORM_OF, FORMS, Form, Shape, row_of
from .opened import Opened
from .ranks import RankRule
from .report import Report, Row, Walk, silently

ALIASES = {"lycoris": PORTABLE.name}  # which reads that form
TARGETS = (*DIALECTS, *ALIASES, *FORMS)
FILE_ALGOS = {form: algo for algo, form in FORM_OF.items()}
Told = Callable[[], Mapping[str, str]]  # checks the report, and gives the metadata of the file


@dataclass(frozen=True)
class Wanted:
    """What layers are to become.

    Attributes:
        algo: one of FORMS; "" = each stays what it is.
        rule, factor, dtype: as of Form; dtype None = that of each layer.
        device: where it is computed.
    """

    algo: str = ""
    rule: RankRule | None = None
    factor: int = -1
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not self.algo and (self.rule is not None or self.factor != -1):
            raise ValueError(f"a rank or a factor is for an algorithm: add --to {' or '.join(FORMS)}")
        if self.algo:
            self.form(torch.float32)

    def form(self, own: torch.dtype) -> Form:
        """Of a layer of this dtype."""
        return Form(self.algo, self.rule, self.factor, self.dtype or own)

    def is_met(self, saved: SavedLayer) -> bool:
        """Whether a layer stays what it is: it is that already, or of a kind which has one form alone."""
        if not self.algo or saved.algorithm.spec.family != "matrix":
            return True
        spec = saved.algorithm.spec
        own = spec.file_algo == FILE_ALGOS.get(self.algo, self.algo) and saved.magnitude is None
        has_core = spec.keys.get(spec.core) in saved.tensors and FORMS[self.algo].exact  # which few programs know
        return own and not has_core and self.rule is None and self.factor == -1

    @property
    def exact(self) -> bool:
        """Whether what it makes is what was there, but for rounding."""
        return not self.algo or self.form(torch.float32).exact

    def made(self, saved: SavedLayer, shape: Shape, weight: Callable[[str], Tensor | None]) -> SavedLayer:
        """A layer in that algorithm: exact where no rank is asked for and there is a way.

        Args:
            saved: the layer.
            shape: of its weight; () = as its tensors show it.
            weight: gives that weight, None where it is not known; asked if the result depends on it.

        Raises:
            ValueError: it depends on the weight, which is not known; or as many ranks as it takes are more than there
                is room for.
        """
        if self.is_met(saved):
            return saved
        with located(dotted.shown(saved.name)):
            return on_base(lambda base: self._made(on_device(saved, self.device), shape, base), saved.name, weight)

    def _made(self, saved: SavedLayer, shape: Shape, weight: Tensor | None) -> SavedLayer:
        form, kind = self.form(plain_dtype(saved)), FORMS[self.algo]
        if kind.exact is not None and self.rule is None and not (saved.magnitude is not None and kind.ranked):
            exact = kind.exact(saved, shape or saved.algorithm.shown_shape(saved.tensors) or (), weight)
            if exact is not None:
                return replace(exact, tensors={key: t.to(form.dtype).contiguous() for key, t in exact.tensors.items()})
        update = update_of(saved, shape, weight)
        made = form.layer(saved.name, update, shape or update.shape)
        if saved.bias_change is None:
            return made
        key, own = made.algorithm.spec.bias_key, saved.algorithm.spec.bias_key
        return replace(made, tensors={**made.tensors, key: saved.tensors[own].to(form.dtype)})


def on_base(make: Callable[[Tensor | None], Any], name: str, weight: Callable[[str], Tensor | None]) -> Any:
    """What `make` makes without a base weight, or with it where it has to be.

    Args:
        name: of the layer, by which `weight` knows it.

    Raises:
        ValueError: it has to be, and is not known.
    """
    try:
        return make(None)
    except NeedsBase:
        found = weight(name)
    if found is None:
        raise ValueError("what it becomes depends on the weight below it: give the model, --base CHECKPOINT")
    return make(found)


def plain_dtype(saved: SavedLayer) -> torch.dtype:
    """Of a layer that is made from this one: its widest, bfloat16 for float8."""
    dtypes = [t.dtype for t in saved.tensors.values() if t.is_floating_point() and t.itemsize > 1]
    return max(dtypes, key=lambda dtype: dtype.itemsize) if dtypes else torch.bfloat16


def on_device(saved: SavedLayer, device: torch.device) -> SavedLayer:
    tensors = {key: tensor.to(device) for key, tensor in saved.tensors.items()}
    return replace(saved, tensors=tensors, magnitude=None if saved.magnitude is None else saved.magnitude.to(device))


def convert(
    file: Path | str,
    out: Path | str,
    *,
    to: str | Sequence[str],
    model: str = "",
    base: Sequence[Path | str] = (),
    rule: RankRule | None = None,
    factor: int = -1,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_error: float | None = None,
    allow_dropped: bool = False,
    overwrite: bool = False,
    walk: Walk = silently,
) -> Report:
    """Write a file in another form.

    Args:
        file: of any form that is read here, or a folder which PEFT wrote.
        out: the file to write; for `peft` a folder.
        to: an algorithm (lora, lokr, loha, diff), the form of a program (portable, comfyui, diffusers, peft, blissful,
            oft, oft_flux), or one of each.
        model: what the file is for, where names and metadata leave that open: a name, a diffusers folder, a checkpoint.
        base: checkpoints of that model, where the result depends on the weights; `lora_te1=PATH` for a text encoder
            in a file of its own.
        rule: of the rank; None = as many as it takes.
        factor: of a LoKr; -1 = the most even split.
        dtype: of the tensors; None = that of each layer, bfloat16 for float8.
        device: where it is computed.
        max_error: the largest error of all layers together, a share of the whole update.
        allow_dropped: go on where something of the file has no place.
        overwrite: whether a file at `out` may be replaced.
        walk: goes over the layers, and may show how far it is.

    Returns:
        What each layer became, and how far it is from what it was.

    Raises:
        ValueError: the file, the target or the base do not go together; something would be lost; or the error is above
            the limit. Nothing is written then.
    """
    from .for_program import ForProgram

    algo, dialect = targets(to)
    wanted = Wanted(algo, rule, factor, dtype, torch.device(device))
    place = Path(out) if dialect is not None and dialect.folder else writer.checked_path(out)
    check_outputs([place], inputs(file, base), overwrite)
    opened, report = Opened(file, model, base), Report("convert", [file])
    report.dropped += [(str(one), "is an adapter of its own in that folder: convert it, too") for one in below(file)]
    job: _OwnNames | ForProgram
    job = _OwnNames(opened, wanted, report) if dialect is None else ForProgram(opened, wanted, dialect, report)
    report.details = {"to": [name for name in (algo, dialect and dialect.name) if name]}
    report.check(allow_dropped)  # what is known before any work

    def told() -> Mapping[str, str]:
        report.check(allow_dropped, max_error)
        details = {**report.details, "input": opened.path.name, "error": report.error}
        changed = FILE_ALGOS.get(algo, algo) if any(row.became for row in report.rows) else ""
        ranks = [row.rank for row in report.rows if row.rank is not None] if changed else []
        known = metadata.told(opened.metadata, "convert", details, changed, ranks)
        if changed and rule is None:  # each layer keeps its scale
            known.pop("ss_network_alpha", None)
        return known if dialect is None else {**known, "networks_dialect": dialect.name}

    job.write(place, walk, told)
    report.out = place
    return report


def below(file: Path | str) -> list[Path]:
    """The folders of text encoders' adapters in one that PEFT wrote."""
    return sorted(config.parent for config in Path(file).glob(f"*/{CONFIG}")) if Path(file).is_dir() else []


def written_as(
    place: Path, dialect: Dialect | None, write: Callable[[Path], None], report: Report, **options: Any
) -> None:
    """Put a file, which `write` makes in the trainers' form, at its place: in the form of a program, if there is one.

    Args:
        place: of the file that is asked for.
        dialect: of the program; None = the trainers' form is what is asked for.
        write: makes a file, given its path.
        report: takes what the program's form has no place for, and the place.
        options: of `convert`.
    """
    if dialect is None:
        write(place)
    else:  # in the trainers' form first, inside the place where the other is made
        with whole(place) as part:
            plain = part.with_name("plain.safetensors")
            write(plain)
            made = convert(plain, part, to=dialect.name, **options)
            report.dropped += made.dropped
            report.notes += [f"as {dialect.name}: {line}" for line in made.lines()]
    report.out = place


def inputs(file: Path | str, base: Sequence[Path | str]) -> list[Path]:
    """All that is read, and must not be written over."""
    from ..files.base_weights import divided

    return [Path(file), *(divided(one)[1] for one in base)]


def targets(to: str | Sequence[str]) -> tuple[str, Dialect | None]:
    """(one of FORMS or "", the dialect or None) of the names of targets.

    Raises:
        ValueError: there is none of that name, or two of a kind.
    """
    names = [ALIASES.get(name, name) for name in ([to] if isinstance(to, str) else to)]
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"there is no target {name} ({', '.join(TARGETS)}){nearest(name, TARGETS)}")
    algos, dialects = [name for name in names if name in FORMS], [name for name in names if name in DIALECTS]
    if max(len(algos), len(dialects)) != 1:
        raise ValueError(
            f"to={', '.join(names) or 'nothing'}: give an algorithm, the form of a program, or one of each"
        )
    return "".join(algos), DIALECTS[dialects[0]] if dialects else None


class _OwnNames:
    """A file whose layers keep its names: those that have changed under their former keys, all else as it stands.

    Args:
        opened: the file.
        wanted: what its layers are to become.
        report: takes what becomes of them.
    """

    def __init__(self, opened: Opened, wanted: Wanted, report: Report) -> None:
        self.opened, self.wanted, self.report = opened, wanted, report
        self.keys, own = FileKeys(opened.own, whole=True), opened.own
        self.rest = self.keys.rest()
        if not any(saved.magnitude is not None and wanted.is_met(saved) for saved in own.layers.values()):
            self.rest.pop(own.flags.dialect.fold_flag, None)

    def write(self, out: Path, walk: Walk, told: Told) -> None:
        """Write it, with what `told` says when all layers are there."""
        known = dict[str, str]()
        with writer.streamed(out, self.wanted.dtype, known) as stream:
            stream.add(self.rest)
            for name in walk([*self.opened.own.layers]):
                made = self._made(name)
                written = self.keys.of(made)
                self.report.rows.append(self._row(name, made, written, stream.add(written)))
            known |= told()

    def _made(self, name: str) -> SavedLayer:
        opened, saved = self.opened, self.opened.own.layers[name]
        with located(str(opened.path)):
            if self.wanted.is_met(saved):
                return saved
            return self.wanted.made(saved, opened.shape(name) or (), opened.weight)

    def _row(self, name: str, made: SavedLayer, written: Mapping[str, Tensor], stands: Mapping[str, Tensor]) -> Row:
        """What became of a layer.

        Args:
            made: it.
            written: its tensors.
            stands: the same as the file has them.
        """
        opened, stays = self.opened, is_same(made, self.opened.own.layers[name])
        if stays and is_whole(written, stands):
            return kept(made)
        flags = {key: tensor for key, tensor in self.rest.items() if "." not in key}
        try:
            update = opened.update(name).to(self.wanted.device)
            weight = None if made.magnitude is None else opened.weight(name)
        except ValueError:
            if not stays:
                raise
            return replace(kept(made), error=None)
        shape = opened.shape(name) or update.shape
        row = row_of(as_it_stands(made, {**flags, **stands}), shape, update, stays or self.wanted.exact, weight)
        return replace(row, became="") if stays else row


def is_same(layer: SavedLayer, before: SavedLayer) -> bool:
    """Whether a layer has the very tensors that it had."""
    return layer.tensors is before.tensors and layer.magnitude is before.magnitude


def is_whole(written: Mapping[str, Tensor], stands: Mapping[str, Tensor]) -> bool:
    """Whether a file has tensors in dtypes that hold all of their values."""
    return all(torch.promote_types(t.dtype, stands[key].dtype) == stands[key].dtype for key, t in written.items())


def as_it_stands(layer: SavedLayer, stands: Mapping[str, Tensor]) -> SavedLayer:
    """A layer as a reader finds it.

    Args:
        layer: as it was to be.
        stands: its tensors in the file, and what is said there of all layers.
    """
    (found,) = FileTensors(stands).opened(Naming()).layers.values()
    return replace(found, folded=layer.folded)


def kept(saved: SavedLayer) -> Row:
    """The row of a layer that stays."""
    return Row(dotted.shown(saved.name), rank=saved.algorithm.spec.shown_rank(saved.tensors))
