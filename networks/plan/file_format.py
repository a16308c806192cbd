"""How the files of a network are written: what `save_format` can hold of a plan, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..algos import ALGOS
from ..archs import places as other_names
from ..archs.spec import ArchSpec
from ..args.parse import NetArgs, Problems
from ..files.dialects import DIALECTS, PORTABLE, Dialect, FileFormat

if TYPE_CHECKING:
    from .plan import Plan, PlanRow, Request


def format_of(request: Request, plan: Plan) -> FileFormat:
    """What the network's files are like.

    Args:
        request: the call.
        plan: every layer decided.
    """
    dialect, places = _chosen(plan.trained, request)[0], {}
    if dialect.components:
        parts = {part.name: part for part, _ in request.parts}
        places = {
            row.saved_name: other_names.places(
                request.arch, parts[row.part], row.trainer_name, row.geometry.out_features, row.geometry.in_features
            )
            for row in plan.trained
        }
    dims = tuple(filter(None, request.args.save_dims))
    rs_lora = request.args.rs_lora if request.rs_lora is None else request.rs_lora
    return FileFormat(dialect, rs_lora, dims, request.arch, places)


def review(trained: Sequence[PlanRow], request: Request, problems: Problems) -> list[str]:
    """Report what the files cannot hold.

    Args:
        trained: the plan's trained layers, one at least.
        request: the call.
        problems: takes the reports.

    Returns:
        Notes for the user on who reads them, one sentence each.
    """
    _save_dims(trained, request.args, problems)
    dialect, reasons = _chosen(trained, request)
    notes = []
    if dialect.name == request.args.save_format:
        for reason in reasons:
            problems.add(reason)
    else:
        notes.append(f"{reasons[0]}; files are written as save_format={dialect.name} instead")
    if request.saved is not None:
        return notes
    if dialect.prefixes:
        own, written = dialect.prefixes[0]
        why = f"as sd-scripts' {dialect.name} does" if dialect.lacks else "for readers that look for such names"
        notes.append(f"files name these layers {written}... instead of {own}..., {why}")
    else:
        told = [{**row.options, "split_qkv": row.split, "kernel": row.geometry.has_kernel} for row in trained]
        notes += sorted({ALGOS[row.algo].spec.note(o) for row, o in zip(trained, told, strict=True)} - {""})
    if dialect.archs and request.arch.name not in dialect.archs:
        notes.append(f"save_format={dialect.name}: no other program reads such files of {request.arch.title}")
    return notes


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


def _misfits(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> list[str]:
    """What of the trained layers its files cannot hold."""
    name = f"save_format={dialect.name}"
    return [f"{name}{reason}" for check in _LIMITS for reason in check(trained, dialect, request)]


def _names_of_its_own(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    if dialect.name != PORTABLE.name and request.args.preset and request.args.preset.lora_prefix:
        yield " has names of its own: leave out it, or the preset's lora_prefix"


def _components(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    trained_parts = {row.part for row in trained} if dialect.components else set()
    for part in (part for part, _ in request.parts if not part.diffusers and part.name in trained_parts):
        yield f": diffusers reads no adapter of the {part.name} of {request.arch.title}; leave it out"


def _folds(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    if dialect.fold_flag and request.saved is None and not any(row.dora == "output" for row in trained):
        yield " changes only DoRA magnitudes of output rows, and there are none: leave it out"
    if dialect.fold_flag and any(request.args.save_dims):
        yield ": its magnitudes hold for the whole dim alone; leave out save_dims"


def _tucker(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    if dialect.flat_only and any(row.obeys("use_tucker") for row in trained):
        yield " holds no Tucker form: leave out use_tucker"


def _algorithms(trained: Sequence[PlanRow], dialect: Dialect, request: Request) -> Iterator[str]:
    others = {row.algo for row in trained if dialect.algos and ALGOS[row.algo].spec.file_algo not in dialect.algos}
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


_LIMITS = (_names_of_its_own, _components, _folds, _tucker, _algorithms, _magnitudes, _options)


def _save_dims(trained: Sequence[PlanRow], args: NetArgs, problems: Problems) -> None:
    """A cut file must differ from the whole one, and its layers must have ranks."""
    others = sorted({row.algo for row in trained if not ALGOS[row.algo].spec.nested})
    if args.save_dims and 0 < len(others) < len({row.algo for row in trained}):
        problems.add(f"save_dims: the ranks of {', '.join(others)} do not stand alone; leave it out")
    largest = max(row.dim for row in trained)
    for dim in filter(None, args.save_dims):
        if dim >= largest:
            problems.add(f"save_dims: {dim} cuts nothing, the largest dim is {largest}; leave it out")
