"""An adapter out of a tuned model: what it has learnt beyond the model that it was tuned from.

Every layer is the nearest one of its form; changes of biases and of normalisation layers stand in the file as they are.
What has changed and has no form in adapter files (embeddings, single parameters, a VAE) would be lost, and is told.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .._errors import located
from ..archs.spec import ArchSpec
from ..args.coerce import nearest
from ..args.expressions import checked, quoted
from ..files import codec, writer
from ..files.base_weights import divided
from ..files.checkpoint import Checkpoint
from ..files.codec import SavedLayer
from ..files.dialects import PORTABLE, Dialect
from ..files.outputs import check_outputs
from ..plan.patterns import Pattern
from ..tensors.updates import Update
from . import metadata
from .compared import Compared, File, Model, Pair, Weight
from .convert import FILE_ALGOS, targets, written_as
from .forms import FORMS, Form, row_of
from .ranks import RankRule
from .report import Report, Walk, silently

NO_FORM = "changed, and has no form in adapter files"
_NOTHING = Form("lora", RankRule(1))  # of a layer of which the bias alone has changed


@dataclass(frozen=True)
class Chosen:
    """Which layers are wanted; what is not is left out without a word of loss.

    Attributes:
        exclude, include: regular expressions on the whole of the trainer's dotted name, as in training: what the first
            leave out the second take in again.
        trained_only: only what a training takes without further arguments: no other layers, biases and norms.
    """

    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    trained_only: bool = False

    def of(self, pairs: Sequence[Pair], arch: ArchSpec) -> list[Pair]:
        """
        Raises:
            ValueError: an expression is none, or means no layer.
        """
        exclude, include = (
            self._read("exclude_patterns", pairs, arch),
            self._read("include_patterns", pairs, arch),
        )
        usual = [Pattern.of(text, arch) for text in arch.excluded({}, "")] if self.trained_only else []

        def wanted(pair: Pair) -> bool:
            if _means(include, pair):
                return True
            apart = self.trained_only and (not pair.trained or (pair.part is arch.denoiser and _means(usual, pair)))
            return not apart and not _means(exclude, pair)

        return [pair for pair in pairs if wanted(pair)]

    def _read(self, argument: str, pairs: Sequence[Pair], arch: ArchSpec) -> list[Pattern]:
        found = []
        for text in self.include if argument == "include_patterns" else self.exclude:
            with located(argument):
                found.append(Pattern.of(checked(text), arch))
            if not any(_means(found[-1:], pair) for pair in pairs):
                names = [arch.shown_name(pair.part.name, pair.trainer_name) for pair in pairs]
                raise ValueError(f"{argument}: no layer is called {quoted(text)}{nearest(text, names)}")
        return found


def _means(patterns: Sequence[Pattern], pair: Pair) -> bool:
    return any(one.part in ("", pair.part.name) and one.regex.fullmatch(pair.trainer_name) for one in patterns)


def extract(
    tuned: File | Sequence[File],
    base: File | Sequence[File],
    out: File,
    *,
    to: str | Sequence[str] = "lora",
    rule: RankRule | None = None,
    factor: int = -1,
    clamp_quantile: float | None = None,
    model: str = "",
    include_patterns: Sequence[str] = (),
    exclude_patterns: Sequence[str] = (),
    trained_only: bool = False,
    min_diff: float = 0.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_error: float | None = None,
    allow_dropped: bool = False,
    overwrite: bool = False,
    walk: Walk = silently,
) -> Report:
    """Write what a tuned model has learnt as an adapter.

    Args:
        tuned: a safetensors file, a diffusers component's folder, or a whole pipeline; of several, the further ones are
            text encoders in files of their own, `lora_te1=PATH`.
        base: the model that it was tuned from, likewise; files and names may be others than those of `tuned`.
        out: the file to write.
        to: lora, lokr, loha, or diff, the whole difference; and if it is to have another form than the trainers', that
            too.
        rule: of the rank, of a lora and loha; None = whole second factors of a lokr.
        factor: of a lokr; -1 = the most even split.
        clamp_quantile: cut values of a lora beyond this quantile, 0.99 as the trainers' own extraction; None = do not.
        model: what both are, where their names leave that open: a name, a diffusers folder, a checkpoint.
        include_patterns, exclude_patterns: regular expressions on the trainer's dotted names, as in training.
        trained_only: leave out what a training takes in by further arguments alone, all biases and norms among it.
        min_diff: layers of which no value has changed by more are left out as unchanged.
        dtype: of the tensors; None = that of most of the tuned model's layers, bfloat16 for float8.
        device: where it is computed.
        max_error: the largest error of all layers together, a share of the whole update.
        allow_dropped: go on where something has changed that has no form.
        overwrite: whether a file at `out` may be replaced.
        walk: goes over the layers, and may show how far it is.

    Returns:
        What each layer became, and how far it is from the change of its weight.

    Raises:
        ValueError: the two do not belong together, nothing has changed, something would be lost, or the error is above
            the limit. Nothing is written then.
    """
    first, second = _listed(tuned), _listed(base)
    algo, dialect = _wanted(to, rule, min_diff)
    place = Path(out) if dialect is not None and dialect.folder else writer.checked_path(out)
    check_outputs([place], [divided(path)[1] for path in (*first, *second)], overwrite)
    Form(algo, rule, factor, clamp=clamp_quantile)  # whose mistakes show before anything is read
    compared = Compared(Model(first), Model(second), model)
    chosen = Chosen(exclude_patterns, include_patterns, trained_only).of(compared.pairs, compared.arch)
    form = Form(algo, rule, factor, dtype or _usual_dtype(compared.pairs), clamp_quantile)
    job = _Extraction(compared, chosen, form, torch.device(device), min_diff, not trained_only)
    report = job.report
    job.find_dropped(walk)
    report.check(allow_dropped)

    def write(path: Path) -> None:
        known = dict[str, str]()
        with writer.streamed(path, None, known) as stream, torch.no_grad():
            for layer in job.layers(walk):
                stream.add({key: tensor.contiguous() for key, tensor in codec.write([layer]).items()})
            report.check(allow_dropped, max_error)
            ranks = [row.rank for row in report.rows if row.rank is not None]
            names = {"tuned": compared.tuned.path.name, "base": compared.base.path.name, "error": report.error}
            algorithm = FILE_ALGOS.get(algo, algo)
            known |= metadata.told({}, "extract", {**report.details, **names}, algorithm, ranks)
            known["networks_dialect"] = PORTABLE.name

    pipeline = next((str(one) for one in second if (Path(one) / "model_index.json").is_file()), "")
    below = [] if pipeline else second
    written_as(place, dialect, write, report, model=model or pipeline, base=below, allow_dropped=allow_dropped)
    return report


def _wanted(to: str | Sequence[str], rule: RankRule | None, min_diff: float) -> tuple[str, Dialect | None]:
    """(algorithm, form of a program or None) that are asked for.

    Raises:
        ValueError: they lack a rank, or what counts as a change is no length.
    """
    algo, dialect = targets(to)
    algo = algo or "lora"
    if rule is None and not FORMS[algo].whole:
        raise ValueError(
            f"a {algo} has a rank: give it (dim=16, --dim 16), or a rule for it (energy=0.9, --energy 0.9)"
        )
    if not (math.isfinite(min_diff) and min_diff >= 0):
        raise ValueError(f"min_diff={min_diff:g}: give 0 or more, in units of the weights")
    return algo, dialect


def _listed(paths: File | Sequence[File]) -> list[File]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def _usual_dtype(pairs: Sequence[Pair]) -> torch.dtype:
    """Of most layers of the tuned model."""
    counts = Counter(pair.tuned.dtype or torch.bfloat16 for pair in pairs)
    found = counts.most_common(1)[0][0]
    return torch.float32 if found == torch.float64 else found


@dataclass
class _Extraction:
    """One run.

    Attributes:
        compared: the two models.
        chosen: the layers of them that are wanted.
        form: that they get.
        device: where it is computed.
        min_diff: what counts as a change.
        biases: whether changes of biases are wanted, too.
    """

    compared: Compared
    chosen: Sequence[Pair]
    form: Form
    device: torch.device
    min_diff: float
    biases: bool
    report: Report = field(init=False)
    unchanged: int = 0

    def __post_init__(self) -> None:
        compared, form = self.compared, self.form
        self.report = Report("extract", [compared.tuned.path, compared.base.path])
        self.report.details = {
            "to": form.algo,
            "rule": str(form.rule or ""),
            "architecture": compared.arch.name,
        }
        left = len(compared.pairs) - len(self.chosen)
        if left:
            self.report.notes.append(f"{left} layers are not among those that were asked for")

    def find_dropped(self, walk: Walk) -> None:
        """What has changed and has no form, and what cannot be compared."""
        dropped = self.report.dropped
        for pair in self.compared.others:
            if self._change(pair.tuned, pair.base) is not None:
                dropped.append((pair.tuned.target.keys[0], NO_FORM))
        both, alone = self.compared.rest()
        for tuned, base, key in both:
            if tuned.shapes[key] != base.shapes[key] or _differ(tuned, base, key, self.min_diff):
                dropped.append((key, NO_FORM))
        if alone:
            self.report.notes.append(
                f"{len(alone)} tensors of {self.compared.tuned.path} are not in {self.compared.base.path}, so that "
                f"nobody knows whether they have changed, e.g. {alone[0]}"
            )

    def layers(self, walk: Walk) -> Iterator[SavedLayer]:
        """Those of the file.

        Raises:
            ValueError: nothing has changed.
        """
        pairs = {pair.name: pair for pair in self.chosen}
        for name in walk([*pairs]):
            layer = self._layer(pairs[name])
            if layer is not None:
                yield layer
        count, report = self.unchanged, self.report
        if not report.rows:
            more = f" by more than min_diff {self.min_diff:g}" if self.min_diff else ""
            raise ValueError(
                f"none of {count} layers differs{more} between {self.compared.tuned.path} and "
                f"{self.compared.base.path}: give the tuned model first, then the one that it was tuned from"
            )
        report.details["unchanged"] = count
        if count:
            report.notes.append(f"{count} layers have not changed, and are not in the file")

    def _layer(self, pair: Pair) -> SavedLayer | None:
        """What became of a layer; None = it has not changed."""
        change = self._change(pair.tuned, pair.base)
        bias = self._bias_change(pair)
        if change is None and bias is None:
            self.unchanged += 1
            return None
        form, shape = self.form, pair.tuned.shape
        if change is None:
            change = torch.zeros(shape, device=self.device)
            form = replace(_NOTHING, dtype=form.dtype)
        update = Update(change.reshape(len(change), -1))
        with located(pair.name):
            made = form.layer(pair.name, update, shape)
        exact = not FORMS[form.algo].ranked or len(shape) == 1
        self.report.rows.append(row_of(made, shape, update, exact))
        if bias is None:
            return made
        return replace(
            made,
            tensors={**made.tensors, made.algorithm.spec.bias_key: bias.to(form.dtype)},
        )

    def _change(self, tuned: Weight, base: Weight) -> Tensor | None:
        """tuned - base in fp32 or wider; None = there is none."""
        new, old = tuned.read(self.device), base.read(self.device)
        return _difference(
            new, old, (tuned.dtype, base.dtype), self.min_diff, f"{tuned.checkpoint.path}: {tuned.target.keys[0]}"
        )

    def _bias_change(self, pair: Pair) -> Tensor | None:
        if not self.biases or not pair.tuned.bias_keys:
            return None
        if not pair.base.bias_keys:
            raise ValueError(
                f"{pair.name} has a bias in {pair.tuned.checkpoint.path} and none in {pair.base.checkpoint.path}: give "
                "the model that it was tuned from"
            )
        new, old = pair.tuned.read_bias(self.device), pair.base.read_bias(self.device)
        dtypes = (pair.tuned.bias_dtype, pair.base.bias_dtype)
        key = f"{pair.tuned.checkpoint.path}: {pair.tuned.bias_keys[0]}"
        return _difference(new, old, dtypes, self.min_diff, key)


def _difference(
    new: Tensor,
    old: Tensor,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    least: float,
    key: str,
) -> Tensor | None:
    """new - old; None where no value has changed by more, beyond what the coarser of their dtypes rounds.

    Raises:
        ValueError: one has values that are no numbers.
    """
    if _equal(new, old, dtypes):
        return None
    change = new.sub_(old) if new.dtype == old.dtype else new - old
    low, high = (float(value) for value in change.aminmax())
    if not math.isfinite(low + high):
        raise ValueError(
            f"{key} has NaN or infinite values, here or in the base model: download or make that one again"
        )
    return change if max(-low, high) > least else None


def _equal(new: Tensor, old: Tensor, dtypes: tuple[torch.dtype | None, torch.dtype | None]) -> bool:
    """Whether one is the other as its own dtype has it: a copy in another precision has not changed."""
    first, second = dtypes
    if first == second or first is None or second is None:
        return torch.equal(new, old)
    return torch.equal(new, old.to(first).to(new.dtype)) or torch.equal(new.to(second).to(old.dtype), old)


def _differ(tuned: Checkpoint, base: Checkpoint, key: str, least: float) -> bool:
    new, old = tuned.tensor(key), base.tensor(key)
    if not (new.is_floating_point() and old.is_floating_point()):
        return not torch.equal(new, old)
    wide = torch.float64 if torch.float64 in (new.dtype, old.dtype) else torch.float32
    if not new.numel():
        return False
    return (
        _difference(new.to(wide, copy=True), old.to(wide), (new.dtype, old.dtype), least, f"{tuned.path}: {key}")
        is not None
    )
