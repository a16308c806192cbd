"""Two checkpoints of one model, layer by layer, whatever files and names each of them is stored in."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .._errors import located
from ..archs import ARCHS
from ..archs.detect import detect
from ..archs.spec import ArchSpec, Part
from ..args.coerce import nearest
from ..files import codec, stored, weight_names
from ..files.base_weights import divided
from ..files.checkpoint import Checkpoint
from ..files.weight_names import Target
from ..models.skeleton import DENOISERS, ENCODERS, recorded, skeleton
from ..plan.walk import candidates
from ..tensors import base_weight

File = Path | str
_NUMBER = re.compile(r"\d+")
_ENOUGH = 0.5  # of an architecture's kinds of layers: fewer are no model of it
_APART = (
    "first_stage_model.",
    "vae.",
    "model_ema.",
)  # models beside a denoiser, which are nobody's layers
_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Weight:
    """One layer of a model in a checkpoint."""

    checkpoint: Checkpoint
    target: Target

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.shape(self.checkpoint.shapes)

    @property
    def dtype(self) -> torch.dtype | None:
        """As it is stored; None for fp8."""
        return _PLAIN.get(self.checkpoint.dtype(self.target.keys[0]))

    @property
    def bias_dtype(self) -> torch.dtype | None:
        """The same of a bias, where it has one."""
        return _PLAIN.get(self.checkpoint.dtype(self.bias_keys[0]))

    @property
    def bias_keys(self) -> tuple[str, ...]:
        """Of the tensors that are its bias; () = it has none."""
        keys = tuple(piece.bias_key for piece in self.target.pieces)
        return keys if all(key in self.checkpoint.shapes for key in keys) else ()

    def read(self, device: torch.device) -> Tensor:
        """W [O, I, *kernel] in fp32 or wider, memory of its own."""
        pieces = [piece.of(self.checkpoint.shapes) for piece in self.target.pieces]
        return self._joined(pieces, device)

    def read_bias(self, device: torch.device) -> Tensor:
        """[O], likewise, of one that has a bias."""
        return self._joined(
            [piece.of(self.checkpoint.shapes).of_bias() for piece in self.target.pieces],
            device,
        )

    def _joined(self, pieces: Sequence[weight_names.Piece], device: torch.device) -> Tensor:
        rows = []
        for piece in pieces:
            with located(f"{self.checkpoint.path}: {piece.key}"):
                rows.append(piece.cut(base_weight.read(stored.load(self.checkpoint, piece.key), device)))
        return torch.cat(rows) if len(rows) > 1 else rows[0]


class Model:
    """The checkpoints of one model.

    Args:
        paths: of a safetensors file, of the folder of a diffusers component or of a whole pipeline; further ones for
            text encoders in files of their own, `lora_te1=PATH`.

    Raises:
        ValueError: one of them is no checkpoint.
    """

    def __init__(self, paths: Sequence[File]) -> None:
        self.files = [one for path in paths for one in _opened(path)]
        self.path = divided(paths[0])[1]
        for _, checkpoint in self.files:
            if codec.is_adapter(checkpoint.shapes):
                raise ValueError(
                    f"{checkpoint.path} is an adapter, and two models are compared here: give the models, or make "
                    "another adapter of it with `kohya-networks convert`"
                )

    @functools.cached_property
    def arch(self) -> ArchSpec:
        """By the names of its layers.

        Raises:
            ValueError: it is none that we know.
        """
        found = {arch: _likeness(arch, self) for arch in ARCHS if arch.releases}
        best = max(found, key=lambda arch: found[arch])
        if not found[best][0]:
            raise ValueError(
                f"{self.path} has not the layers of an architecture that is known here: give --model with the name of "
                "its model, if it is a variant of one"
            )
        return best

    def layers(self, part: Part) -> dict[str, tuple[str, Weight]]:
        """Saved name -> (trainer's dotted name, weight) of every layer of a part, and of what else there is under names
        of its own."""
        found: dict[str, tuple[str, Weight]] = {}
        for where, checkpoint in self.files:
            if where in ("", part.prefix, part.diffusers):
                for name, (dotted, target) in weight_names.layers(checkpoint.shapes, part).items():
                    found.setdefault(name, (dotted, Weight(checkpoint, target)))
        return found


def _opened(path: File) -> Iterator[tuple[str, Checkpoint]]:
    """(what says which part it is: a prefix of saved names, a component's name; "" = its keys, checkpoint) of all."""
    prefix, file = divided(path)
    if not (file / "model_index.json").is_file():
        yield prefix, Checkpoint(file)
        return
    parts = [name for name in (*DENOISERS, *ENCODERS) if any((file / name).glob("*.safetensors"))]
    if not parts:
        raise ValueError(
            f"{file} is a pipeline without .safetensors files of {', '.join(DENOISERS)}: download it whole"
        )
    for name in parts:
        yield name, Checkpoint(file / name)


def kind_of(name: str) -> str:
    """Of a saved name: without its numbers."""
    return _NUMBER.sub("#", name)


@functools.cache
def some_layers(part: Part, outline: str) -> Mapping[str, bool]:
    """Saved name -> whether it is trained by default, of the layers of a released model that have a form in adapter
    files: Linears, convolutions and normalisation layers. Of blocks which are all alike the first alone."""
    layers = candidates(part, recorded(outline, short=True), norms=True)
    held = (one for one in layers if next(one.bases[0][0].parameters(), None) is not None)
    return {one.saved_name: one.default for one in held}


@functools.cache
def kinds(arch: ArchSpec) -> Mapping[Part, Mapping[str, bool]]:
    """Part -> kind of such a layer -> the same, over all releases."""
    found: dict[Part, dict[str, bool]] = {part: {} for part in arch.parts}
    for release in arch.releases:
        outlines = [
            *zip(arch.text_encoders, release.text_encoders, strict=False),
            (arch.denoiser, release),
        ]
        for part, one in outlines:
            layers = some_layers(part, one.name) if one else {}
            found[part] |= {kind_of(name): trained for name, trained in layers.items()}
    return found


def _likeness(arch: ArchSpec, model: Model) -> tuple[float, float]:
    """Share of an architecture's kinds of layers that a model has, weighted by how many of its tensors are of them, and
    share of its very layers; without a denoiser those of its text encoders. 0 = too few."""
    return max((_share(model.layers(part), names) for part, names in _released(arch, model)), default=(0.0, 0.0))


def _released(arch: ArchSpec, model: Model) -> list[tuple[Part, Iterable[str]]]:
    """(part, names of layers) of the released models, of the parts that a model may have."""
    encoders = [part for part in arch.text_encoders if any(where == part.prefix for where, _ in model.files)]
    if not encoders or len(encoders) < len(model.files):
        return [(arch.denoiser, some_layers(arch.denoiser, release.name)) for release in arch.releases]
    pairs = [zip(arch.text_encoders, release.text_encoders, strict=False) for release in arch.releases]
    return [(part, some_layers(part, one.name)) for pair in pairs for part, one in pair if one and part in encoders]


def _share(layers: Mapping[str, tuple[str, Weight]], names: Iterable[str]) -> tuple[float, float]:
    """`_likeness` of one part to one with layers of these names."""
    wanted = {*names}
    own = {kind_of(name) for name in wanted}
    known = {name: weight for name, (_, weight) in layers.items() if kind_of(name) in own}
    keys = {key for weight in known.values() for key in weight.target.keys}
    share = len({*map(kind_of, known)}) / len(own)
    return (share * len(keys), len(layers.keys() & wanted) / len(wanted)) if share > _ENOUGH else (0.0, 0.0)


@dataclass(frozen=True)
class Pair:
    """One layer in both models.

    Attributes:
        part: of the architecture.
        name, trainer_name: saved and dotted.
        tuned, base: its weights.
        trained: whether a training takes it by default; None = its kind has no form in adapter files.
    """

    part: Part
    name: str
    trainer_name: str
    tuned: Weight
    base: Weight
    trained: bool | None


class Compared:
    """What two models have in common.

    Args:
        tuned, base: the models.
        model: what they are, where their names leave that open: as for `models.skeleton`.

    Raises:
        ValueError: they are two models, or stored in a form that is not read.
    """

    def __init__(self, tuned: Model, base: Model, model: str = "") -> None:
        self.tuned, self.base = tuned, base
        self.arch = detect(skeleton(model).unet) if model else self._arch()
        self.pairs: list[Pair] = []
        self.others: list[Pair] = []  # of kinds without a form
        self._used: set[tuple[Path, str]] = set()
        for part in self.arch.parts:
            self._pair(part)
        for part in reversed(self.arch.parts):
            self._pair_others(part)
        if not self.pairs:
            raise ValueError(
                f"{tuned.path} and {base.path} have no layer of {self.arch.title} in common: give the checkpoint that "
                "the other one was tuned from"
            )
        for one in (tuned, base):
            self._check(one)

    def _arch(self) -> ArchSpec:
        first, second = self.tuned.arch, self.base.arch
        if first is not second:
            raise ValueError(
                f"{self.tuned.path} is {first.title}, {self.base.path} is {second.title}: give the model that it was "
                "tuned from"
            )
        return first

    def _pair(self, part: Part) -> None:
        """All layers of a part that both have."""
        known, tuned, base = (
            kinds(self.arch)[part],
            self.tuned.layers(part),
            self.base.layers(part),
        )
        first, second = ({name for name in one if kind_of(name) in known} for one in (tuned, base))
        if not first or not second:
            if part is self.arch.denoiser and (first or second):
                lacking = self.base if first else self.tuned
                raise ValueError(
                    f"{lacking.path} has no layers of the {part.name} of {self.arch.title}: give that file"
                )
            return
        self._check_names(first, second)
        self._check_shapes(tuned, base, first)
        for name in (name for name in tuned if name in first):
            pair = Pair(
                part,
                name,
                tuned[name][0],
                tuned[name][1],
                base[name][1],
                known[kind_of(name)],
            )
            self.pairs.append(pair)
            self._used |= _keys(pair)

    def _pair_others(self, part: Part) -> None:
        """What else both have under one saved name."""
        tuned, base = self.tuned.layers(part), self.base.layers(part)
        roots = {_root(part, pair.tuned) for pair in self.pairs if pair.part is part}
        for name in (name for name in tuned if name in base):
            pair = Pair(part, name, tuned[name][0], tuned[name][1], base[name][1], None)
            if pair.tuned.shape != pair.base.shape or _keys(pair) & self._used:
                continue
            if _root(part, pair.tuned) in roots and _is_layer(pair.tuned):
                pair = replace(pair, trained=False)
            (self.others if pair.trained is None else self.pairs).append(pair)
            self._used |= _keys(pair)

    def _check_names(self, first: set[str], second: set[str]) -> None:
        for names, others, lacking, has in (
            (first, second, self.base, self.tuned), (second, first, self.tuned, self.base)
        ):  # fmt: skip
            missing = sorted(names - others)
            if missing:
                raise ValueError(
                    f"{lacking.path} lacks {len(missing)} of the {len(names)} layers of {has.path}, e.g. {missing[0]}"
                    f"{nearest(missing[0], others - names, '; the nearest that it has is {}')}: give the model that it "
                    "was tuned from"
                )

    def _check_shapes(
        self,
        tuned: Mapping[str, tuple[str, Weight]],
        base: Mapping[str, tuple[str, Weight]],
        names: set[str],
    ) -> None:
        differing = [name for name in sorted(names) if tuned[name][1].shape != base[name][1].shape]
        if differing:
            one = differing[0]
            raise ValueError(
                f"{len(differing)} of {len(names)} layers have another shape, e.g. {one}: {tuned[one][1].shape} in "
                f"{self.tuned.path}, {base[one][1].shape} in {self.base.path}: give the model that it was tuned from"
            )

    def _check(self, model: Model) -> None:
        """Whether all weights are stored in a form that is read."""
        weights = [one.tuned if model is self.tuned else one.base for one in (*self.pairs, *self.others)]
        for _, checkpoint in model.files:
            keys = [key for one in weights if one.checkpoint is checkpoint for key in one.target.keys]
            stored.check(
                checkpoint,
                keys,
                "cannot be read",
                "give the checkpoint in bf16, fp16 or scaled fp8",
            )

    def rest(self) -> tuple[list[tuple[Checkpoint, Checkpoint, str]], list[str]]:
        """(tuned, base, key) of all tensors under one key in both which are no weight or bias of a layer; and the keys
        of the tuned model that have no counterpart."""
        both, alone = list[tuple[Checkpoint, Checkpoint, str]](), list[str]()
        for where, checkpoint in self.tuned.files:
            for key in checkpoint.shapes:
                if (checkpoint.path, key) in self._used or stored.is_of_storage(key):
                    continue
                others = (c for there, c in self.base.files if there == where or "" in (there, where))
                other = next((c for c in others if key in c.shapes), None)
                if other is None:
                    alone.append(key)
                else:
                    both.append((checkpoint, other, key))
        return both, alone


def _root(part: Part, weight: Weight) -> str:
    """What stands before its name in the keys of its checkpoint."""
    key = weight.target.keys[0]
    if key.startswith((*weight_names.OTHERS, *_APART)):
        return "-"
    return next(root for root in sorted(part.roots, key=len, reverse=True) if key.startswith(root))


def _is_layer(weight: Weight) -> bool:
    """Whether it is a Linear or a convolution for sure, though no release has one there: embeddings have no bias."""
    return len(weight.shape) > 3 or (len(weight.shape) > 1 and bool(weight.bias_keys))


def _keys(pair: Pair) -> set[tuple[Path, str]]:
    """Of its tensors in both models: weights, and the biases of a layer that has a form."""
    return {
        (one.checkpoint.path, key)
        for one in (pair.tuned, pair.base)
        for key in (*one.target.keys, *(() if pair.trained is None else one.bias_keys))
    }
