"""How strong a layer of a file is, where its own alpha does not say: what programs write beside the tensors.

In this order: `.alpha` of the layer; `adapter_config.json` in the file's folder (PEFT's); `lora_adapter_metadata` in
the header (diffusers' form of the same); a number `alpha` or `lora_alpha` in the header; else 1, which is said. Two
that disagree are an error. `ss_network_alpha` is none of them: the trainers' converters multiply alpha into the tensors
and keep that key.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algos import ALGOS, Adapter, recognise
from ..foreign.expressions import TOO_SLOW, compiled, slow
from ..foreign.texts import parse_json, printable, read_json
from . import dotted
from .soundness import LARGEST

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # of a file: PEFT's settings, as JSON, under the names of a pipeline's components
NUMBERS = ("alpha", "lora_alpha")  # of a header, for the whole file
ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # peft_type -> what is divided by r
# Start values by which PEFT changes the base weights, too: such a file acts on that other base alone.
OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
ALPHA, HEADER, NOTHING = "alpha", "header", ""
SAID = {
    ALPHA: "its alpha",
    CONFIG: CONFIG,
    METADATA: f"{METADATA} in the header",
    HEADER: "a number in the header",
    NOTHING: "nothing, so it is 1",
}
ROUNDED = 5e-3  # an alpha in bf16


@dataclass(frozen=True)
class Said:
    """What one source says of a layer.

    Attributes:
        rank: which it takes the layer to have; None = whatever it has.
        root: RS-LoRA, alpha / sqrt(rank).
    """

    alpha: float
    rank: int | None = None
    root: bool = False

    def scale(self, shown: int | None) -> float | None:
        """The layer's scale; None if that depends on a rank which nobody knows."""
        rank = self.rank or shown
        if not rank:
            return None
        return (self.alpha or float(rank)) / (math.sqrt(rank) if self.root else rank)


Ask = Callable[[str], "Said | None"]


def beside(path: Path) -> dict[str, Any] | None:
    """PEFT's settings in the folder of a file; None without any.

    Raises:
        ValueError: they cannot be read.
    """
    file = path.parent / CONFIG
    if not file.is_file():
        return None
    try:
        settings = read_json(file)
    except ValueError as error:
        raise ValueError(f"{CONFIG} cannot be read, {error}: mend it, or move it away from {path.name}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings: mend it, or move it away from {path.name}")
    return settings


