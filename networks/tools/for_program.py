"""A file in the form of a program: its names, the layers of its model, the algorithms that it computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .._errors import located
from ..archs import places
from ..archs.places import Target
from ..files import codec, dotted, peft_folder, save_formats, twins, writer
from ..files.codec import SavedLayer
from ..files.dialects import Dialect, FileFormat
from ..files.joining import NeedsBase
from ..files.merged import refolded
from ..tensors.norms import weight_geometry
from ..tensors.updates import Update, stacked
from .convert import Told, Wanted, as_it_stands, is_same, is_whole
from .forms import FORMS, Shape, row_of
from .opened import Opened
from .report import Report, Row, Walk

RowOf = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Row]  # of the tensors of a layer, made and in the file
KEPT = 8  # layers of which others may still want rows


class ForProgram:
    """A file in the form of a program.

    Args:
        opened: the file.
        wanted: what its layers are to become first.
        dialect: of the program.
        report: takes what becomes of the layers, and what has no place.

    Raises:
        ValueError: the model is not known, or the form has no place for the algorithm of a layer.
    """

    def __init__(self, opened: Opened, wanted: Wanted, dialect: Dialect, report: Report) -> None:
        self.opened, self.wanted, self.report = opened, wanted, report
        self.file = opened.on_model
        report.notes += [text for text in self.file.assumed if text]
        lost = {name: self._no_place(name, dialect) for name in self.file.layers}
        self.held = {name: saved for name, saved in self.file.layers.items() if not lost[name]}
        report.dropped += [(name, why) for name, why in lost.items() if why]
        report.dropped += [(dotted.shown(key), "is no adapter") for key in self.file.stray]
        report.dropped += [(name, "has no place in this model") for name in self.file.portions]
        self._check_algorithms(dialect)
        self._check_layers(dialect)
        self.folds = bool(dialect.fold_flag)
        self.layers = _Layers(self)
        self.form = self._form(dialect)

    def write(self, out: Path, walk: Walk, told: Told) -> None:
        """Write it, with what `told` says when all layers are there."""
        dtype = self.wanted.dtype
        if self.form.dialect.folder:
            layers = []
            for layer, row in self._made(walk):
                written = codec.written([layer], self.form)
                self.report.rows.append(row(written, writer.cast(written, dtype)))
                layers.append(layer)
            peft_folder.write(out, layers, self.form, dtype, told())
            return
        known, flags = dict[str, str](), dict[str, Tensor]()
        with writer.streamed(out, dtype, known) as stream:
            for layer, row in self._made(walk):
                written = codec.written([layer], self.form)
                said = {key: tensor for key, tensor in written.items() if "." not in key}
                own = {key: tensor.contiguous() for key, tensor in written.items() if "." in key}
                self.report.rows.append(row(own, {**stream.add(own), **said}))
                flags |= said
            stream.add(flags)
            known |= told()

    def tensors(self, walk: Walk) -> dict[str, Tensor]:
        """All of them, for a form that is no folder."""
        return codec.written([layer for layer, _ in self._made(walk)], self.form)

    # -- what has a place

    def _no_place(self, name: str, dialect: Dialect) -> str:
        """Why the form has none for a layer; "" = it has."""
        if not dialect.program:
            return ""
        layer = self.opened.model_layers.get(name)
        if layer is None:
            return f"is no layer of {self.opened.arch.title}"
        if dialect.program == places.DIFFUSERS and not layer.part.diffusers:
            return f"diffusers reads no adapter of the {layer.part.name}"
        saved = self.file.layers[name]
        held = saved.algorithm.spec.family == "matrix" or dialect.computes(saved.algorithm.spec, saved.tensors, 0)
        return "" if held else f"{dialect.name} has no place for normalisation layers"

    def _check_algorithms(self, dialect: Dialect) -> None:
        """
        Raises:
            ValueError: the form holds some algorithms alone, and no other is asked for.
        """
        if dialect.program or not dialect.algos or self.wanted.algo in dialect.algos:
            return
        others = {saved.algorithm.spec.file_algo for saved in self.held.values()} - {*dialect.algos}
        if others:
            helps = next((name for name in dialect.algos if name in FORMS), "")
            remedy = f": add --to {helps}" if helps else ": choose another form"
            raise ValueError(
                f"{self.opened.path} has layers of {', '.join(sorted(others))}, and {dialect.name} holds "
                f"{', '.join(dialect.algos)} alone{remedy}"
            )

    def _check_layers(self, dialect: Dialect) -> None:
        """
        Raises:
            ValueError: the form has no place for the magnitudes or an option of a layer that stays what it is.
        """
        for name, saved in self.held.items():
            with located(f"{self.opened.path}: {name}"):
                why = _misfit(saved, self.shape(name), dialect) if self.wanted.is_met(saved) else ""
            if why:
                raise ValueError(
                    f"{self.opened.path}: {name}: {dialect.name} has no place for {why}: add --to lora with a rank, or "
                    "choose another form"
                )

    def _form(self, dialect: Dialect) -> FileFormat:
        form = FileFormat(dialect, bool(self.file.flags.rs_lora), arch=self.opened.arch)
        if not dialect.program:
            return form
        layers = [replace(one, trained=name in self.held) for name, one in self.opened.model_layers.items()]
        known = [one for one in layers if one.part.diffusers or dialect.program != places.DIFFUSERS]
        form = replace(form, targets=places.targets(self.opened.arch, known, dialect.program))
        if not dialect.folder:
            return form
        kinds = []
        for name in self.held:
            made, geometry = self.layers[name], weight_geometry(self.shape(name))
            kinds.append((made.algorithm.spec, geometry, made.build(geometry).laid_out.shapes, made.side(geometry)))
        return replace(form, dialect=peft_folder.fitting(form, kinds))

    # -- the model

    def shape(self, name: str) -> Shape:
        """Of the weight of one of the trainer's layers."""
        return self.opened.model_shape(name)

    def weight(self, name: str) -> Tensor | None:
        found = self.opened.model_weight(name)
        return None if found is None else found.to(self.wanted.device)

    def needed_weight(self, name: str) -> Tensor:
        """Raises NeedsBase where it is not known."""
        found = self.weight(name)
        if found is None:
            raise NeedsBase(
                f"{self.opened.path}: {name}: what it becomes depends on the weight below it: give the model, --base "
                "CHECKPOINT"
            )
        return found

    # -- layers

    def layer(self, name: str) -> SavedLayer:
        """One of the trainer's layers, in the algorithm and with the magnitudes that the form has."""
        saved = with_alpha(self.file.layers[name])
        wanted = self.folds and saved.magnitude is not None
        with located(str(self.opened.path)):
            if not self.wanted.is_met(saved):
                return self.wanted.made(saved, self.shape(name), self.weight)
        if saved.folded == wanted:
            return saved
        if saved.side(weight_geometry(self.shape(name))) == "input":
            return replace(saved, folded=wanted)
        return refolded(saved, self.needed_weight(name), wanted)

    def _made(self, walk: Walk) -> Iterator[tuple[SavedLayer, RowOf]]:
        """Every layer of the file, and what tells its row of the report."""
        if not self.form.dialect.program:
            for name in walk([*self.held]):
                yield self.layers[name], functools.partial(self._row, self.layers[name], name, None)
            return
        makers = {target.name: (target, make) for target, make in self._makers()}
        for key in walk([*makers]):
            target, make = makers[key]
            try:
                layer, _ = make()
            except NeedsBase:
                raise
            except ValueError as error:
                helps = "; or add --to lora with a rank (--dim 32)" if not self.wanted.algo else ""
                raise ValueError(f"{self.opened.path}: {error}{helps}") from None
            name = ", ".join(share.saved_name for share in target.shares if share.saved_name in self.held)
            yield layer, functools.partial(self._row, layer, name, target)

    def _makers(self) -> Iterator[tuple[Target, save_formats.Make]]:
        return save_formats.making(self.layers, self.form, self.needed_weight)

    def _row(
        self,
        layer: SavedLayer,
        name: str,
        target: Target | None,
        written: Mapping[str, Tensor],
        stands: Mapping[str, Tensor],
    ) -> Row:
        """What became of a layer, beside the rows of the updates that it stands for.

        Args:
            layer: it, named as in the file.
            name: of what it is made of, for people.
            target: of the program; None = one of the trainer's layers.
            written: its tensors.
            stands: the same as the file has them, and what that says of all layers.
        """
        before, rank = self._before(name, target), layer.algorithm.spec.shown_rank(layer.tensors)
        scaled = self.form.dialect.peft and layer.scale != 1
        if before is not None and is_same(layer, before) and not scaled and is_whole(written, stands):
            return Row(name, rank=rank)
        if layer.folded:  # each divided by a length: its dtype is wider than what rounds there
            return Row(name, "magnitudes as ComfyUI takes them", rank, 0.0 if is_whole(written, stands) else None)
        row = self._measured(as_it_stands(layer, stands), name, target)
        if before is not None and layer.tensors is before.tensors:
            row = replace(row, became="" if is_same(layer, before) else "magnitudes as they were trained", exact=True)
        return row

    def _before(self, name: str, target: Target | None) -> SavedLayer | None:
        """The trainer's layer that one of the file is, if it is one."""
        whole = target is None or (len(target.shares) == 1 and target.shares[0].is_all)
        return self.file.layers.get(name) if whole else None

    def _measured(self, layer: SavedLayer, name: str, target: Target | None) -> Row:
        """The row of a layer that is not as it was, with its error."""
        try:
            update = self._update(name) if target is None else self._rows(target)
            weight = None if layer.magnitude is None else self._below(name, target)
        except ValueError:  # it depends on a weight that is not given, and the change of names did not
            spec = layer.algorithm.spec
            return Row(name, spec.name, spec.shown_rank(layer.tensors), None)
        shape = self.shape(name) if target is None else (len(update.left), *target.columns)
        return replace(row_of(layer, shape, update, self.wanted.exact, weight), name=name)

    def _below(self, name: str, target: Target | None) -> Tensor:
        """The weight below a layer of the file."""
        if target is None:
            return self.needed_weight(name)
        return torch.cat([self.needed_weight(one.saved_name)[a:b] for one in target.shares for a, b in one.ranges])

    def _update(self, name: str) -> Update:
        """What one of the trainer's layers adds."""
        return self.opened.model_update(name).to(self.wanted.device)

    def _rows(self, target: Target) -> Update:
        """What the rows of a program's layer are to add."""
        columns = torch.Size(target.columns).numel()
        none = torch.zeros(0, columns, dtype=torch.float64, device=self.wanted.device)
        rows = []
        for share in target.shares:
            if share.saved_name in self.held:
                rows.append(self._update(share.saved_name).rows(share.ranges))
            else:
                rows.append(Update(none.new_zeros(share.stop - share.start, 0), none))
        return stacked(rows)


