"""The plan: every layer of the model, with what it gets or why it gets nothing. Has no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..algos import ALGOS, OF_WEIGHT, Adapter, Layout, layout_of, make_adapter, unstarted
from ..archs.spec import ArchSpec, Part
from ..args.expressions import quoted
from ..args.parse import NetArgs
from ..files.codec import SavedLayer
from ..files.dialects import FileFormat
from ..layers.dropout import Dropouts
from ..tensors.geometry import Geometry
from ..tensors.seeding import seed_of, seeded
from . import report

if TYPE_CHECKING:
    from .why import Explainer, Why


@dataclass(frozen=True)
class PlanRow:
    """One layer.

    Attributes:
        part: the model it belongs to.
        dotted_name, saved_name: its path in this model, and its name in files.
        own_saved_name: the saved name that its path in this model would give.
        geometry: its shape and operation.
        kind, shape: "Linear", [O, I]; "Conv2d 3x3", [O, I, 3, 3].
        algo, dim, alpha, options: what it gets.
        scale: effective strength at multiplier 1.
        lr: absolute learning rate from a regular expression, or None for that of its part.
        block: its block number, if it has one.
        block_rate: factor on the learning rate from its block, or None without such factors.
        plus_ratio: LoRA+ factor on the learning rate of the plus parameters.
        plus_unit: LoRA+ factor in their parametrisation instead.
        dora_ratio: factor on the learning rate of the magnitudes.
        dropouts: that act on it in training; those on the rank activation where there is one.
        rank_axis: whether dropouts on the rank activation reach it.
        dora: the side on which it has magnitudes, "output" or "input"; "" without DoRA.
        plain: why it has none although use_dora is on.
        parameters: how many values its adapter has, magnitudes included.
        split: output rows of the projections that have an adapter each; () for one adapter on the whole.
        start_size: of its update at the start, relative to the base weight; None = it starts at 0.
        init, init_seed: its start values, and what they are drawn from beside its saved name; None = the host's seed.
        reason: why it is left out; "" if it is trained.
        unwanted: it is left out because the call says so, not by the architecture's record.
        trainer_name: its dotted name in the trainer's own model.
        shown_name: the same as it is printed, and as patterns take it.
        unread: nothing in this model reads what it computes, so that it never gets a gradient.
    """

    part: str
    dotted_name: str
    saved_name: str
    own_saved_name: str
    kind: str
    shape: tuple[int, ...]
    geometry: Geometry = field(repr=False)
    algo: str = ""
    dim: int = 0
    alpha: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 0.0
    lr: float | None = None
    block: int | None = None
    block_rate: float | None = None
    plus_ratio: float = 1.0
    plus_unit: float = 1.0
    dora_ratio: float = 1.0
    dropouts: Dropouts = Dropouts()
    rank_axis: bool = False
    parameters: int = 0
    dora: str = ""
    plain: str = ""
    split: tuple[int, ...] = ()
    start_size: float | None = None
    init: str = "default"
    init_seed: int | None = None
    reason: str = ""
    unwanted: bool = False
    trainer_name: str = ""
    shown_name: str = ""
    unread: bool = False

    @property
    def trained(self) -> bool:
        return not self.reason

    @property
    def relative(self) -> bool:
        """Whether the update of a trained layer is a function of the base weight, which its norm needs."""
        return ALGOS[self.algo].spec.relative

    @cached_property
    def layout(self) -> Layout:
        """Of a trained layer."""
        return layout_of(ALGOS[self.algo], self.geometry, self.dim, self.options, self.split)

    @property
    def frozen(self) -> int:
        """How many values of a trained layer never change."""
        return self.layout.count(ALGOS[self.algo].spec.frozen)

    @property
    def learning(self) -> int:
        """How many values of a trained layer the optimizer gets, unless its part has a learning rate of 0."""
        if self.lr == 0 or self.block_rate == 0:
            return 0
        spec, layout, still = ALGOS[self.algo].spec, self.layout, self.frozen
        still += layout.count(spec.plus - spec.frozen) if self.plus_ratio == 0 else 0
        return self.parameters - still - (self.parameters - layout.parameters if self.dora_ratio == 0 else 0)

    def obeys(self, option: str) -> bool:
        """Whether a trained layer has an option of its algorithm, and a use for it."""
        return bool(self.options.get(option)) and ALGOS[self.algo].spec.acts(option, self.layout.shapes)

    def make_adapter(self, started: bool = True) -> Adapter:
        """A new adapter for this layer. With a seed it is drawn on the CPU, so that no device decides its values.

        Args:
            started: it has start values; otherwise a file sets all of them.
        """
        if not started:
            with unstarted():
                return self._adapter(started)
        device = torch.get_default_device()
        if self.init_seed is None or device.type == "meta":
            return self._adapter()
        with torch.device("cpu"), seeded(seed_of(self.saved_name, self.init_seed)):
            return self._adapter().to(device)

    def _adapter(self, started: bool = True) -> Adapter:
        adapter = make_adapter(ALGOS[self.algo], self.geometry, self.dim, self.options, self.split)
        if self.init == "orthogonal" and started:
            adapter.orthogonal_()
        adapter.fold_plus_(self.plus_unit)
        if self.start_size is not None and started:
            adapter.perturb_(self.start_size)
        if self.init in OF_WEIGHT:
            adapter.defer_init_(self.scale, self.init)
        return adapter

    @property
    def bytes(self) -> int:
        """Of the parameters in fp32."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Beside:
    """A training adapter.

    Attributes:
        name: of its file.
        strength: at which it acts.
        layers, bytes: what it has, and needs.
    """

    name: str
    strength: float
    layers: int
    bytes: int

    def __str__(self) -> str:
        size, layers = report.shown_size(self.bytes), f"{self.layers} layer{'s' * (self.layers != 1)}"
        acts = "in training, not in samples and files"
        return f"training adapter {self.name} at strength {self.strength:g}: {layers}, {size}, {acts}"


