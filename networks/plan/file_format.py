"""How the files of a network are written: what `save_format` and `save_also` can hold of a plan, and who reads it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..algos import ALGOS
from ..archs import places as other_names
from ..archs.places import Layer
from ..archs.spec import ArchSpec
from ..args.parse import NetArgs, Problems
from ..files import peft_folder
from ..files.codec import SavedLayer, saved_adapter
from ..files.dialects import COMFYUI, DIALECTS, PORTABLE, Dialect, FileFormat
from ..files.save_formats import Foreseen, foreseen
from ..layers.magnitude import magnitude_shape
from ..tensors.seeding import seeded

if TYPE_CHECKING:
    from .plan import Plan, PlanRow, Request

AUTO, NONE = "auto", "none"  # of save_also
LARGE = 1 << 30  # bytes in half precision, above which no file is written that nobody asked for


def review(plan: Plan, request: Request, problems: Problems) -> tuple[FileFormat, list[str]]:
    """What the network's files are like, and what they cannot hold.

    Args:
        plan: every layer decided.
        request: the call.
        problems: takes the reports.

    Returns:
        The form, and notes for the user on who reads the files, one sentence each.
    """
    trained, args = plan.trained, request.args
    rs_lora = args.rs_lora if request.rs_lora is None else request.rs_lora
    plain = FileFormat(rs_lora=rs_lora, arch=request.arch)
    if not trained:
        return plain, []
    _save_dims(trained, args, problems)
    dialect, reasons = _chosen(trained, request)
    notes = []
    if dialect.name == args.save_format:
        for reason in reasons:
            problems.add(reason)
    else:
        notes.append(f"{reasons[0]}; files are written as save_format={dialect.name} instead")
    forms = _Forms(plan, request, plain, problems)
    form = replace(forms.of(PORTABLE if dialect.folder else dialect, notes), dims=tuple(filter(None, args.save_dims)))
    form = replace(form, also=forms.beside(dialect, notes))
    return form, notes if request.saved is not None else [*notes, *_readers(trained, dialect, request)]


def _readers(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> list[str]:
    """Notes on who reads a dialect's files."""
    notes = []
    if dialect.prefixes:
        own, written = dialect.prefixes[0]
        why = f"as sd-scripts' {dialect.name} does" if dialect.lacks else "for readers that look for such names"
        notes.append(f"files name these layers {written}... instead of {own}..., {why}")
    if dialect.archs and request.arch.name not in dialect.archs:
        notes.append(f"save_format={dialect.name}: no other program reads such files of {request.arch.title}")
    return notes


