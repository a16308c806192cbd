"""Deciding every layer: what the arguments, the record of the architecture and a file say about it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..algos import ALGOS, Adapter, layout_of, suited
from ..args.parse import NetArgs, Problems
from ..files.codec import SavedLayer, unknown_form
from ..layers.magnitude import magnitude_shape
from ..tensors.geometry import Geometry
from ..tensors.norms import NormGeometry
from . import effects, file_form
from .blocks import BlockChoices
from .plan import Plan, PlanRow, Request
from .preset_choices import PresetChoices
from .select import Bases, Candidate, Patterns, candidates


def build_plan(request: Request, problems: Problems) -> tuple[Plan, dict[str, Bases]]:
    """Decide every layer. What is wrong goes to `problems`.

    Returns:
        The plan, and saved name -> base modules of the trained layers.
    """
    planner = _Planner(request, problems)
    rows, modules = [], dict[str, Bases]()
    for candidate in planner.found:
        row = planner.row(candidate)
        if row.trained and row.saved_name in modules:
            problems.add(f"two layers would be saved as {row.saved_name}; one is {row.dotted_name}")
        if row.trained:
            modules[row.saved_name] = candidate.bases
        rows.append(row)
    plan = Plan(request.arch.title, tuple(rows))
    _check_dims(plan, request, problems)
    notes = effects.check(plan, request, planner.deciding, problems)
    notes += file_form.check(plan.trained, request, problems) if plan.trained else []
    warnings = (*planner.unusual(), *planner.preset.warnings(), *effects.unmergeable(plan))
    return replace(plan, notes=tuple(notes), warnings=warnings), modules


_OFF = {True: "dim 0", False: "its block has the learning rate factor 0"}
MANY = 4096  # ranks, of which even a small layer may have too many at no cost


def _check_dims(plan: Plan, request: Request, problems: Problems) -> None:
    """Dims far above what any layer can use would only fill the memory; forms that end at the full rank take them."""
    rows = [row for row in plan.trained if row.dim > MANY and (row.layout.rank or 0) > MANY]
    full = max((min(row.shape[0], math.prod(row.shape[1:])) for row in plan.trained), default=0)
    given = {"network_dim": request.dim, **request.args.pick(sorted(request.args.given - {"preset"}))}
    for dim in dict.fromkeys(row.dim for row in rows if row.dim > 4 * full and request.saved is None):
        name = next((name for name, value in given.items() if dim in _numbers_in(value)), "dim")
        problems.add(
            f"{name}={dim} is far above the full rank of every layer here, which is {full} at most: 4 to 128 are usual"
        )


def _numbers_in(value: Any) -> Collection[Any]:
    """Of an argument: a number, a list of them, or a mapping to them."""
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else (value,)


_UNASKED = {
    NormGeometry.family: "give train_norm=True to train it",
    Geometry.family: "norm is for normalisation layers alone",
}


class _Planner:
    """Precedence in one place: file > regular expression > kind > block > preset > default, for dim and alpha."""

    def __init__(self, request: Request, problems: Problems) -> None:
        self.request, self.args, self.problems = request, request.args, problems
        self.deciding: set[tuple[str, str]] = set()  # (argument, what of it): had its way with some layer
        a = self.args
        self.exclude = Patterns("exclude_patterns", a.exclude_patterns)
        self.left_out = request.arch.excluded(a.values, a.host)
        self.default_exclude = Patterns("default", self.left_out)
        # An architecture's own expressions speak of the layers that are trained without being asked for.
        self.default_switches = Patterns("default", self.left_out.keys() - {*request.arch.exclude})
        off = {switch.regex for switch in request.arch.switches if switch.argument in a.given} & self.left_out.keys()
        self.switched_off = Patterns("given", off)
        self.include = Patterns("include_patterns", a.include_patterns)
        self.only = Patterns("only_patterns", a.only_patterns)
        self.dims = Patterns("network_reg_dims", a.network_reg_dims)
        self.alphas = Patterns("network_reg_alphas", a.network_reg_alphas)
        self.lrs = Patterns("network_reg_lrs", a.network_reg_lrs)
        convolutions = bool(a.conv_dim or a.conv_block_dims) or request.saved is not None
        on = {name for name in request.arch.arguments if a.values[name] is True}
        self.preset = PresetChoices(request, on, problems)
        self.found = [
            self._suit(self._admit(self.preset.admit(c)))
            for part, m in request.parts
            for c in candidates(part, m, convolutions, on, self._norms())
        ]
        self.trainable = [c for c in self.found if not c.reason]
        names = [c.trainer_name for c in self.found if self._of_denoiser(c)]
        self.request = replace(request, arch=request.arch.fit(names))
        self.blocks = BlockChoices(self.request, names, problems)
        self._check_selection()

    def row(self, c: Candidate) -> PlanRow:
        g = c.geometry
        names = c.dotted_name, *self._saved_names(c)
        row = PlanRow(c.part.name, *names, g.kind, g.weight_shape, g, trainer_name=c.trainer_name)
        saved, a = self._saved(c), self.preset.args(c)
        reason = self._reason(c, saved)
        if reason:
            return replace(row, reason=reason, unwanted=saved is not None or self._unwanted(c))
        algorithm = suited(a.algo, g.family) if saved is None else saved.algorithm
        assert algorithm is not None
        shown = None if saved is None else saved.parts
        split = self._split(c, algorithm, a) if shown is None else shown
        if saved is not None:
            wanted = ALGOS[self.args.algo]
            same = wanted.spec.form == saved.algorithm.spec.form and wanted.spec.recognises(saved.tensors)
            if same:  # several ways to train make files of one form
                saved = replace(saved, algorithm=wanted)
            try:
                dim, options = saved.describe(g)
                side = saved.side(g)
                if split:
                    saved.algorithm.unstack(saved.tensors, split)
            except ValueError as error:
                self.problems.add(f"{saved.name}: {error}")
                return replace(row, reason="the file does not fit it")
            algorithm, alpha = saved.algorithm, saved.alpha or 0.0
            dim //= 1 if shown is not None else max(1, len(split))
            # The file decides the form; some options do not show in one.
            options |= self.args.pick(algorithm.spec.unsaved & algorithm.spec.options & self.args.given)
        else:
            dim, alpha, side = self._dim(c), self._alpha(c), ""
            if dim == 0 or self.blocks.rate(c.trainer_name) == 0 and self._of_denoiser(c):
                self._note(c, scaled=False)
                return replace(row, reason=_OFF[dim == 0], unwanted=True)
            options = a.pick(algorithm.spec.options)
        side, plain = self._dora(side, split, a, algorithm)
        try:
            layout = layout_of(algorithm, g, dim, options, split)
        except ValueError as error:
            self.problems.add(f"{c.dotted_name}: {error}")
            return replace(row, reason="the algorithm has no form for it")
        self._note(c, layout.rank is not None, algorithm.spec.family == Geometry.family)
        scale = 1.0
        if layout.rank is not None and saved is not None:
            scale, alpha = saved.scale, saved.scale * layout.rank
        elif layout.rank is not None and alpha:
            scale = alpha / (math.sqrt(layout.rank) if a.rs_lora else layout.rank)
        denoiser, folded_plus = self._of_denoiser(c), self.args.loraplus_mode == "reparam"
        plus = self._plus(denoiser, algorithm)
        return replace(
            row,
            algo=algorithm.spec.name,
            dim=dim,
            alpha=alpha or float(dim),
            options=options,
            scale=scale,
            lr=self._lr(c),
            block=self.request.arch.block_of(c.trainer_name) if denoiser else None,
            block_rate=self.blocks.rate(c.trainer_name) if denoiser else None,
            plus_ratio=1.0 if folded_plus else plus,
            plus_unit=plus if folded_plus else 1.0,
            rank_axis=layout.rank_axis,
            parameters=layout.parameters + (math.prod(magnitude_shape(g, side == "output")) if side else 0),
            dora=side,
            plain=plain,
            split=split,
            **({} if saved is not None or "init" not in algorithm.spec.features else a.pick(("init", "init_seed"))),
        )

    def _split(self, c: Candidate, algorithm: type[Adapter], a: NetArgs) -> tuple[int, ...]:
        """Output rows of the parts that get an adapter each."""
        if not a.split_qkv or not self._of_denoiser(c) or not algorithm.splits(a.pick(algorithm.spec.options)):
            return ()
        return self.request.arch.split_of(c.trainer_name, c.geometry.out_features, c.geometry.in_features)

    def _dora(self, side: str, split: tuple[int, ...], a: NetArgs, algorithm: type[Adapter]) -> tuple[str, str]:
        """(side, why there is none although it was asked for); the file's side comes first."""
        wanted = side or ("output" if a.wd_on_output else "input") if a.use_dora or side else ""
        never = "use_dora" not in algorithm.spec.features
        reasons = {algorithm.spec.name: never, "dropout": a.dropout, "rank_dropout": a.rank_dropout, "split_qkv": split}
        plain = next((name for name, on in reasons.items() if on), "") if wanted else ""
        if plain and side:
            self.problems.add(f"{plain} does not go with the DoRA magnitudes of {self.request.source}: leave it out")
        return ("" if plain else wanted), plain

    # -- selection

    def _saved(self, c: Candidate) -> SavedLayer | None:
        if self.request.saved is None:
            return None
        ours, own = self._saved_names(c)
        return self.request.saved.get(ours) or self.request.saved.get(own)

    def _saved_names(self, c: Candidate) -> tuple[str, str]:
        """That of the layer, and that which its own path would give, unless that is another layer's."""
        return c.saved_name, c.saved_name if c.own_saved_name in self._taken else c.own_saved_name

    @cached_property
    def _taken(self) -> frozenset[str]:
        return frozenset(c.saved_name for c in self.found)

    def _norms(self) -> bool:
        """Whether normalisation layers are spoken of."""
        if self.request.saved is not None:
            return any(saved.algorithm.spec.family == NormGeometry.family for saved in self.request.saved.values())
        algos = {self.args.algo, *(self.args.preset.algos if self.args.preset else ())}
        return self.args.train_norm != "false" or any(ALGOS[algo].spec.family == NormGeometry.family for algo in algos)

    def _suit(self, c: Candidate) -> Candidate:
        """A layer for whose kind the call has no algorithm is left out."""
        reason, g = c.reason, c.geometry
        if self.request.saved is None and not reason:
            own = ALGOS[self.preset.args(c).algo]
            if own.spec.family != g.family:
                wanted = g.family == NormGeometry.family and self.args.train_norm != "false"
                reason = "" if wanted else _UNASKED.get(g.family, "")
        if isinstance(g, NormGeometry):
            reason = g.unfit or reason
            if not reason and not g.affine and self.args.train_norm == "affine" and self.request.saved is None:
                reason = "has no weight of its own (train_norm=affine)"
        return c if reason == c.reason else replace(c, reason=reason, by_conv_dim=False)

    def _reason(self, c: Candidate, saved: SavedLayer | None) -> str:
        if self.request.saved is not None and saved is None:
            for name in {*self._saved_names(c)} & self.request.unknown.keys():
                self.problems.add(unknown_form(self.request.source, name, self.request.unknown[name]))
            return c.reason or "not in the file"
        if saved is None and c.reason:
            return c.reason
        excluded = self.exclude.first(c)
        defaults = self.default_exclude if c.geometry.family == Geometry.family else self.default_switches
        by_arch = (defaults if saved is None else self.switched_off).first(c)
        if (excluded or by_arch) and not self.include.first(c):
            self.deciding.add((self.exclude.argument, excluded or ""))
            return f"excluded by {excluded!r}" if excluded else self.left_out[by_arch or ""]
        if self.only and not self.only.first(c):
            return "not in only_patterns"
        return self.blocks.reason(c.trainer_name) if self._of_denoiser(c) and not self._is_extra(c) else ""

    def _unwanted(self, c: Candidate) -> bool:
        """Whether a layer that is left out would be trained if the call did not say otherwise."""
        if self.exclude.first(c) or self.switched_off.first(c):
            return True
        return (c.default or not c.reason) and not self.default_exclude.first(c)

    def _of_denoiser(self, c: Candidate) -> bool:
        return c.part is self.request.arch.denoiser

    def _is_extra(self, c: Candidate) -> bool:
        return self.request.arch.extra_of(c.trainer_name) is not None

    def _admit(self, c: Candidate) -> Candidate:
        """A layer outside the containers joins if its own argument gives it a dim."""
        extra = self.request.arch.extra_of(c.trainer_name) if c.reason and self._of_denoiser(c) else None
        if extra is None:
            return c
        return replace(c, reason="" if self._extra_dim(*extra) else f"give {extra[0]} to train it", by_conv_dim=False)

    def _extra_dim(self, argument: str, position: int) -> int:
        dims = getattr(self.args, argument)
        return (dims[position] or 0) if position < len(dims) else 0

    def unusual(self) -> list[str]:
        """A warning if the denoiser has another number of layers than every released model of its architecture."""
        arch = self.request.arch
        excluded = Patterns("default", arch.excluded({}, self.args.host))
        count = sum(c.default and self._of_denoiser(c) and not excluded.first(c) for c in self.found)
        if not arch.usual or count in arch.usual:
            return []
        usual = " or ".join(map(str, sorted(arch.usual)))
        return [f"{arch.title} usually has {usual} layers to train, this model has {count}: is it the right model?"]

    def _note(self, c: Candidate, scaled: bool, sized: bool = True) -> None:
        """Remember which expressions decide this layer; alpha decides nothing where there is no rank, and a dim nothing
        of a normalisation layer, except that 0 leaves it out."""
        for patterns in (self.lrs, *([self.dims] if sized else []), *([self.alphas] if scaled else [])):
            pattern = patterns.first(c)
            if pattern is not None:
                self.deciding.add((patterns.argument, pattern))
        if c.by_conv_dim:
            self.deciding.add(("conv_dim", ""))
        kind = self._kind(c) if sized else None
        if kind is not None and self.dims.first(c) is None:
            self.deciding.add((kind, ""))

    def _kind(self, c: Candidate) -> str | None:
        if not self._of_denoiser(c):
            return None
        extra = self.request.arch.extra_of(c.trainer_name)
        return extra[0] if extra else self.request.arch.kind_of(c.trainer_name, self.args.given)

    # -- values

    def _dim(self, c: Candidate) -> int:
        pattern = self.dims.first(c)
        if pattern is not None:
            return int(self.args.network_reg_dims[pattern])
        extra = self.request.arch.extra_of(c.trainer_name) if self._of_denoiser(c) else None
        if extra is not None:
            return self._extra_dim(*extra)
        kind = self._kind(c)
        if kind is not None:
            return int(getattr(self.args, kind))
        kernel = c.geometry.has_kernel
        own = self.blocks.dim(c.trainer_name, kernel) if self._of_denoiser(c) else None
        if own is not None:
            return own
        preset = self.preset.dim(c)
        if preset is not None:
            return preset
        return int(self.args.conv_dim or 0) if kernel else self.request.dim

    def _alpha(self, c: Candidate) -> float:
        pattern = self.alphas.first(c)
        if pattern is not None:
            return float(self.args.network_reg_alphas[pattern])
        own = self.blocks.alpha(c.trainer_name, c.geometry.has_kernel) if self._of_denoiser(c) else None
        if own is not None:
            return own
        preset = self.preset.alpha(c)
        if preset is not None:
            return preset
        if not c.geometry.has_kernel:
            return self.request.alpha
        return float(self.args.conv_alpha)

    def _lr(self, c: Candidate) -> float | None:
        pattern = self.lrs.first(c)
        return None if pattern is None else float(self.args.network_reg_lrs[pattern])

    def _plus(self, denoiser: bool, algorithm: type[Adapter]) -> float:
        a = self.args
        own = a.loraplus_unet_lr_ratio if denoiser else a.loraplus_text_encoder_lr_ratio
        ratio = own if own is not None else a.loraplus_lr_ratio
        return 1.0 if ratio is None or not algorithm.spec.plus else float(ratio)

    # -- checks

    def _check_selection(self) -> None:
        self._check_optional()
        others = [c for c in self.found if c.reason]
        for patterns in (self.exclude, self.include, self.only, self.dims, self.alphas, self.lrs):
            for pattern in patterns.check(self.trainable, others, self.problems):
                self.deciding.add((patterns.argument, pattern))  # spoken of already
        if self.include:
            excluded = [c for c in self.trainable if self.exclude.first(c) or self.default_exclude.first(c)]
            if not any(self.include.first(c) for c in excluded):
                self.problems.add(
                    "include_patterns rescues nothing: no exclude pattern matches these layers "
                    "(to train nothing else, use only_patterns)"
                )

    def _check_optional(self) -> None:
        """Layers that an argument takes in must be there."""
        there = frozenset[str]().union(*(c.classes for c in self.found))
        for name, classes in (pair for part, _ in self.request.parts for pair in part.optional):
            if self.args.values[name] and there.isdisjoint(classes):
                self.problems.add(f"{name}=True has no effect: this model has no {', '.join(classes)}; leave it out")