def with_alpha(saved: SavedLayer) -> SavedLayer:
    """With the one that stands for scale 1, where its file has none: some readers take that for 1. Of a layer whose
    name another may have, it is the mark that the name is right."""
    rank = saved.algorithm.spec.shown_rank(saved.tensors) or int(twins.is_marked(saved.name, saved.tensors))
    return saved if saved.alpha is not None or not rank else replace(saved, alpha=float(rank))


def _misfit(saved: SavedLayer, shape: Shape, dialect: Dialect) -> str:
    """What of a layer a form has no place for; "" = nothing."""
    geometry = weight_geometry(shape)
    if saved.magnitude is not None:
        side = saved.side(geometry)
        if side not in dialect.dora_sides:
            return f"DoRA of the {side} side"
        if dialect.dora_kinds and geometry.kind not in dialect.dora_kinds:
            return f"DoRA of a {geometry.kind}"
    options = saved.describe(geometry)[1] if dialect.lacks else {}
    return next((name for name in dialect.lacks if options.get(name)), "")


class _Layers(Mapping[str, SavedLayer]):
    """Those of a file as the form has them, each made when it is asked for."""

    def __init__(self, program: ForProgram) -> None:
        self._program, self._made = program, dict[str, SavedLayer]()

    def __getitem__(self, name: str) -> SavedLayer:
        if name not in self._program.held:
            raise KeyError(name)
        if name not in self._made:
            for old in [*self._made][: 1 - KEPT]:
                del self._made[old]
            self._made[name] = self._program.layer(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._program.held)

    def __len__(self) -> int:
        return len(self._program.held)