def with_strengths(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, source: str
) -> tuple[dict[str, Tensor], str]:
    """A file's tensors, where each layer has the alpha that stands for its strength, wherever the file says it.

    Args:
        tensors: under the file's own keys.
        metadata: of its header.
        settings: of `beside`; they are of names with dots.
        source: name of the file, for messages.

    Returns:
        The tensors under the same keys, and where their strengths stand, for people.

    Raises:
        ValueError: settings cannot be read, or two sources disagree.
    """
    if settings is not None and dotted.has_dots(tensors):
        tensors = _without_settings(tensors, settings)
    else:
        settings = None
    asked = dict(_sources(metadata, settings, source, dotted.layers(tensors)))
    layers: dict[str, dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    written: dict[str, set[str]] = {}
    for key, name, suffix in dotted.divided(tensors):
        own = dotted.SUFFIXES.get(suffix, suffix)
        layers.setdefault(name, {})[own], keys[name, own] = tensors[key], key
        written.setdefault(name, set()).add(suffix)
    found, deciding = dict(tensors), Counter[str]()
    for name, layer in layers.items():
        algorithm = recognise(layer)
        if algorithm is not None and algorithm.spec.saves_alpha and not algorithm.spec.alpha_option:
            title, filled = _filled(name, layer, algorithm, asked, source)
            filled = _with_scaled_bias(filled, algorithm, written[name])
            deciding[title] += 1
            found |= {keys.get((name, suffix), f"{name}.{suffix}"): tensor for suffix, tensor in filled.items()}
    if len(deciding) == 1:
        return found, SAID[next(iter(deciding))]
    return found, ", ".join(f"{SAID[title]} ({count} layers)" for title, count in deciding.items())


def _with_scaled_bias(layer: dict[str, Tensor], algorithm: type[Adapter], written: set[str]) -> dict[str, Tensor]:
    """A layer whose change of the bias is in full, where the file has one that is multiplied as the weight's is.

    Args:
        layer: our suffix -> tensor.
        written: the suffixes of the file.
    """
    rank, key = algorithm.spec.shown_rank(layer), algorithm.spec.bias_key
    alpha = float(layer[ALPHA]) if ALPHA in layer else 0.0
    if not rank or not alpha or alpha == rank or written.isdisjoint(dotted.SCALED_BIAS):
        return layer
    return {**layer, key: layer[key].to(torch.promote_types(layer[key].dtype, torch.float32)) * (alpha / rank)}


def _without_settings(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors of a file of PEFT as any program has them, where only its settings say how they are meant."""
    kind = settings.get("peft_type")
    algorithm = next((cls for cls in ALGOS.values() if cls.spec.peft_type and cls.spec.peft_type == kind), None)
    if algorithm is None:
        return tensors
    found: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, name, suffix in dotted.divided(tensors):
        if suffix in algorithm.spec.peft_keys:
            layers.setdefault(name, {})[algorithm.spec.peft_keys[suffix]] = tensors[key]
        else:
            found[key] = tensors[key]
    try:
        for name, layer in layers.items():
            found |= {f"{name}.{suffix}": t for suffix, t in algorithm.of_peft(layer, settings).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{CONFIG} cannot be read ({error}): save the file from PEFT again") from None
    return found


def _filled(
    name: str, layer: dict[str, Tensor], algorithm: type[Adapter], asked: Mapping[str, Ask], source: str
) -> tuple[str, dict[str, Tensor]]:
    """The source that decides a layer's strength, and its tensors with that.

    Args:
        layer: our suffix -> tensor.
        asked: key of SAID -> what that source says of a layer.

    Raises:
        ValueError: two sources disagree, or one is of another rank.
    """
    rank = algorithm.spec.shown_rank(layer)
    said = {title: one for title, ask in asked.items() if (one := ask(name)) is not None}
    for title, one in said.items():
        if one.rank and rank and one.rank != rank:
            raise ValueError(
                f"{source}: {name} has rank {rank}, but {SAID[title]} says {one.rank}: the two do not belong "
                "together, so take both from one save"
            )
    scales = {title: scale for title, one in said.items() if (scale := one.scale(rank)) is not None}
    candidates = _with_alpha(scales, layer.get(ALPHA), rank)
    first = next(iter(candidates), NOTHING)
    if abs(candidates.get(first, 0.0)) > LARGEST:
        raise ValueError(
            f"{source}: the strength of {name} is {candidates[first]:.1e} by {SAID[first]}, which no training gives: "
            "use an earlier save, or correct it there"
        )
    for title, scale in candidates.items():
        if not math.isclose(scale, candidates[first], rel_tol=ROUNDED):
            raise ValueError(
                f"{source}: the strength of {name} is {candidates[first]:g} by {SAID[first]}, but {scale:g} by "
                f"{SAID[title]}: remove the one that is wrong"
            )
    return first, algorithm.with_scale(layer, scales[first]) if first in scales else layer


def _with_alpha(scales: Mapping[str, float], alpha: Tensor | None, rank: int | None) -> dict[str, float]:
    """The scales, behind that of a layer's own alpha if it has one. It stands alone where no rank shows, and a number
    in the header is for layers without."""
    if alpha is None:
        return dict(scales)
    if not rank:
        return {ALPHA: 1.0}
    others = {title: scale for title, scale in scales.items() if title != HEADER}
    return {ALPHA: float(alpha) / rank if float(alpha) else 1.0, **others}


def _sources(
    metadata: Mapping[str, str], settings: Mapping[str, Any] | None, source: str, names: Sequence[str]
) -> Iterator[tuple[str, Ask]]:
    if settings is not None and settings.get("peft_type") in ALPHAS:
        yield CONFIG, _Settings(settings, f"{CONFIG} beside {source}", names).of
    if METADATA in metadata:
        yield METADATA, _Components(metadata[METADATA], f"{METADATA} of {source}", names).of
    numbers = {name: _number(metadata, name, f"the header of {source}") for name in NUMBERS if name in metadata}
    if len({*numbers.values()}) > 1:
        told = " and ".join(f"{name} = {value:g}" for name, value in numbers.items())
        raise ValueError(f"the header of {source} says {told}: remove the one that is wrong")
    for value in [*numbers.values()][:1]:
        yield HEADER, lambda name, said=Said(value): said  # type: ignore[misc]


class _Settings:
    """PEFT's settings of one adapter.

    Args:
        where: for messages.
        names: of the file's layers.
        stem: what names of layers begin with, which patterns do not see.
    """

    def __init__(self, settings: Mapping[str, Any], where: str, names: Iterable[str], stem: str = "") -> None:
        start = str(settings.get("init_lora_weights")).lower()
        if start.startswith(OWN_BASE):
            raise ValueError(
                f"{where}: init_lora_weights={printable(start, 200)} changed the base weights, too, and the file acts "
                "on those alone: save it from PEFT with path_initial_model_for_weight_conversion"
            )
        if settings.get("layer_replication"):
            raise ValueError(
                f"{where}: layer_replication makes another model, with some of its layers twice: merge the file there"
            )
        self.where, self.stem, self.root = where, stem, bool(settings.get("use_rslora"))
        alpha = ALPHAS.get(str(settings.get("peft_type")), "lora_alpha")
        self.alpha = _number(settings, alpha, where) if settings.get(alpha) is not None else None
        self.rank = _number(settings, "r", where) if settings.get("r") is not None else None
        self.alphas, self.ranks = (self._numbers(settings.get(f"{name}_pattern")) for name in ("alpha", "rank"))
        self._check_patterns(names)

    def _numbers(self, table: Any) -> dict[str, float]:
        if not isinstance(table or {}, Mapping):
            raise ValueError(
                f"{self.where}: its patterns are {printable(table, 200)}, not a table of names and numbers: save the "
                "file from PEFT again"
            )
        return {str(key): _number(table, key, self.where) for key in table or {}}

    def of(self, name: str) -> Said | None:
        """For each value the first pattern that fits the end of the layer's name decides, as in PEFT."""
        name = name.removeprefix(self.stem).removeprefix(dotted.PEFT)
        alpha, rank = self._first(self.alphas, name, self.alpha), self._first(self.ranks, name, self.rank)
        return None if alpha is None else Said(alpha, None if rank is None else int(rank), self.root)

    def _first(self, patterns: Mapping[str, float], name: str, default: float | None) -> float | None:
        return next((value for key, value in patterns.items() if self.endings[key].match(name)), default)

    def _check_patterns(self, names: Iterable[str]) -> None:
        """Compile what PEFT looks for at the end of names."""
        try:
            self.endings = {key: compiled(rf"(.*\.)?({key})$") for key in (*self.alphas, *self.ranks)}
        except ValueError as error:
            raise ValueError(f"{self.where}: a pattern is no regular expression ({error}): mend it") from None
        found = slow([ending.pattern for ending in self.endings.values()], names)
        if found is not None:
            raise ValueError(f"{self.where}: a pattern of its settings, '{printable(found, 200)}', {TOO_SLOW}")


class _Components:
    """The same for the components of a pipeline: `transformer.lora_alpha`."""

    def __init__(self, text: str, where: str, names: Iterable[str]) -> None:
        try:
            settings = parse_json(text)
            parts: dict[str, dict[str, Any]] = {}
            for key, value in settings.items():
                component, _, name = key.partition(".")
                parts.setdefault(component, {})[name] = value
        except (ValueError, AttributeError) as error:
            told = printable(error, 200)
            raise ValueError(f"the metadata {where} cannot be read ({told}): save the file again") from None
        self.parts = {name: _Settings(part, where, names, f"{name}.") for name, part in parts.items()}

    def of(self, name: str) -> Said | None:
        part = self.parts.get(name.partition(".")[0])
        return None if part is None else part.of(name)


def _number(settings: Mapping[str, Any], name: str, where: str) -> float:
    """Raises ValueError for what is no finite number, or below 0."""
    try:
        value = float(settings[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0 or isinstance(settings[name], bool):
        raise ValueError(
            f"{where}: {printable(name, 200)} is '{printable(settings[name], 80)}', which is no strength: write a "
            "number, 0 or more"
        )
    return value