class _Forms:
    """The forms of the files that a save writes.

    Args:
        plan, request, problems: as for `review`.
        plain: form of all of them, in the portable dialect.
    """

    def __init__(self, plan: Plan, request: Request, plain: FileFormat, problems: Problems) -> None:
        self.plan, self.request, self.plain, self.problems = plan, request, plain, problems

    def of(self, dialect: Dialect, notes: list[str], argument: str = "save_format") -> FileFormat:
        """One of them; notes take what layers are converted to, and problems what has no such form."""
        form = self._named(dialect)
        try:
            found = foreseen_of(self.plan, form)
        except ValueError as error:
            self.problems.add(f"{argument}={dialect.name}: {error}")
            return form
        if found.told:
            way = (
                ""
                if argument == "save_also"
                else f"; to train on, keep a portable file, too (save_also={dialect.name})"
            )
            notes.append(f"{argument}={dialect.name}: {found.told}, {_size(found)} in half precision{way}")
        return form

    def beside(self, dialect: Dialect, notes: list[str]) -> tuple[FileFormat, ...]:
        """The further ones: those that were asked for, and the one which ComfyUI needs to load all layers."""
        asked, also = self.request.args.save_also, []
        names = dict.fromkeys([*asked, *([dialect.name] if dialect.folder else [])])
        for one in (DIALECTS[name] for name in names if name not in (AUTO, NONE)):
            if one is dialect and not dialect.folder:
                self.problems.add(f"save_also={one.name}: files are written as save_format={one.name} already")
            elif one is dialect:
                also.append(self.of(one, notes))
            else:
                for reason in _misfits(self.plan.trained, one, self.request, "save_also"):
                    self.problems.add(reason)
                also.append(self.of(one, notes, "save_also"))
        return (*also, *(self._for_comfyui(notes) if AUTO in names and COMFYUI.name not in names else ()))

    def _for_comfyui(self, notes: list[str]) -> list[FileFormat]:
        """The form of a second file, where that program misses layers under the trainers' names, and nobody has said
        what files are to be like."""
        part = self.request.arch.denoiser
        rows = [row for row in self.plan.trained if row.part == part.name]
        foreign = sum(not other_names.is_read_flat(part, row.trainer_name) for row in rows)
        if not foreign or "save_format" in self.request.args.given or self.problems.messages:
            return []
        form = self._named(COMFYUI)
        try:
            found = foreseen_of(self.plan, form)
        except ValueError:  # of a layer that has no place there
            return []
        missed = f"ComfyUI knows {foreign} of {len(self.plan.trained)} layers under other names"
        told = f" ({found.told}, {_size(found)} in half precision)" if found.told else ""
        if found.asks or 2 * found.values > LARGE:
            notes.append(f"{missed}: save_also=comfyui writes a second file for it, NAME-comfyui.safetensors{told}")
            return []
        notes.append(
            f"{missed}: each save also writes NAME-comfyui.safetensors{told}, which it reads; save_also=none turns "
            "that off"
        )
        return [form]

    def _named(self, dialect: Dialect) -> FileFormat:
        """With the layers of its program."""
        form, plan = replace(self.plain, dialect=dialect), self.plan
        if not dialect.program or self.problems.messages:
            return form
        parts = {part.name: part for part, _ in self.request.parts}
        layers = (
            Layer(parts[row.part], row.trainer_name, row.saved_name, row.geometry.weight_shape, row.trained)
            for row in plan.rows
        )
        form = replace(form, targets=other_names.targets(self.request.arch, layers, dialect.program))
        if not dialect.folder:
            return form
        kinds = [(ALGOS[row.algo].spec, row.geometry, row.layout.shapes, row.dora) for row in plan.trained]
        return replace(form, dialect=peft_folder.fitting(form, kinds))


def foreseen_of(plan: Plan, form: FileFormat) -> Foreseen:
    """What a file in this form will hold, before anything is trained.

    Raises:
        ValueError: a layer has no form that its program computes.
    """
    rows = {row.saved_name: row for row in plan.trained}
    return foreseen({name: _kind(row) for name, row in rows.items()}, form, lambda name: _start(rows[name]))


def _size(found: Foreseen) -> str:
    return f"{2 * found.values / 2**20:.0f} MiB"


def _kind(row: PlanRow) -> Hashable:
    """What rows have in common whose layers are converted alike."""
    return (
        row.algo,
        row.dim,
        repr(sorted(row.options.items())),
        row.split,
        row.dora,
        row.geometry.kernel,
        tuple(row.layout.shapes),
    )


def _start(row: PlanRow) -> SavedLayer:
    """A layer of a row's shapes, with values."""
    with seeded(0), torch.device("cpu"), torch.no_grad():
        adapter = replace(row, init="default", init_seed=None, plus_unit=1.0).make_adapter()
        for p in adapter.parameters():
            p.normal_()
        magnitude = torch.ones(magnitude_shape(row.geometry, row.dora == "output")) if row.dora else None
        return saved_adapter(row.saved_name, adapter, row.scale, magnitude)


