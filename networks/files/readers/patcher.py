"""Loaders like ComfyUI's: a table of names for the model at hand, and patches of what a file has under them.

A patch changes rows of a weight. What stands under another name, or in a form that the program does not know, is left
out with a line in its log. Which names and forms those are stands in the module of each program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...archs.places import COMFYUI, DIFFUSERS, own_layers, places
from ...archs.spec import Part
from ...records.boft import BOFT
from ...records.glora import GLORA
from ...records.lokr import LOKR
from ...records.oft import BLOCKS, DIAG_OFT, RESCALE
from ...tensors.rotation import butterfly_chain, rotation_less_identity
from .. import dotted
from ..codec import SavedLayer
from ..merge import merged_weight
from .contract import STRENGTHS, Fate, Given, Reading

ROUNDED = 1e-5  # an error that is none
PROBE = 64  # columns that stand for those of the base weight
OWN = "own"  # names of that program's own classes; the others are DIFFUSERS
PATHS = ("lora_unet_", "diffusion_model.")  # what stands before ComfyUI's own names


def _spelt(form: str, name: str) -> str:
    """A dotted name behind what stands before it: flat, unless that is nothing or ends with a dot."""
    return form + (name if form[-1:] in ("", ".") else name.replace(".", "_"))


@dataclass(frozen=True)
class Names:
    """Names under which it knows the layers of a denoiser.

    Attributes:
        forms: what stands before them.
        layout: whose names they are.
        only: regular expression on the dotted name; "" = all layers.
        change: (regular expression, what stands for it) in the dotted name.
    """

    forms: tuple[str, ...]
    layout: str = OWN
    only: str = ""
    change: tuple[tuple[str, str], ...] = ()

    def of(self, name: str) -> Iterator[str]:
        """All spellings of a name of the layout."""
        if self.only and not re.fullmatch(self.only, name):
            return
        for old, new in self.change:
            name = re.sub(old, new, name)
        yield from (_spelt(form, name) for form in self.forms)


@dataclass(frozen=True)
class Encoder:
    """A text encoder.

    Attributes:
        root: what stands before the trainer's names in that program, where files may have it, too.
        forms: what else stands before them in files.
        only: regular expression on the names which have those forms; "" = all.
    """

    root: str
    forms: tuple[str, ...]
    only: str = ""

    def of(self, name: str) -> Iterator[str]:
        """All spellings of a trainer's name."""
        if self.root:
            yield f"text_encoders.{self.root}{name}"
        if self.root and not self.root.startswith("clip_"):
            yield f"text_encoders.{self.root.partition('.')[2]}{name}"
        if not self.only or re.fullmatch(self.only, name):
            yield from (_spelt(form, name) for form in self.forms)


@dataclass(frozen=True)
class Slot:
    """Rows of a weight of the model.

    Attributes:
        path: of the weight.
        sources: (saved name, number of rows) of the trainer's layers which it holds, in the order of its rows.
        shape: of these rows.
        start: the first of them.
        whole: they are all of its rows.
        swapped: the halves of an update change places on the way.
    """

    path: str
    sources: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    start: int = 0
    whole: bool = True
    swapped: bool = False

    def weight(self, given: Given) -> Tensor | None:
        """These rows of the base weight, in fp32 or wider; None if it is not known."""
        if given.base is None:
            return None
        found, at, stop = list[Tensor](), 0, self.start + self.shape[0]
        for name, size in self.sources:
            if at < stop and self.start < at + size:
                found.append(given.base(name)[max(self.start - at, 0) : stop - at])
            at += size
        rows = torch.cat(found)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass(frozen=True)
class Model:
    """An architecture, as such a program knows it.

    Attributes:
        names: of the denoiser.
        encoders: in the order of the architecture's text encoders; None = it has none there.
        hidden: regular expression on its own names: their tensors are not called weight, and no file can name them.
        paths: what stands before its own names of layers, in any case.
    """

    names: tuple[Names, ...] = ()
    encoders: tuple[Encoder | None, ...] = ()
    hidden: str = ""
    paths: tuple[str, ...] = PATHS


