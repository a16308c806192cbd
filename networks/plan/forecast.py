"""What other programs will make of the files of a plan, before anything is trained: on the meta device, where every
kind of layer is made once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..algos import ALGOS
from ..archs import places as other_names
from ..archs.names import PEFT
from ..archs.places import Layer
from ..files import codec, peft_folder
from ..files.codec import SavedLayer
from ..files.dialects import DIALECTS, FileFormat
from ..files.readers import Given
from ..files.verdicts import Verdict, verdicts
from ..layers.magnitude import magnitude_shape
from .file_format import foreseen_of

if TYPE_CHECKING:
    from .plan import Plan, PlanRow


# Creation and the first save ask for the same.
_latest: deque[tuple[Plan, FileFormat, tuple[Verdict, ...]]] = deque(maxlen=4)


def given_of(plan: Plan, form: FileFormat) -> Given:
    """The file that a network of a plan saves, without values.

    Args:
        plan: of the network.
        form: of its file, with the architecture.
    """
    assert form.arch is not None
    layers: Sequence[SavedLayer] = (
        foreseen_of(plan, form).layers if form.dialect.program else saved_layers(plan.trained)
    )
    if form.dialect.fold_flag:
        layers = [replace(layer, folded=layer.magnitude is not None) for layer in layers]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for row in plan.rows:
        shapes.setdefault(row.part, {})[row.trainer_name] = row.shape
    metadata = {"networks_dialect": form.dialect.name}
    if form.dialect.folder:
        own, settings = peft_folder.contents(layers, form).get("", ((), {}))
        meant = {PEFT + layer.name: layer for layer in own}
        return Given(peft_folder.tensors_of(own), metadata, form.arch, shapes, meant, folder=settings)
    meant = {form.dialect.written_name(layer.name): layer for layer in layers}
    return Given(codec.written(layers, form), metadata, form.arch, shapes, meant)


def saved_layers(rows: Sequence[PlanRow]) -> list[SavedLayer]:
    """The layers of a file in the trainers' names, without values."""
    made: dict[tuple[object, ...], SavedLayer] = {}
    found = []
    for row in rows:
        kind = (row.algo, row.geometry, row.dim, row.scale, row.split, row.dora, str(row.options))
        if kind not in made:
            made[kind] = _saved_layer(row)
        found.append(replace(made[kind], name=row.saved_name))
    return found


def _saved_layer(row: PlanRow) -> SavedLayer:
    with torch.device("meta"):
        # what starts from base weights, or from values of its own, is saved in the same form
        adapter = replace(row, init="default", init_seed=None).make_adapter()
        magnitude = torch.empty(magnitude_shape(row.geometry, row.dora == "output")) if row.dora else None
    return codec.saved_adapter(row.saved_name, adapter, row.scale, magnitude)


def forecast(plan: Plan, form: FileFormat) -> tuple[Verdict, ...]:
    """What each program that knows the architecture will make of a file; () where such a file does not exist."""
    if not plan.trained or form.arch is None:
        return ()
    known = next((found for its, of, found in _latest if its is plan and of is form), None)
    if known is None:
        try:
            known = verdicts(given_of(plan, form))
        except ValueError:
            known = ()
        _latest.append((plan, form, known))
    return known


def told(plan: Plan) -> list[str]:
    """One line for each program that will not read the files whole and exactly, with what helps."""
    return [
        f"{verdict.sentence}{_remedy(verdict, plan)}"
        for verdict in forecast(plan, plan.file_format)
        if verdict.unasked and not verdict.exact
    ]


def _remedy(verdict: Verdict, plan: Plan) -> str:
    """The form of file that stands for the program, if it is read better."""
    also = next((one for one in plan.file_format.also if one.dialect.name == verdict.name), None)
    form = also or _form_of(plan, verdict.name)
    better = next((one for one in forecast(plan, form) if one.name == verdict.name), verdict) if form else verdict
    if better.rank <= verdict.rank:
        return ""
    what = f"the file of save_also={verdict.name}" if also else f"save_format={verdict.name}"
    return f"; {what} gives {better.count}{'' if better.exact else ', not all of them exact'}"


def _form_of(plan: Plan, name: str) -> FileFormat | None:
    """The form of that name, if it is the form of a program's files, and another than the plan has. What would have to
    be converted is not tried for a hint: with large layers that takes seconds."""
    arch, dialect = plan.file_format.arch, DIALECTS.get(name)
    if arch is None or dialect is None or not dialect.program or dialect.name == plan.file_format.dialect.name:
        return None
    if not all(ALGOS[row.algo].spec.file_algo in dialect.algos for row in plan.trained):
        return None
    parts = {part.name: part for part in arch.parts}
    layers = [
        Layer(parts[row.part], row.trainer_name, row.saved_name, row.geometry.weight_shape, row.trained)
        for row in plan.rows
    ]
    try:
        targets = other_names.targets(arch, layers, dialect.program)
    except ValueError:  # the program has no such part
        return None
    return replace(plan.file_format, dialect=dialect, targets=targets, also=())
