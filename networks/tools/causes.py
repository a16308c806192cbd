"""What may be wrong with an adapter file, one cause at a time, and how it is mended: on the bare tensors, before
anything is made of them, since most of these files are refused where files are opened.

A cause looks at a `Patient`, changes its tensors where that is known to be right, takes out of it what nobody can mend,
and says both. They are asked in the order of CAUSES: each may count on what the ones before it have done.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..algos import Adapter, recognise
from ..archs.names import DENOISER
from ..files import codec, dialects, dotted, soundness, strengths
from ..files.adapter_file import FileTensors, Naming
from ..files.explain import DORA, contradictions
from ..foreign.texts import parse_json
from ..models.adapters import fits, model_of
from ..models.skeleton import skeleton
from ..records.lora import LORA

DOWN, UP = LORA.keys["down"], LORA.keys["up"]
SHOWN = 3  # names in a sentence


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        what: it is, in words.
        where: names of layers or keys.
        cure: what was done about it, in words; "" = it cannot be mended.
        lost: `where` is left out.
    """

    what: str
    where: tuple[str, ...] = ()
    cure: str = ""
    lost: bool = False

    @property
    def sentence(self) -> str:
        names = ", ".join(self.where[:SHOWN]) + (" ..." if len(self.where) > SHOWN else "")
        count = f" ({len(self.where)}: {names})" if self.where else ""
        return f"{self.what}{count}: {self.cure or 'this cannot be mended'}"

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, "where": list(self.where), "cure": self.cure, "lost": self.lost,
                "sentence": self.sentence}  # fmt: skip


@dataclass
class Patient:
    """A file that is looked at.

    Attributes:
        source: its name.
        tensors: key -> tensor, as they are by now.
        metadata: of its header.
        settings: PEFT's, which stand beside it.
        strength: which the user says that its layers have, where they do not say it themselves.
        model: for which the user says that it is; "" = as its names and metadata say.
        notes: what is worth knowing and not wrong.
    """

    source: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    settings: Mapping[str, Any] | None = None
    strength: float | None = None
    model: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> dict[str, dict[str, str]]:
        """Name of each layer -> our suffix -> key."""
        found: dict[str, dict[str, str]] = {}
        for key, path, suffix in dotted.divided(self.tensors):
            found.setdefault(path, {})[dotted.own_suffix(path, suffix)] = key
        return found

    def algorithm(self, keys: Mapping[str, str]) -> type[Adapter] | None:
        """Of a layer."""
        return recognise({own: self.tensors[key] for own, key in keys.items() if own not in _BESIDE})

    def opened(self) -> FileTensors:
        """It as a file would be opened that has these tensors."""
        found = FileTensors(self.tensors, self.source)
        found.metadata, found.settings = self.metadata, self.settings
        return found

    def remove(self, keys: Iterable[str]) -> None:
        for key in keys:
            del self.tensors[key]


_BESIDE = (dotted.ALPHA, dotted.MAGNITUDE, dialects.BLISSFUL.magnitude)
Cause = Callable[[Patient], Iterator[Finding]]


# -- names

# Parts of a name that programs leave in it when they wrap a model: distributed training, torch.compile.
_WRAPPED = re.compile(r"^module\.|_orig_mod\.|(?<=_)_?orig_mod_|_checkpoint_wrapped_module\.")
_ROOTS = sorted((root for root in DENOISER if root != "default."), key=len, reverse=True)
_ENCODER = re.compile(r"^(lora_te\d?_)\1+")


def wrapped(patient: Patient) -> Iterator[Finding]:
    """Names with parts that are no part of the model's, or with their beginning twice."""
    plain = {key: _unwrapped(key) for key in patient.tensors}
    changed = {key: new for key, new in plain.items() if key != new}
    free = {key for key, new in changed.items() if Counter(plain.values())[new] == 1} if changed else set()
    if free:
        patient.tensors = {plain[key] if key in free else key: t for key, t in patient.tensors.items()}
        first = next(iter(sorted(free)))
        yield Finding(
            "names have a beginning twice, or what a program put into them when it wrapped the model",
            (first,), f"written without it, as {plain[first]}, {len(free)} keys in all",
        )  # fmt: skip


