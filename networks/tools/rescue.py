"""What is wrong with a file that does not work elsewhere, and the good file where there can be one.

The causes in the bare tensors come first (`causes`); then what only a model tells: layers that it has not, magnitudes,
names of another program. What was made is proved before it is written: it is opened as any file is, its updates are
compared, and the models of other programs say what they make of it.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import located
from ..archs.names import nearest_layout
from ..files import codec, dotted, reader, strengths, twins, writer
from ..files.adapter_file import FileTensors, Naming
from ..files.base_weights import divided
from ..files.codec import SavedLayer
from ..files.dialects import COMFYUI, DIALECTS, PORTABLE, Dialect, FileFormat
from ..files.joining import NeedsBase, update_of
from ..files.keys import FileKeys
from ..files.merged import refolded
from ..files.outputs import check_outputs
from ..files.verdicts import Verdict, verdicts
from ..models.adapters import given_of, nearest_model
from ..models.skeleton import Skeleton
from ..tensors.norms import weight_geometry
from .causes import CAUSES, Finding, Patient
from .convert import Wanted
from .for_program import ForProgram, with_alpha
from .metadata import told
from .opened import Opened
from .report import Report, Row, Walk, silently

TARGETS = tuple(name for name, dialect in DIALECTS.items() if not dialect.folder)
# Of a layer's magnitudes: if so many round to ||W||, training has moved them by less than bf16 shows, and ||W|| is
# nearer to what they were: an error of 1.7e-3 becomes 6e-4 and less. Where half of them have moved, it would grow.
UNTOUCHED = 0.9


def rescue(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: str = "",
    model: str = "",
    base: Sequence[Path | str] = (),
    strength: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_dropped: bool = False,
    overwrite: bool = False,
    walk: Walk = silently,
) -> Report:
    """Say what is wrong with a file, and write the good one.

    Args:
        file: which other programs refuse or read wrongly.
        out: the .safetensors file to write; None = it is only looked at.
        to: the form that the file is to have, one of TARGETS; "" = portable, or its own names where nothing tells
            what it is for.
        model: what it is for, where names and metadata leave that open: as for `skeleton`. A checkpoint is its base,
            too.
        base: checkpoints with the weights on which it acts, where a cure depends on them.
        strength: of layers that do not say it themselves.
        dtype: of the tensors; None = as they are.
        device: where it is computed.
        allow_dropped: write although something of the file is lost.
        overwrite: whether `out` may exist.
        walk: goes over the layers, and may show how far it is.

    Returns:
        The report; `details["findings"]` has what is wrong, `details["readers"]` the programs before and after.

    Raises:
        ValueError: nothing can be read of it, or nothing can be written; the sentence says why.
    """
    if to not in ("", *TARGETS):
        raise ValueError(f"there is no form {to}: one of {', '.join(TARGETS)}")
    base = base or ([model] if model and Path(model).is_file() else [])
    target = None if out is None else _checked(out, [Path(file), *(divided(one)[1] for one in base)], overwrite)
    report = Report("rescue", [Path(file)])
    patient, findings = _examined(file, strength, model)
    case = _Case(patient, findings, to, model, base, torch.device(device))
    made = writer.cast(case.made(target is not None), dtype)
    report.rows = case.rows(made, walk)
    report.dropped = [(name, one.what) for one in case.findings if one.lost for name in one.where]
    report.details = {
        "findings": [one.to_dict() for one in case.findings],
        "sound": not case.findings,
        "model": case.title,
        "readers": case.readers(made),
    }
    report.notes = [*patient.notes, *case.remarks(report)]
    if target is not None:
        report.check(allow_dropped)
        report.out = writer.write_tensors(target, made, metadata=case.metadata)
        with located(f"{target} was written and does not prove right"):
            FileTensors(target).opened(Naming()).all_read()
    return report


def _checked(out: str | os.PathLike[str], inputs: Sequence[Path], overwrite: bool) -> Path:
    target = writer.checked_path(out)
    check_outputs([target], inputs, overwrite)
    return target


def _examined(file: str | os.PathLike[str], strength: float | None, model: str) -> tuple[Patient, list[Finding]]:
    """A file after all causes in its bare tensors."""
    remains = reader.read_remains(file)
    findings, settings = list[Finding](), None
    if remains.damage:
        cure = "every tensor that is complete is taken out of it, by what its header says"
        findings.append(Finding(remains.damage, (), cure))
    for why in dict.fromkeys(why for _, why in remains.lost):
        names = tuple(name for name, one in remains.lost if one == why)
        findings.append(Finding(f"tensors cannot be read, {why}", names, "left out", lost=True))
    try:
        settings = strengths.beside(reader.checked_path(file))
    except ValueError as error:
        findings.append(Finding(str(error), (), "it counts as missing"))
    patient = Patient(str(file), remains.tensors, remains.metadata, settings, strength, model)
    for cause in CAUSES:
        findings += cause(patient)
    if not patient.layers:
        if not any(one.lost for one in findings):
            first = next(iter(remains.tensors), "nothing")
            raise ValueError(f"{file} is no adapter: its keys look like {first}; give an adapter file")
        told_of = "; ".join(f"{one.what} ({', '.join(one.where[:3])})" for one in findings if one.lost)
        raise ValueError(f"nothing is left of {file}: {told_of}; use an earlier save")
    return patient, findings


class _Case:
    """A file whose tensors are mended as far as they can be without a model.

    Args:
        patient, findings: of `_examined`.
        to, model, base, device: as for `rescue`.

    Raises:
        ValueError: nothing is left of it, or what is left is refused for a reason that nobody can mend.
    """

    def __init__(
        self,
        patient: Patient,
        findings: list[Finding],
        to: str,
        model: str,
        base: Sequence[Path | str],
        device: torch.device,
    ) -> None:
        self.patient, self.findings, self.to, self.device = patient, findings, to, device
        self.opened = Opened(patient.source, model, base, patient.opened())
        try:
            self._strays()
            self.own = self.opened.own
        except ValueError as error:
            told = [one.what for one in findings if not one.cure and one.what.startswith(str(error))]
            raise ValueError(told[0] if told else str(error)) from None
        self.model = self._model(model)
        self.title = "" if self.model is None else self.model.title

    @property
    def metadata(self) -> dict[str, str]:
        """Of the new file."""
        found = told(self.patient.metadata, "rescue", {"found": [one.what for one in self.findings]})
        return found if self.model is None else {**found, "networks_dialect": self.to or PORTABLE.name}

    def _strays(self) -> None:
        """Keys that are no adapter go."""
        file = self.patient.opened().opened(Naming())
        if file.stray and file.families:
            own = {dotted.shown(key): key for key in self.patient.tensors}
            keys = tuple(own.get(dotted.shown(key), key) for key in file.stray)
            self.patient.remove(key for key in keys if key in self.patient.tensors)
            self.findings.append(Finding("keys are no adapter", keys, "left out", lost=True))
            self.opened.tensors = self.patient.opened()

    def _model(self, model: str) -> Skeleton | None:
        try:
            return self.opened.model
        except ValueError as error:
            nearest = None if model else nearest_model(self.opened.tensors)
            if nearest is not None:
                self.opened.model = nearest
                return nearest
            if model or self.to:
                raise
            self.patient.notes.append(f"{error}: until then its names stay, and no program's opinion is known")
            return None

    # -- the good file

    def made(self, wanted: bool) -> dict[str, Tensor]:
        """The tensors of the good file; where it is not wanted none, and a finding more, if there can be no such file.

        Raises:
            ValueError: it is wanted, and there can be none.
        """
        try:
            return self._cured()
        except ValueError as error:
            if wanted:
                raise
            self.findings.append(Finding(str(error)))
            return {}

    def _cured(self) -> dict[str, Tensor]:
        if self.model is None:
            self.layers = dict(self.own.layers)
            keys = FileKeys(self.own)
            made = {key: t for layer in self.layers.values() for key, t in keys.of(layer).items()}
            return made | keys.rest()
        self._names()
        self.layers = {name: self._with_magnitudes(saved) for name, saved in self._placed().items()}
        if not self.layers:
            raise ValueError(
                f"{self.patient.source}: {self.title} has none of its layers: say which model it is for, --model"
            )
        self._magnitudes_told()
        return self._written(DIALECTS[self.to or PORTABLE.name])

    def _names(self) -> None:
        paths = dotted.layers(self.patient.tensors)
        arch = self.opened.arch
        spoken = Naming(arch).shares(paths)
        foreign = [path for path, found in spoken.items() if path != found[0].name]
        if foreign:
            whose = nearest_layout(paths, [arch]) or f"not those which the trainers have for {arch.title}"
            form = self.to or PORTABLE.name
            cure = f"written under the names of the form {form}"
            self.findings.append(
                Finding(f"its names are {whose}", tuple(foreign[:1]), f"{cure}, {len(foreign)} layers")
            )
        flags = self.own.flags
        if flags.rs_lora:
            what = (
                f"its alphas are to be divided by the root of the rank, as {flags.dialect.rs_flag} in it says, which "
            )
            cure = "" if self.to == flags.dialect.name else "written so that alpha / rank is the strength"
            self.findings += [Finding(f"{what}few programs read", (), cure)] if cure else []
        suffixes = {path: set(keys) for path, keys in self.patient.layers.items()}
        swapped = twins.right_names({path: keys for path, keys in suffixes.items() if "." not in path}, True)
        if swapped:
            what = "layers have each other's names, as earlier versions of this package saved them"
            self.findings.append(Finding(what, tuple(swapped), "written under their own"))

    def _placed(self) -> dict[str, SavedLayer]:
        """The layers that the model has, under the trainer's names, as its own are."""
        file, there = self.opened.tensors.opened(Naming(self.opened.arch)), self.opened.model_layers
        found, why = dict[str, SavedLayer](), dict[str, list[str]]()
        for name in [*file.layers, *file.portions]:
            try:
                if name not in there:
                    raise ValueError(f"{self.title} has no such layer")
                shape = there[name].shape
                saved = file.layers.get(name) or file.layer_of(name, shape, self.opened.base)[0]
                saved.describe(weight_geometry(shape))
                found[name] = saved
            except ValueError as error:
                why.setdefault(str(error).removeprefix(f"{name}: "), []).append(name)
        for reason, names in why.items():
            self.findings.append(Finding(reason, tuple(names), "left out", lost=True))
        return found

    def _written(self, dialect: Dialect) -> dict[str, Tensor]:
        """The layers in a form: as the trainers have them, and from there as any file becomes one of it."""
        folded = any(saved.folded for saved in self.layers.values())
        plain = COMFYUI if folded else PORTABLE  # its mark, under the trainers' names
        marked = (with_alpha(saved) for saved in self.layers.values())
        made = codec.written(marked, FileFormat(plain, arch=self.opened.arch))
        if dialect is PORTABLE and not folded:
            return made
        again, report = self.opened.with_tensors(FileTensors(made, self.patient.source)), Report("rescue", [])
        made = ForProgram(again, Wanted(device=self.device), dialect, report).tensors(silently)
        why: dict[str, list[str]] = {}
        for name, reason in report.dropped:
            why.setdefault(reason, []).append(name)
            self.layers.pop(name, None)
        self.findings += [Finding(reason, tuple(names), "left out", lost=True) for reason, names in why.items()]
        self.patient.notes += report.notes
        return made

    def _weight(self, name: str) -> Tensor:
        if self.opened.base is None:
            raise ValueError(f"{dotted.shown(name)} depends on the weight below it: give the model, --base CHECKPOINT")
        return self.opened.base(name)

    # -- magnitudes

    @functools.cached_property
    def _about(self) -> dict[str, list[str]]:
        """What was done about magnitudes -> layers."""
        return {"unfolded": [], "folded": [], "exact": [], "rounded": []}

    def _with_magnitudes(self, saved: SavedLayer) -> SavedLayer:
        """With magnitudes as they act, in fp32, and exact where they are known to be."""
        magnitude = saved.magnitude
        if magnitude is None:
            return saved
        if saved.folded:
            self._about["folded" if self.opened.base is None else "unfolded"].append(saved.name)
            return saved if self.opened.base is None else refolded(saved, self._weight(saved.name), False)
        if magnitude.itemsize < 4:
            exact = self._exact(saved, magnitude)
            self._about["rounded" if exact is None else "exact"].append(saved.name)
            return replace(saved, magnitude=magnitude.float() if exact is None else exact)
        return saved

    def _exact(self, saved: SavedLayer, magnitude: Tensor) -> Tensor | None:
        """Of a layer whose magnitudes training has left where they began, ||W||, but for their rounding."""
        if self.opened.base is None:
            return None
        weight = self.opened.base(saved.name).double()
        rows = saved.side(weight_geometry(weight.shape)) == "output"
        norms = (weight if rows else weight.transpose(0, 1)).flatten(1).norm(dim=1).reshape(magnitude.shape)
        # The stored number is that of bf16 tensors, whatever it was widened to when the file was opened.
        same = norms.to(magnitude.dtype) == magnitude
        return torch.where(same, norms.float(), magnitude.float()) if same.double().mean() >= UNTOUCHED else None

    def _magnitudes_told(self) -> None:
        about = self._about
        if about["unfolded"]:
            what = "DoRA magnitudes are those for ComfyUI, which other programs read wrongly"
            self.findings.append(Finding(what, tuple(about["unfolded"]), "computed back from the weights"))
        if about["exact"]:
            what = "DoRA magnitudes are rounded to half precision or less"
            cure = "training has left them where they began, at ||W||, which is written exactly"
            self.findings.append(Finding(what, tuple(about["exact"]), cure))
        if about["rounded"]:
            what = "DoRA magnitudes are rounded to half precision or less, and what was rounded off is in no file"
            more = (
                "" if self.opened.base is not None else "; those that training has not moved can be made exact, --base"
            )
            cure = f"written in float32, so that nothing more is lost{more}"
            self.findings.append(Finding(what, tuple(about["rounded"]), cure))

    # -- proof

    def remarks(self, report: Report) -> Iterator[str]:
        """What is worth knowing of the new file."""
        empty = [row.name for row in report.rows if row.size == 0]
        if empty:
            yield f"{len(empty)} layers are 0 and do nothing, e.g. {empty[0]}: they stay"
        worse = [one["program"] for one in report.details["readers"] if one["was_exact"] and not one["exact"]]
        if worse:
            yield f"{' and '.join(worse)} read the file before, and not the new one: --for says for which program it is"

    def rows(self, made: dict[str, Tensor], walk: Walk) -> list[Row]:
        """Each layer with its distance from what the mended tensors are, in the new file opened as any other.

        Raises:
            ValueError: the new file is refused, or a layer is not in it.
        """
        if not made:
            return []
        after = FileTensors(made, f"the new file of {self.patient.source}")
        if self.model is None:
            layers = after.opened(Naming()).all_read().layers
        else:
            opened = after.opened(Naming(self.opened.arch)).all_read()
            there = self.opened.model_layers
            layers = opened.on(lambda name: there[name].shape if name in there else None, self.opened.base).layers
        return [self._row(name, layers) for name in walk([*self.layers])]

    def _row(self, name: str, layers: Any) -> Row:
        saved = self.layers[name]
        if name not in layers:
            raise ValueError(f"{self.patient.source}: {dotted.shown(name)} is lost on the way, please report it")
        shape = self.opened.model_layers[name].shape if self.model is not None else ()
        rank = saved.algorithm.spec.shown_rank(saved.tensors)
        same = _same(saved, layers[name])
        try:
            weight = self._weight(name) if self.opened.base is not None and _needs_base(saved) else None
            before = update_of(saved, shape, weight).to(self.device)
            size = math.sqrt(max(0.0, before.inner(before)))  # cheaper than the norm, and no difference of others
            error = 0.0 if same else update_of(layers[name], shape, weight).to(self.device).minus(before).norm()
        except NeedsBase:
            return Row(dotted.shown(name), "", rank, 0.0 if same else None)
        return Row(dotted.shown(name), "", rank, error / size if size else error, size)

    def readers(self, made: dict[str, Tensor]) -> list[dict[str, Any]]:
        """What other programs make of the file, before and after."""
        if self.model is None or not made:
            return []
        after = {one.name: one for one in self._verdicts(FileTensors(made), self.model)}
        try:
            before = {one.name: one for one in self._verdicts(FileTensors(self.patient.source), self.model)}
        except ValueError:  # it is refused even here
            before = {}
        return [
            {
                "program": one.title,
                "before": _short(before.get(name)),
                "after": _short(one),
                "was_exact": name in before and before[name].exact,
                "exact": one.exact,
            }
            for name, one in after.items()
            if one.unasked
        ]

    @staticmethod
    def _verdicts(file: FileTensors, model: Skeleton) -> Iterator[Verdict]:
        yield from verdicts(given_of(file, model))


def _short(verdict: Verdict | None) -> str:
    return "not known" if verdict is None else verdict.short.partition(": ")[2]


def _needs_base(saved: SavedLayer) -> bool:
    return saved.magnitude is not None or saved.algorithm.spec.relative


def _same(one: SavedLayer, other: SavedLayer) -> bool:
    """Whether two layers are the same to the bit."""
    pairs = [(t, other.tensors.get(name)) for name, t in one.tensors.items()]
    pairs += [(one.magnitude, other.magnitude)] if one.magnitude is not None else []
    return (
        one.algorithm is other.algorithm
        and one.scale == other.scale
        and all(b is not None and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    )
