"""Why a layer is trained or not: every reason is one rule, and the rules are asked in this order.

What was left out can be taken in again by a later rule of ADMISSION, or by FILE; of CHOICE the first reason holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..algos import ALGOS
from ..args.expressions import quoted
from ..tensors.geometry import Geometry
from ..tensors.norms import NormGeometry
from . import values
from .call import By, Call
from .walk import Candidate


@dataclass(frozen=True)
class Word:
    """What a rule says of a layer.

    Attributes:
        out: why it is left out; "" = it is not.
        takes_in: it is trained although an earlier rule left it out.
        instead: the reason counts in place of an earlier one.
        by: the argument that decides it.
        note: why it may stay, where that is worth a word.
    """

    out: str = ""
    takes_in: bool = False
    instead: bool = False
    by: By | None = None
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """One reason.

    Attributes:
        name: as documentation and `plan.why` call it: the arguments that it goes by, where it has some.
        ask: its word on a layer; None = nothing against it.
    """

    name: str
    ask: Callable[[Candidate, Call], Word | None]

    @property
    def sentence(self) -> str:
        """What it means, for documentation."""
        return " ".join((inspect.getdoc(self.ask) or "").split())


@dataclass(frozen=True)
class Verdict:
    """What all rules together say of a layer.

    Attributes:
        reason: why it is left out; "" if it is trained.
        by: arguments that decided so.
        admitted: whether the rules of ADMISSION let it in.
    """

    reason: str
    by: frozenset[By]
    admitted: bool


def decide(c: Candidate, call: Call) -> Verdict:
    """Ask the rules in order, as far as one can still change something."""
    first = _fold(Verdict("", frozenset(), True), (rule.ask(c, call) for rule in ADMISSION))
    last = _fold(first, [FILE.ask(c, call)])
    for rule in CHOICE:
        if last.reason:
            break
        last = _fold(last, [rule.ask(c, call)])
    return Verdict(last.reason, last.by, not first.reason)


def _fold(so_far: Verdict, words: Iterable[Word | None]) -> Verdict:
    reason, by = so_far.reason, so_far.by
    for word in filter(None, words):
        own = frozenset([word.by] if word.by else ())
        if word.out and (word.instead or not reason):
            reason, by = word.out, own
        elif word.takes_in:
            reason, by = "", own
        elif not word.out and not reason:
            by |= own
    return Verdict(reason, by, so_far.admitted)


# -- which layers can be trained


def _part(c: Candidate, call: Call) -> Word | None:
    """A model that is trained on request alone waits for its argument."""
    return Word(f"give {c.part.argument}=True to train it") if call.is_off(c) else None


def _containers(c: Candidate, call: Call) -> Word | None:
    """Layers in the blocks which the architecture's record names are trained; some others have an argument for it."""
    if call.is_inside(c):
        return None
    if c.switches:
        return Word(f"give {c.switches[0]}=True to train it")
    if c.in_convolutional_block:
        return None
    extra = call.extra_of(c)
    if extra is not None:
        return Word(f"give {extra[0]} to train it")
    on = tuple(name for argument, more in c.part.optional if call.is_on(argument) for name in more)
    return Word(f"outside {', '.join((*c.containers, *on, *c.part.conv_containers))}")


def _preset_targets(c: Candidate, call: Call) -> Word | None:
    """A preset takes in the classes and layers that it names, and leaves out all others."""
    if call.is_off(c) or not call.preset.speaks:
        return None
    named = call.preset.names_it(c)
    if not named and not (call.preset.wants_own(c) and _containers(c, call) is None):
        return Word(f"not in the preset {call.preset.title}")
    if call.preset.restricts(c):
        return Word(f"not in the preset {call.preset.title}", instead=True)
    return Word(takes_in=True, by=("preset", "")) if named else None


def _convolutions(c: Candidate, call: Call) -> Word | None:
    """Kernels above 1x1, and all layers of convolutional blocks, need a dim for such kernels."""
    kernel, block = c.geometry.has_kernel, c.in_convolutional_block and not call.is_inside(c)
    if not kernel and not block or call.preset.has_dim_of_its_own(c):
        return None
    if call.preset.off:
        return Word("the preset has enable_conv = false")
    if call.conv_argument or call.saved is not None:
        return Word(by=(call.conv_argument, "")) if call.conv_argument else None
    return Word(f"{'in a convolutional block' if block else 'kernel above 1x1'}: give conv_dim to train it")


def _preset_excludes(c: Candidate, call: Call) -> Word | None:
    """What a preset excludes is left out, whatever else it says."""
    pattern = None if call.is_off(c) else call.preset.excludes(c)
    return None if pattern is None else Word(f"excluded by the preset: {quoted(pattern)}", instead=True)