@dataclass(frozen=True)
class Plan:
    """What a call would build.

    Attributes:
        title: of the architecture.
        rows: all layers, trained or not, in model order.
        average: where an average of what is trained is kept, `adapter` or `cpu`; "" = there is none.
        notes: what a user should know, one sentence each.
        warnings: what looks wrong, one sentence each.
        explainer: what `why` asks; None in the plan of a network.
        file_format: of the network's files.
        uses: (argument that was given, expression) -> parts in which it decides something.
        renote: gives the notes of such a plan with fewer trained layers.
        beside: the training adapters.
    """

    title: str
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    explainer: Explainer | None = field(default=None, compare=False, repr=False)
    file_format: FileFormat = field(default=FileFormat(), compare=False, repr=False)
    uses: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict, compare=False, repr=False)
    renote: Callable[[Plan], tuple[str, ...]] | None = field(default=None, compare=False, repr=False)
    beside: tuple[Beside, ...] = ()
    average: str = ""

    @cached_property
    def trained(self) -> tuple[PlanRow, ...]:
        return tuple(row for row in self.rows if row.trained)

    def why(self, name: str) -> tuple[Why, ...]:
        """Why layers are trained or not, and where their dim, alpha and learning rate come from.

        Args:
            name: a dotted name or a saved name; else a part of one, or a regular expression that is found in one.

        Returns:
            One explanation for each such layer, in model order; `str` of it is text.

        Raises:
            ValueError: no layer of the model has such a name, or this is the plan of a network, which keeps no rules.
        """
        if self.explainer is None:
            raise ValueError(
                "this plan belongs to a network, which keeps no rules: ask the one of networks.X.plan(...)"
            )
        return self.explainer.explain(name, self.rows)

    def keep(self, parts: Sequence[str]) -> Plan:
        """The plan with only these parts trained, and a warning of arguments which then decide nothing.

        Args:
            parts: names of parts, as rows have them.
        """
        rows = tuple(
            row if row.part in parts or not row.trained else replace(row, reason="this part is not trained")
            for row in self.rows
        )
        uses = {by: where for by, where in self.uses.items() if not where or not where.isdisjoint(parts)}
        warnings = _idle([by for by in self.uses if by not in uses], parts)
        kept = replace(self, rows=rows, warnings=(*self.warnings, *warnings), uses=uses)
        return kept if self.renote is None or not kept.trained else replace(kept, notes=self.renote(kept))

    def told(self, parts: Iterable[Part], options: object) -> Plan:
        """The plan where the trainer's own options are known, which may move what of a model is read.

        Args:
            parts: of the architecture.
            options: the trainer's, as attributes.
        """
        return replace(self, rows=with_unread(self.rows, parts, options))

    def readers(self) -> list[str]:
        """One line for each program that will not read the network's files whole and exactly, with what helps."""
        from .forecast import told  # the models of all programs take longer to import than a plan takes

        return told(self)

    def only_trained(self) -> Plan:
        """The plan without the rows of layers that are left out."""
        return replace(self, rows=self.trained)

    def to_text(self, columns: int = 0) -> str:
        """A table: one line per layer, then totals and notes; two lines where it is wider than so many columns."""
        return report.plan_text(self, columns)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form: one object per layer, and the totals."""
        return report.plan_json(self)


def with_unread(rows: Sequence[PlanRow], parts: Iterable[Part], options: object = None) -> tuple[PlanRow, ...]:
    """The rows, with what is `unread` of all parts.

    Args:
        rows: of all layers, trained or not.
        parts: of the architecture.
        options: the trainer's, as attributes; None = not known yet.
    """
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row.part, []).append(row.trainer_name)
    found = {
        (part.name, name) for part in parts for one in part.unread for name in one.of(names.get(part.name, ()), options)
    }
    marked = ((row, (row.part, row.trainer_name) in found) for row in rows)
    return tuple(row if row.unread is unread else replace(row, unread=unread) for row, unread in marked)


def _idle(uses: Sequence[tuple[str, str]], parts: Sequence[str]) -> list[str]:
    """A warning of arguments, with the expression, which decide something in none of the parts that are left."""
    if not uses or not parts:
        return []
    told = ", ".join(f"{argument} {quoted(expression)}" if expression else argument for argument, expression in uses)
    return [f"without effect, as only {' and '.join(parts)} is trained: {told}"]


@dataclass(frozen=True)
class Request:
    """A call of a host, understood.

    Attributes:
        arch: the record of its architecture.
        parts: (part, its model) that the host handed over.
        dim, alpha: of Linears and 1x1 convolutions; alpha 0 means dim.
        args: the typed arguments.
        saved: layers of a file that decides dims, forms and alphas; None without a file.
        source: the file's name, for messages.
        unknown: layer name -> its suffixes that no algorithm of ours has, in that file.
        rs_lora: what the file says of RS-LoRA; None = nothing.
        names_like: what names the file has, asked for where none belongs to the model.
    """

    arch: ArchSpec
    parts: tuple[tuple[Part, nn.Module], ...]
    dim: int
    alpha: float
    args: NetArgs
    saved: Mapping[str, SavedLayer] | None = None
    source: str = "the file"
    unknown: Mapping[str, str] = field(default_factory=dict)
    rs_lora: bool | None = None
    names_like: Callable[[], str] = lambda: "-"