def wanted_format(args: NetArgs, arch: ArchSpec) -> Dialect:
    """The form that the arguments ask for: `save_format`, with the preset's prefix.

    Args:
        args: of the call.
        arch: whose saved names the prefix stands for.
    """
    dialect, prefix = DIALECTS[args.save_format], args.preset.lora_prefix if args.preset else ""
    return replace(dialect, prefixes=((f"{arch.denoiser.prefix}_", f"{prefix}_"),)) if prefix else dialect


def _chosen(trained: Sequence[PlanRow], request: Request) -> tuple[Dialect, list[str]]:
    """The form of the files, and why it is not that of `save_format`. An entry's own form makes way for another."""
    wanted = wanted_format(request.args, request.arch)
    reasons = _misfits(trained, wanted, request)
    return (wanted if not reasons or "save_format" in request.args.given else PORTABLE), reasons


def _misfits(
    trained: Sequence[PlanRow], dialect: Dialect, request: Request, argument: str = "save_format"
) -> list[str]:
    """What of the trained layers its files cannot hold."""
    name = f"{argument}={dialect.name}"
    return [f"{name}{reason}" for check in _LIMITS for reason in check(trained, dialect, request)]


def _names_of_its_own(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    if dialect.name != PORTABLE.name and request.args.preset and request.args.preset.lora_prefix:
        yield " has names of its own: leave out it, or the preset's lora_prefix"


def _components(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    trained_parts = {row.part for row in trained} if dialect.program == other_names.DIFFUSERS else set()
    for part in (part for part, _ in request.parts if not part.diffusers and part.name in trained_parts):
        yield f": diffusers reads no adapter of the {part.name} of {request.arch.title}; leave it out"


def _folds(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    if dialect.fold_flag and any(request.args.save_dims) and any(row.dora == "output" for row in trained):
        yield ": its magnitudes hold for the whole dim alone; leave out save_dims"


def _algorithms(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    held = () if dialect.program else dialect.algos  # what is converted is looked at layer by layer
    others = {row.algo for row in trained if held and ALGOS[row.algo].spec.file_algo not in held}
    if others:
        yield (
            f" holds {', '.join(dialect.algos)} only, not {', '.join(sorted(others))}: that program reads the others "
            "otherwise; leave it out"
        )


def _magnitudes(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    rows = [row for row in trained if row.dora]
    kinds = {row.kind for row in rows if dialect.dora_kinds and row.kind not in dialect.dora_kinds}
    if kinds:
        yield (
            f" holds DoRA of {', '.join(dialect.dora_kinds)} only, not of {', '.join(sorted(kinds))}: leave it out, or "
            "the convolutions (conv_dim=0)"
        )
    if any(row.dora not in dialect.dora_sides for row in rows):
        yield " holds DoRA of output rows only: leave out wd_on_output=False"


def _options(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    for option in dialect.lacks:
        if any(row.options.get(option) or (option == "split_qkv" and row.split) for row in trained):
            yield f" has no place for {option}: that program would ignore it, or refuse the file"
    limits = {option for row in trained if row.options.get(option := ALGOS[row.algo].spec.alpha_option) == 0}
    if dialect.lacks and limits:
        yield f": there the {', '.join(limits)} 0 means no rotation at all: 1 is next to no limit"


_LIMITS = (_names_of_its_own, _components, _folds, _algorithms, _magnitudes, _options)


def _save_dims(trained: Sequence[PlanRow], args: NetArgs, problems: Problems) -> None:
    """A cut file must differ from the whole one, and its layers must have ranks."""
    others = sorted({row.algo for row in trained if not ALGOS[row.algo].spec.nested})
    if args.save_dims and 0 < len(others) < len({row.algo for row in trained}):
        problems.add(f"save_dims: the ranks of {', '.join(others)} do not stand alone; leave it out")
    largest = max(row.dim for row in trained)
    for dim in filter(None, args.save_dims):
        if dim >= largest:
            problems.add(f"save_dims: {dim} cuts nothing, the largest dim is {largest}; leave it out")