def slots(given: Given, model: Model) -> dict[str, Slot]:
    """All names under which a program knows layers of this model."""
    arch, found = given.arch, dict[str, Slot]()
    encoders = ((part, one) for part, one in zip(arch.text_encoders, model.encoders, strict=False) if one)
    for part, encoder in encoders:
        for name, shape in given.shapes.get(part.name, {}).items():
            slot = Slot(f"{encoder.root}{name}", ((_saved(part, name), shape[0]),), shape)
            found |= dict.fromkeys(encoder.of(name), slot)
    for path, layers in _weights(given, model).items():
        shape = (sum(shape[0] for _, shape in layers), *layers[0][1][1:])
        whole = Slot(path, tuple((_saved(arch.denoiser, name), shape[0]) for name, shape in layers), shape)
        every = (Names(model.paths), *model.names)
        pieces = [*_pieces(given, whole, layers)] if any(names.layout == DIFFUSERS for names in every) else []
        for names in every:
            for name, slot in pieces if names.layout == DIFFUSERS else [(path, whole)]:
                found |= dict.fromkeys(names.of(name), slot)
    return found


def _saved(part: Part, trainer_name: str) -> str:
    return f"{part.prefix}_{trainer_name}".replace(".", "_")


_Layers = list[tuple[str, tuple[int, ...]]]  # trainer's dotted names and shapes, in the order of the rows


def _weights(given: Given, model: Model) -> dict[str, _Layers]:
    """Its own name of every weight of the denoiser that the trainer has, too -> the layers which it holds."""
    part = given.arch.denoiser
    part = replace(part, comfyui=part.comfyui or part.release)
    found: dict[str, dict[int, tuple[str, tuple[int, ...]]]] = {}
    for name, shape in given.shapes.get(part.name, {}).items():
        layer = own_layers(part, name, COMFYUI)[0]
        if not model.hidden or not re.fullmatch(model.hidden, layer.own):
            found.setdefault(layer.own, {})[layer.piece] = name, shape
    return {path: [pieces[i] for i in sorted(pieces)] for path, pieces in found.items()}


def _pieces(given: Given, whole: Slot, layers: _Layers) -> Iterator[tuple[str, Slot]]:
    """diffusers' names of a weight's rows."""
    part, start = given.arch.denoiser, 0
    for name, shape in layers:
        for place in places(given.arch, part, name, shape[0], shape[1] if len(shape) > 1 else shape[0]):
            rows = place.stop - place.start
            yield (
                place.path.removeprefix(f"{part.diffusers}."),
                replace(
                    whole,
                    shape=(rows, *shape[1:]),
                    start=start + place.start,
                    whole=rows == whole.shape[0],
                    swapped=place.swapped,
                ),
            )
        start += shape[0]


# -- what it makes of a layer

