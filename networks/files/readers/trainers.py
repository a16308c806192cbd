"""What the models of the two trainers share: layers under their own flat names, in a few forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ...archs.spec import ArchSpec
from .. import dotted
from ..codec import SavedLayer
from ..merge import merged_weight
from .contract import Fate, Given, Reading


@dataclass(frozen=True)
class Form:
    """A form of layer that a program computes.

    Attributes:
        title: for people.
        marks: text in the first key that says so of a whole file.
        needs: one of these sets of suffixes makes a layer one of this form.
        reads: all suffixes which are then taken up.
    """

    title: str
    marks: str
    needs: tuple[frozenset[str], ...]
    reads: frozenset[str]


LORA = Form(
    "LoRA",
    "lora_down",
    (frozenset({"lora_down.weight", "lora_up.weight"}),),
    frozenset({"lora_down.weight", "lora_up.weight", dotted.ALPHA}),
)
LOHA = Form(
    "LoHa",
    "hada_w1_a",
    (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", dotted.ALPHA}),
)
LOKR = Form(
    "LoKr with a whole first factor",
    "lokr_w1",
    (frozenset({"lokr_w1", "lokr_w2"}), frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"})),
    frozenset({"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", dotted.ALPHA}),
)


@dataclass(frozen=True)
class Route:
    """One way in which a trainer takes a file to a model.

    Attributes:
        forms: which it computes.
        alpha: it raises for a LoRA layer without one.
        strict: it raises for every key that is none of its own.
        nothing: its words where it knows no layer of a file; "" = it says nothing.
        one_form: the first key that shows a form decides for the whole file.
        outside: whether it finds layers outside the containers that the trainer trains.
        scale: (layer, its weight) -> by how much its strength is off; 1 = not.
        notes: what a user should know.
    """

    forms: tuple[Form, ...] = (LORA,)
    alpha: bool = False
    strict: bool = False
    nothing: str = ""
    one_form: bool = False
    outside: bool = True
    scale: Callable[[SavedLayer, tuple[int, ...]], float] | None = None
    notes: tuple[str, ...] = ()

    def form_of(self, keys: Iterable[str]) -> tuple[Form, ...]:
        """Which forms it looks for in a file."""
        if not self.one_form:
            return self.forms
        shown = (form for key in keys for form in self.forms if form.marks in key)
        return (next(shown, self.forms[0]),)


@dataclass(frozen=True)
class Trainer:
    """A reader: a route for each architecture, None for the others."""

    name: str
    title: str
    order: int
    routes: Mapping[str, Route]
    unasked: bool = True

    def read(self, given: Given) -> Reading | None:
        route = self.routes.get(given.arch.name)
        if route is None:
            return None
        suffixes, forms = suffixes_of(given), route.form_of(given.tensors)
        shapes = _shapes(given)
        fates = {
            name: _fate(name, saved, suffixes[name], route, forms, given, shapes) for name, saved in given.meant.items()
        }
        refused = _refusal(fates, suffixes, route)
        return Reading(fates, refused, route.notes)


def suffixes_of(given: Given) -> dict[str, set[str]]:
    """Layer of the file -> the suffixes under which it has values, as they stand there."""
    found: dict[str, set[str]] = {name: set() for name in given.meant}
    for key in given.tensors:
        parts = key.split(".")
        for i in range(len(parts) - 1, 0, -1):
            name = ".".join(parts[:i])
            if name in found:
                found[name].add(".".join(parts[i:]))
                break
    return found


def saved_names(arch: ArchSpec, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, tuple[str, str]]:
    """Saved name -> (part, trainer's dotted name)."""
    return {
        f"{part.prefix}_{name}".replace(".", "_"): (part.name, name)
        for part in arch.parts
        for name in shapes.get(part.name, {})
    }


def _shapes(given: Given) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Saved name -> (trainer's dotted name, shape)."""
    names = saved_names(given.arch, given.shapes)
    return {saved: (name, given.shapes[part][name]) for saved, (part, name) in names.items()}


def _fate(
    name: str,
    saved: SavedLayer,
    suffixes: set[str],
    route: Route,
    forms: tuple[Form, ...],
    given: Given,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Fate:
    """What becomes of one layer.

    Args:
        name: as it stands in the file.
        forms: which are looked for in this file.
        shapes: saved name -> trainer's dotted name and shape of the layers of the model.
    """
    if name not in shapes:
        return Fate(False, "it knows no layer of this name", (1.0, 1.0))
    layer, shape = shapes[name]
    if not route.outside and given.arch.extra_of(layer) is not None:
        return Fate(False, "it looks at the layers of blocks alone", (1.0, 1.0))
    form = next((form for form in forms if any(needs <= suffixes for needs in form.needs)), None)
    if form is None:
        return Fate(False, f"it reads {' and '.join(one.title for one in forms)} alone", (1.0, 1.0))
    off = route.scale(saved, shape) if route.scale else 1.0
    base = given.base(name) if given.base else None
    return _of_form(saved, suffixes - form.reads, base, off)


def _of_form(saved: SavedLayer, unread: set[str], base: Tensor | None, scale: float) -> Fate:
    if saved.magnitude is not None:
        return Fate(True, "its magnitudes are not read: it acts as plain factors", off(saved, base, plain, scale))
    if "lora_mid.weight" in unread:
        reason = "the kernel between its factors is not read"
        return Fate(True, reason, off(saved, base, _without_kernel, scale))
    if abs(scale - 1) > 1e-6:
        return Fate(True, "its strength is read otherwise", (abs(scale - 1),) * 2)
    if saved.bias_change is not None:
        return Fate(True, "its change of the bias is not read")
    return Fate()


Change = Callable[[SavedLayer, Tensor], Tensor]


def off(
    saved: SavedLayer, base: Tensor | None, change: Change, scale: float = 1.0
) -> tuple[float | None, float | None]:
    """The error of a change of the weight that is in proportion to the strength, as `Fate.errors`.

    Args:
        base: weight; None = not known.
        change: what is added in place of what is meant.
        scale: by which it is multiplied.
    """
    if base is None or any(tensor.is_meta for tensor in saved.tensors.values()):
        return None, None
    wide = base.double()
    wanted = merged_weight(saved, wide, bias_too=True) - wide
    error = float((scale * change(saved, wide) - wanted).norm() / wanted.norm())
    return error, error


def plain(saved: SavedLayer, base: Tensor) -> Tensor:
    """The change without magnitudes."""
    return merged_weight(replace(saved, magnitude=None, folded=False), base, bias_too=True) - base


def _without_kernel(saved: SavedLayer, base: Tensor) -> Tensor:
    """up . down at every place of the kernel."""
    up, down = (saved.tensors[f"lora_{name}.weight"].to(base).flatten(1) for name in ("up", "down"))
    change = (up @ down) * saved.scale
    return change.reshape(*change.shape, *[1] * (base.dim() - 2)).expand_as(base)


def _refusal(fates: Mapping[str, Fate], suffixes: Mapping[str, set[str]], route: Route) -> str:
    """The trainer's own words where it takes nothing of a file."""
    if route.alpha and any("lora_down.weight" in own and dotted.ALPHA not in own for own in suffixes.values()):
        return "KeyError"
    if route.nothing and not any(fate.loaded for fate in fates.values()):
        return route.nothing
    own = LORA.reads
    if route.strict and any(not fate.loaded or suffixes[name] - own for name, fate in fates.items()):
        return "Unexpected key(s) in state_dict"
    return ""