def _unwrapped(key: str) -> str:
    key = _ENCODER.sub(r"\1", _WRAPPED.sub("", key))
    for root in _ROOTS:
        rest = key.removeprefix(root)
        if rest != key and (rest.startswith(root) or any(rest.startswith(one) for one in _ROOTS)):
            return _unwrapped(rest)
    return key


def twice(patient: Patient) -> Iterator[Finding]:
    """One layer, or a tensor of it, under two names."""
    first: dict[tuple[str, str], str] = {}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for key, path, suffix in dotted.divided(patient.tensors):
        kept = first.setdefault((_plain(path), dotted.own_suffix(path, suffix)), key)
        if kept != key:
            pairs.setdefault(path, []).append((kept, key))
    equal, other = list[str](), list[str]()
    for path, found in pairs.items():
        alike = all(_equal(patient.tensors[kept], patient.tensors[key]) for kept, key in found)
        (equal if alike else other).append(path)
        patient.remove(key for _, key in found)
    if equal:
        yield Finding("the same values stand there twice under two names", tuple(equal), "one of each is kept")
    if other:
        what = "layers are there twice under two names with different values, and the first of each is kept"
        yield Finding(what, tuple(other), "left out", lost=True)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.float() == other.float()).all())


def _plain(path: str) -> str:
    root = next((root for root in _ROOTS if path.startswith(root)), "")
    return path[len(root) :].removeprefix(dotted.PEFT).replace(".", "_")


# -- values


def types(patient: Patient) -> Iterator[Finding]:
    """Values in a type which programs do not read."""
    wide = [key for key, t in patient.tensors.items() if t.dtype == torch.float64]
    if wide:
        patient.tensors |= {key: patient.tensors[key].float() for key in wide if _in_float32(patient.tensors[key])}
        yield Finding("values are in float64, which many programs do not read", tuple(wide), "written in float32")
    narrow = [key for key, t in patient.tensors.items() if t.is_floating_point() and t.itemsize == 1]
    if narrow:
        what = "values are in float8 without a scale, which other programs do not compute with"
        yield Finding(what, tuple(narrow), "written in bfloat16, which has all of them exactly")


def _in_float32(tensor: Tensor) -> bool:
    return not tensor.numel() or float(tensor.abs().max()) <= torch.finfo(torch.float32).max


def flipped(patient: Patient) -> Iterator[Finding]:
    """Factors of a LoRA that stand with their axes the other way round, or under each other's name."""
    one, both = list[str](), list[str]()
    for path, keys in patient.layers.items():
        if keys.keys() >= {DOWN, UP} and "lora_mid.weight" not in keys:
            down, up = patient.tensors[keys[DOWN]], patient.tensors[keys[UP]]
            if down.dim() != 2 or up.dim() != 2:
                continue
            turned = _turned(down, up)
            if turned:
                patient.tensors[keys[turned]] = patient.tensors[keys[turned]].T.contiguous()
                one.append(path)
            elif down.shape[1] == up.shape[0] and down.shape[0] > down.shape[1] and up.shape[1] > up.shape[0]:
                both.append(path)
    if one:
        yield Finding("one of the two factors has its axes the other way round", tuple(one), "turned back")
    if both:
        yield _of_both(patient, both)


def _turned(down: Tensor, up: Tensor) -> str:
    """The suffix of the one factor that has to be turned for both to have the same rank; "" = none alone."""
    (a, b), (c, d) = down.shape, up.shape
    if a == d:
        return ""
    return UP if a == c != b else DOWN if b == d != c else ""


