"""The record of one algorithm: what all the rest must know of it without its mathematics."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .arg import Arg

BIAS = {"diff_b": "diff_b"}  # the change of the bias: of `keys`

# Arguments that the layer around an adapter obeys for every additive algorithm, unless its mathematics forbids one.
ADDITIVE = frozenset(
    {"use_dora", "wd_on_output", "dora_lr_ratio", "ggpo_sigma", "ggpo_beta", "bypass_mode", "init", "init_seed"}
)

OF_WEIGHT = ("pissa", "milora")  # of `init`: singular vectors of the base weight
NUMBER = "1"  # in `AlgoSpec.axes`, of a tensor that is one number
NO_KERNEL = "no trained layer has a low-rank kernel above 1x1; conv_dim trains convolutions"


@dataclass(frozen=True)
class FileKind:
    """A kind of layer in a file.

    Attributes:
        title: for people.
        marks: suffixes that a layer must have to be of this kind.
        constrained: only where alpha stands for a limit of the rotation and is not 0.
    """

    title: str
    marks: frozenset[str]
    constrained: bool = False


@dataclass(frozen=True)
class About:
    """What the documentation says of an algorithm beside its formula and shapes, which its file in `algos` has.

    Attributes:
        papers: (number at arXiv, title).
        scale: what multiplies the change of the weight, and what alpha is.
        use: when to use it, and when another one.
    """

    papers: tuple[tuple[str, str], ...] = ()
    scale: str = ""
    use: str = ""


ALPHA_OVER_RANK = "alpha / rank (`rs_lora=True`: alpha / sqrt(rank))"
NO_ALPHA = "1: alpha has no effect"
LYCORIS = ("2309.14859", "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation")


@dataclass(frozen=True)
class AlgoSpec:
    """An algorithm. Its class in `algos` takes this record as `spec`.

    Attributes:
        name: of `algo=`.
        keys: parameter -> suffix in a file.
        kinds: of layers in its files, the first whose marks a layer has; () = no other program reads them.
        order: its place in lists, and in the search for the algorithm of a file; those without one come last.
        family: of the layers that it is for, "matrix" (Linear, convolution) or "norm".
        options: names of the keyword options that the `layout` of its class takes.
        arguments: rows of the argument table for what no other algorithm had before: of `options` or of `features`.
        features: arguments which the layer around an adapter obeys where the mathematics allows it; split_qkv:
            adapters of the parts of a layer, stacked, are one of the same kind (`stack`).
        no_starts: ways to start (`init`) which it has not, and why.
        start_error: how far a layer may be from its base layer before the first step, relative to the largest value,
            in units of the rounding of its dtype; 0 = it is the base layer exactly.
        plus: parameters which LoRA+ (2402.12354) trains faster; none = it has no such pair.
        grows: parameters which are 0 in ranks that are added to a file, so that they change nothing and yet learn; none
            = it has no ranks.
        frozen: parameters without gradient and optimizer state; `values` of the class gives them detached.
        required: one of these sets of suffixes marks its files; () = all of `keys` together.
        more_keys: suffixes of what else its files can have.
        numbered: suffixes which stand with a number behind them for the parts of a layer.
        saved_as: the algorithm whose files these are, if it is not this one.
        fold: the first of these parameters that exists takes up the learnt scalar, or a scale without rank, at save.
        rank_shows: (suffix, axis): the first that a file has is the rank that alpha is divided by.
        bias_key: suffix of the change of the layer's bias, where a file can have one.
        axes: forms, each suffix -> a letter for every axis of its tensor. Equal letters of a layer are equal lengths, a
            small one may be 0; behind them axes of 1 may follow, those of a kernel with `*`. A form counts where a
            layer has all its tensors, and they are of no form before it.
        shifts: a new adapter changes the bias of a layer that has one; others do where a file says so.
        saves_alpha: whether readers expect one.
        alpha_option: the option which a file holds as alpha, where alpha is no strength.
        near_one: parameters that a file holds as factors near 1.
        unsaved: options that do not show in a file.
        peft_type: in PEFT's adapter_config.json, where its files cannot be read alike without.
        peft_keys: suffix in a file of PEFT -> what stands for it in that of any program.
        keeps_start: beside values that come from the base weight, it keeps what they amount to, to subtract it.
        stepwise: a training step uses other values than the rest: `begin` and `end` of its class.
        timed: options that act by the time of the denoising pass, which the attribute `clock` of its class tells.
        acts_on: option which some layers have no use for -> (the parameter that those have which do, why others do
            not).
        relative: the change of the weight is a function of the base weight, which its norm needs.
        elsewhere: (host or style of an entry; arguments which say that it is known; what it does otherwise than there).
        own_entries: entries whose defaults are for this algorithm alone: with another `algo=` they are as any entry.
        unet_entries: those of them whose networks leave the text encoders alone.
        about: for docs/algorithms.md.
    """

    name: str
    keys: Mapping[str, str]
    kinds: tuple[FileKind, ...]
    order: int = 1000
    family: str = "matrix"
    options: frozenset[str] = frozenset()
    arguments: tuple[Arg, ...] = ()
    features: frozenset[str] = ADDITIVE
    no_starts: Mapping[str, str] = field(
        default_factory=lambda: dict.fromkeys(("orthogonal", *OF_WEIGHT), "it has start values of its own")
    )
    start_error: float = 0.0
    plus: frozenset[str] = frozenset()
    grows: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    required: tuple[frozenset[str], ...] = ()
    more_keys: frozenset[str] = frozenset()
    numbered: frozenset[str] = frozenset()
    saved_as: str = ""
    fold: tuple[str, ...] = ()
    rank_shows: tuple[tuple[str, int], ...] = ()
    axes: tuple[Mapping[str, str], ...] = ()
    bias_key: str = ""
    shifts: bool = False
    saves_alpha: bool = True
    alpha_option: str = ""
    near_one: frozenset[str] = frozenset()
    unsaved: frozenset[str] = frozenset({"use_scalar"})
    peft_type: str = ""
    peft_keys: Mapping[str, str] = field(default_factory=dict)
    keeps_start: bool = False
    stepwise: bool = False
    timed: frozenset[str] = frozenset()
    acts_on: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    relative: bool = False
    elsewhere: tuple[tuple[str, frozenset[str], str], ...] = ()
    own_entries: tuple[str, ...] = ()
    unet_entries: tuple[str, ...] = ()
    about: About = field(default_factory=About)

    @property
    def takes(self) -> frozenset[str]:
        """Arguments that have an effect on it and not on every algorithm."""
        return self.options | self.features

    @property
    def core(self) -> str:
        """The parameter which its Tucker form has beside the others; "" = it has no such form."""
        return self.acts_on.get("use_tucker", ("", ""))[0]

    @property
    def plus_keys(self) -> tuple[str, ...]:
        """Suffixes in a file of the plus parameters."""
        return tuple(key for name, key in self.keys.items() if name in self.plus)

    @property
    def bias_name(self) -> str:
        """The parameter which is the change of the bias; "" = it has none."""
        return next((name for name, key in self.keys.items() if key == self.bias_key), "")

    @property
    def nested(self) -> bool:
        """Whether its first ranks stand alone, so that files can be cut to them."""
        return "save_dims" in self.features

    @property
    def file_algo(self) -> str:
        """The algorithm whose saved keys it has."""
        return self.saved_as or self.name

    def recognises(self, suffixes: Iterable[str]) -> bool:
        """Whether saved tensors under these suffixes can be a layer of its files."""
        present = set(suffixes)
        return any(marks <= present for marks in self.required or (frozenset(self.keys.values()),))

    def lacks(self, suffixes: Collection[str]) -> frozenset[str]:
        """What saved tensors under these suffixes want to be a layer of its files; none where some are of others."""
        present = set(suffixes)
        near = [marks for marks in self.required or (frozenset(self.keys.values()),) if not marks.isdisjoint(present)]
        if not near or not all(map(self.knows, present)):
            return frozenset()
        return min(near, key=lambda marks: (len(marks - present), -len(marks & present))) - present

    def knows(self, suffix: str) -> bool:
        """Whether its files have such tensors."""
        whole, _, number = suffix.rpartition(".")
        numbered = whole in self.numbered and number.isdecimal()
        return numbered or suffix in self.keys.values() or suffix in self.more_keys

    def acts(self, option: str, parameters: Collection[str]) -> bool:
        """Whether an option that was given changes something on a layer whose adapter has these parameters."""
        return option not in self.acts_on or self.acts_on[option][0] in parameters

    def hides_kernel(self, suffixes: Collection[str]) -> bool:
        """Whether these tensors show a kernel only by the number of its positions, among the columns."""
        forms = [form for form in self.axes if form.keys() <= set(suffixes)]
        return any(letters.endswith(("J", "E")) for form in forms for letters in form.values())

    def shown_rank(self, tensors: Mapping[str, Any]) -> int | None:
        """The rank that readers of these saved tensors divide alpha by; None if there is none."""
        return next((tensors[suffix].shape[axis] for suffix, axis in self.rank_shows if suffix in tensors), None)