FACTORS = (
    frozenset({f"{pair}{end}.weight" for pair in ("lora_", "lora.", "lora_linear_layer.") for end in ("up", "down")})
    | {f"lora_{letter}{more}" for letter in "AB" for more in ("", ".weight", ".default.weight")}
    | {"lora_mid.weight", "reshape_weight"}
    | {f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    | {f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    | {f"{name}.weight" for name in ("a1", "a2", "b1", "b2")}
    | {"w_norm", "b_norm", "diff", "diff_b", "set_weight"}
)
ROTATIONS = frozenset({BLOCKS, RESCALE})
BESIDE = frozenset({dotted.ALPHA, dotted.MAGNITUDE})  # what changes nothing by itself

Errors = tuple[float | None, float | None]
UNKNOWN: Errors = (None, None)


@dataclass(frozen=True)
class Layer:
    """A layer of a file, as it meets a program.

    Attributes:
        saved: as it is meant.
        slot: rows of the model which it changes.
        alpha: in the file; None without one, or on the meta device.
        read, unread: suffixes in the file which the program knows, and does not.
    """

    saved: SavedLayer
    slot: Slot
    alpha: float | None
    read: frozenset[str]
    unread: frozenset[str]

    @property
    def algo(self) -> str:
        return self.saved.algorithm.spec.name

    @property
    def kernel(self) -> int:
        """How many dimensions it has."""
        return len(self.slot.shape) - 2

    @property
    def limited(self) -> bool:
        return bool(self.saved.alpha) or RESCALE in self.saved.tensors

    @property
    def by_rows(self) -> bool:
        """Whether it has a magnitude of output rows, as it acts."""
        magnitude = self.saved.magnitude
        return magnitude is not None and not self.saved.folded and magnitude.shape[0] == self.slot.shape[0]

    @property
    def fits(self) -> bool:
        """Whether its magnitude can be multiplied with the weight, as it stands."""
        if self.saved.magnitude is None:
            return True
        shape, weight = tuple(self.saved.magnitude.shape), self.slot.shape
        padded = (1,) * (len(weight) - len(shape)) + shape
        return all(mine in (1, size) for mine, size in zip(padded, weight, strict=False)) and len(padded) == len(weight)

    @property
    def strength(self) -> float:
        """At which its alpha is taken, in units of what is meant."""
        rank = self.saved.algorithm.spec.shown_rank(self.saved.tensors)
        if self.alpha is None or not rank:
            return 1.0
        return self.alpha / rank / self.saved.scale

    def has(self, *suffixes: str) -> bool:
        return not self.saved.tensors.keys().isdisjoint(suffixes)


@dataclass(frozen=True)
class Form:
    """Layers which are not read exactly.

    Attributes:
        reason: in a few words.
        when: which they are.
        weight: what becomes of their weight, from the base weight and the strength; None = not known.
        errors: where `weight` needs values that are not known.
        probe: random columns will do for the base weight.
        loaded: whether they change the model at all.
        stops: the program stops with an error.
    """

    reason: str
    when: Callable[[Layer], bool]
    weight: Callable[[Layer, Tensor, float], Tensor] | None = None
    errors: Callable[[Layer], Errors] = lambda layer: UNKNOWN
    probe: bool = False
    loaded: bool = True
    stops: bool = False


def update(saved: SavedLayer, base: Tensor) -> Tensor:
    """The change of a layer's weight without its magnitude."""
    return merged_weight(replace(saved, magnitude=None, folded=False), base, bias_too=True) - base


def _without_magnitude(layer: Layer, base: Tensor, strength: float) -> Tensor:
    return base + strength * update(layer.saved, base)


def _by_norm_of_base(layer: Layer, base: Tensor, strength: float) -> Tensor:
    """m (W + dW) / ||W||, where ||W + dW|| is meant."""
    assert layer.saved.magnitude is not None
    rows = base.flatten(1).norm(dim=1).reshape(-1, *[1] * (base.dim() - 1))
    turned = (base + update(layer.saved, base)) * (layer.saved.magnitude.to(base) / rows)
    return base + strength * (turned - base)


def _turned_twice(layer: Layer, base: Tensor, strength: float) -> Tensor:
    """The strength is multiplied in twice, factors by row are not read, and a limit is the norm itself."""
    blocks = layer.saved.tensors[BLOCKS]
    own = replace(layer.saved, tensors={BLOCKS: blocks}, alpha=(layer.saved.alpha or 0.0) / len(base))
    return base + strength**2 * update(own, base)


def _stage_by_stage(layer: Layer, base: Tensor, strength: float) -> Tensor:
    """Every stage is at the strength, then their result once more, and a limit is the norm itself."""
    saved = layer.saved
    stages, _, size, _ = saved.tensors[BLOCKS].shape
    less = rotation_less_identity(saved.tensors[BLOCKS].flatten(0, 1), saved.alpha or 0.0).unflatten(0, (stages, -1))
    distances = tuple(2**i * (size // 2) for i in range(stages))
    turned = base + butterfly_chain(base, (strength * less).to(base.dtype), 0, distances)
    if RESCALE in saved.tensors:
        turned = turned * saved.tensors[RESCALE].to(base).reshape(-1, *[1] * (base.dim() - 1))
    return base + strength * (turned - base)


UNREAD = Form("it does not know this form", lambda layer: not layer.read - BESIDE, loaded=False)
STAYS = ", and the weight stays as it is"
UNREAD_MAGNITUDE = Form(
    "its magnitudes stand under a name which is not read, so that it acts as without",
    lambda layer: dotted.MAGNITUDE in {dotted.SUFFIXES.get(suffix, suffix) for suffix in layer.unread},
    _without_magnitude,
)
TUCKER = Form(
    "a Tucker form is for kernels of two dimensions alone",
    lambda layer: layer.kernel in (1, 3) and layer.has("lora_mid.weight", "hada_t1", "lokr_t2"),
    stops=True,
)
LOKR_TUCKER = Form(
    f"the Tucker form of LoKr is computed with an error{STAYS}", lambda layer: layer.has("lokr_t2"), loaded=False
)
MISFIT = Form(
    f"its magnitudes have another shape than its rows or columns{STAYS}", lambda layer: not layer.fits, loaded=False
)
SWAPPED = Form(
    "the halves of its rows change places after they are computed, which is wrong for what depends on the weight",
    lambda layer: layer.slot.swapped and (layer.by_rows or layer.saved.algorithm.spec.relative),
)
KERNEL = Form(
    "a whole second factor is joined in another order where the kernel has one or three dimensions",
    lambda layer: layer.algo == LOKR.name and layer.kernel in (1, 3) and layer.has("lokr_w2"),
)
DORA = Form(
    "DoRA on the output side: it divides by the norm of the base weight alone",
    lambda layer: layer.by_rows,
    _by_norm_of_base,
)
TURNS = (
    Form(
        f"without an alpha it is computed with an error{STAYS}",
        lambda layer: layer.algo == BOFT.name and layer.saved.alpha is None,
        loaded=False,
    ),
    Form(
        "it reads the limit of a rotation in other units, and no factors by row",
        lambda layer: layer.algo == DIAG_OFT.name and layer.limited,
        _turned_twice,
        probe=True,
    ),
    Form(
        "it reads the limit of a rotation in other units",
        lambda layer: layer.algo == BOFT.name and bool(layer.saved.alpha),
        _stage_by_stage,
        probe=True,
    ),
    Form(
        "it multiplies the strength into a rotation twice",
        lambda layer: layer.algo == DIAG_OFT.name,
        errors=lambda layer: (0.0, 1 - STRENGTHS[1]),
    ),
    Form(
        "it multiplies the strength into a rotation at every stage, and once more",
        lambda layer: layer.algo == BOFT.name,
        _stage_by_stage,
        errors=lambda layer: (0.0, None),
        probe=True,
    ),
)
SCALES = (
    Form("its alpha is read as 0", lambda layer: layer.strength == 0, loaded=False),
    Form(
        "its alpha is read as another strength",
        lambda layer: abs(layer.strength - 1) > ROUNDED,
        errors=lambda layer: (abs(layer.strength - 1),) * 2 if layer.saved.magnitude is None else UNKNOWN,
    ),
    Form(
        "where the rank is the width of a square layer it is taken for GLoRA of 2023",
        lambda layer: (
            layer.algo == GLORA.name and len({*layer.saved.tensors["a1.weight"].shape, *layer.slot.shape}) == 1
        ),
    ),
)
BIAS = Form(
    "its change of the bias is not read",
    lambda layer: layer.saved.bias_change is not None and not layer.slot.whole,
    errors=lambda layer: (0.0, 0.0),
)


@dataclass(frozen=True)
class Patcher:
    """A program with such a loader.

    Attributes:
        models: by the name of the architecture.
        suffixes: which it knows.
        forms: the first that holds of a layer says what becomes of it; exactly what is meant if none does.
        unmatched: keys that it may not know of a file which it still reads; None = any number.
    """

    name: str
    title: str
    order: int
    models: Mapping[str, Model]
    suffixes: frozenset[str]
    forms: tuple[Form, ...]
    unmatched: int | None = None
    unasked: bool = True

    def read(self, given: Given) -> Reading | None:
        model = self.models.get(given.arch.name)
        if model is None:
            return None
        known, suffixes = slots(given, model), _suffixes(given)
        layers = {name: self._layer(given, name, known[name], suffixes[name]) for name in given.meant if name in known}
        forms = {name: next((form for form in self.forms if form.when(one)), None) for name, one in layers.items()}
        fates = dict.fromkeys(given.meant, Fate(False, "it knows no layer of this name", UNKNOWN))
        fates |= {name: _fate(given, layers[name], form) for name, form in forms.items()}
        last = {layer.slot: name for name, layer in layers.items()}
        for name, layer in layers.items():
            if last[layer.slot] != name:
                fates[name] = Fate(False, f"{last[layer.slot]} takes its place", UNKNOWN)
        return Reading(fates, self._refusal({name: suffixes[name] - self.suffixes for name in layers}, suffixes, forms))

    def _refusal(
        self,
        unread: Mapping[str, frozenset[str]],
        suffixes: Mapping[str, frozenset[str]],
        forms: Mapping[str, Form | None],
    ) -> str:
        """Why nothing of a file acts; "" if it does.

        Args:
            unread: layer that it knows -> suffixes that it does not know.
            suffixes: of all layers of the file, and of other keys.
            forms: by the layer that it knows.
        """
        strange = [f"{name}.{end}" for name, own in suffixes.items() for end in unread.get(name, own)]
        if self.unmatched is not None and len(strange) > self.unmatched:
            return f"version mismatch ({len(strange)} keys have no place, e.g. {strange[0]})"
        return next((f"an error at {name}: {form.reason}" for name, form in forms.items() if form and form.stops), "")

    def _layer(self, given: Given, name: str, slot: Slot, suffixes: frozenset[str]) -> Layer:
        alpha = given.tensors.get(f"{name}.{dotted.ALPHA}")
        number = None if alpha is None or alpha.is_meta else float(alpha)
        return Layer(given.meant[name], slot, number, suffixes & self.suffixes, suffixes - self.suffixes)


def _suffixes(given: Given) -> dict[str, frozenset[str]]:
    """Layer of the file -> what stands behind its name; other keys by themselves."""
    found: dict[str, set[str]] = {name: set() for name in given.meant}
    for key in given.tensors:
        cuts = [at for at, letter in enumerate(key) if letter == "."]
        at = next((at for at in reversed(cuts) if key[:at] in found), len(key))
        found.setdefault(key[:at], set()).add(key[at + 1 :])
    return {name: frozenset(own) for name, own in found.items()}


def _fate(given: Given, layer: Layer, form: Form | None) -> Fate:
    return Fate(form.loaded, form.reason, _errors(form, layer, given)) if form else Fate()


def _errors(form: Form, layer: Layer, given: Given) -> Errors:
    """||W'_reader - W'|| / ||W' - W|| at each strength."""
    base = layer.slot.weight(given)
    if base is None and form.probe:
        base = torch.randn(layer.slot.shape[0], PROBE, generator=torch.Generator().manual_seed(0))
    if form.weight is None or base is None or any(t.is_meta for t in layer.saved.tensors.values()):
        return form.errors(layer)
    first, second = (_error(layer, base, form.weight(layer, base, strength), strength) for strength in STRENGTHS)
    return first, second


def _error(layer: Layer, base: Tensor, got: Tensor, strength: float) -> float:
    wanted = merged_weight(layer.saved, base, strength, bias_too=True)
    error = float((got - wanted).norm() / (wanted - base).norm().clamp_min(1e-30))
    return error if error > ROUNDED else 0.0