def _of_both(patient: Patient, paths: list[str]) -> Finding:
    """Either both factors are turned, or each has the other's name: the model tells, by the shapes of its weights."""
    layers, before = patient.layers, dict(patient.tensors)
    pairs = [(layers[path][DOWN], layers[path][UP]) for path in paths]
    turned = before | {key: before[key].T.contiguous() for pair in pairs for key in pair}
    exchanged = before | {key: before[other] for pair in pairs for key, other in (pair, pair[::-1])}
    ways = {"turned back": turned, "given back their names": exchanged}
    fitting = []
    for cure, tensors in ways.items():
        patient.tensors = tensors
        fitting += [cure] if _fits_its_model(patient) else []
    patient.tensors = ways[fitting[0]] if len(fitting) == 1 else before
    what = "the factors have their axes the other way round, or each has the other's name"
    if len(fitting) == 1:
        return Finding(what, tuple(paths), fitting[0])
    patient.remove(key for path in paths for key in layers[path].values())
    return Finding(f"{what}, and no model tells which", tuple(paths), "left out", lost=True)


def _fits_its_model(patient: Patient) -> bool:
    try:
        file = patient.opened()
        return fits(file, skeleton(patient.model) if patient.model else model_of(file))
    except ValueError:
        return False


def broken_alphas(patient: Patient) -> Iterator[Finding]:
    """Alphas that are no number; they are missing from then on."""
    broken = [
        keys[dotted.ALPHA]
        for keys in patient.layers.values()
        if dotted.ALPHA in keys and not _is_alpha(patient.tensors[keys[dotted.ALPHA]])
    ]
    patient.remove(broken)
    if broken:
        yield Finding("alphas are no finite number", tuple(broken), "they count as missing")


def missing_alphas(patient: Patient) -> Iterator[Finding]:
    """Layers without a strength, among others that have one or where the user says it."""
    lacking, scales = _by_alpha(patient)
    said, known = "as --strength says", [] if patient.strength is None else [patient.strength]
    if not known:
        said, known = "that of all other layers; --strength says another", sorted(scales)
    if not lacking or not known:
        return
    if len(known) > 1:
        patient.notes.append(
            f"{len(lacking)} layers have no alpha, e.g. {next(iter(lacking))}, and the others have several strengths: "
            "they keep strength 1; --strength says another"
        )
        return
    for path, rank in lacking.items():
        patient.tensors[f"{path}.{dotted.ALPHA}"] = torch.tensor(known[0] * rank, dtype=torch.float32)
    what = "layers have no alpha, so that programs take their strength for 1"
    yield Finding(what, tuple(lacking), f"written with strength {known[0]:g}, {said}")


def _by_alpha(patient: Patient) -> tuple[dict[str, int], set[float]]:
    """Layers without an alpha -> rank, and the strengths of the others."""
    lacking, scales = dict[str, int](), set[float]()
    for path, keys in patient.layers.items():
        rank = _rank(patient, keys)
        if rank and dotted.ALPHA in keys:
            scales.add(float(patient.tensors[keys[dotted.ALPHA]]) / rank or 1.0)
        elif rank:
            lacking[path] = rank
    return lacking, scales


def _rank(patient: Patient, keys: Mapping[str, str]) -> int | None:
    """By which a layer's alpha is divided; None where it has no such strength."""
    algorithm = patient.algorithm(keys)
    if algorithm is None or not algorithm.spec.saves_alpha or algorithm.spec.alpha_option:
        return None
    return algorithm.spec.shown_rank({own: patient.tensors[key] for own, key in keys.items()})


def _is_alpha(tensor: Tensor) -> bool:
    if tensor.numel() != 1 or tensor.is_complex():
        return False
    value = float(tensor)
    return math.isfinite(value) and abs(value) <= soundness.LARGEST**2 and bool(value) == bool(tensor.float())


