"""From what a file holds to the arguments that make such a network: they are guessed, planned and compared."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..algos import ALGOS, Layout, layout_of
from ..archs.spec import ArchSpec
from ..args.expressions import as_list
from ..args.shells import CommandLine
from ..args.table import BY_NAME
from ..tensors.geometry import Geometry
from .groups import Layer, patterns_in
from .plan import Plan, PlanRow

UNET_ONLY, ENCODERS_ONLY = "network_train_unet_only", "network_train_text_encoder_only"
_MOST = 5000  # sets of options that are tried
_Key = tuple[str, str]
Planner = Callable[[CommandLine], Plan]


@dataclass(frozen=True)
class Recovered:
    """What was found.

    Attributes:
        line: the options.
        differences: in what their network is another; () = in nothing.
    """

    line: CommandLine
    differences: tuple[str, ...] = ()


def recover(wanted: Plan, arch: ArchSpec, algo: str, known: Mapping[str, str], plan: Planner) -> Recovered:
    """The options that make a network again.

    Args:
        wanted: what a file gives.
        arch: of its model.
        algo: the algorithm of the architecture's entry.
        known: network arguments that a file's shapes do not show.
        plan: what options would build; ValueError where they do not go together.

    Raises:
        ValueError: no network of ours is like it.
    """
    return _Search(wanted, arch, algo, plan).found(known)


def before_differences(wanted: Plan) -> Plan:
    """The plan of a file with differences from start values, which have twice the dim, at the dim of training."""
    rows = (
        replace(row, dim=max(1, row.dim // 2)) if row.trained and ALGOS[row.algo].spec.keeps_start else row
        for row in wanted.rows
    )
    return replace(wanted, rows=tuple(rows))


class _Search:
    """Options that come nearer and nearer to a plan.

    Attributes:
        line: the best ones so far.
        now: their plan.
    """

    def __init__(self, wanted: Plan, arch: ArchSpec, algo: str, plan: Planner) -> None:
        self.arch, self.plan = arch, plan
        self.rows = {_key(row): row for row in wanted.trained}
        linear = [row for row in wanted.trained if row.geometry.family == Geometry.family]
        self.adapters = linear or list(wanted.trained)
        self.algo = Counter(row.algo for row in self.adapters).most_common(1)[0][0]
        inside = [row for row in self.adapters if row.algo == self.algo and self._extra_of(row) is None]
        self.form = _Form(inside or self.adapters)
        args = {} if self.algo == algo else {"algo": self.algo}
        args |= self.form.args | _shared(self.adapters) | self._outside_blocks()
        if linear and len(linear) < len(wanted.trained):
            args["train_norm"] = "True"
        self.line = CommandLine(f"networks.{arch.entry}", self.form.dim, 1.0, args, self._only())
        self.now = plan(self.line)

    def found(self, known: Mapping[str, str]) -> Recovered:
        self._select()
        self._strengths()
        self._keep(known)
        return Recovered(self.line, tuple(self._differences(self.now)))

    # -- which layers

    def _select(self) -> None:
        for more in (*self._switches(), *self._block_choices()):
            if not any(self._off(self.now)):
                return
            self._try(more)
        self._rescue(self._off(self.now)[0])
        self._leave_out(self._off(self.now)[1])

    def _switches(self) -> Iterator[dict[str, str]]:
        """Arguments that take in or leave out layers of a kind."""
        names = [one.argument for one in self.arch.switches]
        for part in self.arch.parts:
            names += [part.argument, *(name for name, _ in part.optional)]
        yield from ({name: value} for name in dict.fromkeys(filter(None, names)) for value in ("True", "False"))
        if "train_norm" in self.line.args:
            yield {"train_norm": "affine"}
        yield from ({"train_blocks": name} for name, _ in self.arch.block_sets)

    def _block_choices(self) -> Iterator[dict[str, str]]:
        names = [row.trainer_name for row in self.rows.values()]
        for axis in (axis for axis in self.arch.axes if axis.argument):
            yield {axis.argument: _ranges(map(axis.index, names))}
        yield {"blocks": _ranges(row.block for row in self.rows.values())}

    def _rescue(self, missing: set[_Key]) -> None:
        """By include_patterns."""
        if missing:
            rest = {_layer(row) for row in self.now.rows if not row.trained and _key(row) not in missing}
            found = patterns_in({_layer(self.rows[key]) for key in missing}, rest)
            self._try({"include_patterns": as_list(found)})

    def _leave_out(self, excess: set[_Key]) -> None:
        """By the shorter one of exclude_patterns and only_patterns."""
        if excess:
            kept = {*map(_layer, self.rows.values())}
            out = {_layer(row) for row in self.now.trained if _key(row) in excess}
            ways = {"exclude_patterns": patterns_in(out, kept), "only_patterns": patterns_in(kept, out)}
            for name in sorted(ways, key=lambda one: len(as_list(ways[one]))):
                self._try({name: as_list(ways[name])})

    def _off(self, plan: Plan) -> tuple[set[_Key], set[_Key]]:
        """Layers that are missing, and those that are too many."""
        there = {_key(row) for row in plan.trained}
        return self.rows.keys() - there, there - self.rows.keys()

    def _try(self, more: Mapping[str, str]) -> None:
        """Take these arguments, too, if they bring it nearer."""
        line = replace(self.line, args={**self.line.args, **more})
        try:
            plan = self.plan(line)
        except ValueError:
            return
        (missing, excess), (fewer, less) = map(len, self._off(self.now)), map(len, self._off(plan))
        if fewer <= missing and (fewer < missing or less < excess):
            self.line, self.now = line, plan

    def _only(self) -> str:
        if not self.arch.text_encoders:
            return ""
        denoiser = {part == self.arch.denoiser.name for part, _ in self.rows}
        return "" if len(denoiser) > 1 else UNET_ONLY if True in denoiser else ENCODERS_ONLY

    def _outside_blocks(self) -> dict[str, str]:
        """The arguments that have a dim for each kind of layer outside the blocks."""
        found = {}
        dims: dict[tuple[str, int], int] = {}
        for row in self.adapters:
            extra = self._extra_of(row)
            if extra is not None:
                dims.setdefault(extra, self.form.dim_of(row) or self.form.dim)
        for name, expressions in self.arch.extra_dims:
            values = [dims.get((name, i), 0) for i in range(len(expressions))]
            if any(values):
                found[name] = ",".join(map(str, values))
        return found

    def _extra_of(self, row: PlanRow) -> tuple[str, int] | None:
        return self.arch.extra_of(row.trainer_name) if row.part == self.arch.denoiser.name else None

    # -- dims and strengths

    def _strengths(self) -> None:
        """Dims and alphas, first those of most layers."""
        args = dict(self.line.args)
        usual = {
            kernel: _most_common(_alpha(row) for row in self.rows.values() if row.geometry.has_kernel == kernel)
            for kernel in (False, True)
        }
        if "conv_dim" in args and usual[True] is not None:
            args["conv_alpha"] = f"{usual[True]:.9g}"
        alpha = usual[True] if usual[False] is None else usual[False]
        self._take(replace(self.line, args=args, alpha=1.0 if alpha is None else alpha))
        self._correct("network_reg_dims", "shape of their factors", self.form.dim_of)
        self._correct("network_reg_alphas", "strength", _alpha)

    def _correct(self, argument: str, what: str, value: Callable[[PlanRow], float | None]) -> None:
        """Take an argument with values for those layers in which something is another."""
        pairs = [(row, self.rows[key]) for row in self.now.trained if (key := _key(row)) in self.rows]
        values = {
            _layer(wanted): found
            for row, wanted in pairs
            if not _COMPARED[what](wanted, row) and (found := value(wanted)) is not None
        }
        own = (_layer(row) for row, _ in pairs)
        self._take(replace(self.line, args={**self.line.args, **_mapped(argument, values, own)}))

    def _take(self, line: CommandLine) -> None:
        """Go on with these options, if they are valid."""
        try:
            self.line, self.now = line, self.plan(line)
        except ValueError:
            return

    def _keep(self, known: Mapping[str, str]) -> None:
        """Arguments that no shape shows, as far as they go with the others."""
        worse = len(list(self._differences(self.now)))
        more = {name: value for name, value in known.items() if name not in self.line.args}
        for some in [more, *({name: value} for name, value in more.items())] if more else []:
            line = replace(self.line, args={**self.line.args, **some})
            try:
                plan = self.plan(line)
            except ValueError:
                continue
            if len(list(self._differences(plan))) <= worse:
                self.line, self.now = line, plan
                if some is more:
                    return

    # -- what is still another

    def _differences(self, plan: Plan) -> Iterator[str]:
        missing, excess = self._off(plan)
        if missing:
            yield f"{len(missing)} layers of the file are not trained, e.g. {min(missing)[1]}"
        if excess:
            yield f"{len(excess)} layers are trained that the file has not, e.g. {min(excess)[1]}"
        here = {_key(row): row for row in plan.trained}
        both = [(self.rows[key], here[key]) for key in self.rows if key in here]
        for what, same in _COMPARED.items():
            others = [wanted.saved_name for wanted, row in both if not same(wanted, row)]
            if others:
                yield f"{len(others)} layers have another {what}, e.g. {others[0]}"


class _Form:
    """The dim and the options under which most layers have their shapes.

    Attributes:
        dim: for all but kernels above 1x1.
        args: the options and the dim of such kernels, as far as they are no defaults.
    """

    def __init__(self, rows: Sequence[PlanRow]) -> None:
        counts = Counter(_Shape.of(row) for row in rows)
        halves = [{s: n for s, n in counts.items() if s.geometry.has_kernel == kernel} for kernel in (False, True)]
        best = -1
        self._options: dict[str, Any] = {}
        for options in self._every(counts):
            (own, dim), (theirs, conv_dim) = (self._best_dim(half, options) for half in halves)
            if own + theirs > best:
                best, self._options, self.dim, conv = own + theirs, options, dim or conv_dim, conv_dim
            if best == counts.total():
                break
        self.args = _without_defaults(self._options) | ({"conv_dim": str(conv)} if halves[1] else {})

    def dim_of(self, row: PlanRow) -> int | None:
        """A dim under which a layer has its shapes, with these options; None = there is none."""
        shape = _Shape.of(row)
        return next((dim for dim in shape.asked["dim"] if shape.fits(dim, self._options)), None)

    def _every(self, counts: Mapping[_Shape, int]) -> Iterator[dict[str, Any]]:
        """All sets of options that may have been asked for, the likeliest first."""
        weights: dict[str, Counter[Any]] = {}
        for shape, count in counts.items():
            for name, values in shape.asked.items():
                for place, value in enumerate(values):
                    weights.setdefault(name, Counter())[value] += count * 2 ** -min(place, 30)
        weights.pop("dim", None)
        ordered = [[(name, value) for value, _ in found.most_common(12)] for name, found in weights.items()]
        return (dict(one) for one in itertools.islice(itertools.product(*ordered), _MOST))

    def _best_dim(self, counts: Mapping[_Shape, int], options: Mapping[str, Any]) -> tuple[int, int]:
        """(layers that have their shapes, dim)."""
        dims = Counter[int]()
        for shape, count in counts.items():
            for dim in shape.asked["dim"]:
                dims[dim] += count
        tried = [dim for dim, _ in dims.most_common(6)] + sorted(dims)[-2:]
        scores = [(sum(n for shape, n in counts.items() if shape.fits(dim, options)), dim) for dim in tried]
        return max(scores, key=lambda one: one[0], default=(0, 0))


@dataclass(frozen=True)
class _Shape:
    """Layers that are alike but for their names."""

    algo: str
    geometry: Geometry
    dim: int
    options: tuple[tuple[str, Any], ...]
    split: tuple[int, ...]

    @classmethod
    def of(cls, row: PlanRow) -> _Shape:
        options = ((name, _tidy(v) if isinstance(v, float) else v) for name, v in sorted(row.options.items()))
        return cls(row.algo, row.geometry, row.dim, tuple(options), row.split)

    @cached_property
    def told(self) -> dict[str, Any]:
        return dict(self.options)

    @cached_property
    def asked(self) -> dict[str, tuple[Any, ...]]:
        """Which arguments may have made it."""
        return ALGOS[self.algo].asked_as(self.geometry, self.dim, self.told)

    @cached_property
    def layout(self) -> Layout:
        return layout_of(ALGOS[self.algo], self.geometry, self.dim, self.told, self.split)

    def fits(self, dim: int, options: Mapping[str, Any]) -> bool:
        """Whether these give it its shapes."""
        spec = ALGOS[self.algo].spec
        own = {name: value for name, value in options.items() if name in spec.options}
        try:
            return _same(self.layout, layout_of(ALGOS[self.algo], self.geometry, dim, own, self.split))
        except ValueError:
            return False


def _same(first: Layout, second: Layout) -> bool:
    return (first.shapes, first.rank) == (second.shapes, second.rank)


def _same_options(wanted: PlanRow, row: PlanRow) -> bool:
    """Of those which no shape shows, and which act there."""
    spec, asked = ALGOS[wanted.algo].spec, _Shape.of(wanted).asked
    certain = {name: values[0] for name, values in asked.items() if name != "dim" and len(values) == 1}
    return all(
        _equal(value, row.options.get(name, BY_NAME[name].default))
        for name, value in certain.items()
        if spec.acts(name, wanted.layout.shapes)
    )


def _equal(first: Any, second: Any) -> bool:
    return math.isclose(first, second, rel_tol=1e-6) if isinstance(first, float) else bool(first == second)


_COMPARED: dict[str, Callable[[PlanRow, PlanRow], bool]] = {
    "algorithm": lambda wanted, row: wanted.algo == row.algo,
    "shape of their factors": lambda wanted, row: wanted.algo != row.algo or _same(wanted.layout, row.layout),
    "option of their algorithm": lambda wanted, row: wanted.algo != row.algo or _same_options(wanted, row),
    "strength": lambda wanted, row: math.isclose(wanted.scale, row.scale, rel_tol=1e-5),
    "DoRA": lambda wanted, row: wanted.dora == row.dora,
    "division into projections": lambda wanted, row: wanted.split == row.split,
}


def _key(row: PlanRow) -> _Key:
    """Encoders have names alike."""
    return row.part, row.saved_name


def _layer(row: PlanRow) -> Layer:
    return row.part, row.trainer_name


def _without_defaults(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in options.items() if value != BY_NAME[name].default}


def _shared(rows: Iterable[PlanRow]) -> dict[str, str]:
    """Options of all algorithms."""
    sides, found = {row.dora for row in rows}, dict[str, str]()
    if sides - {""}:
        found["use_dora"] = "True"
    if "input" in sides:
        found["wd_on_output"] = "False"
    if any(row.split for row in rows):
        found["split_qkv"] = "True"
    return found


def _alpha(row: PlanRow) -> float | None:
    """Which alpha gives a layer its strength; None where none is asked for."""
    rank = row.layout.rank
    return None if rank is None else _tidy(row.scale * rank)


def _tidy(number: float) -> float:
    """The shortest number that is the same in fp32."""
    tried = (float(f"{number:.{digits}g}") for digits in range(1, 9))
    return next((one for one in tried if math.isclose(one, number, rel_tol=2e-7)), number)


def _most_common(values: Iterable[float | None]) -> float | None:
    return next((value for value, _ in Counter(v for v in values if v is not None).most_common(1)), None)


def _mapped(argument: str, values: Mapping[Layer, float], layers: Iterable[Layer]) -> dict[str, str]:
    """`{'regex': 8}` for some of these layers; {} for none."""
    every, pairs = set(layers), []
    for value in sorted(set(values.values())):
        own = {layer for layer, its in values.items() if its == value}
        pairs += [f"'{pattern}': {value:.9g}" for pattern in patterns_in(own, every - own)]
    return {argument: f"{{{', '.join(pairs)}}}"} if pairs else {}


def _ranges(numbers: Iterable[int | None]) -> str:
    """`0-7,20`, of those that are there."""
    ordered = sorted({number for number in numbers if number is not None})
    groups = itertools.groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in groups]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