def _extras(c: Candidate, call: Call) -> Word | None:
    """Layers outside the blocks are taken in by the argument that has a dim for them."""
    extra = call.extra_of(c)
    return Word(takes_in=True, by=(extra[0], "")) if extra is not None and call.extra_dim(*extra) else None


def _algorithm(c: Candidate, call: Call) -> Word | None:
    """An algorithm is for one kind of layers: for normalisation layers, or for all the others."""
    own, norm = ALGOS[call.preset.args(c).algo], c.geometry.family == NormGeometry.family
    if call.saved is not None or own.spec.family == c.geometry.family or (norm and call.args.train_norm != "false"):
        return None
    return Word("give train_norm=True to train it" if norm else f"{own.spec.name} is for normalisation layers alone")


def _norms(c: Candidate, call: Call) -> Word | None:
    """A normalisation layer needs a formula that is known, and under train_norm=affine a weight of its own."""
    g = c.geometry
    if not isinstance(g, NormGeometry):
        return None
    if g.unfit:
        return Word(g.unfit, instead=True)
    if not g.affine and call.args.train_norm == "affine" and call.saved is None:
        return Word("has no weight of its own (train_norm=affine)", by=("train_norm", ""))
    return None


# -- which of them are


def _file(c: Candidate, call: Call) -> Word | None:
    """Where a file decides, its layers are trained and no others."""
    if call.saved is None:
        return None
    return Word("not in the file") if call.saved_layer(c) is None else Word(takes_in=True)


def _exclude(c: Candidate, call: Call) -> Word | None:
    """Layers that match one of exclude_patterns are left out, unless one of include_patterns matches, too."""
    pattern = call.exclude.first(c)
    if pattern is None:
        return None
    return _kept(c, call, pattern) or Word(f"excluded by {quoted(pattern)}", by=("exclude_patterns", pattern))


def _record(c: Candidate, call: Call) -> Word | None:
    """So are those that the architecture leaves out by default or by a switch such as exclude_mod."""
    patterns = call.by_record if c.geometry.family == Geometry.family else call.by_switch
    pattern = (patterns if call.saved is None else call.switched_off).first(c)
    if pattern is None:
        return None
    by = next(((switch.argument, "") for switch in call.arch.switches if switch.regex == pattern), None)
    return _kept(c, call, pattern) or Word(call.left_out[pattern], by=by)


def _kept(c: Candidate, call: Call, pattern: str) -> Word | None:
    rescue = call.include.first(c)
    if rescue is None:
        return None
    return Word(
        by=("include_patterns", rescue), note=f"{quoted(pattern)} matches, include_patterns {quoted(rescue)} keeps it"
    )


def _only(c: Candidate, call: Call) -> Word | None:
    """Where only_patterns are given, a layer must match one of them."""
    if not call.only or call.only.first(c):
        return None
    return Word("not in only_patterns", by=("only_patterns", ""))


def _blocks(c: Candidate, call: Call) -> Word | None:
    """Layers of the denoiser must be in the blocks that are chosen by number or kind, if any are."""
    if not call.of_denoiser(c) or call.extra_of(c) is not None:
        return None
    argument, reason = call.blocks.left_out(c.trainer_name)
    return Word(reason, by=(argument, "")) if argument else None


def _dim(c: Candidate, call: Call) -> Word | None:
    """A layer whose dim comes out as 0 is left out."""
    if call.saved is not None:
        return None
    found = values.first(values.DIM, c, call)
    return Word("dim 0", by=found.by) if found.value == 0 else None


def _rate(c: Candidate, call: Call) -> Word | None:
    """So is one whose block has the factor 0 on the learning rate."""
    if call.saved is not None or values.first(values.FACTOR, c, call).value != 0:
        return None
    return Word("its block has the learning rate factor 0")


ADMISSION = (
    Rule("part", _part),
    Rule("containers", _containers),
    Rule("preset", _preset_targets),
    Rule("conv_dim", _convolutions),
    Rule("preset, exclude_name", _preset_excludes),
    Rule("layers outside the blocks", _extras),
    Rule("algo, train_norm", _algorithm),
    Rule("normalisation", _norms),
)
FILE = Rule("file", _file)
CHOICE = (
    Rule("exclude_patterns, include_patterns", _exclude),
    Rule("default excludes, include_patterns", _record),
    Rule("only_patterns", _only),
    Rule("blocks, train_blocks, indices", _blocks),
    Rule("dim", _dim),
    Rule("learning rate", _rate),
)
RULES = (*ADMISSION, FILE, *CHOICE)