def unsound(patient: Patient) -> Iterator[Finding]:
    """Layers with values that no training gives, half ones, and such whose tensors do not go together."""
    why: dict[str, list[str]] = {}
    for path, keys in patient.layers.items():
        problem = _problem(patient, path, keys)
        if problem:
            why.setdefault(problem, []).append(path)
            patient.remove(keys.values())
    for problem, paths in why.items():
        yield Finding(problem, tuple(paths), "left out", lost=True)


def _problem(patient: Patient, path: str, keys: Mapping[str, str]) -> str:
    """Of one layer; "" = none."""
    tensors = {key: patient.tensors[key] for key in keys.values()}
    try:
        soundness.readable(tensors, "")
    except ValueError as error:
        return str(error).removeprefix(f": {path}: ").removeprefix(": ")
    strange = _strange(patient, path, keys)
    if not strange or not dotted.layers(tensors):
        return ""
    if strange == [dotted.ALPHA]:
        return "has an alpha alone, without factors"
    told = codec.unknown_form("", path, ", ".join(suffix for suffix in strange if suffix != dotted.ALPHA))
    return told.removeprefix(f": {dotted.shown(path)} ")


def _strange(patient: Patient, path: str, keys: Mapping[str, str]) -> list[str]:
    """The suffixes, as the file has them, that its algorithm does not know; all of them without one."""
    algorithm = patient.algorithm(keys)
    known = [] if algorithm is None else [own for own in keys if own in _BESIDE or algorithm.spec.knows(own)]
    spoken = {dotted.own_suffix(path, suffix): suffix for _, _, suffix in dotted.divided(keys.values()) if suffix}
    return [suffix for own, suffix in spoken.items() if own not in known]


_BESIDE_TENSORS = tuple(strengths.SAID[one] for one in (strengths.CONFIG, strengths.METADATA, strengths.HEADER))


def beside(patient: Patient) -> Iterator[Finding]:
    """Strengths that stand beside the tensors, or disagree with each other there."""
    try:
        tensors, where = strengths.with_strengths(patient.tensors, patient.metadata, patient.settings, patient.source)
    except ValueError as error:
        if patient.strength is None:
            yield Finding(f"{error}; or give the right one, --strength")
            return
        sources = (strengths.METADATA, *strengths.NUMBERS)
        patient.settings = None
        patient.metadata = {key: text for key, text in patient.metadata.items() if key not in sources}
        patient.remove(
            [keys[dotted.ALPHA] for keys in patient.layers.values() if _rank(patient, keys) and dotted.ALPHA in keys]
        )
        yield Finding(str(error), (), "these are left out of account, and --strength counts")
        return
    found = [one for one in _BESIDE_TENSORS if one in where]
    if found:
        patient.tensors, patient.settings = tensors, None
        yield Finding(
            f"its strength stands beside the tensors, in {' and '.join(found)}, where many programs do not look", (),
            "written as the alpha of each layer",
        )  # fmt: skip
    elif where == strengths.SAID[strengths.NOTHING] and patient.strength is None:
        patient.notes.append("nothing says how strong it is, so that its strength is 1; --strength says another")


def magnitudes(patient: Patient) -> Iterator[Finding]:
    """DoRA that has lost its magnitudes."""
    try:
        layers = patient.opened().opened(Naming()).layers
    except ValueError:
        return
    if any("no magnitudes" in text for text in contradictions(layers.values(), patient.metadata)):
        arguments = parse_json(patient.metadata["ss_network_args"])
        plain = {name: value for name, value in arguments.items() if name not in DORA}
        patient.metadata = {**patient.metadata, "ss_network_args": json.dumps(plain)}
        yield Finding(
            "metadata say that DoRA trained it, and it has no magnitudes: a converter has left them out. They were "
            "learnt with the factors and nothing else holds them; what is left acts as a plain adapter, and magnitudes "
            "of ||W + dW|| would change nothing about that. Take the file from before it was converted"
        )


CAUSES: tuple[Cause, ...] = (
    wrapped, twice, types, flipped, broken_alphas, unsound, beside, missing_alphas, magnitudes
)  # fmt: skip
