"""Deciding every layer: what the arguments, the record of the architecture and a file say about it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..algos import ALGOS, Adapter, Layout, layout_of, suited
from ..args.parse import NetArgs, Problems
from ..files.codec import SavedLayer, unknown_form
from ..layers.dropout import Dropouts
from ..layers.magnitude import magnitude_shape
from ..tensors.geometry import Geometry
from . import checks, file_format, values
from .call import By, Call, Choice, speaks_of_norms
from .causes import grouped
from .meant import read_otherwise, report_unmatched
from .patterns import Patterns
from .plan import Plan, PlanRow, Request, with_unread
from .rules import Verdict, decide
from .walk import Bases, Candidate, candidates
from .why import Explainer


def build_plan(request: Request, problems: Problems) -> tuple[Plan, dict[str, Bases]]:
    """Decide every layer.

    Args:
        request: the call.
        problems: takes what is wrong with it.

    Returns:
        The plan, and saved name -> base modules of the trained layers.
    """
    planner = _Planner(request, problems)
    return planner.plan(), planner.modules


def explained_plan(request: Request, problems: Problems) -> Plan:
    """The plan of a call without a file, which can also say why each layer gets what it gets. It keeps no module.

    Args:
        request: the call.
        problems: takes what is wrong with it.
    """
    planner = _Planner(request, problems)
    layers = tuple(replace(c, bases=()) for c in planner.layers)
    return replace(planner.plan(), explainer=Explainer(planner.call, layers))


_NUMBER = re.compile(r"\d+")
MANY = 4096  # ranks, of which even a small layer may have too many at no cost


def _check_dims(plan: Plan, request: Request, problems: Problems) -> None:
    """Dims far above what any layer can use would only fill the memory; forms that end at the full rank take them."""
    rows = [row for row in plan.trained if row.dim > MANY and (row.layout.rank or 0) > MANY]
    full = max((min(row.shape[0], math.prod(row.shape[1:])) for row in plan.trained), default=0)
    given = {name: request.args.values[name] for name in sorted(request.args.given - {"preset"})}
    given = {"network_dim": request.dim, **given}
    for dim in dict.fromkeys(row.dim for row in rows if row.dim > 4 * full and request.saved is None):
        name = next((name for name, value in given.items() if dim in _numbers_in(value)), "dim")
        problems.add(
            f"{name}={dim} is far above the full rank of every layer here, which is {full} at most: 4 to 128 are usual"
        )


def _numbers_in(value: Any) -> Collection[Any]:
    """Of an argument: a number, a list of them, or a mapping to them."""
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else (value,)


def _notes(request: Request, used: Collection[By], others: Collection[str], plan: Plan) -> tuple[str, ...]:
    """The notes on a plan of which some part is not trained after all: they count the layers that are left.

    Args:
        request, used: of the call.
        others: notes on the model and its files.
        plan: the rest.
    """
    return (*checks.review(plan, request, used, Problems(request.source)), *others)


class _Planner:
    """One call on one model.

    Attributes:
        used: what decided something on a trained layer, or left one out -> the parts in which it did.
        modules: saved name -> base modules of the trained layers.
        misfits: of layers of the file, why they do not fit those of the model.
        notes, warnings: what is worth a word in the choice of layers, and what looks wrong.
        unknown: layers of which the file has something that no algorithm of ours knows.
        refused: (why, layer) where arguments do not fit layers of the model.
    """

    def __init__(self, request: Request, problems: Problems) -> None:
        self.request, self.args, self.problems = request, request.args, problems
        self.used, self.modules, self.misfits = dict[By, set[str]](), dict[str, Bases](), list[str]()
        self.unknown: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self.notes, self.warnings = list[str](), list[str]()
        norms = speaks_of_norms(request)
        self.layers = [c for part, model in request.parts for c in candidates(part, model, norms)]
        self.call = Call.of(request, self.layers, problems)

    def plan(self) -> Plan:
        """Every layer decided, and what is to be said of the whole."""
        verdicts = [decide(c, self.call) for c in self.layers]
        self._check_selection(verdicts)
        rows = []
        for c, verdict in zip(self.layers, verdicts, strict=True):
            row = self._row(c, verdict)
            rows.append(row)
            if row.trained and row.saved_name in self.modules:
                self.refused.append(("two layers would have one saved name", f"{row.shown_name} ({row.saved_name})"))
            if row.trained:
                self.modules[row.saved_name] = c.bases
        self._tell_misfits()
        for message in grouped(self.refused):
            self.problems.add(message)
        plan = Plan(self.request.arch.title, with_unread(rows, self.request.arch.parts))
        _check_dims(plan, self.request, self.problems)
        notes = checks.review(plan, self.request, self.used, self.problems)
        form, on_files = file_format.review(plan, self.request, self.problems)
        size, unusual = self._unusual()
        bare = replace(self.request, parts=(), saved=self.request.saved and {}, names_like=str)  # without tensors
        said = (*filter(None, [self.request.arch.note]), *self.notes, *on_files, *size)
        renote = functools.partial(_notes, bare, frozenset(self.used), said)
        warnings = (
            *self.problems.warnings(),
            *self.warnings,
            *unusual,
            *self.call.preset.warnings(),
            *checks.unmergeable(plan),
            *checks.strong(plan),
            *(checks.cautions(plan, self.args) if self.request.saved is None else ()),
        )
        uses = {by: frozenset(parts) for by, parts in self.used.items() if by[0] in self.args.given}
        plan = replace(plan, notes=(*notes, *said), warnings=warnings, uses=uses, renote=renote)
        return replace(plan, file_format=form, average=self.args.ema_device if self.args.ema_decay else "")

    # -- one layer

    def _row(self, c: Candidate, verdict: Verdict) -> PlanRow:
        g = c.geometry
        names = c.dotted_name, *self.call.saved_names(c)
        row = PlanRow(
            c.part.name, *names, g.kind, g.weight_shape, g,
            trainer_name=c.trainer_name, shown_name=self.call.shown_name(c),
        )  # fmt: skip
        saved = self.call.saved_layer(c)
        self._use(verdict.by, c)
        if verdict.reason:
            self._name_unknown(c, saved)
            return replace(row, reason=verdict.reason, unwanted=saved is not None or self._unwanted(c, verdict))
        a = self.call.preset.args(c)
        try:
            choice = self._by_arguments(c, a) if saved is None else self._by_file(c, saved, a)
            layout = layout_of(choice.algorithm, g, choice.dim, choice.options, choice.split)
        except ValueError as error:
            if saved is not None:
                self.misfits.append(f"{saved.name}: {error}")
                return replace(row, reason="the file does not fit it")
            self.refused.append((str(error), row.shown_name))
            return replace(row, reason="the algorithm has no form for it")
        found = self._found(c, choice.algorithm)
        self._note(c, choice, layout, found)
        return self._trained(row, c, a, choice, layout, found)

    def _found(self, c: Candidate, algorithm: type[Adapter]) -> dict[str, values.Found]:
        """What the call says of a trained layer beside dim and alpha, as in `values.VALUES`."""
        asked = {"learning rate": values.LR, "factor of its block": values.FACTOR, **values.DROPOUT}
        asked |= {"LoRA+ ratio": values.PLUS} if algorithm.spec.plus else {}
        found = {name: values.first(sources, c, self.call) for name, sources in asked.items()}
        return {"LoRA+ ratio": values.Found(None), **found}

    def _trained(
        self,
        row: PlanRow,
        c: Candidate,
        a: NetArgs,
        choice: Choice,
        layout: Layout,
        found: Mapping[str, values.Found],
    ) -> PlanRow:
        """The row with all that a trained layer has.

        Args:
            row: so far.
            c: the layer.
            a: the arguments that speak of it.
            choice, layout: the algorithm, its dim and form.
            found: by `_found`.
        """
        algorithm, denoiser = choice.algorithm, self.call.of_denoiser(c)
        dropouts = Dropouts(
            **{name: found[name].value for name in values.DROPOUT}, rank_dropout_scale=self.args.rank_dropout_scale
        )
        side, plain = self._dora(choice, a, dropouts)
        scale, alpha = _strength(choice, layout.rank, a.rs_lora)
        ratio = found["LoRA+ ratio"].value
        plus = 1.0 if ratio is None else ratio
        folded = self.args.loraplus_mode == "reparam"
        starts = algorithm.spec.features if choice.scale is None else frozenset()
        return replace(
            row,
            algo=algorithm.spec.name,
            dim=choice.dim,
            alpha=alpha or float(choice.dim),
            options=choice.options,
            scale=scale,
            lr=found["learning rate"].value,
            block=self.call.blocks.numbers[c.trainer_name] if denoiser else None,
            block_rate=found["factor of its block"].value,
            plus_ratio=1.0 if folded else plus,
            plus_unit=plus if folded else 1.0,
            dora_ratio=1.0 if self.args.dora_lr_ratio is None or not side else self.args.dora_lr_ratio,
            dropouts=dropouts,
            rank_axis=layout.rank_axis,
            parameters=layout.parameters + (math.prod(magnitude_shape(row.geometry, side == "output")) if side else 0),
            dora=side,
            plain=plain,
            split=choice.split,
            start_size=a.init_lokr_norm if "init_lokr_norm" in starts else None,
            **(a.pick(("init", "init_seed")) if "init" in starts else {}),
        )

    def _by_arguments(self, c: Candidate, a: NetArgs) -> Choice:
        algorithm = suited(a.algo, c.geometry.family)
        assert algorithm is not None
        dim, alpha = values.first(values.DIM, c, self.call), values.first(values.ALPHA, c, self.call)
        return Choice(
            algorithm,
            int(dim.value),
            float(alpha.value),
            a.pick(algorithm.spec.options),
            self._split(c, algorithm, a),
            dim_by=dim.by,
            alpha_by=alpha.by,
        )

    def _by_file(self, c: Candidate, saved: SavedLayer, a: NetArgs) -> Choice:
        """What the file says of a layer; several ways to train make files of one form, and the call says which it is.

        Raises:
            ValueError: that does not fit the layer.
        """
        wanted = ALGOS[self.args.algo]
        shown = saved.parts
        split = self._split(c, saved.algorithm, a) if shown is None else shown
        if wanted.spec.file_algo == saved.algorithm.spec.file_algo and wanted.spec.recognises(saved.tensors):
            saved = replace(saved, algorithm=wanted)
        algorithm = saved.algorithm
        dim, options = saved.describe(c.geometry)
        if saved.bias_change is not None and not c.geometry.bias:
            key = algorithm.spec.bias_key
            raise ValueError(f"the file has {key}, but this layer has no bias: it was trained on another model")
        side = saved.side(c.geometry)
        if split:
            algorithm.unstack(saved.tensors, split)
        dim //= 1 if shown is not None else max(1, len(split))
        # The file decides the form; some options do not show in one.
        options |= self.args.pick(algorithm.spec.unsaved & algorithm.spec.options & self.args.given)
        choice = Choice(algorithm, dim, saved.alpha or 0.0, options, split, side, saved.scale)
        self.call.of_file[c.saved_name] = choice
        return choice

    def _split(self, c: Candidate, algorithm: type[Adapter], a: NetArgs) -> tuple[int, ...]:
        """Output rows of the parts that get an adapter each."""
        if not a.split_qkv or not self.call.of_denoiser(c) or not algorithm.splits(a.pick(algorithm.spec.options)):
            return ()
        return self.call.arch.split_of(c.trainer_name, c.geometry.out_features, c.geometry.in_features)

    def _dora(self, choice: Choice, a: NetArgs, dropouts: Dropouts) -> tuple[str, str]:
        """(side, why there is none although it was asked for); the file's side comes first, unless use_dora=False is
        written out."""
        side, algorithm = choice.side, choice.algorithm
        if "use_dora" in self.args.given and not a.use_dora:
            side = ""
        wanted = side or ("output" if a.wd_on_output else "input") if a.use_dora or side else ""
        never = "use_dora" not in algorithm.spec.features
        reasons = {
            algorithm.spec.name: never,
            "dropout": dropouts.dropout,
            "rank_dropout": dropouts.rank_dropout,
            "split_qkv": choice.split,
        }
        plain = next((name for name, on in reasons.items() if on), "") if wanted else ""
        if plain and side:
            self.problems.add(f"{plain} does not go with the DoRA magnitudes of {self.request.source}: leave it out")
        return ("" if plain else wanted), plain

    def _unwanted(self, c: Candidate, verdict: Verdict) -> bool:
        """Whether a layer that is left out would be trained if the call did not say otherwise."""
        call = self.call
        if call.exclude.first(c) or call.switched_off.first(c):
            return True
        return (c.default or verdict.admitted) and bool(call.include.first(c) or not call.by_record.first(c))

    def _tell_misfits(self) -> None:
        """What layers of the file do not fit is one mistake: another model's file, most likely. So is what has a form
        that no algorithm of ours knows."""
        if self.unknown:
            first, count = self.unknown[0], len(self.unknown)
            text = unknown_form(self.request.source, first, self.request.unknown[first])
            self.problems.add(text if count == 1 else f"{text} ({count} layers of this model)")
        if len(self.misfits) == 1:
            self.problems.add(f"{self.request.source}: {self.misfits[0]}")
        elif self.misfits:
            self.problems.add(
                f"{self.request.source} does not fit this model ({self.request.arch.title}) in {len(self.misfits)} "
                f"layers, e.g. {self.misfits[0]}; choose a file of this architecture"
            )

    def _name_unknown(self, c: Candidate, saved: SavedLayer | None) -> None:
        """A layer of which the file has something that no algorithm of ours knows is a mistake."""
        self.unknown += [name for name in {*self.call.saved_names(c)} if saved is None and name in self.request.unknown]

    def _note(self, c: Candidate, choice: Choice, layout: Layout, found: Mapping[str, values.Found]) -> None:
        """Remember what decides this trained layer: alpha decides nothing where there is no rank, a dim nothing of a
        normalisation layer, and an option nothing where its parameter is missing.

        Args:
            c: the layer.
            choice, layout: the algorithm, its dim and form.
            found: by `_found`.
        """
        algorithm = choice.algorithm
        by = {
            found["learning rate"].by,
            found["LoRA+ ratio"].by,
            choice.dim_by if algorithm.spec.family == Geometry.family else None,
            choice.alpha_by if layout.rank is not None else None,
            (c.part.argument, "") if c.part.argument else None,
            ("split_qkv", "") if choice.split else None,
            *(found[name].by for name in _reaching(layout)),
        }
        self._use((one for one in by if one), c)
        timeless = frozenset[str]() if self.call.of_denoiser(c) else algorithm.spec.timed
        options = choice.options.keys() & self.args.given - timeless
        self._use(((name, "") for name in options if algorithm.spec.acts(name, layout.shapes)), c)

    def _use(self, decisive: Iterable[By], c: Candidate) -> None:
        for by in decisive:
            self.used.setdefault(by, set()).add(c.part.name)

    # -- the whole model

    def _unusual(self) -> tuple[list[str], list[str]]:
        """(a note on a denoiser of another size than every released one of its architecture, a warning about one with
        other kinds of layers)."""
        arch = self.request.arch
        excluded = Patterns("default", arch.excluded({}, self.args.host), arch)
        found = [c for c in self.layers if c.default and self.call.of_denoiser(c) and not excluded.first(c)]
        if not arch.usual or len(found) in arch.usual:
            return [], []
        usual, kinds = (" or ".join(map(str, sorted(numbers))) for numbers in (arch.usual, arch.kinds))
        own = len({_NUMBER.sub("", c.trainer_name) for c in found})
        if own in arch.kinds:
            return [f"of a size of its own: {len(found)} layers by default, released models have {usual}"], []
        text = (
            f"{arch.title} usually has {usual} layers to train of {kinds} kinds, this model has {len(found)} of {own}"
        )
        return [], [f"{text}: is it the right model?"]

    def _check_selection(self, verdicts: Collection[Verdict]) -> None:
        """Expressions that mean no layer which can be trained."""
        self._check_optional()
        call, pairs = self.call, list(zip(self.layers, verdicts, strict=True))
        others = [(c, verdict.reason) for c, verdict in pairs if verdict.reason and not verdict.admitted]
        trainable = [c for c, verdict in pairs if verdict.admitted or not verdict.reason]
        for patterns in (
            call.exclude, call.include, call.only, call.dims, call.alphas, call.lrs, *call.dropouts.values(),
        ):  # fmt: skip
            for pattern in report_unmatched(patterns, trainable, others, self.problems):
                self.used[patterns.argument, pattern] = set()  # spoken of already
            self.notes += read_otherwise(patterns, trainable)
        self._check_rescue(trainable)
        self._check_whole(trainable)

    def _check_rescue(self, trainable: Sequence[Candidate]) -> None:
        """include_patterns must meet a layer that an exclude pattern matches."""
        call = self.call
        excluded = [c for c in trainable if call.exclude.first(c) or call.by_record.first(c)] if call.include else []
        if call.include and not any(map(call.include.first, excluded)):
            self.problems.add(
                "include_patterns rescues nothing: no exclude pattern matches these layers "
                "(to train nothing else, use only_patterns)"
            )

    def _check_whole(self, trainable: Sequence[Candidate]) -> None:
        """exclude_patterns must leave a layer, and only_patterns should leave out one."""
        call = self.call
        there = [c for c in trainable if not call.by_record.first(c) or call.include.first(c)]
        left = [c for c in there if not call.exclude.first(c) or call.include.first(c)]
        if there and not left:
            self.problems.add(
                f"exclude_patterns: {call.exclude.quoted} leaves out all {len(there)} layers that would be trained; "
                "write narrower ones, or name what stays in include_patterns"
            )
        elif call.only and left and all(map(call.only.first, left)):
            self.warnings.append(
                f"only_patterns: {call.only.quoted} matches all {len(left)} layers that would be trained anyway, so it "
                "leaves out nothing"
            )

    def _check_optional(self) -> None:
        """Layers that an argument takes in must be there."""
        there = frozenset[str]().union(*(c.classes for c in self.layers))
        for name, classes in (pair for part, _ in self.request.parts for pair in part.optional):
            if getattr(self.args, name) and there.isdisjoint(classes):
                self.problems.idle(name, f": this model has no {', '.join(classes)}; leave it out", f"{name}=True")


def _reaching(layout: Layout) -> Iterable[str]:
    """Names of the dropouts that act on a layer."""
    return values.DROPOUT if layout.rank_axis else ("module_dropout",)


def _strength(choice: Choice, rank: int | None, rs_lora: bool) -> tuple[float, float]:
    """(scale, alpha) of a layer; without a rank the scale is 1 whatever alpha says."""
    if rank is None:
        return 1.0, choice.alpha
    if choice.scale is not None:
        return choice.scale, choice.scale * rank
    return (choice.alpha / (math.sqrt(rank) if rs_lora else rank) if choice.alpha else 1.0), choice.alpha
